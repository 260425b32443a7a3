"""A training from its preparation to its end, epoch by epoch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from ..batch.batch import Batch
from ..scoring.training_objective import PreparedObjective
from ..utils.locks import lock_path
from ..utils.processes import Processes
from ..utils.seeding import temporary_seed
from .after_epoch import record_epoch
from .epoch import run_epoch
from .history import History
from .make_loader import TrainingRows
from .modes import leave_in_evaluation
from .options import TrainingOptions
from .preparation import prepare
from .progress import progress_bar
from .run import Run
from .setting import Setting
from .stop_flags import StopFlags


def run_training(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    objective: PreparedObjective,
    train: TrainingRows,
    options: TrainingOptions,
    processes: Processes | None = None,
) -> History:
    """Train for all epochs, or for those that a checkpoint leaves, and return the history.

    Args:
        model, guide: callables of a batch.
        objective: as ``prepare_objective`` returns it.
        train: the rows, a loader of them, or a stream.
        options: the options of :func:`~pyro_mm.fit`.
        processes: the processes that train together, each on a part of every minibatch.
    """
    setting = Setting(model, guide, objective, train, options, processes or Processes())
    is_main = setting.processes.is_main
    history = History()
    flags = StopFlags(history, setting.processes)
    with (
        leave_in_evaluation(setting.networks),
        lock_path(options.checkpoint if is_main else None),
        temporary_seed(options.seed, setting.device),
        progress_bar(options.progress and is_main, options.epochs, len(setting.loader)) as bar,
    ):
        run = prepare(setting, history, flags, bar)
        try:
            _run_epochs(run)
        except BaseException as error:
            run.callbacks.fail(error)
            raise
    return history


def _run_epochs(run: Run) -> None:
    """Take the epochs that are left, and finish."""
    with run.flags.interruption:
        for epoch in range(run.first_epoch, run.setting.options.epochs):
            if run.flags.is_over:
                break
            entry = run_epoch(run, epoch)
            if entry is not None:
                record_epoch(run, epoch, entry)
        _finish(run)


def _finish(run: Run) -> None:
    """Write the checkpoint, leave the weights that callbacks put in place, and say so if it was interrupted."""
    history = run.history
    epochs = run.setting.options.epochs
    history.interrupted = run.flags.is_interrupted and not history.stopped and len(history) < epochs
    if run.checkpoint is not None:
        run.checkpoint.write(len(history), run.position, epochs if history.stopped else None)
    run.callbacks.end()
    if history.interrupted and run.setting.processes.is_main:
        warnings.warn(_describe_interruption(run), stacklevel=4)


def _describe_interruption(run: Run) -> str:
    """Return a sentence that says where the training was interrupted, and how it goes on."""
    epochs = len(run.history)
    options = run.setting.options
    place = f"after epoch {epochs}"
    if run.position is not None:
        place = f"after step {run.position.number} of epoch {epochs + 1}"
    mend = "fit(.., checkpoint=..) would have kept its state"
    if options.checkpoint is not None:
        mend = f"its state is in {options.checkpoint}, and the same call goes on from there"
    return f"the training was interrupted {place} of {options.epochs} epochs: {mend}"
