"""Explain a loss, a gradient or a parameter that is NaN or infinite."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..handlers.internals import foreach_norm
from ..scoring.training_objective import Loss
from ..utils.seeding import generator_state, set_generator_state
from .nonfinite_causes import Cause, RowNames, cause_in_data, cause_in_run, has_nonfinite

MAX_LISTED = 5  # names in a message
MAX_GROWTH = 1e3  # a norm so many times its first value has grown out of bounds
OVERFLOW_ADVICE = (
    "The gradient overflows: standardise what the networks are given, use a function that grows less than exp or a "
    "power, or take smaller steps"
)


class NotFinite(FloatingPointError, ValueError):
    """A loss, a gradient or a parameter that is NaN or infinite."""


class GrowthRecord:
    """Norms of the parameters at the start of a training, to recognise a divergence.

    Args:
        parameters: the parameters that are trained.
        names: identity of a parameter -> its name in messages.

    Attributes:
        first_gradient: norm of the gradient at the first step, a scalar; None before it.
    """

    first_gradient: Tensor | None = None

    def __init__(self, parameters: Sequence[Tensor], names: dict[int, str]):
        self._parameters = list(parameters)
        self._names = names
        self._norms = _norms(self._parameters)

    def largest(self) -> tuple[str, float, float, float]:
        """Return the parameter whose norm has grown most: its name, the factor, the norm at the start and now."""
        now = _norms(self._parameters).tolist()
        pairs = list(zip(self._norms.tolist(), now, self._parameters, strict=True))
        ratios = [(b / max(a, 1.0), a, b, p) for a, b, p in pairs if math.isfinite(a)]
        ratio, start, end, parameter = max(ratios, key=lambda x: x[0], default=(1.0, 0.0, 0.0, pairs[0][2]))
        return self._names[id(parameter)], ratio, start, end

    def explain(
        self,
        optimizers: Iterable[torch.optim.Optimizer],
        growths: list[tuple[float, float]],
        certain: bool = False,
    ) -> tuple[str, str] | None:
        """Explain a divergence, by a gradient that explodes or by steps that are too large.

        Args:
            optimizers: the optimisers of the training, for their step sizes.
            growths: for the steps before, the gradient's norm and the factor by which a parameter had grown by then.
            certain: True if a divergence is known to be the cause.

        Returns:
            A sentence on the cause, and advice; None if no parameter has grown out of bounds.
        """
        name, ratio, start, end = self.largest()
        if ratio < MAX_GROWTH and not certain:
            return None
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = sorted({float(group["lr"]) for group in groups if "lr" in group})
        rate = " and ".join(f"{r:g}" for r in rates) or "unknown"
        first = float(self.first_gradient) if self.first_gradient is not None else math.nan
        peak = max((norm for norm, factor in growths if factor < MAX_GROWTH), default=0.0)
        if peak > MAX_GROWTH * max(first, 1e-6):
            return (
                f"The gradient explodes: its norm was {first:.3g} at the first step, and {peak:.3g} when parameters "
                "were still of their usual size",
                "Clip it (torch.nn.utils.clip_grad_norm_ in a hook, optimizer.register_step_pre_hook), or take a step "
                f"size smaller than {rate}",
            )
        growth = f": the norm of {name} went from {start:.3g} to {end:.3g}" if ratio >= MAX_GROWTH else ""
        return f"The steps are too large{growth}, at a step size of {rate}", f"Take a step size smaller than {rate}"


def cause_in_loss(
    batch: Batch, knows_rows: bool, evaluate: Callable[[Batch], Loss], rewind: Callable[[], None]
) -> Cause:
    """Find the origin of NaN or infinity in a loss; an empty cause if it is finite or cannot be computed.

    Args:
        batch: N rows.
        knows_rows: True if the batch knows the indices of its rows in the data.
        evaluate: evaluates the loss.
        rewind: puts the generators to where they were before the loss was evaluated.
    """
    rows = RowNames(batch._index if knows_rows else None)
    if cause := cause_in_data(batch, rows):
        return cause
    rewind()
    losses: list[Loss] = []
    try:
        cause = cause_in_run(batch, rows, lambda: losses.append(evaluate(batch)))
    except (ValueError, RuntimeError, ArithmeticError):
        return Cause()
    terms = [label for label, value in losses[-1].by_term.items() if has_nonfinite(value)]
    if terms:
        cause.where.insert(0, f"It arises in the term{'s' if len(terms) > 1 else ''} {list_names(terms)}")
    return cause


@contextmanager
def validation_check(
    batch: Batch, evaluate: Callable[[Batch], Loss], device: torch.device, epoch: int
) -> Iterator[Callable[[float], None]]:
    """Check the loss of validation rows, and explain one that is NaN or infinite.

    Args:
        batch: rows whose loss is evaluated inside.
        evaluate: evaluates the loss.
        device: whose generator makes the draws, besides the CPU's.
        epoch: number of the epoch after which this is.

    Yields:
        The check of a loss.

    Raises:
        NotFinite: from the check, or from an error inside behind which there are NaN or infinity.
    """
    devices = generator_devices(device)
    generators = [generator_state(device) for device in devices]

    def rewind() -> None:
        for device, generator in zip(devices, generators, strict=True):
            set_generator_state(device, generator)

    def error(head: str, cause: Cause) -> NotFinite:
        return NotFinite(
            error_text(f"{head} after epoch {epoch}", cause, "The parameters are those of the end of that epoch")
        )

    def check(value: float) -> None:
        if not math.isfinite(value):
            cause = cause_in_loss(batch, True, evaluate, rewind)
            raise error(f"the loss of the validation rows is {value}", cause)

    try:
        yield check
    except NotFinite:
        raise
    except (ValueError, RuntimeError, ArithmeticError) as failure:
        if cause := cause_in_loss(batch, True, evaluate, rewind):
            raise error("the loss of the validation rows cannot be computed", cause) from failure
        raise


def generator_devices(device: torch.device) -> list[torch.device]:
    """Return the devices whose generators make the draws of a training."""
    return [torch.device("cpu"), *([device] if device.type == "cuda" else [])]


def error_text(head: str, cause: Cause, state: str) -> str:
    """Return a message of what happened, its cause, advice, and the state that is left.

    Args:
        head: what happened.
        cause: the cause, with advice.
        state: the state that parameters are left in.
    """
    sentences = [head, *(cause.where or ["No single site or operation explains it"])]
    if cause.advice:
        sentences.append(cause.advice)
    return ". ".join([*sentences, state])


def list_names(names: Iterable[str]) -> str:
    """Return the first few names, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the norm of the gradient, a scalar, without waiting for the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    dense = [g.to_dense() if g.is_sparse else g for g in gradients]
    return _norms(dense).norm() if dense else torch.zeros(())


def _norms(tensors: Iterable[Tensor]) -> Tensor:
    """Return the norm of every tensor, without waiting for the device."""
    return torch.stack(list(foreach_norm([t.detach() for t in tensors]))).double()


@contextmanager
def detect_anomalies() -> Iterator[None]:
    """Run torch's anomaly detection, which raises where a derivative is NaN, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            yield
