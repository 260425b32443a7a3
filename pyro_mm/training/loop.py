"""Stochastic-gradient training of any (model, guide, objective)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader

from ..batch.batch import Batch
from ..handlers.internals import BatchNorm
from ..scoring.audit.training import TrainingAudit, audit_training
from ..scoring.program_errors import indices_explained
from ..utils.arguments import check_choice, check_flag, check_function, check_integer, check_path, check_seed, describe
from ..utils.global_state import preserve_process_settings
from ..utils.locks import lock_path
from ..utils.modules import buffers_kept
from ..utils.reachable import ReachableObjects
from ..utils.seeding import temporary_seed
from .arguments import (
    check_device,
    check_gradients,
    check_objective,
    check_optimizer,
    check_optimizer_factory,
    check_precision,
    check_rows,
    check_schedule,
    check_scheduler_factory,
    check_validation,
)
from .checkpoint import Checkpoint, data_identity
from .compile import Staged
from .first_run import nan_parameters_named, probe
from .history import History
from .loader import MinibatchLoader
from .missing_gradients import Unreached
from .nonfinite import Watch, validation_check
from .parameter_names import parameter_names
from .step import EagerStep, TrainingError, TrainingProblem
from .tracing import unchanged


def fit(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    objective: Any,
    train: Batch | DataLoader[Any],
    *,
    validation: Batch | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    seed: int | None = None,
    device: torch.device | str | None = None,
    precision: str = "32-true",
    compile: bool = False,
    validate: bool | None = None,
    resident: bool | None = None,
    workers: int = 0,
    drop_last: bool | None = None,
    transform: Callable[[Batch], Batch] | None = None,
    checkpoint: str | Path | None = None,
    resume: Literal["strict", "force"] = "strict",
    progress: bool = True,
    callback: Callable[[int, dict[str, float]], None] | None = None,
    audit: bool = True,
) -> History:
    """Minimises an objective's loss a row, by minibatches drawn without replacement.

    Parameters are those of the model and the guide where they are modules, and otherwise the leaves that a run of
    them depends on: a network held by a closure trains, and so does ``pyro.param``. Nothing enters Pyro's global
    store but what a ``pyro.param`` puts there, so a second call, or a second model, starts from its own weights. On a
    CPU, networks of a few hundred units train fastest on one thread (``torch.set_num_threads(1)``).

    Args:
        model, guide: callables of a batch.
        objective: an :class:`~pyro_mm.objectives.Objective`, whose weights start from step 0, or any
            ``pyro.infer.ELBO``.
        train: all rows; ``batch.plate()`` is sized to them, so that a latent outside of it is weighed right. Or a
            ``DataLoader`` of batches, for rows that no memory holds; the plate is sized to the rows of its sampler.
        validation: rows whose loss is taken after every epoch, under one seed.
        optimizer: parameters -> ``torch.optim`` optimiser. The gradient it sees is that of the loss a row. By default
            Adam with a step size of 0.001, all parameters in one fused update.
        scheduler: the optimiser -> ``torch.optim.lr_scheduler`` of its step sizes, moved on after every epoch; one that
            waits for a plateau sees the validation loss, or the loss where no rows are for validation.
        seed: of the shuffling and the draws; None goes on with torch's generator.
        device: where to train. None is where the modules are; or CUDA, where there is one and both are modules.
        precision: "bf16-mixed" runs the networks under autocast, with log-probabilities in float32; "32-true" runs
            them as they are.
        compile: traces the step once and compiles it (:func:`pyro_mm.stage`), which takes seconds to a minute and pays
            from some thousand steps on. What cannot be traced runs as it is, with a warning that says why.
        validate: whether Pyro checks shapes and supports at every step; None checks the first one.
        resident, workers: whether the rows live on the device, and processes that fetch them if they do not; None
            decides by their size.
        drop_last: leave out the last minibatch of every epoch if it is smaller than the others, as it has to be where
            it is a single row and a network has batch normalisation. A loader has a setting of its own.
        transform: what is done to every minibatch of the training rows before its step, on the device: drawing its
            binary pixels anew, for instance. It returns ``batch.replaced({...})``, the same rows with other values.
        checkpoint: a file, written after every epoch (of short ones after some, and the last; it takes a twentieth of
            the time at most). Where it is there already, training goes on after the epochs that it holds, with the
            same numbers as if it had not been stopped. While it runs no other training may write to the file.
        resume: "strict" goes on from a checkpoint of the same data (size, names, shapes, dtypes, and a hash of some
            rows), batch size and seed alone; "force" from one of others, too, or of an earlier version of this
            package. The parameters have to fit in either case.
        audit: False spares the audit of the pair (:mod:`pyro_mm.scoring.audit`), and what it would refuse.
        callback: called after every epoch with its number and its entry of the history. What it raises ends the
            training, and the checkpoint is of that epoch.

    Returns:
        The history. Modules, those too that a function refers to, are left in ``eval`` mode, whatever ends the
        training; frozen ones that a function refers to are in the mode that they were in.

    Raises:
        TrainingError: a parameter without gradient in the first epoch, or one that the optimiser does not have; a
            ValueError.
        ValueError: a checkpoint that is damaged, of something else, of more epochs, or in use by another training; a
            transform that returns other rows.
        NotFinite: a loss (also that of the validation rows), a gradient or a parameter that is NaN or infinite; a
            ValueError and a FloatingPointError. Parameters are put back to before that step.
        TypeError, ValueError: an argument of another type, or out of range.
    """
    check_gradients("fit")
    check_function("model", model)
    check_function("guide", guide)
    check_objective(objective)
    check_rows(train)
    check_integer("epochs", epochs, least=0)
    batch_size = check_integer("batch_size", batch_size, least=1)
    check_optimizer_factory(optimizer)
    check_scheduler_factory(scheduler)
    seed = check_seed(seed)
    device = check_device(device)
    check_precision(precision)
    check_choice("resume", resume, ("strict", "force"))
    check_integer("workers", workers, least=0)
    for name, flag in (("compile", compile), ("progress", progress)):
        check_flag(name, flag)
    for name, optional in (("validate", validate), ("resident", resident), ("drop_last", drop_last)):
        if optional is not None:
            check_flag(name, optional)
    if transform is not None:
        check_function("transform", transform)
    if callback is not None:
        check_function("callback", callback, ("epoch", "entry"))
    if checkpoint is not None:
        checkpoint = check_path("checkpoint", checkpoint)

    networks = _networks(model, guide)
    both = isinstance(model, nn.Module) and isinstance(guide, nn.Module)
    placement = _Placement(_device(networks, device, both), precision)
    for network in networks:
        network.to(placement.device)
    feed = MinibatchLoader(train, batch_size, placement.device, resident, workers, drop_last)
    history = History()
    if hasattr(objective, "steps"):
        objective.steps = 0  # a warm-up is one of this training
    with (
        _left_in_evaluation(networks),
        lock_path(checkpoint),
        temporary_seed(seed, placement.device),
        _bar(progress, epochs, len(feed)) as bar,
    ):
        change = (lambda batch: batch) if transform is None else _changing(transform)
        head = feed.head()
        check_validation(validation, head.names)
        validation = None if validation is None else validation.to(placement.device)
        first = change(head)
        audited = TrainingAudit()
        if check_flag("audit", audit):
            whole = train if isinstance(train, Batch) and transform is None else first
            with nan_parameters_named(model, guide):
                audited = audit_training(model, guide, objective, whole, validation)
        problem = probe(objective, model, guide, first, placement.autocast, audited.unrunnable)
        with preserve_process_settings():  # a process's first optimiser imports torch's compiler
            optimiser = check_optimizer((_adam if optimizer is None else optimizer)(problem.parameters))
        names = parameter_names(problem)
        _check_held(optimiser, list(problem.required.values()), names)
        _check_single_row(problem, feed, change)
        unreached = Unreached(problem, names)
        running = EagerStep(problem, optimiser, validate)
        staged = Staged(problem, optimiser, validate=bool(validate)) if compile else None
        step = _Stepping(problem, feed, running, staged)
        saved, done = None, 0
        if checkpoint is not None:
            identity = data_identity(train, head, feed.size, feed.batch_size, len(feed), seed)
            saved = Checkpoint(checkpoint, problem, optimiser, history.columns, placement.device, identity)
            done = saved.read(epochs, force=resume == "force")
        plan = None if scheduler is None else check_schedule(scheduler(optimiser))
        if saved:
            saved.schedule = plan
        planned = _scheduled(plan, history, done)
        forget = staged.retrace if staged is not None else None
        watch = Watch(problem, optimiser, step, names, placement.device, isinstance(train, Batch), forget)
        bar(done=done)
        for epoch in range(done, epochs):
            _set_training(networks, True)
            sums: dict[tuple[str, ...], Tensor] = {}
            seen = 0
            with watch.guard(sums):
                for number, batch in enumerate(map(change, feed), 1):
                    if epoch == done and (transform is not None or not isinstance(train, Batch)):
                        audited.check(batch)
                    watch.before_step(batch, epoch + 1, number)
                    with indices_explained({"model": model, "guide": guide}, batch.size, "a minibatch of {} rows"):
                        try:
                            values = step(batch)
                        except torch.OutOfMemoryError:
                            raise
                        except (ValueError, RuntimeError, ArithmeticError) as error:
                            watch.explain_error(error)
                            raise
                    unreached.after_step(batch)
                    key = ("loss", *problem.by_term())
                    sums[key] = sums[key] + values if key in sums else values
                    seen += batch.size
                    watch.after_step(sums.values())
                    bar()
            watch.look(sums.values())
            if seen == 0:
                raise ValueError(f"the loader gave no minibatch in epoch {epoch + 1}: can it be gone through but once?")
            if not problem.local:
                feed.check_rows(seen)
            unreached.after_epoch(feed.modalities)
            entry: dict[str, float] = {}
            for columns, totals in sums.items():
                for name, total in zip(columns, totals.tolist(), strict=True):
                    entry[name] = entry.get(name, 0.0) + total / seen
            _set_training(networks, False)
            if validation is not None:
                entry["validation"] = _validation_loss(problem, validation, batch_size, placement, epoch + 1)
            history.append(entry)
            planned(epoch)
            bar(entry)
            if saved:
                saved.after(epoch + 1)
            if callback is not None:
                try:
                    callback(epoch + 1, entry)
                except BaseException:
                    if saved:
                        saved.write(epoch + 1)
                    raise
        if saved:
            saved.write(epochs)
    return history


# -- modes ----------------------------------------------------------------------------------------------------------


def _networks(model: Any, guide: Any) -> list[nn.Module]:
    """Return the outermost modules that model and guide are or refer to.

    One that a function refers to and that is frozen as a whole, such as a network trained before, is left as it is.
    """
    reached = ReachableObjects({"model": model, "guide": guide}).modules.values()

    def frozen(module: nn.Module) -> bool:
        parameters = list(module.parameters())
        return bool(parameters) and not any(p.requires_grad for p in parameters)

    return [m for m in reached if m is model or m is guide or not frozen(m)]


def _set_training(networks: list[nn.Module], training: bool) -> None:
    for network in networks:
        network.train(training)


@contextmanager
def _left_in_evaluation(networks: list[nn.Module]) -> Iterator[None]:
    """Set networks to evaluation mode, and leave them in it however this ends."""
    _set_training(networks, False)
    try:
        yield
    finally:
        _set_training(networks, False)


# -- steps ----------------------------------------------------------------------------------------------------------


class _Stepping:
    """A step of training, by running the programs or compiled, that knows how many rows its loss stands for."""

    def __init__(self, problem: TrainingProblem, feed: MinibatchLoader, running: EagerStep, staged: Staged | None):
        self.problem = problem
        self.feed = feed
        self.running = running
        self.staged = staged  # None, too, once the first batch turns out not to be traceable
        self.pads = feed.ragged and problem.pads
        self.begun = False

    def rows(self, batch: Batch) -> int:
        """Return the number of rows that the loss of a batch is scaled up to."""
        return self.feed.size if self.problem.scaled else batch.size

    def __call__(self, batch: Batch) -> Tensor:
        """Take a step.

        The first one of a compiled training, of one that is resumed too, is checked by a run of the programs that
        changes nothing, so that all steps are compiled ones, wherever the training was stopped.

        Args:
            batch: a minibatch.

        Returns:
            The loss and the value of each term, ``(1 + T,)``, summed over the rows of the batch.
        """
        rows = self.rows(batch)
        share = 1.0
        size = self.feed.batch_size
        if not self.begun and self.staged is not None:
            with unchanged(self.problem, batch.device):
                self.running.check(batch, rows)
        if self.staged is None:
            loss = self.running(batch, rows)
        elif not self.pads or batch.size > size:
            loss = self.staged(batch, rows)
        else:
            # the padding counts in the plate's size, so the scale of the rows in it is too small by this
            share = size / batch.size if self.problem.scaled else 1.0
            loss = self.staged(batch.padded(size), rows / share)
        if not self.begun and self.staged is not None and self.staged.reasons:
            self.staged = None
        self.begun = True
        values = torch.stack([loss, *self.problem.by_term().values()]).double()
        return values * (share * batch.size / rows)


def _changing(transform: Callable[[Batch], Batch]) -> Callable[[Batch], Batch]:
    def change(batch: Batch) -> Batch:
        new = transform(batch)
        if not isinstance(new, Batch):
            raise TypeError(
                f"expected transform to return a pyro_mm.Batch, got {describe(new)} from it: return "
                "batch.replaced({...})"
            )
        if new.size != batch.size or new.total != batch.total:
            raise ValueError(
                f"the transform made a batch of {new.size} rows of {new.total} out of one of {batch.size} of "
                f"{batch.total}: return batch.replaced({{...}}), which keeps what the rows are a part of"
            )
        return new

    return change


def _adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    parameters = list(parameters)
    return torch.optim.Adam(parameters, 1e-3, fused=all(p.is_floating_point() for p in parameters))


def _scheduled(
    plan: LRScheduler | None,
    history: History,
    done: int,
) -> Callable[[int], None]:
    """Return a function that moves a schedule on after an epoch, after moving it on for those that are done."""
    if plan is None:
        return lambda epoch: None

    def step(epoch: int) -> None:
        if isinstance(plan, ReduceLROnPlateau):
            columns = history.columns
            plan.step(columns.get("validation", columns["loss"])[epoch])
        else:
            plan.step()

    with warnings.catch_warnings():
        # the steps that came before were another process's
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
        for epoch in range(done):
            step(epoch)
    return step


def _validation_loss(
    problem: TrainingProblem, rows: Batch, batch_size: int, placement: _Placement, epoch: int
) -> float:
    total = 0.0
    with temporary_seed(0, placement.device), torch.no_grad(), placement.autocast():
        for index in torch.arange(rows.size, device=rows.device).split(batch_size):
            part = rows.subsample(index)
            with validation_check(problem, part, placement.device, epoch) as check:
                loss = problem.objective.loss(problem.model, problem.guide, part)
                check(loss)
            total += loss * len(index) / rows.size if problem.scaled else loss
    return total / rows.size


def _check_held(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], names: dict[int, str], listed: int = 5
) -> None:
    """Raise a TrainingError unless the optimiser has every parameter, once."""
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    held = set(given)
    if len(given) > len(held):
        twice = dict.fromkeys(names.get(key, "a tensor of no module here") for key in given if given.count(key) > 1)
        raise TrainingError(
            f"the optimiser has {len(given) - len(held)} parameters more than once, and would move them as often at "
            f"every step: {', '.join(list(twice)[:listed])}. Give it each once"
        )
    missing = [names[id(p)] for p in parameters if id(p) not in held]
    if missing:
        more = f" and {len(missing) - listed} more" if len(missing) > listed else ""
        raise TrainingError(
            f"the optimiser leaves out {len(missing)} of {len(parameters)} parameters: {', '.join(missing[:listed])}"
            f"{more}. Give it all that its function is called with, and freeze with requires_grad_(False) what is not "
            "to be trained"
        )


def _check_single_row(problem: TrainingProblem, feed: MinibatchLoader, change: Callable[[Batch], Batch]) -> None:
    """Raise a ValueError if a minibatch of an epoch will be a single row that batch normalisation cannot take."""
    normalises = any(isinstance(m, BatchNorm) for root in problem.networks for m in root.modules())
    if feed.smallest != 1 or not normalises:
        return
    networks = _networks(problem.model, problem.guide)
    steps = getattr(problem.objective, "steps", None)
    try:
        with temporary_seed(0, feed.device), buffers_kept(*problem.networks), torch.no_grad():
            _set_training(networks, True)
            problem.objective.loss(problem.model, problem.guide, change(feed.head()[:1]))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        mend = "pass a larger batch_size" if feed.batch_size == 1 else "pass drop_last=True, or another batch_size"
        to = ", to the loader" if isinstance(feed.data, DataLoader) else ""
        raise ValueError(
            f"{feed.size} rows in minibatches of {feed.batch_size or 'the sizes given'} leave a minibatch of a single "
            f"row, of which batch normalisation has no variance: {mend}{to}"
        ) from error
    finally:
        _set_training(networks, False)
        if steps is not None:
            problem.objective.steps = steps


def _device(networks: list[nn.Module], device: torch.device | None, both: bool) -> torch.device:
    """Return where to train, with its number."""
    found = _wanted(networks, device, both)
    return torch.device("cuda", torch.cuda.current_device()) if found.type == "cuda" and found.index is None else found


def _wanted(networks: list[nn.Module], device: torch.device | None, both: bool) -> torch.device:
    if device is not None:
        return device
    here = next((p.device for m in networks for p in m.parameters()), torch.get_default_device())
    return torch.device("cuda") if both and here.type == "cpu" and torch.cuda.is_available() else here


@dataclass(frozen=True)
class _Placement:
    """Device and precision of a training."""

    device: torch.device
    precision: str

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which networks run in this precision."""
        if self.precision == "32-true":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


@contextmanager
def _bar(show: bool, epochs: int, steps: int) -> Iterator[Callable[..., None]]:
    """A progress bar: called with nothing after a step, with the epoch's entry after an epoch, and with ``done`` for
    epochs of an earlier run.
    """
    if not show:
        yield lambda entry=None, done=0: None
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
        task = progress.add_task("", total=epochs)

        def advance(entry: dict[str, float] | None = None, done: int | None = None) -> None:
            if entry is None:
                progress.advance(task, 1 / steps if done is None else done)
                return
            progress.update(
                task, description=", ".join(f"{n} {entry[n]:.2f}" for n in ("loss", "validation") if n in entry)
            )

        yield advance
