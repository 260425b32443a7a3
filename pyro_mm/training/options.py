"""The options of a training, checked by type and range."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ..batch.batch import Batch
from ..utils.arguments import (
    check_choice,
    check_flag,
    check_function,
    check_integer,
    check_number,
    check_path,
    check_seed,
)
from .arguments import (
    check_device,
    check_optimizer_factory,
    check_precision,
    check_scheduler_factory,
    check_validation,
)
from .callback_list import check_callbacks
from .callbacks import Log
from .make_loader import TrainingRows
from .pace import PACE, Pace


@dataclass(frozen=True)
class TrainingOptions:
    """The options of :func:`~pyro_mm.fit`, checked by type."""

    validation: TrainingRows | None
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

    @property
    def schedules_by_step(self) -> bool:
        """True if step sizes move on after every step of the optimisers."""
        return self.scheduler_interval == "step"

    @property
    def skips_nonfinite(self) -> bool:
        """True if minibatches whose step is not finite are left out."""
        return self.nonfinite == "skip"


def check_options(given: Mapping[str, Any]) -> TrainingOptions:
    """Return the options of a training, each checked by itself.

    Args:
        given: name -> value of all keyword arguments of :func:`~pyro_mm.fit`.

    Raises:
        TypeError, ValueError: an argument of another type, or out of range.
    """
    options = dict(given)
    logger = options.pop("logger")
    check_validation(options["validation"])
    _check_numbers(options)
    check_optimizer_factory(options["optimizer"])
    check_scheduler_factory(options["scheduler"])
    options["seed"] = check_seed(options["seed"])
    options["device"] = check_device(options["device"])
    check_precision(options["precision"])
    check_choice("scheduler_interval", options["scheduler_interval"], ("epoch", "step"))
    options["force_resume"] = check_choice("resume", options.pop("resume"), ("strict", "force")) == "force"
    check_choice("nonfinite", options["nonfinite"], ("stop", "skip"))
    _check_flags(options)
    if options["transform"] is not None:
        check_function("transform", options["transform"])
    if options["callback"] is not None:
        check_function("callback", options["callback"], ("epoch", "entry"))
    if options["checkpoint"] is not None:
        options["checkpoint"] = check_path("checkpoint", options["checkpoint"])
    logs = () if logger is None else (Log(logger),)
    options["callbacks"] = (*check_callbacks(options["callbacks"]), *logs)
    return TrainingOptions(**options)


def _check_numbers(options: dict[str, Any]) -> None:
    """Check the options that are numbers, and make integers of them Python's own."""
    for name, least in dict(epochs=0, batch_size=1, workers=0, accumulate=1, devices=1).items():
        options[name] = check_integer(name, options[name], least=least)
    if options["validation_batch_size"] is not None:
        check_integer("validation_batch_size", options["validation_batch_size"], least=1)
    if options["clip_norm"] is not None:
        check_number("clip_norm", options["clip_norm"], above=0.0)


def _check_flags(options: Mapping[str, Any]) -> None:
    """Check the options that are True or False, or None as well."""
    for name in ("progress", "audit"):
        check_flag(name, options[name])
    for name in ("compile", "validate", "resident", "drop_last"):
        if options[name] is not None:
            check_flag(name, options[name])
