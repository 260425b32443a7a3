"""One step of gradient descent on any (model, guide, objective), by running the programs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ..batch.batch import Batch
from ..conditionals.unconditional import held_tensors
from ..handlers.elbos import traceable_form
from ..handlers.internals import BatchNorm
from ..handlers.params import announce_gradient
from ..utils.global_state import override_validation
from ..utils.modules import buffers_kept
from ..utils.reachable import ReachableObjects
from ..utils.seeding import temporary_seed


class TrainingError(ValueError, RuntimeError):
    """A pair, an objective or an optimiser that would not train what it should."""


@dataclass
class TrainingProblem:
    """A training problem: an objective of a (model, guide) pair, and the parameters that it moves.

    ``leaves`` are the leaves of the loss's autograd graph, by identity; ``scaled`` says that the data plate scales a
    subsample up to the whole, and ``local`` that every site lies in that plate. ``discrete`` names the latent sites
    that are enumerated or have no pathwise gradient. ``possible`` are leaves that the loss of other rows may have:
    those of distributions that these rows mask, and what the programs ask Pyro's store for.
    """

    objective: Any
    model: Callable[[Batch], Any]
    guide: Callable[[Batch], Any]
    leaves: dict[int, Tensor]
    scaled: bool
    local: bool
    discrete: tuple[str, ...] = ()
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    possible: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def modules(self) -> list[nn.Module]:
        """The model and the guide, where they are modules."""
        return [m for m in (self.model, self.guide) if isinstance(m, nn.Module)]

    @cached_property
    def reached(self) -> dict[str, nn.Module]:
        """The modules that model and guide are or refer to, by path."""
        return ReachableObjects({"model": self.model, "guide": self.guide}).modules

    @property
    def networks(self) -> list[nn.Module]:
        """The modules that are reached, without their paths."""
        return list(self.reached.values())

    @property
    def estimator(self) -> str:
        """The name of the estimator, which is the objective itself where it is one of Pyro's."""
        return type(getattr(self.objective, "estimator", self.objective)).__name__

    @cached_property
    def required(self) -> dict[int, Tensor]:
        """The parameters that have to get a gradient: those of model and guide as modules, and the leaves."""
        return {id(p): p for m in self.modules for p in m.parameters() if p.requires_grad} | self.leaves

    @cached_property
    def parameters(self) -> list[Tensor]:
        """Those that are required, and others that some rows may need: of modules that a function refers to, say.

        Raises:
            TrainingError: there is none.
        """
        reached = {id(p): p for m in self.networks for p in m.parameters() if p.requires_grad}
        if not self.required:
            raise TrainingError(
                "nothing to train: neither model nor guide depends on a parameter that requires a gradient"
            )
        return list((self.required | self.possible | reached).values())

    @property
    def pads(self) -> bool:
        """Whether rows of padding weigh nothing: not so for a latent outside of the data plate, whose share in a loss
        depends on the number of rows, nor in batch normalisation, nor under estimators that are not ours by themselves,
        which mask only what a story does.
        """
        normalises = any(isinstance(m, BatchNorm) for root in self.networks for m in root.modules())
        return self.local and not normalises and type(self.objective).__module__.startswith("pyro_mm.")

    def loss(self, batch: Batch) -> Tensor:
        """The differentiable loss of a batch, under autocast."""
        with self.autocast():
            return traceable_form(self.objective).differentiable_loss(self.model, self.guide, batch)

    def backward(self, batch: Batch, rows: float) -> Tensor:
        """The loss, its gradient over ``rows`` put in the place of the parameters'."""
        for p in self.parameters:
            p.grad = None
        if differentiable(self.objective):
            loss = self.loss(batch)
            (loss * (1 / rows)).backward()
            return loss.detach()
        with self.autocast():
            number = loss_and_grads(self.objective, self.model, self.guide, batch)
        torch._foreach_mul_([p.grad for p in self.parameters if p.grad is not None], 1 / rows)
        return torch.as_tensor(number)

    def by_term(self) -> dict[str, Tensor]:
        """What the objective said of its terms in its latest evaluation."""
        return getattr(self.objective, "by_term", {})

    def left_out(self, batch: Batch) -> set[int]:
        """Find what the loss depends on when every modality is decoded, if the objective decodes some of them."""
        if getattr(self.objective, "subsample", None) is None:
            return set()
        if not differentiable(self.objective):
            return set(self.leaves)
        with temporary_seed(0, batch.device), buffers_kept(*self.networks), self.autocast():
            loss = self.objective.subsampled(None).differentiable_loss(self.model, self.guide, batch)
        return set(_leaves([loss]))


def problem_of(
    objective: Any,
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> TrainingProblem:
    """The :class:`TrainingProblem`, found by one run of all on a batch (a few rows of it will do)."""
    roots, possible, scaled, local = [], [], False, True
    discrete: dict[str, None] = {}
    with buffers_kept(model, guide):
        with poutine.block(), poutine.trace() as guided:
            guide(batch)
        with poutine.block(), poutine.trace() as modelled, poutine.replay(trace=guided.trace):
            model(batch)
        if differentiable(objective):  # what only some of its terms use, such as an encoder of incomplete rows
            steps = getattr(objective, "steps", None)
            roots.append(objective.differentiable_loss(model, guide, batch))
            if steps is not None:
                objective.steps = steps
    for trace in (guided.trace, modelled.trace):
        trace.compute_log_prob()
        stored = [s["value"] for s in trace.nodes.values() if s["type"] == "param"]
        possible += [getattr(value, "unconstrained", lambda value=value: value)() for value in stored]
        for site in (s for s in trace.nodes.values() if s["type"] == "sample"):
            roots += [site["value"], site.get("log_prob_sum")]
            possible += held_tensors(site["fn"])
            frames = {frame.name: frame for frame in site["cond_indep_stack"]}
            scaled |= "data" in frames and frames["data"].full_size == batch.total
            local &= "data" in frames or site_is_subsample(site)
            latent = not site["is_observed"] and not site_is_subsample(site)
            if latent and (site["infer"].get("enumerate") == "parallel" or not site["fn"].has_rsample):
                discrete[site["name"]] = None
    leaves, others = _leaves(roots), _leaves(possible)
    return TrainingProblem(objective, model, guide, leaves, scaled, local, tuple(discrete), autocast, others)


def _leaves(roots: list[Any]) -> dict[int, Tensor]:
    """The leaves of the autograd graphs of what is a tensor with one, by identity."""
    leaves: dict[int, Tensor] = {}
    stack = [x.grad_fn or x for x in roots if getattr(x, "requires_grad", False)]
    # the nodes themselves, not only their ids: torch wraps a node anew whenever Python asks for one that no variable
    # holds, and the id of a wrapper that is gone is given to the next
    seen: dict[int, Any] = {}
    while stack:
        node = stack.pop()
        if node is None or id(node) in seen:
            continue
        seen[id(node)] = node
        leaf = node if isinstance(node, Tensor) else getattr(node, "variable", None)
        if leaf is not None:
            leaves[id(leaf)] = leaf
        else:
            stack += [parent for parent, _ in node.next_functions]
    return leaves


def differentiable(objective: Any) -> bool:
    """Whether an objective has a loss to differentiate; if not, it takes its gradient itself."""
    return getattr(objective, "differentiable", hasattr(objective, "differentiable_loss"))


def loss_and_grads(objective: Any, model: Any, guide: Any, batch: Batch) -> float:
    """The loss of an objective that takes its gradient itself, and adds it to the parameters'."""

    def announced(batch: Batch) -> None:
        announce_gradient()
        guide(batch)

    ours = hasattr(objective, "differentiable")  # which announces for itself
    return float(objective.loss_and_grads(model, guide if ours else announced, batch))


class EagerStep:
    """A step by running the programs: gradients, and the optimiser. Its first one validates shapes and supports.

    Pyro's validation is off afterwards, unless ``validate``: of a batch of 128 it takes as long as the step itself.
    """

    def __init__(self, problem: TrainingProblem, optimizer: torch.optim.Optimizer | None, validate: bool | None = None):
        self.problem, self.optimizer, self.validate, self.steps = problem, optimizer, validate, 0

    def check(self, batch: Batch, rows: float) -> None:
        """Take the gradient with validation, and leave the parameters as they are."""
        with override_validation(self.validate is not False):
            self.problem.backward(batch, rows)

    def __call__(self, batch: Batch, rows: float) -> Tensor:
        first = self.steps == 0
        with override_validation(first if self.validate is None else self.validate):
            loss = self.problem.backward(batch, rows)
        if self.optimizer is not None:
            self.optimizer.step()
        self.steps += 1
        return loss
