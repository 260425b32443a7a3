"""Detect networks whose second run differs from the first, or whose rows depend on each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class RandomNumbers:
    """A watch over torch's generators that detects networks which draw random numbers.

    Args:
        device: the device whose generator is watched besides the CPU's.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = self._state()
        self._moved = False

    def found(self) -> bool:
        """Return True if random numbers were drawn since the last call, outside of :meth:`paused`."""
        before = self._last
        self._last = self._state()
        moved = self._moved or not all(map(torch.equal, before, self._last))
        self._moved = False
        return moved

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore random numbers that are drawn inside, such as those of a latent site."""
        self._moved = self.found()
        try:
            yield
        finally:
            self._last = self._state()

    def _state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states


class BatchNormalisation(TorchFunctionMode):
    """A mode in which batch normalisation, in training mode, of anything computed from ``values`` is found.

    Attributes:
        values: tensors that require gradients, appended by the user of this mode.
        found: True once it has happened.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Tensor] = []
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "batch_norm":
            x = args[0] if args else kwargs["input"]
            training = args[5] if len(args) > 5 else kwargs.get("training", False)
            self.found |= bool(training) and depends(x, self.values)
        return func(*args, **kwargs)


def depends(x: Tensor, values: list[Tensor]) -> bool:
    """Return True if x was computed from one of these values.

    Args:
        x: a tensor, with the graph that it was computed by.
        values: tensors that require gradients.
    """
    if not values or not x.requires_grad:
        return False
    slopes = torch.autograd.grad(x.sum(), values, allow_unused=True, retain_graph=True)
    return any(slope is not None for slope in slopes)
