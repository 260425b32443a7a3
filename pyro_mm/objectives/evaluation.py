"""Evaluation of the terms of a table, pass by pass, and their weighted sum."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.context import Cache
from ..batch.masks import all_of
from ..estimators import AnalyticKL, PerRow
from ..scoring.prepare_objective import as_total
from ..scoring.program import Program
from ..scoring.scores import Scores
from ..scoring.structure import PairStructure
from ..scoring.training_objective import Loss
from ..utils.shared_rows import rows_are_shared
from .concrete_terms import ConcreteTerm, TermKind
from .stacked_views import share_decoding, stack_views
from .terms import Term


@dataclass
class Evaluation:
    """A (model, guide) pair and a batch to evaluate terms on.

    Attributes:
        structure: structure of the pair on batches like this one.
        decoded: modality -> scale, for the modalities that are decoded; None for all.
        takes_gradient: True if each pass adds its gradient to the parameters', as some of Pyro's ELBOs do.
        cache: results of encoders, shared by all passes.
    """

    model: Program
    guide: Program
    batch: Batch
    structure: PairStructure
    decoded: Mapping[str, float] | None = None
    takes_gradient: bool = False
    cache: Cache = field(default_factory=dict)

    def fresh_cache(self) -> Cache:
        """Return a cache for a pass whose graph is freed by its own gradient: an empty one."""
        return {} if self.takes_gradient else self.cache


@dataclass
class PassTotals:
    """Weighted sums over rows that one pass gives.

    Attributes:
        totals: scalars, higher is better: of each term, or of all terms together.
        labels: a label for each of them; empty if the terms are not known one by one.
    """

    totals: Sequence[Any]
    labels: Sequence[str]


class TermPass(ABC):
    """Concrete terms that are evaluated together, and how."""

    terms: Sequence[ConcreteTerm]

    @abstractmethod
    def evaluate(self, evaluation: Evaluation) -> PassTotals:
        """Return the terms' weighted sums over the rows."""

    def with_weights(self, table: Sequence[Term]) -> Self:
        """Return the same pass with the weights of a table whose terms are those that it was planned for."""
        new = copy.copy(self)
        new.terms = [term.with_weights(table[term.place]) for term in self.terms]
        return new


class PerRowPass(TermPass):
    """Terms evaluated per row by one of this package's estimators, in one run of guide and model.

    Args:
        estimator: draws the particles, and evaluates the terms that are densities.
        terms: the terms.
        structure: structure of the pair.
    """

    def __init__(self, estimator: PerRow, terms: Sequence[ConcreteTerm], structure: PairStructure):
        self.estimator = estimator
        self.terms = terms
        # one term may decode for several; carriers are None if each decodes for itself
        self._shared: Sequence[ConcreteTerm] = terms
        self._carriers: list[int] | None = None
        if isinstance(estimator, AnalyticKL):
            self._shared, self._carriers = share_decoding(terms, structure)
        self._frozen = [t for t, term in enumerate(self._shared) if term.frozen and term.has_likelihood]
        self._options = {"draws": True} if any(term.kind.needs_draws for term in terms) else {}
        self._places: dict[TermKind, list[int]] = {}
        for t, term in enumerate(terms):
            self._places.setdefault(term.kind, []).append(t)

    def evaluate(self, evaluation: Evaluation) -> PassTotals:
        scores = self._scores(evaluation)
        values = self._values(scores, evaluation.batch)
        totals = []
        for term, value in zip(self.terms, values, strict=True):
            share = term.share.to(scores.like.dtype) if isinstance(term.share, Tensor) else term.share
            totals.append((term.weight * (share * value)).sum() * scores.factor)
        return PassTotals(totals, [term.label for term in self.terms])

    def _scores(self, evaluation: Evaluation) -> Scores:
        """Return the scores of one run of guide and model."""
        structure = evaluation.structure
        views = stack_views(self._shared, evaluation.batch, structure, evaluation.fresh_cache(), evaluation.decoded)
        scores = self.estimator.scores(evaluation.model, evaluation.guide, views, structure, **self._options)
        scores.freeze(self._frozen)
        if self._carriers is not None:
            scores.share(self._carriers, [term.decode for term in self.terms])
        return scores

    def _values(self, scores: Scores, batch: Batch) -> Sequence[Tensor]:
        """Return the value of each term per row, ``(N,)``."""
        values: list[Any] = [None] * len(self.terms)
        for kind, own in self._places.items():
            some = scores if len(own) == len(self.terms) else scores.take(own)
            terms = [self.terms[t] for t in own]
            for t, value in zip(own, kind.values(terms, some, self.estimator), strict=True):
                values[t] = value if kind.as_pair else _per_row(value, self.terms[t], batch, scores.like.dtype)
        return values


def _per_row(value: Tensor, term: ConcreteTerm, batch: Batch, dtype: torch.dtype) -> Tensor:
    """Return a value as one per row, 0 in rows in which the term does not count; a number stands for each other row."""
    if value.dim() > 1 or (value.dim() == 1 and len(value) != batch.size):
        raise ValueError(
            f"expected {term.label} to have a value per row, of shape ({batch.size},), or one number for the batch, "
            f"got {tuple(value.shape)}"
        )
    if value.dim() == 0 and rows_are_shared() and not term.kind.gathers:
        raise ValueError(
            f"{term.label} has one number for all rows, which would be of those of one process where several share a "
            "minibatch out: give it a value per row, or train in one process"
        )
    rows = value.to(dtype).expand(batch.size)  # a weight that is a tensor is of double precision
    counts = all_of([batch.rows, term.counts])
    return torch.where(counts, rows, torch.zeros_like(rows)) if isinstance(counts, Tensor) else rows


def combine(passes: Iterable[PassTotals], takes_gradient: bool = False) -> Loss:
    """Sum the results of all passes into one loss.

    Args:
        passes: results of the passes; an iterator evaluates each pass when its turn comes.
        takes_gradient: True to add the gradient of each pass to the parameters', where it has a graph.
    """
    loss: Any = None
    by_term: dict[str, Tensor] = {}
    for result in passes:
        part = -sum(result.totals[1:], result.totals[0])
        for label, total in zip(result.labels, result.totals, strict=False):
            value = total if isinstance(total, Tensor) else torch.as_tensor(total)  # as_tensor moves tensors
            by_term[label] = by_term.get(label, 0.0) + value.detach()
        if takes_gradient and isinstance(part, Tensor):
            part = _backward(part)
        loss = part if loss is None else loss + part
    return Loss(torch.zeros(()) if loss is None else as_total(loss), by_term)


def _backward(loss: Tensor) -> float:
    if loss.requires_grad:
        loss.backward()
    return loss.item()
