"""A loss and its gradient as one graph of tensor operations, with neither Pyro nor autograd left in it."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from ..batch.batch import Batch
from ..utils.global_state import override_validation, preserve_process_settings
from ..utils.modules import buffers_kept
from ..utils.seeding import temporary_seed
from .step import TrainingProblem

TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-3, torch.float64: 1e-6}


class Untraceable(Exception):
    """Why a step cannot be traced."""


@dataclass
class TracedStep:
    """A function of ``(numbers, *batch, *parameters, *buffers)``, all tensors.

    It returns the loss, the value of each term in ``labels``, and the gradients of the parameters in ``places``.
    ``numbers`` are the factor of the gradient and the weights that depend on the step.
    """

    graph: GraphModule
    labels: list[str]
    places: list[int]


def trace_step(
    problem: TrainingProblem, buffers: list[Tensor], batch: Batch, numbers: Tensor, fixed: dict[int, float]
) -> TracedStep:
    """The step on batches like this one, traced by one run on it.

    Randomness stays random: a draw is an operation of the graph. So do masks that are drawn. What Python decided on
    the way, from shapes and settings, is decided for good; the graph is compared with the programs on other rows and
    with other draws, so that one that froze what should have moved is found out.

    Args:
        buffers: the modules' buffers, which a step may change.
        numbers: ``(1 + W,)``; W weights depend on the step.
        fixed: what of them the graph may depend on (see :meth:`pyro_mm.objectives.Objective.weights`).

    Raises:
        Untraceable: the programs look at a value in Python, have shapes that depend on values, or did not do the same
            as their graph.
    """
    labels: list[str] = []
    places: list[int] = []
    _, rows = batch.parts()
    parameters = problem.parameters
    moving = [i for i, p in enumerate(parameters) if p.requires_grad]

    def step(numbers: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        loss = loss_of(problem, batch.with_tensors(tensors[: len(rows)]), numbers, fixed)
        terms = problem.by_term()
        labels[:] = terms
        factor = numbers[0].to(loss.dtype)
        gradients = torch.autograd.grad(loss, [parameters[i] for i in moving], factor, allow_unused=True)
        places[:] = [i for i, g in zip(moving, gradients, strict=True) if g is not None]
        return (loss.detach(), *terms.values(), *(g for g in gradients if g is not None))

    inputs = [numbers, *rows, *parameters, *buffers]
    with preserve_process_settings():
        from torch import _dynamo  # noqa: F401, which a process's first trace imports
    with unchanged(problem, batch.device):
        try:
            with override_validation(False), torch.enable_grad(), _uncollected(), _Watch(), _counting(problem):
                graph = make_fx(step)(*inputs)
        except Untraceable:
            raise
        except Exception as error:
            raise Untraceable(_reason(error)) from error
    _check_shapes(graph)
    _fold(graph)
    _check_values(problem, graph, len(labels), buffers, batch, numbers, fixed)
    return TracedStep(graph, labels, places)


def loss_of(problem: TrainingProblem, batch: Batch, numbers: Tensor, fixed: dict[int, float]) -> Tensor:
    """The loss as a function of tensors: of the batch's, and of the weights that depend on the step."""
    if not hasattr(problem.objective, "loss_with"):
        return problem.loss(batch)
    with problem.autocast():
        return problem.objective.loss_with(numbers[1:], fixed, problem.model, problem.guide, batch)


@contextmanager
def unchanged(problem: TrainingProblem, device: torch.device) -> Iterator[None]:
    """Generators (which are under a seed meanwhile), buffers and the objective's counts are afterwards as before."""
    counts = {name: getattr(problem.objective, name, None) for name in ("steps", "by_term")}
    try:
        with buffers_kept(*problem.networks), temporary_seed(1, device):
            yield
    finally:
        for name, value in counts.items():
            if value is not None:
                setattr(problem.objective, name, value)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Puts off the collection of cycles: torch before 2.13 forgets the place of a tensor in its trace, if Python's
    handle of it is in a cycle that is collected while autograd holds it, and makes a constant of it.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _counting(problem: TrainingProblem) -> Iterator[None]:
    """Raises where a run moved something of Python's that the graph cannot move again."""
    kept: list[Any] = []

    def looked_at() -> tuple[Any, ...]:
        held = [vars(m) for root in problem.networks for m in root.modules()]
        numbers = [(k, v) for attributes in held for k, v in attributes.items() if isinstance(v, bool | int | float)]
        buffers = [b for attributes in held for b in attributes["_buffers"].values()]
        kept.extend(buffers)  # or the identity of one that is gone would be given to the next
        return numbers, [id(b) for b in buffers], random.getstate(), repr(np.random.get_state(legacy=False)["state"])

    before = looked_at()
    yield
    what = [
        "a number that a module holds",
        "which tensor a module's buffer is",
        *["random numbers outside of torch"] * 2,
    ]
    for name, then, now in zip(what, before, looked_at(), strict=True):
        if then != now:
            raise Untraceable(f"a run of it changes {name}, and a run of its graph would not")


class _Watch(TorchFunctionMode):
    """Refuses to hand values to Python; and ``one_hot`` by comparison, since torch's own looks at the classes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__):
            raise Untraceable(f"it reads a tensor's values in Python, by {func.__name__}")
        classes = kwargs.get("num_classes", args[1] if len(args) > 1 else -1)
        if func is not torch.nn.functional.one_hot or not args or classes < 0:
            return func(*args, **kwargs)
        return (args[0][..., None] == torch.arange(classes, device=args[0].device)).long()


def _reason(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    if "value out of a tracing tensor" in text:
        frames: list[Any] = []
        where = error.__traceback__
        while where is not None:
            frames.append(where.tb_frame)
            where = where.tb_next
        apart = ("/torch/", "/pyro/", __file__)
        own = [f for f in frames if not any(where in f.f_code.co_filename for where in apart)]
        frame = own[-1] if own else frames[-1]
        at = f"{frame.f_code.co_name}, in {frame.f_code.co_filename}"
        return f"it reads a tensor's value in Python, as if, float() and .item() do ({at})"
    return f"{type(error).__name__}: {text}"


def _check_shapes(graph: GraphModule) -> None:
    """Raises where the shape of something depends on values: the graph holds that of the rows it was traced on."""
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


def _fold(graph: GraphModule) -> None:
    """Makes constants of tensors made of Python's numbers: on a GPU they would be copied there at every step."""
    lift, copies = torch.ops.aten.lift_fresh_copy.default, torch.ops.aten._to_copy.default
    for node in graph.graph.nodes:
        if node.target not in (lift, copies) or node.args[0].op != "get_attr" or any(map(_mutates, node.users)):
            continue
        if node.target is copies and not node.args[0].target.startswith("_folded_"):
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


def _check_values(
    problem: TrainingProblem,
    graph: GraphModule,
    terms: int,
    buffers: list[Tensor],
    batch: Batch,
    numbers: Tensor,
    fixed: dict[int, float],
) -> None:
    """Raises where the graph and the programs differ, on a choice of the rows and with draws of another seed."""
    other = batch[torch.arange(batch.size, device=batch.device).flip(0) // 2]

    def outcome(run: Callable[[], Tensor]) -> Tensor:
        with unchanged(problem, batch.device):
            return run().double()

    def programs() -> Tensor:
        with override_validation(False), torch.enable_grad():
            loss = loss_of(problem, other, numbers, fixed)
        moving = [p for p in problem.parameters if p.requires_grad]
        gradients = torch.autograd.grad(loss, moving, allow_unused=True)
        return _summary(loss, [g for g in gradients if g is not None])

    def traced() -> Tensor:
        with torch.no_grad():
            out = graph(numbers, *other.parts()[1], *problem.parameters, *buffers)
        return _summary(out[0], [g / numbers[0] for g in out[1 + terms :]])

    expected, got = outcome(programs), outcome(traced)
    kinds = {n.meta["val"].dtype for n in graph.graph.nodes if isinstance(n.meta.get("val"), Tensor)}
    tolerance = max(TOLERANCE.get(k, 0.0) for k in {*kinds, *(p.dtype for p in problem.parameters)})
    if not torch.allclose(expected, got, rtol=tolerance, equal_nan=True):
        raise Untraceable(
            "on other rows its loss or gradient is not that of its trace, so what it does depends on values that are "
            "read, drawn or counted outside of torch"
        )


def _summary(loss: Tensor, gradients: list[Tensor]) -> Tensor:
    """The loss, and the norm of its gradient."""
    norms = torch.stack([g.double().square().sum() for g in gradients]) if gradients else torch.zeros(1)
    return torch.stack([loss.detach().double(), norms.sum().sqrt()])
