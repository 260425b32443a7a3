"""Ends of a command: a mistake without a traceback, an interruption that says how to go on, exit codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer

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
