"""Stochastic-gradient training of any (model, guide, objective)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from ..batch.batch import Batch
from ..batch.stream import Stream
from ..scoring.prepare_objective import prepare_objective
from ..scoring.training_objective import TrainingObjective
from ..utils.arguments import check_function
from ..utils.launch import run_on_devices
from ..utils.processes import Processes, current_processes
from ..utils.sharing import alone
from .arguments import check_gradients, check_rows
from .history import History
from .options import check_options
from .problem import TrainingError
from .trainer import run_training


def fit(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    objective: TrainingObjective | Any,
    train: Batch | DataLoader[Any] | Stream,
    *,
    validation: Batch | DataLoader[Any] | Stream | None = None,
    validation_batch_size: int | None = None,
    epochs: int = 10,
    batch_size: int = 128,
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None,
    scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    scheduler_interval: Literal["epoch", "step"] = "epoch",
    clip_norm: float | None = None,
    accumulate: int = 1,
    seed: int | None = None,
    device: torch.device | str | None = None,
    precision: str = "32-true",
    compile: bool | None = None,
    validate: bool | None = None,
    resident: bool | None = None,
    workers: int = 0,
    drop_last: bool | None = None,
    transform: Callable[[Batch], Batch] | None = None,
    checkpoint: str | Path | None = None,
    resume: Literal["strict", "force"] = "strict",
    progress: bool = True,
    callback: Callable[[int, dict[str, float]], Any] | None = None,
    callbacks: Iterable[Any] = (),
    logger: Any = None,
    devices: int = 1,
    nonfinite: Literal["stop", "skip"] = "stop",
    audit: bool = True,
) -> History:
    """Train model and guide by minimising an objective's loss per row, by minibatches drawn without replacement.

    Parameters are those of model, guide and objective if these are modules, and otherwise the leaves that a run of
    them depends on: a network held by a closure trains, and so does ``pyro.param``. Nothing enters Pyro's global store
    except by ``pyro.param``, so a second call, or a second model, starts from its own weights. On a CPU, networks of a
    few hundred units train fastest on one thread (``torch.set_num_threads(1)``).

    Args:
        model, guide: callables of a batch.
        objective: an :class:`~pyro_mm.objectives.Objective`; any ``pyro.infer.ELBO``; or your own, an object, a module
            or a function as described by :class:`~pyro_mm.TrainingObjective`. Every training counts its steps from 0
            and hands the count to the objective, for warm-ups.
        train: all rows, N; ``batch.plate()`` is sized to them, so that a latent outside of it is weighed right. Or a
            ``DataLoader`` of batches, for rows that no memory holds; the plate is sized to the rows of its sampler. Or
            a :class:`~pyro_mm.Stream`, for rows that come one after the other; the plate is sized to its ``size``.
        validation: rows whose loss is evaluated after every epoch, under one seed; or a ``DataLoader`` or a
            :class:`~pyro_mm.Stream` of them.
        validation_batch_size: rows of a minibatch of them; None is ``batch_size``.
        epochs: passes through the rows.
        batch_size: rows of a minibatch; a ``DataLoader`` has its own.
        optimizer: parameters -> ``torch.optim`` optimiser. It sees the gradient of the loss per row. By default Adam
            with a step size of 0.001, all parameters in one fused update.
        scheduler: optimiser -> ``torch.optim.lr_scheduler`` of its step sizes, moved on after every epoch; one that
            waits for a plateau sees the validation loss, or the loss if there are no rows for validation.
        scheduler_interval: "step" moves the schedule on after every step of the optimiser instead.
        clip_norm: the largest norm of the gradient of the loss per row, of all parameters together; a longer one is
            scaled down to it. None leaves gradients as they are.
        accumulate: minibatches per step of the optimiser, whose gradient is then that of all their rows. The last
            minibatch of an epoch ends a group. The objective's count of steps goes on counting minibatches. Of several
            players each steps at the last minibatch, before the next one's gradient is taken there: that of the earlier
            minibatches is of the players as they were.
        seed: seed of the shuffling and the draws; None goes on with torch's generator.
        device: where to train. None is where the modules are; or CUDA, if there is one and both are modules.
        precision: "bf16-mixed" runs the networks under autocast, with log-probabilities in float32; "32-true" runs
            them as they are.
        compile: True traces the step once and compiles it (:func:`pyro_mm.stage`), which takes seconds to minutes; a
            step that cannot be traced runs uncompiled, with a warning that says why. None does so where it pays, and
            says so with the progress: on a GPU from 5,000 steps on (``epochs`` times minibatches), unless networks are
            recurrent, ``validate`` is True or the schedule moves by steps. On a CPU it takes True.
        validate: True lets Pyro check shapes and supports at every step, False at none; None checks the first one.
        resident: True keeps all rows on the device, False where they are; None decides by their size.
        workers: processes that fetch rows that do not live on the device. Each goes through the whole source of a
            stream, and makes its share of the minibatches, so that the numbers do not depend on how many there are.
        drop_last: leave out the last minibatch of every epoch if it is smaller than the others, as it has to be if it
            is a single row and a network has batch normalisation. A loader has a setting of its own.
        transform: minibatch of training rows -> ``batch.replaced({...})``, the same rows with other values; applied on
            the device before every step, to draw binary pixels anew, for instance.
        checkpoint: a file, written after every epoch, or after some and the last if epochs are short, so that writing
            takes a twentieth of the time at most. If it exists, training goes on after the epochs that it holds, with
            the same numbers as without a stop; a loader's own generator is part of it. Ctrl-C ends the step at hand,
            and the training goes on from there; without a checkpoint it just ends. While it runs no other training may
            write to the file.
        resume: "strict" accepts only a checkpoint of the same data (size, names, shapes, dtypes, and a hash of some
            rows), batch size and seed; "force" accepts others, and those of earlier versions of this package. The
            parameters have to fit in either case.
        progress: True shows a progress bar.
        callback: called after every epoch with its number and its entry of the history. It stops the training by
            returning True. An error that it raises ends the training, and the checkpoint is of that epoch.
        callbacks: objects with ``on_epoch``, ``on_step`` and others of the methods of
            :class:`pyro_mm.callbacks.Callback`, such as those of :mod:`pyro_mm.callbacks` for early stopping, the best
            weights, averages of weights and logs. One of them stops the training by returning True. A training that was
            stopped does not go on from its checkpoint unless it is given another number of epochs.
        logger: an object with ``log_metrics(metrics, step)``, such as a logger of Lightning Fabric, which is given the
            history's columns after every epoch, as by :class:`pyro_mm.callbacks.Log`.
        devices: processes that train together on this machine's CPU, forked for the time of the training. Each takes
            ``batch_size`` rows of every minibatch, from one permutation; the gradient is that of all of them, what
            compares rows gathers those of all, and draws are each process's own. Model and guide are trained in the
            calling process, which alone prints and writes. Run by torchrun, a script trains on the processes that there
            are, on several machines too; leave it at 1.
        nonfinite: "stop" raises an error at a loss, a gradient or a parameter that is NaN or infinite. "skip" leaves
            such a minibatch out, with parameters, buffers and moments as they were before it, and counts it in the
            history's column ``skipped``; the losses of the history are of the others. It warns of the first, and raises
            the error after 10 of them in a row. Every step is then checked, which waits for the device, and copied.
            Several processes skip together; an error within a step is skipped by a single process alone. Gradients that
            ``accumulate`` has summed before are part of the next step. In either case the minibatch and its state are
            written beside the checkpoint, if there is one, for :func:`pyro_mm.replay`.
        audit: False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`) and its errors.

    Returns:
        The history; ``interrupted`` is True if Ctrl-C ended it early, which also warns. Modules, also those that a
        function refers to, are left in ``eval`` mode, however the training ends; frozen ones that a function refers to
        stay in the mode that they were in.

    Raises:
        TrainingError: a parameter without gradient in the first epoch, or one that the optimiser does not have; a
            ValueError.
        ValueError: a checkpoint that is damaged, of something else, of more epochs, or in use by another training; a
            transform that returns other rows.
        NotFinite: a loss (also that of the validation rows), a gradient or a parameter that is NaN or infinite; a
            ValueError and a FloatingPointError. Parameters are put back to before that step.
        TypeError, ValueError: an argument of another type, or out of range.

    Example:
        >>> import torch, pyro_mm as mm
        >>> rows = mm.Batch({"image": torch.rand(64, 4, 4), "label": torch.arange(64) % 3})
        >>> model, guide, objective = mm.recipes.mvae(rows, latent=2, hidden=(8,))
        >>> history = mm.fit(model, guide, objective, rows, epochs=2, batch_size=32, seed=0, progress=False)
        >>> len(history)
        2
    """
    check_gradients("fit")
    check_function("model", model)
    check_function("guide", guide)
    prepared = prepare_objective(objective)
    check_rows(train)
    options = check_options(
        dict(
            validation=validation, validation_batch_size=validation_batch_size, epochs=epochs, batch_size=batch_size,
            optimizer=optimizer, scheduler=scheduler, scheduler_interval=scheduler_interval, clip_norm=clip_norm,
            accumulate=accumulate, seed=seed, device=device, precision=precision, compile=compile, validate=validate,
            resident=resident, workers=workers, drop_last=drop_last, transform=transform, checkpoint=checkpoint,
            resume=resume, progress=progress, callback=callback, callbacks=callbacks, logger=logger, devices=devices,
            nonfinite=nonfinite, audit=audit,
        )
    )  # fmt: skip

    def run(processes: Processes) -> History:
        with alone():
            return run_training(model, guide, prepared, train, options, processes)

    if options.devices == 1:
        return run(current_processes())
    return run_on_devices(options.devices, run, "training", TrainingError)
