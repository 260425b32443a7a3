"""The state of torch's tracer."""

from __future__ import annotations

from torch.fx.experimental.proxy_tensor import get_proxy_mode


def is_tracing() -> bool:
    """Return True while programs are traced into a graph, and no value of a tensor can be read in Python."""
    return get_proxy_mode() is not None
