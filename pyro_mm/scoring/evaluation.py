"""Begin an evaluation: check arguments, audit the pair, move rows to the networks, and set evaluation mode."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..conditionals.unconditional import map_tensors
from ..utils.arguments import check_flag, check_function
from ..utils.reachable import ReachableObjects, evaluation_mode
from .audit.audit import audit as audited
from .program_errors import explain_index_errors

Result = TypeVar("Result")

_programs_inside: ContextVar[tuple[tuple[Any, torch.device | None], ...]] = ContextVar("programs evaluated", default=())


@contextmanager
def evaluating(
    model: Any,
    guide: Any,
    batch: Any,
    *,
    audit: bool = True,
    stacked: bool = False,
    draws: bool = False,
    guide_batch: Batch | None = None,
) -> Iterator[Batch]:
    """Check a pair and a batch, move the batch to the networks, and set these to evaluation mode for a while.

    All modules that model and guide refer to get their own mode back afterwards, and torch its gradient mode and its
    validation of distributions. An inner call for the same pair, or for one program of it, only moves the batch. Pass
    results through :func:`move_result`, which moves them to the device of the caller's batch.

    Args:
        model, guide: callables of a batch; None for one that the evaluation does not run.
        batch: a :class:`~pyro_mm.Batch` of one row or more.
        audit: False to skip the audit of the pair (:func:`pyro_mm.scoring.audit.audit.audit`).
        stacked, draws, guide_batch: arguments of the audit.

    Yields:
        The batch, on the device of the modules' parameters.

    Raises:
        TypeError: a model, guide or batch of another kind.
        ValueError: a batch without rows, or a mistake that the audit finds.
    """
    check_pair(model, guide)
    check_batch(batch)
    if check_flag("audit", audit):
        audited(model, guide, batch, stacked=stacked, draws=draws, guide_batch=guide_batch)
    programs = {name: f for name, f in (("model", model), ("guide", guide)) if f is not None}
    inside = _programs_inside.get()
    if programs and all(any(known is f for known, _ in inside) for f in programs.values()):
        yield _move_to(batch, inside[0][1])
        return
    reached = ReachableObjects(programs)
    device = reached.device()
    token = _programs_inside.set((*((f, device) for f in programs.values()), *inside))
    try:
        with (
            evaluation_mode(reached.modules.values()),
            _global_state(),
            explain_index_errors(programs, batch.size, "one or more of {} rows"),
        ):
            yield _move_to(batch, device)
    finally:
        _programs_inside.reset(token)


def _move_to(batch: Batch, device: torch.device | None) -> Batch:
    return batch if device is None or device == batch.device else batch.to(device)


def check_pair(model: Any, guide: Any) -> None:
    """Raise a TypeError unless model and guide are callables of a batch, or None."""
    for name, function in (("model", model), ("guide", guide)):
        if function is not None:
            check_function(name, function)


@contextmanager
def _global_state() -> Iterator[None]:
    """Restore torch's gradient mode and the validation of its distributions afterwards."""
    gradient = torch.is_grad_enabled()
    validation = torch.distributions.Distribution._validate_args
    try:
        yield
    finally:
        if torch.is_grad_enabled() != gradient:
            torch.set_grad_enabled(gradient)
        torch.distributions.Distribution._validate_args = validation


def move_result(result: Result, rows: Batch, batch: Batch) -> Result:
    """Move the result of an evaluation to the device of the caller's batch.

    Args:
        result: tensors, batches, distributions, numbers, and dictionaries, tuples and dataclasses of them.
        rows: the batch that :func:`evaluating` yielded.
        batch: the batch that it was called with.
    """
    return result if rows.device == batch.device else move_tensors(result, batch.device)


def move_tensors(result: Result, device: torch.device) -> Result:
    """Return a result, as :func:`move_result` takes it, with its tensors on a device."""
    moved: Result = _move(result, device)
    return moved


def _move(result: Any, device: torch.device) -> Any:
    if isinstance(result, Tensor | Batch):
        return result.to(device)
    if isinstance(result, torch.distributions.Distribution):
        return map_tensors(result, lambda x: x.to(device))
    if isinstance(result, dict):
        return {name: _move(x, device) for name, x in result.items()}
    if type(result) in (tuple, list):
        return type(result)(_move(x, device) for x in result)
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        values = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
        return dataclasses.replace(result, **{name: _move(x, device) for name, x in values.items()})
    return result
