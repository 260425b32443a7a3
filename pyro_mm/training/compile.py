"""A step of training as a compiled graph, from which Pyro has been traced out."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.batch import Batch, check_batch
from ..nn.images import channels_last
from ..scoring.prepare_objective import prepare_objective
from ..scoring.training_objective import Loss, PreparedObjective, TrainingObjective
from ..utils.arguments import check_function, describe
from ..utils.global_state import preserve_process_settings
from ..utils.seeding import temporary_seed
from ..utils.shared_rows import refuse_gathering
from .arguments import check_optimizer
from .cuda_graph import CUDAGraphStep, can_capture
from .draw_order import compile_between_draws
from .first_run import build_problem
from .parameter_names import parameter_names
from .problem import TrainingProblem
from .program_snapshot import ProgramSnapshot, unknown_to_optimizer
from .step import EagerStep, Update
from .tracing import TracedStep, TraceInputs, Untraceable, isolated_run, trace_step

MAX_GRAPHS = 8  # graphs of one step: one for each shape of the batch, and a compilation each
MAX_GRAPHS_UNASKED = 3  # of a training that compiles of its own accord

is_training = operator.attrgetter("training")


def stage(
    objective: TrainingObjective | Any,
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    backend: str | None = "inductor",
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> CompiledStep:
    r"""Compile a step of gradient descent into one graph of tensor operations, and return it as a callable.

    The objective's loss and its gradient for batches like ``batch`` are traced by ``torch.fx`` into one graph, in which
    nothing of Pyro is left, and compiled by inductor. On a GPU the graph and the optimiser's step are replayed as one
    CUDA graph. The numbers equal those of the uncompiled programs, on a CPU also the draws under ``torch.manual_seed``.
    Decisions that Python makes from shapes and settings are made when tracing. The batch, its masks, weights that are
    functions of the step, and random numbers are inputs or operations of the graph, and differ from step to step.

    All objectives of this package are compiled, with every estimator of :mod:`pyro_mm.estimators`, and so are
    ``pyro.infer.Trace_ELBO``, ``TraceMeanField_ELBO`` and objectives of your own. Other ELBOs of Pyro, and programs
    that read a tensor's value in Python, run uncompiled, with a warning that gives the reason.

    Args:
        objective: as in :func:`pyro_mm.fit`. The step counts from 0, whatever else the objective is used for. An
            objective of your own is given the count as a scalar tensor, so that arithmetic with it is traced.
        model, guide: callables of a batch.
        batch: rows like those to come. Each further size is compiled anew, up to eight: pad the last minibatch of an
            epoch (``batch.padded``).
        optimizer: stepped at every call; None leaves the gradients in the parameters. On a GPU it is captured with the
            rest if it can be, and anew whenever a setting of it changes, so a rate that moves at every step should be a
            tensor. Load its state before the first step.
        backend: None runs the traced graph without compiling it, which needs no C++ compiler and is slower.
        autocast: a function that makes a context manager for the networks' precision.

    On a CPU the weights of two-dimensional convolutions are laid out channels last, unless the optimiser has begun.

    Returns:
        A callable of a batch that returns the loss: a scalar, summed over rows and scaled by a subsampled data plate.
        Its ``by_term`` holds the terms of the latest step. Hooks of parameters that wait for a gradient to be
        accumulated are not called.

    Raises:
        TypeError, ValueError: an argument of another type, or out of range; a model or guide that cannot be run.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError("stage takes gradients, and is called under torch.inference_mode(): call it outside of it")
    check_function("model", model)
    check_function("guide", guide)
    prepared = prepare_objective(objective)
    check_batch(batch)
    if optimizer is not None:
        check_optimizer(optimizer)
    _check_autocast(autocast)
    few = batch[: min(2, batch.size)]
    with torch.enable_grad(), temporary_seed(0, batch.device):
        if players := prepared.players(model, guide, few):
            names = ", ".join(repr(player.name) for player in players)
            raise ValueError(
                f"stage makes one update, and the objective brings further players, {names}: use fit(compile=True), "
                "which compiles an update for each"
            )
    problem = _run_a_few_rows(prepared, model, guide, batch, autocast)
    return CompiledStep(Update(problem, optimizer=optimizer), backend)


class CompiledStep:
    """An update that runs as a compiled graph: the return value of :func:`stage`.

    Args:
        update: the update.
        backend: as for :func:`stage`.
        validate: True lets Pyro check the steps that do not run compiled.
        report: for steps that nobody asked to compile: called with a sentence if something cannot be compiled, which
            then runs as it is. None warns.

    Attributes:
        reasons: reasons why some batches do not run compiled, if any.
        steps: steps taken by calls so far.
        by_term: label -> value of each term of the objective in the latest call.
    """

    def __init__(
        self,
        update: Update,
        backend: str | None = "inductor",
        validate: bool = False,
        report: Callable[[str], object] | None = None,
    ):
        if backend not in (None, "inductor"):
            raise ValueError(f'expected backend to be "inductor" or None, got {backend!r}')
        self.backend = backend
        self.validate = validate
        self.report = report
        self.reasons: list[str] = []
        self.steps = 0
        self.by_term: Mapping[str, Tensor] = {}

        optimizer = update.optimizer
        self._is_cuda = update.targets[0].device.type == "cuda"
        capturable = not self._is_cuda or optimizer is None or can_capture(optimizer)
        self._optimizer_inside = capturable and not (self._is_cuda and update.reduce_gradients is not None)
        if not self._is_cuda and (optimizer is None or not optimizer.state):
            for module in update.loss.networks:
                channels_last(module)
        self._number_tensors: dict[Any, Tensor] = {}
        self._step_tensors: dict[torch.device, Tensor] = {}
        self._start(update)

    def __call__(self, batch: Batch, rows: float = 1.0) -> Tensor:
        """Take a step.

        Args:
            batch: N rows.
            rows: the number that the gradient is divided by.

        Returns:
            The loss, a scalar.

        Raises:
            TypeError, ValueError: no batch, one without rows, or ``rows`` that are not positive.
        """
        check_batch(batch)
        if not rows > 0:
            raise ValueError(f"expected rows, which the gradient is divided by, to be positive, got {rows}")
        loss = self.take(batch, rows, self.steps)
        self.steps += 1
        self.by_term = loss.by_term
        return loss.total

    def take(self, batch: Batch, rows: float, step: int) -> Loss:
        """Make the update; arguments as in :class:`EagerStep`."""
        if self._snapshot.changed():
            self._restart(batch, step)
        weights = self.update.loss.objective.step_weights(batch.names, step)
        structure, tensors = batch.parts()
        modes = tuple(map(is_training, self._modules))
        uses_autocast = torch.is_autocast_enabled(batch.device.type)
        key = (structure, tuple(weights.fixed.items()), weights.form, modes, uses_autocast)
        numbers = self._as_tensor((1 / rows, *weights.values), batch.device)
        if key not in self._graphs:
            inputs = TraceInputs(batch, self._buffers, numbers, self._step_as_tensor(step, batch.device), weights)
            self._graphs[key] = self._build(inputs)
        built = self._graphs[key]
        if built is None:
            return self._eager(batch, rows, step)

        run, traced = built
        step_input = [self._step_as_tensor(step, batch.device)] if traced.uses_step else []
        with torch.autocast(batch.device.type, enabled=False) if uses_autocast else nullcontext():
            loss, terms = run([numbers, *step_input, *tensors])
        if not self._optimizer_inside:
            self.update.apply()
        return Loss(loss, dict(zip(traced.labels, terms, strict=True)))

    def retrace(self) -> None:
        """Forget the graphs, after a change that no tensor shows: of a dropout's rate, of a number in a module."""
        self._graphs.clear()

    # -- graphs ---------------------------------------------------------------------------------------------------

    def _start(self, update: Update) -> None:
        problem = update.loss
        self.update = update
        self._buffers = list({id(b): b for m in problem.networks for b in m.buffers()}.values())
        self._modules = [m for module in problem.networks for m in module.modules()]
        self._graphs: dict[Hashable, tuple[Any, TracedStep] | None] = {}
        self._eager = EagerStep(update, validate=self.validate)
        self._snapshot = ProgramSnapshot(problem.programs)

    def _restart(self, batch: Batch, step: int) -> None:
        """Start from the modules and parameters that the programs are made of now."""
        old = self.update
        for p in old.targets:
            p.grad = None  # or an optimiser would go on with that of a frozen one
        problem = old.loss
        new = _run_a_few_rows(problem.objective, problem.model, problem.guide, batch, problem.autocast, step)
        unknown: list[Tensor] = []
        if old.optimizer is not None and old.parameters is None:
            unknown = unknown_to_optimizer(new.parameters, old.optimizer, problem.parameters)
        if unknown:
            names = parameter_names(new)
            raise ValueError(
                f"the optimiser does not have {', '.join(names[id(p)] for p in unknown[:5])}, new since the step was "
                "staged, and would not train them: add them by optimizer.add_param_group, or stage a step with an "
                "optimiser of the present parameters"
            )
        self._start(Update(new, old.parameters, old.optimizer, old.every, old.reduce_gradients, old.name))

    def _build(self, inputs: TraceInputs) -> tuple[Any, TracedStep] | None:
        """Return a step that runs a new graph, and its trace; None if there is none, after a warning."""
        update = self.update
        try:
            most = MAX_GRAPHS if self.report is None else MAX_GRAPHS_UNASKED
            if len(self._graphs) >= most:
                raise Untraceable(f"batches of more than {most} shapes came: pad them to a few sizes")
            if update.loss.objective.untraceable is not None:
                raise Untraceable(update.loss.objective.untraceable)
            with refuse_gathering():
                traced = trace_step(update, inputs)
        except Untraceable as reason:
            if str(reason) not in self.reasons:
                self.reasons.append(str(reason))
                self._tell(f"the step is not compiled, and runs as it is: {reason}", stacklevel=5)
            return None

        parameters_and_buffers = [*update.loss.parameters, *self._buffers]
        graph: Any = traced.graph
        if self.backend is not None:
            step_input = [inputs.step] if traced.uses_step else []
            example = [inputs.numbers, *step_input, *inputs.batch.parts()[1], *parameters_and_buffers]
            with preserve_process_settings():
                graph = self._compile(traced, example)
                if graph is not traced.graph and not self._runs(graph, example, inputs.batch.device):
                    graph = traced.graph
        step = GraphStep(graph, traced, update, parameters_and_buffers, self._optimizer_inside)
        return (CUDAGraphStep(step, self._tell) if self._is_cuda else step), traced

    def _runs(self, graph: Any, example: list[Tensor], device: torch.device) -> bool:
        """Return True if what inductor made of a graph can be run, after a warning if not; the run changes nothing."""
        try:
            with isolated_run(self.update.loss, device), torch.no_grad():
                graph(*example)
                if self._is_cuda:
                    torch.cuda.synchronize(device)
        except Exception as error:
            self._tell(f"what inductor compiled cannot be run, and the step runs as it was traced: {_text(error)}", 6)
            return False
        return True

    def _compile(self, traced: TracedStep, inputs: list[Any]) -> Any:
        """Return the graph as compiled by inductor; the graph itself if that fails, after a warning."""
        import torch._inductor as inductor
        from torch._guards import TracingContext, tracing
        from torch._subclasses import FakeTensorMode
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        try:
            # without a shape environment inductor passes its caches over, and compiles a known graph again
            fake = FakeTensorMode(shape_env=ShapeEnv(assume_static_by_default=True))

            def compiler(graph: Any, inputs: list[Any]) -> Any:
                with torch.no_grad(), tracing(TracingContext(fake)), _metrics_context():
                    # the draws of torch's own generators, so that they are those of the programs
                    return inductor.compile(graph, inputs, options={"fallback_random": True})

            if self._is_cuda:  # on a GPU inductor's draws are others than the programs' in any order
                return compiler(traced.graph, inputs)
            return compile_between_draws(traced.graph, inputs, compiler)
        except Exception as error:
            self._tell(
                f"inductor could not compile the step, which runs as it was traced: {_text(error)}", stacklevel=6
            )
            return traced.graph

    def _tell(self, text: str, stacklevel: int = 5) -> None:
        if self.report is None:
            warnings.warn(text, stacklevel=stacklevel)
        else:
            self.report(text)

    def _as_tensor(self, numbers: tuple[float, ...], device: torch.device) -> Tensor:
        """Return numbers as a tensor: that of the step before, if they are the same."""
        key = (device, numbers)
        if key not in self._number_tensors:
            self._number_tensors = {key: torch.tensor(numbers, dtype=torch.float64, device=device)}
        return self._number_tensors[key]

    def _step_as_tensor(self, step: int, device: torch.device) -> Tensor:
        """Return the count of steps as a scalar tensor, in one place for all steps."""
        if device not in self._step_tensors:
            self._step_tensors[device] = torch.zeros((), dtype=torch.long, device=device)
        return self._step_tensors[device].fill_(step)


def _text(error: Exception) -> str:
    """Return the first line of an error's message, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _metrics_context() -> AbstractContextManager[Any]:
    """Return a context for inductor's counts: torch 2.6 fails without one if it finds a graph in its cache."""
    if not torch.__version__.startswith("2.6."):
        return nullcontext()
    from torch._dynamo.utils import get_metrics_context

    return get_metrics_context()


class GraphStep:
    """Runs a graph, gives the parameters their gradients, and steps the optimiser."""

    def __init__(
        self, graph: Any, traced: TracedStep, update: Update, parameters_and_buffers: list[Tensor], optimizes: bool
    ):
        self.graph = graph
        self.update = update
        self.parameters_and_buffers = parameters_and_buffers
        self.optimizes = optimizes
        parameters = update.loss.parameters
        self._moving = [parameters[i] for i in traced.places]
        moving = set(map(id, self._moving))
        self._still = [p for p in update.targets if id(p) not in moving]
        self._terms = len(traced.labels)
        self.gradients: list[Tensor] = []

    def __call__(self, inputs: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Take a step; return the loss and the value of each term."""
        with torch.no_grad():
            loss, *rest = self.graph(*inputs, *self.parameters_and_buffers)
        gradients = []
        addresses = set()
        for p, gradient in zip(self._moving, rest[self._terms :], strict=True):
            # fused optimisers go through memory, not through indices; and each gradient is scaled by itself
            if gradient.stride() != p.stride() or gradient.data_ptr() in addresses:
                gradient = torch.empty_like(p).copy_(gradient)
            addresses.add(gradient.data_ptr())
            gradients.append(gradient)
        self.gradients = gradients
        self.assign_gradients()
        if self.optimizes:
            self.update.apply()
        return loss, tuple(rest[: self._terms])

    def assign_gradients(self) -> None:
        """Give the parameters the gradients of the latest run."""
        for p, gradient in zip(self._moving, self.gradients, strict=True):
            p.grad = gradient
        for p in self._still:
            p.grad = None


def _check_autocast(autocast: Any) -> None:
    """Raise a TypeError unless this is a function that makes a context manager."""
    wanted = 'expected autocast to be a function that gives a context manager, such as lambda: torch.autocast("cuda")'
    if not callable(autocast) or isinstance(autocast, torch.autocast | nn.Module):
        raise TypeError(f"{wanted}, got {describe(autocast)}")
    try:
        context = autocast()
    except TypeError as error:
        raise TypeError(f"{wanted}, got {describe(autocast)}, which cannot be called without arguments") from error
    if not hasattr(context, "__enter__"):
        raise TypeError(f"{wanted}, and it gives {describe(context)}")


def _run_a_few_rows(
    objective: PreparedObjective, model: Any, guide: Any, batch: Batch, autocast: Any, step: int = 0
) -> TrainingProblem:
    """Return the training problem, found by a run of its own draws on two rows."""
    few = batch[: min(2, batch.size)]
    with torch.enable_grad(), temporary_seed(0, batch.device):
        return build_problem(objective, model, guide, few, autocast, step=step)
