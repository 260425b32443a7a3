"""Tables of the measurements of a family: members by columns, or by fractions of paired rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .console import format_share

COLUMNS = (
    "log p(image)", "log p(image, label)", "log p(image | label)", "k-hat > 0.7", "label from image",
    "image from label", "probe", "s/epoch",
)  # fmt: skip


NUM_LIKELIHOODS_AND_ACCURACIES = 6  # columns that have a table of their own by fraction

Table = tuple[Sequence[str], list[list[str]]]  # header, rows


def side_by_side(lines: Mapping[str, Mapping[str, Any]]) -> Table:
    """Format the measurements of all members: a row per member, a column per quantity.

    Args:
        lines: member -> column -> value.

    Returns:
        (header, rows), as text.
    """
    names = [_heading(column, lines) for column in COLUMNS]
    return ("", *names), [[name, *(_format(column, line) for column in COLUMNS)] for name, line in lines.items()]


def by_fraction(lines: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Table]:
    """Format one table per quantity: a row per member, a column per fraction of paired rows.

    Args:
        lines: n -> member -> column -> value, where one row in n is paired.

    Returns:
        quantity -> (header, rows), as text.
    """
    header = ("", *("all" if part == 1 else f"1/{part}" for part in lines))
    return {
        _heading(column, lines[1]): (
            header,
            [[name, *(_format(column, lines[part][name]) for part in lines)] for name in lines[1]],
        )
        for column in COLUMNS[:NUM_LIKELIHOODS_AND_ACCURACIES]
    }


def _heading(column: str, lines: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the heading of a column, with the judge's accuracy if the judge measured it."""
    judge = next(iter(lines.values()))["judge"][0]
    return column if column != "image from label" else f"{column} (judge: {judge:.1%})"


def _format(column: str, line: Mapping[str, Any]) -> str:
    """Format one cell; "–" if the member lacks the quantity."""
    if column == "s/epoch":
        return f"{line['seconds']:.1f}"
    if column not in line:
        return "–"
    if column == "k-hat > 0.7":
        return ", ".join(format_share(x) for x in line[column])
    value, error = line[column]
    if column.startswith("log"):
        return f"{value:.2f} ± {error:.2f}"
    return f"{value:.1%}"
