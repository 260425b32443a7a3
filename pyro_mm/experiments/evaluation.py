"""The table of a trained pair: its likelihoods, its bounds beside them, and how far each can be trusted."""

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


@dataclass(frozen=True)
class Line:
    """A line of the table: nats a row, their standard error, and diagnostics where there are weights."""

    quantity: str
    value: float
    error: float
    shared: bool  # whether it means the same for every recipe
    ess: float | None = None
    untrusted: float | None = None
    particles: int | None = None


HEADER = ("", "nats a row", "s.e.", "median ESS", "k-hat > 0.7", "K")


def evaluated(run: Recipe, test: Batch, num_particles: int, seed: int) -> tuple[list[Line], list[Evidence]]:
    """The lines of the table, and the likelihoods behind them."""
    options: dict[str, Any] = {"num_particles": num_particles, "seed": seed}
    model, guide, objective = run
    joint = log_marginal(model, guide, test, **options)
    marginals = {name: log_marginal(model, guide, test.only(name), **options) for name in test}
    evidence = [joint, *marginals.values()]
    for name in test:
        others = [other for other in test if other != name]
        evidence.append(log_conditional(model, guide, test, target=name, given=others, **options))
    lines = [_line(e) for e in evidence]
    elbo = _bound(objectives.elbo(), run, test[test.having()], seed)
    lines.append(Line(f"ELBO, below {joint.quantity}", *elbo, True))
    target: Target | None = objective.bounds(test.names)
    rows = test.having() if undefined_gap_reason(target) else rows_of_target(objective, target, test)  # type: ignore[arg-type]
    if not rows.any():  # the target holds for none
        rows, target = test.having(), None
    lines.append(Line("training objective (see below)", *_bound(objective, run, test[rows], seed), False))
    known = {frozenset(test): joint, **{frozenset((name,)): e for name, e in marginals.items()}}

    def evidence_of(names: frozenset[str]) -> Evidence:
        found = known[names] if names in known else log_marginal(model, guide, test.only(*names), **options)
        return found[rows]

    if target is not None and (total := target_evidence(target, evidence_of)) is not None:
        lines.append(Line("what it bounds, estimated", *total, False))
    return lines, evidence


def _line(e: Evidence) -> Line:
    """The line of a likelihood, which says how many rows have it where not all of them do."""
    quantity = e.quantity if e.counts is None else f"{e.quantity}, {e.rows_text}"
    ess = e.ess[e.counted].median().item() if bool(e.counted.any()) else math.nan
    return Line(quantity, *e.mean(), True, ess, e.untrusted(), e.num_particles)


def _bound(objective: Objective, run: Recipe, test: Batch, seed: int) -> tuple[float, float]:
    """The value of an objective in nats a row, and its standard error over draws of the latent."""
    return objective_value(objective, run.model, run.guide, test, seed).total


def cells(lines: Sequence[Line]) -> list[list[str]]:
    """The lines as text, under :data:`HEADER`."""
    rows = []
    for line in lines:
        row = [line.quantity, f"{line.value:.3f}", f"{line.error:.3f}"]
        if line.ess is not None:
            row += [f"{line.ess:.0f}", share(line.untrusted), f"{line.particles}"]
        rows.append(row)
    return rows


def share(untrusted: float | None) -> str:
    """A share of rows as text."""
    return "too few draws" if untrusted is None or math.isnan(untrusted) else f"{untrusted:.1%}"
