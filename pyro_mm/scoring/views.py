"""The rows of a batch as the three sets of a term show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..batch.batch import Batch
from ..batch.context import TermStack
from ..batch.masks import Presence
from .structure import PairStructure


@dataclass(frozen=True)
class TermViews:
    """The rows as the three sets of a term show them, T terms stacked at batch dim ``-(nesting + 1)``.

    ``encode_prior`` (``given_prior``) says where the model's prior takes the place of the guide given A (C): a
    bool, or a boolean tensor ``(T, 1, .., 1)``. ``scale`` maps modalities to what their own sites are scaled by.
    ``joint`` says where observed sites that are no modality, such as a ``pyro.factor``, count. ``prior_terms`` are the
    terms that encode the prior, by number.
    """

    encode: Batch
    decode: Batch
    given: Batch
    nesting: int
    encode_prior: Presence = False
    given_prior: Presence = True
    terms: int = 1
    modalities: frozenset[str] = frozenset()
    scale: Mapping[str, float] = field(default_factory=dict)
    joint: Presence = True
    prior_terms: frozenset[int] = frozenset()

    @staticmethod
    def of(batch: Batch, info: PairStructure, memo: dict[Any, Any] | None = None) -> TermViews:
        """The single term (*, *, prior): encode and decode all that is present."""
        view = batch.view({n: batch.presence(n) for n in batch.names}, TermStack({}), {} if memo is None else memo)
        return TermViews(view, view, view, info.nesting, modalities=info.modalities)
