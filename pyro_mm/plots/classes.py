"""Figures of predicted labels and of the coherence of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..metrics.proportion import Share
from ..utils.arguments import check_mapping, check_number, describe
from .figure import CHARACTER, LEGEND_ABOVE, PALETTE, SMALL, axes_or_new, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def confusion(
    matrix: np.ndarray, classes: Sequence[Any] | None = None, title: str = "", *, ax: Axes | None = None
) -> Axes:
    """Draw a confusion matrix: counts, coloured by their proportion of the true class.

    Args:
        matrix: counts ``(C, C)``, one row per true class and one column per predicted class, as
            :func:`~pyro_mm.metrics.confusion_matrix` returns them.
        classes: C names; numbers from 0 by default.
        title: title of the axes.
        ax: axes to draw in; None for those of a new figure, ``ax.figure``.

    Returns:
        The axes.

    Raises:
        ValueError: no square matrix of numbers, or another number of names.
    """
    counts = np.asarray(matrix)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size or counts.dtype.kind not in "iufb":
        raise ValueError(f"expected a matrix of counts (C, C), got {describe(matrix)}")
    if classes is not None and len(classes) != len(counts):
        raise ValueError(f"expected names of {len(counts)} classes, got {len(classes)}")
    names = list(map(str, range(len(counts)) if classes is None else classes))
    proportions = counts / np.maximum(counts.sum(1, keepdims=True), 1)

    size = max(4.2, 0.36 * len(counts) + 0.8)
    ax = axes_or_new(ax, size + 0.6, size)
    ax.spines[:].set_visible(True)
    picture = ax.imshow(proportions, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(counts > 0):
        color = "white" if proportions[i, j] > 0.5 else "0.2"
        ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=SMALL, color=color)

    fits = CHARACTER * (max(map(len, names)) + 1) * len(names) < size - 1.2
    slant: dict[str, Any] = {} if fits else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(names)), names, **slant)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class")
    ax.figure.colorbar(picture, ax=ax, label="proportion of the true class", shrink=0.85)
    set_title(ax, title)
    return ax


def coherence(
    shares: Mapping[str, Share] | Mapping[str, Mapping[str, Share]],
    chance: float | None = None,
    title: str = "",
    *,
    ax: Axes | None = None,
) -> Axes:
    """Draw proportions of rows, such as coherences, as bars with two standard errors over rows on either side.

    Args:
        shares: name -> proportion, as :func:`pyro_mm.metrics.cross_modal_coherence` returns it, with a bar per name; or
            model -> name -> proportion, with a group of bars per name and a colour per model.
        chance: the proportion by chance, drawn as a dotted line; None for no line.
        title: title of the axes.
        ax: axes to draw in; None for those of a new figure, ``ax.figure``.

    Returns:
        The axes.

    Raises:
        TypeError: something else than proportions.
        ValueError: no proportion, or models that have not the same names.
    """
    given = check_mapping("shares", shares, "proportions of pyro_mm.metrics")
    nested = all(isinstance(one, Mapping) for one in given.values())
    models: dict[str, Mapping[str, Share]] = dict(given) if nested else {"": given}
    names = list(next(iter(models.values()), {}))
    if not names:
        raise ValueError("expected one proportion at least, got none")
    for model, found in models.items():
        if not all(isinstance(share, Share) for share in found.values()):
            raise TypeError(f"expected shares to be what metrics.cross_modal_coherence returns, got {describe(shares)}")
        if set(found) != set(names):
            raise ValueError(f"expected the same proportions of all models, {model!r} has {list(found)}, not {names}")
    if chance is not None:
        check_number("chance", chance, least=0, most=1)

    width = 0.8 / len(models)
    longest = max(map(len, names))
    ax = axes_or_new(ax, max(3.4, (0.3 * len(models) + 0.4) * len(names) + 1.2), 3.2)
    for i, (model, found) in enumerate(models.items()):
        places = np.arange(len(names)) + (i - (len(models) - 1) / 2) * width
        heights = [found[name].value for name in names]
        errors = [2 * found[name].standard_error for name in names]
        style: dict[str, Any] = {"color": PALETTE[i % len(PALETTE)], "edgecolor": "black", "linewidth": 0.5}
        ax.bar(places, heights, 0.9 * width, yerr=errors, capsize=2, error_kw={"linewidth": 0.9}, label=model, **style)
    if chance is not None:
        ax.axhline(chance, color="0.3", linewidth=1, linestyle=":", label="chance")
    fits = CHARACTER * (longest + 1) < 0.3 * len(models) + 0.4
    slant: dict[str, Any] = {} if fits else {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(names)), names, **slant)
    ax.set_ylim(0, 1)
    ax.set_ylabel("proportion of rows (± 2 s.e.)")
    has_names = nested or chance is not None
    set_title(ax, title, ax.legend(fontsize=SMALL, **LEGEND_ABOVE) if has_names else None)
    return ax
