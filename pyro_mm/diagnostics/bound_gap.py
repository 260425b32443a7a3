r"""Gap between a bound and the log-evidence that it bounds, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from pyro.infer import ELBO
from torch import Tensor

from ..batch.batch import Batch
from ..evidence.evidence import Evidence
from ..objectives.bounds import AFTER_WARM_UP, Target
from ..objectives.objective import Objective
from ..objectives.tables import elbo
from ..scoring.importance import log_weights
from ..scoring.prepare_objective import PreparedELBO
from ..scoring.program import Program
from ..scoring.training_objective import PreparedObjective
from ..utils.seeding import temporary_seed

NUM_DRAWS = 20  # evaluations of an objective, whose spread gives its standard error

EvidenceOf = Callable[[frozenset[str]], Evidence]


@dataclass(frozen=True)
class Gap:
    """Difference between a log-evidence and a lower bound on it, in nats per row, averaged over rows.

    Attributes:
        bound: estimate of the bound.
        bound_error: standard error of ``bound`` by the draws of its evaluation.
        evidence: estimate of the log-evidence.
        evidence_error: standard error of ``evidence`` by its draws.
        rows: number of rows.
    """

    bound: float
    bound_error: float
    evidence: float
    evidence_error: float
    rows: int

    @property
    def value(self) -> float:
        """Evidence minus bound."""
        return self.evidence - self.bound

    @property
    def error(self) -> float:
        """Standard error of ``value``."""
        return math.hypot(self.bound_error, self.evidence_error)


@dataclass(frozen=True)
class ObjectiveValue:
    """Estimates (mean, standard error) of an objective and of its terms, per row; higher is better.

    Attributes:
        total: the objective, which is minus its loss.
        by_term: label -> the term of this label.
    """

    total: tuple[float, float]
    by_term: Mapping[str, tuple[float, float]]


# -- targets --------------------------------------------------------------------------------------------------------


def table_of(objective: PreparedObjective) -> Objective | None:
    """Return an objective as a table of terms; None for one without a table, such as a user's own."""
    if isinstance(objective, Objective):
        return objective
    estimator = objective.elbo if isinstance(objective, PreparedELBO) else objective
    return elbo(estimator) if isinstance(estimator, ELBO) else None


def estimator_of(objective: PreparedObjective) -> ELBO | None:
    """Return the estimator of an objective: ours, or one of Pyro's ELBOs; None for an objective without one."""
    table = table_of(objective)
    return None if table is None else table.estimator


def bound_target(objective: PreparedObjective, names: tuple[str, ...]) -> Target | None:
    """Return what an objective bounds; None for an objective without a table."""
    table = table_of(objective)
    return None if table is None else table.bounds(names)


def undefined_gap_reason(target: Target | None) -> str:
    """Return the reason why the gap to a target is undefined; empty if it is defined."""
    if target is None:
        return "so that no bound and no gap are known"
    if target.kind != "lower bound":
        return "so that its distance from the evidence has no sign"
    if target.conditional or target.random:
        return "which is not a sum of log-evidences that can be estimated here"
    return ""


def target_evidence(target: Target, evidence: EvidenceOf) -> tuple[float, float] | None:
    r"""Estimate the sum :math:`\sum_i w_i \log p(x_{S_i})` that a target bounds from below.

    Args:
        target: what an objective bounds, by names of modalities.
        evidence: from a set of modalities to the log-likelihood of those that a row has.

    Returns:
        (mean, standard error) in nats per row; None if the gap to the target is undefined.
    """
    if undefined_gap_reason(target):
        return None
    parts = [(weight, *evidence(names).mean()) for names, weight in target.log_evidence.items()]
    mean = sum(weight * mean for weight, mean, _ in parts)
    return mean, math.hypot(*(weight * error for weight, _, error in parts))


def rows_of_target(objective: PreparedObjective, target: Target, batch: Batch) -> Tensor:
    """Return the rows that a target holds for, boolean ``(N,)``.

    If the target is a multiple of the log-evidence of all modalities, it holds for a row whose own target is the same
    multiple of the log-evidence of what it has: in a table such as ``dmvae`` a row with k modalities has k + 1 bounds.
    Any other sum over modalities holds for rows that have all of them.

    Args:
        objective: one with a table.
        target: what it bounds in a row that has all modalities.
        batch: N rows.
    """
    table = table_of(objective)
    every = frozenset(batch.names)
    if table is None or set(target.log_evidence) != {every}:
        return batch.having(every=True)

    weight = target.log_evidence[every]
    masks = torch.stack([batch.present[name] for name in batch.names], -1)
    patterns, pattern_of_row = masks.unique(dim=0, return_inverse=True)
    holds = []
    for pattern in patterns.tolist():
        present = frozenset(name for name, has in zip(batch.names, pattern, strict=True) if has)
        own = table.bounds(batch.names, present).log_evidence if present else {}
        holds.append(set(own) == {present} and math.isclose(own[present], weight))
    return torch.tensor(holds, device=batch.device)[pattern_of_row]


# -- estimates ------------------------------------------------------------------------------------------------------


def mean_over_draws(value: Callable[[], float], batch: Batch, seed: int) -> tuple[float, float]:
    """Average a random number over 20 draws; return (mean, standard error)."""
    with temporary_seed(seed, batch.device):
        values = [value() for _ in range(NUM_DRAWS)]
    return _mean_and_error(values)


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    """Return the mean of independent numbers and its standard error."""
    numbers = torch.tensor(values, dtype=torch.float64)
    return numbers.mean().item(), (numbers.std() / len(values) ** 0.5).item()


@torch.no_grad()
def objective_value(
    objective: PreparedObjective, model: Program, guide: Program, batch: Batch, seed: int, step: int = AFTER_WARM_UP
) -> ObjectiveValue:
    """Estimate an objective and its terms over 20 evaluations of all rows, without gradient.

    Args:
        objective: a prepared objective.
        model, guide: callables of a batch.
        batch: N rows.
        seed: of the draws.
        step: argument of weights that depend on the step; by default any warm-up is over.
    """
    totals: list[float] = []
    by_term: dict[str, list[float]] = {}
    with temporary_seed(seed, batch.device):
        for _ in range(NUM_DRAWS):
            loss = objective.evaluate(model, guide, batch, step=step)
            totals.append(-float(loss.total) / batch.size)
            for label, value in loss.by_term.items():
                by_term.setdefault(label, []).append(float(value) / batch.size)
    return ObjectiveValue(
        total=_mean_and_error(totals),
        by_term={label: _mean_and_error(values) for label, values in by_term.items() if len(values) == NUM_DRAWS},
    )


def objective_gap(
    target: Target,
    objective: PreparedObjective,
    model: Program,
    guide: Program,
    batch: Batch,
    evidence: EvidenceOf,
    seed: int,
    value: ObjectiveValue | None = None,
) -> Gap | None:
    """Estimate the gap of an objective that bounds a sum of log-evidences, at the weights after any warm-up.

    Args:
        target: what the objective bounds.
        objective: one with a table.
        model, guide: callables of a batch.
        batch: N rows.
        evidence: from a set of modalities to the log-likelihood of those that a row has.
        seed: of the draws.
        value: the objective's value on all rows, from the same seed, used if the target holds for all of them; None if
            it is not known.

    Returns:
        The gap over the rows that the target holds for (:func:`rows_of_target`); None if there are none, or if the gap
        is undefined.
    """
    rows = rows_of_target(objective, target, batch)
    if not rows.any():
        return None
    total = target_evidence(target, lambda names: evidence(names)[rows])
    if total is None:
        return None
    if value is None or not rows.all():
        value = objective_value(objective, model, guide, batch[rows], seed)
    return Gap(*value.total, *total, int(rows.sum()))


@torch.no_grad()
def elbo_gap(model: Program, guide: Program, batch: Batch, joint: Evidence, seed: int) -> Gap:
    """Estimate the gap of the plain ELBO, which is the mean of KL(q(z | x) || p(z | x)).

    Args:
        model, guide: callables of a batch.
        batch: N rows; those with nothing present are left out.
        joint: log-likelihood of everything that is present.
        seed: of the draws.
    """
    rows = batch.having()

    def bound() -> float:
        return log_weights(model, guide, batch, audit=False)[:, rows].mean().item()

    return Gap(*mean_over_draws(bound, batch, seed), *joint.mean(), int(rows.sum()))
