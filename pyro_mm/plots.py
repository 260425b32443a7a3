"""Pictures of a run, each a matplotlib Figure of its own: no pyplot, and so no state, window or backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .train import History

NATS = "nats a row"


def training_curve(history: History | Mapping[str, Sequence[float]]) -> Figure:
    """Minus the objective against the epoch, and each of its terms beside it if there is more than one.

    Args:
        history: what ``fit`` returned, or its columns.
    """
    columns = dict(history) if isinstance(history, Mapping) else history.to_dict()
    losses = {name: columns[name] for name in ("loss", "validation") if name in columns}
    terms = {name: values for name, values in columns.items() if name not in losses}
    panels = 2 if len(terms) > 1 else 1
    figure = _figure(4.8 * panels, 4.0)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    epochs = np.arange(1, len(columns["loss"]) + 1)
    labels = {"loss": "training", "validation": "validation"}
    for name, values in losses.items():
        axes[0].plot(epochs, values, label=labels[name])
    axes[0].set_ylabel(f"minus the objective ({NATS})")
    if panels == 2:
        for name, values in terms.items():
            axes[1].plot(epochs, values, label=name)
        axes[1].set_ylabel(f"term of the objective ({NATS})")
        axes[1].legend(
            title="term (encode, decode, given)", frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2
        )
    axes[0].legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    for ax in axes:
        ax.set_xlabel("epoch")
        ax.spines[["top", "right"]].set_visible(False)
        if len(epochs) > 20:  # the first epochs would squeeze all others into a line
            late = np.concatenate([line.get_ydata()[len(epochs) // 20 :] for line in ax.lines])
            margin = 0.08 * max(late.max() - late.min(), 1e-6)
            ax.set_ylim(late.min() - margin, late.max() + margin)
        for line in ax.lines:
            if len(epochs) == 1:  # one point makes no line
                line.set_marker("o")
    return figure


def image_grid(
    images: Tensor, rows: Sequence[Any] | None = None, columns: Sequence[Any] | None = None, title: str = ""
) -> Figure:
    """Grey images in [0, 1] as a grid, 1 in black.

    Args:
        images: ``(R, C, H, W)``.
        rows, columns: what to write beside each row and above each column.
        title: of the whole.
    """
    r, c, height, width = images.shape
    figure = _figure(0.62 * c * width / height + 0.5, 0.62 * r + (0.4 if title else 0.1), gap=0.02)
    axes = figure.subplots(r, c, squeeze=False)
    for i in range(r):
        for j in range(c):
            ax = axes[i, j]
            ax.imshow(images[i, j].detach().cpu().numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            ax.set_xticks([])
            ax.set_yticks([])
            for spine in ax.spines.values():
                spine.set_color("0.8")
        if rows is not None:
            axes[i, 0].set_ylabel(str(rows[i]), rotation=0, ha="right", va="center")
    for ax, name in zip(axes[0], columns or (), strict=False):
        ax.set_title(str(name), fontsize=9)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def confusion(matrix: np.ndarray, classes: Sequence[Any] | None = None, title: str = "") -> Figure:
    """Counts of true classes (down) against predicted ones (across), coloured by their share of the true class."""
    counts = np.asarray(matrix)
    names = list(map(str, range(len(counts)) if classes is None else classes))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = _figure(4.8, 4.2)
    ax = figure.subplots()
    picture = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(counts > 0):
        ax.text(
            j, i, counts[i, j], ha="center", va="center", fontsize=8, color="white" if shares[i, j] > 0.5 else "0.2"
        )
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("predicted label")
    ax.set_ylabel("true label")
    figure.colorbar(picture, ax=ax, label="share of the true label", shrink=0.85)
    if title:
        ax.set_title(title, fontsize=10)
    return figure


def latent_view(points: Tensor, labels: Tensor, title: str = "") -> Figure:
    """Latent points in the plane of their first two principal components, coloured by label.

    Args:
        points: ``(N, D)``, for instance posterior means.
        labels: integers ``(N,)``.
    """
    x = points.detach().cpu().double().numpy()
    x, y = x - x.mean(0), labels.detach().cpu().numpy()
    _, s, axes = np.linalg.svd(x, full_matrices=False)
    plane = x @ axes[:2].T
    if plane.shape[1] < 2:  # a latent of one dimension, or one point
        plane = np.concatenate([plane, np.zeros_like(plane)], 1)[:, :2]
    share = 100 * np.append(s**2, 0.0)[:2] / max((s**2).sum(), 1e-12)
    figure = _figure(5.2, 4.2)
    ax = figure.subplots()
    classes = np.unique(y)
    colours = _colours(len(classes))
    for colour, label in zip(colours, classes, strict=True):
        ax.scatter(
            plane[y == label, 0], plane[y == label, 1], s=14, color=colour, label=str(label), alpha=0.8, linewidths=0
        )
    ax.set_xlabel(f"first principal component ({share[0]:.0f} % of the variance)")
    ax.set_ylabel(f"second ({share[1]:.0f} %)")
    ax.set_aspect("equal", adjustable="datalim")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(title="label", frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), markerscale=1.5)
    if title:
        ax.set_title(title, fontsize=10)
    return figure


def _figure(width: float, height: float, gap: float = 0.05) -> Figure:
    from matplotlib.figure import Figure  # here, because it takes a second
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    pads = ConstrainedLayoutEngine(w_pad=gap, h_pad=gap, wspace=0.02, hspace=0.02)
    return Figure(figsize=(width, height), layout=pads)


def _colours(n: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["tab10"](i) if n <= 10 else colormaps["viridis"](i / max(n - 1, 1)) for i in range(n)]
