"""Terms of a table as they hold for one batch, and the interface of the kinds of term."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from ..batch.batch import Batch
from ..batch.masks import Presence
from ..estimators import PerRow
from ..scoring.scores import Scores
from ..scoring.structure import PairStructure


class TermKind(ABC):
    """A way to compute terms from one pass of guide and model.

    ``term_kinds.Density`` and ``Penalty`` are the kinds of the tables here. To use another one, set ``kind`` in a
    subclass of :class:`~pyro_mm.objectives.Term`, and put such terms into a table.

    Attributes:
        estimated: True if the objective's own estimator evaluates the term; False if any draws from the guide do.
        needs_draws: True if the values come from ``scores.draws``, which a pass makes only if it is asked to.
        as_pair: True if the term is the ELBO of a (model, guide) pair, which Pyro's own estimators can evaluate.
        only_loosens: True if the values are never above 0 for weights that are not negative, so that a bound stays one.
        ratios: modality -> function in the place of its log-density, as in ``TermViews``. A term whose kind has some
            gets a pass of its own.
        least_rows: fewest rows of a batch that it can be computed of.
        gathers: True if the rows that it compares are those of all processes that share a minibatch out
            (``utils.shared_rows``).
    """

    estimated: bool = False
    needs_draws: bool = False
    as_pair: bool = False
    only_loosens: bool = False
    least_rows: int = 1
    gathers: bool = False

    @property
    def ratios(self) -> Mapping[str, Callable[[Any, Any], Tensor]]:
        return {}

    def describe(self, encode: str, decode: str, given: str) -> str:
        """Return a term of this kind in words, its label in ``by_term``.

        Args:
            encode, decode, given: its sets of modalities in words.
        """
        return f"{type(self).__name__} ({encode}, {decode}, {given})"

    @property
    def settings(self) -> str:
        """Settings in words that its label does not show, for the text of a table."""
        return ""

    def check(self, term: ConcreteTerm, batch: Batch, structure: PairStructure) -> None:  # noqa: B027
        """Refuse a term that cannot be evaluated for a pair. Called when a table is planned.

        Args:
            term: a term of this kind.
            batch: rows; nothing may depend on their number.
            structure: structure of the pair on such rows.

        Raises:
            ValueError: naming the term and the reason.
        """

    @abstractmethod
    def values(self, terms: Sequence[ConcreteTerm], scores: Scores, estimator: PerRow) -> Sequence[Tensor]:
        """Return the value of each term, higher being better: per row ``(N,)``, or one number for the batch ``()``.

        A number stands for every row in which its term counts, as the mean of a batch does. Rows where
        ``scores.draws.counts`` is False must not affect it: they may be padding.

        Args:
            terms: T terms of this kind, with their weights ``likelihood`` and ``kl``.
            scores: the pass, of these T terms.
            estimator: the estimator that has drawn the K particles.
        """


class Weights(Protocol):
    """The weights of a term at one step: numbers, or scalar tensors."""

    @property
    def weight(self) -> Any: ...
    @property
    def likelihood(self) -> Any: ...

    @property
    def kl(self) -> Any: ...


def _number(weight: Any) -> float | Tensor:
    return weight if isinstance(weight, Tensor) else float(weight)


@dataclass
class ConcreteTerm:
    """A term as it holds for one batch: masks of the modalities that it encodes, decodes and is given, and weights.

    Attributes:
        label: its name in ``by_term``.
        place: index of the term in its table.
        encode, decode, given: modality -> rows, a boolean or boolean ``(N,)``.
        encode_prior, given_prior: True if the model's prior stands in the place of the guide.
        counts: rows in which the term counts.
        likelihood, kl, weight: its weights at this step; the last one is of the whole term. A tensor is a single number
            that may change between the runs of a traced step; as a likelihood weight it is positive.
        frozen: True if decoders get no gradient from it.
        has_kl: False if its KL weighs 0 at every step.
        frozen_encoder: True if what encodes it gets no gradient from it.
        kind: the way in which it is computed.
        share: its share in a mean, a number or ``(N,)``.
        among: how many terms of that mean count.
        decodes: True if it decodes something wherever it counts.
        joint: True if what the model observes besides modalities counts in it.
    """

    label: str
    place: int
    encode: dict[str, Presence]
    decode: dict[str, Presence]
    given: dict[str, Presence]
    encode_prior: bool
    given_prior: bool
    counts: Presence
    frozen: bool
    kind: TermKind
    likelihood: float | Tensor | dict[str, float | Tensor] = 1.0
    kl: float | Tensor = 1.0
    weight: float | Tensor = 1.0
    share: float | Tensor = 1.0
    among: float | Tensor = 1.0
    decodes: bool = False
    joint: bool = False
    has_kl: bool = True
    frozen_encoder: bool = False

    def with_weights(self, weights: Weights) -> ConcreteTerm:
        """Return the same term with other weights."""
        new = copy.copy(self)
        likelihood = weights.likelihood
        if isinstance(likelihood, Mapping):
            new.likelihood = {name: _number(weight) for name, weight in likelihood.items()}
        else:
            new.likelihood = _number(likelihood)
        new.kl = _number(weights.kl)
        new.weight = _number(weights.weight)
        return new

    @property
    def has_likelihood(self) -> bool:
        """True if it decodes something in some row, or observes something besides modalities."""
        return self.joint or any(mask is not False for mask in self.decode.values())

    @property
    def outer(self) -> float | Tensor:
        """The likelihood weight that can be taken out of a logarithm: a single, positive one, else 1."""
        weight = self.likelihood
        return weight if isinstance(weight, Tensor) or (isinstance(weight, float) and weight > 0) else 1.0
