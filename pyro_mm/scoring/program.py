"""Pyro programs: stories and guides, as everything that trains or evaluates them is given them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..batch.batch import Batch

Program = Callable[[Batch], Any]
