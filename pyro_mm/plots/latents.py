"""Figures of latents: points in a plane, and traversals of single coordinates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..metrics.decoding import decoding
from ..utils.arguments import check_integer, check_name, check_number, check_tensor
from .cells import HEIGHT, Cells
from .figure import CHARACTER, SMALL, axes_or_new, make_figure, set_title, styles_of_classes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POSITIONS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
MOST_COORDINATES = 8  # of a traversal by default


def latent_view(
    points: Tensor,
    labels: Tensor | None = None,
    title: str = "",
    *,
    projection: Literal["pca", "given"] = "pca",
    ax: Axes | None = None,
) -> Axes:
    """Plot latent points in the plane of their first two principal components, or at given coordinates.

    Args:
        points: ``(N, D)``, such as posterior means.
        labels: integers ``(N,)``, which choose colour and marker; floats ``(N,)``, which choose a colour of a scale;
            None for one colour.
        title: title of the axes.
        projection: "pca" for principal components, "given" to plot points ``(N, 2)`` as they are: those of UMAP, t-SNE,
            or a latent of two dimensions.
        ax: axes to draw in; None for those of a new figure, ``ax.figure``.

    Returns:
        The axes.

    Raises:
        ValueError: other shapes, no point, points that are not finite, or another projection.
    """
    check_tensor("points", points, ("N", "D"))
    check_name("projection", projection, ("pca", "given"), "projection")
    if labels is not None:
        check_tensor("labels", labels, (len(points),))
    if not points.numel():
        raise ValueError(f"expected one point at least, got shape {tuple(points.shape)}")
    x = points.detach().cpu().double().numpy()
    if not np.isfinite(x).all():
        raise ValueError("expected finite points, got NaN or infinite ones")
    if projection == "given" and x.shape[1] != 2:
        raise ValueError(f'expected points (N, 2) for projection="given", got shape {tuple(points.shape)}')
    plane, names = (x, ("first coordinate", "second coordinate")) if projection == "given" else _principal_plane(x)

    ax = axes_or_new(ax, 5.2, 4.2)
    _scatter(ax, plane, None if labels is None else labels.detach().cpu().numpy())
    ax.set_xlabel(names[0])
    ax.set_ylabel(names[1])
    ax.set_aspect("equal", adjustable="datalim")
    set_title(ax, title)
    return ax


def _principal_plane(x: np.ndarray) -> tuple[np.ndarray, tuple[str, str]]:
    """Return points ``(N, 2)`` in the plane of the first two principal components, and the names of its axes."""
    x = x - x.mean(0)
    _, singular_values, directions = np.linalg.svd(x, full_matrices=False)
    plane = x @ directions[:2].T
    if plane.shape[1] < 2:  # a latent of one dimension, or a single point
        plane = np.concatenate([plane, np.zeros_like(plane)], 1)[:, :2]
    variance = singular_values**2
    percent = 100 * np.append(variance, 0.0)[:2] / max(variance.sum(), 1e-12)
    names = f"first principal component ({percent[0]:.0f} % of the variance)", f"second ({percent[1]:.0f} %)"
    return plane, names


def _scatter(ax: Axes, plane: np.ndarray, labels: np.ndarray | None) -> None:
    """Draw points ``(N, 2)``, with colours and a legend or a scale for labels."""
    dots: dict[str, Any] = {"s": 16, "alpha": 0.8, "linewidths": 0}
    if labels is None:
        ax.scatter(plane[:, 0], plane[:, 1], **dots)
        return
    if labels.dtype.kind == "f":
        picture = ax.scatter(plane[:, 0], plane[:, 1], c=labels, cmap="viridis", **dots)
        ax.figure.colorbar(picture, ax=ax, label="label")
        return
    classes = np.unique(labels)
    for style, label in zip(styles_of_classes(len(classes)), classes, strict=True):
        of_class = plane[labels == label]
        ax.scatter(of_class[:, 0], of_class[:, 1], label=str(label), **dots, **style)
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "markerscale": 1.5}
    ax.legend(title="label", frameon=False, fontsize=SMALL, ncols=1 + (len(classes) > 16), **place)


def traversal(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    target: str,
    *,
    site: str = "z",
    row: int = 0,
    coordinates: Sequence[int] | None = None,
    positions: Sequence[float] = POSITIONS,
    seed: int | None = None,
    title: str = "",
) -> Figure:
    """Draw the mean of a modality as one coordinate of a latent moves, with all else as in a draw for one row.

    Args:
        model, guide: callables of a batch.
        batch: rows; the latents are drawn given what is present in the row that is shown.
        target: the modality to decode.
        site: the latent, or another factor of the story, of real numbers ``(D,)``.
        row: the row whose latents the others stay at.
        coordinates: those that move, one line for each; None for the first eight.
        positions: the values that a coordinate takes, in units of the latent.
        seed: of the draw; None goes on with torch's generator.
        title: title of the figure.

    Returns:
        The figure, with coordinates from top to bottom, and the row's own reconstruction and truth on the left.

    Raises:
        ValueError: an unknown modality, latent, row or coordinate, a latent that is not real numbers ``(D,)``, or a
            target whose mean is not known.
    """
    check_batch(batch)
    check_name("target", target, batch)
    row = check_integer("row", row, 0, batch.size - 1)
    moved = [check_number("positions", position) for position in positions]
    if not moved:
        raise ValueError("expected positions to be one at least, got none")

    with torch.no_grad(), decoding(model, guide, batch[row : row + 1], seed=seed, audit=True) as (rows, blocks):
        one = next(blocks)
        name = check_name("site", site, one.values, "factor")
        size = _size_of(one.values[name], name)
        chosen = range(min(size, MOST_COORDINATES)) if coordinates is None else coordinates
        lines = [check_integer("coordinates", d, 0, size - 1) for d in chosen]
        plain = one.means()
        if target not in plain:
            raise ValueError(f"the mean of {target!r} is not known, or the story lacks it: choose another target")
        pictures = [
            [one.means({name: _with_coordinate(one.values[name], d, x)})[target][0] for x in moved] for d in lines
        ]
        truth = rows[target][0] if rows.holds(target) and bool(rows.present[target][0]) else None

    left = [plain[target][0]] if truth is None else [truth, plain[target][0]]
    cells = Cells(torch.stack([x.cpu() for x in left[:1]]))
    widths = [cells.width] * (len(left) + len(moved))
    figure = make_figure(
        sum(widths) + 0.06 * len(widths) + CHARACTER * (len(site) + 4),
        HEIGHT * len(lines) + 0.35 + 0.3 * bool(title),
        gap=0.03,
    )
    axes = figure.subplots(len(lines), len(widths), squeeze=False, width_ratios=widths)
    for i, (line, found) in enumerate(zip(axes, pictures, strict=True)):
        for ax, value in zip(line, [*left, *found], strict=True):
            cells.draw(ax, value, 0)
        for ax in line[: len(left)] if i else ():
            ax.set_visible(False)
        line[len(left)].set_ylabel(f"{site}[{lines[i]}]", rotation=0, ha="right", va="center", fontsize=SMALL)
    for ax, heading in zip(axes[0], [*("truth", "draw")[-len(left) :], *(f"{x:g}" for x in moved)], strict=True):
        ax.set_title(heading, fontsize=SMALL)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _size_of(value: Tensor, name: str) -> int:
    """Return D of a factor of real numbers ``(1, D)``. Raises a ValueError for any other."""
    if value.dim() != 2 or not value.is_floating_point():
        raise ValueError(
            f"site: expected a factor of real numbers (N, D), {name!r} is {value.dtype} of shape {tuple(value.shape)}"
        )
    return value.shape[1]


def _with_coordinate(value: Tensor, coordinate: int, position: float) -> Tensor:
    """Return a factor ``(1, D)`` with one coordinate replaced."""
    value = value.clone()
    value[:, coordinate] = position
    return value
