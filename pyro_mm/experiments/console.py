"""Output of the commands: tables, and errors and interruptions without a traceback, with exit codes."""

from __future__ import annotations

import difflib
import errno
import math
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

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
        _print_panel("Error", _describe(error), "red")
        raise typer.Exit(FAILED) from error


def _text_of(interrupted: Callable[[], str]) -> str:
    """Return the text of ``interrupted``, or the error that kept it from saving anything."""
    try:
        return interrupted()
    except FAILURES as error:
        return f"nothing could be kept: {error}"


def _describe(error: BaseException) -> str:
    """Return the message of an error, in words where it is that of the system."""
    if isinstance(error, OSError) and error.errno is not None:
        reason = error.strerror or os.strerror(error.errno)
        if error.filename is not None:
            reason = f"{error.filename}: {reason[:1].lower()}{reason[1:]}"
        return f"{reason}. {_ADVICE[error.errno]}" if error.errno in _ADVICE else reason
    if isinstance(error, MemoryError) and not str(error):
        return "out of memory: give a smaller --batch-size, or fewer draws"
    return str(error) or type(error).__name__


_ADVICE = {
    errno.ENOSPC: "Free some space, or give another folder by --out",
    errno.EDQUOT: "Free some space, or give another folder by --out",
    errno.ENOTDIR: "It lies in a file where a folder is needed: give another path",
    errno.EACCES: "Change its permissions, or give another path",
    errno.EPERM: "Change its permissions, or give another path",
    errno.EROFS: "It cannot be written to: give another path",
}


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Print warnings as a line of text each, without the line of code that gave them."""

    def show(message: Warning | str, *_: object, **__: object) -> None:
        typer.echo(f"warning: {message}", err=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _print_panel(title: str, text: str, colour: str) -> None:
    """Print a text in a frame to the standard error."""
    from rich.console import Console
    from rich.panel import Panel
    from rich.text import Text

    Console(stderr=True).print(Panel(Text(text), title=title, title_align="left", border_style=colour))


def check_writable(folder: Path) -> None:
    """Raise an OSError if no file can be written to a folder that may have to be created: before hours of training."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    with tempfile.TemporaryFile(dir=existing):
        pass


def parse_device(name: str | None) -> torch.device:
    """Return the device of that name, by default CUDA if it is available.

    Raises:
        typer.BadParameter: torch does not know the device, or cannot use it here.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(default if name is None else name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = re.split(r"[.:] ", str(error).splitlines()[0])[0]
        raise typer.BadParameter(f"--device: there is no {name!r} here, {reason}. Leave it out for {default}") from None
    if device.type == "meta":
        raise typer.BadParameter(f"--device: meta holds no numbers to train with. Leave it out for {default}")
    return device


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``" (do you mean 'x'?)"`` for the choice that is spelled most alike; nothing if none is."""
    given = name.lower().replace("_", "-")
    longer = [each for each in choices if given and each.startswith(given)]
    found = longer or difflib.get_close_matches(given, list(choices), n=1)
    return f" (do you mean {found[0]!r}?)" if found else ""


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
