"""Ends of a command: a mistake without a traceback, an interruption that says how to go on, exit codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest

import torch
import typer

from ..utils.global_state import preserve_process_settings

FAILED, INTERRUPTED = 1, 130  # 2, a mistake in the command itself, is typer's
FAILURES = (ValueError, TypeError, RuntimeError, OSError, ArithmeticError, MemoryError)


@contextmanager
def command(interrupted: Callable[[], str]) -> Iterator[None]:
    """Run a command: errors that say what is wrong, and Ctrl-C, end it with a message and a code of their own.

    Other errors are defects of this package and keep their traceback.

    Args:
        interrupted: called on Ctrl-C; says what is kept, and how to go on.

    Raises:
        typer.Exit: with 1 after an error, and with 130 after Ctrl-C.
    """
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt:
        _say("Interrupted", _last_words(interrupted), "yellow")
        raise typer.Exit(INTERRUPTED) from None
    except FAILURES as error:
        _say("Error", str(error) or type(error).__name__, "red")
        raise typer.Exit(FAILED) from error


def _last_words(interrupted: Callable[[], str]) -> str:
    try:
        return interrupted()
    except FAILURES as error:
        return f"nothing could be kept: {error}"


def _say(title: str, text: str, colour: str) -> None:
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console(stderr=True).print(Panel(Text(text), title=title, title_align="left", border_style=colour))


def torch_device(name: str | None) -> torch.device:
    """The device of that name, by default CUDA where there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise typer.BadParameter(f"no device {name!r} here: {str(error).splitlines()[0]}") from None
    return device


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table."""
    with preserve_process_settings():
        from rich import box
        from rich.console import Console
        from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=i > 0)
    for row in rows:
        table.add_row(*row)
    console = Console()
    # a narrower one breaks the names of the quantities
    widths = [max(map(len, column)) + 3 for column in zip_longest(header, *rows, fillvalue="")]
    console.width = max(console.width, 100, sum(widths))
    console.print(table)
