"""The first run of a pair, on a few rows, whose errors say where they arose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from . import causes
from .batch import Batch
from .causes import Cause, Rows
from .finite import NotFinite
from .global_state import validation
from .reached import Reached
from .stepping import Problem, TrainingError, problem_of

ERRORS = (ValueError, TypeError, RuntimeError, IndexError, KeyError, AttributeError, ArithmeticError)
TO_EVENT = ("Shape mismatch inside plate", "invalid log_prob shape", "to_event", "Expected independent dimensions")


class ProbeError(TrainingError):
    """A story or a guide that cannot be run on its rows."""


def probe(
    objective: Any,
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Problem:
    """Find the :class:`~pyro_mm.stepping.Problem` by one run on a few rows.

    Raises:
        ValueError, TypeError: an error of the run, with the site and the network where it arose, and what may mend it.
    """
    place = _Place({"model": model, "guide": guide}, batch.size)
    try:
        with place.watched():
            return problem_of(objective, model, guide, batch, autocast)
    except TrainingError:
        raise
    except ERRORS as error:
        if cause := _not_finite(model, guide, batch):
            raise NotFinite(". ".join(["the first rows cannot be run", *cause.where, cause.advice])) from error
        where = place.text()
        if not where and isinstance(error, ValueError | TypeError):
            raise  # it says all that is known
        words = isinstance(error, ValueError | TypeError | RuntimeError)
        text = str(error) if words else f"{type(error).__name__} {error}"
        head = f"the first {batch.size} rows (N = {batch.size}) cannot be run{where}: {text}"
        kind = TypeError if isinstance(error, TypeError) else ProbeError
        new = kind(". ".join([head, *place.hints(text)]))
        for note in getattr(error, "__notes__", []):
            new.add_note(note)
        raise new from error


def _not_finite(model: Any, guide: Any, batch: Batch) -> Cause:
    """Find NaN or infinity in the rows, in a parameter, or in what the pair makes of them."""
    if cause := causes.of_data(batch, Rows()):
        return cause
    for path, module in Reached({"model": model, "guide": guide}).modules.items():
        for name, p in module.named_parameters():
            if p.requires_grad and causes.not_finite(p.detach()) and p.isnan().any():
                return Cause([f"{path}.{name} holds NaN before training"], "Initialise it anew")

    def run() -> None:
        with poutine.block(), poutine.trace() as guided:
            guide(batch)
        with poutine.block(), poutine.trace() as modelled, poutine.replay(trace=guided.trace):
            model(batch)
        modelled.trace.compute_log_prob()

    try:
        with validation(False):
            return causes.of_run(batch, Rows(), run)
    except ERRORS:
        return Cause()


class _Place(Messenger):
    """The module and the sample site that a run is in."""

    def __init__(self, programs: dict[str, Any], size: int):
        super().__init__()
        self.size = size
        self.modules: list[tuple[nn.Module, list[Tensor]]] = []
        self.site: str | None = None
        self._paths = {
            id(module): f"{root}.{path}" if path else root
            for root, outer in Reached(programs).modules.items()
            for path, module in outer.named_modules()
        }

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Follow the calls of modules and the samples of sites; after an error they are those that it arose in."""
        before = hooks.register_module_forward_pre_hook(self._enter)
        after = hooks.register_module_forward_hook(self._leave)
        try:
            with self:
                yield
        finally:
            before.remove()
            after.remove()

    def _enter(self, module: nn.Module, inputs: Any) -> None:
        if id(module) in self._paths:
            self.modules.append((module, [x for x in inputs if isinstance(x, Tensor)]))

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        while self.modules and id(module) in self._paths:
            inner, _ = self.modules.pop()
            if inner is module:
                return

    def _pyro_sample(self, msg: Any) -> None:
        self.site = msg["name"]

    def _pyro_post_sample(self, msg: Any) -> None:
        self.site = None

    def text(self) -> str:
        """Return where the run is: a module with the shapes of its inputs, and a site."""
        parts = []
        if self.modules and self.modules[-1][1]:
            module, inputs = self.modules[-1]
            shapes = " and ".join(self._shape(x) for x in inputs)
            parts.append(f"in {self._paths[id(module)]} ({type(module).__name__}), given {shapes}")
        if self.site is not None and self.site != "data":
            parts.append(f"at site {self.site!r}")
        return ", " + ", ".join(parts) if parts else ""

    def hints(self, text: str) -> Iterator[str]:
        """Yield what may mend the error."""
        if self.modules and self.modules[-1][1]:
            module, inputs = self.modules[-1]
            if isinstance(module, nn.Linear) and inputs[0].dim() and inputs[0].shape[-1] != module.in_features:
                gets = inputs[0].shape[-1]
                fits = f"nn.Linear({gets}, {module.out_features}), or nn.Flatten before it?"
                yield f"It takes {module.in_features} features and gets {gets}: {fits}"
            elif inputs[0].dtype != next((p.dtype for p in module.parameters()), inputs[0].dtype):
                yield f"Its weights are {next(module.parameters()).dtype}, and its input is {inputs[0].dtype}"
        if any(part in text for part in TO_EVENT):
            yield "A distribution over the entries of a row needs .to_event(1), or as many as the row has dimensions"

    def _shape(self, x: Tensor) -> str:
        sizes = list(x.shape)
        last = len(sizes) - (len(sizes) > 1)
        named = ["N" if size == self.size and i < last else str(size) for i, size in enumerate(sizes)]
        return f"({', '.join(named)}{',' if len(named) == 1 else ''})"
