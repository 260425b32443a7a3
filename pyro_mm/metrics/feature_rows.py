"""Features of rows, by a network or as the values themselves, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..utils.arguments import check_function, check_tensor, describe
from ..utils.network_keywords import call_network, keywords_of

Features = Callable[[Tensor], Tensor]
Rows = Tensor | Iterable[Tensor]
ROWS_PER_PASS = 256  # rows whose features are computed at once


def feature_blocks(data: Rows, features: Features | None, what: str, lengths: Tensor | None = None) -> Iterator[Tensor]:
    """Yield the features of all rows, block by block.

    Args:
        data: values ``(N, *event)``, or an iterable of such tensors.
        features: maps ``(B, *event)`` to ``(B, D)``, further dimensions flattened; None takes the values themselves.
        what: the data in a word, for errors.
        lengths: those of the sequences that one tensor of data holds, ``(N,)``, which the features get if they have a
            parameter of that name; None for other data.

    Yields:
        ``(B, D)``, float64, on the CPU.

    Raises:
        TypeError: data that are no tensors, or features that are none.
        ValueError: a single number as data, features of another number of rows or without a dimension of their own, or
            features that are not finite.
    """
    if isinstance(data, str | Mapping) or not isinstance(data, Tensor | Iterable):
        raise TypeError(f"expected {what} to be a tensor (N, ..) or an iterable of them, got {describe(data)}")
    with_lengths = lengths is not None and any(keyword.name == "lengths" for keyword in keywords_of(features))
    if features is not None:
        check_function("features", features, None if with_lengths else ("values",))
    for block in [data] if isinstance(data, Tensor) else data:
        if check_tensor(what, block).dim() == 0:
            raise ValueError(f"expected {what} of shape (N, ..), got a single number")
        for start in range(0, len(block), ROWS_PER_PASS):
            part = slice(start, start + ROWS_PER_PASS)
            keywords = {"lengths": lengths[part]} if with_lengths and lengths is not None else {}
            values = block[part]
            found = values if features is None else call_network(features, (values,), keywords)
            yield _check_features(found, values, features is None, what)


@torch.no_grad()
def collect_features(
    data: Rows,
    features: Features | None,
    what: str,
    least: int,
    most: int,
    columns: int | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return the features of all rows.

    Args:
        data, features, what: as in :func:`feature_blocks`.
        least, most: numbers of rows between which N has to be.
        columns: the number of features that there should be; None for any.
        lengths: as in :func:`feature_blocks`.

    Returns:
        ``(N, D)``, float64, on the CPU.

    Raises:
        TypeError, ValueError: those of :func:`feature_blocks`, too few or too many rows, or another number of features.
    """
    blocks = list(feature_blocks(data, features, what, lengths))
    count = sum(map(len, blocks))
    if not least <= count <= most:
        wanted = f"{least} at least" if count < least else f"{most} at most, since matrices of all pairs are in memory"
        raise ValueError(f"expected {what} data of {wanted}, got {count} rows")
    widths = sorted({block.shape[1] for block in blocks} | ({columns} if columns is not None else set()))
    if len(widths) > 1:
        raise ValueError(f"{what} data: expected the same number of features of all rows, got {widths}")
    return torch.cat(blocks)


def _check_features(found: Any, values: Tensor, are_values: bool, what: str) -> Tensor:
    """Return the features of a block of rows as ``(B, D)``, float64.

    Args:
        found: the features.
        values: the rows, ``(B, *event)``.
        are_values: True if the values themselves are the features.
        what: the data in a word, for errors.
    """
    if not isinstance(found, Tensor):
        raise TypeError(f"expected features to return a tensor ({len(values)}, D), got {describe(found)}")
    if are_values and found.dim() == 1:
        found = found[:, None]
    if found.dim() < 2 or len(found) != len(values):
        raise ValueError(f"expected features of shape ({len(values)}, D), got {tuple(found.shape)}")
    features: Tensor = found.flatten(1).cpu().double()
    finite = features.isfinite().all(1)
    if not bool(finite.all()):
        raise ValueError(
            f"features of {what} data that are not finite, in {int((~finite).sum())} of {len(values)} rows: leave such "
            "rows out, or repair the network of the features"
        )
    return features
