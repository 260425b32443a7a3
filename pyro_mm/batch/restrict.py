"""Decoding for some terms of a stack only: a distribution known on part of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor

from .distributions import Composite, broadcast
from .presence import constant


class Scatter(Composite):
    """A distribution known on some entries of one batch dimension, scoring zero on the others.

    ``log_prob(x)[index[i]] = base.log_prob(x[index[i]])[i]`` along that dimension, and 0 elsewhere. It only
    scores: the other entries have nothing to draw from. Where every entry is known, use ``base`` itself.

    Args:
        base: a distribution whose batch dimension ``dim`` has size ``len(index)``.
        index: the distinct entries that ``base`` stands for.
        size: the size of that dimension in this distribution.
        dim: negative, counted from the right of the batch shape.

    Raises:
        ValueError: the sizes do not fit.
    """

    has_rsample = False

    def __init__(self, base: TorchDistribution, index: tuple[int, ...], size: int, dim: int) -> None:
        shape = list(base.batch_shape)
        if not -len(shape) <= dim < 0 or shape[dim] != len(index):
            raise ValueError(f"expected size {len(index)} at batch dim {dim}, got batch shape {shape}")
        if not index or len(set(index)) < len(index) or not 0 <= min(index) <= max(index) < size:
            raise ValueError(f"expected distinct entries of range({size}), one at least; got {index}")
        shape[dim] = size
        self.base, self.index, self.size, self.dim = base, tuple(index), size, dim
        super().__init__(Size(shape), base)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        raise NotImplementedError("Scatter only scores: outside of its index there is nothing to draw from")

    def log_prob(self, value: Tensor) -> Tensor:
        """The log-density of ``value``, which lacks the dimension, or has 1 or ``size`` entries there."""
        dim = self.dim - self.event_dim
        if value.dim() >= -dim and value.shape[dim] != 1:
            if value.shape[dim] != self.size:
                raise ValueError(f"expected 1 or {self.size} entries at dim {dim}, got shape {tuple(value.shape)}")
            # Unbound and stacked: an index tensor would be copied from the host at every call.
            entries = value.unbind(dim)
            value = torch.stack([entries[i] for i in self.index], dim)
        log_prob = self.base.log_prob(value)
        known = dict(zip(self.index, log_prob.unbind(self.dim), strict=True))
        zero = torch.zeros_like(known[self.index[0]])
        full = torch.stack([known.get(i, zero) for i in range(self.size)], self.dim)
        return broadcast(full, self.batch_shape)


@dataclass(frozen=True)
class Stack:
    """How an objective stacks its terms to the left of a story's plates.

    ``decodes[m]`` are the terms, of ``terms``, that decode modality m; ``dim`` is the batch dimension of the terms.
    """

    decodes: Mapping[str, tuple[int, ...]]
    terms: int = 1
    dim: int = -2


def restricted(
    name: str, decode: Callable[..., Any], parents: tuple[Tensor, ...], stack: Stack | None, size: int
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


def _places(parent: Tensor, stack: Stack, size: int) -> list[int]:
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
