"""Convolutional networks for images, and networks that run on blocks of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..utils.arguments import check_counts, check_module, check_shape
from .layer_arguments import check_activation, check_sizes

BLOCK_ROWS = 256  # images that a convolutional network takes at once on a CPU


class Blocks(nn.Module):
    """A network that runs on blocks of rows on a CPU, ``(..., *event) -> (..., *output)``.

    A mixture posterior with K draws from each of M experts decodes K M N rows. The activations of that many images do
    not fit into the caches, and their memory is allocated and cleared anew in every step; blocks avoid both
    (``tests/benchmarks/steps.py --networks conv`` times it). Weights of convolutions are laid out with the channels
    last, which is faster too. Batch normalisation, which mixes rows, gives other results in blocks.

    Args:
        net: a module from ``(rows, *event)`` to ``(rows, *output)``.
        rows: the number of rows of a block.
        event_dim: the number of dimensions of an event. All others are leading ones.

    Example:
        >>> net = nn.Sequential(nn.Unflatten(-1, (1, 8, 8)), nn.Conv2d(1, 3, 8), nn.Flatten())
        >>> Blocks(net, rows=4)(torch.zeros(5, 2, 64)).shape
        torch.Size([5, 2, 3])
    """

    def __init__(self, net: nn.Module, rows: int = BLOCK_ROWS, event_dim: int = 1) -> None:
        super().__init__()
        check_counts(rows=rows)
        check_counts(0, event_dim=event_dim)
        self.net = channels_last(check_module("net", net))
        self.rows = rows
        self.event_dim = event_dim

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., *output)`` for events ``(..., *event)``."""
        lead = x.shape[: x.dim() - self.event_dim]
        y = _run_in_blocks(self.net, x.reshape(-1, *x.shape[len(lead) :]), self.rows)
        return y.reshape(*lead, *y.shape[1:])


class Convolutional(nn.Module):
    """A convolutional image encoder, ``(..., *image_shape) -> (..., out_features)``.

    Convolutions of kernel 4, stride 2 and padding 1, each of which halves the image (rounded down), and an affine map.

    Args:
        image_shape: ``(C, H, W)``, or ``(H, W)`` for one channel.
        out_features: the size of the output's last dimension.
        channels: the number of channels after each convolution.
        activation: called for a module after each convolution.

    Raises:
        ValueError: the image is too small to be halved once per convolution.

    Example:
        >>> Convolutional((3, 28, 28), 10)(torch.zeros(5, 2, 3, 28, 28)).shape
        torch.Size([5, 2, 10])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        out_features: int,
        channels: Sequence[int] = (32, 64),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        check_counts(out_features=out_features)
        image_shape = check_shape("image_shape", image_shape)
        channels = check_sizes("channels", channels)
        check_activation(activation)
        self.image_shape = tuple(image_shape)
        self.out_features = out_features

        depth, sizes = _halved_sizes(image_shape, len(channels))
        depths = (depth, *channels)
        layers: list[nn.Module] = [nn.Unflatten(-1, (depth, *sizes[0]))]
        for i in range(len(channels)):
            layers += [nn.Conv2d(depths[i], depths[i + 1], 4, stride=2, padding=1), activation()]
        head = nn.Linear(depths[-1] * math.prod(sizes[-1]), out_features)
        self.layers = channels_last(nn.Sequential(*layers, nn.Flatten(), head))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., out_features)`` for images ``(..., *image_shape)``.

        Raises:
            ValueError: images of another shape.
        """
        lead = x.dim() - len(self.image_shape)
        if x.shape[max(lead, 0) :] != self.image_shape:
            raise ValueError(f"expected images of shape {self.image_shape}, got shape {tuple(x.shape)}")
        rows = x.to(next(self.parameters()).dtype).reshape(-1, math.prod(self.image_shape))
        y = _run_in_blocks(self.layers, rows, BLOCK_ROWS)
        return y.reshape(*x.shape[:lead], self.out_features)


class Deconvolutional(nn.Module):
    """A convolutional image decoder, ``(..., in_features) -> (..., *image_shape)``: :class:`Convolutional` in reverse.

    Args:
        in_features: the size of the input's last dimension.
        image_shape: ``(C, H, W)``, or ``(H, W)`` for one channel.
        channels: the number of channels before each transposed convolution.
        activation: called for a module before each transposed convolution.

    Raises:
        ValueError: the image is too small to be halved once per convolution.

    Example:
        >>> Deconvolutional(2, (28, 28))(torch.zeros(5, 2)).shape
        torch.Size([5, 28, 28])
    """

    def __init__(
        self,
        in_features: int,
        image_shape: Sequence[int],
        channels: Sequence[int] = (64, 32),
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        check_counts(in_features=in_features)
        image_shape = check_shape("image_shape", image_shape)
        channels = check_sizes("channels", channels)
        check_activation(activation)
        self.in_features = in_features
        self.image_shape = tuple(image_shape)

        depth, sizes = _halved_sizes(image_shape, len(channels))
        sizes = sizes[::-1]
        depths = (*channels, depth)
        start = (depths[0], *sizes[0])
        layers: list[nn.Module] = [nn.Linear(in_features, math.prod(start)), nn.Unflatten(-1, start)]
        for i in range(len(channels)):
            odd = (sizes[i + 1][0] % 2, sizes[i + 1][1] % 2)  # the pixels that rounding down dropped
            up = nn.ConvTranspose2d(depths[i], depths[i + 1], 4, stride=2, padding=1, output_padding=odd)
            layers += [activation(), up]
        self.layers = channels_last(nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return images ``(..., *image_shape)`` for ``(..., in_features)``.

        Raises:
            ValueError: another size of the last dimension.
        """
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"expected shape (..., {self.in_features}), got {tuple(x.shape)}")
        rows = x.to(next(self.parameters()).dtype).reshape(-1, self.in_features)
        y = _run_in_blocks(self.layers, rows, BLOCK_ROWS)
        return y.reshape(x.shape[:-1] + self.image_shape)


def channels_last(net: nn.Module) -> nn.Module:
    """Lay out the weights of a network's convolutions with the channels last, in place, and return the network."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)
    return net


def _run_in_blocks(net: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
    """Return ``net(x)``, on a CPU computed for at most ``rows`` rows at a time."""
    whole = x.device.type != "cpu" or len(x) <= rows
    return net(x) if whole else torch.cat([net(part) for part in x.split(rows)])


def _halved_sizes(image_shape: Sequence[int], times: int) -> tuple[int, list[tuple[int, int]]]:
    """Return the channels of an image, and its height and width after each of 0 to ``times`` halvings."""
    if len(image_shape) not in (2, 3):
        raise ValueError(f"expected an image shape (H, W) or (C, H, W), got {tuple(image_shape)}")
    depth, height, width = (1, *image_shape) if len(image_shape) == 2 else image_shape
    if min(height, width) >> times < 1:
        raise ValueError(f"an image of {height} x {width} cannot be halved {times} times")
    return depth, [(height >> i, width >> i) for i in range(times + 1)]
