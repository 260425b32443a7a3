"""One epoch of a training: its minibatches, and a step on each."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ..batch.batch import Batch
from ..scoring.program_errors import explain_index_errors
from ..utils.seeding import generator_state, set_generator_state
from .epoch_values import join_values, step_values, values_per_row
from .modes import set_training
from .nonfinite_report import generator_devices
from .parallel import merge_sums
from .position import Position
from .run import Run
from .updates import StepValues


def run_epoch(run: Run, epoch: int) -> dict[str, float] | None:
    """Take the steps of an epoch, or those until a callback or Ctrl-C ends the training.

    Args:
        run: the training.
        epoch: its number, counted from 0.

    Returns:
        The loss and the value of each term, per row; None if the epoch was broken off.
    """
    setting = run.setting
    begun = run.position
    position = begun or Position.at_start(generator_devices(setting.device), setting.loader)
    set_training(setting.networks, True)
    _take_steps(run, epoch, begun, position)
    set_training(setting.networks, False)
    if run.flags.is_over:
        run.position = position if position.number else None
        return None
    run.position = None
    _check_whole_epoch(run, epoch, position, is_whole_run=begun is None)
    return _epoch_entry(run, position)


def _take_steps(run: Run, epoch: int, begun: Position | None, position: Position) -> None:
    """Take the steps of an epoch, and move its position on."""
    setting = run.setting
    is_first = epoch == run.first_epoch
    checks_values = is_first and (setting.options.transform is not None or not setting.is_in_memory)
    with run.monitor.guard(position.sums):
        for batch in minibatches(run, epoch, begun):
            if checks_values:
                run.audit.check(batch)
            run.monitor.before_step(batch, epoch + 1, position.number + 1)
            values = take_step(run, batch)
            _add_to_position(run, position, batch, values)
            run.bar.step()
            _after_step(run, values, batch.size)
            if run.flags.is_over:
                break
    run.monitor.check(position.sums.values())


def minibatches(run: Run, epoch: int, begun: Position | None) -> Iterator[Batch]:
    """Yield the minibatches of an epoch, transformed, or those that are left of one that was begun.

    Args:
        run: the training.
        epoch: its number, counted from 0.
        begun: the place in it that a checkpoint holds.
    """
    setting = run.setting
    devices = generator_devices(setting.device)
    states = [generator_state(device) for device in devices]

    def return_to_step() -> None:
        for device, state in zip(devices, states, strict=True):
            set_generator_state(device, state)

    if begun is None:
        iterator = setting.loader.epoch(epoch)
    else:
        begun.rewind(devices, setting.loader)
        iterator = setting.loader.epoch(epoch, begun.number, return_to_step)
    while True:
        try:
            batch = next(iterator, None)
        except RuntimeError:
            if run.flags.is_interrupted:  # it has ended the loader's processes as well
                return
            raise
        if batch is None:
            return
        yield batch if batch is setting.loader.idle else setting.transform(batch)


def take_step(run: Run, batch: Batch) -> StepValues | None:
    """Take a step; return the values of the loss and its terms, summed over rows, or None if it is left out."""
    setting = run.setting
    skips = setting.options.skips_nonfinite
    with explain_index_errors({"model": setting.model, "guide": setting.guide}, batch.size, "a minibatch of {} rows"):
        try:
            values = run.sequence(batch)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError, ArithmeticError) as error:
            if skips and setting.processes.world == 1 and run.monitor.finish_step([], error):
                return None
            run.monitor.explain_error(error)
            raise
    if skips and run.monitor.finish_step([each.values for each in values if each is not None]):
        return None
    return join_values(values, batch.size)


def _add_to_position(run: Run, position: Position, batch: Batch, values: StepValues | None) -> None:
    """Move the position on by a step, and check its numbers where the step was taken."""
    rows = run.setting.loader.count(batch)
    if values is None:
        position.skip(rows)
        return
    for missing in run.missing_gradients:
        missing.after_step(batch, run.sequence.steps)
    position.add(values.labels, values.values * (rows / batch.size), rows)
    run.monitor.after_step(position.sums.values())


def _after_step(run: Run, values: StepValues | None, rows: int) -> None:
    """Move schedule and callbacks on after a step; the callbacks not after one that was left out."""
    moved = run.sequence.was_due(run.sequence.steps - 1)
    if moved:
        run.schedule.after_step()
    training = run.callbacks.training
    training.step = run.sequence.steps
    training.moved = moved and values is not None
    if run.callbacks.watches_steps and values is not None:
        training.step_values = step_values(values.labels, values.values, rows)
        run.history.stopped = run.callbacks.after_step()
    run.flags.exchange_with_gradients(run.sequence)


def _check_whole_epoch(run: Run, epoch: int, position: Position, is_whole_run: bool) -> None:
    """Raise a ValueError if the epoch had no rows, others than the plate counts, or reached not all parameters."""
    loader = run.setting.loader
    if position.rows == 0:
        raise ValueError(f"the loader gave no minibatch in epoch {epoch + 1}: can it be gone through but once?")
    if not run.problem.all_in_plate:
        loader.check_rows(position.rows)
    if is_whole_run:
        for missing in run.missing_gradients:
            missing.after_epoch(loader.modalities)


def _epoch_entry(run: Run, position: Position) -> dict[str, float]:
    """Return the history's entry of an epoch: values per row of all processes."""
    rows = position.rows - position.skipped_rows
    entry = values_per_row(*merge_sums(run.setting.processes, position.sums, rows))
    if run.setting.options.skips_nonfinite:
        entry["skipped"] = float(position.skipped)
    return entry
