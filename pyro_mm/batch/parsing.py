"""Parse what users hand over as data: NumPy, pandas and their like, with their marks for missing values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..utils.arguments import check_mapping
from .arrays import absent_rows, read_array
from .keywords import Covariates
from .masks import Presence, add_event_dims
from .steps import fill_padding, lengths_of_missing, valid_steps
from .stored import StoredColumn, is_stored

RESERVED = {"data", "particles", "terms"}  # names of plates


class Column(NamedTuple):
    """The values of a modality.

    Attributes:
        values: ``(N, *event)``, a tensor, or a :class:`~pyro_mm.batch.stored.StoredColumn`.
        complete: the rows in which nothing is missing, boolean ``(N,)``.
        lost: how many numbers each row has beside a missing one, ``(N,)``; None if no row has any.
        counts: how many numbers each row has, ``(N,)``; None if ``lost`` is.
        lengths: numbers of valid steps ``(N,)``; None if they are not given.
    """

    values: Any
    complete: Tensor
    lost: Tensor | None = None
    counts: Tensor | None = None
    lengths: Tensor | None = None


class Columns(NamedTuple):
    """The arguments of a batch as tensors.

    Attributes:
        size: the number of rows N.
        values: modality -> ``(N, *event)``, with filler where it is missing; without those that hold no value at all.
        masks: modality -> boolean ``(N,)``, or True or False for all rows.
        covariates: name -> ``(N, ...)``.
        lengths: modality -> int64 ``(N,)``.
        warnings: texts on numbers that are lost, to be shown to the user.
    """

    size: int
    values: dict[str, Any]
    masks: dict[str, Presence]
    covariates: dict[str, Tensor]
    lengths: dict[str, Tensor]
    warnings: list[str]


@torch.inference_mode(False)
def parse(values: Any, present: Any, covariates: Any, lengths: Any) -> Columns:
    """Parse the arguments of :class:`~pyro_mm.batch.batch.Batch`.

    Raises:
        ValueError, TypeError: unequal numbers of rows, an unknown name, a NaN in a covariate, tensors on several
            devices, or a dtype, container or mask shape that cannot be used.
    """
    values = check_mapping("values", values, "arrays")
    present = check_mapping("present", {} if present is None else present, "masks")
    lengths = check_mapping("lengths", {} if lengths is None else lengths, "numbers of valid steps")
    covariates = check_mapping("covariates", {} if covariates is None else covariates, "arrays")
    if reserved := RESERVED & set(values):
        raise ValueError(f"modality {reserved.pop()!r}: a plate has that name, {', '.join(map(repr, RESERVED))} have")

    for name in [*present, *lengths]:
        if name not in values:
            raise ValueError(f"unknown modality {name!r}: this batch holds {list(values)}")
    columns = {name: read_modality(name, value, lengths.get(name)) for name, value in values.items()}
    known = Covariates({name: read_covariate(name, value) for name, value in covariates.items()})
    size = _common_size(columns, known)

    filled: dict[str, Any] = {}
    masks: dict[str, Presence] = {}
    lost: list[str] = []
    for name, column in columns.items():
        mask = read_mask(name, present.get(name), size)
        if column is None:
            masks[name] = False
            continue
        mask = mask.to(column.complete.device)
        if text := describe_lost_numbers(name, column, mask):
            lost.append(text)
        if isinstance(column.values, StoredColumn):
            masks[name] = mask if bool(mask.any()) and not bool(mask.all()) else bool(mask.all())
            filled[name] = column.values.with_rows(masks[name], column.lengths)
            continue
        complete = column.complete & mask
        numbers = column.values
        if column.lengths is not None:
            numbers = fill_padding(numbers, column.lengths, complete)
        masks[name], filled[name] = _fill(numbers, complete)

    read: dict[str, Tensor] = {}
    for name, value in lengths.items():
        column = columns[name]
        if column is None or column.lengths is None:
            read[name] = read_lengths(name, value, size, None)
        else:
            read[name] = lengths_of_missing(column.lengths, masks[name], column.values.shape[1])
    _check_one_device([*filled.values(), *known.values()])
    return Columns(size, filled, masks, known, read, lost)


def _common_size(columns: Mapping[str, Column | None], covariates: Mapping[str, Tensor]) -> int:
    """Return the number of rows. Raises a ValueError if there are several numbers, or none."""
    sizes = {name: len(column.values) for name, column in columns.items() if column is not None}
    sizes |= {f"covariate {name}": len(x) for name, x in covariates.items()}
    if not sizes:
        raise ValueError("a batch needs at least one modality with values; see Batch.empty for rows without any")
    if len(set(sizes.values())) > 1:
        raise ValueError(f"expected as many rows in every modality, got {sizes}")
    return next(iter(sizes.values()))


def _fill(value: Tensor, mask: Tensor) -> tuple[Presence, Tensor]:
    """Return the mask of the rows that have a value, and the values, with a copy of one as filler."""
    if bool(mask.all()):
        return True, value
    if not bool(mask.any()):
        return False, torch.nan_to_num(value)
    return mask, torch.where(add_event_dims(mask, value.dim() - 1), value, value[mask][0])


def _check_one_device(tensors: Iterable[Any]) -> None:
    """Raise a ValueError unless all tensors are on one device."""
    devices = {str(x.device) for x in tensors}
    if len(devices) > 1:
        raise ValueError(f"expected all tensors of a batch on one device, got {', '.join(sorted(devices))}")


def read_modality(name: str, value: Any, lengths: Any = None) -> Column | None:
    """Return the values of a modality, and the rows that have them; None if no row has.

    Missing are ``None``, pandas' ``NA``, NaN, and entries that a mask of ``numpy.ma`` hides. Nothing is missing, and
    nothing is read, behind the end of a sequence; but a row that is ``None`` is missing, whatever its length.

    Args:
        name: the modality.
        value: an array, or a sequence of rows.
        lengths: numbers of valid steps, ``(N,)``; None for values that are no sequences, or have all steps.

    Raises:
        TypeError: no numbers, or rows of several shapes.
        ValueError: no row, rows without numbers, or lengths that are none of these values.
    """
    what = f"modality {name!r}"
    if value is None:
        return None
    if is_stored(value):
        return _read_stored(name, StoredColumn(what, value), lengths)
    values, missing = read_array(what, value)
    if values is None:
        return None
    if values.dim() == 0:
        raise ValueError(f"{what}: expected shape (N, ...), got a single number")
    if values.numel() == 0:
        raise ValueError(f"{what}: expected at least one row, of at least one number, got shape {tuple(values.shape)}")

    steps: Tensor | None = None
    if lengths is not None:
        if values.dim() < 2:
            raise ValueError(f"lengths of {name!r}: expected sequences (N, T, ..), got shape {tuple(values.shape)}")
        steps = read_lengths(name, lengths, len(values), values.shape[1]).to(values.device)
        read = valid_steps(steps, values.shape[1]) | absent_rows(value, len(values)).to(values.device)[:, None]
        missing = None if missing is None else missing.expand(values.shape) & add_event_dims(read, values.dim() - 2)
    if missing is None:
        return Column(values, torch.ones(len(values), dtype=torch.bool, device=values.device), lengths=steps)

    each = missing.expand(values.shape).flatten(1) if values.dim() > 1 else missing[:, None]
    num_missing = each.sum(1)
    complete = num_missing == 0
    counts = each.shape[1] - num_missing
    lost = torch.where(complete, 0, counts)
    if not bool(lost.any()):
        return Column(values, complete, lengths=steps)
    return Column(values, complete, lost, counts, steps)


def _read_stored(name: str, column: StoredColumn, lengths: Any) -> Column:
    """Return values in a file, all of whose rows are taken for complete until they are read."""
    steps: Tensor | None = None
    if lengths is not None:
        if column.dim() < 2:
            raise ValueError(f"lengths of {name!r}: expected sequences (N, T, ..), got shape {tuple(column.shape)}")
        steps = read_lengths(name, lengths, len(column), column.shape[1])
    return Column(column, torch.ones(len(column), dtype=torch.bool), lengths=steps)


def read_covariate(name: str, value: Any) -> Any:
    """Return a covariate ``(N, ...)``. Raises a ValueError if a number is missing, a TypeError if there is none."""
    if is_stored(value):
        return StoredColumn(f"covariate {name!r}", value)
    return _read_complete(
        f"covariate {name!r}", value, "impute it, leave those rows out, or make it a modality of the story"
    )


def _read_complete(what: str, value: Any, advice: str) -> Tensor:
    """Return numbers ``(N, ...)`` of which none may be missing; ``advice`` ends the message if one is."""
    if value is None:
        raise TypeError(f"{what}: expected numbers, got None")
    values, missing = read_array(what, value)
    if values is None or values.dim() == 0:
        raise ValueError(f"{what}: expected shape (N, ...), got {'no number' if values is None else 'a single one'}")
    if missing is not None:
        rows = int(missing.flatten(1).any(1).sum()) if missing.dim() > 1 else int(missing.sum())
        raise ValueError(
            f"{what}: missing or NaN in {rows} of {len(values)} rows, and it is known for every row: {advice}"
        )
    return values


def read_lengths(name: str, value: Any, size: int, steps: int | None) -> Tensor:
    """Return numbers of valid steps, int64 ``(N,)``.

    Args:
        name: the modality.
        value: integers from 0 to ``steps``, of any dtype.
        size: the number of rows N.
        steps: the number of steps that the values have; None if the batch holds none.

    Raises:
        ValueError: another number of rows, a fraction, or a number out of range.
    """
    lengths = _read_complete(f"lengths of {name!r}", value, "0 says that there is no valid step")
    if lengths.dim() != 1 or len(lengths) != size:
        got = len(lengths) if lengths.dim() == 1 else f"shape {tuple(lengths.shape)}"
        raise ValueError(f"lengths of {name!r}: expected {size} numbers, got {got}")
    whole = lengths.long()
    low, high = (int(whole.min()), int(whole.max())) if size else (0, 0)
    if not torch.equal(whole.to(lengths.dtype), lengths) or low < 0 or high > (math.inf if steps is None else steps):
        most = "" if steps is None else f" to {steps}, the steps of its values"
        raise ValueError(f"lengths of {name!r}: expected integers from 0{most}, got {low} to {high}")
    return whole


def read_mask(name: str, mask: Any, size: int) -> Tensor:
    """Return the rows that have a modality, boolean ``(N,)``; an entry that is NA or masked counts as False.

    Raises:
        ValueError: anything but booleans ``(N,)``.
    """
    if mask is None:
        return torch.ones(size, dtype=torch.bool)
    what = f"present[{name!r}]"
    values, missing = read_array(what, mask)
    if values is None or values.dtype != torch.bool or values.shape != (size,):
        got = "nothing" if values is None else f"{values.dtype} of shape {tuple(values.shape)}"
        raise ValueError(f"{what}: expected torch.bool of shape ({size},), got {got}")
    return values if missing is None else values & ~missing


def describe_lost_numbers(name: str, column: Column, mask: Tensor) -> str:
    """Return a warning with the share of numbers lost in missing rows; empty if none is.

    Args:
        name: the modality.
        column: its values.
        mask: the rows that have it, boolean ``(N,)``.
    """
    if column.lost is None or column.counts is None:
        return ""
    lost = int(column.lost[mask].sum())
    if not lost:
        return ""
    numbers = int(column.counts[mask].sum())
    rows = int(((column.lost > 0) & mask).sum())
    return (
        f"modality {name!r}: {rows} of {len(mask)} rows have missing entries (NaN) beside numbers, and are "
        f"missing altogether, which drops {lost / numbers:.1%} of the numbers. Impute them, or split the columns into "
        "modalities that are missing by themselves"
    )
