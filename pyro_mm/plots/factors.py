"""Figures of the roles of factors: gradient norms over time, normalised HSIC, and swaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..metrics.dependence import HSICRatios
from ..metrics.factor_gradients import GradientNorms
from ..metrics.factor_swaps import Swaps
from ..utils.arguments import check_integer, check_names, describe
from .cells import HEIGHT, SYMBOLS, Cells
from .figure import CHARACTER, LEGEND_ABOVE, PALETTE, SMALL, axes_or_new, make_figure, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def gradient_norms(norms: GradientNorms, modalities: Sequence[str] | str | None = None, title: str = "") -> Figure:
    """Draw gradient norms as heat maps, one per modality: factors from top to bottom, steps from left to right.

    Every panel has a scale of its own, from 0. A grey cell has no row.

    Args:
        norms: result of :func:`pyro_mm.metrics.gradient_norms`.
        modalities: names of those to show; None for all.
        title: title of the figure.

    Raises:
        TypeError: something else than gradient norms.
        ValueError: an unknown modality.
    """
    if not isinstance(norms, GradientNorms):
        raise TypeError(f"expected norms to be what metrics.gradient_norms returned, got {describe(norms)}")
    names = tuple(norms.norms) if modalities is None else check_names("modalities", modalities, norms.norms, least=1)
    steps = [norms.norms[name].shape[1] for name in names]
    widths = [max(0.9, min(0.28 * n, 4.5)) for n in steps]
    label_width = CHARACTER * max(map(len, norms.factors))

    figure = make_figure(sum(widths) + 0.95 * len(names) + label_width, 0.42 * len(norms.factors) + 1.15)
    panels = figure.subplots(1, len(names), squeeze=False, width_ratios=widths)[0]
    for place, (ax, name) in enumerate(zip(panels, names, strict=True)):
        _heat_map(ax, norms.norms[name].numpy(), norms.errors[name].numpy())
        ax.set_title(name, fontsize=10)
        ax.set_yticks(range(len(norms.factors)), norms.factors if place == 0 else [])
    per = "standard deviation" if norms.standardised else "unit"
    figure.supxlabel(f"gradient norm of the reconstruction, per {per} of the factor (± s.e. over rows)", fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _heat_map(ax: Axes, values: np.ndarray, errors: np.ndarray) -> None:
    """Draw one modality, ``(F, T)``."""
    largest = np.nanmax(values) if np.isfinite(values).any() else 1.0
    picture = ax.imshow(values, cmap="viridis", vmin=0, vmax=largest or 1.0, aspect="auto", interpolation="nearest")
    ax.set_facecolor("0.85")
    steps = values.shape[1]
    if steps == 1:
        ax.set_xticks([])
        for i, (value, error) in enumerate(zip(values[:, 0], errors[:, 0], strict=True)):
            dark = value < 0.6 * largest
            text = f"{value:.2g}" if not error > 0 else f"{value:.2g}\n± {error:.1g}"
            ax.text(0, i, text, ha="center", va="center", fontsize=SMALL, color="white" if dark else "black")
    else:
        every = max(1, -(-steps // 8))
        ax.set_xticks(range(0, steps, every), [str(t) for t in range(0, steps, every)], fontsize=SMALL)
        ax.set_xlabel("step", fontsize=9)
        bar = ax.figure.colorbar(picture, ax=ax, pad=0.02, fraction=0.08)
        bar.ax.tick_params(labelsize=SMALL)


def hsic_ratios(ratios: HSICRatios, *, ax: Axes | None = None) -> Axes:
    """Draw normalised HSIC as bars, one group per modality, with two standard errors over rows on either side.

    Args:
        ratios: result of :func:`pyro_mm.metrics.hsic_ratios`.
        ax: axes to draw in; None for those of a new figure, ``ax.figure``.

    Returns:
        The axes.

    Raises:
        TypeError: something else than ratios.
    """
    if not isinstance(ratios, HSICRatios):
        raise TypeError(f"expected ratios to be what metrics.hsic_ratios returned, got {describe(ratios)}")
    factors = list(ratios.ratios)
    modalities = list(next(iter(ratios.ratios.values())))
    width = 0.8 / len(factors)
    ax = axes_or_new(ax, max(4.2, 0.32 * len(factors) * len(modalities) + 1.4), 3.4)
    for i, factor in enumerate(factors):
        places = np.arange(len(modalities)) + (i - (len(factors) - 1) / 2) * width
        heights = [ratios.ratios[factor][name] for name in modalities]
        errors = [2 * ratios.errors[factor][name] for name in modalities]
        style: dict[str, Any] = {"color": PALETTE[i % len(PALETTE)], "edgecolor": "black", "linewidth": 0.5}
        ax.bar(places, heights, 0.9 * width, yerr=errors, capsize=2, error_kw={"linewidth": 0.9}, label=factor, **style)
    ax.axhline(0, color="0.3", linewidth=0.8)
    ax.set_xticks(range(len(modalities)), modalities)
    ax.set_xlabel("reconstruction")
    ax.set_ylabel("normalised HSIC (± 2 s.e.)")
    ax.legend(**LEGEND_ABOVE | {"ncols": min(4, len(factors)), "fontsize": 9})
    return ax


def swap_effects(found: Swaps, title: str = "", *, ax: Axes | None = None) -> Axes:
    """Draw the effects of swapped factors as a heat map: factors from top to bottom, modalities from left to right.

    A cell has the share of a change of all factors, with its standard error over rows; a grey one has no rows.

    Args:
        found: result of :func:`pyro_mm.metrics.swaps`.
        title: title of the axes.
        ax: axes to draw in; None for those of a new figure, ``ax.figure``.

    Returns:
        The axes.

    Raises:
        TypeError: something else than swaps.
        ValueError: swaps without effects.
    """
    if not isinstance(found, Swaps):
        raise TypeError(f"expected found to be what metrics.swaps returned, got {describe(found)}")
    if not found.effects:
        raise ValueError("expected swaps with effects, got none")
    factors = list(found.effects)
    modalities = list(found.effects[factors[0]])
    values, errors = (
        np.array([[table[factor][name] for name in modalities] for factor in factors])
        for table in (found.effects, found.errors)
    )

    width = max(0.95, CHARACTER * max(map(len, modalities)) + 0.2) * len(modalities)
    ax = axes_or_new(ax, width + CHARACTER * max(map(len, factors)) + 1.2, 0.5 * len(factors) + 0.9)
    picture = ax.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    ax.set_facecolor("0.85")
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            text = f"{value:.2f}\n± {errors[i, j]:.2f}" if errors[i, j] > 0 else f"{value:.2f}"
            color = "white" if value < 0.6 else "black"
            ax.text(j, i, text, ha="center", va="center", fontsize=SMALL, color=color)
    ax.set_xticks(range(len(modalities)), modalities)
    ax.set_yticks(range(len(factors)), factors)
    ax.set_xlabel("reconstruction")
    ax.figure.colorbar(picture, ax=ax, label="share of a change of all")
    set_title(ax, title)
    return ax


def swaps(
    found: Swaps,
    rows: Sequence[int] = (0, 1, 2),
    modalities: Sequence[str] | str | None = None,
    symbols: str = SYMBOLS,
    title: str = "",
) -> Figure:
    """Draw rows, their reconstructions, and these with single factors of other rows, with the truth of both beside.

    An image is grey or in colour, a sequence of numbers has a curve per dimension, tokens and classes are letters and
    numbers; of probabilities the likeliest is shown. A frame is orange where a swap has changed something, and grey
    elsewhere.

    Args:
        found: result of :func:`pyro_mm.metrics.swaps`.
        rows: the rows to show.
        modalities: names of those to show; None for all.
        symbols: the characters of tokens 0, 1, ..; a token beyond them is shown as its number.
        title: title of the figure.

    Raises:
        TypeError: something else than swaps.
        ValueError: an unknown modality, no rows, or one that is not there.
    """
    if not isinstance(found, Swaps):
        raise TypeError(f"expected found to be what metrics.swaps returned, got {describe(found)}")
    names = tuple(found.truth) if modalities is None else check_names("modalities", modalities, found.truth, least=1)
    shown = [check_integer("rows", row, 0, len(found.partners) - 1) for row in rows]
    if not shown:
        raise ValueError("expected rows to be one at least, got none")
    cells = {name: Cells(found.truth[name], found.lengths.get(name), symbols) for name in names}
    lines: list[tuple[str, Mapping[str, Tensor], bool]] = [
        ("row", found.truth, False),
        ("reconstruction", found.reconstructions, False),
        *((f"{factor} of the other", values, False) for factor, values in found.swapped.items()),
        ("other row", found.truth, True),
    ]

    widths = [cells[name].width for name in names for _ in shown]
    label_width = CHARACTER * max(len(line[0]) for line in lines) + 0.3
    figure = make_figure(sum(widths) + label_width, HEIGHT * len(lines) + 0.35 + 0.25 * bool(title), gap=0.03)
    axes = figure.subplots(len(lines), len(widths), squeeze=False, width_ratios=widths)
    for i, (label, values, of_partner) in enumerate(lines):
        for j, name in enumerate(names):
            for k, row in enumerate(shown):
                ax = axes[i, j * len(shown) + k]
                source = int(found.partners[row]) if of_partner else row
                plain = found.reconstructions[name][row]
                changed = 2 <= i < len(lines) - 1 and not torch.equal(values[name][row], plain)
                cells[name].draw(ax, values[name][source], source, changed)
        axes[i, 0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for j, name in enumerate(names):
        axes[0, j * len(shown)].set_title(name, fontsize=10, loc="left")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure
