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
LEGEND_ABOVE: dict[str, Any] = {"frameon": False, "loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}
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
    """Return axes, or those of an empty figure of a size in inches if there are none.

    Raises:
        TypeError: something else.
    """
    if ax is None:
        return make_figure(width, height).subplots()
    if not hasattr(ax, "set_xlabel"):
        raise TypeError(f"expected ax to be axes of matplotlib, or None for a new figure, got {describe(ax)}")
    return ax


def colors_of_classes(n: int) -> list[Any]:
    """Return n colours: distinct ones up to ten, a scale beyond."""
    with preserve_process_settings():
        from matplotlib import colormaps

    return [colormaps["tab10"](i) if n <= 10 else colormaps["viridis"](i / max(n - 1, 1)) for i in range(n)]


def style_of(i: int) -> dict[str, Any]:
    """Return colour and marker of the i-th of several curves, both of which tell it from the others."""
    return {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)]}
