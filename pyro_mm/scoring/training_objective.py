r"""The contract between an objective and the code that trains, compiles and checks it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from .program import Program


@dataclass(frozen=True)
class Loss:
    """Value of an objective on a batch.

    Attributes:
        total: scalar to minimise, in nats: minus the objective, summed over rows and scaled by a subsampled data plate.
        by_term: label -> scalar value of a part of the objective, without gradient; higher is better.
    """

    total: Tensor
    by_term: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepWeights:
    """Weights of an objective that depend on the step, at one step.

    Attributes:
        values: the weights, in the objective's own order.
        fixed: index in ``values`` -> value, for the weights whose values the form of the loss depends on.
        form: everything else that the loss depends on besides tensors; a compiled loss is used again for an equal form.
    """

    values: tuple[float, ...] = ()
    fixed: Mapping[int, float] = field(default_factory=dict)
    form: Hashable = ()


@dataclass(frozen=True)
class Player:
    """A further player of a training: parameters that minimise a loss of their own, such as those of a critic.

    ``fit`` makes the updates of the players in their order, and then that of the objective, on every minibatch. What a
    player moves, the objective's update leaves as it is: its loss is no function of these parameters, or their
    gradient is not taken.

    Attributes:
        name: the column of its loss in the history, per row; not "loss" or "validation".
        loss: an objective, or anything else that ``fit`` trains by. Its loss is minimised, summed over rows.
        parameters: the tensors that it moves, which no other player moves. Those of modules are saved with the modules
            of model, guide and objective, so a network of the player itself belongs to
            :attr:`PreparedObjective.modules`.
        optimizer: parameters -> ``torch.optim`` optimiser; None for that of the training.
        every: its update is made at every so many steps, the first one included.
        diagnose: called after an epoch with its entry of the history; returns a warning in words, or None.
    """

    name: str
    loss: Any
    parameters: Sequence[Tensor]
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None = None
    every: int = 1
    diagnose: Callable[[Mapping[str, float]], str | None] | None = None


class Layout(NamedTuple):
    """The form in which an evaluation shows a batch to model and guide.

    Attributes:
        stacked: True if particles or terms stand to the left of the rows.
        hides: True if some evaluation hides, or does not decode, modalities that rows have.
    """

    stacked: bool = False
    hides: bool = False


@runtime_checkable
class TrainingObjective(Protocol):
    """The one method that ``fit``, ``stage``, ``check`` and ``compare`` ask of an objective.

    Any object or ``nn.Module`` with this method will do, and so will a function with its signature. Parameters of an
    objective that is an ``nn.Module`` are trained with those of model and guide.

    Example:
        >>> import pyro, torch, pyro_mm as mm
        >>> def reconstruction(model, guide, batch, *, step):
        ...     latents = pyro.poutine.trace(guide).get_trace(batch)
        ...     sites = pyro.poutine.trace(pyro.poutine.replay(model, latents)).get_trace(batch)
        ...     log_p = sites.log_prob_sum(lambda name, site: site["is_observed"])
        ...     return mm.Loss(-log_p, {"log p(x | z)": log_p.detach()})
        >>> rows = mm.Batch({"image": torch.rand(64, 4, 4), "label": torch.arange(64) % 3})
        >>> model, guide, _ = mm.recipes.jmvae_zero(rows, latent=2, hidden=(8,))
        >>> history = mm.fit(model, guide, reconstruction, rows, epochs=2, progress=False)
        >>> list(history.columns)
        ['loss', 'log p(x | z)']
    """

    def evaluate(self, model: Program, guide: Program, batch: Batch, *, step: int | Tensor) -> Loss:
        """Return the loss of a batch, with the graph of its gradient where gradients are enabled.

        Args:
            model, guide: callables of a batch.
            batch: N rows.
            step: gradient steps taken so far in this training. In a step that is compiled, a scalar tensor: arithmetic
                with it is traced; a program that branches on it runs uncompiled.
        """
        ...


class PreparedObjective(ABC):
    """Everything that training, compilation and checks ask of an objective, with defaults.

    :class:`~pyro_mm.objectives.Objective` is one; ``prepare_objective`` makes one of anything else that trains.
    It keeps no state between evaluations.
    """

    differentiable: bool = True  # False: it takes its gradient itself, by evaluate_with_gradient alone
    ignores_padding: bool = False  # True: rows that weigh nothing leave its value as it is
    untraceable: str | None = None  # reason why its step cannot be compiled

    @property
    @abstractmethod
    def estimator_name(self) -> str:
        """Name of the estimator, for messages."""

    @abstractmethod
    def evaluate(self, model: Program, guide: Program, batch: Batch, *, step: int | Tensor) -> Loss:
        """Return the loss of a batch; see :class:`TrainingObjective`."""

    def evaluate_with_gradient(self, model: Program, guide: Program, batch: Batch, *, step: int) -> Loss:
        """Return the loss without a graph, after its gradient was added to the parameters'."""
        loss = self.evaluate(model, guide, batch, step=step)
        if loss.total.requires_grad:
            loss.total.backward()
        return Loss(loss.total.detach(), loss.by_term)

    def step_weights(self, names: tuple[str, ...], step: int) -> StepWeights:
        """Return the weights that depend on the step, for modalities of these names."""
        return StepWeights()

    def evaluate_with_weights(
        self, weights: Tensor, fixed: Mapping[int, float], model: Program, guide: Program, batch: Batch, step: Tensor
    ) -> Loss:
        """Return the loss as a function of tensors alone, to be traced once for many steps.

        Args:
            weights: the values of :meth:`step_weights`, ``(W,)``.
            fixed: the weights that may be read as numbers, by index.
            step: scalar.
        """
        return self.evaluate(model, guide, batch, step=step)

    def layout(self, batch: Batch) -> Layout:
        """Return how an evaluation shows a batch to model and guide."""
        return Layout()

    def decoding_all(self) -> PreparedObjective:
        """Return the objective that decodes all modalities, if this one decodes a random choice of them."""
        return self

    def players(self, model: Program, guide: Program, batch: Batch) -> Sequence[Player]:
        """Return the further players of a training, in the order of their updates.

        Args:
            model, guide: callables of a batch.
            batch: a few rows, by which parameters can be found.
        """
        return ()

    def least_rows(self, names: tuple[str, ...]) -> int:
        """Return the fewest rows of a batch that it can be evaluated on, for modalities of these names."""
        return 1

    def gathers_rows(self, names: tuple[str, ...]) -> bool:
        """Return True if rows that it compares are those of all processes that share a minibatch out.

        It gathers them by ``utils.shared_rows``. Where it is False, a training by several processes refuses an
        objective of ``least_rows`` above 1.

        Args:
            names: the modalities.
        """
        return False

    def describe(self, names: tuple[str, ...]) -> str:
        """Return the objective in words, for modalities of these names, by which checkpoints are compared."""
        return repr(self)

    @property
    def modules(self) -> list[nn.Module]:
        """Modules of the objective itself, whose parameters are trained with those of model and guide."""
        return [self] if isinstance(self, nn.Module) else []


def plain_attributes(value: Any) -> Hashable:
    """Return the names and values of an object's attributes that are numbers, flags, words or None."""
    plain = bool | int | float | str | None
    return tuple((name, x) for name, x in getattr(value, "__dict__", {}).items() if isinstance(x, plain))


def detach_values(values: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return label -> value as tensors without gradient."""
    tensors = {n: x if isinstance(x, Tensor) else torch.as_tensor(x, device="cpu") for n, x in values.items()}
    return {label: value.detach() for label, value in tensors.items()}
