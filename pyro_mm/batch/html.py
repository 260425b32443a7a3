"""A batch as HTML."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..utils.html import report, table
from .stored import StoredColumn

if TYPE_CHECKING:
    from .rows import Rows


def batch_html(batch: Rows) -> str:
    """Return tables of the modalities of a batch, with their masks and lengths, and of its covariates.

    Args:
        batch: the rows.
    """
    modalities = [_modality(batch, name) for name in batch.names]
    header = ["modality", "shape of a row", "type", "values", "present"]
    if batch.lengths:
        header.append("lengths")
    else:
        modalities = [row[:-1] for row in modalities]
    parts: list[str] = [table(header, modalities)]
    if batch.covariates:
        rows = [[name, _shape(x), _type(x), _range(x)] for name, x in batch.covariates.items()]
        parts.append(table(["covariate", "shape of a row", "type", "values"], rows))
    total = f" of {batch.total}" if batch.total is not None and batch.total != batch.size else ""
    return report(f"Batch of {batch.size}{total} rows on {batch.device}", *parts)


def _modality(batch: Rows, name: str) -> list[str]:
    """Return a modality's row of the table."""
    present = batch.present[name]
    count = int(present.sum())
    share = "all" if count == len(present) else f"{count} of {len(present)} ({count / len(present):.0%})"
    if not batch.holds(name):
        return [name, "not known", "", "", share, ""]
    value = batch[name]
    shown = ""
    if count:
        shown = _range(value if isinstance(value, StoredColumn) else value[present.to(value.device)])
    lengths = batch.lengths[name][present.to(value.device)] if name in batch.lengths else None
    steps = _range(lengths) if lengths is not None and count else ""
    return [name, _shape(value), _type(value), shown, share, steps]


def _shape(x: Tensor | StoredColumn) -> str:
    return " \N{MULTIPLICATION SIGN} ".join(map(str, x.shape[1:])) or "one number"


def _type(x: Tensor | StoredColumn) -> str:
    return str(x.dtype).removeprefix("torch.")


def _range(x: Tensor | StoredColumn) -> str:
    """Return the range of numbers, in words; NaN, which may stand behind the end of a sequence, is left out."""
    if isinstance(x, StoredColumn):
        return "in a file"
    if x.dtype == torch.bool:
        return f"{x.float().mean():.0%} true"
    numbers = x[~x.isnan()] if x.is_floating_point() else x.reshape(-1)
    return f"{numbers.min().item():.4g} to {numbers.max().item():.4g}" if len(numbers) else ""
