"""Constant tensors, cached per device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a constant vector, made once per dtype and device. It must not be written to.

    On a GPU every new one would be a copy from the host, and a wait for it.

    Args:
        values: the entries.
        dtype: the dtype.
        device: the device.
    """
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
