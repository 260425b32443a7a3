"""The preparation of a training: audit, first run, optimisers, callbacks, resume."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..batch.batch import Batch
from ..batch.stream import Stream
from ..scoring.audit.training import TrainingAudit, audit_training
from ..scoring.training_objective import Player
from .arguments import check_validation_names
from .callback_list import CallbackList
from .callbacks import Training
from .checkpoint import Checkpoint, data_identity
from .compile_choice import compilation_pays
from .first_run import build_problem, name_nan_parameters
from .gradients import GradientSequence
from .history import History
from .minibatch_sizes import check_least_rows, check_single_row
from .missing_gradients import MissingGradients
from .nonfinite import NonFiniteMonitor
from .optimization import Schedule, make_optimizer
from .parallel import check_parallel, check_same_rows, synchronise
from .parameter_names import parameter_names
from .players import check_every, player_updates, players_of
from .problem import TrainingProblem
from .progress import ProgressBar
from .run import Run
from .setting import Setting
from .step import Update
from .stop_flags import StopFlags
from .validation import Validation


def prepare(setting: Setting, history: History, flags: StopFlags, bar: ProgressBar) -> Run:
    """Find the parameters by a first run, make optimisers and steps, and resume.

    Args:
        setting: programs, rows, options, processes and device.
        history: is filled with the epochs of a checkpoint.
        flags: flags that end the training early.
        bar: the progress bar, moved on to where the checkpoint ends.
    """
    head = setting.loader.head()
    first = setting.transform(head)
    players = players_of(setting.objective, setting.model, setting.guide, first)
    validation, validation_head = _prepare_validation(setting, head)
    audit = _audit(setting, first, validation_head)
    problem = build_problem(
        setting.objective, setting.model, setting.guide, first, setting.placement.autocast, audit.unrunnable
    )
    if isinstance(setting.train, Stream):
        check_same_rows(head, setting.processes)
    updates, names = _make_updates(setting, problem, players)
    check_parallel(updates, head.names, setting.processes)
    check_single_row(setting, problem)
    check_least_rows(setting, head, validation)
    warned: set[str] = set()
    sequence = _make_sequence(setting, problem, updates, head.names, _say_once(bar, warned))
    callbacks = _start_callbacks(setting, problem, sequence, history, head.names, validates=validation is not None)
    checkpoint = _make_checkpoint(setting, sequence, history, callbacks, head)
    first_epoch = 0
    if checkpoint is not None:
        first_epoch = checkpoint.read(setting.options.epochs, force=setting.options.force_resume)
        history.stopped = checkpoint.stopped_at == setting.options.epochs
    run = Run(
        setting=setting,
        history=history,
        flags=flags,
        bar=bar,
        audit=audit,
        problem=problem,
        players=players,
        sequence=sequence,
        callbacks=callbacks,
        schedule=_make_schedule(setting, callbacks, history, checkpoint),
        monitor=_make_monitor(setting, sequence, names),
        missing_gradients=[MissingGradients(update, names) for update in updates],
        validation=validation,
        checkpoint=checkpoint,
        first_epoch=first_epoch,
        position=None if checkpoint is None else checkpoint.position,
        warned=warned,
    )
    _go_to_first_step(run)
    return run


def _prepare_validation(setting: Setting, head: Batch) -> tuple[Validation | None, Batch | None]:
    """Return the rows for validation, placed, and those to audit, of a loader some; None if there are none."""
    options = setting.options
    if options.validation is None:
        return None, None
    batch_size = options.validation_batch_size or options.batch_size
    autocast = setting.placement.autocast
    validation = Validation(options.validation, batch_size, setting.device, autocast, setting.processes)
    rows = validation.head()
    check_validation_names(rows, head.names)
    return validation, rows


def _audit(setting: Setting, first: Batch, validation: Batch | None) -> TrainingAudit:
    """Audit the pair on all rows, if they are in memory as they are trained on, or on the first ones."""
    options = setting.options
    if not options.audit:
        return TrainingAudit()
    rows = first
    if isinstance(setting.train, Batch) and setting.is_in_memory and options.transform is None:
        rows = setting.train
    with name_nan_parameters(setting.model, setting.guide):
        return audit_training(setting.model, setting.guide, setting.objective, rows, validation)


def _make_updates(
    setting: Setting, problem: TrainingProblem, players: list[Player]
) -> tuple[list[Update], dict[int, str]]:
    """Return the updates of a step, those of further players first, and the names of parameters by identity."""
    options = setting.options
    problem.of_players = frozenset(id(p) for player in players for p in player.parameters)
    updates, names = player_updates(players, problem, options.optimizer)
    check_every(updates, options.accumulate)
    names |= parameter_names(problem)
    own = problem.own_parameters
    required = list(problem.own_required_parameters.values())
    optimizer = make_optimizer(options.optimizer, own, required, names, of_players=problem.of_players)
    updates.append(Update(problem, own if players else None, optimizer))
    return updates, names


def _make_sequence(
    setting: Setting,
    problem: TrainingProblem,
    updates: list[Update],
    names: tuple[str, ...],
    say: Callable[[str], None],
) -> GradientSequence:
    """Return the steps of the training on modalities of these names, compiled if that is asked for or pays."""
    options = setting.options
    return GradientSequence(
        updates,
        setting.loader,
        accumulate=options.accumulate,
        clip_norm=options.clip_norm,
        processes=setting.processes,
        names=names,
        compile=_choose_compilation(setting, problem, say) if options.compile is None else options.compile,
        validate=options.validate,
        report=say if options.compile is None else None,
    )


def _choose_compilation(setting: Setting, problem: TrainingProblem, say: Callable[[str], None]) -> bool:
    """Return True if compiled steps pay, and say so."""
    options = setting.options
    steps = options.epochs * (setting.loader.known_length() or 0)
    by_step = options.scheduler is not None and options.schedules_by_step
    device = setting.device
    pays = compilation_pays(problem, device, steps, by_step=by_step, validate=options.validate)
    if pays:
        say(
            f"the step is compiled, for {steps:,} of them on {device}: this takes up to some minutes at the first "
            "one, and compile=False leaves it out"
        )
    return pays


def _say_once(bar: ProgressBar, warned: set[str]) -> Callable[[str], None]:
    """Return a function that prints a sentence above the bar, unless it did so before."""

    def say(text: str) -> None:
        if text not in warned:
            warned.add(text)
            bar.say(text)

    return say


def _start_callbacks(
    setting: Setting,
    problem: TrainingProblem,
    sequence: GradientSequence,
    history: History,
    names: tuple[str, ...],
    validates: bool,
) -> CallbackList:
    """Call the callbacks for the first time, and let all processes start in one state.

    Args:
        setting: the training.
        problem: the training problem of the objective.
        sequence: takes the steps.
        history: of the training.
        names: the modalities.
        validates: True if there are rows for validation.
    """
    buffers = [b for network in problem.networks for b in network.buffers()]
    tensors = {id(t): t for t in [*sequence.parameters, *buffers]}
    optimizers = [update.optimizer for update in sequence.updates if update.optimizer is not None]
    training = Training(
        setting.model,
        setting.guide,
        history,
        optimizers,
        list(tensors.values()),
        validates=validates,
        is_main=setting.processes.is_main,
        # describing an objective asks its schedules for later steps, which not every training has to
        options=_describe_options(setting, optimizers[-1], names) if setting.options.callbacks else {},
    )
    callbacks = CallbackList(setting.options.callbacks, training)
    callbacks.start()
    synchronise(setting.processes, training.tensors, setting.loader)
    return callbacks


def _describe_options(setting: Setting, optimizer: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings of the training as numbers and text, for loggers."""
    options = setting.options
    learning_rate = optimizer.param_groups[0].get("lr")
    return {
        "objective": re.sub(r" at 0x[0-9a-f]+", "", setting.objective.describe(names)),
        "rows": setting.loader.size,
        "epochs": options.epochs,
        "batch_size": setting.loader.batch_size,
        "optimizer": type(optimizer).__name__,
        "lr": None if learning_rate is None else float(learning_rate),
        "clip_norm": options.clip_norm,
        "accumulate": options.accumulate,
        "seed": options.seed,
        "precision": options.precision,
        "device": str(setting.device),
        "processes": setting.processes.world,
    }


def _make_checkpoint(
    setting: Setting, sequence: GradientSequence, history: History, callbacks: CallbackList, head: Batch
) -> Checkpoint | None:
    """Return the training's checkpoint, not yet read; None if it has none."""
    options = setting.options
    loader = setting.loader
    if options.checkpoint is None:
        return None
    identity = data_identity(setting.train, head, loader.size, loader.batch_size, len(loader), options.seed)
    if isinstance(setting.train, Stream):
        identity["shuffle buffer"] = setting.train.buffer
    return Checkpoint(
        options.checkpoint,
        sequence,
        loader,
        history.columns,
        setting.device,
        {"processes": setting.processes.world, **identity},
        setting.objective.describe(head.names),
        callbacks,
        options.pace,
        setting.processes,
    )


def _make_schedule(
    setting: Setting, callbacks: CallbackList, history: History, checkpoint: Checkpoint | None
) -> Schedule:
    options = setting.options
    schedule = Schedule.of(options.scheduler, callbacks.training.optimizers, history, options.schedules_by_step)
    if checkpoint is not None:
        checkpoint.schedule = next(iter(schedule.schedulers), None)
    return schedule


def _make_monitor(setting: Setting, sequence: GradientSequence, names: dict[int, str]) -> NonFiniteMonitor:
    options = setting.options
    return NonFiniteMonitor(
        sequence,
        names,
        setting.device,
        isinstance(setting.train, Batch | Stream),
        options.pace,
        skips=options.skips_nonfinite,
        checkpoint=options.checkpoint,
        precision=options.precision,
    )


def _go_to_first_step(run: Run) -> None:
    """Move schedule, callbacks and bar on to where the checkpoint ends."""
    sequence = run.sequence
    run.schedule.skip(run.first_epoch, sequence.due_steps(sequence.steps))
    run.callbacks.training.epoch = run.first_epoch
    run.callbacks.training.step = sequence.steps
    run.bar.skip(run.first_epoch, 0 if run.position is None else run.position.number)
