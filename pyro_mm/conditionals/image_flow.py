"""Exact densities of images by flows over several scales that depend on the parents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn
from torch.distributions import constraints

from ..distributions.support import OffGrid
from ..utils.arguments import check_counts, check_number, check_shape
from .base import Conditional
from .image_layers import Scale, squeezable

BLOCK_ROWS = 256  # images that the networks take at once on a CPU


class ImageFlow(Conditional):
    r"""A flow of images over several scales, given the parents: an exact density, and draws in one pass.

    .. math:: p(x) = N(f_c(x); 0, I) \, |\det \partial f_c / \partial x|, \qquad c = \mathrm{net}(parents)

    f maps pixels from their bounds to all real numbers by a logit, and then, at each scale, squeezes squares of 2 x 2
    pixels to channels, makes ``steps`` steps (an affine map of the channels, an invertible 1 x 1 convolution, and an
    affine coupling whose network sees the context as a map of its own), and lets half of the channels go. Apart from
    the logit it begins as the identity, so that draws begin as noise. No statistics of a first batch enter.

    The density is that of real numbers, and grows without bound on grey levels: add noise to them
    (:func:`pyro_mm.datasets.dequantize`), anew in every epoch by ``fit(transform=..)``. Without noise the values are
    refused. In the mean over the noise, :math:`\log p(x) - D \log L` bounds the log-probability of L levels of D pixels
    from below. The bound is tightened by :class:`Dequantized`, where the noise is a latent.

    Args:
        net: a module from the parents to the context c, ``(.., context)``.
        image_shape: ``(C, H, W)``, or ``(H, W)`` for one channel; H and W divisible by ``2 ** scales``.
        context: size of the context.
        scales: scales of the flow.
        steps: steps of each scale.
        hidden: channels of the hidden layers of the couplings' networks.
        context_channels: channels of the map that each scale makes of the context.
        bounds: least and largest value of a pixel; None for real numbers, without a logit.
        margin: share of the range by which pixels are kept off the bounds before the logit. Draws may lie outside of
            the bounds by ``margin / (1 - 2 margin)`` of it. 0 for a density on the open interval.

    A density, and its gradient, take one pass of all networks per image and per particle: the context differs between
    particles. Steps are compiled, and images flattened to blocks of 256 rows on a CPU.

    Raises:
        TypeError, ValueError: an argument out of its range, or an image that cannot be halved so often; in ``forward``,
            a context of another size.

    Example:
        >>> decoder = ImageFlow(nn.Linear(2, 8), (8, 8), context=8, steps=2, hidden=16)
        >>> p = decoder(torch.zeros(3, 5, 2))
        >>> p.batch_shape, p.event_shape, p.log_prob(p.sample()).shape
        (torch.Size([3, 5]), torch.Size([8, 8]), torch.Size([3, 5]))

    References:
        Dinh et al. 2017 (RealNVP, arXiv:1605.08803); Kingma & Dhariwal 2018 (Glow, arXiv:1807.03039); Lu & Huang 2020
        (arXiv:1905.13288).
    """

    def __init__(
        self,
        net: nn.Module,
        image_shape: Sequence[int],
        context: int,
        *,
        scales: int = 2,
        steps: int = 4,
        hidden: int = 64,
        context_channels: int = 8,
        bounds: tuple[float, float] | None = (0.0, 1.0),
        margin: float = 0.01,
    ) -> None:
        super().__init__(net, check_shape("image_shape", image_shape))
        check_counts(context=context, scales=scales, steps=steps, hidden=hidden, context_channels=context_channels)
        channels, height, width = squeezable(image_shape, scales)
        self.context = context
        self.bounds = None if bounds is None else _check_bounds(bounds)
        self.margin = check_number("margin", margin, 0, below=0.5)
        self.flow = Scale(channels, (height, width), scales, steps, hidden, context, context_channels)

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Return the distribution of images given the context ``(.., context)``."""
        if output.shape[-1:] != (self.context,):
            raise ValueError(
                f"ImageFlow: expected a context of shape (.., {self.context}) from the network, got "
                f"{tuple(output.shape)}: give context= the size of its output"
            )
        assert self.event_shape is not None
        event_dim = len(self.event_shape)
        zero = output.new_zeros(()).expand(output.shape[:-1] + self.event_shape)
        base = dist.Normal(zero, torch.ones_like(zero), validate_args=False).to_event(event_dim)
        transform = _ImageTransform(self.flow, output, self.event_shape, self.bounds, self.margin)
        return ImageFlowDistribution(base, [transform], validate_args=False)


def _check_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """Return the bounds of pixels. Raises a TypeError or ValueError for anything but two increasing numbers."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"expected bounds to be the least and the largest value of a pixel, or None, got {bounds!r}")
    low = check_number("the first of bounds", bounds[0])
    return low, check_number("the second of bounds", bounds[1], above=low)


class _ImageTransform(torch.distributions.Transform):
    """The map from noise to images, given contexts; noise and images may have more leading dimensions than these."""

    bijective = True

    def __init__(
        self,
        flow: Scale,
        context: Tensor,
        image_shape: torch.Size,
        bounds: tuple[float, float] | None,
        margin: float,
    ) -> None:
        super().__init__()
        self.flow = flow
        self.context = context
        self.image_shape = image_shape
        self.bounds = bounds
        self.margin = margin

    @constraints.dependent_property(is_discrete=False)
    def domain(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, len(self.image_shape))

    @constraints.dependent_property(is_discrete=False)
    def codomain(self) -> constraints.Constraint:
        return constraints.independent(self.pixels, len(self.image_shape))

    @property
    def pixels(self) -> constraints.Constraint:
        """The values of a pixel that have a density."""
        if self.bounds is None:
            return OffGrid()
        low, high = self.bounds
        if not self.margin:
            return constraints.interval(low, high)
        beyond = (high - low) * self.margin / (1 - 2 * self.margin)
        return OffGrid(low - beyond, high + beyond)

    def noise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise of images ``(.., *image_shape)``, and the log-determinants ``(..)``."""
        x = x.to(self.context.dtype)
        real, log_slope = self._to_real(x)
        noise, log_det = self._in_rows(self.flow, real)
        return noise, log_det + log_slope.flatten(x.dim() - len(self.image_shape)).sum(-1)

    def _call(self, x: Tensor) -> Tensor:
        (real,) = self._in_rows(lambda u, c: (self.flow.inverse(u, c),), x.to(self.context.dtype))
        return self._to_pixels(real)

    def _inverse(self, y: Tensor) -> Tensor:
        return self.noise(y)[0]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.noise(y)[1]

    def _to_real(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of pixels, and the logarithms of their slopes, of the shape of the pixels."""
        if self.bounds is None:
            return x, torch.zeros_like(x)
        low, high = self.bounds
        slope = (1 - 2 * self.margin) / (high - low)
        least = torch.finfo(x.dtype).eps  # distance from the bounds below which a logit is cut off
        share = ((x - low) * slope + self.margin).clamp(least, 1 - least)
        log_share = share.log()
        log_rest = torch.log1p(-share)
        return log_share - log_rest, math.log(slope) - log_share - log_rest

    def _to_pixels(self, real: Tensor) -> Tensor:
        if self.bounds is None:
            return real
        low, high = self.bounds
        least = torch.finfo(real.dtype).eps
        share = real.sigmoid().clamp(least, 1 - least)  # a pixel that is rounded to its bound would have no density
        return (share - self.margin) * ((high - low) / (1 - 2 * self.margin)) + low

    def _in_rows(self, f: Callable[[Tensor, Tensor], tuple[Tensor, ...]], x: Tensor) -> tuple[Tensor, ...]:
        """Return the results of a function of images ``(B, C, H, W)`` and contexts, in the leading dimensions of both.

        Results of the shape of the images come in that of x.
        """
        event_dim = len(self.image_shape)
        lead = broadcast_shape(x.shape[: x.dim() - event_dim], self.context.shape[:-1])
        images = x.expand(lead + self.image_shape).reshape(-1, *self.image_shape)
        images = images if event_dim == 3 else images.unsqueeze(1)
        contexts = self.context.expand(*lead, -1).reshape(len(images), -1)

        # a rounded pixel has another density: the networks keep the precision of their weights under autocast
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type != "cpu" or len(images) <= BLOCK_ROWS:
                found = f(images, contexts)
            else:
                blocks = zip(images.split(BLOCK_ROWS), contexts.split(BLOCK_ROWS), strict=True)
                found = tuple(torch.cat(parts) for parts in zip(*(f(*block) for block in blocks), strict=True))
        return tuple(y.reshape(lead + self.image_shape) if y.dim() > 1 else y.reshape(lead) for y in found)


class ImageFlowDistribution(dist.TransformedDistribution):
    """The distribution of images given contexts; its density takes one pass of the networks."""

    def log_prob(self, value: Tensor) -> Tensor:
        noise, log_det = self.transforms[0].noise(value)
        log_prob: Tensor = self.base_dist.log_prob(noise) + log_det
        return log_prob
