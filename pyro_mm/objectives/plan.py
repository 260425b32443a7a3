"""The terms of a table stacked along a batch dimension of their own, so that one pass evaluates them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .batch import Batch
from .pairs import Structure, Views, private
from .presence import Presence, all_of, any_of, flags, stacked
from .scatter import Stack
from .terms import Row


def views(
    rows: Sequence[Row], batch: Batch, info: Structure, memo: Any, drawn: Mapping[str, float] | None = None
) -> Views:
    """The batch as T concrete terms show it, stacked at batch dim ``-(nesting + 1)`` when there are several.

    What holds for whole terms stays Python; a tensor is made only where rows of the data differ. Where modalities are
    ``drawn``, each with a scale, the others are not decoded.
    """
    nesting = info.nesting
    if drawn is not None:
        rows = [replace(row, decode={n: n in drawn and m for n, m in row.decode.items()}) for row in rows]
    decodes = {n: tuple(t for t, row in enumerate(rows) if row.decode[n] is not False) for n in batch.names}
    stack = Stack(decodes, len(rows), -nesting - 1)
    # a row in which a term does not count is, for that term, a row with nothing present
    everywhere = stacked([all_of([batch.rows, row.counts]) for row in rows], batch.size, batch.device, nesting)

    def view(each: list[dict[str, Presence]]) -> Batch:
        full = {n: stacked([m[n] for m in each], batch.size, batch.device, nesting) for n in batch.names}
        return batch.view(full, stack, memo, everywhere, each)

    return Views(
        encode=view([row.encode for row in _guided(rows, lambda row: row.encode_prior)]),
        decode=view([row.decode for row in rows]),
        given=view([row.given for row in _guided(rows, lambda row: row.given_prior)]),
        nesting=nesting,
        encode_prior=_flags([row.encode_prior for row in rows], batch, nesting),
        given_prior=_flags([row.given_prior for row in rows], batch, nesting),
        terms=len(rows),
        modalities=info.modalities,
        scale=drawn or {},
        joint=_flags([row.joint for row in rows], batch, nesting),
        prior_terms=frozenset(t for t, row in enumerate(rows) if row.encode_prior),
    )


def _guided(rows: Sequence[Row], prior: Callable[[Row], bool]) -> Sequence[Row]:
    """The rows, with the first of those that the guide is asked for in the place of the prior's, where it is not: so it
    computes nothing for these alone."""
    first = next((row for row in rows if not prior(row)), None)
    return rows if first is None else [first if prior(row) else row for row in rows]


def sharing(rows: Sequence[Row], info: Structure) -> tuple[Sequence[Row], list[int] | None]:
    """Rows of which one decodes for all that encode the same set, and for each row which one does; None if none can.

    The expectation of a log-likelihood is the same whichever term asks for it, so one draw serves them all where a
    term is linear in it. Not so where a private latent counts only in the terms that decode its modality, or where a
    modality is the parent of another one, which sees the data in a term that decodes it and a draw in one that does
    not; nor where an observed site that is no modality counts in some terms only.
    """
    if (
        info.chained
        or info.enumerates
        or info.factors
        or any(private(site, info.modalities) is not None for site in info.latents)
    ):
        return rows, None
    first: dict[Any, int] = {}
    carriers = []
    for t, row in enumerate(rows):
        sets = tuple(m if isinstance(m, bool) else id(m) for m in row.encode.values())
        carrier = first.setdefault((sets, row.encode_prior, row.frozen), t)
        carriers.append(carrier if rows[carrier].counts is True else t)
    if not any(c != t and not rows[t].penalty for t, c in enumerate(carriers)):
        return rows, None
    groups: list[list[Row]] = [[] for _ in rows]
    for row, c in zip(rows, carriers, strict=True):
        groups[c].append(row)
    shared = []
    for row, group in zip(rows, groups, strict=True):
        shared.append(replace(row, decode={n: any_of(other.decode[n] for other in group) for n in row.decode}))
    return shared, carriers


def _flags(values: list[bool], batch: Batch, nesting: int) -> Presence:
    return values[0] if len(set(values)) == 1 else flags(values, batch.device, nesting)
