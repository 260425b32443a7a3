r"""Streams of uniform noise for the draws of an importance sampler.

A stream's ``take(k)`` returns the noise of its next k particles. It depends on the stream's seed and on what was taken
before, and not on how that was split, so that blocks of any size make up the same sample.
"""

from __future__ import annotations

import torch
from torch import Tensor

REPLICATES = 20  # independent randomisations of a quasi-random sample, whose spread is the standard error


def generator(seed: int, device: torch.device) -> torch.Generator:
    """Return a generator of its own for a stream."""
    return torch.Generator(device).manual_seed(seed)


class Systematic:
    r"""Stream of a systematic sample in groups of G successive particles, one uniform per particle and row.

    .. math:: u_{gjn} = (v_{gn} + j / n_g) \bmod 1, \qquad v_{gn} \sim U(0, 1)

    Each is uniform by itself, and a group of :math:`n_g = G` has one in every interval of length 1/G. The last group
    is smaller if G does not divide K.

    Args:
        num_particles: K, of the whole stream.
        rows: N.
        group: G.
        repeat: the number of successive particles that share a value.
        seed: of the stream.
        device: of the noise.
    """

    def __init__(self, num_particles: int, rows: int, group: int, repeat: int, seed: int, device: torch.device):
        self.rows = rows
        self.group = group
        self.repeat = repeat
        self._generator = generator(seed, device)
        self._ungrouped = num_particles  # particles that are in no group yet
        self._rest = torch.zeros(0, rows, dtype=torch.float64, device=device)

    def take(self, k: int) -> Tensor:
        """Return the uniforms of the next k particles, ``(k, N)``, in double precision."""
        noise = [self._rest]
        if len(self._rest) < k:
            noise.append(self._next_groups(k - len(self._rest)))
        whole = torch.cat(noise)
        self._rest = whole[k:].clone()
        return whole[:k]

    def _next_groups(self, k: int) -> Tensor:
        """Return the uniforms of so many groups as hold k particles."""
        device = self._rest.device
        length = self.group * self.repeat  # particles of a group
        groups = -(-k // length)
        v = torch.rand(groups, 1, self.rows, dtype=torch.float64, device=device, generator=self._generator)

        left = torch.arange(groups, device=device) * -length + self._ungrouped  # particles from each group on
        sizes = (-(-left // self.repeat)).clamp(max=self.group)[:, None, None]
        self._ungrouped -= groups * length

        j = torch.arange(self.group, device=device)[:, None]
        return ((v + j / sizes) % 1).flatten(0, 1).repeat_interleave(self.repeat, 0)


class Antithetic:
    """Stream of uniforms in pairs of successive particles, u and 1 - u.

    Args:
        rows: N.
        dimensions: D.
        seed: of the stream.
        device: of the noise.
    """

    def __init__(self, rows: int, dimensions: int, seed: int, device: torch.device):
        self.shape = (rows, dimensions)
        self._generator = generator(seed, device)
        self._rest = torch.zeros(0, *self.shape, dtype=torch.float64, device=device)

    def take(self, k: int) -> Tensor:
        """Return the uniforms of the next k particles, ``(k, N, D)``, in double precision."""
        pairs = -(-(k - len(self._rest)) // 2)
        device = self._rest.device
        u = torch.rand(pairs, *self.shape, dtype=torch.float64, device=device, generator=self._generator)
        whole = torch.cat([self._rest, torch.stack([u, 1 - u], 1).flatten(0, 1)])
        self._rest = whole[k:].clone()
        return whole[:k]


class QuasiRandom:
    r"""Stream of scrambled Sobol points, scrambled anew every ``group`` particles.

    Each row shifts the points by a uniform vector of its own, modulo 1, so that rows are independent of each other.
    The points are those of ``torch.quasirandom``.

    Args:
        rows: N.
        dimensions: D, at most 21,201.
        group: particles of one scrambling.
        seed: of the stream.
        device: of the noise.

    Raises:
        ValueError: more dimensions.

    References:
        Owen 1997, "Monte Carlo variance of scrambled net quadrature", Annals of Statistics 25:1541. Cranley & Patterson
        1976, "Randomization of number theoretic methods for multiple integration", SIAM J. Numer. Anal. 13:904.
    """

    def __init__(self, rows: int, dimensions: int, group: int, seed: int, device: torch.device):
        if dimensions > torch.quasirandom.SobolEngine.MAXDIM:
            raise ValueError(f"quasi-random draws have at most 21201 dimensions, and the latents have {dimensions}")
        self.shape = (rows, dimensions)
        self.group = group
        self.device = device
        self._generator = generator(seed, device)
        self._left = 0  # particles of the present scrambling

    def take(self, k: int) -> Tensor:
        """Return the points of the next k particles, ``(k, N, D)``, in double precision."""
        parts = []
        while k:
            if not self._left:
                self._scramble()
            length = min(k, self._left)
            points = self._engine.draw(length, dtype=torch.float64).to(self.device)
            parts.append((points[:, None] + self._shift) % 1)
            k -= length
            self._left -= length
        return torch.cat(parts)

    def _scramble(self) -> None:
        self._left = self.group
        seed = int(torch.randint(2**31, (), device=self.device, generator=self._generator))
        self._engine = torch.quasirandom.SobolEngine(self.shape[1], scramble=True, seed=seed)
        self._shift = torch.rand(*self.shape, dtype=torch.float64, device=self.device, generator=self._generator)
