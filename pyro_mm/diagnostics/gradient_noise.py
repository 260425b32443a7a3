r"""How much of a stochastic gradient is signal, for every part of a model and a guide."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..objectives.objective import Objective
from ..scoring.prepare_objective import prepare_objective
from ..scoring.training_objective import PreparedObjective
from ..training.problem import problem_from_run
from ..utils.modules import preserve_buffers
from ..utils.reachable import own_modules, referenced_modules
from ..utils.seeding import temporary_seed


@dataclass(frozen=True)
class GroupNoise:
    """The gradient of some tensors: the norms of its mean, with the noise's part taken off, and of its noise.

    Both are of the loss a row, in nats a row and unit of the parameters. ``tensors`` and ``size`` count the tensors
    and their entries.
    """

    name: str
    signal: float
    noise: float
    tensors: int
    size: int

    @property
    def snr(self) -> float:
        """``signal / noise``: infinite without noise, NaN where there is neither or a gradient is not finite."""
        return self.signal / self.noise if self.noise else math.inf if self.signal else math.nan


@dataclass(frozen=True)
class GradientNoise:
    """The groups, and by name the tensors that never had a gradient, only zeros, one that is not finite, or want none.

    ``repeats`` is the number R of gradients that this is drawn from.
    """

    groups: tuple[GroupNoise, ...]
    repeats: int
    unused: tuple[str, ...] = ()
    zero: tuple[str, ...] = ()
    nonfinite: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> GroupNoise:
        return {group.name: group for group in self.groups}[name]


@dataclass
class _Parameter:
    name: str
    group: str
    tensor: Tensor
    seen: int = 0  # repeats in which it had a gradient
    finite: bool = True
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    squares: Tensor = field(default_factory=lambda: torch.zeros(()))

    def add(self, gradient: Tensor | None, count: int) -> None:
        """Welford's update of mean and sum of squared deviations, by the ``count``-th gradient; None is zero."""
        if gradient is None:
            gradient = torch.zeros_like(self.tensor)
        else:
            self.seen += 1
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
) -> GradientNoise:
    r"""The signal-to-noise ratio of an objective's gradient, for every part of model and guide.

    With R gradients :math:`g_r` of the loss of these rows and their sample covariance C,

    .. math:: \mathrm{SNR} = \sqrt{ \max(\|\bar g\|^2 - \mathrm{tr}\,C / R, \, 0) / \mathrm{tr}\,C },

    the norm of the mean gradient over that of the noise of one draw; :math:`\mathrm{tr}\,C / R` is the noise's
    expected part of :math:`\|\bar g\|^2`. With independent entries R repeats cannot tell an SNR below about
    :math:`(2 / d)^{1/4} / \sqrt R` from zero, d being the entries of the group. Rainforth et al. 2018
    (arXiv:1802.04537) take \|E g\| / sd(g) entry by entry. The noise is that of the objective's draws, on rows held
    fixed: minibatches add their own.

    Parts are modules, named by their paths, split down to networks but not into layers; or the modules that a function
    speaks of by name. What else a function holds is named by its shape, and a ``pyro.param`` by its name.

    Args:
        model, guide: callables of a batch, in whichever mode (train or eval) they are.
        objective: an :class:`~pyro_mm.objectives.Objective`, its weights those of its present step, or any
            ``pyro.infer.ELBO``. It is left as it is, and so are parameters, their ``.grad``, buffers and generators.
        repeats: R.
        seed: of the draws; None goes on with torch's generator.

    Raises:
        ValueError: fewer than two repeats.
    """
    if repeats < 2:
        raise ValueError(f"expected at least 2 repeats, which have a variance, got {repeats}")
    step = objective.steps if isinstance(objective, Objective) else 0  # a warm-up does not go on
    prepared = prepare_objective(objective)
    with torch.inference_mode(False), torch.enable_grad(), temporary_seed(seed, batch.device), unchanged(model, guide):
        problem = problem_from_run(prepared, model, guide, batch[: min(2, batch.size)], step=step)
        rows = batch.total if problem.scales_to_data and batch.total else batch.size
        named = list(_named(model, guide, problem.leaves))
        parameters = [p for p in named if p.tensor.requires_grad]
        for count in range(1, repeats + 1):
            gradients = _gradient(prepared, step, model, guide, batch, [p.tensor for p in parameters])
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.add(gradient, count)
    names = dict.fromkeys(p.group for p in parameters)
    groups = [_group(name, [p for p in parameters if p.group == name], repeats, rows) for name in names]
    return GradientNoise(
        tuple(groups),
        repeats,
        unused=tuple(p.name for p in parameters if not p.seen),
        zero=tuple(p.name for p in parameters if p.seen and not p.mean.any() and not p.squares.any()),
        nonfinite=tuple(p.name for p in parameters if not p.finite),
        frozen=tuple(p.name for p in named if not p.tensor.requires_grad),
    )


def _group(name: str, parameters: Sequence[_Parameter], repeats: int, rows: int) -> GroupNoise:
    mean = sum(float(p.mean.square().sum()) for p in parameters)
    trace = sum(float(p.squares.sum()) for p in parameters) / (repeats - 1)
    signal = math.sqrt(max(mean - trace / repeats, 0.0)) if math.isfinite(mean) else math.nan
    size = sum(p.tensor.numel() for p in parameters)
    return GroupNoise(name, signal / rows, math.sqrt(trace) / rows, len(parameters), size)


def _gradient(
    objective: PreparedObjective, step: int, model: Any, guide: Any, batch: Batch, tensors: list[Tensor]
) -> list[Tensor | None]:
    """The gradient of the loss; the tensors' ``.grad`` are as before."""
    if objective.differentiable:
        loss = objective.evaluate(model, guide, batch, step=step).total
        if not loss.requires_grad:
            return [None] * len(tensors)
        return list(torch.autograd.grad(loss, tensors, allow_unused=True))
    kept = [p.grad for p in tensors]
    try:
        for p in tensors:
            p.grad = None
        objective.evaluate_with_gradient(model, guide, batch, step=step)
        return [p.grad for p in tensors]
    finally:
        for p, gradient in zip(tensors, kept, strict=True):
            p.grad = gradient


# -- names --------------------------------------------------------------------------------------------------------


@contextmanager
def unchanged(model: Any, guide: Any) -> Iterator[None]:
    """Puts back the buffers of model and guide, such as the running means of a batch normalisation."""
    with preserve_buffers(model, guide):
        yield


def _named(model: Any, guide: Any, leaves: dict[int, Tensor]) -> Iterator[_Parameter]:
    """Every parameter once: those of modules, frozen ones too, and the other leaves of the loss."""
    seen: set[int] = set()
    for name, module in own_modules(model, guide).items():
        for group, path, tensor in _parts(module, name, name):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield _Parameter(path, group, tensor)
    # what a function uses of the modules that it speaks of, and not all of what they hold
    known = {
        id(p): (g, n)
        for name, module in referenced_modules(model, guide).items()
        for g, n, p in _parts(module, name, name)
    }
    known |= {
        id(p): (name, name) for n, p in pyro.get_param_store().named_parameters() if (name := f"pyro.param {n!r}")
    }
    shapes: dict[str, int] = {}
    for key, leaf in leaves.items():
        if key in seen or not leaf.requires_grad:
            continue
        name = f"closure {tuple(leaf.shape)}"
        if key not in known:
            shapes[name] = shapes.get(name, 0) + 1
            name += f" #{shapes[name]}" if shapes[name] > 1 else ""
        group, name = known.get(key, (name, name))
        yield _Parameter(name, group, leaf)


def _parts(module: nn.Module, path: str, top: str) -> Iterator[tuple[str, str, Tensor]]:
    """Group, name and tensor of a module's parameters.

    A module falls into its children where they have names; numbered ones are layers, and an only child is no part.
    ``top`` is the outermost module that holds these parameters and no others.
    """
    own = [(top, f"{path}.{name}", p) for name, p in module.named_parameters(recurse=False)]
    children = {name: child for name, child in module.named_children() if next(child.parameters(), None) is not None}
    if any(name.isdigit() for name in children):
        yield from ((top, f"{path}.{name}", p) for name, p in module.named_parameters())
        return
    yield from own
    for name, child in children.items():
        alone = len(children) == 1 and not own
        yield from _parts(child, f"{path}.{name}", top if alone else f"{path}.{name}")
