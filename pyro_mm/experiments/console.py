"""Output of the commands: tables, and errors and interruptions without a traceback, with exit codes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

import torch
import typer

from ..utils.global_state import preserve_process_settings

FAILED = 1  # exit codes; 2, a mistake in the command line, is typer's
INTERRUPTED = 130
FAILURES = (ValueError, TypeError, RuntimeError, OSError, ArithmeticError, MemoryError)


@contextmanager
def report_errors(interrupted: Callable[[], str]) -> Iterator[None]:
    """End a command on an error or on Ctrl-C with a message and an exit code, without a traceback.

    Errors of types other than :data:`FAILURES` are defects of this package, and keep their traceback.

    Args:
        interrupted: called on Ctrl-C; returns what is kept and how to go on.

    Raises:
        typer.Exit: with code 1 after an error, and with 130 after Ctrl-C.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        _print_panel("Interrupted", _text_of(interrupted), "yellow")
        raise typer.Exit(INTERRUPTED) from None
    except FAILURES as error:
        _print_panel("Error", str(error) or type(error).__name__, "red")
        raise typer.Exit(FAILED) from error


def _text_of(interrupted: Callable[[], str]) -> str:
    """Return the text of ``interrupted``, or the error that kept it from saving anything."""
    try:
        return interrupted()
    except FAILURES as error:
        return f"nothing could be kept: {error}"


def _print_panel(title: str, text: str, colour: str) -> None:
    """Print a text in a frame to the standard error."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console(stderr=True).print(Panel(Text(text), title=title, title_align="left", border_style=colour))


def parse_device(name: str | None) -> torch.device:
    """Return the device of that name, by default CUDA if it is available.

    Raises:
        typer.BadParameter: torch does not know the device, or cannot use it here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise typer.BadParameter(f"no device {name!r} here: {str(error).splitlines()[0]}") from None
    return device


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int = 1) -> None:
    """Print a table with its title above it, as wide as its columns need.

    Args:
        title: the title.
        header: one heading per column.
        rows: one text per column in each row; short rows are filled up with empty cells.
        num_left: the number of columns that are flush left; all others are flush right.
    """
    with preserve_process_settings():
        from rich import box
        from rich.console import Console
        from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < num_left else "right", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # a narrower console would break the names of the quantities
    widths = [max(map(len, column)) + 3 for column in zip_longest(header, *rows, fillvalue="")]
    console.width = max(console.width, 100, sum(widths) + 2)
    console.print(table)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a table in Markdown, with the first column flush left and the others right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)


def format_share(share: float | None) -> str:
    """Format a share of rows as a percentage; None or NaN, unknown for few draws, as "too few draws"."""
    return "too few draws" if share is None or math.isnan(share) else f"{share:.1%}"
