r"""Signal-to-noise ratio of a stochastic gradient, for each part of a model and a guide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..objectives.objective import Objective
from ..scoring.prepare_objective import prepare_objective
from ..scoring.training_objective import PreparedObjective
from ..training.problem import TrainingProblem, problem_from_run
from ..utils.modules import preserve_buffers
from ..utils.seeding import temporary_seed


@dataclass(frozen=True)
class GroupNoise:
    """Signal and noise of the gradient of a group of tensors, in nats per row and unit of the parameters.

    Attributes:
        name: the part of model or guide, such as ``"model.decoder"``.
        signal: norm of the mean gradient, corrected for the noise in that mean.
        noise: root mean square distance of one gradient from the mean.
        tensors: number of tensors.
        size: number of their entries.
    """

    name: str
    signal: float
    noise: float
    tensors: int
    size: int

    @property
    def snr(self) -> float:
        """``signal / noise``: infinite without noise, NaN without both or if a gradient is not finite."""
        if self.noise:
            return self.signal / self.noise
        return math.inf if self.signal else math.nan


@dataclass(frozen=True)
class GradientNoise:
    """Result of :func:`gradient_noise`; ``noise["model.decoder"]`` is the group of that name.

    Attributes:
        groups: signal and noise of each part.
        repeats: number of gradients, R.
        unused: names of the tensors that never had a gradient.
        zero: names of the tensors whose gradient was zero in every repeat.
        nonfinite: names of the tensors whose gradient was infinite or NaN in some repeat.
        frozen: names of the tensors that require no gradient.
        step: gradient steps taken before, at which the weights are; None if no weight depends on it.
    """

    groups: tuple[GroupNoise, ...]
    repeats: int
    unused: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    nonfinite: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    step: int | None = None

    def __getitem__(self, name: str) -> GroupNoise:
        return {group.name: group for group in self.groups}[name]


@dataclass
class _Parameter:
    """Running moments of the gradient of one tensor."""

    name: str
    group: str
    tensor: Tensor
    num_gradients: int = 0  # repeats in which it had one
    finite: bool = True
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))  # sum of squared deviations from the mean

    def add(self, gradient: Tensor | None, count: int) -> None:
        """Update the moments with the ``count``-th gradient by Welford's method; None counts as zero."""
        if gradient is None:
            gradient = torch.zeros_like(self.tensor)
        else:
            self.num_gradients += 1
        gradient = (gradient.to_dense() if gradient.is_sparse else gradient).double()
        self.finite &= bool(gradient.isfinite().all())
        mean = self.mean if count > 1 else torch.zeros_like(gradient)
        change = gradient - mean
        self.mean = mean + change / count
        self.squares = (self.squares if count > 1 else 0.0) + change * (gradient - self.mean)


def gradient_noise(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    objective: Any,
    batch: Batch,
    *,
    repeats: int = 20,
    seed: int | None = 0,
    step: int | None = None,
) -> GradientNoise:
    r"""Estimate the signal-to-noise ratio of an objective's gradient, for each part of model and guide.

    With R gradients :math:`g_r` of the loss of these rows and their sample covariance C,

    .. math:: \mathrm{SNR} = \sqrt{ \max(\|\bar g\|^2 - \mathrm{tr}\,C / R, \, 0) / \mathrm{tr}\,C },

    the norm of the mean gradient over that of the noise of one draw; :math:`\mathrm{tr}\,C / R` is the expected
    contribution of the noise to :math:`\|\bar g\|^2`. With independent entries, R repeats cannot distinguish an SNR
    below about :math:`(2 / d)^{1/4} / \sqrt R` from zero, for a group of d entries. The noise comes from the
    objective's draws with the rows held fixed; minibatches add to it.

    Groups are modules, named by their paths, down to networks but not to layers; for a function, the modules that it
    refers to by name. Other tensors of a function are named by their shape, and a ``pyro.param`` by its name.

    Args:
        model, guide: callables of a batch, in their present mode (train or eval).
        objective: an :class:`~pyro_mm.objectives.Objective`, a ``pyro.infer.ELBO``, or one's own
            :class:`~pyro_mm.TrainingObjective`. Objective, parameters, ``.grad``, buffers and generators are left as
            they were.
        batch: N rows.
        repeats: R.
        seed: of the draws; None uses torch's generator.
        step: gradient steps taken so far, the argument of weights that depend on the step. None takes the objective's
            own count in use as a ``pyro.infer.ELBO``, 0 for one without.

    Returns:
        Signal and noise of each group, in nats per row.

    Raises:
        ValueError: fewer than two repeats.

    References:
        Rainforth et al. 2018 (arXiv:1802.04537), with :math:`|E g| / sd(g)` entry by entry.
    """
    if repeats < 2:
        raise ValueError(f"expected at least 2 repeats, which have a variance, got {repeats}")
    if step is None:
        step = objective.steps if isinstance(objective, Objective) else 0
    prepared = prepare_objective(objective)

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        temporary_seed(seed, batch.device),
        preserve_buffers(model, guide, *prepared.modules),
    ):
        few = batch[: min(2, batch.size)]
        players = prepared.players(model, guide, few)
        of_players = {id(p) for player in players for p in player.parameters}  # whose losses are others
        problem = problem_from_run(prepared, model, guide, few, step=step)
        tensors = [p for p in _named_tensors(problem) if id(p.tensor) not in of_players]
        parameters = [p for p in tensors if p.tensor.requires_grad]
        for count in range(1, repeats + 1):
            gradients = _gradient(prepared, problem, batch, [p.tensor for p in parameters], step)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add(gradient, count)

    rows = batch.total if problem.scales_to_data and batch.total else batch.size
    names = dict.fromkeys(p.group for p in parameters)
    groups = [_group_noise(name, [p for p in parameters if p.group == name], repeats, rows) for name in names]
    return GradientNoise(
        tuple(groups),
        repeats,
        unused=tuple(p.name for p in parameters if not p.num_gradients),
        zero=tuple(p.name for p in parameters if p.num_gradients and not p.mean.any() and not p.squares.any()),
        nonfinite=tuple(p.name for p in parameters if not p.finite),
        frozen=tuple(p.name for p in tensors if not p.tensor.requires_grad),
        step=step if step or prepared.step_weights(batch.names, step).values else None,
    )


def _group_noise(name: str, parameters: Sequence[_Parameter], repeats: int, rows: int) -> GroupNoise:
    """Compute signal and noise of the tensors of one group from their moments."""
    squared_mean = sum(float(p.mean.square().sum()) for p in parameters)
    variance = sum(float(p.squares.sum()) for p in parameters) / (repeats - 1)
    signal = math.sqrt(max(squared_mean - variance / repeats, 0.0)) if math.isfinite(squared_mean) else math.nan
    size = sum(p.tensor.numel() for p in parameters)
    return GroupNoise(name, signal / rows, math.sqrt(variance) / rows, len(parameters), size)


def _gradient(
    objective: PreparedObjective, problem: TrainingProblem, batch: Batch, tensors: list[Tensor], step: int
) -> list[Tensor | None]:
    """Return the gradient of the loss, with the tensors' own ``.grad`` as before."""
    if objective.differentiable:
        loss = objective.evaluate(problem.model, problem.guide, batch, step=step).total
        if not loss.requires_grad:
            return [None] * len(tensors)
        return list(torch.autograd.grad(loss, tensors, allow_unused=True))

    before = [p.grad for p in tensors]
    try:
        for p in tensors:
            p.grad = None
        objective.evaluate_with_gradient(problem.model, problem.guide, batch, step=step)
        return [p.grad for p in tensors]
    finally:
        for p, gradient in zip(tensors, before, strict=True):
            p.grad = gradient


# -- names --------------------------------------------------------------------------------------------------------


def _named_tensors(problem: TrainingProblem) -> Iterator[_Parameter]:
    """Yield each parameter once: those of modules, frozen ones too, and then the other leaves of the loss."""
    # a program that is a method counts as the module that it is a method of
    owners = {name: _owner(program) for name, program in problem.programs.items()}
    own = {name: owner for name, owner in owners.items() if isinstance(owner, nn.Module)}
    yielded: set[int] = set()
    for name, module in own.items():
        for group, path, tensor in _parts(module, name, name):
            if id(tensor) not in yielded:
                yielded.add(id(tensor))
                yield _Parameter(path, group, tensor)

    # of the modules that a function refers to, only the tensors that the loss depends on
    names: dict[int, tuple[str, str]] = {}
    for path, module in problem.modules_by_path.items():
        if all(module is not owner for owner in own.values()):
            names |= {id(tensor): (group, name) for group, name, tensor in _parts(module, path, path)}
    for name, parameter in pyro.get_param_store().named_parameters():
        names[id(parameter)] = (f"pyro.param {name!r}", f"pyro.param {name!r}")

    num_of_shape: dict[str, int] = {}
    for key, leaf in problem.leaves.items():
        if key in yielded or not leaf.requires_grad:
            continue
        if key in names:
            group, name = names[key]
        else:
            shape = f"closure {tuple(leaf.shape)}"
            num_of_shape[shape] = num_of_shape.get(shape, 0) + 1
            group = name = f"{shape} #{num_of_shape[shape]}" if num_of_shape[shape] > 1 else shape
        yield _Parameter(name, group, leaf)


def _owner(program: Any) -> Any:
    """Return the object that a program is a method of; any other program itself."""
    return getattr(program, "__self__", program)


def _parts(module: nn.Module, path: str, group: str) -> Iterator[tuple[str, str, Tensor]]:
    """Yield (group, name, tensor) for each parameter of a module.

    A module is split into its children if they have names: numbered children are layers, and an only child is no part
    of its own.

    Args:
        module: the module.
        path: its path, such as ``"model.decoder"``.
        group: path of the outermost module that has these parameters and no others.
    """
    own = [(group, f"{path}.{name}", p) for name, p in module.named_parameters(recurse=False)]
    children = {name: child for name, child in module.named_children() if next(child.parameters(), None) is not None}
    if any(name.isdigit() for name in children):
        yield from ((group, f"{path}.{name}", p) for name, p in module.named_parameters())
        return

    yield from own
    for name, child in children.items():
        is_only_child = len(children) == 1 and not own
        yield from _parts(child, f"{path}.{name}", group if is_only_child else f"{path}.{name}")
