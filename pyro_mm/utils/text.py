"""Tables as text, for what is printed by a value's name."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence


def align_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their headings, the first one flush left and the others right; rows are indented."""
    cells = [list(header), *([f"  {row[0]}", *row[1:]] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    ]
    return "\n".join(line.rstrip() for line in lines)


def plus_minus(value: float, error: float) -> str:
    """A value and its standard error, which may be unknown."""
    return f"{value:.3f} ± {error:.3f}" if error == error else f"{value:.3f} ± ?"


def wrap_remark(mark: str, text: str, width: int = 110) -> str:
    """A remark in lines of some width, indented under its mark."""
    return textwrap.fill(
        text, width, initial_indent=f"  {mark}", subsequent_indent="  " + " " * len(mark), break_on_hyphens=False
    )
