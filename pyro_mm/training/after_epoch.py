"""The end of an epoch: validation, history, callbacks, schedule and checkpoint."""

from __future__ import annotations

from .players import warn_of_players
from .run import Run


def record_epoch(run: Run, epoch: int, entry: dict[str, float]) -> None:
    """Validate, add an epoch to the history, move callbacks and schedule on, write the checkpoint.

    Args:
        run: the training.
        epoch: its number, counted from 0.
        entry: the values of the epoch, to which the validation loss is added.
    """
    run.callbacks.training.epoch = epoch + 1
    failure = _evaluate(run, epoch, entry)
    run.schedule.after_epoch(epoch)
    run.flags.agree()
    if run.checkpoint is not None and not run.history.stopped:
        run.checkpoint.after_epoch(epoch + 1)
    try:
        if failure is not None:
            raise failure
        _call_callback(run, epoch, entry)
    except BaseException:
        if run.checkpoint is not None and run.setting.processes.world == 1:
            run.checkpoint.write(epoch + 1)
        raise
    run.flags.agree()


def _evaluate(run: Run, epoch: int, entry: dict[str, float]) -> BaseException | None:
    """Validate and call the callbacks, with the weights that they put in place; return the error of one of them."""
    failure: BaseException | None = None
    with run.callbacks.evaluation():
        if run.validation is not None:
            step = run.sequence.steps
            entry["validation"] = run.validation.loss(
                lambda batch: run.setting.evaluate(batch, step), run.problem.scales_to_data, epoch + 1
            )
        run.history.append(entry)
        warn_of_players(run.players, entry, run.warned)
        run.bar.show(entry)
        run.callbacks.training.entry = entry
        try:
            run.history.stopped = run.callbacks.after_epoch()
        except BaseException as error:
            failure = error
    return failure


def _call_callback(run: Run, epoch: int, entry: dict[str, float]) -> None:
    callback = run.setting.options.callback
    if callback is not None and callback(epoch + 1, entry) is True:
        run.history.stopped = True
