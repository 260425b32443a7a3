"""Checks of the arguments of a training: rows, optimiser, schedule, precision, device."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..batch.batch import Batch, check_batch
from ..batch.stream import Stream
from ..utils.arguments import check_choice, check_function, describe

PRECISIONS = ("32-true", "bf16-mixed")


def check_gradients(what: str) -> None:
    """Raise a ValueError if torch takes no gradients here, for a function of this name."""
    for on, name in ((torch.is_inference_mode_enabled(), "inference_mode"), (not torch.is_grad_enabled(), "no_grad")):
        if on:
            raise ValueError(f"{what} takes gradients, and is called under torch.{name}(): call it outside of it")


def check_rows(train: Any) -> Batch | DataLoader[Any] | Stream:
    """Return the rows to train on: a batch of one row or more, a loader, or a stream.

    Raises:
        TypeError: something else.
        ValueError: no rows, none with a modality, or values that need a gradient.
    """
    if isinstance(train, DataLoader | Stream):
        return train
    if isinstance(train, Batch):
        check_constants(check_batch(train, "train"))
        rows = train.rows
        if not (bool(rows.any()) if isinstance(rows, Tensor) else rows):
            listed = ", ".join(map(repr, train.names))
            raise ValueError(
                f"expected train to have rows with a modality, got {train.size} rows that all lack {listed}"
            )
        return train
    hint = ""
    if isinstance(train, Mapping | Tensor):
        hint = ": make a pyro_mm.Batch of it"
    elif isinstance(train, IterableDataset) or inspect.isroutine(train):
        hint = ": make a pyro_mm.Stream of it"
    elif isinstance(train, Iterator):
        hint = ", which is over after one epoch: make a pyro_mm.Stream of the function that makes it"
    elif isinstance(train, Dataset):
        hint = ": make a DataLoader of it, with a collate_fn that returns a pyro_mm.Batch"
    elif isinstance(train, tuple) and any(isinstance(x, Batch) for x in train):
        hint = ": unpack it, as in train, test = pyro_mm.datasets.load(..)"
    elif isinstance(train, Iterable) and not isinstance(train, str):
        hint = ": batches in a list go into DataLoader(batches, batch_size=None), rows one by one into a pyro_mm.Stream"
    wanted = "a pyro_mm.Batch, a torch DataLoader of them or a pyro_mm.Stream"
    raise TypeError(f"expected train to be {wanted}, got {describe(train)}{hint}")


def check_constants(train: Batch) -> None:
    """Raise a ValueError if values or covariates of the training rows need a gradient."""
    columns: dict[str, Any] = {f"modality {name!r}": train[name] for name in train.names if train.holds(name)}
    columns |= {f"covariate {name!r}": value for name, value in train.covariates.items()}
    for what, value in columns.items():
        if isinstance(value, Tensor) and value.requires_grad:
            given = "values with requires_grad=True" if value.is_leaf else "the result of a computation with a gradient"
            raise ValueError(
                f"{what}: expected rows to train on to be constants, got {given}: give their .detach(), "
                "or compute them under torch.no_grad(). A network to be trained belongs in the model or the guide"
            )


def check_validation(validation: Any) -> Batch | DataLoader[Any] | Stream | None:
    """Return rows for validation, a loader or a stream of them, or None.

    Raises:
        TypeError: something else.
        ValueError: no rows.
    """
    if validation is None or isinstance(validation, DataLoader | Stream):
        return validation
    return check_batch(validation, "validation")


def check_validation_names(validation: Batch, names: Iterable[str]) -> None:
    """Raise a ValueError if rows for validation have a modality that the training rows, of these names, do not have."""
    names = tuple(names)
    if other := [name for name in validation.names if name not in names]:
        listed = ", ".join(map(repr, other))
        raise ValueError(
            f"validation has modalities that the training rows do not have: {listed}; those have "
            f"{', '.join(map(repr, names))}"
        )


def check_optimizer_factory(optimizer: Any) -> Any:
    """Return a function from parameters to an optimiser, or None.

    Raises:
        TypeError: an optimiser, one of Pyro's, or something that cannot be called with parameters.
    """
    wanted = "expected optimizer to be a function of the parameters, such as lambda ps: torch.optim.Adam(ps, 1e-3)"
    if optimizer is None:
        return None
    if isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{wanted}, got an optimiser, {type(optimizer).__name__}, which holds parameters already")
    if isinstance(optimizer, pyro.optim.PyroOptim):
        raise TypeError(f"{wanted}, got one of Pyro's optimisers, which make one for every parameter: use torch.optim")
    if isinstance(optimizer, type):
        return optimizer
    if not callable(optimizer):
        raise TypeError(f"{wanted}, got {describe(optimizer)}")
    return check_function("optimizer", optimizer, ("parameters",))


def check_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Return an optimiser that takes steps by itself.

    Raises:
        TypeError: no ``torch.optim.Optimizer``.
        ValueError: one whose step has to evaluate the loss again, such as LBFGS.
    """
    if isinstance(optimizer, pyro.optim.PyroOptim):
        raise TypeError("expected a torch.optim.Optimizer, got one of Pyro's optimisers: use torch.optim")
    if not isinstance(optimizer, torch.optim.Optimizer):
        made = ": call it with the parameters" if callable(optimizer) else ""
        raise TypeError(f"expected a torch.optim.Optimizer, got {describe(optimizer)}{made}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "LBFGS evaluates the loss several times per step, which minibatches and draws do not allow: use an "
            "optimiser that evaluates it once, such as Adam"
        )
    return optimizer


def check_scheduler_factory(scheduler: Any) -> Any:
    """Return a function from an optimiser to a schedule, or None. Raises a TypeError for anything else."""
    wanted = (
        "expected scheduler to be a function of the optimiser, such as "
        "lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100)"
    )
    if scheduler is None:
        return None
    if isinstance(scheduler, LRScheduler):
        raise TypeError(f"{wanted}, got a schedule, {type(scheduler).__name__}, which holds an optimiser already")
    if not callable(scheduler):
        raise TypeError(f"{wanted}, got {describe(scheduler)}")
    return scheduler if isinstance(scheduler, type) else check_function("scheduler", scheduler, ("optimiser",))


def check_schedule(plan: Any) -> Any:
    """Return the schedule that a user's function made. Raises a TypeError if it has no ``step``."""
    if not callable(getattr(plan, "step", None)):
        raise TypeError(
            f"expected scheduler to return one of torch.optim.lr_scheduler, got {describe(plan)} from it: is a return "
            "missing?"
        )
    return plan


def check_precision(precision: Any) -> str:
    """Return a precision. Raises a TypeError for no string, a ValueError for an unknown one."""
    if isinstance(precision, str) and precision not in PRECISIONS:
        raise ValueError(
            f'expected precision to be "32-true" (the parameters\' own) or "bf16-mixed", got {precision!r}: '
            "float16 would need its gradients scaled, and modules can be made float64 by .double()"
        )
    return check_choice("precision", precision, PRECISIONS)


def check_device(device: Any) -> torch.device | None:
    """Return a device that this machine has, or None.

    Raises:
        TypeError: no name of a device.
        ValueError: an unknown one, or one that this machine does not have.
    """
    if device is None:
        return None
    if not isinstance(device, str | torch.device | int) or isinstance(device, bool):
        raise TypeError(f'expected device to be a torch.device or its name, such as "cpu", got {describe(device)}')
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'expected device to be one of torch\'s, such as "cpu" or "cuda:0", got {device!r}') from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device is {found}, and torch finds {torch.cuda.device_count()} CUDA devices here")
    if found.type == "meta":
        raise ValueError("device is meta, which holds no numbers to train with")
    try:
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(f"device is {found}, which torch cannot use here") from error
    return found
