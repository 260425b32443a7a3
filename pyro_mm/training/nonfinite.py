"""Find the step of a training at which NaN or infinity arises, explain it, and go back to the state before it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..handlers.internals import foreach_norm
from ..scoring.training_objective import Loss
from ..utils.seeding import generator_state, set_generator_state
from ..utils.tensor_files import save_tensors
from .gradients import GradientSequence
from .nonfinite_causes import Cause, advice_from_anomaly, has_nonfinite
from .nonfinite_report import (
    OVERFLOW_ADVICE,
    GrowthRecord,
    NotFinite,
    cause_in_loss,
    detect_anomalies,
    error_text,
    generator_devices,
    gradient_norm,
    list_names,
)
from .pace import PACE, Pace
from .replay import step_state
from .step import Update
from .training_state import TrainingState

__all__ = ["NonFiniteMonitor", "NotFinite"]

UNCOMPUTED = "the loss cannot be computed"
MAX_CONSECUTIVE_SKIPS = 10  # minibatches that are skipped one after the other
MAX_FILES = 20  # of steps to be replayed, of one training
ERRORS = (ValueError, RuntimeError, ArithmeticError)


@dataclass(frozen=True)
class _RecordedStep:
    """A minibatch, the states of generators and the count of steps: all that is needed to repeat a step."""

    batch: Batch
    is_first: bool
    epoch: int
    number: int  # in its epoch, from 1
    generators: list[Tensor]
    steps: int
    rates: list[Any]  # step sizes of all groups, which a schedule may move


class NonFiniteMonitor:
    """Checks of loss and parameters for NaN and infinity, with a way back and an explanation.

    A check waits for the device, so there is one in many steps. The state at the latest check and the minibatches since
    are held: the steps since are then taken again one by one, with the same draws, up to the one that is not finite.

    Args:
        sequence: takes the steps.
        names: identity of a parameter -> its name in messages.
        device: whose generator makes the draws, besides the CPU's.
        knows_rows: True if batches know the indices of their rows in the data.
        pace: how often the numbers are checked.
        skips: True leaves out steps that are not finite, by :meth:`finish_step`, which checks every one of them.
        checkpoint: the file beside which the first such steps are written for :func:`~pyro_mm.replay`; None for none.
        precision: that of the training.

    Attributes:
        consecutive: steps left out one after the other, the latest ones.
    """

    def __init__(
        self,
        sequence: GradientSequence,
        names: dict[int, str],
        device: torch.device,
        knows_rows: bool,
        pace: Pace = PACE,
        *,
        skips: bool = False,
        checkpoint: Path | None = None,
        precision: str = "32-true",
    ):
        self.skips = skips
        self.consecutive = 0
        self._checkpoint = checkpoint
        self._precision = precision
        self._files = 0
        self._has_warned = False
        self._sequence = sequence
        self._processes = sequence.processes
        self._names = names
        self._knows_rows = knows_rows
        self._pace = pace
        self._devices = generator_devices(device)
        self._window: list[_RecordedStep] = []
        self._held_bytes = 0
        self._batch_bytes = 0
        self._saved = TrainingState(sequence.updates, sequence.state_tensors)
        self._unchecked = {id(t) for t in self._tensors() if has_nonfinite(t.detach())}
        self._growth = GrowthRecord(sequence.parameters, names)

    # -- while all is well ----------------------------------------------------------------------------------------

    def before_step(self, batch: Batch, epoch: int, number: int) -> None:
        """Record the ``number``-th step of an epoch, counted from 1, so that it can be taken again."""
        if not self._window:
            self._saved.save()
            self._batch_bytes = sum(x.nbytes for x in batch.parts()[1])
        generators = [generator_state(device) for device in self._devices]
        is_first = self._growth.first_gradient is None
        rates = [_copy_of(group["lr"]) for group in self._groups() if "lr" in group]
        self._window.append(_RecordedStep(batch, is_first, epoch, number, generators, self._sequence.steps, rates))
        self._held_bytes += self._batch_bytes

    def after_step(self, sums: Iterable[Tensor]) -> None:
        """Check the numbers, if it is time.

        Args:
            sums: of the losses and their terms, over the epoch so far: once NaN or infinite, they stay so.
        """
        if self._growth.first_gradient is None and any(p.grad is not None for p in self._sequence.parameters):
            self._growth.first_gradient = gradient_norm(self._sequence.parameters)
        if not self._window:  # the step has been checked
            return
        full = len(self._window) >= self._pace.check_every
        if self._processes.world == 1:  # several check at the same steps
            full |= self._held_bytes >= self._pace.max_held_bytes
        if full or self._window[0].is_first:
            self.check(sums)

    def finish_step(self, values: list[Tensor], error: Exception | None = None) -> bool:
        """Check a step that is left out if it is not finite; return True if it is left out.

        The state is then that before the step, but for the count of steps and the states of torch's generators.

        Args:
            values: of the loss and the terms, per update; none after an error.
            error: the error that the step ended with.

        Raises:
            NotFinite: as many steps as may be left out, one after the other, were.
        """
        step = self._window[-1]
        if not self._processes.any(error is not None or not self._is_finite(values)):
            self._forget()
            self.consecutive = 0
            return False
        after = [generator_state(device) for device in self._devices]
        self._restore(self._saved)
        self.consecutive += 1
        is_last = self.consecutive >= MAX_CONSECUTIVE_SKIPS
        if error is not None:
            cause = self._find_cause(step)
            self._rewind(step)
            if not cause:
                self.consecutive -= 1
                return False
            found = self._error(UNCOMPUTED, step, cause)
        elif is_last or not self._has_warned:
            found = self._agree(self._explain(step, values, []))
        else:
            self._write(step)
            found = NotFinite()
        self._restore(self._saved)
        if is_last:
            raise NotFinite(f"{self.consecutive} minibatches in a row are not finite. The last one: {found}")
        if not self._has_warned and self._processes.is_main:
            warnings.warn(f"a minibatch is skipped: {found}", stacklevel=5)
        self._has_warned = True
        for p in self._sequence.parameters:
            p.grad = None
        self._sequence.steps = step.steps + 1
        for device, generator in zip(self._devices, after, strict=True):
            set_generator_state(device, generator)
        self._forget()
        return True

    def _forget(self) -> None:
        self._window = []
        self._held_bytes = 0

    @contextmanager
    def guard(self, sums: Mapping[Any, Tensor]) -> Iterator[None]:
        """Leave no NaN or infinity behind if an epoch is broken off: the state is then that of the latest check.

        Args:
            sums: of the losses and their terms, over the epoch so far.
        """
        try:
            yield
        except NotFinite:
            raise
        except BaseException:
            with suppress(RuntimeError):  # of a device that does not answer
                if self._window and not self._is_finite(sums.values()):
                    self._restore(self._saved)
            raise

    def check(self, sums: Iterable[Tensor]) -> None:
        """Check the numbers of the steps since the latest check.

        Raises:
            NotFinite: with the state put back to before the first step that is not finite.
        """
        if self._window and self._processes.any(not self._is_finite(sums)):
            self._locate()
        self._forget()

    def _is_finite(self, sums: Iterable[Tensor]) -> bool:
        sums = list(sums)
        checked = [t.detach() for t in self._tensors() if id(t) not in self._unchecked]
        norms = [*foreach_norm(checked)] if checked else []
        # all in one number, and one wait; squares may overflow where the entries do not
        flags = [x.double().sum() for x in sums] + [x.double() for x in norms]
        if math.isfinite(float(torch.stack([f.to(flags[0].device) for f in flags]).sum())):
            return True
        return not any(map(has_nonfinite, [*(x.detach() for x in sums), *checked]))

    def _tensors(self) -> list[Tensor]:
        """Return the parameters and buffers that hold floating-point numbers."""
        updates = self._sequence.updates
        tensors = {id(p): p for update in updates for p in (*update.loss.parameters, *update.targets)}
        tensors |= {id(b): b for update in updates for m in update.loss.networks for b in m.buffers()}
        return [t for t in tensors.values() if t.is_floating_point() and t.numel()]

    # -- once it is not -------------------------------------------------------------------------------------------

    def explain_error(self, error: Exception) -> None:
        """Look for NaN and infinity behind an error of the latest step; put the state back to before that step.

        Raises:
            NotFinite: from the error, if there are any.
        """
        if "CUDA error" in str(error):
            return  # the device answers no more in this process
        *earlier, latest = self._window
        if self._processes.world == 1:  # the others do not take the steps again, and wait at the present one
            self._restore(self._saved)
            for step in earlier:
                self._retake(step, error, [])
        cause = self._find_cause(latest)
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
            "not when the steps were taken again: some random numbers come from outside torch, or the device sums in "
            "no fixed order. The parameters are those of the second run"
        )

    def _retake(self, step: _RecordedStep, error: Exception | None, growths: list[tuple[float, float]]) -> None:
        """Take a step again; if it is not finite, go back to before it and raise."""
        before = TrainingState(self._sequence.updates, self._sequence.state_tensors)
        before.save()
        self._rewind(step)
        factor = self._growth.largest()[1]
        try:
            values = [found.values for found in self._sequence(step.batch) if found is not None]
        except ERRORS as failure:
            self._restore(before)
            if cause := self._find_cause(step):
                raise self._error(UNCOMPUTED, step, cause) from failure
            raise
        if not self._processes.any(not self._is_finite(values)):
            growths.append((float(gradient_norm(self._sequence.parameters)), factor))
            return
        self._restore(before)
        raise self._agree(self._explain(step, values, growths)) from error

    def _explain(self, step: _RecordedStep, values: list[Tensor], growths: list[tuple[float, float]]) -> NotFinite:
        cause = self._find_cause(step)
        losses = [float(x.flatten()[0]) for x in values]
        players = [update.name for update in self._due(step)]
        nonfinite = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if nonfinite:
            head = f"the loss{_of_player(players[nonfinite[0]])} is {losses[nonfinite[0]]}"
            divergence = self._growth.explain(self._optimizers(), growths)
        else:
            gradients, advice, player = self._nonfinite_gradients(step)
            if gradients:
                head = f"a gradient{_of_player(player)} is NaN or infinite"
                loss = losses[players.index(player)]
                text = f"The gradient of {list_names(gradients)} is not finite, while the loss is {loss:.6g}"
                cause = Cause([text], advice)
                divergence = self._growth.explain(self._optimizers(), growths)
            else:
                head = "a parameter becomes NaN or infinite"
                cause = Cause()
                latest = float(gradient_norm(self._sequence.parameters)), self._growth.largest()[1]
                divergence = self._growth.explain(self._optimizers(), [*growths, latest], certain=True)
        if divergence is not None:
            cause.where.append(divergence[0])
            cause.advice = divergence[1]
        return self._error(head, step, cause)

    def _agree(self, own: NotFinite) -> NotFinite:
        """Return the error of the process that knows most: of a loss that is not finite, rather than a parameter."""
        texts = self._processes.gather(str(own))
        for start in ("the loss", "a gradient"):
            for rank, text in enumerate(texts):
                if text.startswith(start):
                    return own if rank == self._processes.rank else NotFinite(text)
        return own

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        return [update.optimizer for update in self._sequence.updates if update.optimizer is not None]

    def _groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self._optimizers() for group in optimizer.param_groups]

    def _due(self, step: _RecordedStep) -> list[Update]:
        return [update for update in self._sequence.updates if update.is_due(step.steps)]

    def _find_cause(self, step: _RecordedStep) -> Cause:
        """Find where NaN or infinity comes from in the losses of a step."""
        nonfinite = [p for p in self._sequence.parameters if has_nonfinite(p.detach())]
        if nonfinite:
            names = list_names([self._names[id(p)] for p in nonfinite])
            return Cause([f"{names} held NaN or infinity before that step"], "Initialise it anew")
        for update in self._due(step):

            def evaluate(batch: Batch, update: Update = update) -> Loss:
                return update.loss.compute(batch, step.steps)

            cause = cause_in_loss(step.batch, self._knows_rows, evaluate, lambda: self._rewind(step))
            self._rewind(step)
            if cause:
                return cause
        return Cause()

    def _nonfinite_gradients(self, step: _RecordedStep) -> tuple[list[str], str, str]:
        """Return the names of the parameters whose gradient is not finite, advice, and the name of the player."""
        for update in self._due(step):
            rows = self._sequence.rows(update, step.batch)
            self._rewind(step)
            update.differentiate(step.batch, rows, step.steps)
            nonfinite = [p for p in update.targets if p.grad is not None and has_nonfinite(p.grad)]
            if not nonfinite:
                continue
            advice = OVERFLOW_ADVICE
            self._rewind(step)
            try:
                with detect_anomalies():
                    update.differentiate(step.batch, rows, step.steps)
            except RuntimeError as error:
                advice = advice_from_anomaly(error) or advice
            return [self._names[id(p)] for p in nonfinite], advice, update.name
        return [], "", ""

    def _error(self, head: str, step: _RecordedStep, cause: Cause) -> NotFinite:
        path = self._write(step)
        for p in self._sequence.parameters:
            p.grad = None
        where = f"{head} at step {step.number} of epoch {step.epoch}"
        state = "Parameters, buffers and the optimiser's state are those before that step"
        if path is not None:
            state += f". pyro_mm.replay({str(path)!r}, model, guide, objective) runs it again"
        return NotFinite(error_text(where, cause, state))

    def _write(self, step: _RecordedStep) -> Path | None:
        """Write a step beside the checkpoint, in the state before it; return the file."""
        if self._checkpoint is None or self._files >= MAX_FILES:
            return None
        state = self._state_of(step)
        rank = f"-rank{self._processes.rank}" if self._processes.rank else ""
        path = self._checkpoint.with_name(f"{self._checkpoint.stem}-nonfinite-{step.steps}{rank}.pt")
        try:
            save_tensors(path, state)
        except OSError as error:
            warnings.warn(f"a step that is not finite could not be written for a replay: {error}", stacklevel=6)
            return None
        self._files += 1
        return path

    def _state_of(self, step: _RecordedStep) -> dict[str, Any]:
        """Return the state before the first update of a step whose loss or gradient is not finite.

        Each of several processes writes the state before the step, as none can take the updates of players alone.
        """
        before = TrainingState(self._sequence.updates, self._sequence.state_tensors)
        before.save()
        self._rewind(step)
        state: dict[str, Any] = {}
        for update in self._due(step):
            generators = [generator_state(device) for device in self._devices]
            state = step_state(update.loss.programs, step.batch, step.steps, generators, update.name, self._precision)
            try:
                loss = update.differentiate(step.batch, self._sequence.rows(update, step.batch), step.steps)
            except ERRORS:
                break
            found = [loss.total, *(p.grad for p in update.targets if p.grad is not None)]
            if any(map(has_nonfinite, found)):
                break
            if self._processes.world == 1:
                update.apply()
        self._restore(before)
        self._rewind(step)
        return state

    def _restore(self, state: TrainingState) -> None:
        if state.restore():
            self._sequence.retrace()

    def _rewind(self, step: _RecordedStep) -> None:
        """Put the generators and the count of steps back to before a step."""
        for device, generator in zip(self._devices, step.generators, strict=True):
            set_generator_state(device, generator)
        self._sequence.steps = step.steps
        for group, rate in zip([g for g in self._groups() if "lr" in g], step.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].copy_(rate)
            else:
                group["lr"] = rate


def _of_player(name: str) -> str:
    """Return the words that say whose loss or gradient it is, of a further player."""
    return f" of the player {name!r}" if name else ""


def _copy_of(rate: Any) -> Any:
    return rate.clone() if isinstance(rate, Tensor) else rate
