"""Find the step of a training at which NaN or infinity arises, explain it, and go back to the state before it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..utils.seeding import generator_state, set_generator_state
from . import nonfinite_causes as causes
from .nonfinite_causes import Cause, Rows
from .step import TrainingProblem, differentiable, loss_and_grads

EVERY = 100  # steps between two looks at the numbers, each of which waits for the device
HELD = 2**28  # bytes of minibatches that are held to run their steps again
LISTED = 5  # names in a message
OVERFLOW = (
    "The gradient overflows: standardise what the networks are given, use a function that grows less than exp or a "
    "power, or take smaller steps"
)
UNCOMPUTED = "the loss cannot be computed"
GROWN = 1e3  # a norm so many times its first value has grown out of bounds


class Stepping(Protocol):
    """A step of training, which can be taken again."""

    def __call__(self, batch: Batch) -> Tensor:
        """Take a step on a batch.

        Returns:
            The loss and the value of each term, as one tensor.
        """

    def rows(self, batch: Batch) -> int:
        """Return the number of rows that the loss of a batch is of."""


class NotFinite(FloatingPointError, ValueError):
    """A loss, a gradient or a parameter that is NaN or infinite."""


@dataclass(frozen=True)
class _Step:
    batch: Batch
    first: bool
    epoch: int
    number: int  # in its epoch, from 1
    generators: list[Tensor]
    steps: Any  # of the objective


class Watch:
    """A watch over loss and parameters, which goes back and explains if they are not finite.

    Looking waits for the device, so it is done seldom. The state at the latest look and the minibatches since are held:
    the steps since are then taken again one by one, with the same draws, up to the one that is not finite.

    Args:
        problem: what is trained.
        optimizer: its optimiser.
        step: takes a step.
        names: parameter, by identity, to its name in a message.
        device: whose generator makes the draws, besides the CPU's.
        numbered: whether the batches know the places of their rows in the data.
        forget: called where the optimiser's state has been taken from it, which a captured graph writes to.
    """

    def __init__(
        self,
        problem: TrainingProblem,
        optimizer: torch.optim.Optimizer,
        step: Stepping,
        names: dict[int, str],
        device: torch.device,
        numbered: bool,
        forget: Callable[[], None] | None = None,
    ):
        self.problem = problem
        self.optimizer = optimizer
        self.step = step
        self.names = names
        self.numbered = numbered
        self.forget = forget
        self._devices = _devices(device)
        self._window: list[_Step] = []
        self._bytes = 0
        self._bytes_each = 0  # of a minibatch
        self._saved = _State(problem, optimizer)
        self._unwatched = {id(t) for t in self._tensors() if causes.not_finite(t.detach())}
        self._norms = _norms(problem.parameters)
        self._first_gradient: Tensor | None = None

    # -- while all is well ----------------------------------------------------------------------------------------

    def before_step(self, batch: Batch, epoch: int, number: int) -> None:
        """Hold what is needed to take the step once more: the ``number``-th of an epoch, counted from 1."""
        if not self._window:
            self._saved.save()
            self._bytes_each = sum(x.nbytes for x in batch.parts()[1])
        first = self._first_gradient is None
        generators = [generator_state(device) for device in self._devices]
        steps = getattr(self.problem.objective, "steps", None)
        self._window.append(_Step(batch, first, epoch, number, generators, steps))
        self._bytes += self._bytes_each

    def after_step(self, values: Iterable[Tensor]) -> None:
        """Look at the numbers, if it is time for it.

        Args:
            values: sums of the loss and its terms, over the epoch so far: once NaN or infinite, they stay so.
        """
        if self._first_gradient is None:
            self._first_gradient = _gradient_norm(self.problem.parameters)
        if self._window[0].first or len(self._window) >= EVERY or self._bytes >= HELD:
            self.look(values)

    @contextmanager
    def guard(self, sums: Mapping[Any, Tensor]) -> Iterator[None]:
        """Leave no NaN or infinity behind if an epoch is broken off: the state is then that of the latest look.

        Args:
            sums: of the loss and its terms, over the epoch so far.
        """
        try:
            yield
        except NotFinite:
            raise
        except BaseException:
            with suppress(RuntimeError):  # of a device that does not answer
                if self._window and not self._finite(sums.values()):
                    self._restore(self._saved)
            raise

    def look(self, values: Iterable[Tensor]) -> None:
        """Look at the numbers of the steps since the latest look.

        Raises:
            NotFinite: with the state put back to before the first step that is not finite.
        """
        if self._window and not self._finite(values):
            self._locate()
        self._window = []
        self._bytes = 0

    def _finite(self, values: Iterable[Tensor]) -> bool:
        values = list(values)
        watched = [t.detach() for t in self._tensors() if id(t) not in self._unwatched]
        norms = [*torch._foreach_norm(watched)] if watched else []
        # all in one number, and one wait; squares may overflow where the entries do not
        flags = [x.double().sum() for x in values] + [x.double() for x in norms]
        if math.isfinite(float(torch.stack([f.to(flags[0].device) for f in flags]).sum())):
            return True
        return not any(map(causes.not_finite, [*(x.detach() for x in values), *watched]))

    def _tensors(self) -> list[Tensor]:
        """The parameters and buffers that hold floating-point numbers."""
        buffers = {id(b): b for m in self.problem.reached.values() for b in m.buffers()}
        return [t for t in (*self.problem.parameters, *buffers.values()) if t.is_floating_point() and t.numel()]

    # -- once it is not -------------------------------------------------------------------------------------------

    def explain_error(self, error: Exception) -> None:
        """Look for NaN and infinity behind an error of the latest step; the state is put back to before that step.

        Raises:
            NotFinite: from the error, if there are any.
        """
        if "CUDA error" in str(error):
            return  # the device answers no more in this process
        *earlier, latest = self._window
        self._restore(self._saved)
        for step in earlier:
            self._retake(step, error, [])
        cause = self._cause(latest)
        self._rewind(latest)
        if cause:
            raise self._error(UNCOMPUTED, latest, cause) from error

    def _locate(self) -> None:
        self._restore(self._saved)
        growths: list[tuple[float, float]] = []
        for step in self._window:
            self._retake(step, None, growths)
        last = self._window[-1]
        raise NotFinite(
            f"the loss or a parameter became NaN or infinite up to step {last.number} of epoch {last.epoch}, and did "
            "not when the steps were taken again: what was drawn was not drawn by torch, or the device computes with "
            "no fixed order. The parameters are those of the second time"
        )

    def _retake(self, step: _Step, error: Exception | None, growths: list[tuple[float, float]]) -> None:
        """Take a step again; if it is not finite, go back to before it and raise."""
        before = _State(self.problem, self.optimizer)
        before.save()
        self._rewind(step)
        factor = self._growth()[1]
        try:
            values = self.step(step.batch)
        except (ValueError, RuntimeError, ArithmeticError) as failure:
            self._restore(before)
            if cause := self._cause(step):
                raise self._error(UNCOMPUTED, step, cause) from failure
            raise
        if self._finite([values]):
            growths.append((float(_gradient_norm(self.problem.parameters)), factor))
            return
        self._restore(before)
        raise self._explain(step, values, growths) from error

    def _explain(self, step: _Step, values: Tensor, growths: list[tuple[float, float]]) -> NotFinite:
        cause = self._cause(step)
        loss = float(values.flatten()[0])
        if not math.isfinite(loss):
            head = f"the loss is {loss}"
            diverged = self._too_large(growths)
        else:
            gradients, advice = self._gradients(step)
            if gradients:
                head = "a gradient is NaN or infinite"
                what = f"The gradient of {_names_text(gradients)} is not finite, while the loss is {loss:.6g}"
                cause = Cause([what], advice)
                diverged = self._too_large(growths)
            else:
                head = "a parameter becomes NaN or infinite"
                cause = Cause()
                size = float(_gradient_norm(self.problem.parameters))
                diverged = self._too_large([*growths, (size, self._growth()[1])], certain=True)
        if diverged is not None:
            cause.where.append(diverged[0])
            cause.advice = diverged[1]
        return self._error(head, step, cause)

    def _cause(self, step: _Step) -> Cause:
        """Find where NaN or infinity comes from in the loss of a step."""
        wrong = [p for p in self.problem.parameters if causes.not_finite(p.detach())]
        if wrong:
            names = _names_text([self.names[id(p)] for p in wrong])
            return Cause([f"{names} held NaN or infinity before that step"], "Initialise it anew")
        cause = _cause_of(self.problem, step.batch, self.numbered, self._loss, lambda: self._rewind(step))
        self._rewind(step)
        return cause

    def _loss(self, batch: Batch) -> Any:
        if differentiable(self.problem.objective):
            return self.problem.loss(batch)
        return loss_and_grads(self.problem.objective, self.problem.model, self.problem.guide, batch)

    def _gradients(self, step: _Step) -> tuple[list[str], str]:
        """The parameters whose gradient is not finite, and advice."""
        self._rewind(step)
        self.problem.backward(step.batch, self.step.rows(step.batch))
        wrong = [p for p in self.problem.parameters if p.grad is not None and causes.not_finite(p.grad)]
        if not wrong:
            return [], ""
        advice = OVERFLOW
        self._rewind(step)
        try:
            with _anomalies():
                self.problem.backward(step.batch, self.step.rows(step.batch))
        except RuntimeError as error:
            advice = causes.of_backward(error) or advice
        return [self.names[id(p)] for p in wrong], advice

    def _growth(self) -> tuple[str, float, float, float]:
        """The parameter whose norm has grown most: its name, the factor, the norm at the start and now."""
        now = _norms(self.problem.parameters).tolist()
        pairs = list(zip(self._norms.tolist(), now, self.problem.parameters, strict=True))
        ratios = [(b / max(a, 1.0), a, b, p) for a, b, p in pairs if math.isfinite(a)]
        ratio, start, end, parameter = max(ratios, key=lambda x: x[0], default=(1.0, 0.0, 0.0, pairs[0][2]))
        return self.names[id(parameter)], ratio, start, end

    def _too_large(self, growths: list[tuple[float, float]], certain: bool = False) -> tuple[str, str] | None:
        """Explain parameters that have grown out of bounds, by a gradient that explodes or by a step that is too large.

        Args:
            growths: for the steps before, the gradient's norm and the factor by which a parameter had grown by then.
            certain: whether that is known to be the cause.
        """
        name, ratio, start, end = self._growth()
        if ratio < GROWN and not certain:
            return None
        rates = sorted({float(group["lr"]) for group in self.optimizer.param_groups if "lr" in group})
        rate = " and ".join(f"{r:g}" for r in rates) or "unknown"
        first = float(self._first_gradient) if self._first_gradient is not None else math.nan
        peak = max((norm for norm, factor in growths if factor < GROWN), default=0.0)
        if peak > GROWN * max(first, 1e-6):
            return (
                f"The gradient explodes: its norm was {first:.3g} at the first step, and {peak:.3g} when parameters "
                "were still of their usual size",
                "Clip it (torch.nn.utils.clip_grad_norm_ in a hook, optimizer.register_step_pre_hook), or take a step "
                f"size smaller than {rate}",
            )
        what = f": the norm of {name} went from {start:.3g} to {end:.3g}" if ratio >= GROWN else ""
        return f"The steps are too large{what}, at a step size of {rate}", f"Take a step size smaller than {rate}"

    def _error(self, head: str, step: _Step, cause: Cause) -> NotFinite:
        for p in self.problem.parameters:
            p.grad = None
        where = f"{head} at step {step.number} of epoch {step.epoch}"
        return _error(where, cause, "Parameters, buffers and the optimiser's state are those before that step")

    def _restore(self, state: _State) -> None:
        if state.restore() and self.forget is not None:
            self.forget()

    def _rewind(self, step: _Step) -> None:
        """Put the generators and the objective's count of steps back to before a step."""
        for device, generator in zip(self._devices, step.generators, strict=True):
            set_generator_state(device, generator)
        if step.steps is not None:
            self.problem.objective.steps = step.steps


@contextmanager
def validation_check(
    problem: TrainingProblem, batch: Batch, device: torch.device, epoch: int
) -> Iterator[Callable[[float], None]]:
    """Check the loss of validation rows, and explain one that is NaN or infinite.

    Args:
        problem: what is trained.
        batch: rows whose loss is evaluated inside.
        device: whose generator makes the draws, besides the CPU's.
        epoch: after which this is.

    Yields:
        The check of a loss.

    Raises:
        NotFinite: from the check, or from an error inside behind which there are NaN or infinity.
    """
    devices = _devices(device)
    generators = [generator_state(device) for device in devices]

    def place() -> None:
        for device, generator in zip(devices, generators, strict=True):
            set_generator_state(device, generator)

    def loss(batch: Batch) -> Any:
        return problem.objective.loss(problem.model, problem.guide, batch)

    def error_of(head: str, cause: Cause) -> NotFinite:
        return _error(f"{head} after epoch {epoch}", cause, "The parameters are those of the end of that epoch")

    def check(value: float) -> None:
        if not math.isfinite(value):
            cause = _cause_of(problem, batch, True, loss, place)
            raise error_of(f"the loss of the validation rows is {value}", cause)

    try:
        yield check
    except NotFinite:
        raise
    except (ValueError, RuntimeError, ArithmeticError) as error:
        if cause := _cause_of(problem, batch, True, loss, place):
            raise error_of("the loss of the validation rows cannot be computed", cause) from error
        raise


def _devices(device: torch.device) -> list[torch.device]:
    return [torch.device("cpu"), *([device] if device.type == "cuda" else [])]


def _cause_of(
    problem: TrainingProblem, batch: Batch, numbered: bool, loss: Callable[[Batch], Any], place: Callable[[], None]
) -> Cause:
    """Find where NaN or infinity comes from in a loss; nothing if it is finite or cannot be computed.

    Args:
        problem: what is trained.
        batch: the rows.
        numbered: whether they know their places in the data.
        loss: evaluates the loss.
        place: puts the generators to where they were before the loss was evaluated.
    """
    rows = Rows(batch._index if numbered else None)
    if cause := causes.of_data(batch, rows):
        return cause
    place()
    try:
        cause = causes.of_run(batch, rows, lambda: loss(batch))
    except (ValueError, RuntimeError, ArithmeticError):
        return Cause()
    terms = [name for name, value in problem.by_term().items() if causes.not_finite(torch.as_tensor(value))]
    if terms:
        cause.where.insert(0, f"It arises in the term{'s' if len(terms) > 1 else ''} {_names_text(terms)}")
    return cause


def _error(head: str, cause: Cause, state: str) -> NotFinite:
    sentences = [head, *(cause.where or ["No single site or operation explains it"])]
    if cause.advice:
        sentences.append(cause.advice)
    return NotFinite(". ".join([*sentences, state]))


class _State:
    """A copy of the parameters, buffers and moments of a training."""

    def __init__(self, problem: TrainingProblem, optimizer: torch.optim.Optimizer):
        self.problem = problem
        self.optimizer = optimizer
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._numbers: list[tuple[dict[str, Any], str, Any]] = []
        self._with_state: set[int] = set()

    @torch.no_grad()
    def save(self) -> None:
        """Copy what is there now."""
        tensors = {id(t): t.detach() for t in self.problem.parameters}
        tensors |= {id(b): b for m in self.problem.reached.values() for b in m.buffers()}
        self._numbers = []
        for entries in self.optimizer.state.values():
            for key, value in entries.items():
                if isinstance(value, Tensor):
                    tensors[id(value)] = value
                elif isinstance(value, bool | int | float):
                    self._numbers.append((entries, key, value))
        self._with_state = {id(p) for p in self.optimizer.state}
        found = list(tensors.values())
        if list(map(_layout, found)) == list(map(_layout, self._tensors)):
            torch._foreach_copy_(self._copies, found)
        else:
            self._copies = [t.clone() for t in found]
        self._tensors = found

    @torch.no_grad()
    def restore(self) -> bool:
        """Put back what was copied.

        Returns:
            Whether moments have come into being since, which are removed.
        """
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.copy_(copy)
        for entries, key, value in self._numbers:
            entries[key] = value
        new = [p for p in self.optimizer.state if id(p) not in self._with_state]
        for p in new:
            del self.optimizer.state[p]
        return bool(new)


def _layout(t: Tensor) -> tuple[Any, ...]:
    return t.shape, t.stride(), t.dtype, t.device


def _norms(tensors: Iterable[Tensor]) -> Tensor:
    """Return the norm of every tensor, without waiting for the device."""
    return torch.stack(torch._foreach_norm([t.detach() for t in tensors])).double()


def _gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Return the norm of the gradient, without waiting for the device."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    dense = [g.to_dense() if g.is_sparse else g for g in gradients]
    return _norms(dense).norm() if dense else torch.zeros(())


@contextmanager
def _anomalies() -> Iterator[None]:
    """torch's anomaly detection, which raises where a derivative is NaN, without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            yield


def _names_text(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")
