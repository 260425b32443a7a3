"""Figures of training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..training.history import History
from ..utils.arguments import describe
from .figure import LEGEND_ABOVE, NATS, PALETTE, SMALL, make_figure, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES = ("-", "--", ":", "-.")
SYMBOLS = {"*": "all", "P": "prior", "-": "nothing"}


def training_curve(history: History | Mapping[str, Sequence[float]]) -> Figure:
    """Plot the loss against the epoch, and the terms of the objective beside it if there are several.

    The terms are in words: the modalities that are decoded, and those that are encoded to decode them; or the KL
    between the posteriors given two sets. With more than 20 epochs, the vertical scale is that of all but the first
    twentieth.

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
    figure = make_figure(4.4 * panels, 3.6 + 0.1 * max(0, len(terms) - 4))
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for name, label in losses.items():
        if name in columns:
            axes[0].plot(epochs, columns[name], color=PALETTE[len(axes[0].lines)], label=label)
    axes[0].set_ylabel(f"loss: minus the objective ({NATS})")
    axes[0].legend(**LEGEND_ABOVE)
    if panels == 2:
        for i, name in enumerate(terms):
            axes[1].plot(epochs, columns[name], **_line(i), label=term_in_words(name))
        axes[1].set_ylabel(f"term of the objective ({NATS})")
        long = max(len(term_in_words(name)) for name in terms) > 24
        axes[1].legend(fontsize=SMALL, **LEGEND_ABOVE | {"ncols": 1 if long else 2})

    for ax in axes:
        tidy(ax)
        ax.set_xlabel("epoch")
        if len(epochs) > 20:  # the first epochs would flatten all later ones
            late = np.concatenate([line.get_ydata()[len(epochs) // 20 :] for line in ax.lines])
            late = late[np.isfinite(late)]
            if len(late):
                margin = 0.08 * max(np.ptp(late), 1e-6)
                ax.set_ylim(late.min() - margin, late.max() + margin)
        if len(epochs) == 1:  # a single point makes no line
            for line in ax.lines:
                line.set_marker("o")
    return figure


def _line(i: int) -> dict[str, str]:
    """Return colour and dashes of the i-th of several curves, both of which tell it from the others."""
    return {"color": PALETTE[i % len(PALETTE)], "linestyle": DASHES[i // len(PALETTE) % len(DASHES)]}


def term_in_words(label: str) -> str:
    """Return the label of a term in words; a label of another form as it is.

    Args:
        label: as the columns of a history have it, "(encode, decode, given)".

    >>> term_in_words("(*, *, P)")
    'all from all'
    >>> term_in_words("(image, text+label, P)"), term_in_words("(*, text, image)")
    ('text, label from image', 'text from all, prior given image')
    >>> term_in_words("(image+text, -, image)"), term_in_words("(image, -, P)")
    ('minus KL(image, text ‖ image)', 'minus KL(image ‖ prior)')
    """
    match = re.fullmatch(r"\((.+), (.+), ([^,]+)\)", label)
    if match is None:
        return label
    encode, decode, given = (SYMBOLS.get(part, part.replace("+", ", ")) for part in match.groups())
    if match[2] == "-":
        return f"minus KL({encode} ‖ {given})"
    text = f"{decode} from {encode}"
    return text if match[3] == "P" else f"{text}, prior given {given}"
