"""A training problem: a (model, guide) pair, an objective, and the parameters that the loss depends on."""

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
from ..conditionals.unconditional import tensors_of
from ..distributions.pushforward import find_pushforward
from ..handlers.internals import BatchNorm
from ..scoring.program import Program
from ..scoring.training_objective import Loss, PreparedObjective
from ..utils.graph import graph_leaves
from ..utils.modules import preserve_buffers
from ..utils.reachable import ReachableObjects
from ..utils.seeding import temporary_seed

ContextFactory = Callable[[], AbstractContextManager[Any]]


class TrainingError(ValueError, RuntimeError):
    """A pair, an objective or an optimiser that would not train as asked."""


@dataclass
class TrainingProblem:
    """A training problem: an objective of a (model, guide) pair, and the parameters that its loss depends on.

    Attributes:
        objective: the objective, as ``prepare_objective`` returns it.
        model, guide: callables of a batch.
        leaves: leaves of the loss's autograd graph, by identity.
        scales_to_data: True if the data plate scales the loss of a subsample up to all rows.
        all_in_plate: True if every site lies in the data plate.
        discrete_sites: latent sites that are enumerated or have no pathwise gradient.
        autocast: makes the context in which the networks run.
        of_players: identities of the parameters that further players of the training move, and this loss does not.
        possible_leaves: leaves that the loss of other rows may have: those of distributions that the first rows mask,
            and parameters that the programs ask Pyro's store for.
    """

    objective: PreparedObjective
    model: Program
    guide: Program
    leaves: dict[int, Tensor]
    scales_to_data: bool
    all_in_plate: bool
    discrete_sites: tuple[str, ...] = ()
    autocast: ContextFactory = nullcontext
    possible_leaves: dict[int, Tensor] = field(default_factory=dict)
    of_players: frozenset[int] = frozenset()

    @cached_property
    def programs(self) -> dict[str, Any]:
        """Model, guide and the objective's own modules, by the names that messages give them."""
        return programs_of(self.objective, self.model, self.guide)

    @cached_property
    def modules(self) -> list[nn.Module]:
        """The programs that are modules themselves."""
        return [program for program in self.programs.values() if isinstance(program, nn.Module)]

    @cached_property
    def modules_by_path(self) -> dict[str, nn.Module]:
        """The outermost modules that the programs are or refer to, by path."""
        return ReachableObjects(self.programs).modules

    @property
    def networks(self) -> list[nn.Module]:
        """The modules of :attr:`modules_by_path`, without their paths."""
        return list(self.modules_by_path.values())

    @cached_property
    def required_parameters(self) -> dict[int, Tensor]:
        """Parameters that have to get a gradient, by identity: those of :attr:`modules`, and the leaves."""
        return {id(p): p for m in self.modules for p in m.parameters() if p.requires_grad} | self.leaves

    @cached_property
    def parameters(self) -> list[Tensor]:
        """Parameters to train: the required ones, and others that some rows may need, of modules in closures say.

        Raises:
            TrainingError: there is none.
        """
        reached = {id(p): p for m in self.networks for p in m.parameters() if p.requires_grad}
        if not self.required_parameters:
            raise TrainingError(
                "nothing to train: neither model nor guide depends on a parameter that requires a gradient"
            )
        return list((self.required_parameters | self.possible_leaves | reached).values())

    @property
    def own_parameters(self) -> list[Tensor]:
        """The parameters to train, without those of further players."""
        return [p for p in self.parameters if id(p) not in self.of_players]

    @property
    def own_required_parameters(self) -> dict[int, Tensor]:
        """The parameters that have to get a gradient, by identity, without those of further players."""
        return {key: p for key, p in self.required_parameters.items() if key not in self.of_players}

    @property
    def normalises_batches(self) -> bool:
        """True if some network has batch normalisation."""
        return any(isinstance(m, BatchNorm) for root in self.networks for m in root.modules())

    @property
    def ignores_padding(self) -> bool:
        """True if rows of padding leave loss and gradient as they are.

        They do not where a latent lies outside the data plate, whose share in a loss depends on the number of rows;
        under batch normalisation; and under objectives that do not say so.
        """
        return self.all_in_plate and not self.normalises_batches and self.objective.ignores_padding

    def evaluate(self, batch: Batch, step: int | Tensor) -> Loss:
        """Return the loss of a batch at a step of the training, under autocast."""
        with self.autocast():
            return self.objective.evaluate(self.model, self.guide, batch, step=step)

    def evaluate_with_gradient(self, batch: Batch, step: int) -> Loss:
        """Return the loss of an objective that differentiates itself, after adding its gradient to the parameters'."""
        with self.autocast():
            return self.objective.evaluate_with_gradient(self.model, self.guide, batch, step=step)

    def compute(self, batch: Batch, step: int) -> Loss:
        """Return the loss; objectives that differentiate themselves also add its gradient to the parameters'."""
        return self.evaluate(batch, step) if self.objective.differentiable else self.evaluate_with_gradient(batch, step)

    def parameters_to_come(self, batch: Batch, step: int) -> set[int]:
        """Return the leaves, by identity, that an objective decoding a random choice of modalities reaches in time."""
        full = self.objective.decoding_all()
        if full is self.objective:
            return set()
        if not self.objective.differentiable:
            return set(self.leaves)
        with temporary_seed(0, batch.device), preserve_buffers(*self.networks), self.autocast():
            loss = full.evaluate(self.model, self.guide, batch, step=step)
        return set(graph_leaves([loss.total]))


def programs_of(objective: PreparedObjective, model: Program, guide: Program) -> dict[str, Any]:
    """Return model, guide and the objective's own modules, by the names that messages give them."""
    modules = objective.modules
    names = ["objective"] if len(modules) == 1 else [f"objective[{i}]" for i in range(len(modules))]
    return {"model": model, "guide": guide, **dict(zip(names, modules, strict=True))}


def problem_from_run(
    objective: PreparedObjective,
    model: Program,
    guide: Program,
    batch: Batch,
    autocast: ContextFactory = nullcontext,
    step: int = 0,
) -> TrainingProblem:
    """Return the training problem, found by one run of model, guide and objective on a few rows.

    Rows are repeated where the objective needs more of them.
    """
    least = objective.least_rows(batch.names)
    if batch.size < least:
        batch = batch[torch.arange(least, device=batch.device) % batch.size]
    roots: list[Any] = []
    possible: list[Any] = []
    scales_to_data = False
    all_in_plate = True
    discrete: dict[str, None] = {}
    with preserve_buffers(model, guide, *objective.modules):
        with poutine.block(), poutine.trace() as guided:
            guide(batch)
        with poutine.block(), poutine.trace() as modelled, poutine.replay(trace=guided.trace):
            model(batch)
        if objective.differentiable:  # what only some of its terms use, such as an encoder of incomplete rows
            roots.append(objective.evaluate(model, guide, batch, step=step).total)

    for trace in (guided.trace, modelled.trace):
        trace.compute_log_prob(lambda name, site: find_pushforward(site["fn"]) is None)
        stored = [site["value"] for site in trace.nodes.values() if site["type"] == "param"]
        possible += [getattr(value, "unconstrained", lambda value=value: value)() for value in stored]
        for site in (site for site in trace.nodes.values() if site["type"] == "sample"):
            roots += [site["value"], site.get("log_prob_sum")]
            possible += tensors_of(site["fn"])
            frames = {frame.name: frame for frame in site["cond_indep_stack"]}
            scales_to_data |= "data" in frames and frames["data"].full_size == batch.total
            all_in_plate &= "data" in frames or site_is_subsample(site)
            latent = not site["is_observed"] and not site_is_subsample(site)
            if latent and (site["infer"].get("enumerate") == "parallel" or not site["fn"].has_rsample):
                discrete[site["name"]] = None

    return TrainingProblem(
        objective,
        model,
        guide,
        leaves=graph_leaves(roots),
        scales_to_data=scales_to_data,
        all_in_plate=all_in_plate,
        discrete_sites=tuple(discrete),
        autocast=autocast,
        possible_leaves=graph_leaves(possible),
    )
