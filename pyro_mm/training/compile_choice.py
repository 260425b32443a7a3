"""The choice between compiled and eager steps, for a training whose caller leaves it open."""

from __future__ import annotations

import torch
from torch import nn

from .problem import TrainingProblem

# A compilation takes as long as some 2,600 eager steps on a GPU (40 s and 15 ms for a JMVAE on an H100), and a compiled
# step a twentieth of an eager one: from here on the whole training takes about half the time, or less.
LEAST_STEPS = 5000


def compilation_pays(
    problem: TrainingProblem, device: torch.device, steps: int, *, by_step: bool = False, validate: bool | None = None
) -> bool:
    """Return True if compiled steps make a training clearly faster.

    They do on a GPU, from :data:`LEAST_STEPS` steps on. On a CPU they gain less, need a C++ compiler, and change the
    last digits of the numbers of a seed, so that they are left to the caller. The answer depends on no clock, so that a
    training that goes on from a checkpoint takes the same steps as one without a stop.

    Args:
        problem: the training problem. Recurrent networks stay eager: a graph cannot hold their fused operations.
        device: where it is trained.
        steps: steps of the whole training, those before a stop included; 0 if they are unknown.
        by_step: True if the step sizes change at every step, each of which would be captured anew.
        validate: True if Pyro is to check every step, which compiled ones cannot do.
    """
    if device.type != "cuda" or steps < LEAST_STEPS or by_step or validate:
        return False
    return not any(isinstance(m, nn.RNNBase) for network in problem.networks for m in network.modules())
