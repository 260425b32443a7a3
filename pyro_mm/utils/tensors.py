"""Constant tensors, made once per device."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A vector that nobody changes, made once: on a GPU each would be a copy from the host, and a wait for it."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype, device=device)
