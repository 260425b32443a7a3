"""Tables of the measurements of a family: members by columns, or by fractions of paired rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .console import format_share
from .estimates import BY_GUIDE
from .family_measurements import GUIDE

COLUMNS = (
    "log p(image)", "log p(image, label)", "log p(image | label)", "k-hat > 0.7", "label from image",
    "image from label", "probe", "s/epoch",
)  # fmt: skip


LIKELIHOODS = COLUMNS[:4]  # and their k-hats
LIKELIHOODS_AND_ACCURACIES = COLUMNS[:6]  # columns that have a table of their own by fraction

Table = tuple[Sequence[str], list[list[str]]]  # header, rows
Lines = Mapping[str, Mapping[str, Any]]  # member -> column -> value


def family_tables(lines: Mapping[int, Lines]) -> dict[str, Table]:
    """Format the measurements of a family, with tables of the guide's draws below those of fitted proposals.

    Args:
        lines: n -> member -> column -> value, where one row in n is paired.

    Returns:
        Heading -> (header, rows), as text; the heading of the table of all columns is empty.
    """
    by_guide = {
        part: {name: line[GUIDE] for name, line in each.items() if GUIDE in line} for part, each in lines.items()
    }
    if len(lines) == 1:
        ((part, each),) = lines.items()
        tables = {"": side_by_side(each)}
        if by_guide[part]:
            tables["likelihoods by the guide"] = side_by_side(by_guide[part], LIKELIHOODS)
        return tables
    tables = by_fraction(lines)
    if all(by_guide.values()):
        guided = by_fraction(by_guide, LIKELIHOODS)
        tables |= {f"{quantity}{BY_GUIDE}": table for quantity, table in guided.items()}
    return tables


def side_by_side(lines: Lines, columns: Sequence[str] = COLUMNS) -> Table:
    """Format the measurements of all members: a row per member, a column per quantity.

    Args:
        lines: member -> column -> value.
        columns: the quantities.

    Returns:
        (header, rows), as text.
    """
    names = [_heading(column, lines) for column in columns]
    return ("", *names), [[name, *(_format(column, line) for column in columns)] for name, line in lines.items()]


def by_fraction(lines: Mapping[int, Lines], columns: Sequence[str] = LIKELIHOODS_AND_ACCURACIES) -> dict[str, Table]:
    """Format one table per quantity: a row per member, a column per fraction of paired rows.

    Args:
        lines: n -> member -> column -> value, where one row in n is paired.
        columns: the quantities.

    Returns:
        quantity -> (header, rows), as text.
    """
    header = ("", *("all" if part == 1 else f"1/{part}" for part in lines))
    return {
        _heading(column, lines[1]): (
            header,
            [[name, *(_format(column, lines[part][name]) for part in lines)] for name in lines[1]],
        )
        for column in columns
    }


def _heading(column: str, lines: Lines) -> str:
    """Return the heading of a column, with the judge's accuracy if the judge measured it."""
    if column != "image from label":
        return column
    return f"{column} (judge: {next(iter(lines.values()))['judge'][0]:.1%})"


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
