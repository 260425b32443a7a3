"""Measurements of a trained pair: each likelihood by the guide, by fitted proposals, and by annealing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..batch.batch import Batch
from ..evidence.annealing import annealed_importance
from ..evidence.evidence import PARETO_K_THRESHOLD, Evidence
from ..evidence.likelihood import log_conditional, log_marginal
from ..recipes import Recipe
from ..sampling.fitted_proposal import Fitted
from .estimates import summarize
from .proposals import IMAGE, JOINT, LABEL, Limits

FIRST_ROWS = 2  # rows of a first call, which is not timed: it inspects the pair
QUANTITIES = (JOINT, IMAGE, LABEL, "log p(image | label)", "log p(label | image)")


def measure_proposals(
    run: Recipe, test: Batch, fit: Fitted, num_particles: int, seed: int
) -> tuple[list[dict[str, Any]], Any]:
    """Estimate the five likelihoods of images and labels by the guide and by fitted proposals.

    Args:
        run: the trained recipe.
        test: test rows, on the device of the recipe.
        fit: the settings of the fitted proposals.
        num_particles: draws per row.
        seed: the seed of all draws.

    Returns:
        (lines, evidence): per quantity its numbers by name, "guide" and "fitted" among them with their seconds; and
        quantity -> the fitted estimate.
    """
    model, guide, _ = run
    lines = []
    fitted_evidence: dict[str, Evidence] = {}
    for quantity, likelihood in _likelihoods(test.names).items():
        options: dict[str, Any] = {"num_particles": num_particles, "seed": seed}
        for proposal in (None, fit):
            likelihood(model, guide, test[:FIRST_ROWS], proposal=proposal, **options)
        guided, guide_seconds = _timed(likelihood, model, guide, test, **options)
        fitted, fitted_seconds = _timed(likelihood, model, guide, test, proposal=fit, **options)
        fitted_evidence[quantity] = fitted
        lines.append({
            "quantity": quantity, "rows": test.size, "num_particles": num_particles,
            "guide": {**summarize(guided), "seconds": guide_seconds},
            "fitted": {**summarize(fitted), "seconds": fitted_seconds},
            "untrusted_rows": _untrusted_rows(fitted, guided, test),
        })  # fmt: skip
    return lines, fitted_evidence


def _likelihoods(names: tuple[str, ...]) -> dict[str, Callable[..., Evidence]]:
    """Return quantity -> its estimator, a function of (model, guide, batch) and options."""

    def marginal(*names: str) -> Callable[..., Evidence]:
        return lambda model, guide, rows, **options: log_marginal(model, guide, rows.only(*names), **options)

    def conditional(target: str, given: str) -> Callable[..., Evidence]:
        return lambda model, guide, rows, **options: log_conditional(
            model, guide, rows, target=target, given=given, **options
        )

    estimators = (
        marginal(*names), marginal("image"), marginal("label"), conditional("image", "label"),
        conditional("label", "image"),
    )  # fmt: skip
    return dict(zip(QUANTITIES, estimators, strict=True))


def _timed(
    likelihood: Callable[..., Evidence], model: Any, guide: Any, rows: Batch, **options: Any
) -> tuple[Evidence, float]:
    """Return an estimate and the seconds that it took, those of work queued on a GPU included."""
    _finish_queued(rows.device)
    start = time.perf_counter()
    found = likelihood(model, guide, rows, **options)
    _finish_queued(rows.device)
    return found, time.perf_counter() - start


def _finish_queued(device: torch.device) -> None:
    """Wait for the work that is queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _untrusted_rows(fitted: Evidence, guided: Evidence, test: Batch) -> list[dict[str, Any]]:
    """Return the rows with k-hat above 0.7 or NaN by fitted proposals, worst first."""
    k_hat = fitted.pareto_k.nan_to_num(torch.inf)
    rows = (k_hat > PARETO_K_THRESHOLD).nonzero()[:, 0]
    rows = rows[k_hat[rows].argsort(descending=True)]
    return [
        {
            "row": row,
            "label": int(test["label"][row]),
            "pareto_k": fitted.pareto_k[row].item(),
            "ess": fitted.ess[row].item(),
            "log_prob": fitted.log_prob[row].item(),
            "standard_error": fitted.standard_error[row].item(),
            "log_prob_by_guide": guided.log_prob[row].item(),
        }
        for row in rows.tolist()
    ]


def measure_agreement(
    run: Recipe, test: Batch, fitted: Mapping[str, Evidence], annealing: Mapping[str, Any], seed: int
) -> dict[str, dict[str, float]]:
    """Anneal some rows, and compare with what fitted proposals give for them.

    Args:
        run: the trained recipe.
        test: the first test rows, those that are annealed.
        fitted: quantity -> the estimate by fitted proposals, of these rows and more.
        annealing: options of :func:`pyro_mm.annealed_importance`.
        seed: the seed of annealing.

    Returns:
        quantity -> rows, mean by annealing, mean difference (fitted less annealed) with its standard error, root mean
        square of the differences in units of their standard errors, and seconds.
    """
    model, guide, _ = run
    annealed: dict[str, Evidence] = {}
    seconds: dict[str, float] = {}
    for place, (quantity, names) in enumerate({JOINT: test.names, IMAGE: ("image",), LABEL: ("label",)}.items()):
        rows = test.only(*names)
        annealed[quantity], seconds[quantity] = _timed(
            annealed_importance, model, guide, rows, seed=seed + place, **annealing
        )
    for quantity, given in zip(QUANTITIES[3:], (LABEL, IMAGE), strict=True):
        annealed[quantity] = annealed[JOINT] - annealed[given]
        seconds[quantity] = seconds[JOINT] + seconds[given]

    found = {}
    for quantity, reference in annealed.items():
        difference = fitted[quantity][: test.size] - reference
        z = difference.log_prob / difference.standard_error
        mean, error = difference.mean()
        found[quantity] = {
            "rows": test.size, "value": reference.mean()[0], "standard_error": reference.mean()[1],
            "difference": mean, "difference_error": error, "rms_z": z.square().mean().sqrt().item(),
            "seconds": seconds[quantity],
        }  # fmt: skip
    return found


def missed_limits(line: Mapping[str, Any], limits: Limits) -> list[str]:
    """Describe the limits that a quantity's estimate by fitted proposals misses, in words.

    The limits on effective sample sizes are for K = 1,000 and are scaled to the K of the estimate.
    """
    fitted = line["fitted"]
    missed = []
    if not fitted["untrusted"] <= limits.untrusted:
        missed.append(f"{fitted['untrusted']:.1%} of the rows have k-hat > 0.7, where {limits.untrusted:.0%} may")
    least = limits.median_ess.get(line["quantity"], 0.0) * line["num_particles"] / 1000
    if not fitted["median_ess"] >= least:
        missed.append(f"the median ESS is {fitted['median_ess']:.0f}, where {least:.0f} is asked for")
    return missed
