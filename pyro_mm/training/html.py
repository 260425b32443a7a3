"""A history as HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..utils.html import Markup, report, table

if TYPE_CHECKING:
    from .history import History

WIDTH, HEIGHT = 120, 24  # pixels, of a small curve


def history_html(history: History) -> str:
    """Return a table with the first, best and last value of each column, and a small curve of it.

    Args:
        history: the losses of a training.
    """
    if not len(history):
        return report("History of no epoch")
    rows = []
    for name, values in history.columns.items():
        finite = [value for value in values if math.isfinite(value)]
        best = (min if name in ("loss", "validation") else max)(finite, default=math.nan)
        place = f"{best:.4g} (epoch {values.index(best) + 1})" if finite else "none"
        rows.append([name, f"{values[0]:.4g}", place, f"{values[-1]:.4g}", curve(values)])
    stopped = ", stopped by a callback" if history.stopped else ""
    legend = "Nats per row: losses are minus the objective, and lower is better; of terms, higher is."
    return report(f"History of {len(history)} epochs{stopped}", table(["", "first", "best", "last", ""], rows), legend)


def curve(values: Sequence[float]) -> Markup:
    """Return a small curve of finite numbers as SVG; empty for fewer than two.

    Args:
        values: one per epoch; those that are not finite are left out.
    """
    points = [(i, value) for i, value in enumerate(values) if math.isfinite(value)]
    if len(points) < 2:
        return Markup("")
    low, high = min(value for _, value in points), max(value for _, value in points)
    scale = (high - low) or 1.0
    path = " ".join(
        f"{2 + (WIDTH - 4) * i / (len(values) - 1):.1f},{2 + (HEIGHT - 4) * (high - value) / scale:.1f}"
        for i, value in points
    )
    line = f'<polyline points="{path}" fill="none" stroke="#0072B2" stroke-width="1.5"/>'
    return Markup(f'<svg width="{WIDTH}" height="{HEIGHT}" role="img" aria-label="curve">{line}</svg>')
