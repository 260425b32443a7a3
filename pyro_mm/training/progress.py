"""The progress bar of a training."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..utils.global_state import preserve_process_settings


class ProgressBar:
    """A bar of epochs that moves with every step.

    Args:
        progress: a ``rich.progress.Progress``, or a :class:`NotebookProgress`; None shows nothing.
        epochs: number of epochs.
        steps: steps of an epoch.
    """

    def __init__(self, progress: Any = None, epochs: int = 0, steps: int = 1):
        self._progress = progress
        self._steps = steps
        self._task = None if progress is None else progress.add_task("", total=epochs)

    def skip(self, epochs: int, steps: int = 0) -> None:
        """Move on by epochs of an earlier run, and by steps of the epoch after them."""
        if self._progress is not None:
            self._progress.advance(self._task, epochs + steps / self._steps)

    def step(self) -> None:
        """Move on by a step."""
        if self._progress is not None:
            self._progress.advance(self._task, 1 / self._steps)

    def say(self, text: str) -> None:
        """Print a sentence above the bar."""
        if self._progress is not None:
            self._progress.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, entry: dict[str, float]) -> None:
        """Show the losses of an epoch."""
        if self._progress is not None:
            text = ", ".join(f"{name} {entry[name]:.2f}" for name in ("loss", "validation") if name in entry)
            self._progress.update(self._task, description=text)


class NotebookProgress:
    """Progress as one output of a notebook's cell, which needs no widgets: a bar that changes in place.

    Args:
        display: of IPython: ``display(value, display_id=True)`` returns a handle with ``update(value)``.
        seconds: time between two changes at least.
    """

    def __init__(self, display: Callable[..., Any], seconds: float = 0.2):
        self._display = display
        self._seconds = seconds
        self._handle: Any = None
        self._changed = 0.0
        self.done = 0.0
        self.total = 1
        self.description = ""

    def add_task(self, description: str, total: int) -> int:
        """Set the number of epochs, and show the bar."""
        self.description, self.total = description, total
        self._handle = self._display(self, display_id=True)
        return 0

    def advance(self, task: int, amount: float) -> None:
        """Move on by epochs, or by a part of one."""
        self.done += amount
        self._change()

    def update(self, task: int, description: str) -> None:
        """Show the losses of an epoch."""
        self.description = description
        self._change()

    def _change(self) -> None:
        now = time.monotonic()
        if now - self._changed >= self._seconds:
            self._changed = now
            self._handle.update(self)

    def print(self, text: str, **style: Any) -> None:
        """Print a sentence, plain."""
        print(text)

    def finish(self) -> None:
        """Show the last state."""
        if self._handle is not None:
            self._handle.update(self)

    def __repr__(self) -> str:
        # the parts of epochs add up to whole ones but for rounding
        return f"epoch {int(self.done + 1e-6)}/{self.total}  {self.description}".rstrip()

    def _repr_html_(self) -> str:
        return f'<progress value="{self.done:.4f}" max="{self.total}"></progress> {html.escape(repr(self))}'


def in_notebook() -> bool:
    """Return True in the kernel of a notebook."""
    with preserve_process_settings():
        from rich.console import Console

    return Console().is_jupyter


@contextmanager
def progress_bar(show: bool, epochs: int, steps: int) -> Iterator[ProgressBar]:
    """Show a progress bar in the block, if ``show``: in a terminal by rich, in a notebook as an output of the cell."""
    if not show:
        yield ProgressBar()
        return
    with preserve_process_settings():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if in_notebook():
        from IPython.display import display

        notebook = NotebookProgress(display)
        try:
            yield ProgressBar(notebook, epochs, steps)
        finally:
            notebook.finish()
        return
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns) as progress:
        yield ProgressBar(progress, epochs, steps)
