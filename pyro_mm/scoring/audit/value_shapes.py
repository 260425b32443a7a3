"""Find observed values whose shape is not that of their distribution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...batch.batch import Batch
from ...distributions.support import Support, support_of


def shape_mismatches(seen: dict[str, dict[str, Any]], few: Batch) -> Iterator[str]:
    """Observed values that are another modality's, or whose shape is not their distribution's."""
    for name, site in seen.items():
        if name not in few or not isinstance(site["value"], Tensor) or not few.holds(name):
            continue
        if other := _values_of_another(name, site["value"], few):
            yield f"{name}: the story observes it at the values of {other}, obs=batch[{other!r}]: take its own."
            continue
        fn, value = site["fn"], site["value"]
        shape = tuple("N" if size == few.size else size for size in few[name].shape)
        if not _event_fits(fn, value):
            event = _text(tuple(fn.event_shape))
            said = f"one being {_text(shape[1:])}, and its distribution is of event shape {event}"
        elif not _rows_fit(site, few.size):
            batch = tuple("N" if size == few.size else size for size in fn.batch_shape)
            said = (
                f"and its distribution is of batch shape {_text(batch)} and event shape {_text(tuple(fn.event_shape))}"
            )
        else:
            continue
        mend = _shape_hint(shape[1:], tuple(fn.event_shape), support_of(fn))
        yield f"{name}: its values are of shape {_text(shape)}, {said}: they would be broadcast. {mend}"


def _values_of_another(name: str, value: Tensor, few: Batch) -> str | None:
    """The modality whose values a site has, where these are not its own."""
    if value is few[name] or (value.shape == few[name].shape and torch.equal(value, few[name].to(value.dtype))):
        return None
    for other in few.names:
        if other != name and few.holds(other) and value is few[other]:
            return other
    return None


def _event_fits(fn: Any, value: Tensor) -> bool:
    """Return True if a value has the event's shape, with a dimension of rows before it."""
    lead = value.dim() - len(fn.event_shape)
    return lead >= 1 and value.shape[lead:] == fn.event_shape


def _rows_fit(site: dict[str, Any], rows: int) -> bool:
    """Return True if a site in the data plate has one value per row, and none beyond its plates."""
    if not any(frame.name == "data" and frame.dim == -1 for frame in site["cond_indep_stack"]):
        return True
    batch = tuple(site["fn"].batch_shape)
    if batch and batch[-1] not in (1, rows):
        return True  # a pair that knows of its rows from elsewhere cannot be judged on a few of them
    given = tuple(site["value"].shape[: site["value"].dim() - site["fn"].event_dim])
    inside = all(one in (1, two) for one, two in zip(reversed(given), reversed(batch), strict=False))
    return given[-1] == rows and inside and len(given) <= len(batch)


def _text(shape: Sequence[Any]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _shape_hint(value: tuple[Any, ...], event: tuple[int, ...], support: Support | None) -> str:
    """Say what makes values and distribution fit."""
    if value == () and event == (1,):
        return "Give one number per row as (N, 1), values[:, None]; or the decoder event_shape=()."
    if value == (1,) and event == ():
        return "Give one class or number per row as (N,), values[:, 0]."
    if sorted(map(str, value)) == sorted(map(str, event)) and value != event:
        return "Are two dimensions transposed?"
    if len(value) == 1 and event == () and support is not None and support.family == "Categorical":
        return "Give one class per row as (N,), of one-hot values values.argmax(-1)."
    if value and event == ():
        return f"Declare the dimensions of one value: .to_event({len(value)})?"
    return "Give the decoder the event_shape of one value, and its network as many outputs."
