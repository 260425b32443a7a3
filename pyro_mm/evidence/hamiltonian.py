"""Hamiltonian Monte Carlo moves of many chains and rows at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..sampling.ancestral import SiteValues
from .annealing_target import ChainState, TemperedDensity

STEP_SIZE_JITTER = 0.5  # relative: orbits of a Gaussian are periodic, and would return to their start


def hamiltonian_move(
    density: TemperedDensity,
    state: ChainState,
    beta: Tensor,
    step_size: Tensor,
    scale: SiteValues,
    leapfrog_steps: int,
) -> tuple[ChainState, Tensor]:
    """Move every chain by Hamiltonian Monte Carlo, which leaves its density at a temperature invariant.

    Args:
        density: the path of densities.
        state: C chains of N rows.
        beta: the rows' temperatures, ``(N,)``.
        step_size: ``(N,)``; each trajectory multiplies it by a random factor from 0.5 to 1.5.
        scale: site -> scales of its coordinates, ``(*plates, N, *event)``.
        leapfrog_steps: steps of a trajectory.

    Returns:
        (state, acceptance probabilities ``(C, N)``).

    References:
        Neal 2011, "MCMC using Hamiltonian dynamics", arXiv:1206.1901.
    """
    jitter = 1 + STEP_SIZE_JITTER * (2 * torch.rand_like(state.log_p) - 1)
    step = {n: density.expand_rows(n, step_size * jitter) * scale[n] for n in state.u}
    momenta = draw_momenta(density, state.u)
    energy = state.energy(beta) + kinetic_energy(density, momenta)

    new = state
    for _ in range(leapfrog_steps):
        momenta = _half_step(momenta, step, density.energy_gradient(new, beta))
        new = density.state_at({n: x + step[n] * momenta[n] for n, x in new.u.items()})
        momenta = _half_step(momenta, step, density.energy_gradient(new, beta))

    log_acceptance = energy - new.energy(beta) - kinetic_energy(density, momenta)
    log_acceptance = log_acceptance.nan_to_num(nan=-math.inf).clamp(max=0)
    accepted = torch.rand_like(log_acceptance).log() < log_acceptance
    return density.select(accepted, new, state), log_acceptance.exp()


def draw_momenta(density: TemperedDensity, u: SiteValues) -> SiteValues:
    """Draw standard normal momenta, zero for coordinates that no density depends on."""
    return {n: torch.randn_like(x) * density.movable[n] for n, x in u.items()}


def kinetic_energy(density: TemperedDensity, momenta: SiteValues) -> Tensor:
    """Return half the sum of squared momenta of every chain and row, ``(C, N)``."""
    return sum(0.5 * density.sum_per_row(n, p.square()) for n, p in momenta.items())  # type: ignore[return-value]


def _half_step(momenta: SiteValues, step: SiteValues, gradient: SiteValues) -> SiteValues:
    return {n: p - 0.5 * step[n] * gradient[n] for n, p in momenta.items()}
