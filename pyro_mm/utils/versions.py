"""Versions of this package and of torch, for what is written to files."""

from __future__ import annotations

import sys

import torch


def library_versions() -> dict[str, str]:
    """Return the versions of this package and of torch, by name."""
    package = sys.modules[__name__.split(".")[0]]
    return {"pyro_mm": str(getattr(package, "__version__", "unknown")), "torch": str(torch.__version__)}
