"""Adapters that give anything that can be trained the interface of a prepared objective."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import pyro.infer
import torch
from pyro.infer import ELBO, SVI
from torch import Tensor, nn

from ..batch.batch import Batch
from ..handlers.elbos import traceable_form
from ..handlers.params import announce_gradient
from ..handlers.plates import KnownPlates
from ..utils.arguments import describe
from .program import Program
from .training_objective import Layout, Loss, Player, PreparedObjective, StepWeights, detach_values, plain_attributes

WANTED = "expected objective to be an objective, such as pyro_mm.objectives.elbo(), or a pyro.infer.ELBO"
PROTOCOL = (
    "an object or an nn.Module with a method evaluate(model, guide, batch, *, step), an nn.Module whose forward has "
    "these arguments, or a function of them serves too: it returns a scalar tensor to minimise, or a pyro_mm.Loss"
)


def prepare_objective(objective: Any) -> PreparedObjective:
    """Return an objective with everything that training, compilation and checks ask of one.

    Args:
        objective: an :class:`~pyro_mm.objectives.Objective` or one of our estimators, returned as it is; one of Pyro's
            ELBOs, or something else with their ``differentiable_loss`` or ``loss_and_grads``; an object with the method
            of :class:`TrainingObjective`; an ``nn.Module`` whose ``forward`` has its arguments; or a function of them.

    Raises:
        TypeError: anything else, such as a class, a name, or a function that is still to be called.
    """
    if isinstance(objective, PreparedObjective):
        return objective
    if isinstance(objective, type):
        raise TypeError(f"{WANTED}, got the class {objective.__name__}: make an instance, {objective.__name__}()")
    if isinstance(objective, SVI):
        raise TypeError(f"{WANTED}, got a pyro.infer.SVI: pass the ELBO that it was made of")
    method = getattr(objective, "evaluate", None)
    if callable(method):
        _check_signature(method, f"{describe(objective)} whose evaluate")
        return _UserObjective(objective, method)
    if isinstance(objective, ELBO) or _has_elbo_methods(objective):
        return PreparedELBO(objective)
    if isinstance(objective, nn.Module):
        _check_signature(objective.forward, f"the module {type(objective).__name__} whose forward")
        return _UserObjective(objective, objective)
    if callable(objective):
        name = getattr(objective, "__name__", type(objective).__name__)
        kind = "function" if inspect.isroutine(objective) else "callable"
        if inspect.isroutine(objective) and not _accepts(objective):
            raise TypeError(f"{WANTED}, got the function {name}: call it, {name}(). Otherwise {PROTOCOL}")
        _check_signature(objective, f"the {kind} {name} which")
        return _UserObjective(objective, objective)
    raise TypeError(f"{WANTED}, got {describe(objective)}; {PROTOCOL}")


def _has_elbo_methods(objective: Any) -> bool:
    return any(callable(getattr(objective, name, None)) for name in ("differentiable_loss", "loss_and_grads"))


def _accepts(function: Callable[..., Any]) -> bool:
    """Return True if a function can be called as ``evaluate`` is."""
    try:
        inspect.signature(function).bind(None, None, None, step=0)
    except TypeError:
        return False
    except ValueError:  # written in C, without a signature
        return True
    return True


def _check_signature(function: Callable[..., Any], who: str) -> None:
    if not _accepts(function):
        raise TypeError(f"{WANTED}, got {who} cannot be called with (model, guide, batch, step=..); {PROTOCOL}")


# -- Pyro's own ELBOs -------------------------------------------------------------------------------------------------


class PreparedELBO(PreparedObjective):
    """One of ``pyro.infer``'s ELBOs, or an object with the same methods, as an objective without terms."""

    def __init__(self, elbo: Any):
        self.elbo = elbo
        self.differentiable = hasattr(elbo, "differentiable_loss")
        self.untraceable = untraceable_reason(elbo)

    def __repr__(self) -> str:
        return repr(self.elbo)

    @property
    def estimator_name(self) -> str:
        return type(self.elbo).__name__

    @property
    def modules(self) -> list[nn.Module]:
        return [self.elbo] if isinstance(self.elbo, nn.Module) else []

    def evaluate(self, model: Program, guide: Program, batch: Batch, *, step: int | Tensor) -> Loss:
        if not torch.is_grad_enabled() and hasattr(self.elbo, "loss"):
            return Loss(as_total(self.elbo.loss(model, guide, batch)))
        if not self.differentiable:
            raise TypeError(f"{self.estimator_name} takes its gradient itself, by evaluate_with_gradient")
        loss = traceable_form(self.elbo).differentiable_loss(model, guide, batch)
        return Loss(as_total(loss))

    def evaluate_with_gradient(self, model: Program, guide: Program, batch: Batch, *, step: int) -> Loss:
        if self.differentiable:
            return super().evaluate_with_gradient(model, guide, batch, step=step)

        def announced(batch: Batch) -> None:
            announce_gradient()
            guide(batch)

        return Loss(as_total(self.elbo.loss_and_grads(model, announced, batch)))

    def step_weights(self, names: tuple[str, ...], step: int) -> StepWeights:
        return StepWeights(form=plain_attributes(self.elbo))

    def layout(self, batch: Batch) -> Layout:
        particles = getattr(self.elbo, "num_particles", 1)
        return Layout(stacked=particles > 1 and bool(getattr(self.elbo, "vectorize_particles", False)))


def untraceable_reason(elbo: Any) -> str | None:
    """Return the reason why the loss of one of Pyro's ELBOs cannot be traced, or None if it can be tried."""
    name = type(elbo).__name__
    if traceable_form(elbo) is not elbo:
        return None
    if getattr(pyro.infer, name, None) is type(elbo):
        return f"{name} takes its gradient itself, or reads numbers as it goes"
    if not hasattr(elbo, "differentiable_loss"):
        return f"{name} has no differentiable loss"
    return None


def as_total(value: Any) -> Tensor:
    """Return a loss as a tensor; a number in double precision, so that none of it is lost."""
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64, device="cpu")


# -- a user's own objective -------------------------------------------------------------------------------------------


class _UserObjective(PreparedObjective):
    """A user's objective: an object with a method ``evaluate``, a module with such a ``forward``, or a function.

    Args:
        objective: the object itself.
        function: ``(model, guide, batch, *, step) -> Loss or scalar tensor``.
    """

    def __init__(self, objective: Any, function: Callable[..., Any]):
        self.objective = objective
        self.function = function

    def __repr__(self) -> str:
        return repr(self.objective)

    @property
    def estimator_name(self) -> str:
        return getattr(self.objective, "__name__", type(self.objective).__name__)

    @property
    def modules(self) -> list[nn.Module]:
        return [self.objective] if isinstance(self.objective, nn.Module) else []

    def evaluate(self, model: Program, guide: Program, batch: Batch, *, step: int | Tensor) -> Loss:
        with KnownPlates():  # or a sequential plate would read its indices, which no trace of a step can
            value = self.function(model, guide, batch, step=step)
        return _checked_loss(value, self.estimator_name)

    def players(self, model: Program, guide: Program, batch: Batch) -> Sequence[Player]:
        function = getattr(self.objective, "players", None)
        return () if function is None else function(model, guide, batch)

    def step_weights(self, names: tuple[str, ...], step: int) -> StepWeights:
        modules = [module for root in self.modules for module in root.modules()]
        form: Hashable = tuple(plain_attributes(x) for x in (modules or [self.objective]))
        return StepWeights(form=form)


def _checked_loss(value: Any, name: str) -> Loss:
    """Return the result of a user's objective as a :class:`Loss`.

    Raises:
        TypeError: no tensor, or terms that are no mapping from labels to numbers.
        ValueError: a tensor that is no scalar.
    """
    loss = value if isinstance(value, Loss) else Loss(value)
    wanted = f"expected the objective {name} to return a scalar tensor to minimise, or a pyro_mm.Loss of one"
    total = loss.total
    if not isinstance(total, Tensor):
        missing = ": is a return missing?" if total is None else ""
        raise TypeError(f"{wanted}, got {describe(total)}{missing}")
    if total.dim() != 0:
        raise ValueError(f"{wanted}, got a tensor of shape {tuple(total.shape)}: sum it over the rows")
    if not total.is_floating_point():
        raise TypeError(f"{wanted}, got a tensor of {total.dtype}")
    if not loss.by_term:
        return loss
    terms = f"expected by_term of the objective {name} to map labels to scalars"
    if not isinstance(loss.by_term, Mapping) or not all(isinstance(label, str) for label in loss.by_term):
        raise TypeError(f"{terms}, got {describe(loss.by_term)}")
    try:
        by_term = detach_values(loss.by_term)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{terms}, got one that is no number") from error
    for label, term in by_term.items():
        if term.dim() != 0:
            raise ValueError(f"{terms}, got a tensor of shape {tuple(term.shape)} for {label!r}: sum it over the rows")
    return Loss(total, by_term)
