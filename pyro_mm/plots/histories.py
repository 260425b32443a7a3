"""Figures of training."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..training.history import History
from ..utils.arguments import describe
from .figure import LEGEND_ABOVE, NATS, PALETTE, SMALL, make_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# columns of critics, generators, discriminators and the decoders beside these, with the parts of their losses
PLAYER = re.compile(r"(critic|generator) \S|[^(]*\S (decoder|discriminator)( |$)")
DASHES = ("-", "--", ":", "-.")
SYMBOLS = {"*": "all", "P": "prior", "-": "nothing"}


def training_curve(history: History | Mapping[str, Sequence[float]]) -> Figure:
    """Plot the loss against the epoch, and the terms of the objective beside it if there are several.

    The terms are in words: the modalities that are decoded, and those that are encoded to decode them; or the KL
    between the posteriors given two sets. The losses of critics, generators and discriminators have a panel of their
    own, and so has the accuracy of critics, with that of chance. With more than 20 epochs, the vertical scale is that
    of all but the first twentieth.

    Args:
        history: result of ``fit``, or its columns: ``"loss"``, perhaps ``"validation"``, and one per term, each a
            sequence of numbers in nats per row; and those of players.

    Raises:
        TypeError: something else.
        ValueError: no loss of any epoch.
    """
    if not isinstance(history, Mapping | History):
        raise TypeError(f"expected history to be what fit returned, or its columns, got {describe(history)}")
    columns = dict(history) if isinstance(history, Mapping) else history.to_dict()
    if "loss" not in columns or not len(columns["loss"]):
        raise ValueError(f"expected a history with a loss of one epoch at least, got columns {list(columns)}")
    panels = _panels(columns)
    epochs = np.arange(1, len(columns["loss"]) + 1)

    most_lines = max(len(panel.lines) * (2 if panel.is_long else 1) for panel in panels)
    figure = make_figure(4.4 * len(panels), 3.6 + 0.1 * max(0, most_lines - 4))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, panel in zip(axes, panels, strict=True):
        for i, (name, label) in enumerate(panel.lines.items()):
            ax.plot(epochs, columns[name], **_line(i), label=label)
        tidy(ax)
        ax.set(xlabel="epoch", ylabel=panel.axis)
        if panel.is_share:
            ax.axhline(0.5, color="0.6", linewidth=0.8, linestyle=":", label="chance")
            ax.set_ylim(-0.02, 1.02)
        elif len(epochs) > 20:  # the first epochs would flatten all later ones
            _limit_to(ax, [line.get_ydata()[len(epochs) // 20 :] for line in ax.lines])
        if len(epochs) == 1:  # a single point makes no line
            for line in ax.lines:
                line.set_marker("o")
        size = {"fontsize": SMALL} if ax is not axes[0] else {}
        ax.legend(**size, **LEGEND_ABOVE | {"ncols": 1 if panel.is_long else 2})
    return figure


@dataclass(frozen=True)
class _Panel:
    """A panel of a training curve.

    Attributes:
        axis: label of the vertical axis.
        lines: column -> label.
        is_share: True for numbers between 0 and 1.
    """

    axis: str
    lines: Mapping[str, str]
    is_share: bool = False

    @property
    def is_long(self) -> bool:
        """True if a label is too long for two columns of them."""
        return max(map(len, self.lines.values())) > 24


def _panels(columns: Mapping[str, Any]) -> list[_Panel]:
    """Return the panels for these columns of a history, the loss first."""
    losses = {name: text for name, text in {"loss": "training", "validation": "validation"}.items() if name in columns}
    # a decoder beside a discriminator has the whole objective in its loss, and so its scale
    losses |= {name: name for name in columns if re.fullmatch(r"[^(]*\S decoder", name)}
    accuracies = {name: name.removesuffix(" accuracy") for name in columns if name.endswith(" accuracy")}
    players = [name for name in columns if name not in (*accuracies, *losses) and PLAYER.match(name)]
    terms = [name for name in columns if not (name in losses or name in accuracies or name in players)]

    found = [_Panel(f"loss: minus the objective ({NATS})", losses)]
    if len(terms) > 1:
        found.append(_Panel(f"term of the objective ({NATS})", {name: term_in_words(name) for name in terms}))
    if players:
        found.append(_Panel(f"players ({NATS})", {name: name for name in players}))
    if accuracies:
        found.append(_Panel("accuracy", accuracies, is_share=True))
    return found


def _limit_to(ax: Axes, values: Sequence[Any]) -> None:
    """Set the vertical limits of axes to the range of finite values, if there are any."""
    late = np.concatenate(values)
    late = late[np.isfinite(late)]
    if len(late):
        margin = 0.08 * max(np.ptp(late), 1e-6)
        ax.set_ylim(late.min() - margin, late.max() + margin)


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
