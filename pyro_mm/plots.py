"""Pictures of a run, each a matplotlib Figure of its own: no pyplot, and so no state, window or backend."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .utils.arguments import check_names, check_tensor, describe
from .utils.global_state import preserve_process_settings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from .diagnostics.sbc import Calibration
    from .evidence.evidence import Evidence
    from .training.history import History

NATS = "nats a row"


def training_curve(history: History | Mapping[str, Sequence[float]]) -> Figure:
    """Minus the objective against the epoch, and each of its terms beside it if there is more than one.

    Args:
        history: what ``fit`` returned, or its columns.
    """
    if not isinstance(history, Mapping) and not hasattr(history, "to_dict"):
        raise TypeError(f"expected history to be what fit returned, or its columns, got {describe(history)}")
    columns = dict(history) if isinstance(history, Mapping) else history.to_dict()
    if "loss" not in columns or not len(columns["loss"]):
        raise ValueError(f"expected a history with a loss of one epoch at least, got columns {list(columns)}")
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
    r, c, height, width = check_tensor("images", images, ("R", "C", "H", "W")).shape
    if not images.numel():
        raise ValueError(f"expected one image at least, got shape {tuple(images.shape)}")
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
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size or counts.dtype.kind not in "iufb":
        raise ValueError(f"expected a matrix of counts (C, C), got {describe(matrix)}")
    if classes is not None and len(classes) != len(counts):
        raise ValueError(f"expected names of {len(counts)} classes, got {len(classes)}")
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
    check_tensor("points", points, ("N", "D"))
    check_tensor("labels", labels, (len(points),))
    if not points.numel():
        raise ValueError(f"expected one point at least, got shape {tuple(points.shape)}")
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


def ranks(calibration: Calibration, names: Sequence[str] | None = None, title: str = "") -> Figure:
    """The ECDF of the ranks of true values less that of uniform ones, a panel for each coordinate.

    Grey is where the curve of an exact posterior stays with probability 95 %: dark for one curve alone, light for those
    of all coordinates together (Bonferroni). Above zero, true values rank low and the guide's draws are too high; below
    it they are too low; first above and then below, too narrow; first below and then above, too wide. Red is off by
    the p-value in its title, which is Holm's; panels have scales of their own.

    Args:
        names: the coordinates, such as ``"z[0]"``; by default all, or the 20 least uniform ones.
    """
    from .diagnostics.rank_tests import band, p_text

    if not hasattr(calibration, "findings"):
        raise TypeError(f"expected calibration to be what pyro_mm.calibration returned, got {describe(calibration)}")
    found, draws = calibration.findings, calibration.num_draws
    if names is not None:
        names = check_names("names", names, found, least=1, what="coordinate")
    if names is None:
        worst = sorted(found, key=lambda name: found[name].p_value)[:20]
        names = [name for name in found if name in worst]
        if len(names) < len(found):
            title += f"{': ' if title else ''}the {len(names)} least uniform of {len(found)} coordinates"
    columns = len(names) if len(names) <= 3 else min(5, math.ceil(len(names) ** 0.5))
    lines = -(-len(names) // columns)
    figure = _figure(max(2.2 * columns, 4.2) + 0.3, 1.85 * lines + 0.9)
    panels = figure.subplots(lines, columns, squeeze=False)
    x = np.arange(draws + 2) / (draws + 1)
    bands = (0.05 / len(found), "0.9", f"95 % band, all {len(found)} curves"), (0.05, "0.78", "95 % band, one curve")
    for i, (ax, name) in enumerate(zip(panels.flat, names, strict=False)):
        finding, limit = found[name], 0.0
        for level, grey, label in bands:
            ends = [np.concatenate([[0], end / finding.rows, [1]]) - x for end in band(finding.rows, draws, 1 - level)]
            ax.fill_between(x, *ends, color=grey, linewidth=0, label=label)
            limit = max(limit, 1.3 * ends[1].max())
        off = finding.verdict != "uniform"
        difference = np.append(0, calibration.counts[name].cumsum()) / finding.rows - x
        ax.axhline(0, color="0.5", linewidth=0.6)
        ax.plot(x, difference, color="tab:red" if off else "tab:blue", linewidth=1.2)
        limit = max(limit, 1.1 * abs(difference).max())
        ax.set(ylim=(-limit, limit), xlim=(0, 1), xticks=[0, 0.5, 1], xticklabels=["0", "0.5", "1"])
        ax.tick_params(labelsize=8, labelbottom=i + columns >= len(names))
        ax.set_xlabel(f"(rank + 1) / {draws + 1}" if i + columns >= len(names) else "", fontsize=8)
        text = f"{name}, {p_text(finding.adjusted, 1)}\n{finding.verdict if off else ''}"
        ax.set_title(text, fontsize=8, loc="left", color="tab:red" if off else "black")
        ax.spines[["top", "right"]].set_visible(False)
    for ax in panels.flat[len(names) :]:
        ax.set_axis_off()
    figure.supylabel("ECDF of ranks less uniform", fontsize=9)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    note = f"p: Holm's, of all {len(found)} coordinates" if len(found) > 1 else None
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 2, "frameon": False}
    figure.legend(handles[::-1], labels[::-1], title=note, fontsize=8, title_fontsize=8, **place)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def convergence(
    evidence: Evidence | Mapping[str, Evidence], rows: Sequence[int] | None = None, title: str = ""
) -> Figure:
    r"""A log-likelihood against the number of particles: the mean over rows, ± 2 standard errors, and single rows.

    A mean that still rises at the right has not arrived, and is too low. Rows are shown less their last estimate; a
    jump is a single draw that carries the row. Points of a curve share their particles. The vertical scale is that of
    the later half, from :math:`\sqrt K` particles on.

    Args:
        evidence: an estimate, or several by name; their errors are of the estimation, not of the choice of rows.
        rows: which rows to show; by default the five with the largest k-hat (or, without one, the largest error), or
            none of several estimates.

    Raises:
        ValueError: evidence that has no ``running``.
    """
    several = dict(evidence) if isinstance(evidence, Mapping) else {"": evidence}
    if not several or not all(hasattr(one, "running") for one in several.values()):
        raise TypeError(f"expected evidence to be an Evidence, or several by name, got {describe(evidence)}")
    first = next(iter(several.values()))
    if not all(one.running for one in several.values()):
        raise ValueError("expected evidence with its running estimate, as log_marginal gives it")
    if rows is None:
        order = (first.standard_error if first.few else first.pareto_k).nan_to_num(np.inf)
        rows = order.topk(min(5, len(first))).indices.tolist() if len(several) == 1 < first.num_particles else ()
    panels = 2 if len(rows) else 1
    figure = _figure(4.8 * panels, 3.8)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    late: tuple[list[Any], list[Any]] = [], [np.zeros(1)]  # what the scale of each panel has to show
    counts = {one.rows_text for one in several.values()}
    what = f"mean of {counts.pop() if len(counts) == 1 else 'rows'} ± 2 s.e."
    for name, one in several.items():
        k = np.array(sorted(one.running))
        values, errors = (np.stack([one.running[j][which].cpu().double().numpy() for j in k]) for which in (0, 1))
        counted = one.counted.cpu().numpy()
        mean = values[:, counted].mean(1)
        error = 2 * np.sqrt((errors[:, counted] ** 2).sum(1)) / counted.sum()
        (line,) = axes[0].plot(k, mean, marker="o", markersize=3, label=name or what)
        axes[0].fill_between(k, mean - error, mean + error, alpha=0.25, linewidth=0, color=line.get_color())
        half = k >= k[-1] ** 0.5
        late[0].extend([mean[half], (mean - error)[half], (mean + error)[half]])
        for row in rows:
            difference = values[:, row] - values[-1, row]
            label = f"{name}{', ' if name else ''}row {row}"
            label += "" if one.pareto_k[row].isnan() else f", k-hat {one.pareto_k[row]:.2f}"
            axes[1].plot(k, difference, linewidth=1, label=label)
            late[1].append(difference[half])
    quantities = {one.quantity for one in several.values()}
    axes[0].set_ylabel(f"{quantities.pop() if len(quantities) == 1 else 'log-likelihood'}, {NATS}")
    if panels == 2:
        axes[1].set_ylabel("estimate of a row less its last one, nats")
        axes[1].axhline(0, color="0.6", linewidth=0.8, zorder=0)
    for ax, shown in zip(axes, late, strict=False):
        finite = np.concatenate(shown)[np.isfinite(np.concatenate(shown))]
        margin = 0.1 * max(np.ptp(finite), 0.01)
        ax.set_ylim(finite.min() - margin, finite.max() + margin)
        ax.set_xscale("log", base=2)
        ax.set_xlabel("particles")
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.spines[["top", "right"]].set_visible(False)
        above: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 2, "frameon": False}
        note = what if ax is axes[0] and len(several) > 1 else None
        ax.legend(fontsize=8, title=note, title_fontsize=8, alignment="left", **above)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _figure(width: float, height: float, gap: float = 0.05) -> Figure:
    with preserve_process_settings():
        from matplotlib.figure import Figure  # here, because it takes a second
        from matplotlib.layout_engine import ConstrainedLayoutEngine

    pads = ConstrainedLayoutEngine(w_pad=gap, h_pad=gap, wspace=0.02, hspace=0.02)
    return Figure(figsize=(width, height), layout=pads)


def _colours(n: int) -> list[Any]:
    with preserve_process_settings():
        from matplotlib import colormaps

    return [colormaps["tab10"](i) if n <= 10 else colormaps["viridis"](i / max(n - 1, 1)) for i in range(n)]
