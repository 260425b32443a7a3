"""A batch as the three sets of modalities of a term show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..batch.batch import Batch
from ..batch.context import Cache, TermStack
from ..batch.masks import Presence
from .structure import PairStructure


@dataclass(frozen=True)
class TermViews:
    """Rows as the three sets of T terms show them, the terms stacked at batch dimension ``-(nesting + 1)``.

    Attributes:
        encode, decode, given: the rows of the sets A, B and C.
        nesting: number of batch dimensions of the story's plates.
        encode_prior, given_prior: terms in which the model's prior stands in the place of the guide given A, or C: a
            boolean, or boolean ``(T, 1, .., 1)``.
        terms: T.
        modalities: observed sites of the model.
        scale: modality -> scale of its own sites.
        joint: terms in which observed sites that are no modality count, such as a ``pyro.factor``.
        prior_terms: numbers of the terms that encode the prior.
        given_latents: latents outside the plate ``"data"`` that are given, draw by draw, and not scored; None where
            such latents are refused.
        freeze_encoder: True if the guide given A is held constant: no gradient reaches what it depends on.
        ratios: modality -> function of its site and of the pair that is run to the logarithm of a ratio of densities,
            of the batch shape of the site's distribution, which counts in the place of its log-density.
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
    given_latents: frozenset[str] | None = None
    freeze_encoder: bool = False
    ratios: Mapping[str, Callable[[Any, Any], Tensor]] = field(default_factory=dict)

    def given_globals(self, structure: PairStructure) -> TermViews:
        """Return these views for an evaluation that takes draws of the guide's global latents as given.

        Raises:
            ValueError: a global latent that the guide enumerates.
        """
        for name in sorted(structure.global_latents):
            if structure.latents[name] == "enumerated":
                raise ValueError(
                    f"site {name!r} lies outside the plate 'data' and is enumerated by the guide, and a sum over it "
                    "would be one per row: let the guide draw it"
                )
        return replace(self, given_latents=structure.global_latents)

    @staticmethod
    def of(batch: Batch, structure: PairStructure, cache: Cache | None = None) -> TermViews:
        """Return the views of the single term (*, *, prior), which encodes and decodes all that is present."""
        view = batch.view({n: batch.presence(n) for n in batch.names}, TermStack({}), {} if cache is None else cache)
        return TermViews(view, view, view, structure.nesting, modalities=structure.modalities)
