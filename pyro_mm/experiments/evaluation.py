"""The table of a trained recipe: likelihoods with their diagnostics, and the bounds beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from .estimates import Estimates, estimate, median_ess


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
        by_guide: the line of the same likelihood with draws of the guide; None if this line is that already, or has no
            importance weights.
        rows: the number of rows that have the quantity, in words; None if all do.
    """

    quantity: str
    value: float
    error: float
    comparable: bool
    ess: float | None = None
    untrusted: float | None = None
    particles: int | None = None
    by_guide: Line | None = None
    rows: str | None = None

    @property
    def title(self) -> str:
        """The quantity, with the number of rows that have it if not all do."""
        return self.quantity if self.rows is None else f"{self.quantity}, {self.rows}"


HEADER = ("", "nats per row", "s.e.", "median ESS", "k-hat > 0.7", "K")
GUIDE_HEADER = ("by the guide", "s.e.", "k-hat > 0.7")


def evaluate_recipe(
    run: Recipe, test: Batch, num_particles: int, seed: int, fitted: bool = True
) -> tuple[list[Line], list[Estimates]]:
    """Estimate the likelihoods and bounds of a trained recipe on test rows.

    Args:
        run: model, guide and objective.
        test: test rows, on the device of the model.
        num_particles: draws per row of the likelihoods.
        seed: the seed of all draws.
        fitted: estimate likelihoods by proposals fitted to each row, and by the guide beside them; False for the guide
            alone.

    Returns:
        (lines, likelihoods): the lines of the table, and the likelihoods behind them: of all modalities, of each alone,
        and of each given the others.
    """
    options: dict[str, Any] = {"num_particles": num_particles, "seed": seed}
    model, guide, objective = run
    estimated: Callable[..., Estimates] = partial(estimate, fitted=fitted, **options)
    joint = estimated(log_marginal, model, guide, test)
    marginals = {name: estimated(log_marginal, model, guide, test.only(name)) for name in test}
    likelihoods = [joint, *marginals.values()]
    for name in test:
        others = [other for other in test if other != name]
        likelihoods.append(estimated(log_conditional, model, guide, test, target=name, given=others))

    lines = [_line(each) for each in likelihoods]
    elbo = _objective_value(objectives.elbo(), run, test[test.having()], seed)
    lines.append(Line(f"ELBO, below {joint.evidence.quantity}", *elbo, comparable=True))

    target: Target | None = objective.bounds(test.names)
    rows = test.having() if undefined_gap_reason(target) else rows_of_target(objective, target, test)  # type: ignore[arg-type]
    if not rows.any():  # the objective bounds its target in no row
        rows, target = test.having(), None
    value = _objective_value(objective, run, test[rows], seed)
    lines.append(Line("training objective (see below)", *value, comparable=False))

    known = {frozenset(test): joint, **{frozenset((name,)): each for name, each in marginals.items()}}

    def evidence_of(names: frozenset[str]) -> Evidence:
        found = known[names] if names in known else estimated(log_marginal, model, guide, test.only(*names))
        return found.evidence[rows]

    if target is not None and (total := target_evidence(target, evidence_of)) is not None:
        lines.append(Line("what it bounds, estimated", *total, comparable=False))
    return lines, likelihoods


def _line(likelihood: Estimates) -> Line:
    """Return the line of a likelihood, with that of the guide's draws beside it if it has other ones."""
    by_guide = None if likelihood.by_guide is None else _line(Estimates(likelihood.by_guide))
    evidence = likelihood.evidence
    rows = None if evidence.counts is None else evidence.rows_text
    return Line(
        evidence.quantity, *evidence.mean(), True, median_ess(evidence), evidence.untrusted(), evidence.num_particles,
        by_guide, rows,
    )  # fmt: skip


def _objective_value(objective: Objective, run: Recipe, test: Batch, seed: int) -> tuple[float, float]:
    """Return the value of an objective in nats per row, and its standard error over draws of the latent."""
    return objective_value(objective, run.model, run.guide, test, seed).total


def format_lines(lines: Sequence[Line]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Format lines as a table: columns of the guide's draws stand to the right if likelihoods have other ones.

    Returns:
        (header, rows), as text.
    """
    rows = [_cells(line) + (_guide_cells(line.by_guide) if line.by_guide else []) for line in lines]
    return HEADER + (GUIDE_HEADER if any(line.by_guide for line in lines) else ()), rows


def _cells(line: Line) -> list[str]:
    """Format a line as cells under :data:`HEADER`."""
    cells = [line.title, f"{line.value:.3f}", f"{line.error:.3f}"]
    if line.ess is not None:
        cells += [f"{line.ess:.0f}", format_share(line.untrusted), f"{line.particles}"]
    return cells


def _guide_cells(line: Line) -> list[str]:
    """Format a line as cells under :data:`GUIDE_HEADER`."""
    return [f"{line.value:.3f}", f"{line.error:.3f}", format_share(line.untrusted)]
