"""Layers of flows of images that depend on a context, and their composition over several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

LARGEST_LOG_SCALE = 3.0  # of one coupling, in either direction: a bounded layer cannot overflow


class ChannelMap(nn.Module):
    r"""An invertible map of an image's channels, alike at every pixel: an affine map, and a 1 x 1 convolution.

    .. math:: y = L U \, (e^{s} x + b), \qquad \log |\det| = H W \sum_c (s_c + d_c), \quad U_{cc} = e^{d_c}

    with a unit lower triangular L. All parameters begin at 0, where it is the identity. No statistics of data enter.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(channels, 1, 1))
        self.lower = nn.Parameter(torch.zeros(channels, channels))
        self.upper = nn.Parameter(torch.zeros(channels, channels))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image of x ``(B, C, H, W)``, and the log-determinant, a scalar."""
        lower, upper = self._factors()
        y = x * self.log_scale.exp() + self.bias
        y = nn.functional.conv2d(y, (lower @ upper)[..., None, None])
        pixels = x.shape[-1] * x.shape[-2]
        return y, pixels * (self.log_scale.sum() + self.upper.diagonal().sum())

    def inverse(self, y: Tensor) -> Tensor:
        """Return x of its image ``(B, C, H, W)``."""
        lower, upper = self._factors()
        x = torch.linalg.solve_triangular(lower, y.flatten(2), upper=False, unitriangular=True)
        x = torch.linalg.solve_triangular(upper, x, upper=True).reshape(y.shape)
        image: Tensor = (x - self.bias) * (-self.log_scale).exp()
        return image

    def _factors(self) -> tuple[Tensor, Tensor]:
        """Return L and U, ``(C, C)``."""
        eye = torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        upper = self.upper.triu(1) + torch.diag(self.upper.diagonal().exp())
        return self.lower.tril(-1) + eye, upper


class Coupling(nn.Module):
    r"""An affine map of some channels, with coefficients that depend on the others and on the context.

    .. math:: y_a = x_a, \qquad y_b = e^{s} x_b + t, \qquad (s, t) = \mathrm{net}(x_a, c)

    The last layer of the network begins at 0, where it is the identity; s lies between -3 and 3.

    Args:
        channels: C, of which the first ``ceil(C / 2)`` are :math:`x_a`.
        context: channels of the context.
        hidden: channels of the network's two hidden layers.
        flip: True to exchange the roles of the two parts.
    """

    def __init__(self, channels: int, context: int, hidden: int, flip: bool) -> None:
        super().__init__()
        first = -(-channels // 2)
        self.sizes = (first, channels - first)
        self.flip = flip
        given, changed = self.sizes[::-1] if flip else self.sizes
        self.net = nn.Sequential(
            nn.Conv2d(given + context, hidden, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden, hidden, 1),
            nn.ReLU(),
            _zeros(nn.Conv2d(hidden, 2 * changed, 3, padding=1)),
        )

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image of x ``(B, C, H, W)``, and the log-determinant ``(B,)``."""
        given, changed = self._split(x)
        log_scale, shift = self._coefficients(given, context)
        return self._join(given, changed * log_scale.exp() + shift), log_scale.sum((1, 2, 3))

    def inverse(self, y: Tensor, context: Tensor) -> Tensor:
        """Return x of its image ``(B, C, H, W)``."""
        given, changed = self._split(y)
        log_scale, shift = self._coefficients(given, context)
        return self._join(given, (changed - shift) * (-log_scale).exp())

    def _coefficients(self, given: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        return bounded(self.net(torch.cat([given, context], 1)))

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, other = x.split(self.sizes, 1)
        return (other, one) if self.flip else (one, other)

    def _join(self, given: Tensor, changed: Tensor) -> Tensor:
        return torch.cat([changed, given] if self.flip else [given, changed], 1)


class Standardize(nn.Module):
    r"""An affine map of pixels whose coefficients depend on the context and on the channels that are kept.

    Before the noise N(0, I) it makes of that a Gaussian with learned means and scales. It begins as the identity.

    Args:
        channels: C, which are mapped.
        given: channels of what the coefficients depend on.
        hidden: channels of the hidden layer.
    """

    def __init__(self, channels: int, given: int, hidden: int) -> None:
        super().__init__()
        last = _zeros(nn.Conv2d(hidden, 2 * channels, 1))
        self.net = nn.Sequential(nn.Conv2d(given, hidden, 3, padding=1), nn.ReLU(), last)

    def forward(self, x: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
        """Return the image of x ``(B, C, H, W)``, and the log-determinant ``(B,)``."""
        log_scale, shift = bounded(self.net(given))
        return x * log_scale.exp() + shift, log_scale.sum((1, 2, 3))

    def inverse(self, y: Tensor, given: Tensor) -> Tensor:
        """Return x of its image ``(B, C, H, W)``."""
        log_scale, shift = bounded(self.net(given))
        return (y - shift) * (-log_scale).exp()


class Scale(nn.Module):
    """One scale of a flow of images: squeeze, several steps, and a split behind which the next scale goes on.

    A squeeze makes four channels of every square of 2 x 2 pixels. A step is a :class:`ChannelMap` and a
    :class:`Coupling`. Half of the channels then go to the noise, and the others to the next scale.

    Args:
        channels: C of the image that comes in.
        size: its height and width, which are even.
        scales: scales that are left, this one counted.
        steps: steps of each scale.
        hidden: channels of the hidden layers of networks.
        context: size of the context, a vector.
        context_channels: channels of the map that each scale makes of the context.
    """

    def __init__(
        self,
        channels: int,
        size: tuple[int, int],
        scales: int,
        steps: int,
        hidden: int,
        context: int,
        context_channels: int,
    ) -> None:
        super().__init__()
        self.inner = 4 * channels
        self.kept = self.inner // 2 if scales > 1 else 0
        # an affine map to (context_channels, H / 2, W / 2), without a reshape that would depend on a traced layout
        self.context = nn.ConvTranspose2d(context, context_channels, (size[0] // 2, size[1] // 2))
        self.maps = nn.ModuleList(ChannelMap(self.inner) for _ in range(steps))
        self.couplings = nn.ModuleList(
            Coupling(self.inner, context_channels, hidden, flip=bool(i % 2)) for i in range(steps)
        )
        self.standardize = Standardize(self.inner - self.kept, self.kept + context_channels, hidden)
        self.next: Scale | None = None
        if scales > 1:
            half = (size[0] // 2, size[1] // 2)
            self.next = Scale(self.kept, half, scales - 1, steps, hidden, context, context_channels)

    def forward(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise of images ``(B, C, H, W)`` in their shape, and the log-determinants ``(B,)``.

        Args:
            x: the images.
            context: vectors ``(B, context)``.
        """
        h = nn.functional.pixel_unshuffle(x, 2)
        features = self.context(context[..., None, None])
        total = torch.zeros_like(h[:, 0, 0, 0])
        for channel_map, coupling in zip(self.maps, self.couplings, strict=True):
            h, log_det = channel_map(h)
            total = total + log_det
            h, log_det = coupling(h, features)
            total = total + log_det

        kept, out = h.split((self.kept, self.inner - self.kept), 1)
        out, log_det = self.standardize(out, torch.cat([kept, features], 1))
        total = total + log_det
        if self.next is not None:
            kept, log_det = self.next(kept, context)
            total = total + log_det
        return nn.functional.pixel_shuffle(torch.cat([kept, out], 1), 2), total

    def inverse(self, noise: Tensor, context: Tensor) -> Tensor:
        """Return the images ``(B, C, H, W)`` of noise in their shape, given contexts ``(B, context)``."""
        features = self.context(context[..., None, None])
        kept, out = nn.functional.pixel_unshuffle(noise, 2).split((self.kept, self.inner - self.kept), 1)
        if self.next is not None:
            kept = self.next.inverse(kept, context)
        out = self.standardize.inverse(out, torch.cat([kept, features], 1))
        h = torch.cat([kept, out], 1)
        steps = list(zip(self.maps, self.couplings, strict=True))
        for channel_map, coupling in reversed(steps):
            before: Tensor = coupling.inverse(h, features)  # type: ignore[operator]
            h = channel_map.inverse(before)  # type: ignore[operator]
        return nn.functional.pixel_shuffle(h, 2)


def bounded(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return a log-scale between -3 and 3, and a shift, of a network's output ``(B, 2 C, H, W)``."""
    log_scale, shift = raw.chunk(2, 1)
    return LARGEST_LOG_SCALE * torch.tanh(log_scale / LARGEST_LOG_SCALE), shift


def _zeros(layer: nn.Conv2d) -> nn.Conv2d:
    """Set a layer's parameters to zero, in place, and return it."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def squeezable(image_shape: Sequence[int], scales: int) -> tuple[int, int, int]:
    """Return channels, height and width of an image that can be squeezed so many times.

    Raises:
        ValueError: a height or width that is not divisible by ``2 ** scales``, or a shape of no image.
    """
    if len(image_shape) not in (2, 3):
        raise ValueError(f"expected an image shape (H, W) or (C, H, W), got {tuple(image_shape)}")
    channels, height, width = (1, *image_shape) if len(image_shape) == 2 else image_shape
    if height % 2**scales or width % 2**scales:
        raise ValueError(
            f"an image of {height} x {width} cannot be halved {scales} times: take fewer scales, or pad the images"
        )
    return channels, height, width
