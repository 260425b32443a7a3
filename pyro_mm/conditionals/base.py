"""What the families share."""

from collections.abc import Sequence

import torch
from pyro.distributions.util import broadcast_shape
from torch import Size, Tensor, nn

from ..utils.arguments import check_function, check_shape, describe
from ..utils.network_calls import OfOutput, Output


class Conditional(OfOutput):
    """What the families share: the network, and the reading of its output.

    Args:
        net: a module, from the parents to the parameters.
        event_shape: the shape of one value, or None for one dimension of any size.
    """

    def __init__(self, net: nn.Module, event_shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.net = check_function("net", net, None)
        self.event_shape = None if event_shape is None else check_shape("event_shape", event_shape)

    @property
    def event_dim(self) -> int:
        return 1 if self.event_shape is None else len(self.event_shape)

    def output(self, parents: tuple[Tensor, ...]) -> Tensor:
        """What the network puts out."""
        if isinstance(parents[0], Output):
            return parents[0].value
        if len(parents) > 1:
            lead = broadcast_shape(*(parent.shape[:-1] for parent in parents))
            parents = (torch.cat([parent.expand(*lead, -1) for parent in parents], -1),)
        out = self.net(*parents)
        if not isinstance(out, Tensor):
            raise TypeError(f"{type(self).__name__}: expected a tensor from the network, got {describe(out)}")
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def _parameters_of(self, parents: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
        """The network's output as ``number`` tensors of shape ``(..., *event_shape)``."""
        out, event = self.output(parents), self.event_shape
        if event is None:
            event = Size([out.shape[-1] // number])
        shaped = (number * event[0], *event[1:]) if event else (number,)
        if event and out.shape[-len(shaped) :] == shaped:
            return out.chunk(number, -len(shaped)) if number > 1 else (out,)
        if out.shape[-1:] == (number * event.numel(),):
            if number == 1:  # as it is, for the gradient of a chunk is copied into one of the whole
                return (out.reshape(out.shape[:-1] + event),)
            return out.unflatten(-1, (number, *event)).unbind(-1 - len(event))
        flat = f"(..., {number * event.numel()})"
        wanted = flat if len(event) < 2 else f"{flat} or (..., {', '.join(map(str, shaped))})"
        raise ValueError(f"expected an output of shape {wanted} from the network, got {tuple(out.shape)}")
