"""Figures of calibration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..diagnostics.rank_tests import RankTest, band, p_text
from ..diagnostics.sbc import Calibration
from ..utils.arguments import check_names, describe
from .figure import PALETTE, SMALL, make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OFF = PALETTE[1]
MOST_PANELS = 20  # coordinates whose ranks are shown by default


def ranks(calibration: Calibration, names: Sequence[str] | None = None, title: str = "") -> Figure:
    """Plot the ECDF of the ranks of true values minus that of uniform ranks, one panel per coordinate.

    The ranks of an exact posterior stay in the grey band with probability 95 %: in the dark one for a single curve, in
    the light one for the curves of all coordinates together (Bonferroni). A curve above zero shows draws of the guide
    that are too high, one below zero draws that are too low; first above and then below, too narrow; first below and
    then above, too wide. An orange curve is off, by the p-value in its title. Panels have vertical scales of their own.

    Args:
        calibration: result of :func:`pyro_mm.calibration`.
        names: coordinates, such as ``"z[0]"``; by default all, or the 20 least uniform ones.
        title: title of the figure.

    Raises:
        TypeError: something else than a calibration.
        ValueError: an unknown coordinate.
    """
    if not isinstance(calibration, Calibration):
        raise TypeError(f"expected calibration to be what pyro_mm.calibration returned, got {describe(calibration)}")
    tests = calibration.findings
    if names is not None:
        shown = list(check_names("names", names, tests, least=1, what="coordinate"))
    else:
        least_uniform = sorted(tests, key=lambda name: tests[name].p_value)[:MOST_PANELS]
        shown = [name for name in tests if name in least_uniform]
        if len(shown) < len(tests):
            title += f"{': ' if title else ''}the {len(shown)} least uniform of {len(tests)} coordinates"

    columns = len(shown) if len(shown) <= 3 else min(5, math.ceil(len(shown) ** 0.5))
    lines = -(-len(shown) // columns)
    figure = make_figure(max(2.2 * columns, 4.2) + 0.3, 1.85 * lines + 0.9)
    panels = figure.subplots(lines, columns, squeeze=False)
    for i, (ax, name) in enumerate(zip(panels.flat, shown, strict=False)):
        _rank_panel(ax, name, calibration, len(tests))
        is_lowest = i + columns >= len(shown)
        ax.tick_params(labelsize=SMALL, labelbottom=is_lowest)
        ax.set_xlabel(f"(rank + 1) / {calibration.num_draws + 1}" if is_lowest else "", fontsize=SMALL)
    for ax in panels.flat[len(shown) :]:
        ax.set_axis_off()

    figure.supylabel("ECDF of ranks \N{MINUS SIGN} uniform", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    note = f"p: adjusted by Holm's method for all {len(tests)} coordinates" if len(tests) > 1 else None
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 2, "frameon": False}
    figure.legend(handles[::-1], labels[::-1], title=note, fontsize=SMALL, title_fontsize=SMALL, **place)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _rank_panel(ax: Axes, name: str, calibration: Calibration, num_curves: int) -> None:
    """Draw the curve of one coordinate with its bands."""
    test: RankTest = calibration.findings[name]
    draws = calibration.num_draws
    x = np.arange(draws + 2) / (draws + 1)
    limit = 0.0
    for level, grey, label in (
        (0.05 / num_curves, "0.9", f"95 % band, all {num_curves} curves"),
        (0.05, "0.78", "95 % band, one curve"),
    ):
        lower, upper = (
            np.concatenate([[0], counts / test.rows, [1]]) - x for counts in band(test.rows, draws, 1 - level)
        )
        ax.fill_between(x, lower, upper, color=grey, linewidth=0, label=label)
        limit = max(limit, 1.3 * upper.max())

    is_off = test.verdict != "uniform"
    difference = np.append(0, calibration.counts[name].cumsum()) / test.rows - x
    ax.axhline(0, color="0.5", linewidth=0.6)
    ax.plot(x, difference, color=OFF if is_off else PALETTE[0], linewidth=1.2)
    limit = max(limit, 1.1 * abs(difference).max())
    ax.set(ylim=(-limit, limit), xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"])
    text = f"{name}, {p_text(test.adjusted, 1)}\n{test.verdict if is_off else ''}"
    ax.set_title(text, fontsize=SMALL, loc="left", color=OFF if is_off else "black")
    ax.spines[["top", "right"]].set_visible(False)
