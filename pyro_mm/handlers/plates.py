"""A plate whose entries are known."""

from __future__ import annotations

from typing import Any

import pyro


class Plate(pyro.plate):
    """``pyro.plate`` of terms or particles, all of which are there, without its sample site that says so.

    That site is no part of any density, and passing it through the handlers shows in the time of a small step. The
    plate of rows keeps its own: who replays a trace replays its rows.
    """

    @staticmethod
    def _subsample(  # type: ignore[override]
        name: str, size: int, *_: Any
    ) -> tuple[int, int, None]:
        return size, size, None
