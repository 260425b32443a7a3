"""The site of a modality in a story: observed where it is present, drawn where it is missing and used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from ..handlers.deferred import LazyTensor
from ..handlers.plates import plate_shape, sample_in_plates
from ..utils.arguments import describe
from ..utils.network_calls import in_scoring_type
from .context import Context
from .masks import Presence, add_event_dims
from .restrict import decode_for_terms


class Modality(NamedTuple):
    """A modality of a batch, as a story observes it.

    Attributes:
        name: its name, and that of the site.
        values: ``(N, *event)``, with filler where it is missing; None if it is missing in every row.
        mask: the rows, or the terms and rows, that show it.
        size: the number of rows N.
    """

    name: str
    values: Tensor | None
    mask: Presence
    size: int


def observe(modality: Modality, decode: Callable[..., Any], parents: tuple[Tensor, ...], context: Context) -> Tensor:
    """Make the site of a modality, and return its values, with draws in place of missing ones.

    Args:
        modality: the name, values and mask.
        decode: returns the distribution from the parents. It runs only where that is needed.
        parents: tensors whose leading dimensions are those of the plates.
        context: the term stack and callbacks of the pass.

    Returns:
        ``(.., N, *event)``; drawn at the first use, if at all.
    """
    draw = _drawer(modality, context)
    if modality.mask is False:
        value = _observe_missing(modality, decode, parents, context, draw)
    else:
        value = _observe_present(modality, decode, parents, context, draw)

    on_use = context.on_use
    if on_use is None:
        return value

    def use() -> Tensor:
        on_use(modality.name)
        return value

    return LazyTensor(use)


def _drawer(modality: Modality, context: Context) -> Callable[[Any], Tensor]:
    """Return the function that draws the modality from its distribution, in the plates around."""
    plates = () if modality.mask is True else plate_shape()

    def draw(d: Any) -> Tensor:
        if context.draw_missing is None:
            return sample_in_plates(d, plates)
        return context.draw_missing(modality.name, d, plates)

    return draw


def _observe_missing(
    modality: Modality,
    decode: Callable[..., Any],
    parents: tuple[Tensor, ...],
    context: Context,
    draw: Callable[[Any], Tensor],
) -> Tensor:
    """Make the site of a modality that no row shows; within an objective it makes none."""
    if context.stack is not None or context.values_only:
        return LazyTensor(lambda: draw(decode(*parents)))

    d = _check_distribution(modality.name, decode(*parents))
    value: Tensor = pyro.sample(modality.name, d.mask(False), obs=draw(d), infer={"is_auxiliary": True})
    return value


def _observe_present(
    modality: Modality,
    decode: Callable[..., Any],
    parents: tuple[Tensor, ...],
    context: Context,
    draw: Callable[[Any], Tensor],
) -> Tensor:
    """Make the site of a modality that some or all rows show."""
    name, values, mask, size = modality
    assert values is not None

    def complete() -> Tensor:
        d = decode(*parents)
        there = add_event_dims(mask, d.event_dim)  # type: ignore[arg-type]
        return torch.where(there, values, draw(d))

    if context.values_only:
        return values if mask is True else LazyTensor(complete)

    d = _check_distribution(name, decode_for_terms(name, decode, parents, context.stack, size))
    scored = in_scoring_type(d, values)
    observed: Tensor = pyro.sample(name, d if mask is True else d.mask(mask), obs=scored)
    if observed is not scored:  # drawn anew, as Predictive does
        return observed
    return LazyTensor(complete) if isinstance(mask, Tensor) else values


def _check_distribution(name: str, d: Any) -> Any:
    """Return a distribution. Raises a TypeError that names the site for anything else."""
    if isinstance(d, torch.distributions.Distribution):
        return d
    raise TypeError(
        f"site {name!r}: expected a distribution, or a module or function that gives one, got {describe(d)}"
    )
