"""Tables and remarks as text, for the ``repr`` and the reports of values."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence


def align_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align a table in columns: the first flush left, the others flush right, all rows indented by two spaces.

    Args:
        header: one heading per column.
        rows: one text per column in each row.

    >>> print(align_columns(["site", "value"], [["z", "1.0"], ["image", "-12.5"]]))
    site     value
      z        1.0
      image  -12.5
    """
    cells = [list(header), *([f"  {row[0]}", *row[1:]] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    lines = []
    for first, *others in cells:
        right = [text.rjust(width) for text, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines)


def plus_minus(value: float, error: float) -> str:
    """Format a value and its standard error; an unknown error is NaN.

    >>> plus_minus(-1.5, 0.25), plus_minus(-1.5, float("nan"))
    ('-1.500 ± 0.250', '-1.500 ± ?')
    """
    return f"{value:.3f} ± ?" if math.isnan(error) else f"{value:.3f} ± {error:.3f}"


def wrap_remark(mark: str, text: str, width: int = 110) -> str:
    """Break a remark into lines of at most ``width`` characters, indented under its mark.

    >>> print(wrap_remark("- ", "a remark of some length", 18))
      - a remark of
        some length
    """
    return textwrap.fill(
        text, width, initial_indent=f"  {mark}", subsequent_indent="  " + " " * len(mark), break_on_hyphens=False
    )
