"""Training and evaluation mode of the networks of a training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..utils.reachable import ReachableObjects


def networks_to_train(programs: Mapping[str, Any]) -> list[nn.Module]:
    """Return the outermost modules that programs are or refer to.

    A module that a function refers to and that is frozen as a whole, such as a network trained before, is left out.

    Args:
        programs: name -> model, guide, or a module of the objective.
    """
    reached = ReachableObjects(programs).modules.values()
    own = set(map(id, programs.values()))
    return [module for module in reached if id(module) in own or not _is_frozen(module)]


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def set_training(networks: Iterable[nn.Module], training: bool) -> None:
    """Set networks to training or to evaluation mode."""
    for network in networks:
        network.train(training)


@contextmanager
def leave_in_evaluation(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Set networks to evaluation mode, and leave them in it however the block ends."""
    networks = list(networks)
    set_training(networks, False)
    try:
        yield
    finally:
        set_training(networks, False)
