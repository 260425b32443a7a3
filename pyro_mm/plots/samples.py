"""Figures of samples: grids of images, captions, and modalities generated from others."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..sampling.predictive import Generated, SampleSettings, sample_pair
from ..utils.arguments import check_counts, check_integer, check_name, check_names, check_tensor, describe
from .cells import HEIGHT, Cells, draw_image
from .figure import CHARACTER, make_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL = 0.62  # inches, height of an image in a grid
PICTURE = 1.25  # inches, height of an image with a caption


def image_grid(
    images: Tensor, rows: Sequence[Any] | None = None, columns: Sequence[Any] | None = None, title: str = ""
) -> Figure:
    """Draw images as a grid: grey ones with 0 in white and 1 in black, or in colour.

    Args:
        images: values in [0, 1], grey ``(R, C, H, W)`` or in colour ``(R, C, 3, H, W)``.
        rows: R labels beside the rows.
        columns: C labels above the columns.
        title: title of the figure.

    Raises:
        ValueError: another shape, or no image.
    """
    is_colour = isinstance(images, Tensor) and images.dim() == 5
    check_tensor("images", images, ("R", "C", 3, "H", "W") if is_colour else ("R", "C", "H", "W"))
    r, c, height, width = *images.shape[:2], *images.shape[-2:]
    if not images.numel():
        raise ValueError(f"expected one image at least, got shape {tuple(images.shape)}")
    label_width = CHARACTER * max((len(str(name)) for name in rows or ()), default=0)
    column_width = max(CELL * width / height, CHARACTER * max((len(str(name)) for name in columns or ()), default=0))
    heading = 0.2 * bool(columns) + 0.3 * bool(title)

    figure = make_figure(column_width * c + label_width + 0.15, CELL * r + heading + 0.1, gap=0.02)
    axes = figure.subplots(r, c, squeeze=False)
    for i in range(r):
        for j in range(c):
            ax = axes[i, j]
            draw_image(ax, images[i, j].detach().cpu().numpy())
            _frame(ax)
    for ax, name in zip(axes[:, 0], rows or (), strict=False):
        ax.set_ylabel(str(name), rotation=0, ha="right", va="center")
    for ax, name in zip(axes[0], columns or (), strict=False):
        ax.set_title(str(name), fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def captions(images: Tensor, texts: Sequence[str], columns: int = 4, title: str = "") -> Figure:
    """Draw images with a caption under each, broken into lines as wide as the image.

    Args:
        images: values in [0, 1], grey ``(N, H, W)`` or in colour ``(N, 3, H, W)``.
        texts: N captions.
        columns: images beside each other.
        title: title of the figure.

    Raises:
        ValueError: another shape, no image, or another number of captions.
        TypeError: captions that are no texts.
    """
    check_counts(columns=columns)
    is_colour = isinstance(images, Tensor) and images.dim() == 4
    check_tensor("images", images, ("N", 3, "H", "W") if is_colour else ("N", "H", "W"))
    if not images.numel():
        raise ValueError(f"expected one image at least, got shape {tuple(images.shape)}")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"expected texts to be one caption per image, got {describe(texts)}")
    if len(texts) != len(images):
        raise ValueError(f"expected {len(images)} captions, one per image, got {len(texts)}")

    columns = min(columns, len(images))
    lines = -(-len(images) // columns)
    width = max(PICTURE * images.shape[-1] / images.shape[-2], PICTURE)
    broken = [_broken(text, int(width / CHARACTER)) for text in texts]
    below = 0.17 * max(text.count("\n") + 1 for text in broken) + 0.1

    figure = make_figure(columns * (width + 0.1) + 0.1, lines * (PICTURE + below) + 0.3 * bool(title), gap=0.03)
    panels = figure.subplots(lines, columns, squeeze=False)
    for ax, image, text in zip(panels.flat, images, broken, strict=False):
        draw_image(ax, image.detach().cpu().numpy())
        _frame(ax)
        ax.set_xlabel(text, fontsize=9)
    for ax in panels.flat[len(images) :]:
        ax.set_axis_off()
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def cross_modal(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    target: str,
    given: Sequence[str] | str,
    *,
    num_samples: int = 6,
    mean: bool = True,
    rows: Sequence[int] | None = None,
    seed: int | None = None,
    title: str = "",
) -> Figure:
    """Draw rows of a batch: the given modalities, the true target, and samples of the target given these.

    Modalities of any kind are shown: images in grey or colour, curves of sequences and vectors, strings and classes.

    Args:
        model, guide: callables of a batch.
        batch: rows that have the given modalities.
        target: the modality to generate, which the guide does not see.
        given: names of the modalities to generate it from; none for draws from the prior.
        num_samples: samples beside each other.
        mean: True for the mean of p(x | z) of each draw of z, False for a draw from it.
        rows: the rows to show; None for the first six.
        seed: of the draws; None goes on with torch's generator.
        title: title of the figure.

    Returns:
        The figure, with a line per row.

    Raises:
        ValueError: an unknown modality, a row that is not there or lacks what is given, or a target without values.
    """
    check_batch(batch)
    check_counts(num_samples=num_samples)
    check_name("target", target, batch)
    names = check_names("given", given, batch)
    if target in names:
        raise ValueError(f"{target!r} is both the target and given")
    shown = range(min(6, batch.size)) if rows is None else [check_integer("rows", n, 0, batch.size - 1) for n in rows]
    places = torch.tensor(list(shown), dtype=torch.long)
    if not len(places):
        raise ValueError("expected rows to be one at least, got none")
    for name in names:
        if not bool(batch.present[name].cpu()[places].all()):
            raise ValueError(f"rows: {name!r} is given, and missing in some of the rows {places.tolist()}")
    if not batch.holds(target):
        raise ValueError(f"the batch holds no values of {target!r}, whose shape the pictures take")
    part = batch[places.to(batch.device)]
    settings = SampleSettings(num_samples, mean=frozenset([target]) if mean else False)
    sampled = sample_pair(model, guide, part.only(*names), settings, seed=seed, audit=True)
    samples = Generated(sampled.modalities, sampled.lengths)
    if target not in samples:
        raise ValueError(f"the story has no modality {target!r}, only {', '.join(samples)}")

    cells = {name: Cells(part[name].cpu(), _lengths(part, name)) for name in (*names, target)}
    drawn = Cells(part[target].cpu(), None if target not in samples.lengths else samples.lengths[target][0].cpu())
    widths = [*(cells[name].width for name in (*names, target)), *[drawn.width] * num_samples]
    figure = make_figure(
        sum(widths) + 0.1 * len(widths) + 0.2, HEIGHT * len(places) + 0.35 + 0.3 * bool(title), gap=0.03
    )
    axes = figure.subplots(len(places), len(widths), squeeze=False, width_ratios=widths)
    for n, line in enumerate(axes):
        for ax, name in zip(line, (*names, target), strict=False):
            if bool(part.present[name][n]):
                cells[name].draw(ax, part[name][n], n)
            else:
                _missing(ax)
        for s, ax in enumerate(line[len(names) + 1 :]):
            _draw_sample(drawn, ax, samples, target, s, n)
    for ax, name in zip(axes[0], (*names, "truth"), strict=False):
        ax.set_title(name, fontsize=9)
    axes[0, len(names) + 1].set_title(f"{target}, {'means' if mean else 'samples'}", fontsize=9, loc="left")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _draw_sample(cells: Cells, ax: Axes, samples: Generated, target: str, s: int, n: int) -> None:
    """Draw sample s of row n, up to its own length."""
    if target in samples.lengths:
        cells.lengths = samples.lengths[target][s].cpu()
    cells.draw(ax, samples[target][s, n], n)


def _lengths(batch: Batch, name: str) -> Tensor | None:
    return batch.lengths[name].cpu() if name in batch.lengths else None


def _missing(ax: Axes) -> None:
    """Leave axes empty but for a dash: the row lacks the modality."""
    _frame(ax)
    ax.text(0.5, 0.5, "\N{EN DASH}", ha="center", va="center", fontsize=10, color="0.5", transform=ax.transAxes)


def _frame(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_color("0.8")


def _broken(text: str, width: int) -> str:
    """Break a text into lines of at most ``width`` characters."""
    return "\n".join(textwrap.wrap(text, max(width, 8))) or " "
