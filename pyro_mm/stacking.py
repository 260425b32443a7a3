"""The terms of a table stacked along a batch dimension of their own, so that one pass evaluates them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .batch import Batch
from .pairs import Structure, Views, private
from .presence import Presence, all_of, any_of, constant
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
    everywhere = _stacked([all_of([batch.rows, row.counts]) for row in rows], batch, nesting)

    def view(masks: Callable[[Row], dict[str, Presence]]) -> Batch:
        stacked = {n: _stacked([masks(row)[n] for row in rows], batch, nesting) for n in batch.names}
        return batch.view(stacked, stack, memo, everywhere, [masks(row) for row in rows])

    return Views(
        encode=view(lambda row: row.encode),
        decode=view(lambda row: row.decode),
        given=view(lambda row: row.given),
        nesting=nesting,
        encode_prior=_flags([row.encode_prior for row in rows], batch, nesting),
        given_prior=_flags([row.given_prior for row in rows], batch, nesting),
        terms=len(rows),
        modalities=info.modalities,
        scale=drawn or {},
    )


def sharing(rows: Sequence[Row], info: Structure) -> tuple[Sequence[Row], list[int] | None]:
    """Rows of which one decodes for all that encode the same set, and for each row which one does; None if none can.

    The expectation of a log-likelihood is the same whichever term asks for it, so one draw serves them all where a
    term is linear in it. Not so where a private latent counts only in the terms that decode its modality, or where a
    modality is the parent of another one, which sees the data in a term that decodes it and a draw in one that does
    not.
    """
    if info.chained or info.enumerates or any(private(site, info.modalities) is not None for site in info.latents):
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


def _stacked(masks: list[Presence], batch: Batch, nesting: int) -> Presence:
    """Masks of every term as one: a bool where it holds for all, else ``(T, 1, .., N)``."""
    if len(masks) == 1 or all(m is True for m in masks) or all(m is False for m in masks):
        return masks[0]
    shape = (len(masks), *[1] * (nesting - 1), batch.size)
    if all(isinstance(m, bool) for m in masks):
        return _flag(masks, batch, nesting).expand(shape)
    full = [m if isinstance(m, Tensor) else torch.full((batch.size,), m, device=batch.device) for m in masks]
    return torch.stack(full).reshape(shape)


def _flags(values: list[bool], batch: Batch, nesting: int) -> Presence:
    if len(set(values)) == 1:
        return values[0]
    return _flag(values, batch, nesting)


def _flag(values: Sequence[Any], batch: Batch, nesting: int) -> Tensor:
    return constant(tuple(values), torch.bool, batch.device).reshape(-1, *[1] * nesting)
