r"""How far a bound lies below what it bounds: the difference of two estimates, each with its error."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from .batch import Batch
from .bounds import SETTLED, Target
from .evidence import Evidence
from .importance import log_weights
from .objective import Objective
from .objectives import elbo
from .pairs import Callback
from .seeding import seeded

DRAWS = 20  # evaluations of a bound, whose spread is its standard error


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


def bounded(target: Target, evidence: Callable[[frozenset[str]], Evidence]) -> tuple[float, float] | None:
    r"""The sum :math:`\sum_i w_i \log p(x_{S_i})` that a target is a lower bound on, nats a row, and its error.

    None of a target that is no lower bound, or one on something else: a conditional, or a random subset of modalities.

    Args:
        target: what an objective bounds, by the modalities' names.
        evidence: a set of modalities -> the likelihood of what is present of them.
    """
    if why_no_gap(target):
        return None
    parts = [(weight, *evidence(names).mean()) for names, weight in target.log_evidence.items()]
    return sum(weight * mean for weight, mean, _ in parts), math.hypot(*(weight * error for weight, _, error in parts))


def averaged(value: Callable[[], float], batch: Batch, seed: int) -> tuple[float, float]:
    """The mean of a random number over 20 draws under a seed, and its standard error."""
    with seeded(seed, batch.device):
        values = torch.tensor([value() for _ in range(DRAWS)], dtype=torch.float64)
    return values.mean().item(), (values.std() / DRAWS**0.5).item()


def bound_of(objective: Any, names: tuple[str, ...]) -> Target | None:
    """What an objective bounds: its own word, log p(x) for another ``pyro.infer.ELBO``, None for what is neither."""
    if isinstance(objective, ELBO) and not isinstance(objective, Objective):
        objective = elbo(objective)
    return objective.bounds(names) if isinstance(objective, Objective) else None


def why_no_gap(target: Target | None) -> str:
    """Why what an objective bounds cannot be estimated, or nothing."""
    if target is None:
        return "so that there is no evidence to hold it against"
    if target.kind != "lower bound":
        return "so that its distance from an evidence has no sign"
    if target.conditional or target.random:
        return "which is not a sum of log-evidences that can be estimated here"
    return ""


def rows_of(target: Target | None, batch: Batch) -> Tensor:
    """Return the rows that a target holds for, boolean ``(N,)``.

    Those that have anything; where the target is a sum over modalities, those that have all of them.
    """
    joint = target is None or set(target.log_evidence) == {frozenset(batch.names)}
    return batch.having(every=not joint)


@torch.no_grad()
def gap_of(
    target: Target,
    objective: Any,
    model: Callback,
    guide: Callback,
    batch: Batch,
    evidence: Callable[[frozenset[str]], Evidence],
    seed: int,
) -> Gap | None:
    """The gap of an objective whose target is a lower bound on a sum of log-evidences.

    Weights that depend on the step are those after any warm-up. A sum over modalities is taken over the rows that have
    them all, for which alone the target holds; None where there are none.

    Args:
        evidence: a set of modalities -> the likelihood of what is present of them, row by row.
    """
    if hasattr(objective, "steps"):
        objective = copy.copy(objective)
        objective.steps = SETTLED
    rows = rows_of(target, batch)
    if not rows.any():
        return None
    batch = batch[rows]
    total = bounded(target, lambda names: evidence(names)[rows])
    if total is None:
        return None
    bound = averaged(lambda: -float(objective.loss(model, guide, batch)) / batch.size, batch, seed)
    return Gap(*bound, *total, batch.size)


@torch.no_grad()
def elbo_gap(model: Callback, guide: Callback, batch: Batch, joint: Evidence, seed: int) -> Gap:
    """The gap of the plain ELBO, by samples: the mean over rows of KL(q(z | x) || p(z | x))."""
    rows = batch.having()
    value = averaged(lambda: log_weights(model, guide, batch, audit=False)[:, rows].mean().item(), batch, seed)
    return Gap(*value, *joint.mean(), int(rows.sum()))
