"""Figures of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..training.history import History
from ..utils.arguments import describe
from .figure import LEGEND_ABOVE, NATS, make_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def training_curve(history: History | Mapping[str, Sequence[float]]) -> Figure:
    """Plot the loss against the epoch, and the terms of the objective beside it if there are several.

    With more than 20 epochs, the vertical scale is that of all but the first twentieth.

    Args:
        history: result of ``fit``, or its columns: ``"loss"``, perhaps ``"validation"``, and one per term, each a
            sequence of numbers in nats per row.

    Raises:
        TypeError: something else.
        ValueError: no loss of any epoch.
    """
    if not isinstance(history, Mapping | History):
        raise TypeError(f"expected history to be what fit returned, or its columns, got {describe(history)}")
    columns = dict(history) if isinstance(history, Mapping) else history.to_dict()
    if "loss" not in columns or not len(columns["loss"]):
        raise ValueError(f"expected a history with a loss of one epoch at least, got columns {list(columns)}")
    losses = {"loss": "training", "validation": "validation"}
    terms = [name for name in columns if name not in losses]
    epochs = np.arange(1, len(columns["loss"]) + 1)

    panels = 2 if len(terms) > 1 else 1
    figure = make_figure(4.8 * panels, 4.0)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for name, label in losses.items():
        if name in columns:
            axes[0].plot(epochs, columns[name], label=label)
    axes[0].set_ylabel(f"loss: minus the objective ({NATS})")
    axes[0].legend(**LEGEND_ABOVE)
    if panels == 2:
        for name in terms:
            axes[1].plot(epochs, columns[name], label=name)
        axes[1].set_ylabel(f"term of the objective ({NATS})")
        axes[1].legend(title="term: (encode, decode, given)", **LEGEND_ABOVE)

    for ax in axes:
        ax.set_xlabel("epoch")
        ax.spines[["top", "right"]].set_visible(False)
        if len(epochs) > 20:  # the first epochs would flatten all later ones
            late = np.concatenate([line.get_ydata()[len(epochs) // 20 :] for line in ax.lines])
            margin = 0.08 * max(late.max() - late.min(), 1e-6)
            ax.set_ylim(late.min() - margin, late.max() + margin)
        if len(epochs) == 1:  # a single point makes no line
            for line in ax.lines:
                line.set_marker("o")
    return figure
