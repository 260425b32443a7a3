"""Checks that observed values lie in the support of the distribution that a story gives them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from .token_sequence import TokenSequence, is_string

VALUES_PER_CHUNK = 2**22  # numbers compared at once
LISTED_ROWS = 5  # rows in a message
WRAPPERS = (torch.distributions.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)
COUNT_CONSTRAINT = type(constraints.nonnegative_integer)
LOWER_BOUND_CONSTRAINT = type(constraints.nonnegative)
INTERVAL_CONSTRAINT = type(constraints.integer_interval(0, 1))


LEVEL_TOLERANCE = 0.02  # distance from a level, in units of the distance of levels
LOOKED_AT = 256  # values of a row that are looked at for repetitions


class OffGrid(constraints.Constraint):
    """Numbers between two bounds, of which most in a row differ from each other: no grey levels.

    A density of a flow grows without bound on a grid of levels, since it can put all of its mass there.

    Args:
        low, high: the bounds; infinite for none.
    """

    def __init__(self, low: float = -math.inf, high: float = math.inf) -> None:
        self.low = low
        self.high = high
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return the values that are scored, booleans of their shape; in a row on a grid, none."""
        inside = (value >= self.low) & (value <= self.high)
        if value.dim() < 2:
            return inside
        flat = value.reshape(len(value), -1)
        some = flat[:, :: -(-flat.shape[1] // LOOKED_AT)].sort(-1).values
        repeated = (some[:, 1:] == some[:, :-1]).float().mean(-1) > 0.5
        return inside & ~repeated.reshape(-1, *[1] * (value.dim() - 1))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OffGrid) and (self.low, self.high) == (other.low, other.high)

    def __hash__(self) -> int:
        return hash((self.low, self.high))

    def __str__(self) -> str:
        bounds = f"from {self.low:g} to {self.high:g} " if math.isfinite(self.low) else ""
        return f"real numbers {bounds}that lie on no grid of levels"


class OnGrid(constraints.Constraint):
    """The multiples of 1 / (L - 1) from 0 to 1: L levels.

    Args:
        levels: L.
    """

    is_discrete = True

    def __init__(self, levels: int) -> None:
        self.levels = levels
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Return the values that lie on a level up to ``LEVEL_TOLERANCE``: booleans of their shape."""
        level = value * (self.levels - 1)
        inside = (value >= 0) & (value <= 1)
        return inside & ((level - level.round()).abs() <= LEVEL_TOLERANCE)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OnGrid) and self.levels == other.levels

    def __hash__(self) -> int:
        return hash(self.levels)

    def __str__(self) -> str:
        return f"the {self.levels} multiples of 1/{self.levels - 1} from 0 to 1"


@dataclass(frozen=True)
class Support:
    """The values that a distribution scores.

    Attributes:
        family: the distribution's name.
        low: the least value; minus infinity for none.
        high: the largest value; infinity for none.
        whole: True if only whole numbers are scored.
        bits: True for a distribution of bits whose log-density is also defined between 0 and 1.
        other: a constraint of torch to check in place of the bounds; None for the bounds.
        end: the token that ends a string; None for values that are no strings, or do not say where they end.
    """

    family: str
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    bits: bool = False
    other: Any = None
    end: int | None = None

    def __str__(self) -> str:
        if self.bits:
            return "numbers from 0 to 1"
        kind = "whole numbers" if self.whole else "finite numbers"
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"{kind} from {self.low:g} to {self.high:g}"
        if math.isfinite(self.low):
            return f"{kind} from {self.low:g} on"
        return kind if self.other is None else _constraint_name(self.other)


def support_of(fn: Any) -> Support | None:
    """Return the support of a distribution; None if it is unknown, or depends on the row or on a latent."""
    fn = unwrap(fn)
    family = type(fn).__name__.lstrip("_")
    try:
        constraint = fn.support
    except (NotImplementedError, AttributeError):
        return None
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    if constraint is constraints.boolean:
        return Support(family, 0, 1, bits=family == "Bernoulli", whole=family != "Bernoulli")
    if isinstance(constraint, INTERVAL_CONSTRAINT):
        bounds = _number(constraint.lower_bound), _number(constraint.upper_bound)
        end = fn.end if isinstance(fn, TokenSequence) else None
        return None if None in bounds else Support(family, *bounds, whole=True, end=end)  # type: ignore[arg-type]
    if isinstance(constraint, COUNT_CONSTRAINT):
        low = _number(constraint.lower_bound)
        return None if low is None else Support(family, low, whole=True)
    if type(constraint) is type(constraints.real):
        return Support(family)
    if isinstance(constraint, LOWER_BOUND_CONSTRAINT):
        low = _number(constraint.lower_bound)
        return None if low is None else Support(family, low)
    if _has_tensors(constraint):
        return None  # bounds that depend on the row or on a latent
    return Support(family, other=constraint)


def unwrap(fn: Any) -> Any:
    """Return the distribution inside of masks, event dimensions, expansions and scattered terms."""
    while True:
        inner = fn.base_dist if isinstance(fn, WRAPPERS) else getattr(fn, "base", None)
        if not isinstance(inner, torch.distributions.Distribution):
            return fn
        fn = inner


def _number(bound: Any) -> float | None:
    """Return a bound as a number; None if it is a tensor with several."""
    if isinstance(bound, Tensor):
        return float(bound) if bound.numel() == 1 else None
    return float(bound)


def _has_tensors(constraint: Any) -> bool:
    """Return True if a constraint has a bound for each of several elements."""
    values = getattr(constraint, "__dict__", {}).values()
    return any(isinstance(x, Tensor) and x.numel() > 1 for x in values)


def _constraint_name(constraint: Any) -> str:
    """Describe the values that a constraint allows."""
    if isinstance(constraint, OffGrid | OnGrid):
        return str(constraint)
    low, high = (getattr(constraint, f"{end}_bound", None) for end in ("lower", "upper"))
    if low is not None and high is not None:
        return f"numbers from {float(low):g} to {float(high):g}"
    if low is not None:
        return f"numbers above {float(low):g}"
    return f"values of type {str(constraint).split('(')[0].strip('_')}"


def describe_values_outside(name: str, values: Tensor, present: Tensor | bool, support: Support) -> str | None:
    """Describe the rows whose values a distribution does not score.

    Args:
        name: the modality.
        values: ``(N, *event)``.
        present: the rows that have it, ``(N,)``, or True or False for all.
        support: the values that its distribution scores.

    Returns:
        An error message with the first rows and a way to mend them; None if all rows are scored.
    """
    if present is False or not values.numel() or values.is_complex():
        return None
    if _fact(values, ("inside", support), lambda: _all_inside(values, support)):
        return None
    outside = _rows_outside(values, support)
    if isinstance(present, Tensor):
        outside &= present.to(outside.device)
    rows = outside.nonzero()[:, 0].tolist()
    if not rows:
        return None

    bad_values = values[outside].double()
    low = bad_values.min().item()
    high = bad_values.max().item()
    one_or_range = f"from {low:g} to {high:g}" if low != high else f"{low:g}"
    found = "NaN" if math.isnan(low) else one_or_range
    listed = _list_rows(rows)
    return (
        f"{name}: {support.family} scores {support}, and {len(rows)} of {len(values)} rows ({listed}) have others, "
        f"their values being {found}. {_suggestion(support, low, high)}"
    )


def describe_no_strings(name: str, tokens: Tensor, lengths: Tensor, present: Tensor | bool, end: int) -> str | None:
    """Describe the rows whose tokens are no string: the end token is not their last one, or not the only one.

    Args:
        name: the modality.
        tokens: integers ``(N, T)``.
        lengths: numbers of tokens, ``(N,)``.
        present: the rows that have them, ``(N,)``, or True or False for all.
        end: the token that ends a string.

    Returns:
        An error message with the first rows and a way to mend them; None if all rows have strings.
    """
    if present is False:
        return None
    valid = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    wrong = ~is_string(tokens, valid, end)
    if isinstance(present, Tensor):
        wrong &= present.to(wrong.device)
    rows = wrong.nonzero()[:, 0].tolist()
    if not rows:
        return None
    return (
        f"{name}: strings end with the token {end}, which counts in their lengths, or have {tokens.shape[1]} tokens; "
        f"{len(rows)} of {len(tokens)} rows ({_list_rows(rows)}) have tokens behind it, or end without it, and their "
        "probability is 0. Append the token to each string, and count it in lengths; or leave out end=, for strings of "
        "given lengths."
    )


def _list_rows(rows: list[int]) -> str:
    """Return the numbers of the first rows."""
    return ", ".join(map(str, rows[:LISTED_ROWS])) + (", .." if len(rows) > LISTED_ROWS else "")


def has_fractions(values: Tensor, present: Tensor | bool) -> bool:
    """Return True if some values lie strictly between 0 and 1, unless ``present`` is False."""
    if present is False or not values.is_floating_point():
        return False
    return _fact(values, ("fractions",), lambda: any(bool(((x > 0) & (x < 1)).any()) for x in _chunks(values)))


def _suggestion(support: Support, low: float, high: float) -> str:
    """Suggest a way to mend values between ``low`` and ``high`` that are outside of a support."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "Rows with values that are not finite are to be left out, or marked as missing by NaN or present=."
    if support.bits:
        if high > 1 and low >= 0:
            scale = "divide by 255"
        else:
            scale = "take (x + 1) / 2" if low >= -1 and high <= 1 else "rescale"
        return f"Pixels are to lie in [0, 1]: {scale}, or take a Normal for real numbers."
    if support.whole and math.isfinite(support.high):
        return (
            f"Classes are counted from 0, and the network has {support.high - support.low + 1:g} outputs: give it "
            "more, or renumber the labels; -1 for a missing label is to be said by present=."
        )
    if support.whole:
        return "Give the counts as they are, neither scaled nor their logarithms, or take a Normal for real numbers."
    if isinstance(support.other, OffGrid) and support.other.low <= low and high <= support.other.high:
        return (
            "Values of a grid, such as grey levels, have no density: add noise to them, "
            "datasets.dequantize(batch, name, levels), in an evaluation once, in training by fit(transform=..)."
        )
    if isinstance(support.other, OnGrid):
        return "Divide grey levels by the largest one, and add no noise: it is a latent of this story."
    return "Transform the values, or take a family that scores them."


def _all_inside(values: Tensor, support: Support) -> bool:
    """Return True if every value, missing rows included, is finite and in a support."""
    for x in _chunks(values):
        if support.other is not None:
            if not bool(support.other.check(x).all()) or (x.is_floating_point() and not bool(x.isfinite().all())):
                return False
            continue
        if x.dtype == torch.bool:
            x = x.to(torch.uint8)
        least, most = (extreme.item() for extreme in x.aminmax())
        if not (support.low <= least and most <= support.high) or math.isinf(least) or math.isinf(most):
            return False
        if support.whole and x.is_floating_point() and not bool((x == x.floor()).all()):
            return False
    return True


def _rows_outside(values: Tensor, support: Support) -> Tensor:
    """Return the rows with a value outside of a support: booleans ``(N,)``."""
    if support.other is not None:
        is_inside = support.other.check(values)
    else:
        is_inside = (values >= support.low) & (values <= support.high)
    rows_inside: Tensor = is_inside.reshape(len(values), -1).all(1)
    if values.is_floating_point():
        flat = values.reshape(len(values), -1)
        if support.whole:
            rows_inside &= (flat == flat.floor()).all(1)
        rows_inside &= flat.isfinite().all(1)
    return ~rows_inside


def _chunks(values: Tensor) -> tuple[Tensor, ...]:
    """Split values ``(N, *event)`` into blocks of rows, about ``VALUES_PER_CHUNK`` numbers each."""
    rows = max(1, VALUES_PER_CHUNK // max(1, values[0].numel()))
    blocks: tuple[Tensor, ...] = values.detach().split(rows)
    return blocks


# id of a tensor -> a weak reference to it, its version, and facts that hold for that version
_facts_by_id: dict[int, tuple[weakref.ref[Tensor], int, dict[Any, bool]]] = {}


def _fact(values: Tensor, key: Any, compute: Callable[[], bool]) -> bool:
    """Return a fact about a tensor, computed once until the tensor is written to.

    Args:
        values: the tensor.
        key: names the fact.
        compute: returns it.
    """
    number = id(values)
    ref, version, facts = _facts_by_id.get(number, (None, -1, {}))
    if ref is None or ref() is not values or version != _version(values):
        facts = {}
        ref = weakref.ref(values, lambda dead, number=number: _forget(number, dead))  # type: ignore[misc]
        _facts_by_id[number] = ref, _version(values), facts
    if key not in facts:
        facts[key] = compute()
    return facts[key]


def _forget(number: int, dead: Any) -> None:
    """Remove the facts of a tensor that no longer exists.

    Args:
        number: its id, which another tensor may have by now.
        dead: the weak reference to it.
    """
    if number in _facts_by_id and _facts_by_id[number][0] is dead:
        del _facts_by_id[number]


def _version(values: Tensor) -> int:
    """Return how often a tensor was written to; 0 for a tensor of inference mode, which has no count."""
    return 0 if values.is_inference() else values._version
