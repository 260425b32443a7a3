"""A step of training with Pyro traced out of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.batch import Batch, check_batch
from ..nn import channels_last
from ..utils.arguments import check_function, describe
from ..utils.global_state import preserve_process_settings
from ..utils.seeding import temporary_seed
from .arguments import check_objective, check_optimizer
from .cuda_graph import CUDAGraphStep, capturable
from .draw_order import compiled_between_draws
from .first_run import probe
from .parameter_names import parameter_names
from .program_snapshot import Composition, left_out
from .step import EagerStep, TrainingProblem
from .tracing import TracedStep, Untraceable, trace_step

MOST = 8  # graphs of one step: one a shape of the batch, and a compilation each


def stage(
    objective: Any,
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    backend: str | None = "inductor",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Staged:
    r"""A step of gradient descent that runs the programs once, and afterwards a compiled graph of what they did.

    The objective's loss and its gradient for batches like ``batch`` are traced by ``torch.fx`` into one graph of tensor
    operations, in which nothing of Pyro is left, and compiled by inductor. On a GPU the graph and the optimiser's step
    are replayed as one CUDA graph. The numbers are those of the programs, and with ``torch.manual_seed`` so are the
    draws on a CPU. What Python decides from shapes and settings is decided when tracing; what moves from step to step
    (the batch, its masks, weights that are functions of the step, random numbers) is an input or an operation.

    Served are all objectives, with every estimator of :mod:`pyro_mm.estimators`, ``pyro.infer.Trace_ELBO`` and
    ``TraceMeanField_ELBO``. Others, and programs that read a tensor's value in Python, run as they are, with a warning
    that says why.

    Args:
        objective, model, guide: as of :func:`pyro_mm.fit`.
        batch: rows like those to come. Another size is compiled anew, up to eight of them: pad the last one
            (``batch.padded``).
        optimizer: stepped at every call; None leaves the gradients in the parameters. It is captured with the rest on a
            GPU if it can be: anew whenever a setting of it changes, so that a rate that moves at every step should be a
            tensor. Load its state before the first step.
        backend: None runs the traced graph as it is, which needs no C++ compiler and is slower.
        autocast: a context manager for the networks' precision.

    On a CPU the weights of two-dimensional convolutions are laid out channels last, unless the optimiser has begun.

    Returns:
        A callable of a batch, giving the loss: a scalar, summed over rows and scaled by a subsampled data plate. Hooks
        of parameters that wait for a gradient to be accumulated are not called.

    Raises:
        TypeError, ValueError: an argument of another type, or out of range; a story or guide that cannot be run.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("stage takes gradients, and is called under torch.inference_mode(): call it outside of it")
    check_function("model", model)
    check_function("guide", guide)
    check_objective(objective)
    check_batch(batch)
    if optimizer is not None:
        check_optimizer(optimizer)
    _check_autocast(autocast)
    return Staged(_problem(objective, model, guide, batch, autocast), optimizer, backend)


class Staged:
    """A compiled step: what :func:`stage` returns.

    Attributes:
        reasons: why some batches do not run compiled, if any.
    """

    def __init__(
        self,
        problem: TrainingProblem,
        optimizer: torch.optim.Optimizer | None,
        backend: str | None = "inductor",
        validate: bool = False,
    ):
        if backend not in (None, "inductor"):
            raise ValueError(f'expected backend to be "inductor" or None, got {backend!r}')
        self.optimizer, self.backend, self.validate = optimizer, backend, validate
        self._captures = problem.parameters[0].device.type == "cuda"
        self._inside = not self._captures or optimizer is None or capturable(optimizer)
        self.reasons: list[str] = []
        if not self._captures and (optimizer is None or not optimizer.state):
            for module in problem.networks:
                channels_last(module)
        self._numbers: dict[Any, Tensor] = {}
        self._start(problem)

    def _start(self, problem: TrainingProblem) -> None:
        self.problem = problem
        self.buffers = list({id(b): b for m in problem.networks for b in m.buffers()}.values())
        self._all_modules = [m for module in problem.networks for m in module.modules()]
        self._graphs: dict[Hashable, tuple[Any, TracedStep] | None] = {}
        self._eager = EagerStep(problem, self.optimizer, validate=self.validate)
        self._composition = Composition({"model": problem.model, "guide": problem.guide})

    def retrace(self) -> None:
        """Forgets the graphs, after a change that no tensor shows: of a dropout's rate, of a number in a module."""
        self._graphs.clear()

    def _start_anew(self, batch: Batch) -> None:
        """Starts from what the programs are made of now."""
        old = self.problem
        for p in old.parameters:
            p.grad = None  # or an optimiser would go on with that of a frozen one
        new = _problem(old.objective, old.model, old.guide, batch, old.autocast)
        if self.optimizer is not None and (unknown := left_out(new.parameters, self.optimizer, old.parameters)):
            names = parameter_names(new)
            raise ValueError(
                f"the optimiser does not have {', '.join(names[id(p)] for p in unknown[:5])}, new since the step was "
                "staged, and would not train what was put into the model or the guide. Add it by "
                "optimizer.add_param_group, or stage a step with an optimiser of the parameters of now"
            )
        self._start(new)

    def __call__(self, batch: Batch, rows: float = 1.0) -> Tensor:
        """Takes the step; the gradient is that of the loss over ``rows``.

        Raises:
            TypeError, ValueError: no batch, one without rows, or ``rows`` that are not positive.
        """
        check_batch(batch)
        if not rows > 0:
            raise ValueError(f"expected rows, which the gradient is divided by, to be positive, got {rows}")
        if self._composition.changed():
            self._start_anew(batch)
        objective = self.problem.objective
        weights, fixed, form = _form(objective, batch)
        structure, tensors = batch.parts()
        modes = tuple([m.training for m in self._all_modules])
        amp = torch.is_autocast_enabled(batch.device.type)
        key = (structure, tuple(fixed.items()), form, modes, amp)
        if key not in self._graphs:
            self._graphs[key] = self._build(batch, self._tensor((1 / rows, *weights), batch), fixed)
        built = self._graphs[key]
        if built is None:
            return self._eager(batch, rows)
        run, traced = built
        with torch.autocast(batch.device.type, enabled=False) if amp else nullcontext():
            loss, terms = run([self._tensor((1 / rows, *weights), batch), *tensors])
        if not self._inside:
            self.optimizer.step()  # type: ignore[union-attr]
        if hasattr(objective, "by_term"):
            objective.by_term = dict(zip(traced.labels, terms, strict=True))
        if hasattr(objective, "steps"):
            objective.steps += 1
        return loss

    def _build(self, batch: Batch, numbers: Tensor, fixed: dict[int, float]) -> tuple[Any, TracedStep] | None:
        try:
            if len(self._graphs) >= MOST:
                raise Untraceable(f"batches of more than {MOST} shapes came: pad them to a few sizes")
            if (why := refused(self.problem.objective)) is not None:
                raise Untraceable(why)
            traced = trace_step(self.problem, self.buffers, batch, numbers, fixed)
        except Untraceable as reason:
            if str(reason) not in self.reasons:
                self.reasons.append(str(reason))
                warnings.warn(f"the step is not compiled, and runs as it is: {reason}", stacklevel=4)
            return None
        held = [*self.problem.parameters, *self.buffers]
        graph: Any = traced.graph
        if self.backend is not None:
            with preserve_process_settings():
                graph = self._compiled(traced, [numbers, *batch.parts()[1], *held])
        step = _Step(graph, traced, self.problem.parameters, held, self.optimizer if self._inside else None)
        return (CUDAGraphStep(step) if self._captures else step), traced

    def _compiled(self, traced: TracedStep, inputs: list[Any]) -> Any:
        import torch._inductor as inductor
        from torch._guards import TracingContext, tracing
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        try:
            # without a shape environment inductor passes its caches over, and compiles a known graph again
            fake = FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True))

            def compiler(graph: Any, inputs: list[Any]) -> Any:
                with torch.no_grad(), tracing(TracingContext(fake)), _counted():
                    # the draws of torch's own generators, so that they are those of the programs
                    return inductor.compile(graph, inputs, options={"fallback_random": True})

            if self._captures:  # on a GPU inductor's draws are others than the programs' in any order
                return compiler(traced.graph, inputs)
            return compiled_between_draws(traced.graph, inputs, compiler)
        except Exception as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            warnings.warn(f"inductor could not compile the step, which runs as it was traced: {text}", stacklevel=4)
            return traced.graph

    def _tensor(self, numbers: tuple[float, ...], batch: Batch) -> Tensor:
        """The numbers on the batch's device; those of the step before, if they are the same."""
        key = (batch.device, numbers)
        if key not in self._numbers:
            self._numbers = {key: torch.tensor(numbers, dtype=torch.float64, device=batch.device)}
        return self._numbers[key]


def _counted() -> AbstractContextManager[Any]:
    """A place for inductor's counts: torch 2.6 fails without one where it finds a graph in its cache."""
    if not torch.__version__.startswith("2.6."):
        return nullcontext()
    from torch._dynamo.utils import get_metrics_context

    return get_metrics_context()


class _Step:
    """Runs a graph, hands the gradients to their parameters, and steps the optimiser."""

    def __init__(
        self,
        graph: Any,
        traced: TracedStep,
        parameters: list[Tensor],
        held: list[Tensor],
        optimizer: torch.optim.Optimizer | None,
    ):
        self.graph, self.held, self.optimizer = graph, held, optimizer
        self.moved = [parameters[i] for i in traced.places]
        self.still = [p for i, p in enumerate(parameters) if i not in set(traced.places)]
        self.terms = len(traced.labels)
        self.gradients: list[Tensor] = []

    def __call__(self, inputs: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.no_grad():
            loss, *rest = self.graph(*inputs, *self.held)
        self.gradients, places = [], set()
        for p, gradient in zip(self.moved, rest[self.terms :], strict=True):
            # fused optimisers go through memory, not through indices; and each gradient is scaled by itself
            if gradient.stride() != p.stride() or gradient.data_ptr() in places:
                gradient = torch.empty_like(p).copy_(gradient)
            places.add(gradient.data_ptr())
            self.gradients.append(gradient)
        self.hand_over()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss, tuple(rest[: self.terms])

    def hand_over(self) -> None:
        """Gives the parameters the gradients of the latest run."""
        for p, gradient in zip(self.moved, self.gradients, strict=True):
            p.grad = gradient
        for p in self.still:
            p.grad = None


def _check_autocast(autocast: Any) -> None:
    """Raise a TypeError unless this is a function that gives a context manager."""
    wanted = 'expected autocast to be a function that gives a context manager, such as lambda: torch.autocast("cuda")'
    if not callable(autocast) or isinstance(autocast, torch.autocast | nn.Module):
        raise TypeError(f"{wanted}, got {describe(autocast)}")
    try:
        made = autocast()
    except TypeError as error:
        raise TypeError(f"{wanted}, got {describe(autocast)}, which cannot be called without arguments") from error
    if not hasattr(made, "__enter__"):
        raise TypeError(f"{wanted}, and it gives {describe(made)}")


def _problem(objective: Any, model: Any, guide: Any, batch: Batch, autocast: Any) -> TrainingProblem:
    few = batch[: min(2, batch.size)]
    with torch.enable_grad(), temporary_seed(0, batch.device):
        return probe(objective, model, guide, few, autocast)


def _form(objective: Any, batch: Batch) -> tuple[list[float], dict[int, float], Hashable]:
    if hasattr(objective, "weights"):
        return objective.weights(batch.names)
    return [], {}, tuple((k, v) for k, v in vars(objective).items() if isinstance(v, bool | int | float | str | None))


def refused(objective: Any) -> str | None:
    """Why an objective cannot be traced, if it cannot."""
    estimator = getattr(objective, "estimator", objective)
    name = type(estimator).__name__
    module = type(estimator).__module__
    if getattr(objective, "subsample", None) is not None:
        return "the modalities that it decodes are drawn in Python, anew at every step"
    if module.startswith("pyro.infer") and name not in ("Trace_ELBO", "TraceMeanField_ELBO"):
        return f"{name} takes its gradient itself, or reads numbers as it goes"
    if not hasattr(objective, "differentiable_loss"):
        return f"{name} has no differentiable loss"
    return None
