"""Figures of log-likelihood estimates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..evidence.evidence import Evidence
from ..utils.arguments import describe
from .figure import LEGEND_ABOVE, NATS, SMALL, make_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    figure = make_figure(4.8 * panels, 3.8)
    axes = [tidy(ax) for ax in figure.subplots(1, panels, squeeze=False)[0]]
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
        note = what if ax is axes[0] and len(several) > 1 else None
        ax.legend(fontsize=SMALL, title=note, title_fontsize=SMALL, **LEGEND_ABOVE)
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
