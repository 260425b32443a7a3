"""Buffers of modules."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .reachable import ReachableObjects


@contextmanager
def preserve_buffers(*programs: Any) -> Iterator[None]:
    """Restore the buffers of the modules that programs reach, such as running means, after what is done inside.

    Args:
        programs: callables.
    """
    found = ReachableObjects({f"{i}": program for i, program in enumerate(programs)}).modules.values()
    buffers = [b for module in found for b in module.buffers()]
    held = [b.clone() for b in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(buffers, held, strict=True):
                buffer.copy_(before)
