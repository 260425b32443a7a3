r"""Uniform noise for the draws of an importance sampler, handed out particle by particle, and what turns it into draws.

A stream's ``take(k)`` is the noise of its next k particles. It depends on its seed and on what was taken before, not on
how that was split, so that blocks of any size make up one and the same sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

REPLICATES = 20  # independent randomisations of a quasi-random sample, whose spread is the standard error


def generator(seed: int, device: torch.device) -> torch.Generator:
    """A generator of its own for a stream."""
    return torch.Generator(device).manual_seed(seed)


class Systematic:
    r"""One uniform for every particle and row, ``(k, N)``: a systematic sample in groups of G successive particles.

    .. math:: u_{gjn} = (v_{gn} + j / n_g) \bmod 1, \qquad v_{gn} \sim U(0, 1)

    Each is uniform by itself, and a group of :math:`n_g = G` has one in every interval of length 1/G. The last group
    is smaller where G does not divide K. ``repeat`` successive particles share a value.
    """

    def __init__(self, num_particles: int, rows: int, group: int, repeat: int, seed: int, device: torch.device):
        self.left, self.rows, self.size, self.repeat = num_particles, rows, group, repeat
        self.generator = generator(seed, device)
        self.rest = torch.zeros(0, rows, dtype=torch.float64, device=device)

    def take(self, k: int) -> Tensor:
        device, parts, have = self.rest.device, [self.rest], len(self.rest)
        if have < k:
            groups = -(-(k - have) // (self.size * self.repeat))
            v = torch.rand(groups, 1, self.rows, dtype=torch.float64, device=device, generator=self.generator)
            left = torch.arange(groups, device=device) * -self.size * self.repeat + self.left
            sizes = (-(-left // self.repeat)).clamp(max=self.size)[:, None, None]
            j = torch.arange(self.size, device=device)[:, None]
            parts.append(((v + j / sizes) % 1).flatten(0, 1).repeat_interleave(self.repeat, 0))
            self.left -= groups * self.size * self.repeat
        whole = torch.cat(parts)
        self.rest = whole[k:].clone()
        return whole[:k]


class Antithetic:
    """Uniforms ``(k, N, D)`` in pairs of successive particles, u and 1 - u."""

    def __init__(self, rows: int, dimensions: int, seed: int, device: torch.device):
        self.shape, self.generator = (rows, dimensions), generator(seed, device)
        self.rest = torch.zeros(0, *self.shape, dtype=torch.float64, device=device)

    def take(self, k: int) -> Tensor:
        pairs, device = -(-(k - len(self.rest)) // 2), self.rest.device
        u = torch.rand(pairs, *self.shape, dtype=torch.float64, device=device, generator=self.generator)
        whole = torch.cat([self.rest, torch.stack([u, 1 - u], 1).flatten(0, 1)])
        self.rest = whole[k:].clone()
        return whole[:k]


class QuasiRandom:
    r"""Uniforms ``(k, N, D)`` from scrambled Sobol points, another scrambling every ``group`` particles.

    Each row shifts the points by a uniform vector of its own, modulo 1 (Cranley & Patterson 1976), so that rows are
    independent of each other. Owen 1997 (Annals of Statistics 25:1541); the points are ``torch.quasirandom``'s.
    """

    def __init__(self, rows: int, dimensions: int, group: int, seed: int, device: torch.device):
        if dimensions > torch.quasirandom.SobolEngine.MAXDIM:
            raise ValueError(f"quasi-random draws have at most 21201 dimensions, and the latents have {dimensions}")
        self.shape, self.group, self.device = (rows, dimensions), group, device
        self.generator, self.left = generator(seed, device), 0

    def take(self, k: int) -> Tensor:
        parts = []
        while k:
            if not self.left:
                self.left = self.group
                seed = int(torch.randint(2**31, (), device=self.device, generator=self.generator))
                self.engine = torch.quasirandom.SobolEngine(self.shape[1], scramble=True, seed=seed)
                self.shift = torch.rand(*self.shape, dtype=torch.float64, device=self.device, generator=self.generator)
            n = min(k, self.left)
            points = self.engine.draw(n, dtype=torch.float64).to(self.device)
            parts.append((points[:, None] + self.shift) % 1)
            k, self.left = k - n, self.left - n
        return torch.cat(parts)
