"""The progress bar of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..utils.global_state import preserve_process_settings


class ProgressBar:
    """A bar of epochs that moves with every step.

    Args:
        progress: a ``rich.progress.Progress``; None shows nothing.
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

    def show(self, entry: dict[str, float]) -> None:
        """Show the losses of an epoch."""
        if self._progress is not None:
            text = ", ".join(f"{name} {entry[name]:.2f}" for name in ("loss", "validation") if name in entry)
            self._progress.update(self._task, description=text)


@contextmanager
def progress_bar(show: bool, epochs: int, steps: int) -> Iterator[ProgressBar]:
    """Show a progress bar in the block, if ``show``."""
    if not show:
        yield ProgressBar()
        return
    with preserve_process_settings():
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns) as progress:
        yield ProgressBar(progress, epochs, steps)
