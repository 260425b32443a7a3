"""Rows of several batches as one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .batch import Batch


def join_rows(rows: Sequence[tuple[Batch, int]]) -> Batch:
    """Return rows of some batches as one batch, in their order.

    Args:
        rows: a batch, and the place of a row in it, for every row.

    Raises:
        ValueError: batches with other modalities, covariates or lengths, or with values of other shapes or types.
    """
    batches: dict[int, Batch] = {}
    places: dict[int, list[int]] = {}
    order: dict[int, list[int]] = {}
    for number, (batch, place) in enumerate(rows):
        key = id(batch)
        batches[key] = batch
        places.setdefault(key, []).append(place)
        order.setdefault(key, []).append(number)
    parts = [batches[key][torch.tensor(chosen)].read() for key, chosen in places.items()]
    if len(parts) == 1:
        return parts[0].standalone()
    numbers = torch.tensor([number for each in order.values() for number in each])
    return join_batches(parts)[numbers.argsort()]


def join_batches(parts: Sequence[Batch]) -> Batch:
    """Return the rows of several batches as one batch, one batch after the other.

    Args:
        parts: batches of the same modalities, covariates and lengths, with values in memory.

    Raises:
        ValueError: batches with other modalities, covariates or lengths, or with values of other shapes or types.
    """
    first = parts[0]
    for part in parts[1:]:
        check_same_columns(first, part)
    values: dict[str, Any] = {}
    for name in first.names:
        example = next((part[name] for part in parts if part.holds(name)), None)
        if example is None:
            values[name] = None
            continue
        filler = example[:1]
        columns = [part[name] if part.holds(name) else filler.expand(part.size, *filler.shape[1:]) for part in parts]
        values[name] = _cat(f"modality {name!r}", columns)
    present = {name: torch.cat([part.present[name] for part in parts]) for name in first.names}
    covariates = _cat_all("covariate", [part.covariates for part in parts])
    lengths = _cat_all("lengths of", [part.lengths for part in parts])
    return Batch(values, present, covariates, lengths)


def check_same_columns(first: Batch, other: Batch) -> None:
    """Raise a ValueError unless two batches have the same modalities, covariates and lengths."""
    pairs = {
        "modalities": (first.names, other.names),
        "covariates": (first.covariates, other.covariates),
        "lengths": (first.lengths, other.lengths),
    }
    for what, (here, there) in pairs.items():
        if set(here) != set(there):
            raise ValueError(
                f"expected batches with the same {what}, got {', '.join(here) or 'none'} in one and "
                f"{', '.join(there) or 'none'} in another"
            )


def _cat_all(what: str, columns: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: _cat(f"{what} {name!r}", [each[name] for each in columns]) for name in columns[0]}


def _cat(what: str, columns: Sequence[Tensor]) -> Tensor:
    """Return columns one after the other. Raises a ValueError if rows have other shapes or types."""
    kinds = {(tuple(column.shape[1:]), column.dtype) for column in columns}
    if len(kinds) > 1:
        listed = " and ".join(f"{str(dtype).removeprefix('torch.')} {shape}" for shape, dtype in sorted(kinds, key=str))
        raise ValueError(f"{what}: expected rows of one shape and type, got {listed}")
    return torch.cat(list(columns))
