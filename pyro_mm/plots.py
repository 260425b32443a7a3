"""Figures of training, samples, latents, calibration and likelihoods.

Each function returns a ``matplotlib.figure.Figure`` made without pyplot, so that no window, backend or global state is
touched: ``figure.savefig("curve.png")`` writes it, and a notebook shows it. matplotlib is imported at the first call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .diagnostics.rank_tests import RankTest, band, p_text
from .diagnostics.sbc import Calibration
from .evidence.evidence import Evidence
from .training.history import History
from .utils.arguments import check_names, check_tensor, describe
from .utils.global_state import preserve_process_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NATS = "nats per row"
CHARACTER = 0.085  # inches, a generous mean width of a character of 10 points
CELL = 0.62  # inches, height of an image in a grid
MOST_PANELS = 20  # coordinates whose ranks are shown by default
LEGEND_ABOVE: dict[str, Any] = {"frameon": False, "loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2}


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
    figure = _figure(4.8 * panels, 4.0)
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

    figure = _figure(column_width * c + label_width + 0.15, CELL * r + heading + 0.1, gap=0.02)
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
    figure = _figure(size + 0.6, size)
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

    figure = _figure(5.2, 4.2)
    ax = figure.subplots()
    classes = np.unique(y)
    for color, label in zip(_colors(len(classes)), classes, strict=True):
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


def ranks(calibration: Calibration, names: Sequence[str] | None = None, title: str = "") -> Figure:
    """Plot the ECDF of the ranks of true values minus that of uniform ranks, one panel per coordinate.

    The ranks of an exact posterior stay in the grey band with probability 95 %: in the dark one for a single curve, in
    the light one for the curves of all coordinates together (Bonferroni). A curve above zero shows draws of the guide
    that are too high, one below zero draws that are too low; first above and then below, too narrow; first below and
    then above, too wide. A red curve is off, by the p-value in its title. Panels have vertical scales of their own.

    Args:
        calibration: result of :func:`pyro_mm.calibration`.
        names: coordinates, such as ``"z[0]"``; by default all, or the 20 least uniform ones.
        title: title of the figure.

    Raises:
        TypeError: something else than a calibration.
        ValueError: an unknown coordinate.
    """
    if not isinstance(calibration, Calibration):
        raise TypeError(f"expected calibration to be what pyro_mm.calibration returned, got {describe(calibration)}")
    tests = calibration.findings
    if names is not None:
        shown = list(check_names("names", names, tests, least=1, what="coordinate"))
    else:
        least_uniform = sorted(tests, key=lambda name: tests[name].p_value)[:MOST_PANELS]
        shown = [name for name in tests if name in least_uniform]
        if len(shown) < len(tests):
            title += f"{': ' if title else ''}the {len(shown)} least uniform of {len(tests)} coordinates"

    columns = len(shown) if len(shown) <= 3 else min(5, math.ceil(len(shown) ** 0.5))
    lines = -(-len(shown) // columns)
    figure = _figure(max(2.2 * columns, 4.2) + 0.3, 1.85 * lines + 0.9)
    panels = figure.subplots(lines, columns, squeeze=False)
    for i, (ax, name) in enumerate(zip(panels.flat, shown, strict=False)):
        _rank_panel(ax, name, calibration, len(tests))
        is_lowest = i + columns >= len(shown)
        ax.tick_params(labelsize=8, labelbottom=is_lowest)
        ax.set_xlabel(f"(rank + 1) / {calibration.num_draws + 1}" if is_lowest else "", fontsize=8)
    for ax in panels.flat[len(shown) :]:
        ax.set_axis_off()

    figure.supylabel("ECDF of ranks \N{MINUS SIGN} uniform", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    note = f"p: adjusted by Holm's method for all {len(tests)} coordinates" if len(tests) > 1 else None
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 2, "frameon": False}
    figure.legend(handles[::-1], labels[::-1], title=note, fontsize=8, title_fontsize=8, **place)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _rank_panel(ax: Axes, name: str, calibration: Calibration, num_curves: int) -> None:
    """Draw the curve of one coordinate with its bands."""
    test: RankTest = calibration.findings[name]
    draws = calibration.num_draws
    x = np.arange(draws + 2) / (draws + 1)
    limit = 0.0
    for level, grey, label in (
        (0.05 / num_curves, "0.9", f"95 % band, all {num_curves} curves"),
        (0.05, "0.78", "95 % band, one curve"),
    ):
        lower, upper = (
            np.concatenate([[0], counts / test.rows, [1]]) - x for counts in band(test.rows, draws, 1 - level)
        )
        ax.fill_between(x, lower, upper, color=grey, linewidth=0, label=label)
        limit = max(limit, 1.3 * upper.max())

    is_off = test.verdict != "uniform"
    difference = np.append(0, calibration.counts[name].cumsum()) / test.rows - x
    ax.axhline(0, color="0.5", linewidth=0.6)
    ax.plot(x, difference, color="tab:red" if is_off else "tab:blue", linewidth=1.2)
    limit = max(limit, 1.1 * abs(difference).max())
    ax.set(ylim=(-limit, limit), xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"])
    text = f"{name}, {p_text(test.adjusted, 1)}\n{test.verdict if is_off else ''}"
    ax.set_title(text, fontsize=8, loc="left", color="tab:red" if is_off else "black")
    ax.spines[["top", "right"]].set_visible(False)


def convergence(
    evidence: Evidence | Mapping[str, Evidence], rows: Sequence[int] | None = None, title: str = ""
) -> Figure:
    r"""Plot log-likelihood estimates against the number of particles: the mean over rows, and single rows.

    A mean that still rises at the right has not converged, and is too low. The band is ± 2 standard errors by the
    draws. Single rows are shown minus their final estimate; a jump is a single draw with most of the row's weight.
    The points of a curve share their particles. The vertical scale is that of :math:`\sqrt K` particles and more.

    Args:
        evidence: result of :func:`pyro_mm.log_marginal` and the like, or several by name.
        rows: indices of the rows to show; by default those with the five largest k-hat (or standard errors, if k-hat
            is not known) of a single evidence, and none of several.
        title: title of the figure.

    Raises:
        TypeError: something else than evidence.
        ValueError: evidence without its ``running`` estimates.
    """
    several = dict(evidence) if isinstance(evidence, Mapping) else {"": evidence}
    if not several or not all(isinstance(one, Evidence) for one in several.values()):
        raise TypeError(f"expected evidence to be an Evidence, or several by name, got {describe(evidence)}")
    if not all(one.running for one in several.values()):
        raise ValueError("expected evidence with its running estimate, as log_marginal gives it")
    if rows is None:
        rows = _worst_rows(next(iter(several.values()))) if len(several) == 1 else ()

    panels = 2 if len(rows) else 1
    figure = _figure(4.8 * panels, 3.8)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    counts = {one.rows_text for one in several.values()}
    what = f"mean of {counts.pop() if len(counts) == 1 else 'rows'} ± 2 s.e."
    visible: tuple[list[Any], list[Any]] = [], [np.zeros(1)]  # values that the scale of each panel has to show
    for name, one in several.items():
        visible[0].extend(_convergence_of_mean(axes[0], one, name or what))
        if panels == 2:
            visible[1].extend(_convergence_of_rows(axes[1], one, rows, name))

    quantities = {one.quantity for one in several.values()}
    axes[0].set_ylabel(f"{quantities.pop() if len(quantities) == 1 else 'log-likelihood'} ({NATS})")
    if panels == 2:
        axes[1].set_ylabel("estimate \N{MINUS SIGN} final estimate (nats)")
        axes[1].axhline(0, color="0.6", linewidth=0.8, zorder=0)
    for ax, values in zip(axes, visible, strict=False):
        finite = np.concatenate(values)[np.isfinite(np.concatenate(values))]
        margin = 0.1 * max(np.ptp(finite), 0.01)
        ax.set_ylim(finite.min() - margin, finite.max() + margin)
        ax.set_xscale("log", base=2)
        ax.set_xlabel("particles")
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.spines[["top", "right"]].set_visible(False)
        note = what if ax is axes[0] and len(several) > 1 else None
        ax.legend(fontsize=8, title=note, title_fontsize=8, alignment="left", **LEGEND_ABOVE)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _worst_rows(evidence: Evidence) -> list[int]:
    """Return up to five rows with the largest k-hat, or the largest standard error if k-hat is not known."""
    if evidence.num_particles == 1:
        return []
    order = (evidence.standard_error if evidence.few else evidence.pareto_k).nan_to_num(np.inf)
    return order.topk(min(5, len(evidence))).indices.tolist()


def _running(evidence: Evidence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the numbers of particles ``(J,)``, and the estimates and standard errors of rows, ``(J, N)`` each."""
    particles = np.array(sorted(evidence.running))
    values, errors = (
        np.stack([evidence.running[k][which].cpu().double().numpy() for k in particles]) for which in (0, 1)
    )
    return particles, values, errors


def _convergence_of_mean(ax: Axes, evidence: Evidence, label: str) -> list[np.ndarray]:
    """Draw the mean over rows with its band; return the values of the later half."""
    particles, values, errors = _running(evidence)
    counted = evidence.counted.cpu().numpy()
    mean = values[:, counted].mean(1)
    error = 2 * np.sqrt((errors[:, counted] ** 2).sum(1)) / counted.sum()
    (line,) = ax.plot(particles, mean, marker="o", markersize=3, label=label)
    ax.fill_between(particles, mean - error, mean + error, alpha=0.25, linewidth=0, color=line.get_color())
    late = particles >= particles[-1] ** 0.5
    return [mean[late], (mean - error)[late], (mean + error)[late]]


def _convergence_of_rows(ax: Axes, evidence: Evidence, rows: Sequence[int], name: str) -> list[np.ndarray]:
    """Draw single rows minus their final estimates; return the values of the later half."""
    particles, values, _ = _running(evidence)
    late = particles >= particles[-1] ** 0.5
    visible = []
    for row in rows:
        difference = values[:, row] - values[-1, row]
        k_hat = evidence.pareto_k[row]
        label = ", ".join(filter(None, [name, f"row {row}", "" if k_hat.isnan() else f"k-hat {k_hat:.2f}"]))
        ax.plot(particles, difference, linewidth=1, label=label)
        visible.append(difference[late])
    return visible


def _figure(width: float, height: float, gap: float = 0.05) -> Figure:
    """Return an empty figure of a size in inches, with a constrained layout."""
    with preserve_process_settings():
        from matplotlib.figure import Figure  # imported here because it takes a second
        from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=gap, h_pad=gap, wspace=0.02, hspace=0.02)
    return Figure(figsize=(width, height), layout=layout)


def _colors(n: int) -> list[Any]:
    """Return n colours: distinct ones up to ten, a scale beyond."""
    with preserve_process_settings():
        from matplotlib import colormaps

    return [colormaps["tab10"](i) if n <= 10 else colormaps["viridis"](i / max(n - 1, 1)) for i in range(n)]
