"""The multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..utils.arguments import check_counts
from .layer_arguments import check_activation, check_sizes


class MLP(nn.Module):
    """A multilayer perceptron, ``(..., *event) -> (..., out_features)`` with ``prod(event) = in_features``.

    The event is the shortest run of trailing dimensions, at least one, with that product: the same network takes
    ``(N, 64)`` and ``(T, N, 8, 8)``. Integers and booleans are cast to the dtype of the weights.

    Args:
        in_features: the number of entries of an event.
        out_features: the size of the output's last dimension.
        hidden: the sizes of the hidden layers; ``()`` gives an affine map.
        activation: called for a module between two layers.

    Raises:
        TypeError, ValueError: an argument that is no size, or no function that returns a module.

    Example:
        >>> import torch
        >>> MLP(64, 10, hidden=(32,))(torch.zeros(5, 8, 8)).shape
        torch.Size([5, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden: Sequence[int] = (256, 256),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        check_counts(in_features=in_features, out_features=out_features)
        hidden = check_sizes("hidden", hidden)
        check_activation(activation)
        self.in_features = in_features
        sizes = (in_features, *hidden)
        layers: list[nn.Module] = []
        for i in range(len(hidden)):
            layers += [nn.Linear(sizes[i], sizes[i + 1]), activation()]
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., out_features)`` for events ``(..., *event)``.

        Raises:
            ValueError: no trailing dimensions of ``x`` have ``in_features`` entries.
        """
        for start in reversed(range(x.dim())):
            if math.prod(x.shape[start:]) == self.in_features:
                output: Tensor = self.layers(x.to(next(self.parameters()).dtype).flatten(start))
                return output
        raise ValueError(f"expected an event of {self.in_features} entries, got shape {tuple(x.shape)}")
