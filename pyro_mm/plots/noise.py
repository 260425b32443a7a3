"""Figures of noise and missing modalities at test time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..metrics.corrupted_inputs import Robustness
from ..utils.arguments import check_names, describe
from .figure import make_figure, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELS = {"accuracy": "accuracy", "unexplained": "unexplained variance"}
PER_LINE = 4  # panels


def robustness(found: Robustness, targets: Sequence[str] | str | None = None, title: str = "") -> Figure:
    """Plot accuracies and errors of reconstruction against noise in one modality, and at its absence.

    One panel per label or modality, and one curve per corrupted modality, with two standard errors over rows on either
    side. An unexplained variance of 1, a dotted line, is that of the mean over rows.

    Args:
        found: result of :func:`pyro_mm.metrics.robustness`.
        targets: labels and modalities to show; None for all.
        title: title of the figure.

    Raises:
        TypeError: something else.
        ValueError: an unknown label or modality.
    """
    if not isinstance(found, Robustness):
        raise TypeError(f"expected found to be what metrics.robustness returned, got {describe(found)}")
    names = list(found.measures)
    shown = names if targets is None else list(check_names("targets", targets, names, least=1))
    columns = min(len(shown), PER_LINE)
    lines = -(-len(shown) // columns)
    figure = make_figure(max(2.9 * columns, 4.4), 2.6 * lines + 0.6)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for ax, name in zip(panels, shown, strict=False):
        _panel(ax, found, name)
    for ax in list(panels)[len(shown) :]:
        ax.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, title="noise in", loc="outside lower center", ncols=min(5, len(labels)), frameon=False,
        fontsize=9, title_fontsize=9,
    )  # fmt: skip
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _panel(ax: Axes, found: Robustness, name: str) -> None:
    """Draw the curves of one label or modality."""
    levels = np.array(found.levels)
    span = levels[-1] or 1.0
    absent = levels[-1] + 0.3 * span
    for i, corrupted in enumerate(found.corrupted):
        values = found.values[name][i].numpy()
        errors = found.errors[name][i].numpy()
        last = found.missing[name][i].item()
        last_error = found.missing_errors[name][i].item()
        shift = 0.012 * span * (i - (len(found.corrupted) - 1) / 2)  # lest error bars hide each other
        style = style_of(i)
        line = {"markersize": 4.5, "linewidth": 1.3, "capsize": 2, "elinewidth": 0.9, **style}
        ax.errorbar(levels + shift, values, 2 * errors, label=corrupted, **line)
        ax.errorbar([absent + shift], [last], [2 * last_error], **line)
        ax.plot(
            [levels[-1] + shift, absent + shift], [values[-1], last], color=style["color"], linewidth=1, linestyle=":"
        )
    if found.measures[name] == "unexplained":
        ax.axhline(1, color="0.5", linewidth=0.9, linestyle=":")
        ax.set_ylim(bottom=0)
    ax.set_xticks([*levels, absent], [*(f"{level:g}" for level in levels), "missing"], fontsize=9)
    ax.set_xlabel("noise level")
    ax.set_ylabel(LABELS[found.measures[name]])
    ax.set_title(name, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
