"""The loop of a training: prepare, resume, then step, validate and record, epoch by epoch."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from ..batch.batch import Batch
from ..scoring.audit.training import TrainingAudit, audit_training
from ..scoring.program_errors import explain_index_errors
from ..scoring.training_objective import Loss, Player, PreparedObjective
from ..utils.arguments import describe
from ..utils.locks import lock_path
from ..utils.modules import preserve_buffers
from ..utils.processes import Processes
from ..utils.seeding import generator_state, set_generator_state, temporary_seed
from .arguments import check_validation_names
from .callback_list import CallbackList
from .callbacks import Training
from .checkpoint import Checkpoint, data_identity
from .compile_choice import compilation_pays
from .epoch_values import join_values, step_values, values_per_row
from .first_run import build_problem, name_nan_parameters
from .gradients import GradientSequence
from .history import History
from .interruption import Interruption
from .loader import MinibatchLoader
from .missing_gradients import MissingGradients
from .modes import leave_in_evaluation, networks_to_train, set_training
from .nonfinite import NonFiniteMonitor
from .nonfinite_report import generator_devices
from .optimization import Schedule, make_optimizer
from .pace import PACE, Pace
from .parallel import check_parallel, merge_sums, synchronise
from .parameter_names import parameter_names
from .players import check_every, player_updates, players_of, warn_of_players
from .position import Position
from .problem import TrainingProblem, programs_of
from .progress import ProgressBar, progress_bar
from .step import Update
from .updates import StepValues
from .validation import Validation


@dataclass(frozen=True)
class TrainingOptions:
    """The options of :func:`~pyro_mm.fit`, checked by type."""

    validation: Batch | DataLoader[Any] | None
    validation_batch_size: int | None
    epochs: int
    batch_size: int
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None
    scheduler_interval: str
    clip_norm: float | None
    accumulate: int
    seed: int | None
    device: torch.device | None
    precision: str
    compile: bool | None
    validate: bool | None
    resident: bool | None
    workers: int
    drop_last: bool | None
    transform: Callable[[Batch], Batch] | None
    checkpoint: Path | None
    force_resume: bool
    progress: bool
    callback: Callable[[int, dict[str, float]], Any] | None
    callbacks: tuple[Any, ...]
    devices: int
    audit: bool
    nonfinite: str = "stop"
    pace: Pace = PACE


class Trainer:
    """A training: its data, its steps, its checks and its history.

    Args:
        model, guide: callables of a batch.
        objective: as ``prepare_objective`` returns it.
        train: the rows, or a loader of them.
        options: the options of :func:`~pyro_mm.fit`.
        processes: the processes that train together, each on a part of every minibatch.

    Attributes:
        history: the losses of every epoch so far.
    """

    problem: TrainingProblem
    optimizer: torch.optim.Optimizer
    sequence: GradientSequence
    callbacks: CallbackList
    monitor: NonFiniteMonitor
    missing_gradients: list[MissingGradients]
    schedule: Schedule
    bar: ProgressBar

    def __init__(
        self,
        model: Callable[[Batch], Any],
        guide: Callable[[Batch], Any],
        objective: PreparedObjective,
        train: Batch | DataLoader[Any],
        options: TrainingOptions,
        processes: Processes | None = None,
    ):
        self.processes = processes or Processes()
        self.model = model
        self.guide = guide
        self.objective = objective
        self.train = train
        self.options = options
        self.history = History()
        self.programs = programs_of(objective, model, guide)
        self.networks = networks_to_train(self.programs)
        self.placement = Placement(_training_device(self.networks, options.device, model, guide), options.precision)
        for network in self.networks:
            network.to(self.placement.device)
        self.loader = MinibatchLoader(
            train,
            options.batch_size,
            self.placement.device,
            options.resident,
            options.workers,
            options.drop_last,
            (self.processes.rank, self.processes.world) if self.processes.world > 1 else None,
        )
        self.validation: Validation | None = None
        self.audit = TrainingAudit()
        self.checkpoint: Checkpoint | None = None
        self.interruption = Interruption()
        self.interruption_agreed = False
        self.position: Position | None = None
        self.players: list[Player] = []
        self.warned: set[str] = set()

    def run(self) -> History:
        """Train for all epochs, or for those that a checkpoint leaves, and return the history."""
        options = self.options
        with (
            leave_in_evaluation(self.networks),
            lock_path(options.checkpoint if self.processes.is_main else None),
            temporary_seed(options.seed, self.placement.device),
            progress_bar(options.progress and self.processes.is_main, options.epochs, len(self.loader)) as self.bar,
        ):
            first_epoch = self.prepare()
            try:
                self.run_epochs(first_epoch)
            except BaseException as error:
                self.callbacks.fail(error)
                raise
        return self.history

    def run_epochs(self, first_epoch: int) -> None:
        """Take the epochs from a number on, and finish."""
        with self.interruption:
            for epoch in range(first_epoch, self.options.epochs):
                if self.is_over:
                    break
                entry = self.run_epoch(epoch, is_first=epoch == first_epoch)
                if entry is not None:
                    self.record(epoch, entry)
            self.finish()

    @property
    def is_over(self) -> bool:
        """True if a callback has stopped the training, or Ctrl-C has been pressed."""
        return self.history.stopped or self.is_interrupted

    @property
    def is_interrupted(self) -> bool:
        """True if Ctrl-C has been pressed; of several processes, if all of them know."""
        return self.interruption.requested if self.processes.world == 1 else self.interruption_agreed

    def agree_to_stop(self) -> None:
        """Stop, or end by an interruption, if one of several processes does."""
        if self.processes.world > 1:
            flags = self.processes.gather((self.history.stopped, self.interruption.requested))
            self.history.stopped = any(stopped for stopped, _ in flags)
            self.interruption_agreed = any(requested for _, requested in flags)

    def finish(self) -> None:
        """Write the checkpoint, leave the weights that callbacks put in place, and say so if it was interrupted."""
        epochs = len(self.history)
        self.history.interrupted = self.is_interrupted and not self.history.stopped
        self.history.interrupted &= epochs < self.options.epochs
        if self.checkpoint is not None:
            self.checkpoint.write(epochs, self.position, self.options.epochs if self.history.stopped else None)
        self.callbacks.end()
        if not self.history.interrupted or not self.processes.is_main:
            return
        place = f"after epoch {epochs}"
        if self.position is not None:
            place = f"after step {self.position.number} of epoch {epochs + 1}"
        path = self.options.checkpoint
        mend = "fit(.., checkpoint=..) would have kept its state"
        if path is not None:
            mend = f"its state is in {path}, and the same call goes on from there"
        warnings.warn(f"the training was interrupted {place} of {self.options.epochs} epochs: {mend}", stacklevel=4)

    # -- before the first step ------------------------------------------------------------------------------------

    def prepare(self) -> int:
        """Find the parameters by a first run, make optimiser and steps, resume; return the number of the next epoch."""
        options = self.options
        head = self.loader.head()
        first = self.transform(head)
        self.players = players_of(self.objective, self.model, self.guide, first)
        validation_head = self._prepare_validation(head)
        if options.audit:
            rows = first
            if isinstance(self.train, Batch) and self._is_in_memory and options.transform is None:
                rows = self.train
            with name_nan_parameters(self.model, self.guide):
                self.audit = audit_training(self.model, self.guide, self.objective, rows, validation_head)

        self.problem = build_problem(
            self.objective, self.model, self.guide, first, self.placement.autocast, self.audit.unrunnable
        )
        check_parallel(self.problem, head.names, self.processes)
        updates, names = self._make_updates()
        self._check_single_row()
        self._check_least_rows(head)
        self.missing_gradients = [MissingGradients(update, names) for update in updates]
        self.sequence = GradientSequence(
            updates,
            self.loader,
            accumulate=options.accumulate,
            clip_norm=options.clip_norm,
            processes=self.processes,
            compile=self._choose_compilation() if options.compile is None else options.compile,
            validate=options.validate,
            report=self._say_once if options.compile is None else None,
        )
        self.callbacks = CallbackList(options.callbacks, self._training(head.names))
        self.callbacks.start()
        synchronise(self.processes, self.callbacks.training.tensors, self.loader)
        epochs_before = self.resume(head)
        knows_rows = isinstance(self.train, Batch)
        self.monitor = NonFiniteMonitor(
            self.sequence,
            names,
            self.placement.device,
            knows_rows,
            options.pace,
            skips=options.nonfinite == "skip",
            checkpoint=options.checkpoint,
            precision=options.precision,
        )
        steps_before = 0 if self.position is None else self.position.number
        self.bar.skip(epochs_before, steps_before)
        return epochs_before

    def _make_updates(self) -> tuple[list[Update], dict[int, str]]:
        """Return the updates of a step, those of further players first, and the names of parameters by identity."""
        options = self.options
        problem = self.problem
        problem.of_players = frozenset(id(p) for player in self.players for p in player.parameters)
        updates, names = player_updates(self.players, problem, options.optimizer)
        check_every(updates, options.accumulate)
        names |= parameter_names(problem)
        own = problem.own_parameters
        required = list(problem.own_required_parameters.values())
        self.optimizer = make_optimizer(options.optimizer, own, required, names, of_players=problem.of_players)
        updates.append(Update(problem, own if self.players else None, self.optimizer))
        return updates, names

    def _choose_compilation(self) -> bool:
        """Return True if compiled steps pay, and say so."""
        options = self.options
        steps = options.epochs * (self.loader.known_length() or 0)
        by_step = options.scheduler is not None and options.scheduler_interval == "step"
        device = self.placement.device
        pays = compilation_pays(self.problem, device, steps, by_step=by_step, validate=options.validate)
        if pays:
            self._say_once(
                f"the step is compiled, for {steps:,} of them on {device}: this takes up to some minutes at the first "
                "one, and compile=False leaves it out"
            )
        return pays

    def _say_once(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            self.bar.say(text)

    def _prepare_validation(self, head: Batch) -> Batch | None:
        """Return rows for validation, of a loader some, after placing them; None if there are none."""
        options = self.options
        if options.validation is None:
            return None
        batch_size = options.validation_batch_size or options.batch_size
        device = self.placement.device
        self.validation = Validation(options.validation, batch_size, device, self.placement.autocast, self.processes)
        rows = self.validation.head()
        check_validation_names(rows, head.names)
        return rows

    @property
    def _is_in_memory(self) -> bool:
        """True if the values of all rows can be looked at before the training."""
        return isinstance(self.train, Batch) and not self.train.is_stored

    def _training(self, names: tuple[str, ...]) -> Training:
        """Return the state of the training that callbacks are shown."""
        buffers = [b for network in self.problem.networks for b in network.buffers()]
        tensors = {id(t): t for t in [*self.sequence.parameters, *buffers]}
        optimizers = [update.optimizer for update in self.sequence.updates if update.optimizer is not None]
        return Training(
            self.model,
            self.guide,
            self.history,
            optimizers,
            list(tensors.values()),
            validates=self.validation is not None,
            is_main=self.processes.is_main,
            # describing an objective asks its schedules for later steps, which not every training has to
            options=self._describe_options(names) if self.options.callbacks else {},
        )

    def _describe_options(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Return the settings of the training as numbers and text, for loggers."""
        options = self.options
        learning_rate = self.optimizer.param_groups[0].get("lr")
        return {
            "objective": re.sub(r" at 0x[0-9a-f]+", "", self.objective.describe(names)),
            "rows": self.loader.size,
            "epochs": options.epochs,
            "batch_size": self.loader.batch_size,
            "optimizer": type(self.optimizer).__name__,
            "lr": None if learning_rate is None else float(learning_rate),
            "clip_norm": options.clip_norm,
            "accumulate": options.accumulate,
            "seed": options.seed,
            "precision": options.precision,
            "device": str(self.placement.device),
            "processes": self.processes.world,
        }

    def resume(self, head: Batch) -> int:
        """Restore the state of a checkpoint, if there is one, and return the number of epochs behind it."""
        options = self.options
        loader = self.loader
        epochs_before = 0
        if options.checkpoint is not None:
            identity = data_identity(self.train, head, loader.size, loader.batch_size, len(loader), options.seed)
            identity = {"processes": self.processes.world, **identity}
            self.checkpoint = Checkpoint(
                options.checkpoint,
                self.sequence,
                self.loader,
                self.history.columns,
                self.placement.device,
                identity,
                self.objective.describe(head.names),
                self.callbacks,
                options.pace,
                self.processes,
            )
            epochs_before = self.checkpoint.read(options.epochs, force=options.force_resume)
            self.history.stopped = self.checkpoint.stopped_at == options.epochs
            self.position = self.checkpoint.position
        by_step = options.scheduler_interval == "step"
        self.schedule = Schedule.of(options.scheduler, self.callbacks.training.optimizers, self.history, by_step)
        if self.checkpoint is not None:
            self.checkpoint.schedule = next(iter(self.schedule.schedulers), None)
        self.schedule.skip(epochs_before, self.sequence.due_steps(self.sequence.steps))
        self.callbacks.training.epoch = epochs_before
        self.callbacks.training.step = self.sequence.steps
        return epochs_before

    def _check_single_row(self) -> None:
        """Raise a ValueError if a minibatch will be a single row, too few for batch normalisation."""
        loader = self.loader
        if loader.smallest != 1 or not self.problem.normalises_batches:
            return
        try:
            with temporary_seed(0, loader.device), preserve_buffers(*self.problem.networks):
                set_training(self.networks, True)
                self.evaluate(self.transform(loader.head()[:1]), step=0)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            mend = "pass drop_last=True, or another batch_size"
            if loader.batch_size == 1:
                mend = "pass a larger batch_size"
            to = ", to the loader" if isinstance(loader.data, DataLoader) else ""
            raise ValueError(
                f"{loader.size} rows in minibatches of {loader.batch_size or 'the sizes given'} leave a minibatch of a "
                f"single row, of which batch normalisation has no variance: {mend}{to}"
            ) from error
        finally:
            set_training(self.networks, False)

    def _check_least_rows(self, head: Batch) -> None:
        """Raise a ValueError if a minibatch will have fewer rows than the objective needs."""
        least = self.objective.least_rows(head.names)
        sizes = {"minibatch": self.loader.smallest}
        if self.validation is not None:
            sizes["minibatch of the validation rows"] = self.validation.smallest
        for what, smallest in sizes.items():
            if 0 < smallest < least:
                mend = "pass drop_last=True, or another batch_size" if what == "minibatch" else "pass other rows"
                raise ValueError(
                    f"the smallest {what} has {smallest} of the {least} rows that the objective needs, which compares "
                    f"rows of a minibatch with each other: {mend}"
                )

    # -- an epoch -------------------------------------------------------------------------------------------------

    def run_epoch(self, epoch: int, is_first: bool) -> dict[str, float] | None:
        """Take the steps of an epoch, or those until a callback stops the training.

        Args:
            epoch: its number, counted from 0.
            is_first: True for the first epoch of this process.

        Returns:
            The loss and the value of each term, per row; None if the epoch was broken off.
        """
        checks_values = is_first and (self.options.transform is not None or not self._is_in_memory)
        devices = generator_devices(self.placement.device)
        begun = self.position
        position = begun or Position.at_start(devices, self.loader)
        set_training(self.networks, True)
        with self.monitor.guard(position.sums):
            for batch in self.minibatches(epoch, begun):
                if checks_values:
                    self.audit.check(batch)
                self.monitor.before_step(batch, epoch + 1, position.number + 1)
                rows = self.loader.count(batch)
                values = self.take_step(batch)
                if values is None:
                    position.skip(rows)
                else:
                    for missing in self.missing_gradients:
                        missing.after_step(batch, self.sequence.steps)
                    position.add(values.labels, values.values * (rows / batch.size), rows)
                    self.monitor.after_step(position.sums.values())
                self.bar.step()
                self.after_step(values, batch.size)
                if self.is_over:
                    break
        self.monitor.check(position.sums.values())
        set_training(self.networks, False)
        if self.is_over:
            self.position = position if position.number else None
            return None

        self.position = None
        if position.rows == 0:
            raise ValueError(f"the loader gave no minibatch in epoch {epoch + 1}: can it be gone through but once?")
        if not self.problem.all_in_plate:
            self.loader.check_rows(position.rows)
        if begun is None:
            for missing in self.missing_gradients:
                missing.after_epoch(self.loader.modalities)
        entry = values_per_row(*merge_sums(self.processes, position.sums, position.rows - position.skipped_rows))
        if self.options.nonfinite == "skip":
            entry["skipped"] = float(position.skipped)
        return entry

    def minibatches(self, epoch: int, begun: Position | None) -> Iterator[Batch]:
        """Yield the minibatches of an epoch, transformed, or those that are left of one that was begun.

        Args:
            epoch: its number, counted from 0.
            begun: the place in it that a checkpoint holds.
        """
        devices = generator_devices(self.placement.device)
        states = [generator_state(device) for device in devices]

        def return_to_step() -> None:
            for device, state in zip(devices, states, strict=True):
                set_generator_state(device, state)

        if begun is None:
            iterator = self.loader.epoch(epoch)
        else:
            begun.rewind(devices, self.loader)
            iterator = self.loader.epoch(epoch, begun.number, return_to_step)
        while True:
            try:
                batch = next(iterator, None)
            except RuntimeError:
                if self.is_interrupted:  # it has ended the loader's processes as well
                    return
                raise
            if batch is None:
                return
            yield batch if batch is self.loader.idle else self.transform(batch)

    def take_step(self, batch: Batch) -> StepValues | None:
        """Take a step; return the values of the loss and its terms, summed over rows, or None if it is left out."""
        skips = self.options.nonfinite == "skip"
        with explain_index_errors({"model": self.model, "guide": self.guide}, batch.size, "a minibatch of {} rows"):
            try:
                values = self.sequence(batch)
            except torch.OutOfMemoryError:
                raise
            except (ValueError, RuntimeError, ArithmeticError) as error:
                if skips and self.processes.world == 1 and self.monitor.finish_step([], error):
                    return None
                self.monitor.explain_error(error)
                raise
        if skips and self.monitor.finish_step([each.values for each in values if each is not None]):
            return None
        return join_values(values, batch.size)

    def after_step(self, values: StepValues | None, rows: int) -> None:
        """Move schedule and callbacks on after a step; the callbacks not after one that was left out."""
        moved = self.sequence.was_due(self.sequence.steps - 1)
        if moved:
            self.schedule.after_step()
        training = self.callbacks.training
        training.step = self.sequence.steps
        training.moved = moved and values is not None
        if self.callbacks.watches_steps and values is not None:
            training.step_values = step_values(values.labels, values.values, rows)
            self.history.stopped = self.callbacks.after_step()
        if self.processes.world > 1:
            # the flags go to the others with the gradients of the next step
            stops = self.history.stopped or self.sequence.votes[0]
            self.sequence.votes = (stops, self.interruption.requested)
            self.history.stopped, self.interruption_agreed = self.sequence.agreed

    def transform(self, batch: Batch) -> Batch:
        """Return a minibatch as the user's ``transform`` changes it.

        Raises:
            TypeError, ValueError: the transform returns something else, or other rows.
        """
        if self.options.transform is None:
            return batch
        new = self.options.transform(batch)
        if not isinstance(new, Batch):
            raise TypeError(
                f"expected transform to return a pyro_mm.Batch, got {describe(new)} from it: return "
                "batch.replaced({...})"
            )
        if new.size != batch.size or new.total != batch.total:
            raise ValueError(
                f"the transform made a batch of {new.size} rows of {new.total} out of one of {batch.size} of "
                f"{batch.total}: "
                "return batch.replaced({...}), which keeps the number and the places of the rows"
            )
        return new

    # -- after an epoch -------------------------------------------------------------------------------------------

    def evaluate(self, batch: Batch, step: int) -> Loss:
        """Return the loss of some rows, without a graph."""
        with torch.no_grad():
            return self.objective.evaluate(self.model, self.guide, batch, step=step)

    def record(self, epoch: int, entry: dict[str, float]) -> None:
        """Validate, add an epoch to the history, move callbacks and schedule on, write the checkpoint."""
        training = self.callbacks.training
        training.epoch = epoch + 1
        failure: BaseException | None = None
        with self.callbacks.evaluation():
            if self.validation is not None:
                step = self.sequence.steps
                entry["validation"] = self.validation.loss(
                    lambda batch: self.evaluate(batch, step), self.problem.scales_to_data, epoch + 1
                )
            self.history.append(entry)
            warn_of_players(self.players, entry, self.warned)
            self.bar.show(entry)
            training.entry = entry
            try:
                self.history.stopped = self.callbacks.after_epoch()
            except BaseException as error:
                failure = error
        self.schedule.after_epoch(epoch)
        self.agree_to_stop()
        if self.checkpoint is not None and not self.history.stopped:
            self.checkpoint.after_epoch(epoch + 1)
        try:
            if failure is not None:
                raise failure
            if self.options.callback is not None and self.options.callback(epoch + 1, entry) is True:
                self.history.stopped = True
        except BaseException:
            if self.checkpoint is not None and self.processes.world == 1:
                self.checkpoint.write(epoch + 1)
            raise
        self.agree_to_stop()


@dataclass(frozen=True)
class Placement:
    """Device and precision of a training."""

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[Any]:
        """Return a context in which networks run in this precision."""
        if self.precision == "32-true":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def _training_device(networks: list[nn.Module], device: torch.device | None, model: Any, guide: Any) -> torch.device:
    """Return the device to train on, with its number.

    None is the device of the modules; or CUDA, if there is one, the modules are on the CPU, and model and guide are
    modules both.
    """
    if device is None:
        parameters = (p for network in networks for p in network.parameters())
        device = next((p.device for p in parameters), torch.get_default_device())
        both = isinstance(model, nn.Module) and isinstance(guide, nn.Module)
        if both and device.type == "cpu" and torch.cuda.is_available():
            device = torch.device("cuda")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device
