"""Weights of a (model, guide) pair on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def save(path: str | Path, model: Any, guide: Any) -> None:
    """Writes the ``state_dict`` of both to one file, which :func:`load` reads without running any code from it.

    Raises:
        TypeError: of a model or guide that is no ``nn.Module``: a function story's networks live elsewhere.
    """
    torch.save({"model": _module("model", model).state_dict(), "guide": _module("guide", guide).state_dict()}, path)


def load(path: str | Path, model: Any, guide: Any) -> None:
    """Reads what :func:`save` wrote into a pair built alike, on whatever device that is.

    Raises:
        TypeError: as :func:`save`. RuntimeError: naming the weights that do not fit.
    """
    model, guide = _module("model", model), _module("guide", guide)
    device = next((p.device for m in (model, guide) for p in m.parameters()), torch.device("cpu"))
    state = torch.load(path, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    guide.load_state_dict(state["guide"])


def _module(what: str, x: Any) -> nn.Module:
    if not isinstance(x, nn.Module):
        raise TypeError(f"the {what} is a {type(x).__name__}, which has no state_dict: save the modules that it uses")
    return x
