"""Temperatures between a guide and the posterior for each row, and runs of chains along them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .annealing_target import TemperedDensity
from .hamiltonian import hamiltonian_move

TARGET_ACCEPTANCE = 0.8  # the acceptance rate that step sizes are tuned to
STEP_SIZE_RATE = 0.3  # learning rate of log step sizes, which are updated once a move
FIRST_STEP_SIZE = 0.5
STEP_SIZE_RANGE = (1e-4, 10.0)
VARIANCE_DECAY = 0.9  # weight of the running estimate of the chains' variance, from one temperature to the next
WARM_UP_MOVES = 20  # moves at the first temperature, for a step size to start from
LEAST_SCALE = 1e-6  # of a coordinate
SMOOTHING_WINDOW = 9  # grid points over which the pilot's standard deviations are averaged
UNIFORM_SHARE = 0.1  # the share of the schedule that is spaced as the grid is, whatever the pilot finds


@dataclass
class AnnealingSchedule:
    """Temperatures, step sizes and scales, tuned for each row and then fixed.

    Attributes:
        density: the path of densities.
        leapfrog_steps: steps of a move.
        betas: temperatures from 0 to 1, ``(T + 1, N)``.
        step_sizes: ``(T, N)``.
        intervals: the interval of the pilot's grid in which each temperature lies, ``(T, N)``, long.
        scales: scales of the coordinates in each interval, ``(G, N, D)``.
    """

    density: TemperedDensity
    leapfrog_steps: int
    betas: Tensor
    step_sizes: Tensor
    intervals: Tensor
    scales: Tensor

    @staticmethod
    def tune(density: TemperedDensity, temperatures: int, leapfrog_steps: int, pilot_chains: int) -> AnnealingSchedule:
        """Return a schedule tuned on pilot chains that run up a grid of temperatures.

        Args:
            density: the path of densities.
            temperatures: T.
            leapfrog_steps: steps of a move.
            pilot_chains: number of chains per row, two at least.
        """
        u = density.initial_draws(pilot_chains)
        state = density.state_at(u)
        variance = u.var(0)
        step_size = torch.full_like(state.log_p[0], FIRST_STEP_SIZE)
        grid = _pilot_grid(max(temperatures // 2, WARM_UP_MOVES), step_size)

        step_sizes = []
        scales = []
        deviations = [state.log_ratio.std(0)]
        for interval, beta in enumerate(grid[1:]):
            scale = variance.sqrt().clamp(min=LEAST_SCALE)
            for _ in range(WARM_UP_MOVES if interval == 0 else 1):
                state, acceptance = hamiltonian_move(density, state, beta, step_size, scale, leapfrog_steps)
                factor = (STEP_SIZE_RATE * (acceptance.mean(0) - TARGET_ACCEPTANCE)).exp()
                step_size = (step_size * factor).clamp(*STEP_SIZE_RANGE)
            step_sizes.append(step_size)
            scales.append(scale)
            deviations.append(state.log_ratio.std(0))
            variance = VARIANCE_DECAY * variance + (1 - VARIANCE_DECAY) * state.u.var(0)

        betas, intervals = equal_variance_temperatures(grid, torch.stack(deviations), temperatures)
        rows = torch.arange(intervals.shape[1], device=intervals.device)
        return AnnealingSchedule(
            density,
            leapfrog_steps,
            betas,
            torch.stack(step_sizes)[intervals, rows],
            intervals,
            torch.stack(scales),
        )

    def log_weights(self, u: Tensor, forward: bool = True) -> Tensor:
        """Run chains from one end of the path to the other, and return their log-weights ``(C, N)``, in nats.

        Args:
            u: coordinates at the start, ``(C, N, D)``, draws from q_0; with ``forward=False`` draws from the posterior.
            forward: from q_0 to the posterior, with weights of mean p(x); else back, with weights of mean 1 / p(x).
        """
        state = self.density.state_at(u)
        rows = torch.arange(self.density.size, device=u.device)
        log_w = torch.zeros_like(state.log_p)
        steps = range(len(self.step_sizes))
        for t in steps if forward else reversed(steps):
            gap = self.betas[t + 1] - self.betas[t]
            if forward:
                log_w = log_w + gap * state.log_ratio
            scale = self.scales[self.intervals[t], rows]
            state, _ = hamiltonian_move(
                self.density, state, self.betas[t + 1], self.step_sizes[t], scale, self.leapfrog_steps
            )
            if not forward:
                log_w = log_w - gap * state.log_ratio
        return log_w


def _pilot_grid(intervals: int, like: Tensor) -> Tensor:
    """Return temperatures from 0 to 1, denser at both ends, ``(intervals + 1,)``."""
    grid = torch.linspace(-4, 4, intervals + 1, dtype=like.dtype, device=like.device).sigmoid()
    return (grid - grid[0]) / (grid[-1] - grid[0])


def equal_variance_temperatures(grid: Tensor, deviations: Tensor, temperatures: int) -> tuple[Tensor, Tensor]:
    """Space temperatures for each row so that every step adds as much to the variance of the log-weights.

    The distance of two temperatures is the integral of the standard deviation of log p(x, z) - log q_0(z). As that is
    noisy, it is smoothed over the grid, and mixed with the grid's own spacing.

    Args:
        grid: temperatures of the pilot, ``(G + 1,)``, from 0 to 1.
        deviations: the standard deviation at each, ``(G + 1, N)``, in nats.
        temperatures: T.

    Returns:
        (temperatures ``(T + 1, N)`` from 0 to 1, the interval of the grid that each but the first lies in ``(T, N)``).

    References:
        Gelman & Meng 1998, "Simulating normalizing constants: from importance sampling to bridge sampling to path
        sampling", Statistical Science 13:163.
    """
    deviations = _smooth(deviations.nan_to_num(0.0, 0.0, 0.0))
    lengths = grid.diff()[:, None] * (deviations[1:] + deviations[:-1]) / 2
    total = lengths.sum(0)
    share = lengths / total.clamp(min=torch.finfo(lengths.dtype).tiny)
    share = torch.where(total > 0, (1 - UNIFORM_SHARE) * share, 0.0) + UNIFORM_SHARE / len(lengths)

    distance = torch.cat([torch.zeros_like(share[:1]), share.cumsum(0)])  # from 0, at each point of the grid
    distance = distance / distance[-1]
    goals = torch.arange(1, temperatures + 1, dtype=grid.dtype, device=grid.device) / temperatures
    place = torch.searchsorted(distance.T.contiguous(), goals.expand(deviations.shape[1], -1).contiguous()).T
    intervals = place.clamp(1, len(lengths)) - 1

    rows = torch.arange(deviations.shape[1], device=grid.device)
    fraction = (goals[:, None] - distance[intervals, rows]) / share[intervals, rows] * distance[-1]
    betas = grid[intervals] + fraction.clamp(0, 1) * (grid[intervals + 1] - grid[intervals])
    betas[-1] = 1.0
    return torch.cat([torch.zeros_like(betas[:1]), betas]), intervals


def _smooth(x: Tensor) -> Tensor:
    """Average ``(G, N)`` over a window of dimension 0, its ends repeated."""
    window = SMOOTHING_WINDOW
    kernel = torch.ones(1, 1, window, dtype=x.dtype, device=x.device) / window
    padded = torch.nn.functional.pad(x.T[:, None], (window // 2, window // 2), mode="replicate")
    return torch.nn.functional.conv1d(padded, kernel)[:, 0].T
