"""The first run of a pair, on a few rows, whose errors say where they arose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from pyro import poutine

from ..batch.batch import Batch
from ..scoring.program_errors import Explained, explanation
from ..utils.global_state import override_validation
from ..utils.reachable import ReachableObjects
from . import nonfinite_causes as causes
from .nonfinite import NotFinite
from .nonfinite_causes import Cause, Rows
from .step import TrainingError, TrainingProblem, problem_of

ERRORS = (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError, ArithmeticError)


class ProbeError(TrainingError, Explained):
    """A story or a guide that cannot be run on its rows."""


def probe(
    objective: Any,
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    unrunnable: Explained | None = None,
) -> TrainingProblem:
    """Find the :class:`~pyro_mm.training.step.TrainingProblem` by one run on a few rows.

    Args:
        objective, model, guide: the training.
        batch: a few rows.
        autocast: makes the context of a loss.
        unrunnable: the error of a run on more rows, raised where this one ends otherwise than in words: two rows fit
            where the rows of a plate and the entries of a latent are mixed up, and there are two of these.

    Raises:
        ValueError, TypeError: an error of the run, with the site and the network where it arose, and what may mend it.
    """
    try:
        problem = problem_of(objective, model, guide, batch, autocast)
    except TrainingError:
        raise
    except ERRORS as error:
        if cause := _not_finite(model, guide, batch):
            raise NotFinite(". ".join(["the first rows cannot be run", *cause.where, cause.advice])) from error
        new = explanation(error, {"model": model, "guide": guide}, batch.size, ProbeError)
        if new is error:
            if unrunnable is not None:
                raise unrunnable from error
            raise
        raise new from error
    if unrunnable is not None:
        raise unrunnable
    return problem


@contextmanager
def nan_parameters_named(model: Any, guide: Any) -> Iterator[None]:
    """Name the parameter that holds NaN, if there is one, in the place of an error of a pair.

    Raises:
        NotFinite: from the error.
    """
    try:
        yield
    except ValueError as error:
        if not isinstance(error, NotFinite) and (cause := _of_parameters(model, guide)):
            raise NotFinite(". ".join([*cause.where, cause.advice])) from error
        raise


def _of_parameters(model: Any, guide: Any) -> Cause:
    """Find a parameter that holds NaN."""
    for path, module in ReachableObjects({"model": model, "guide": guide}).modules.items():
        for name, p in module.named_parameters():
            if p.requires_grad and p.is_floating_point() and p.isnan().any():
                return Cause([f"{path}.{name} holds NaN before training"], "Initialise it anew")
    return Cause()


def _not_finite(model: Any, guide: Any, batch: Batch) -> Cause:
    """Find NaN or infinity in the rows, in a parameter, or in what the pair makes of them."""
    if cause := causes.of_data(batch, Rows()):
        return cause
    if cause := _of_parameters(model, guide):
        return cause

    def run() -> None:
        with poutine.block(), poutine.trace() as guided:
            guide(batch)
        with poutine.block(), poutine.trace() as modelled, poutine.replay(trace=guided.trace):
            model(batch)
        modelled.trace.compute_log_prob()

    try:
        with override_validation(False):
            return causes.of_run(batch, Rows(), run)
    except ERRORS:
        return Cause()
