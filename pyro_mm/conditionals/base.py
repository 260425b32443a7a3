"""The base class of the families: a network, and a distribution made of its output."""

from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Size, Tensor, nn

from ..utils.arguments import check_function, check_shape, describe
from ..utils.network_keywords import call_network


class Conditional(nn.Module):
    """A network and a family: ``distribution(output(*parents))``.

    A family of one's own overrides ``distribution``. A subclass may override ``forward`` instead; then the network
    runs on all rows at once, and once for each set of modalities that a posterior is asked for.

    Args:
        net: a module from the parents ``(.., N, F)`` to the parameters of the family. If its ``forward`` has a
            parameter ``lengths`` or ``covariates``, ``batch.encode`` and ``batch.observe`` hand these over by keyword.
        event_shape: the shape of one value, or None for one dimension of any size.

    Example:
        >>> class Exponential(Conditional):
        ...     def distribution(self, output):
        ...         return dist.Exponential(output.exp(), validate_args=False).to_event(1)
        >>> Exponential(nn.Linear(2, 3))(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    def __init__(self, net: nn.Module, event_shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.net = check_function("net", net, None)
        self.event_shape = None if event_shape is None else check_shape("event_shape", event_shape)

    @property
    def event_dim(self) -> int:
        """The number of dimensions of one value."""
        return 1 if self.event_shape is None else len(self.event_shape)

    @property
    def composes(self) -> bool:
        """True if a call computes ``distribution(output(..))`` and nothing else, such as a hook or another forward."""
        own = type(self).forward is not Conditional.forward or "forward" in self.__dict__
        return not (own or self._forward_hooks or self._forward_pre_hooks)

    def forward(self, *parents: Tensor, **keywords: Any) -> dist.TorchDistribution:
        """Return the distribution given the parents.

        Args:
            parents: tensors ``(.., N, F_i)``; a single one may have any shape that the network takes.
            keywords: lengths or covariates that the network asks for.

        Raises:
            ValueError: the network's output has no shape that the family can read.
            TypeError: the network returns no tensor.
        """
        return self.distribution(self.output(*parents, **keywords))

    def output(self, *parents: Any, **keywords: Any) -> Tensor:
        """Return the network's output, float32 or wider. The arguments are those of :meth:`forward`."""
        if len(parents) == 1 and isinstance(parents[0], tuple):  # as subclasses of version 0.1 call it
            parents = parents[0]
        if len(parents) > 1:
            lead = broadcast_shape(*(parent.shape[:-1] for parent in parents))
            parents = (torch.cat([parent.expand(*lead, -1) for parent in parents], -1),)
        out = call_network(self.net, parents, keywords)
        if not isinstance(out, Tensor):
            raise TypeError(f"{type(self).__name__}: expected a tensor from the network, got {describe(out)}")
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Return the distribution whose parameters are the network's output.

        Args:
            output: ``(.., N, P)``, or shaped like the event, see :mod:`pyro_mm.conditionals`.

        Returns:
            A distribution of batch shape ``(.., N)``.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither a distribution nor a forward of its own")

    def _chunk(self, output: Tensor, number: int) -> tuple[Tensor, ...]:
        """Return the network's output as ``number`` tensors of shape ``(..., *event_shape)``."""
        event = self.event_shape
        if event is None:
            event = Size([output.shape[-1] // number])
        shaped = (number * event[0], *event[1:]) if event else (number,)
        if event and output.shape[-len(shaped) :] == shaped:
            return output.chunk(number, -len(shaped)) if number > 1 else (output,)
        if output.shape[-1:] == (number * event.numel(),):
            if number == 1:  # as it is, for the gradient of a chunk is copied into one of the whole
                return (output.reshape(output.shape[:-1] + event),)
            parts: tuple[Tensor, ...] = output.unflatten(-1, (number, *event)).unbind(-1 - len(event))
            return parts
        if len(event) > 1 and output.shape[-len(event) :] == (*event[:-1], number * event[-1]):  # step by step
            return output.chunk(number, -1)
        flat = f"(..., {number * event.numel()})"
        by_step = (*event[:-1], number * event[-1]) if event else ()
        shapes = dict.fromkeys(f"(..., {', '.join(map(str, shape))})" for shape in (shaped, by_step))
        wanted = flat if len(event) < 2 else " or ".join([flat, *shapes])
        raise ValueError(f"expected an output of shape {wanted} from the network, got {tuple(output.shape)}")
