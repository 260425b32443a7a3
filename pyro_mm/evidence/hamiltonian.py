"""Hamiltonian Monte Carlo moves of many chains and rows at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .annealing_target import ChainState, TemperedDensity

STEP_SIZE_JITTER = 0.5  # relative: orbits of a Gaussian are periodic, and would return to their start


def hamiltonian_move(
    density: TemperedDensity, state: ChainState, beta: Tensor, step_size: Tensor, scale: Tensor, leapfrog_steps: int
) -> tuple[ChainState, Tensor]:
    """Move every chain by Hamiltonian Monte Carlo, which leaves its density at a temperature invariant.

    Args:
        density: the path of densities.
        state: C chains of N rows.
        beta: the rows' temperatures, ``(N,)``.
        step_size: ``(N,)``; each trajectory multiplies it by a random factor from 0.5 to 1.5.
        scale: scales of the coordinates, ``(N, D)``.
        leapfrog_steps: steps of a trajectory.

    Returns:
        (state, acceptance probabilities ``(C, N)``).

    References:
        Neal 2011, "MCMC using Hamiltonian dynamics", arXiv:1206.1901.
    """
    jitter = 1 + STEP_SIZE_JITTER * (2 * torch.rand_like(state.log_p) - 1)
    step = (step_size * jitter)[..., None] * scale
    momenta = draw_momenta(density, state.u)
    energy = state.energy(beta) + kinetic_energy(momenta)

    new = state
    for _ in range(leapfrog_steps):
        momenta = momenta - 0.5 * step * new.energy_gradient(beta) * density.active
        new = density.state_at(new.u + step * momenta)
        momenta = momenta - 0.5 * step * new.energy_gradient(beta) * density.active

    log_acceptance = energy - new.energy(beta) - kinetic_energy(momenta)
    log_acceptance = log_acceptance.nan_to_num(nan=-math.inf).clamp(max=0)
    accepted = torch.rand_like(log_acceptance).log() < log_acceptance
    return new.select(accepted, state), log_acceptance.exp()


def draw_momenta(density: TemperedDensity, u: Tensor) -> Tensor:
    """Draw standard normal momenta for coordinates ``(C, N, D)``, zero for those that no density depends on."""
    return torch.randn_like(u) * density.active


def kinetic_energy(momenta: Tensor) -> Tensor:
    """Return half the sum of squared momenta of every chain and row, ``(C, N)``."""
    return 0.5 * momenta.square().sum(-1)
