"""Figures of likelihoods row by row, of bounds against the number of draws, and of compared models."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..diagnostics.comparison import Comparison
from ..evidence.evidence import PARETO_K_THRESHOLD, Evidence
from ..utils.arguments import check_mapping, describe
from .figure import LEGEND_ABOVE, NATS, PALETTE, SMALL, axes_or_new, set_title, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def evidence_rows(evidence: Evidence, title: str = "", *, ax: Axes | None = None) -> Axes:
    """Plot the log-likelihood of each row, with two standard errors, against the k-hat of its weights.

    Rows right of the line at 0.7, in orange, are not to be trusted: they are more likely too low than too high.

    Args:
        evidence: result of :func:`pyro_mm.log_marginal` and the like.
        title: title of the axes.
        ax: axes to draw in; None for those of a new figure, ``ax.figure``.

    Returns:
        The axes.

    Raises:
        TypeError: something else than evidence.
        ValueError: too few draws for any k-hat, or no row with a finite estimate.
    """
    if not isinstance(evidence, Evidence):
        raise TypeError(f"expected evidence to be an Evidence, got {describe(evidence)}")
    if evidence.few:
        raise ValueError(f"K = {evidence.num_particles} draws are too few for the k-hat of any row: take more")
    shown = (evidence.counted & ~evidence.lost & evidence.pareto_k.isfinite()).cpu().numpy()
    if not shown.any():
        raise ValueError(f"no row has a finite {evidence.quantity}")
    numbers = evidence.pareto_k, evidence.log_prob, evidence.standard_error
    k_hat, value, error = (x.cpu().double().numpy() for x in numbers)

    ax = axes_or_new(ax, 4.6, 3.6)
    heavy = k_hat > PARETO_K_THRESHOLD
    for rows, label, style in (
        (shown & ~heavy, f"k-hat \N{LESS-THAN OR EQUAL TO} {PARETO_K_THRESHOLD}", style_of(0)),
        (shown & heavy, f"k-hat > {PARETO_K_THRESHOLD}: not to be trusted", style_of(1)),
    ):
        if rows.any():
            points: dict[str, Any] = {"linestyle": "", "markersize": 4, "elinewidth": 0.9, "alpha": 0.8, **style}
            ax.errorbar(k_hat[rows], value[rows], 2 * error[rows], label=f"{rows.sum()} rows, {label}", **points)
    ax.axvline(PARETO_K_THRESHOLD, color="0.3", linewidth=1, linestyle=":")
    ax.set_xlabel(f"k-hat of the weights (K = {evidence.num_particles})")
    ax.set_ylabel(f"{evidence.quantity} (nats ± 2 s.e.)")
    set_title(ax, title, ax.legend(fontsize=SMALL, **LEGEND_ABOVE | {"ncols": 1}))
    return ax


def bound_ladder(
    log_weights: Tensor | Mapping[str, Tensor],
    evidence: Evidence | None = None,
    title: str = "",
    *,
    ax: Axes | None = None,
) -> Axes:
    r"""Plot the importance-weighted bound of k draws against k, from log-weights of K draws.

    .. math:: L_k = E \log \frac1k \sum_{i=1}^k w_i, \qquad L_1 \le L_2 \le L_4 \le .. \le \log p(x)

    estimated by the mean over blocks of k draws each, for k = 1, 2, 4, .., with two standard errors by the draws, where
    there are two blocks at least. L_1 is the ELBO. The blocks of a larger k are made of those of a smaller one, so that
    the curve of a K that is a power of two never falls.

    Args:
        log_weights: ``(K, N)`` of independent draws, as :func:`pyro_mm.log_weights` returns them, or several by name.
        evidence: of the same rows, drawn as a line with a band of two standard errors; None for none.
        title: title of the axes.
        ax: axes to draw in; None for those of a new figure, ``ax.figure``.

    Returns:
        The axes.

    Raises:
        TypeError: no tensors, or something else than evidence.
        ValueError: tensors of another shape, or evidence of another number of rows.
    """
    several = (
        {"": log_weights} if isinstance(log_weights, Tensor) else check_mapping("log_weights", log_weights, least=1)
    )
    for name, weights in several.items():
        if not isinstance(weights, Tensor) or weights.dim() != 2 or not weights.numel():
            what = f" of {name}" if name else ""
            raise TypeError(f"expected log_weights{what} to be a tensor (K, N), got {describe(weights)}")
    if evidence is not None and not isinstance(evidence, Evidence):
        raise TypeError(f"expected evidence to be an Evidence, or None, got {describe(evidence)}")
    rows = {weights.shape[1] for weights in several.values()} | ({len(evidence)} if evidence is not None else set())
    if len(rows) > 1:
        raise ValueError(f"expected the same rows everywhere, got {sorted(rows)} rows")

    ax = axes_or_new(ax, 4.6, 3.6)
    for i, (name, weights) in enumerate(several.items()):
        steps = [ladder_step(weights.detach().cpu().double(), k) for k in _powers(len(weights))]
        draws, values, errors = np.array(steps).T
        line: dict[str, Any] = {"markersize": 4.5, "linewidth": 1.3, "capsize": 2, "elinewidth": 0.9, **style_of(i)}
        ax.errorbar(draws, values, 2 * np.nan_to_num(errors), label=name or "bound of k draws", **line)
    if evidence is not None:
        mean, error = evidence.mean()
        ax.axhline(
            mean, color="0.3", linewidth=1, linestyle="--", label=f"{evidence.quantity}, K = {evidence.num_particles}"
        )
        ax.axhspan(mean - 2 * error, mean + 2 * error, color="0.85", linewidth=0, zorder=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.set_xlabel("draws k")
    ax.set_ylabel(f"bound ({NATS} ± 2 s.e.)")
    columns = {"ncols": 1 if len(several) < 3 else 2}
    set_title(ax, title, ax.legend(fontsize=SMALL, **LEGEND_ABOVE | columns))
    return ax


def ladder_step(log_weights: Tensor, k: int) -> tuple[int, float, float]:
    """Return k, the mean bound of k draws over rows, and its standard error by the draws, NaN for a single block.

    Args:
        log_weights: ``(K, N)``.
        k: draws of a block; those beyond the last whole block are left out.
    """
    blocks = len(log_weights) // k
    each = log_weights[: blocks * k].unflatten(0, (blocks, k)).logsumexp(1) - math.log(k)
    if blocks < 2:
        return k, each.mean().item(), math.nan
    return k, each.mean().item(), (each.mean(1).std() / blocks**0.5).item()


def _powers(most: int) -> list[int]:
    """Return 1, 2, 4, .. up to ``most``."""
    return [2**i for i in range(most.bit_length())]


def forest(comparison: Comparison, title: str = "", *, ax: Axes | None = None) -> Axes:
    """Plot the differences of compared models from the reference, best first, with both of their errors.

    A thin bar is two standard errors by the choice of rows (paired), a thick one two by the finite number of draws. On
    the right are the mean log-likelihoods, with a star where more than a tenth of the rows have k-hat > 0.7.

    Args:
        comparison: result of :func:`pyro_mm.compare`.
        title: title of the axes.
        ax: axes to draw in; None for those of a new figure, ``ax.figure``.

    Returns:
        The axes.

    Raises:
        TypeError: something else than a comparison.
    """
    if not isinstance(comparison, Comparison):
        raise TypeError(f"expected comparison to be what pyro_mm.compare returned, got {describe(comparison)}")
    candidates = comparison.candidates
    places = np.arange(len(candidates))
    ax = axes_or_new(ax, 5.8, 0.36 * len(candidates) + 1.3)
    difference, paired, estimation = (
        np.array([getattr(candidate, name) for candidate in candidates])
        for name in ("difference", "paired_error", "estimation_error")
    )

    point: dict[str, Any] = {"linestyle": "", "color": PALETTE[0]}
    ax.errorbar(
        difference,
        places,
        xerr=2 * np.nan_to_num(paired),
        marker="o",
        markersize=5,
        elinewidth=1.1,
        label="by the choice of rows",
        **point,
    )
    ax.errorbar(
        difference,
        places,
        xerr=2 * np.nan_to_num(estimation),
        elinewidth=4.5,
        alpha=0.45,
        label="by the draws",
        **point,
    )
    ax.axvline(0, color="0.3", linewidth=1, linestyle=":")
    for place, candidate in enumerate(candidates):
        mark = "*" if candidate.untrusted > 0.1 else ""
        text = f"{candidate.mean:.2f} ± {candidate.error:.2f}{mark}"
        ax.text(1.02, place, text, transform=ax.get_yaxis_transform(), va="center", fontsize=SMALL)
    ax.set_yticks(places, [f"{c.name} (reference)" if c.name == comparison.reference else c.name for c in candidates])
    ax.set_ylim(len(candidates) - 0.5, -0.5)
    ax.set_xlabel(f"difference in {comparison.quantity} ({NATS}, ± 2 s.e.)")
    set_title(ax, title, ax.legend(fontsize=SMALL, **LEGEND_ABOVE))
    return ax
