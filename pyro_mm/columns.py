"""What users hand over as data, as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def read_modality(name: str, value: Any) -> tuple[Tensor, Tensor] | None:
    """A modality's values ``(N, *event)`` and the rows ``(N,)`` that are there: neither ``None`` nor NaN."""
    held = None
    if isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.dtype == object):
        held = [item is not None for item in value]
        first = next((item for item in value if item is not None), None)
        if first is None:
            return None
        value = [first if item is None else item for item in value]
        try:
            value = torch.stack([torch.as_tensor(item) for item in value])
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"modality {name!r}: the rows do not make one tensor: {error}") from error
    if value is None:
        return None
    values = read_tensor(f"modality {name!r}", value)
    if values.dim() == 0:
        raise ValueError(f"modality {name!r}: expected shape (N, ...), got a single number")
    there = ~values.isnan().reshape(len(values), -1).any(1)
    return values, there if held is None else there & torch.tensor(held, device=there.device)


def read_tensor(what: str, value: Any) -> Tensor:
    """Any numbers as a tensor."""
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        given = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{what}: expected numbers, got {given}") from error


def read_mask(name: str, mask: Any, size: int) -> Tensor:
    """Which of ``size`` rows have a modality, as a boolean tensor."""
    if mask is None:
        return torch.ones(size, dtype=torch.bool)
    mask = read_tensor(f"present[{name!r}]", mask)
    if mask.dtype != torch.bool or mask.shape != (size,):
        got = f"{mask.dtype} of shape {tuple(mask.shape)}"
        raise ValueError(f"present[{name!r}]: expected torch.bool of shape ({size},), got {got}")
    return mask
