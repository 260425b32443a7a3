"""Decoding for the terms of a stack that decode a modality, and for no others."""

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
    """Return ``decode(*parents)``, run for those terms of a stack that decode a modality.

    Args:
        name: the modality.
        decode: returns its distribution from the parents.
        parents: tensors, those that depend on a latent with a dimension of T terms.
        stack: the terms; None if there is no stack.
        size: the number of rows N.

    Returns:
        A distribution for all T terms, whose parameters are known for those that decode the modality.
    """
    terms = stack.decodes.get(name, ()) if stack is not None else ()
    if stack is None or stack.terms in (1, len(terms)) or size in (1, stack.terms):
        return decode(*parents)

    dims = [_possible_term_dims(parent, stack, size) for parent in parents]
    if any(len(found) > 1 for found in dims):
        return decode(*parents)  # for all terms, which is only slower

    d = decode(*(_select_terms(parent, terms, found) for parent, found in zip(parents, dims, strict=True)))
    if len(d.batch_shape) < -stack.dim or d.batch_shape[stack.dim] != len(terms):
        return d  # no parent depends on the term
    return Scatter(d, terms, stack.terms, stack.dim)


def _possible_term_dims(parent: Tensor, stack: TermStack, size: int) -> list[int]:
    """Return the dimensions of a parent that may be the terms', by size and by distance from the rows.

    Dimensions of particles and of enumerated sites may stand to the left of it, and event dimensions to the right.
    """
    distance = -stack.dim - 1
    shape = parent.shape
    found = [i for i in range(len(shape) - distance) if shape[i] == stack.terms and shape[i + distance] == size]
    # as many particles as rows, or a covariate that begins with its rows: these cannot be distinguished either
    return [*found, 0] if found and found[0] > 0 and shape[0] == size else found


def _select_terms(parent: Tensor, terms: tuple[int, ...], dims: list[int]) -> Tensor:
    """Return the entries of some terms in the dimension ``dims[0]``; without one, the parent as it is."""
    if not dims:
        return parent
    if len(terms) == 1:
        return parent.narrow(dims[0], terms[0], 1)
    if terms == tuple(range(terms[0], terms[-1] + 1)):
        return parent.narrow(dims[0], terms[0], len(terms))
    return parent.index_select(dims[0], constant(terms, torch.long, parent.device))
