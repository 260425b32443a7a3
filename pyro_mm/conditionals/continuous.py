"""Families of real vectors: Normal and Laplace, independent or with covariances, and mixtures of Normals."""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn

from ..distributions.mixture import Mixture
from ..utils.arguments import check_integer, check_number
from ..utils.tensors import constant
from .base import Conditional

SCALE_FLOOR = 1e-4
LEAST_FIXED_SCALE = 1e-30


class _LocationScale(Conditional):
    """The base class of :class:`Normal` and :class:`Laplace`."""

    family: type[dist.Normal] | type[dist.Laplace]

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int] | None = None,
        scale: float | nn.Parameter | None = None,
        least_scale: float | None = None,
    ) -> None:
        super().__init__(net, event_shape)
        self.log_scale = scale if isinstance(scale, nn.Parameter) else None
        fixed = scale is not None and not isinstance(scale, nn.Parameter)
        self.scale = check_number("scale", scale, above=LEAST_FIXED_SCALE) if fixed else None
        if fixed and least_scale is not None:
            raise ValueError(
                f"scale={scale} is fixed, and least_scale={least_scale} bounds a learned one: leave out one"
            )
        floor = 0.0 if self.log_scale is not None else SCALE_FLOOR
        self.least_scale = floor if least_scale is None else check_number("least_scale", least_scale, least=0, below=1)
        if self.scale is not None:
            self.least_scale = self.scale

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Return the distribution with location and scale ``(.., *event_shape)`` from the network's output."""
        d = self.family(*self._loc_and_scale(output), validate_args=False)
        if self.scale is None or not self.event_dim:
            return d.to_event(self.event_dim)
        fixed = _FixedScale(d, self.event_dim, validate_args=False)
        fixed.scale_value = self.scale
        return fixed

    def _loc_and_scale(self, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return location and scale, each ``(.., *event_shape)``."""
        if self.log_scale is not None:
            (loc,) = self._chunk(output, 1)
            return loc, (self.least_scale + self.log_scale.to(loc.dtype).exp()).expand_as(loc)
        if self.scale is not None:
            (loc,) = self._chunk(output, 1)
            return loc, constant((self.scale,), loc.dtype, loc.device).expand_as(loc)
        loc, raw = self._chunk(output, 2)
        return loc, _positive(raw, self.least_scale)


def _positive(raw: Tensor, floor: float = SCALE_FLOOR) -> Tensor:
    """Map real numbers to scales above a floor."""
    # The offset makes the scale 1 where raw is 0, about what a fresh network returns.
    return floor + nn.functional.softplus(raw + math.log(math.expm1(1 - floor)))


class Normal(_LocationScale):
    r"""A Gaussian with diagonal covariance, :math:`N(\mu(parents), \sigma^2)`.

    Args:
        net: a module from the parents to :math:`\mu` and r, ``(.., 2 * D)``; to :math:`\mu` alone, ``(.., D)``, if a
            scale is given.
        event_shape: the shape of one value, or None for one dimension of any size.
        scale: None for :math:`\sigma = 10^{-4} + \mathrm{softplus}(r + c)`, with c such that r = 0 gives
            :math:`\sigma = 1`; a number for a fixed :math:`\sigma`; a Parameter, broadcast over the event, for a
            learned :math:`\log\sigma`.
        least_scale: lower bound of a learned :math:`\sigma`, in [0, 1), in the place of the :math:`10^{-4}` above;
            added to the exponential of a Parameter. None for :math:`10^{-4}`, or 0 with a Parameter.

    Example:
        >>> decoder = Normal(nn.Linear(2, 3), scale=0.5)
        >>> decoder(torch.zeros(5, 2))
        _FixedScale(Normal(loc: torch.Size([5, 3]), scale: torch.Size([5, 3])), 1)

    Raises:
        ValueError: in ``forward``, the network's output has another size.
    """

    family = dist.Normal


class Laplace(_LocationScale):
    r"""Independent Laplace variables.

    .. math:: p(x) = \exp(-|x - \mu| / \sigma) / (2 \sigma)

    Args:
        net, event_shape, scale, least_scale: as in :class:`Normal`: the module from the parents to :math:`\mu` (and to
            r, from which :math:`\sigma` is computed, if ``scale`` is None), the shape of x, and :math:`\sigma`.
    """

    family = dist.Laplace


class MultivariateNormal(Conditional):
    r"""A Gaussian with a full covariance matrix.

    .. math:: N(\mu, L L^T), \qquad L = \mathrm{diag}(s) (I + N)

    Args:
        net: a module from the parents to :math:`\mu`, r and the entries of the strictly lower triangular N, row by row:
            ``(.., D (D + 3) / 2)``. s is computed from r as the :math:`\sigma` of :class:`Normal`; an output of zeros
            gives N(0, I).

    As a posterior it leaves the axes of the latents to the model; a diagonal one pulls them to those along which the
    exact posterior factorises. Products of experts do not take it.

    Raises:
        ValueError: in ``forward``, the network's output has another size.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Return the Gaussian whose parameters are ``(.., D (D + 3) / 2)`` numbers."""
        size = (math.isqrt(9 + 8 * output.shape[-1]) - 3) // 2
        if size < 1 or size * (size + 3) // 2 != output.shape[-1]:
            raise ValueError(f"expected D (D + 3) / 2 outputs of the network for some D, got {output.shape[-1]}")
        loc, raw, below = output.split([size, size, size * (size - 1) // 2], -1)
        # row i of N has its i entries, and a 1 behind them
        rows = zip(below.split(list(range(size)), -1), range(size), strict=True)
        unit = [nn.functional.pad(nn.functional.pad(row, (0, 1), value=1.0), (0, size - 1 - i)) for row, i in rows]
        scale_tril = _positive(raw)[..., None] * torch.stack(unit, -2)
        return dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)


class NormalMixture(Conditional):
    r"""A mixture of diagonal Gaussians whose weights depend on the parents: :math:`\sum_c \pi_c N(\mu_c, \sigma_c^2)`.

    Args:
        net: a module from the parents to K logits, followed by :math:`\mu_c` and r of each component as in
            :class:`Normal`: ``(.., K + 2 * K * D)``.
        components: the number of components K.

    Draws have implicit reparameterisation gradients, the weights' included. These vary wildly if components lie far
    apart; ``IWAE(stratified=...)`` is then better. See :class:`~pyro_mm.distributions.Mixture`.

    Raises:
        ValueError: in ``forward``, the network's output has another size.
    """

    def __init__(self, net: nn.Module, components: int) -> None:
        super().__init__(net)
        self.components = check_integer("components", components, least=1)

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Return the mixture whose parameters are ``(.., K + 2 * K * D)`` numbers."""
        k = self.components
        if output.shape[-1] <= k or (output.shape[-1] - k) % (2 * k):
            raise ValueError(f"expected {k} + 2 * {k} * D outputs of the network, got {output.shape[-1]}")
        loc, raw = output[..., k:].unflatten(-1, (2, k, -1)).unbind(-3)
        components = dist.Normal(loc, _positive(raw), validate_args=False).to_event(1)
        return Mixture(components, output[..., :k].log_softmax(-1))


class _FixedScale(dist.Independent):
    r"""Independent Normal or Laplace variables with one fixed scale, scored by one sum and one constant.

    .. math:: -\tfrac{1}{2 \sigma^2} \sum_d (x_d - \mu_d)^2 - D \log(\sigma \sqrt{2 \pi}), \qquad
              -\tfrac1\sigma \sum_d |x_d - \mu_d| - D \log(2 \sigma)
    """

    scale_value: float

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        new = super().expand(batch_shape, _instance)
        new.scale_value = self.scale_value
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        loc = self.base_dist.loc
        shape = broadcast_shape(loc.shape, value.shape)
        dtype = torch.promote_types(loc.dtype, value.dtype)
        if isinstance(self.base_dist, dist.Normal):
            distance = nn.functional.mse_loss
            weight = 0.5 / self.scale_value**2
            normaliser = self.scale_value * math.sqrt(2 * math.pi)
        else:
            distance = nn.functional.l1_loss
            weight = 1 / self.scale_value
            normaliser = 2 * self.scale_value

        # a loss of torch makes one pass over the data, and one over its gradient; a difference and its square, several
        each = distance(loc.expand(shape).to(dtype), value.expand(shape).to(dtype), reduction="none")
        total = each.flatten(each.dim() - self.reinterpreted_batch_ndims).sum(-1)
        return -weight * total - math.prod(self.event_shape) * math.log(normaliser)
