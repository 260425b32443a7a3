r"""How far a bound lies below what it bounds: the difference of two estimates, each with its error."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from ..batch.batch import Batch
from ..evidence.evidence import Evidence
from ..objectives.bounds import SETTLED, Target
from ..objectives.objective import Objective
from ..objectives.tables import elbo
from ..scoring.importance import log_weights
from ..scoring.structure import Callback
from ..utils.seeding import temporary_seed

NUM_DRAWS = 20  # evaluations of a bound, whose spread is its standard error


@dataclass(frozen=True)
class Gap:
    """A bound and what it bounds from below, each with the error of its estimation: nats a row, mean of ``rows``."""

    bound: float
    bound_error: float
    evidence: float
    evidence_error: float
    rows: int

    @property
    def value(self) -> float:
        """Evidence less bound."""
        return self.evidence - self.bound

    @property
    def error(self) -> float:
        """The standard error of ``value``."""
        return math.hypot(self.bound_error, self.evidence_error)


def target_evidence(target: Target, evidence: Callable[[frozenset[str]], Evidence]) -> tuple[float, float] | None:
    r"""The sum :math:`\sum_i w_i \log p(x_{S_i})` that a target is a lower bound on, nats a row, and its error.

    None of a target that is no lower bound, or one on something else: a conditional, or a random subset of modalities.

    Args:
        target: what an objective bounds, by the modalities' names.
        evidence: a set of modalities -> the likelihood of what is present of them.
    """
    if undefined_gap_reason(target):
        return None
    parts = [(weight, *evidence(names).mean()) for names, weight in target.log_evidence.items()]
    return sum(weight * mean for weight, mean, _ in parts), math.hypot(*(weight * error for weight, _, error in parts))


def mean_over_draws(value: Callable[[], float], batch: Batch, seed: int) -> tuple[float, float]:
    """The mean of a random number over 20 draws under a seed, and its standard error."""
    with temporary_seed(seed, batch.device):
        values = torch.tensor([value() for _ in range(NUM_DRAWS)], dtype=torch.float64)
    return values.mean().item(), (values.std() / NUM_DRAWS**0.5).item()


def bound_target(objective: Any, names: tuple[str, ...]) -> Target | None:
    """What an objective bounds: its own word, log p(x) for another ``pyro.infer.ELBO``, None for what is neither."""
    return _bounds(objective, names) if isinstance(objective, ELBO) else None


def _bounds(objective: ELBO, names: tuple[str, ...], present: Collection[str] | None = None) -> Target:
    table = objective if isinstance(objective, Objective) else elbo(objective)
    return table.bounds(names, present)


def undefined_gap_reason(target: Target | None) -> str:
    """Why what an objective bounds cannot be estimated, or nothing."""
    if target is None:
        return "so that there is no evidence to hold it against"
    if target.kind != "lower bound":
        return "so that its distance from an evidence has no sign"
    if target.conditional or target.random:
        return "which is not a sum of log-evidences that can be estimated here"
    return ""


def rows_of_target(objective: Any, target: Target, batch: Batch) -> Tensor:
    """Return the rows that a target holds for, boolean ``(N,)``.

    Where the target is a multiple of the log-evidence of all modalities, those rows whose own is the same multiple of
    what they have: a row that has k modalities has k + 1 bounds of a table such as ``dmvae``. Where it is another sum
    over modalities, the rows that have all of them.

    Args:
        objective: an :class:`~pyro_mm.objectives.Objective`, or another ``pyro.infer.ELBO``.
        target: what it bounds in a row that has all modalities.
    """
    some = frozenset(batch.names)
    if set(target.log_evidence) != {some}:
        return batch.having(every=True)
    weight, present = target.log_evidence[some], torch.stack([batch.present[name] for name in batch.names], -1)
    patterns, place = present.unique(dim=0, return_inverse=True)
    same = []
    for pattern in patterns.tolist():
        there = frozenset(name for name, has in zip(batch.names, pattern, strict=True) if has)
        own = _bounds(objective, batch.names, there).log_evidence if there else {}
        same.append(set(own) == {there} and math.isclose(own[there], weight))
    return torch.tensor(same, device=batch.device)[place]


@torch.no_grad()
def objective_gap(
    target: Target,
    objective: Any,
    model: Callback,
    guide: Callback,
    batch: Batch,
    evidence: Callable[[frozenset[str]], Evidence],
    seed: int,
) -> Gap | None:
    """The gap of an objective whose target is a lower bound on a sum of log-evidences.

    Weights that depend on the step are those after any warm-up. It is of the rows that the target holds for
    (:func:`rows_of_target`); None where there are none.

    Args:
        evidence: a set of modalities -> the likelihood of what is present of them, row by row.
    """
    if hasattr(objective, "steps"):
        objective = copy.copy(objective)
        objective.steps = SETTLED
    rows = rows_of_target(objective, target, batch)
    if not rows.any():
        return None
    batch = batch[rows]
    total = target_evidence(target, lambda names: evidence(names)[rows])
    if total is None:
        return None
    bound = mean_over_draws(lambda: -float(objective.loss(model, guide, batch)) / batch.size, batch, seed)
    return Gap(*bound, *total, batch.size)


@torch.no_grad()
def elbo_gap(model: Callback, guide: Callback, batch: Batch, joint: Evidence, seed: int) -> Gap:
    """The gap of the plain ELBO, by samples: the mean over rows of KL(q(z | x) || p(z | x))."""
    rows = batch.having()
    value = mean_over_draws(lambda: log_weights(model, guide, batch, audit=False)[:, rows].mean().item(), batch, seed)
    return Gap(*value, *joint.mean(), int(rows.sum()))
