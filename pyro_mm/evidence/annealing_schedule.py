"""Temperatures between a guide and the posterior, and the moves of chains along them."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..scoring.structure import Callback
from .annealing_target import ChainState, TemperedDensity

TARGET_ACCEPTANCE = 0.8  # the acceptance rate that step sizes are tuned to


STEP_SIZE_RATE = 0.3  # of the tuning of log step sizes, an update a transition


VARIANCE_DECAY = 0.9  # how much of the chains' variance is remembered from one temperature to the next


STEP_SIZE_JITTER = (
    0.5  # relative, of every trajectory's step: orbits of a Gaussian are periodic, and would return to their start
)


WARM_UP_MOVES = 20  # transitions at the first temperature, for a step size to start from


SMOOTHING_WINDOW = 9  # grid points over which the pilot's measurements are averaged


UNIFORM_SHARE = 0.1  # the share of the schedule that the pilot does not choose


class AnnealingSchedule:
    """The temperatures from q_0 to the posterior, a schedule for every row, and what tunes the moves at each."""

    def __init__(
        self,
        model: Callback,
        guide: Callback,
        batch: Batch,
        temperatures: int,
        leapfrog_steps: int,
        start: Literal["guide", "prior"],
        pilot_chains: int,
        vectorize: bool,
    ):
        self.bridge = TemperedDensity(model, guide, batch, start, vectorize)
        self.leapfrog_steps = leapfrog_steps
        self._tune(pilot_chains, temperatures)

    def _tune(self, chains: int, temperatures: int) -> None:
        """Runs pilot chains up a grid of temperatures, and from them chooses the schedule, step sizes and scales."""
        u = self.bridge.draws(chains)
        at, variance = self.bridge.at(u), {name: x.var(0) for name, x in u.items()}
        step = torch.full_like(at.log_p[0], 0.5)
        grid = torch.linspace(
            -4, 4, max(temperatures // 2, WARM_UP_MOVES) + 1, dtype=step.dtype, device=step.device
        ).sigmoid()
        grid = (grid - grid[0]) / (grid[-1] - grid[0])
        steps, scales, speeds = [], [], [(at.log_p - at.log_q).std(0)]
        for t, beta in enumerate(grid[1:]):
            scale = {name: v.sqrt().clamp(min=1e-6) for name, v in variance.items()}
            for _ in range(WARM_UP_MOVES if t == 0 else 1):
                at, accept = self._move(at, beta, step, scale)
                step = (step * (STEP_SIZE_RATE * (accept.mean(0) - TARGET_ACCEPTANCE)).exp()).clamp(1e-4, 10.0)
            steps.append(step)
            scales.append(scale)
            speeds.append((at.log_p - at.log_q).std(0))
            variance = {n: VARIANCE_DECAY * v + (1 - VARIANCE_DECAY) * at.u[n].var(0) for n, v in variance.items()}
        self.betas, place = equal_variance_temperatures(grid, torch.stack(speeds), temperatures)
        every = torch.arange(place.shape[1], device=place.device)
        self.steps = torch.stack(steps)[place, every]  # (T, N)
        self.scales = {n: torch.stack([scale[n] for scale in scales]) for n in u}
        self.place = place

    def run(self, u: dict[str, Tensor], forward: bool = True) -> Tensor:
        """Log-weights ``(C, N)`` of chains from the states u at one end of the path."""
        at = self.bridge.at(u)
        log_w = torch.zeros_like(at.log_p)
        for t in range(len(self.steps)) if forward else reversed(range(len(self.steps))):
            gap = self.betas[t + 1] - self.betas[t]
            if forward:
                log_w = log_w + gap * (at.log_p - at.log_q)
            scale = {n: self.bridge.of_rows(n, x, self.place[t]) for n, x in self.scales.items()}
            at, _ = self._move(at, self.betas[t + 1], self.steps[t], scale)
            if not forward:
                log_w = log_w - gap * (at.log_p - at.log_q)
        return log_w

    def _move(self, at: ChainState, beta: Tensor, step: Tensor, scale: dict[str, Tensor]) -> tuple[ChainState, Tensor]:
        """A Hamiltonian move of every chain at a temperature, and its acceptance probabilities ``(C, N)``."""
        bridge = self.bridge
        jitter = 1 + STEP_SIZE_JITTER * (2 * torch.rand_like(at.log_p) - 1)
        wide = {n: bridge.spread(n, step * jitter) * scale[n] for n in at.u}
        p = bridge.momenta(at.u)
        before = at.energy(beta) + bridge.kinetic(p)
        new = at
        for _ in range(self.leapfrog_steps):
            slope = bridge.slope(new, beta)
            p = {n: x - 0.5 * wide[n] * slope[n] for n, x in p.items()}
            new = bridge.at({n: x + wide[n] * p[n] for n, x in new.u.items()})
            slope = bridge.slope(new, beta)
            p = {n: x - 0.5 * wide[n] * slope[n] for n, x in p.items()}
        log_accept = (before - new.energy(beta) - bridge.kinetic(p)).nan_to_num(nan=-math.inf).clamp(max=0)
        moved = torch.rand_like(log_accept).log() < log_accept
        return bridge.where(moved, new, at), log_accept.exp()


def equal_variance_temperatures(grid: Tensor, speeds: Tensor, temperatures: int) -> tuple[Tensor, Tensor]:
    """Temperatures ``(T + 1, N)`` at equal distances along the path, and the interval of the grid that each lies in.

    The distance of two temperatures is the integral of the standard deviation of log p(x, z) - log q_0(z), of which the
    log-weights' variance is made (Gelman & Meng 1998, Statistical Science 13:163). It is noisy, so it is smoothed, and
    mixed with the grid's own spacing.
    """
    speeds = speeds.nan_to_num(0.0, 0.0, 0.0)
    kernel = torch.ones(1, 1, SMOOTHING_WINDOW, dtype=speeds.dtype, device=speeds.device) / SMOOTHING_WINDOW
    padded = torch.nn.functional.pad(
        speeds.T[:, None], (SMOOTHING_WINDOW // 2, SMOOTHING_WINDOW // 2), mode="replicate"
    )
    speeds = torch.nn.functional.conv1d(padded, kernel)[:, 0].T
    lengths = grid.diff()[:, None] * (speeds[1:] + speeds[:-1]) / 2
    share = lengths / lengths.sum(0).clamp(min=torch.finfo(lengths.dtype).tiny)
    share = torch.where(lengths.sum(0) > 0, (1 - UNIFORM_SHARE) * share, 0.0) + UNIFORM_SHARE / len(lengths)
    travelled = torch.cat([torch.zeros_like(share[:1]), share.cumsum(0)])
    travelled = travelled / travelled[-1]
    goals = torch.arange(1, temperatures + 1, dtype=grid.dtype, device=grid.device) / temperatures
    place = torch.searchsorted(travelled.T.contiguous(), goals.expand(speeds.shape[1], -1).contiguous()).T
    place = place.clamp(1, len(lengths)) - 1
    every = torch.arange(speeds.shape[1], device=grid.device)
    within = (goals[:, None] - travelled[place, every]) / share[place, every] * travelled[-1]
    betas = grid[place] + within.clamp(0, 1) * (grid[place + 1] - grid[place])
    betas[-1] = 1.0
    return torch.cat([torch.zeros_like(betas[:1]), betas]), place
