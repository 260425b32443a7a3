r"""The two kinds of term that the tables of the literature consist of: densities and penalties.

.. math:: density = E_{q_A} [a \log p(x_B | z) + b (\log r_C(z) - \log q_A(z))], \qquad
          penalty = -b \, KL(q_A \| r_C)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..estimators import AnalyticKL, PerRow
from ..scoring.scores import Scores
from ..utils.tensors import constant
from .concrete_terms import ConcreteTerm, TermKind


class Density(TermKind):
    """A bound on a log-density, by the objective's estimator; where a row has nothing to decode, minus its KL."""

    estimated = True
    as_pair = True

    def values(self, terms: Sequence[ConcreteTerm], scores: Scores, estimator: PerRow) -> Sequence[Tensor]:
        outer = [term.outer for term in terms]
        kl = _column([term.kl / weight for term, weight in zip(terms, outer, strict=True)], scores)
        if scores.deterministic and any(term.has_kl for term in terms):
            raise ValueError(
                f"{terms[0].label}: latent {scores.deterministic[0]!r} is deterministic (a Delta) in some rows, and "
                "has no density there, which the KL needs: give the term kl=0"
            )
        bound = estimator.bound(scores, _likelihood_weights(terms, outer, scores), kl)

        ragged = any(not term.decodes and all(m is not True for m in term.decode.values()) for term in terms)
        if ragged and (not isinstance(estimator, AnalyticKL) or "*" in scores.likelihood):
            decodes = torch.stack([_decodes_something(term, bound) for term in terms])
            bound = torch.where(decodes, bound, torch.zeros_like(bound) if scores.deterministic else -kl * scores.kl())
        return list(bound * _column(outer, scores))


class Penalty(TermKind):
    """Minus a KL, in closed form site by site where one is known.

    It is a KL whatever the estimator: an importance-weighted "KL" would tend to zero.
    """

    as_pair = True
    only_loosens = True

    def values(self, terms: Sequence[ConcreteTerm], scores: Scores, estimator: PerRow) -> Sequence[Tensor]:
        if scores.deterministic and not any(term.has_kl for term in terms):
            return list(torch.zeros_like(scores.like[0]))
        return [-term.kl * kl for term, kl in zip(terms, scores.kl(), strict=True)]


DENSITY = Density()
PENALTY = Penalty()


def _likelihood_weights(terms: Sequence[ConcreteTerm], outer: Sequence[float | Tensor], scores: Scores) -> Any:
    """Return the weights that stay inside of a logarithm: one for all, or modality -> number or ``(T, 1)``."""
    if "*" in scores.likelihood and any(isinstance(term.likelihood, dict) for term in terms):
        raise ValueError(
            "a weight per modality cannot be given if an enumerated site is summed out of all modalities together: "
            "give one likelihood weight, or draw the site"
        )

    def inner(term: ConcreteTerm, weight: Any, name: str) -> Any:
        if isinstance(term.likelihood, dict):
            return term.likelihood.get(name, 1.0)
        return 1.0 if weight is term.likelihood else term.likelihood / weight

    weights: Any = {
        name: _column([inner(term, weight, name) for term, weight in zip(terms, outer, strict=True)], scores)
        for name in scores.likelihood
    }
    if all(isinstance(weight, float) and weight == 1 for weight in weights.values()):
        return 1.0
    return weights.get("*", weights)


def _decodes_something(term: ConcreteTerm, like: Tensor) -> Tensor:
    """Return the rows in which a term decodes something, boolean ``(N,)``."""
    if term.joint:
        return torch.ones_like(like[0], dtype=torch.bool)
    shape = like.shape[1:]
    masks = [m if isinstance(m, Tensor) else torch.full(shape, m, device=like.device) for m in term.decode.values()]
    return torch.stack(masks).any(0)


def _column(values: Sequence[float | Tensor], scores: Scores) -> Any:
    """Return a number for each term as ``(T, 1)``, or as one number if they are equal."""
    like = scores.like
    if all(value is values[0] for value in values):
        return values[0]
    if all(isinstance(value, float) for value in values):
        if len(set(values)) == 1:
            return values[0]
        return constant(tuple(values), like.dtype, like.device)[:, None]
    return torch.stack([torch.as_tensor(value, dtype=like.dtype, device=like.device) for value in values])[:, None]
