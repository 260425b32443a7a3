"""Callbacks of a training: early stopping, the best weights, averages of weights, logs; and the base of your own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from ..utils.arguments import check_flag, check_integer, check_number, describe
from ..utils.tensor_files import describe_tensor_mismatch
from .history import History

__all__ = ["BestWeights", "Callback", "EarlyStopping", "Log", "Training", "WeightAverage"]


@dataclass
class Training:
    """The state of a training, as its callbacks see it.

    Attributes:
        model, guide: the pair.
        history: the losses of the epochs so far.
        optimizers: the optimisers, one for each player.
        tensors: parameters that are trained, and buffers; all that a weight average or a copy is made of.
        validates: True if there are rows for validation.
        is_main: True in the one process that prints and writes, of several that train together.
        epoch: epochs that are complete.
        step: steps taken so far; one for each minibatch.
        moved: True if the optimisers stepped at the latest step; False while gradients accumulate.
        entry: loss, terms and validation loss of the latest epoch, per row; empty before its end.
        options: settings of the training by name: numbers and text.
    """

    model: Any
    guide: Any
    history: History
    optimizers: list[torch.optim.Optimizer]
    tensors: list[Tensor]
    validates: bool = False
    is_main: bool = True
    epoch: int = 0
    step: int = 0
    moved: bool = False
    entry: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    step_values: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, float]:
        """Loss and terms of the latest step, per row. Reading them waits for the device."""
        return {name: float(value) for name, value in self.step_values.items()}


class Callback:
    """Base of objects that a training calls; override what is needed. Any object with some of these methods will do.

    :meth:`on_step` and :meth:`on_epoch` stop the training by returning True. A callback that has methods
    ``state_dict()`` and ``load_state_dict(state)`` is part of the checkpoint, with numbers, text, tensors and
    containers of them; ``check_state(state)`` may return, in words, a difference that forbids to load it.

    Example:
        >>> import pyro_mm as mm
        >>> class StopBelow(mm.callbacks.Callback):
        ...     def on_epoch(self, training):
        ...         return training.entry["loss"] < 1.0
    """

    def on_start(self, training: Training) -> None:
        """Act before the first step, and before a state is loaded from a checkpoint: start anew."""

    def on_step(self, training: Training) -> bool | None:
        """Act after a step; return True to stop the training."""

    def on_epoch(self, training: Training) -> bool | None:
        """Act after an epoch and its validation; return True to stop the training."""

    def before_evaluation(self, training: Training) -> None:
        """Act before an epoch's validation, and before :meth:`on_end`."""

    def after_evaluation(self, training: Training) -> None:
        """Act after an epoch's validation and :meth:`on_epoch`, before the next step."""

    def on_end(self, training: Training) -> None:
        """Act at the end, also of a training that was stopped or interrupted."""

    def on_error(self, training: Training, error: BaseException) -> None:
        """Act when an error ends the training, which is raised afterwards, in the place of :meth:`on_end`."""


class _Watch(Callback):
    """A callback that follows one column of the history.

    Args:
        column: the column; None is "validation".
        maximize: True if larger is better, as for the terms of an objective.
        min_delta: the smallest change that counts as better.
    """

    def __init__(self, column: str | None, maximize: bool, min_delta: float):
        if column is not None and not isinstance(column, str):
            raise TypeError(f"expected column to be the name of a column of the history, got {describe(column)}")
        self.column = column
        self.maximize = check_flag("maximize", maximize)
        self.min_delta = check_number("min_delta", min_delta, least=0.0)
        self.best = math.nan
        self.best_epoch = 0

    def on_start(self, training: Training) -> None:
        if self.column in (None, "validation") and not training.validates:
            raise ValueError(
                f"{type(self).__name__} follows the validation loss, and the training has no rows for validation: "
                'pass fit(.., validation=..), or column="loss"'
            )
        self.best = math.nan
        self.best_epoch = 0

    def _improves(self, training: Training) -> bool:
        """Compare the latest epoch with the best one before it, and take its place if it is better."""
        column = "validation" if self.column is None else self.column
        if column not in training.entry:
            known = ", ".join(map(repr, training.entry))
            raise ValueError(f"{type(self).__name__}: unknown column {column!r}, expected one of {known}")
        value = training.entry[column]
        gain = (value - self.best) if self.maximize else (self.best - value)
        if not (math.isnan(self.best) or gain > self.min_delta):
            return False
        self.best = value
        self.best_epoch = training.epoch
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_epoch": self.best_epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best = float(state["best"])
        self.best_epoch = int(state["best_epoch"])


class EarlyStopping(_Watch):
    """Stop a training when its validation loss has not improved for some epochs.

    Use it with :class:`BestWeights`, or the weights are those of the last epoch.

    Args:
        patience: epochs without improvement, after which it stops.
        column: a column of the history; None is ``"validation"``.
        maximize: True if larger is better, as for the terms of an objective.
        min_delta: the smallest change that counts as an improvement.

    Attributes:
        best: the best value so far.
        best_epoch: its epoch, counted from 1.

    Example:
        >>> import torch, pyro_mm as mm
        >>> rows = mm.Batch({"image": torch.rand(64, 4, 4), "label": torch.arange(64) % 3})
        >>> model, guide, objective = mm.recipes.mvae(rows, latent=2, hidden=(8,))
        >>> stop = [mm.callbacks.EarlyStopping(patience=2), mm.callbacks.BestWeights()]
        >>> history = mm.fit(model, guide, objective, rows[:48], validation=rows[48:], epochs=3, callbacks=stop,
        ...                  progress=False)
    """

    def __init__(
        self, patience: int = 10, column: str | None = None, *, maximize: bool = False, min_delta: float = 0.0
    ):
        super().__init__(column, maximize, min_delta)
        self.patience = check_integer("patience", patience, least=1)

    def on_epoch(self, training: Training) -> bool:
        return not self._improves(training) and training.epoch - self.best_epoch >= self.patience


class BestWeights(_Watch):
    """Keep a copy of the weights of the best epoch, and restore it at the end of the training.

    Parameters and buffers are copied. Beside a :class:`WeightAverage` they are the averages of that epoch.

    Args:
        column: a column of the history; None is ``"validation"``.
        maximize: True if larger is better, as for the terms of an objective.

    Attributes:
        best: the best value so far.
        best_epoch: its epoch, counted from 1.
    """

    def __init__(self, column: str | None = None, *, maximize: bool = False):
        super().__init__(column, maximize, 0.0)
        self._like: list[Tensor] = []
        self._copies: list[Tensor] = []

    def on_start(self, training: Training) -> None:
        super().on_start(training)
        self._like = training.tensors
        self._copies = []

    def on_epoch(self, training: Training) -> None:
        if not self._improves(training):
            return
        if not self._copies:
            self._copies = [t.detach().clone() for t in training.tensors]
        _copy(self._copies, training.tensors)

    def on_end(self, training: Training) -> None:
        if self._copies:
            _copy(training.tensors, self._copies)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"tensors": self._copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._copies = [t.to(like.device) for t, like in zip(state["tensors"], self._like, strict=False)]

    def check_state(self, state: Mapping[str, Any]) -> str:
        return _difference(state["tensors"], self._like)


class WeightAverage(Callback):
    r"""Average the weights over the steps of a training; evaluate with the average, and leave it at the end.

    With a decay :math:`d`, after every step :math:`\bar\theta \leftarrow d\,\bar\theta + (1 - d)\,\theta`
    (exponential moving average); without one, the mean of the weights after each epoch (stochastic weight averaging).
    The average counts from the end of epoch ``start``. Floating-point buffers, such as running means, are averaged too.
    The validation loss, :class:`BestWeights` and the weights at the end are those of the average; steps are taken from
    the weights themselves.

    Args:
        decay: :math:`d`, in [0, 1); None takes the mean over epochs.
        start: epochs before the average begins.

    Attributes:
        count: number of weights that the average has.

    References:
        Izmailov et al. (2018), Averaging Weights Leads to Wider Optima and Better Generalization.
    """

    def __init__(self, decay: float | None = 0.999, *, start: int = 0):
        self.decay = None if decay is None else check_number("decay", decay, least=0.0, below=1.0)
        self.start = check_integer("start", start, least=0)
        self.count = 0
        self._like: list[Tensor] = []
        self._averages: list[Tensor] = []
        self._own: list[Tensor] = []

    def on_start(self, training: Training) -> None:
        self.count = 0
        self._like = _floating(training.tensors)
        self._averages = []

    def on_step(self, training: Training) -> None:
        if self.decay is not None and training.moved and training.epoch >= self.start:
            self._add(training)

    def before_evaluation(self, training: Training) -> None:
        if self.decay is None and self.count < training.epoch - self.start:
            self._add(training)
        if self.count:
            tensors = _floating(training.tensors)
            self._own = [t.detach().clone() for t in tensors]
            _copy(tensors, self._averages)

    def after_evaluation(self, training: Training) -> None:
        if self.count:
            _copy(_floating(training.tensors), self._own)
        self._own = []

    @torch.no_grad()
    def _add(self, training: Training) -> None:
        tensors = [t.detach() for t in _floating(training.tensors)]
        if self.count == 0:
            self._averages = [t.clone() for t in tensors]
        elif self.decay is None:
            get_swa_multi_avg_fn()(tuple(self._averages), tuple(tensors), self.count)
        else:
            get_ema_multi_avg_fn(self.decay)(tuple(self._averages), tuple(tensors), self.count)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "averages": self._averages}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = int(state["count"])
        self._averages = [t.to(like.device) for t, like in zip(state["averages"], self._like, strict=False)]

    def check_state(self, state: Mapping[str, Any]) -> str:
        return _difference(state["averages"], self._like)


class Log(Callback):
    """Hand the numbers of a training to a logger: any object with ``log_metrics(metrics, step)``.

    Loggers of Lightning Fabric have this method, such as ``lightning.fabric.loggers.CSVLogger`` and
    ``TensorBoardLogger``. The columns of the history are logged after every epoch, at the count of steps, under names
    that every logger can take: of the term ``(*, -, image)`` it is ``all_none_image``. Methods that a logger may have
    besides are called as by Lightning: ``log_hyperparams(options)`` at the start, and at the end, also after an error,
    ``save()`` and ``finalize(status)`` with "success", "interrupted" or "failed". Of several processes rank 0
    logs.

    Args:
        logger: the logger.
        every: log loss and terms of a step too, every so many steps; None logs epochs alone. Each waits for the device.

    Example:
        >>> import pyro_mm as mm
        >>> class Printer:
        ...     def log_metrics(self, metrics, step):
        ...         print(step, metrics)
        >>> log = mm.callbacks.Log(Printer(), every=100)
    """

    def __init__(self, logger: Any, every: int | None = None):
        if isinstance(logger, type) or not callable(getattr(logger, "log_metrics", None)):
            raise TypeError(f"expected logger to be an object with log_metrics(metrics, step), got {describe(logger)}")
        self.logger = logger
        self.every = None if every is None else check_integer("every", every, least=1)

    def on_start(self, training: Training) -> None:
        if training.is_main and callable(getattr(self.logger, "log_hyperparams", None)):
            with suppress(NotImplementedError):  # of Fabric's CSVLogger
                self.logger.log_hyperparams(dict(training.options))

    def on_step(self, training: Training) -> None:
        if self.every is not None and training.is_main and training.step % self.every == 0:
            values = {f"step/{name}": value for name, value in _metric_names(training.values).items()}
            self.logger.log_metrics(values, step=training.step)

    def on_epoch(self, training: Training) -> None:
        if training.is_main:
            self.logger.log_metrics({**_metric_names(training.entry), "epoch": training.epoch}, step=training.step)

    def on_end(self, training: Training) -> None:
        self._close(training, "interrupted" if training.history.interrupted else "success")

    def on_error(self, training: Training, error: BaseException) -> None:
        self._close(training, "failed")

    def _close(self, training: Training, status: str) -> None:
        if not training.is_main:
            return
        if callable(getattr(self.logger, "save", None)):
            self.logger.save()
        if callable(getattr(self.logger, "finalize", None)):
            self.logger.finalize(status)


def _metric_names(values: Mapping[str, float]) -> dict[str, float]:
    """Return values under names of letters, digits and ``_./-``, each of them once."""
    found: dict[str, float] = {}
    for name, value in values.items():
        words = name.replace("*", "all").replace("-,", "none,")
        plain = re.sub(r"[^\w./-]+", "_", words).strip("_") or "value"
        unique = plain
        number = 2
        while unique in found:
            unique = f"{plain}_{number}"
            number += 1
        found[unique] = value
    return found


@torch.no_grad()
def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _difference(found: Any, tensors: Sequence[Tensor]) -> str:
    """Compare saved tensors with those that they are copies of: the difference in words, empty if there is none."""
    if not isinstance(found, list) or len(found) not in (0, len(tensors)):
        return f"it is not of {len(tensors)} tensors"
    texts = [describe_tensor_mismatch(saved, here) for saved, here in zip(found, tensors, strict=False)]
    return next((text for text in texts if text), "")


def _floating(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t for t in tensors if t.is_floating_point() or t.is_complex()]
