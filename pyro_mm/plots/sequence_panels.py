"""Figures of sequences beside draws of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..utils.arguments import check_integer, check_tensor
from .figure import PALETTE, SMALL, make_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = 0.9  # share of the draws within a band


def sequences(
    values: Tensor,
    draws: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    rows: Sequence[int] | None = None,
    features: Sequence[str] | None = None,
    title: str = "",
) -> Figure:
    """Plot sequences of real numbers, one panel per row, with the median and a 90 % band of draws.

    Args:
        values: ``(N, T, D)``, solid curves.
        draws: ``(S, N, T, D)``, such as :func:`pyro_mm.generate` returns for a modality: each step has a dashed median
            and a band from the 5th to the 95th percentile. None for none.
        lengths: numbers of valid steps, integers ``(N,)``; None if all steps are.
        rows: the rows to show; None for the first four.
        features: names of the D features; their numbers by default.
        title: title of the figure.

    Raises:
        ValueError: other shapes, a row that is not there, or another number of names.
    """
    n, _, size = check_tensor("values", values, ("N", "T", "D")).shape
    if draws is not None:
        check_tensor("draws", draws, ("S", *values.shape))
    if lengths is not None:
        check_tensor("lengths", lengths, (n,))
    if features is not None and len(features) != size:
        raise ValueError(f"expected names of {size} features, got {len(features)}")
    shown = range(min(4, n)) if rows is None else [check_integer("rows", row, 0, n - 1) for row in rows]
    if not len(shown):
        raise ValueError("expected rows to be one at least, got none")
    names = [f"feature {d}" for d in range(size)] if features is None else [str(name) for name in features]

    columns = min(len(shown), 3)
    lines = -(-len(shown) // columns)
    figure = make_figure(max(2.7 * columns, 3.6), 2.1 * lines + 0.7 + 0.2 * (size > 4))
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for ax, row in zip(panels.flat, shown, strict=False):
        length = values.shape[1] if lengths is None else int(lengths[row])
        sampled = None if draws is None else draws[:, row, :length].detach().cpu().double().numpy()
        _panel(tidy(ax), values[row, :length].detach().cpu().double().numpy(), sampled, names)
        ax.set_title(f"row {row}", fontsize=SMALL, loc="right")
        ax.tick_params(labelsize=SMALL)
    for ax in panels.flat[len(shown) :]:
        ax.set_axis_off()
    figure.supxlabel("step", fontsize=10)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    place: dict[str, Any] = {
        "loc": "outside upper center",
        "frameon": False,
        "fontsize": SMALL,
        "ncols": min(4, len(labels)),
    }
    figure.legend(handles, labels, title=title or None, **place)
    return figure


def _panel(ax: Axes, values: np.ndarray, draws: np.ndarray | None, names: Sequence[str]) -> None:
    """Draw one row: values ``(T, D)``, and draws ``(S, T, D)``."""
    steps = np.arange(len(values))
    for d, name in enumerate(names):
        color = PALETTE[d % len(PALETTE)]
        mark = "o" if len(values) == 1 else None
        ax.plot(steps, values[:, d], color=color, linewidth=1.5, label=name, marker=mark)
        if draws is not None:
            low, middle, high = np.quantile(draws[..., d], (0.5 - BAND / 2, 0.5, 0.5 + BAND / 2), axis=0)
            ax.plot(steps, middle, color=color, linewidth=1.1, linestyle="--")
            ax.fill_between(steps, low, high, color=color, alpha=0.2, linewidth=0)
