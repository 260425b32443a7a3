"""Find observed values whose shape is not that of their distribution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...batch.batch import Batch
from ...distributions.support import Support, support_of


def shape_mismatches(observed: dict[str, dict[str, Any]], few_rows: Batch) -> Iterator[str]:
    """Yield a sentence for each site observed at another modality's values, or at values of another shape than its own.

    Args:
        observed: observed site -> site of a trace.
        few_rows: the rows that the trace is of.
    """
    for name, site in observed.items():
        if name not in few_rows or not isinstance(site["value"], Tensor) or not few_rows.holds(name):
            continue
        if other := _values_of_another(name, site["value"], few_rows):
            yield f"{name}: the story observes it at the values of {other}, obs=batch[{other!r}]: take its own."
        elif mismatch := _mismatch(site, few_rows[name], few_rows.size):
            yield f"{name}: {mismatch}"


def _mismatch(site: Mapping[str, Any], values: Tensor, rows: int) -> str:
    """Return a sentence on values whose shape is not that of a site's distribution; empty if it is."""

    def with_n(shape: torch.Size) -> tuple[Any, ...]:
        return tuple("N" if size == rows else size for size in shape)

    fn = site["fn"]
    shape = with_n(values.shape)
    event = tuple(fn.event_shape)
    if not _event_fits(fn, site["value"]):
        text = f"one being {_shape_text(shape[1:])}, and its distribution is of event shape {_shape_text(event)}"
    elif not _rows_fit(site, rows):
        batch = _shape_text(with_n(fn.batch_shape))
        text = f"and its distribution is of batch shape {batch} and event shape {_shape_text(event)}"
    else:
        return ""
    hint = _shape_hint(shape[1:], event, support_of(fn))
    return f"its values are of shape {_shape_text(shape)}, {text}: they would be broadcast. {hint}"


def _values_of_another(name: str, value: Tensor, few_rows: Batch) -> str | None:
    """Return the modality whose values a site is observed at, if it is another one."""
    if value is few_rows[name] or (
        value.shape == few_rows[name].shape and torch.equal(value, few_rows[name].to(value.dtype))
    ):
        return None
    for other in few_rows.names:
        if other != name and few_rows.holds(other) and value is few_rows[other]:
            return other
    return None


def _event_fits(fn: Any, value: Tensor) -> bool:
    """Return True if a value has the event's shape, with a dimension of rows before it."""
    lead = value.dim() - len(fn.event_shape)
    return lead >= 1 and value.shape[lead:] == fn.event_shape


def _rows_fit(site: Mapping[str, Any], rows: int) -> bool:
    """Return True if a site in the data plate has one value per row, and none beyond its plates."""
    if not any(frame.name == "data" and frame.dim == -1 for frame in site["cond_indep_stack"]):
        return True
    batch = tuple(site["fn"].batch_shape)
    if batch and batch[-1] not in (1, rows):
        return True  # the pair has its rows from elsewhere than the batch, and no few of them show anything
    value_batch = tuple(site["value"].shape[: site["value"].dim() - site["fn"].event_dim])
    sizes = zip(reversed(value_batch), reversed(batch), strict=False)
    inside = all(size in (1, other) for size, other in sizes)
    return value_batch[-1] == rows and inside and len(value_batch) <= len(batch)


def _shape_text(shape: Sequence[Any]) -> str:
    """Return a shape as Python writes it, with "N" unquoted."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _shape_hint(value: tuple[Any, ...], event: tuple[int, ...], support: Support | None) -> str:
    """Return advice that makes the shape of one value and the event shape of its distribution agree."""
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
