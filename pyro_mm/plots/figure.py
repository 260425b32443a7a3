"""Empty figures, and the settings that all of them share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..utils.arguments import describe
from ..utils.global_state import preserve_process_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NATS = "nats per row"
CHARACTER = 0.085  # inches, a generous mean width of a character of 10 points
LEGEND_ABOVE: dict[str, Any] = {
    "frameon": False, "loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "alignment": "left"
}  # fmt: skip
SMALL = 9  # points, of the smallest text: figures are printed at half their size
# Okabe and Ito's colours, which people with any kind of colour vision tell apart
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
MARKERS = "osD^vPX*"


def make_figure(width: float, height: float, gap: float = 0.05) -> Figure:
    """Return an empty figure of a size in inches, with a constrained layout."""
    with preserve_process_settings():
        from matplotlib.figure import Figure  # imported here because it takes a second
        from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=gap, h_pad=gap, wspace=0.02, hspace=0.02)
    return Figure(figsize=(width, height), layout=layout)


def axes_or_new(ax: Any, width: float, height: float) -> Axes:
    """Return axes, or those of an empty figure of a size in inches if there are none, with the look of all figures.

    Raises:
        TypeError: something else.
    """
    if ax is None:
        return tidy(make_figure(width, height).subplots())
    if not hasattr(ax, "set_xlabel"):
        raise TypeError(f"expected ax to be axes of matplotlib, or None for a new figure, got {describe(ax)}")
    return tidy(ax)


def tidy(ax: Any) -> Axes:
    """Give axes the look of all figures: curves in the palette's colours, and no frame above and on the right."""
    axes: Axes = ax
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_prop_cycle(color=PALETTE)
    return axes


def set_title(ax: Axes, title: str, legend: Any = None) -> None:
    """Set the title of axes, if there is one; that of the legend where one stands above them."""
    if title and legend is not None:
        legend.set_title(title, {"size": 10})
    elif title:
        ax.set_title(title, fontsize=10)


def styles_of_classes(n: int) -> list[dict[str, Any]]:
    """Return colour and marker of n classes: pairs that differ up to 16, a scale of colours beyond."""
    with preserve_process_settings():
        from matplotlib import colormaps

    if n > 2 * len(PALETTE):
        return [{"color": colormaps["viridis"](i / (n - 1)), "marker": "o"} for i in range(n)]
    return [
        {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[(i + i // len(PALETTE)) % len(MARKERS)]}
        for i in range(n)
    ]


def style_of(i: int) -> dict[str, Any]:
    """Return colour and marker of the i-th of several curves, both of which tell it from the others."""
    return {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
