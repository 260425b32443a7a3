"""Device and precision of a training."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Placement:
    """Device and precision of a training."""

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which networks run in this precision."""
        if self.precision == "32-true":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def training_device(networks: Sequence[nn.Module], device: torch.device | None, model: Any, guide: Any) -> torch.device:
    """Return the device to train on, with its number.

    Args:
        networks: the networks to train.
        device: the device asked for. None is the device of the networks; or CUDA, if there is one, the networks are on
            the CPU, and model and guide are modules both.
        model, guide: the pair.
    """
    if device is None:
        parameters = (p for network in networks for p in network.parameters())
        device = next((p.device for p in parameters), torch.get_default_device())
        both = isinstance(model, nn.Module) and isinstance(guide, nn.Module)
        if both and device.type == "cpu" and torch.cuda.is_available():
            device = torch.device("cuda")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
