"""Figures of samples, latents and predicted labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..utils.arguments import check_tensor, describe
from .figure import CHARACTER, colors_of_classes, make_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CELL = 0.62  # inches, height of an image in a grid


def image_grid(
    images: Tensor, rows: Sequence[Any] | None = None, columns: Sequence[Any] | None = None, title: str = ""
) -> Figure:
    """Draw grey-scale images as a grid, with 0 in white and 1 in black.

    Args:
        images: values in [0, 1], ``(R, C, H, W)``.
        rows: R labels beside the rows.
        columns: C labels above the columns.
        title: title of the figure.

    Raises:
        ValueError: another shape, or no image.
    """
    r, c, height, width = check_tensor("images", images, ("R", "C", "H", "W")).shape
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
            ax.imshow(images[i, j].detach().cpu().numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            ax.spines[:].set_color("0.8")
    for ax, name in zip(axes[:, 0], rows or (), strict=False):
        ax.set_ylabel(str(name), rotation=0, ha="right", va="center")
    for ax, name in zip(axes[0], columns or (), strict=False):
        ax.set_title(str(name), fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def confusion(matrix: np.ndarray, classes: Sequence[Any] | None = None, title: str = "") -> Figure:
    """Draw a confusion matrix: counts, coloured by their proportion of the true class.

    Args:
        matrix: counts ``(C, C)``, one row per true class and one column per predicted class, as
            :func:`~pyro_mm.metrics.confusion_matrix` returns them.
        classes: C names; numbers from 0 by default.
        title: title of the figure.

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
    figure = make_figure(size + 0.6, size)
    ax = figure.subplots()
    picture = ax.imshow(proportions, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(counts > 0):
        color = "white" if proportions[i, j] > 0.5 else "0.2"
        ax.text(j, i, counts[i, j], ha="center", va="center", fontsize=8, color=color)

    fits = CHARACTER * (max(map(len, names)) + 1) * len(names) < size - 1.2
    slant: dict[str, Any] = {} if fits else {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    ax.set_xticks(range(len(names)), names, **slant)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("predicted class")
    ax.set_ylabel("true class")
    figure.colorbar(picture, ax=ax, label="proportion of the true class", shrink=0.85)
    if title:
        ax.set_title(title, fontsize=10)
    return figure


def latent_view(points: Tensor, labels: Tensor, title: str = "") -> Figure:
    """Plot latent points in the plane of their first two principal components, coloured by label.

    Args:
        points: ``(N, D)``, such as posterior means.
        labels: integers ``(N,)``.
        title: title of the figure.

    Raises:
        ValueError: other shapes, or no point.
    """
    check_tensor("points", points, ("N", "D"))
    check_tensor("labels", labels, (len(points),))
    if not points.numel():
        raise ValueError(f"expected one point at least, got shape {tuple(points.shape)}")
    x = points.detach().cpu().double().numpy()
    x = x - x.mean(0)
    y = labels.detach().cpu().numpy()

    _, singular_values, directions = np.linalg.svd(x, full_matrices=False)
    plane = x @ directions[:2].T
    if plane.shape[1] < 2:  # a latent of one dimension, or a single point
        plane = np.concatenate([plane, np.zeros_like(plane)], 1)[:, :2]
    variance = singular_values**2
    percent = 100 * np.append(variance, 0.0)[:2] / max(variance.sum(), 1e-12)

    figure = make_figure(5.2, 4.2)
    ax = figure.subplots()
    classes = np.unique(y)
    for color, label in zip(colors_of_classes(len(classes)), classes, strict=True):
        of_class = plane[y == label]
        ax.scatter(of_class[:, 0], of_class[:, 1], s=14, color=color, label=str(label), alpha=0.8, linewidths=0)
    ax.set_xlabel(f"first principal component ({percent[0]:.0f} % of the variance)")
    ax.set_ylabel(f"second principal component ({percent[1]:.0f} %)")
    ax.set_aspect("equal", adjustable="datalim")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(title="label", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.5)
    if title:
        ax.set_title(title, fontsize=10)
    return figure
