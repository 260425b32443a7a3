"""A batch as several concrete terms show it, stacked along a batch dimension of their own for one pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..batch.batch import Batch
from ..batch.context import Cache, TermStack
from ..batch.masks import Presence, all_of, any_of, stack_masks, term_flags
from ..scoring.structure import PairStructure, private_modality
from ..scoring.views import TermViews
from .concrete_terms import ConcreteTerm


def stack_views(
    terms: Sequence[ConcreteTerm],
    batch: Batch,
    structure: PairStructure,
    cache: Cache,
    decoded: Mapping[str, float] | None = None,
) -> TermViews:
    """Return a batch as T concrete terms show it, stacked at batch dimension ``-(nesting + 1)`` if T > 1.

    What holds for whole terms stays a boolean of Python; a tensor is made only where rows of the data differ.

    Args:
        terms: T terms, whose encoders are all frozen or all live; one term, if its kind has ratios.
        batch: N rows.
        structure: structure of the pair.
        cache: for results of encoders, shared by the passes of a step.
        decoded: modality -> scale, for the modalities that are decoded; None for all.
    """
    nesting = structure.nesting
    if decoded is not None:
        terms = [replace(term, decode={n: n in decoded and m for n, m in term.decode.items()}) for term in terms]

    decodes = {n: tuple(t for t, term in enumerate(terms) if term.decode[n] is not False) for n in batch.names}
    stack = TermStack(decodes, len(terms), -nesting - 1)
    # a row in which a term does not count is, for that term, a row with nothing present
    everywhere = stack_masks([all_of([batch.rows, term.counts]) for term in terms], batch.size, batch.device, nesting)

    def view(masks: list[dict[str, Presence]]) -> Batch:
        full = {n: stack_masks([m[n] for m in masks], batch.size, batch.device, nesting) for n in batch.names}
        return batch.view(full, stack, cache, everywhere, masks)

    return TermViews(
        encode=view([term.encode for term in _exchange_prior_terms(terms, lambda term: term.encode_prior)]),
        decode=view([term.decode for term in terms]),
        given=view([term.given for term in _exchange_prior_terms(terms, lambda term: term.given_prior)]),
        nesting=nesting,
        encode_prior=_flags([term.encode_prior for term in terms], batch, nesting),
        given_prior=_flags([term.given_prior for term in terms], batch, nesting),
        terms=len(terms),
        modalities=structure.modalities,
        scale=decoded or {},
        joint=_flags([term.joint for term in terms], batch, nesting),
        prior_terms=frozenset(t for t, term in enumerate(terms) if term.encode_prior),
        freeze_encoder=terms[0].frozen_encoder,
        ratios=terms[0].kind.ratios,
    )


def _exchange_prior_terms(
    terms: Sequence[ConcreteTerm], of_prior: Callable[[ConcreteTerm], bool]
) -> Sequence[ConcreteTerm]:
    """Return the terms, with the first one that runs the guide in the place of those that encode the prior.

    So the guide computes nothing of its own for terms that do not use its draws.
    """
    first = next((term for term in terms if not of_prior(term)), None)
    return terms if first is None else [first if of_prior(term) else term for term in terms]


def share_decoding(
    terms: Sequence[ConcreteTerm], structure: PairStructure
) -> tuple[Sequence[ConcreteTerm], list[int] | None]:
    """Let one term decode for all terms that encode the same set, with one draw.

    The expectation of a log-likelihood is the same whichever term has it, so one draw serves all terms that are linear
    in it. Not so where a private latent counts only in the terms that decode its modality; where a modality is the
    parent of another one, which sees the data in a term that decodes it and a draw in one that does not; or where an
    observed site that is no modality counts in some terms only.

    Args:
        terms: T terms of densities and penalties, or of other kinds, which neither give nor take.
        structure: of the pair that is run.

    Returns:
        The terms with what each has to decode for others too, and for each term the one that decodes for it; the terms
        as they are and None if there is nothing to share.
    """
    private = any(private_modality(site, structure.modalities) is not None for site in structure.latents)
    if structure.chained or structure.enumerates or structure.factors or private:
        return terms, None

    first: dict[Any, int] = {}
    carriers = []
    for t, term in enumerate(terms):
        if not term.kind.as_pair:
            carriers.append(t)
            continue
        sets = tuple(m if isinstance(m, bool) else id(m) for m in term.encode.values())
        carrier = first.setdefault((sets, term.encode_prior, term.frozen), t)
        carriers.append(carrier if terms[carrier].counts is True else t)
    if not any(carrier != t and terms[t].kind.estimated for t, carrier in enumerate(carriers)):
        return terms, None

    served: list[list[ConcreteTerm]] = [[] for _ in terms]
    for term, carrier in zip(terms, carriers, strict=True):
        served[carrier].append(term)
    shared = []
    for term, others in zip(terms, served, strict=True):
        shared.append(replace(term, decode={n: any_of(other.decode[n] for other in others) for n in term.decode}))
    return shared, carriers


def _flags(values: list[bool], batch: Batch, nesting: int) -> Presence:
    return values[0] if len(set(values)) == 1 else term_flags(values, batch.device, nesting)
