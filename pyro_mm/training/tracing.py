"""A loss and its gradient as one graph of tensor operations, with neither Pyro nor autograd left in it."""

from __future__ import annotations

import functools
import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental import proxy_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from ..batch.batch import Batch
from ..scoring.training_objective import Loss, StepWeights
from ..utils.global_state import override_validation, preserve_process_settings
from ..utils.modules import preserve_buffers
from ..utils.seeding import temporary_seed
from .problem import TrainingProblem
from .step import Update

# Relative error of loss and gradient norm up to which graph and programs agree, by the dtype of their operations.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-6}
FAKE_MODE = "FakeTensorMode"


class Untraceable(Exception):
    """The reason why a step cannot be traced."""


@dataclass
class TracedStep:
    """A traced update: a function of ``(numbers, [step], *batch, *parameters, *buffers)``, all tensors.

    It returns the loss, the value of each term in ``labels``, and the gradients of the parameters in ``places``.
    ``numbers`` are the factor of the gradient and the weights that depend on the step.

    Attributes:
        graph: the function.
        labels: names of the terms.
        places: positions, among the parameters of the loss, of those that have a gradient.
        uses_step: True if ``step``, a scalar, is one of the inputs.
    """

    graph: GraphModule
    labels: list[str]
    places: list[int]
    uses_step: bool


@dataclass(frozen=True)
class TraceInputs:
    """Inputs to trace an update with.

    Attributes:
        batch: N rows.
        buffers: the modules' buffers, which a step may change.
        numbers: the factor of the gradient, and the W weights that depend on the step, ``(1 + W,)``.
        step: steps taken so far, a scalar.
        weights: the same weights, with those by whose values the graph may differ.
    """

    batch: Batch
    buffers: list[Tensor]
    numbers: Tensor
    step: Tensor
    weights: StepWeights


def trace_step(update: Update, inputs: TraceInputs) -> TracedStep:
    """Trace an update for batches like this one, by one run on it.

    Randomness stays random: a draw is an operation of the graph, and so are masks that are drawn. Decisions that Python
    makes from shapes and settings are constants of the graph. The graph is compared with the programs on other rows, at
    another step and with other draws, to detect values that were frozen into it by mistake.

    Raises:
        Untraceable: the programs read a value in Python, have shapes that depend on values, or differ from their graph.
    """
    problem = update.loss
    labels: list[str] = []
    places: list[int] = []
    rows = inputs.batch.parts()[1]
    parameters = problem.parameters
    targets = set(map(id, update.targets))
    moving = [i for i, p in enumerate(parameters) if p.requires_grad and id(p) in targets]

    def step_function(numbers: Tensor, step: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        loss = evaluate_traced(problem, inputs, inputs.batch.with_tensors(tensors[: len(rows)]), numbers, step)
        factor = numbers[0].to(loss.total.dtype)
        gradients = torch.autograd.grad(loss.total, [parameters[i] for i in moving], factor, allow_unused=True)
        labels[:] = loss.by_term
        places[:] = [i for i, g in zip(moving, gradients, strict=True) if g is not None]
        return (loss.total.detach(), *loss.by_term.values(), *(g for g in gradients if g is not None))

    with preserve_process_settings():
        from torch import _dynamo  # noqa: F401, which a process's first trace imports
    with isolated_run(problem, inputs.batch.device):
        try:
            with (
                override_validation(False),
                torch.enable_grad(),
                _without_fused_recurrence(problem),
                _pause_collection(),
                _one_fake_mode(),
                _RefuseReads(),
                _refuse_python_state(problem, inputs.batch.names),
            ):
                graph = make_fx(step_function)(inputs.numbers, inputs.step, *rows, *parameters, *inputs.buffers)
        except Untraceable:
            raise
        except Exception as error:
            raise Untraceable(_explain(error)) from error

    _check_shapes(graph)
    _fold_constants(graph)
    if _has_recurrence(problem):
        _reshape_in_any_layout(graph)
    uses_step = _remove_unused_step(graph)
    traced = TracedStep(graph, labels, places, uses_step)
    _check_values(update, traced, inputs)
    return traced


def evaluate_traced(problem: TrainingProblem, inputs: TraceInputs, batch: Batch, numbers: Tensor, step: Tensor) -> Loss:
    """Return the loss as a function of tensors: of the batch's, of the weights that depend on the step, of the step."""
    with problem.autocast():
        return problem.objective.evaluate_with_weights(
            numbers[1:], inputs.weights.fixed, problem.model, problem.guide, batch, step
        )


@contextmanager
def isolated_run(problem: TrainingProblem, device: torch.device) -> Iterator[None]:
    """Run programs under a fixed seed, and restore generators and buffers afterwards."""
    with preserve_buffers(*problem.networks), temporary_seed(1, device):
        yield


@contextmanager
def _without_fused_recurrence(problem: TrainingProblem) -> Iterator[None]:
    """Switch oneDNN and cuDNN off where there are recurrent networks, whose fused operations no graph can hold.

    oneDNN's LSTM cannot be traced with its gradient, and cuDNN copies the weights into one storage. Other networks keep
    both, since an operation traced without them may lay its result out in another order than the replay does.
    """
    recurrent = _has_recurrence(problem)
    onednn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(onednn and not recurrent)
    torch._C._set_cudnn_enabled(cudnn and not recurrent)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(onednn)
        torch._C._set_cudnn_enabled(cudnn)


def _has_recurrence(problem: TrainingProblem) -> bool:
    """Return True if any network of a problem is recurrent."""
    return any(isinstance(m, nn.RNNBase) for network in problem.networks for m in network.modules())


def _reshape_in_any_layout(graph: GraphModule) -> None:
    """Make a graph's views reshapes, which copy if need be, in place.

    A convolution beside a recurrent network is traced without oneDNN. With it, in the replay, the result may have its
    channels last in memory, and what was a view then is none any more.
    """
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default
    graph.recompile()


@contextmanager
def _pause_collection() -> Iterator[None]:
    """Put off the collection of cycles.

    torch before 2.13 forgets the place of a tensor in its trace, and makes a constant of it, if Python's handle of it
    is in a cycle that is collected while autograd holds it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _one_fake_mode() -> Iterator[None]:
    """Describe all results of a trace by one ``FakeTensorMode``.

    torch makes one for every operation, each with a record of Python's stack: a third of the time of a trace.
    """
    original = getattr(proxy_tensor, FAKE_MODE, None)
    if original is None:  # of a torch that describes them otherwise
        yield
        return

    @functools.cache
    def mode(**options: Any) -> Any:
        return original(**options)

    setattr(proxy_tensor, FAKE_MODE, mode)
    try:
        yield
    finally:
        setattr(proxy_tensor, FAKE_MODE, original)


@contextmanager
def _refuse_python_state(problem: TrainingProblem, names: tuple[str, ...]) -> Iterator[None]:
    """Raise if a run changes Python state that replaying the graph would not change.

    Raises:
        Untraceable: naming the state.
    """
    replaced_buffers: list[Any] = []

    def state() -> dict[str, Any]:
        attributes = [vars(m) for root in problem.networks for m in root.modules()]
        numbers = [(k, v) for held in attributes for k, v in held.items() if isinstance(v, bool | int | float)]
        buffers = [b for held in attributes for b in held["_buffers"].values()]
        replaced_buffers.extend(buffers)  # or the identity of one that is gone would be given to the next
        return {
            "a number that a module holds": numbers,
            "which tensor a module's buffer is": [id(b) for b in buffers],
            "a number that the objective holds": problem.objective.step_weights(names, 0).form,
            "random numbers outside of torch": (
                random.getstate(),
                repr(np.random.get_state(legacy=False)["state"]),
            ),
        }

    before = state()
    yield
    after = state()
    for what, value in before.items():
        if value != after[what]:
            raise Untraceable(f"a run of it changes {what}, and a run of its graph would not")


class _RefuseReads(TorchFunctionMode):
    """Refuse to hand values to Python; and compute ``one_hot`` by comparison, since torch's own reads the classes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__):
            raise Untraceable(f"it reads a tensor's values in Python, by {func.__name__}")
        classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
        if func is not torch.nn.functional.one_hot or not args or classes < 0:
            return func(*args, **kwargs)
        return (args[0][..., None] == torch.arange(classes, device=args[0].device)).long()


def _explain(error: Exception) -> str:
    """Return the reason why a trace failed, with the place where a value was read."""
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "value out of a tracing tensor" not in text:
        return f"{type(error).__name__}: {text}"
    frames: list[Any] = []
    position = error.__traceback__
    while position is not None:
        frames.append(position.tb_frame)
        position = position.tb_next
    libraries = ("/torch/", "/pyro/", __file__)
    own = [f for f in frames if not any(library in f.f_code.co_filename for library in libraries)]
    frame = own[-1] if own else frames[-1]
    place = f"{frame.f_code.co_name}, in {frame.f_code.co_filename}"
    return f"it reads a tensor's value in Python, as if, float() and .item() do ({place})"


def _check_shapes(graph: GraphModule) -> None:
    """Raise if a shape depends on values: the graph would hold the shape found in the traced rows.

    Raises:
        Untraceable: naming the operation.
    """
    for node in graph.graph.nodes:
        if node.op != "call_function" or torch.Tag.dynamic_output_shape not in getattr(node.target, "tags", ()):
            continue
        if node.target is torch.ops.aten.index.Tensor:
            kinds = {i.meta["val"].dtype for i in node.args[1] if isinstance(i, Node) and "val" in i.meta}
            if not kinds & {torch.bool, torch.uint8}:
                continue
        raise Untraceable(
            f"it has shapes that depend on values, by {node.target}: use torch.where for a choice of rows"
        )


def _fold_constants(graph: GraphModule) -> None:
    """Make constants of tensors made of Python's numbers: on a GPU they would be copied there at every step."""
    lift = torch.ops.aten.lift_fresh_copy.default
    copy = torch.ops.aten._to_copy.default
    for node in graph.graph.nodes:
        if node.target not in (lift, copy) or node.args[0].op != "get_attr" or any(map(_mutates, node.users)):
            continue
        if node.target is copy and not node.args[0].target.startswith("_folded_"):
            continue  # a tensor of the programs' own, which they may change
        value = node.target(getattr(graph, node.args[0].target), **node.kwargs)
        name = f"_folded_{node.name}"
        graph.register_buffer(name, value, persistent=False)
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(name))
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _mutates(node: Node) -> bool:
    return node.op == "call_function" and getattr(getattr(node.target, "_schema", None), "is_mutable", True)


def _remove_unused_step(graph: GraphModule) -> bool:
    """Remove the input ``step`` of a graph that does not use it; return True if it does."""
    step = [node for node in graph.graph.nodes if node.op == "placeholder"][1]
    if step.users:
        return True
    graph.graph.erase_node(step)
    graph.recompile()
    return False


def _check_values(update: Update, traced: TracedStep, inputs: TraceInputs) -> None:
    """Raise if graph and programs differ, on a choice of the rows, at a later step, with draws of another seed.

    Raises:
        Untraceable: they do.
    """
    problem = update.loss
    batch = inputs.batch
    other_rows = batch[torch.arange(batch.size, device=batch.device).flip(0) // 2]
    later = inputs.step + 3
    targets = set(map(id, update.targets))

    def outcome(run: Callable[[], Tensor]) -> Tensor:
        with isolated_run(problem, batch.device):
            return run().double()

    def run_programs() -> Tensor:
        with override_validation(False), torch.enable_grad():
            loss = evaluate_traced(problem, inputs, other_rows, inputs.numbers, later).total
        moving = [p for p in problem.parameters if p.requires_grad and id(p) in targets]
        gradients = torch.autograd.grad(loss, moving, allow_unused=True)
        return _summary(loss, [g for g in gradients if g is not None])

    def run_graph() -> Tensor:
        step = [later] if traced.uses_step else []
        tensors = [*other_rows.parts()[1], *problem.parameters, *inputs.buffers]
        with torch.no_grad():
            loss, *rest = traced.graph(inputs.numbers, *step, *tensors)
        return _summary(loss, [g / inputs.numbers[0] for g in rest[len(traced.labels) :]])

    expected = outcome(run_programs)
    try:
        found = outcome(run_graph)
    except RuntimeError as error:  # of a view, say, of a result that a faster kernel lays out in another order
        raise Untraceable(f"its trace cannot be run: {_explain(error)}") from error
    nodes = traced.graph.graph.nodes
    kinds = {n.meta["val"].dtype for n in nodes if isinstance(n.meta.get("val"), Tensor)}
    tolerance = max(TOLERANCE.get(kind, 0.0) for kind in {*kinds, *(p.dtype for p in problem.parameters)})
    if not torch.allclose(expected, found, rtol=tolerance, equal_nan=True):
        raise Untraceable(
            "on other rows its loss or gradient differs from its trace's, so it depends on values that are read, "
            "drawn or counted outside of torch"
        )


def _summary(loss: Tensor, gradients: list[Tensor]) -> Tensor:
    """Return the loss, and the norm of its gradient."""
    squares = torch.stack([g.double().square().sum() for g in gradients]) if gradients else torch.zeros(1)
    return torch.stack([loss.detach().double(), squares.sum().sqrt()])
