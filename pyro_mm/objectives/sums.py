r"""Sums and multiples of objectives: ``a + b``, ``0.5 * a``, ``sum([a, b, c])``.

Each part keeps its estimator. Parts of equal estimators become one table, so that they share passes and draws; and so
do terms that no estimator evaluates, such as batch statistics, with the part that they are added to. Other parts have
passes of their own, and share what encoders compute in a step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pyro.infer import ELBO
from torch import Tensor, nn

from ..batch.batch import Batch
from ..batch.context import Cache
from ..estimators import AnalyticKL
from ..scoring.program import Program
from ..scoring.training_objective import Layout, Loss, Player, StepWeights
from ..utils.arguments import describe
from .bounds import Target, target
from .critic_players import critic_players
from .critic_terms import target_by_critics
from .critics import Critic, Key, key_text, module_dict
from .feature_likelihood import FeatureLikelihood, target_by_features
from .objective import Objective
from .terms import ALL, Number, Term


class ObjectiveSum(Objective):
    """A sum of objectives whose estimators differ: the return value of ``a + b``, which is one table otherwise.

    Args:
        parts: two objectives or more, none of them a sum.

    Attributes:
        parts: the objectives.
        terms: the terms of all parts.
        estimator: that of the first part.
    """

    def __init__(self, parts: Sequence[Objective]):
        self.parts = tuple(parts)
        super().__init__([], parts[0].estimator, vectorize=all(part.vectorize for part in parts))
        self.terms = _join_tables([part.terms for part in parts])

    def describe(self, names: tuple[str, ...] | None) -> str:
        texts = [part.describe(names) for part in self.parts]
        head = f"Sum of {len(self.parts)} objectives; {self._target_text(names)}"
        return "\n".join([head, *(line for text in texts for line in text.splitlines())])

    @property
    def estimator_text(self) -> str:
        return " + ".join(part.estimator_text for part in self.parts)

    @property
    def estimator_name(self) -> str:
        return " + ".join(part.estimator_name for part in self.parts)

    def bounds(self, names: Sequence[str] | None = None, present: Collection[str] | None = None) -> Target:
        names = None if names is None else tuple(names)
        tables = [part._table(names) for part in self.parts]
        linear = [part.linear for part, table in zip(self.parts, tables, strict=True) for _ in table]
        table = [term for each in tables for term in each]
        found = target(table, names, lower=self.lower, linear=linear, present=present)
        found = target_by_critics(found, table, self.all_critics, names)
        return target_by_features(found, table, self._features, names)

    @property
    def all_critics(self) -> dict[Key, Critic]:
        """Modality, or modalities, -> critic of all parts."""
        return {key: critic for part in self.parts for key, critic in part.critics.items()}

    def with_critics(self, critics: Mapping[Key, Critic]) -> Objective:
        """Return the sum of the parts with these critics, whose networks they share where terms are equal."""
        return ObjectiveSum([part.with_critics(critics) for part in self.parts])

    def _with_features(self, features: Mapping[str, FeatureLikelihood]) -> Objective:
        new = ObjectiveSum([part._with_features(features) for part in self.parts])
        new._features = dict(features)
        return new

    @property
    def modules(self) -> list[nn.Module]:
        critics = self.all_critics
        return [nn.ModuleDict({"critics": module_dict(critics)})] if critics else []

    def players(self, model: Program, guide: Program, batch: Batch) -> Sequence[Player]:
        critics = self.all_critics
        for part in self.parts:
            for key, critic in part.critics.items():
                if critics[key] is not critic:
                    raise ValueError(
                        f"two parts of a sum have critics of their own for {key_text(key)!r}: add the objectives "
                        "first, and give the sum one, (a + b).with_critics({..})"
                    )
        if not critics:
            return ()
        tables = [(part._table, part.critics) for part in self.parts]
        return critic_players(self, tables, critics, model, guide, batch)

    def least_rows(self, names: tuple[str, ...]) -> int:
        return max(part.least_rows(names) for part in self.parts)

    def gathers_rows(self, names: tuple[str, ...]) -> bool:
        gathers = {part: part.gathers_rows(names) for part in self.parts}
        return any(gathers.values()) and all(gathers[part] or part.least_rows(names) == 1 for part in self.parts)

    @property
    def lower(self) -> bool:
        return all(part.lower for part in self.parts)

    @property
    def linear(self) -> bool:
        return all(part.linear for part in self.parts)

    def subsampled(self, modalities: int | None) -> Objective:
        """Return the sum whose parts all decode some of the modalities, each a choice of its own."""
        return ObjectiveSum([part.subsampled(modalities) for part in self.parts])

    def scaled(self, weight: Number) -> Objective:
        return ObjectiveSum([part.scaled(weight) for part in self.parts])

    @property
    def differentiable(self) -> bool:  # type: ignore[override]
        return all(part.differentiable for part in self.parts)

    @property
    def untraceable(self) -> str | None:  # type: ignore[override]
        return next((part.untraceable for part in self.parts if part.untraceable is not None), None)

    def evaluate_with_gradient(self, model: Program, guide: Program, batch: Batch, *, step: int) -> Loss:
        losses = [part.evaluate_with_gradient(model, guide, batch, step=step) for part in self.parts]
        return self._sum(losses)

    def step_weights(self, names: tuple[str, ...], step: int) -> StepWeights:
        each = [part.step_weights(names, step) for part in self.parts]
        fixed: dict[int, float] = {}
        values: list[float] = []
        for weights in each:
            fixed.update({place + len(values): value for place, value in weights.fixed.items()})
            values += weights.values
        return StepWeights(tuple(values), fixed, tuple(weights.form for weights in each))

    def layout(self, batch: Batch) -> Layout:
        each = [part.layout(batch) for part in self.parts]
        return Layout(any(layout.stacked for layout in each), any(layout.hides for layout in each))

    def decoding_all(self) -> Objective:
        return self if all(part.subsample is None for part in self.parts) else self.subsampled(None)

    def _table(self, names: tuple[str, ...] | None) -> Sequence[Term]:
        return [term for part in self.parts for term in part._table(names)]

    def _evaluate(
        self,
        model: Program,
        guide: Program,
        batch: Batch,
        weight_at: Callable[[Callable[[int], float], str], float | Tensor],
        takes_gradient: bool = False,
        cache: Cache | None = None,
    ) -> Loss:
        shared: Cache = {} if cache is None else cache
        return self._sum([part._evaluate(model, guide, batch, weight_at, cache=shared) for part in self.parts])

    def _sum(self, losses: Sequence[Loss]) -> Loss:
        """Return the sum of the parts' losses; a label that two parts have is followed by the estimator."""
        labels = [label for loss in losses for label in loss.by_term]
        by_term: dict[str, Tensor] = {}
        for part, loss in zip(self.parts, losses, strict=True):
            for label, value in loss.by_term.items():
                own = label if labels.count(label) == 1 else f"{label} {part.estimator_text}"
                by_term[own] = by_term[own] + value if own in by_term else value
        total = losses[0].total
        for loss in losses[1:]:
            total = total + loss.total.to(total.device)
        return Loss(total, by_term)


def as_objective(value: Any) -> Objective:
    """Return an objective; for an estimator, the evidence lower bound of what is present by it.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, Objective):
        return value
    if isinstance(value, ELBO):
        return Objective([Term(ALL, ALL)], value)
    raise TypeError(
        f"expected an objective of pyro_mm.objectives to add, or a pyro.infer.ELBO, got {describe(value)}: an "
        "objective of one's own has no table, so write one whose evaluate adds the losses"
    )


def add(first: Objective, second: Objective) -> Objective:
    """Return the sum of two objectives: one table if their terms go together, else an :class:`ObjectiveSum`."""
    parts: list[Objective] = []
    for part in [*_parts(first), *_parts(second)]:
        for place, known in enumerate(parts):
            if (joined := _join(known, part)) is not None:
                parts[place] = joined
                break
        else:
            parts.append(part)
    return parts[0] if len(parts) == 1 else ObjectiveSum(parts)


def _parts(objective: Objective) -> tuple[Objective, ...]:
    return objective.parts if isinstance(objective, ObjectiveSum) else (objective,)


def _join(first: Objective, second: Objective) -> Objective | None:
    """Return two objectives as one table; None if they have estimators, or random sets, of their own."""
    if first.subsample != second.subsample and not (_is_statistic(first) or _is_statistic(second)):
        return None
    if _draws_sets(first) and _draws_sets(second):
        return None  # sets of one index would share a draw
    if _is_statistic(second) and not second.critics:
        owner = first
    elif _is_statistic(first) and not first.critics:
        owner = second
    elif (
        first.critics == second.critics
        and first.vectorize == second.vectorize
        and _are_equal(first.estimator, second.estimator)
    ):
        owner = first
    else:
        return None
    terms = _join_tables([first.terms, second.terms])
    return owner._with_terms(terms)


def _join_tables(tables: Sequence[Any]) -> Any:
    """Return the terms of several tables, or a function to them if one of the tables is a function."""
    if not any(callable(table) for table in tables):
        return [term for table in tables for term in table]

    def terms(names: tuple[str, ...]) -> list[Term]:
        return [term for table in tables for term in (table(names) if callable(table) else table)]

    return terms


def _is_statistic(objective: Objective) -> bool:
    """Return True if no estimator evaluates the terms, and none with settings of its own draws for them."""
    plain = type(objective.estimator) is AnalyticKL and objective.estimator.num_particles == 1 and objective.vectorize
    if not plain or callable(objective.terms) or objective.subsample is not None:
        return False
    return all(term.kind is not None and not (term.kind.estimated or term.kind.as_pair) for term in objective.terms)


def _draws_sets(objective: Objective) -> bool:
    """Return True if the table may draw sets of modalities at random."""
    return callable(objective.terms) or any(term.is_random for term in objective.terms)


def _are_equal(first: ELBO, second: ELBO) -> bool:
    """Return True if two estimators evaluate terms in the same way."""
    if first is second:
        return True
    plain = bool | int | float | str | None
    known = all(isinstance(value, plain) for value in [*vars(first).values(), *vars(second).values()])
    return type(first) is type(second) and known and vars(first) == vars(second)
