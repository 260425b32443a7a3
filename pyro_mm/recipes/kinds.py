"""Kinds of modalities, by which recipes choose likelihoods and networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..utils.arguments import check_name

Kind = Literal["class", "number", "bits", "grey", "counts", "vector", "tokens", "sequence", "array"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def modality_kind(batch: Batch, name: str) -> Kind:
    """Return the kind of a modality by its type, shape, values and lengths.

    ============= ========================================= ==========================================
    kind          values                                    likelihood
    ============= ========================================= ==========================================
    ``class``     integers ``(N,)``                         Categorical
    ``number``    floats ``(N,)``                           Normal
    ``bits``      booleans, or floats 0 and 1, ``(N, ..)``  Bernoulli
    ``grey``      other floats in [0, 1], ``(N, H, W)``     Bernoulli, whose probabilities the pixels are
    ``counts``    other whole floats from 0, ``(N, D)``     NegativeBinomial
    ``vector``    other floats ``(N, D)``                   Normal
    ``tokens``    integers ``(N, T)`` with lengths          :class:`~pyro_mm.conditionals.Tokens`
    ``sequence``  floats ``(N, T, D)`` with lengths         Normal
    ``array``     all other floats, such as colour images   Normal
    ============= ========================================= ==========================================

    Args:
        batch: rows that hold values of it.
        name: the modality.

    Raises:
        ValueError: the modality is unknown, without values in the batch, or of no such kind.
    """
    value = values_of(batch, name)
    if value.dim() == 1 and value.dtype != torch.bool:
        return "number" if value.is_floating_point() else "class"
    if value.dtype == torch.bool:
        if value.dim() == 1:
            raise ValueError(
                f"modality {name!r}: one boolean per row; make it a class, .long(), or bits, .reshape(-1, 1)"
            )
        return "bits"
    if not value.is_floating_point():
        if value.dim() == 2 and name in batch.lengths:
            return "tokens"
        raise ValueError(_integers_text(name, value))
    if value.dim() == 3 and name in batch.lengths:
        return "sequence"

    lowest = float(value.min())
    highest = float(value.max())
    if lowest >= 0 and bool(((value == 0) | (value == 1)).all()):
        return "bits"
    if value.dim() == 2:
        return "counts" if lowest >= 0 and bool((value == value.round()).all()) else "vector"
    return "grey" if value.dim() == 3 and lowest >= 0 and highest <= 1 else "array"


def check_kind(batch: Batch, name: str, kind: Kind) -> Kind:
    """Return a kind that was chosen for a modality.

    Raises:
        ValueError: the modality has no values of that kind.
    """
    value = values_of(batch, name)
    requirement = _REQUIREMENTS[kind]
    fits = requirement.dims is None or value.dim() in requirement.dims
    if not fits or not requirement.holds(value):
        raise ValueError(
            f"networks[{name!r}]: {kind!r} asks for {requirement.text}, and {name!r} is {value.dtype} of shape "
            f"{tuple(value.shape)}{_range_text(value)}"
        )
    return kind


def values_of(batch: Batch, name: str) -> Tensor:
    """Return the values of a modality. Raises a ValueError if it is unknown, or the batch holds no values of it."""
    check_batch(batch)
    check_name("modality", name, batch)
    if not batch.holds(name):
        raise ValueError(
            f"modality {name!r}: the batch holds no values of it, which the networks take their sizes from"
        )
    return batch[name]


def number_of_classes(batch: Batch, name: str) -> int:
    """Return the number of classes of a label, or of tokens: one more than the largest value in the batch.

    Raises:
        ValueError: the modality is unknown, or has a negative value.
    """
    check_name("modality", name, batch)
    value = batch[name]
    if int(value.min()) < 0:
        raise ValueError(
            f"modality {name!r}: classes and tokens are numbered from 0, and {int(value.min())} is among them. If it "
            f"marks rows without a value, say so: Batch(.., present={{{name!r}: values >= 0}})"
        )
    return int(value.max()) + 1


def end_token(batch: Batch, name: str) -> int | None:
    """Return the token that ends every string, and occurs nowhere else in them; None if there is none.

    Args:
        batch: the rows.
        name: a modality of tokens ``(N, T)``.
    """
    if name not in batch.lengths:
        return None
    present: Any = batch.present[name]
    tokens = batch[name][present]
    lengths = batch.lengths[name][present].long()
    if not len(tokens) or bool((lengths < 1).any()):
        return None
    last = tokens.gather(1, lengths[:, None] - 1)[:, 0]
    before = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None] - 1
    is_end = bool((last == last[0]).all()) and not bool((before & (tokens == last[0])).any())
    return int(last[0]) if is_end else None


class _Requirement(NamedTuple):
    """Values that a kind asks for.

    Attributes:
        text: in words.
        dims: numbers of dimensions of the values; None for any from 2.
        holds: True for values of the kind.
    """

    text: str
    dims: tuple[int, ...] | None
    holds: Callable[[Tensor], bool]


def _is_integer(value: Tensor) -> bool:
    return not value.is_floating_point() and value.dtype != torch.bool


def _is_probability(value: Tensor) -> bool:
    return value.dim() > 1 and (value.is_floating_point() or value.dtype == torch.bool) and _within(value, 0, 1)


def _is_count(value: Tensor) -> bool:
    return value.dtype != torch.bool and _within(value, 0) and bool((value == value.round()).all())


def _within(value: Tensor, low: float, high: float = float("inf")) -> bool:
    return bool((value >= low).all()) and bool((value <= high).all())


_REQUIREMENTS: Mapping[Kind, _Requirement] = {
    "class": _Requirement("integers from 0 of shape (N,)", (1,), lambda x: _is_integer(x) and _within(x, 0)),
    "number": _Requirement("floats of shape (N,)", (1,), Tensor.is_floating_point),
    "bits": _Requirement("booleans, or floats from 0 to 1, of shape (N, ..)", None, _is_probability),
    "grey": _Requirement("floats from 0 to 1 of shape (N, ..)", None, _is_probability),
    "counts": _Requirement("whole numbers from 0 of shape (N, D)", (2,), _is_count),
    "vector": _Requirement("floats of shape (N, D)", (2,), Tensor.is_floating_point),
    "tokens": _Requirement("integers from 0 of shape (N, T)", (2,), lambda x: _is_integer(x) and _within(x, 0)),
    "sequence": _Requirement("floats of shape (N, T, D)", (3,), Tensor.is_floating_point),
    "array": _Requirement("floats of shape (N, ..)", None, lambda x: x.dim() > 1 and x.is_floating_point()),
}


def _range_text(value: Tensor) -> str:
    """Return the range of values in words, empty for booleans."""
    return "" if value.dtype == torch.bool else f", from {float(value.min()):g} to {float(value.max()):g}"


def _integers_text(name: str, value: Tensor) -> str:
    """Return a sentence on integers whose kind their shape does not tell."""
    text = f"modality {name!r}: {value.dtype} of shape {tuple(value.shape)} may be several things. "
    if value.dim() == 2:
        return text + (
            f"Say which: networks={{{name!r}: 'counts'}} for counts, networks={{{name!r}: 'tokens'}} for strings of "
            "tokens, each drawn given those before it (tokens with lengths are read so without being told), or "
            ".float() for zeros and ones"
        )
    return text + (
        "Make it floats: grey or colour levels from 0 to 255 are x.float() / 255. For networks of your own give "
        f"{example_of_networks(name)}"
    )


def example_of_networks(name: str) -> str:
    """Return the argument by which networks of a modality are given, as an example."""
    return (
        f"networks={{{name!r}: mm.recipes.Networks(encoder=lambda out: .., decoder=lambda inputs: ..)}}: encoder(out) "
        "is a module from the values to (.., out), decoder(inputs) a conditional of them given (.., inputs)"
    )
