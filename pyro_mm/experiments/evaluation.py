"""The table of a trained recipe: likelihoods with their diagnostics, and the bounds beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import objectives
from ..batch.batch import Batch
from ..diagnostics.bound_gap import objective_value, rows_of_target, target_evidence, undefined_gap_reason
from ..evidence.evidence import Evidence
from ..evidence.likelihood import log_conditional, log_marginal
from ..objectives.bounds import Target
from ..objectives.objective import Objective
from ..recipes import Recipe
from .console import format_share


@dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
        quantity: its name.
        value: the mean over test rows, in nats per row.
        error: its standard error.
        comparable: it means the same for every recipe.
        ess: the median effective sample size; None without importance weights.
        untrusted: the share of rows with k-hat above 0.7; None without importance weights, or if there are too few.
        particles: draws per row; None without importance weights.
    """

    quantity: str
    value: float
    error: float
    comparable: bool
    ess: float | None = None
    untrusted: float | None = None
    particles: int | None = None


HEADER = ("", "nats per row", "s.e.", "median ESS", "k-hat > 0.7", "K")


def evaluate_recipe(run: Recipe, test: Batch, num_particles: int, seed: int) -> tuple[list[Line], list[Evidence]]:
    """Estimate the likelihoods and bounds of a trained recipe on test rows.

    Args:
        run: model, guide and objective.
        test: test rows, on the device of the model.
        num_particles: draws per row of the likelihoods.
        seed: the seed of all draws.

    Returns:
        (lines, evidence): the lines of the table, and the likelihoods behind them: of all modalities, of each alone,
        and of each given the others.
    """
    options: dict[str, Any] = {"num_particles": num_particles, "seed": seed}
    model, guide, objective = run
    joint = log_marginal(model, guide, test, **options)
    marginals = {name: log_marginal(model, guide, test.only(name), **options) for name in test}
    evidence = [joint, *marginals.values()]
    for name in test:
        others = [other for other in test if other != name]
        evidence.append(log_conditional(model, guide, test, target=name, given=others, **options))

    lines = [_line(each) for each in evidence]
    elbo = _objective_value(objectives.elbo(), run, test[test.having()], seed)
    lines.append(Line(f"ELBO, below {joint.quantity}", *elbo, comparable=True))

    target: Target | None = objective.bounds(test.names)
    rows = test.having() if undefined_gap_reason(target) else rows_of_target(objective, target, test)  # type: ignore[arg-type]
    if not rows.any():  # the objective bounds its target in no row
        rows, target = test.having(), None
    value = _objective_value(objective, run, test[rows], seed)
    lines.append(Line("training objective (see below)", *value, comparable=False))

    known = {frozenset(test): joint, **{frozenset((name,)): e for name, e in marginals.items()}}

    def evidence_of(names: frozenset[str]) -> Evidence:
        found = known[names] if names in known else log_marginal(model, guide, test.only(*names), **options)
        return found[rows]

    if target is not None and (total := target_evidence(target, evidence_of)) is not None:
        lines.append(Line("what it bounds, estimated", *total, comparable=False))
    return lines, evidence


def _line(evidence: Evidence) -> Line:
    """Return the line of a likelihood; its name says how many rows have it, if not all do."""
    quantity = evidence.quantity if evidence.counts is None else f"{evidence.quantity}, {evidence.rows_text}"
    ess = evidence.ess[evidence.counted].median().item() if bool(evidence.counted.any()) else math.nan
    return Line(quantity, *evidence.mean(), True, ess, evidence.untrusted(), evidence.num_particles)


def _objective_value(objective: Objective, run: Recipe, test: Batch, seed: int) -> tuple[float, float]:
    """Return the value of an objective in nats per row, and its standard error over draws of the latent."""
    return objective_value(objective, run.model, run.guide, test, seed).total


def format_lines(lines: Sequence[Line]) -> list[list[str]]:
    """Format lines as rows of text under :data:`HEADER`."""
    rows = []
    for line in lines:
        row = [line.quantity, f"{line.value:.3f}", f"{line.error:.3f}"]
        if line.ess is not None:
            row += [f"{line.ess:.0f}", format_share(line.untrusted), f"{line.particles}"]
        rows.append(row)
    return rows
