"""The first run of model, guide and objective, on a few rows, with errors that say where they arose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from pyro import poutine

from ..batch.batch import Batch
from ..distributions.pushforward import find_pushforward
from ..scoring.program_errors import ExplainedError, explain_error
from ..scoring.training_objective import PreparedObjective
from ..utils.global_state import override_validation
from ..utils.reachable import ReachableObjects
from .nonfinite_causes import Cause, RowNames, cause_in_data, cause_in_run
from .nonfinite_report import NotFinite
from .problem import TrainingError, TrainingProblem, problem_from_run, programs_of

ERRORS = (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError, ArithmeticError)


def build_problem(
    objective: PreparedObjective,
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    unrunnable: ExplainedError | None = None,
    step: int = 0,
) -> TrainingProblem:
    """Return the training problem, found by one run on a few rows.

    Args:
        objective, model, guide: the training.
        batch: a few rows.
        autocast: makes the context of a loss.
        unrunnable: the error of a run on more rows, raised if this run's own error is not explained. Two rows fit where
            the rows of a plate and the entries of a latent are mixed up, and there are two of these.
        step: steps taken so far.

    Raises:
        ValueError, TypeError: an error of the run, with the site and the network where it arose, and what may mend it.
    """
    try:
        problem = problem_from_run(objective, model, guide, batch, autocast, step)
    except TrainingError:
        raise
    except ERRORS as error:
        if cause := _find_nonfinite(model, guide, batch):
            raise NotFinite(". ".join(["the first rows cannot be run", *cause.where, cause.advice])) from error
        new = explain_error(error, programs_of(objective, model, guide), batch.size)
        if new is error:
            if unrunnable is not None:
                raise unrunnable from error
            raise
        raise new from error
    if unrunnable is not None:
        raise unrunnable
    return problem


@contextmanager
def name_nan_parameters(model: Any, guide: Any) -> Iterator[None]:
    """Replace an error of a pair by one that names the parameter that holds NaN, if there is one.

    Raises:
        NotFinite: from the error.
    """
    try:
        yield
    except ValueError as error:
        if not isinstance(error, NotFinite) and (cause := _find_nan_parameter(model, guide)):
            raise NotFinite(". ".join([*cause.where, cause.advice])) from error
        raise


def _find_nan_parameter(model: Any, guide: Any) -> Cause:
    for path, module in ReachableObjects({"model": model, "guide": guide}).modules.items():
        for name, p in module.named_parameters():
            if p.requires_grad and p.is_floating_point() and p.isnan().any():
                return Cause([f"{path}.{name} holds NaN before training"], "Initialise it anew")
    return Cause()


def _find_nonfinite(model: Any, guide: Any, batch: Batch) -> Cause:
    """Find NaN or infinity in the rows, in a parameter, or in a site of a run."""
    if cause := cause_in_data(batch, RowNames()):
        return cause
    if cause := _find_nan_parameter(model, guide):
        return cause

    def run() -> None:
        with poutine.block(), poutine.trace() as guided:
            guide(batch)
        with poutine.block(), poutine.trace() as modelled, poutine.replay(trace=guided.trace):
            model(batch)
        modelled.trace.compute_log_prob(lambda name, site: find_pushforward(site["fn"]) is None)

    try:
        with override_validation(False):
            return cause_in_run(batch, RowNames(), run)
    except ERRORS:
        return Cause()
