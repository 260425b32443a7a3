"""Decoding for some terms of a stack only: a distribution known on part of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..distributions.scatter import Scatter
from ..utils.tensors import constant
from .context import TermStack


def decode_for_terms(
    name: str, decode: Callable[..., Any], parents: tuple[Tensor, ...], stack: TermStack | None, size: int
) -> Any:
    """``decode(*parents)``, run only for those terms of a stack that decode a modality."""
    terms = stack.decodes.get(name, ()) if stack is not None else ()
    if stack is None or stack.terms in (1, len(terms)) or size in (1, stack.terms):
        return decode(*parents)
    places = [_places(parent, stack, size) for parent in parents]
    if any(len(found) > 1 for found in places):
        return decode(*parents)  # sizes that cannot be told apart: decode for all terms, which is only slower
    d = decode(*(_taken(parent, terms, found) for parent, found in zip(parents, places, strict=True)))
    if len(d.batch_shape) < -stack.dim or d.batch_shape[stack.dim] != len(terms):
        return d  # nothing among its parents depends on the term
    return Scatter(d, terms, stack.terms, stack.dim)


def _places(parent: Tensor, stack: TermStack, size: int) -> list[int]:
    """The dimensions of a parent that may be that of the terms: of its size, and at its distance from the rows.

    Dimensions of particles and of enumerated sites may stand to the left of it, and event dimensions to the right.
    """
    apart, shape = -stack.dim - 1, parent.shape
    found = [i for i in range(len(shape) - apart) if shape[i] == stack.terms and shape[i + apart] == size]
    # as many particles as rows, or a covariate that begins with its rows: that cannot be told apart either
    return [*found, 0] if found and found[0] > 0 and shape[0] == size else found


def _taken(parent: Tensor, terms: tuple[int, ...], places: list[int]) -> Tensor:
    """The entries ``terms`` of a parent that has one for every term; one that has not, as it is."""
    if not places:
        return parent
    if len(terms) == 1:
        return parent.narrow(places[0], terms[0], 1)
    if terms == tuple(range(terms[0], terms[-1] + 1)):
        return parent.narrow(places[0], terms[0], len(terms))
    return parent.index_select(places[0], constant(terms, torch.long, parent.device))
