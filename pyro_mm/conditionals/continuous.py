"""Families of real vectors: Normal and Laplace variables, Normal ones that depend on each other, and mixtures."""

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
LEAST_SCALE = 1e-30  # of a fixed scale


class _LocationScale(Conditional):
    """Shared by :class:`Normal` and :class:`Laplace`."""

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int] | None = None,
        scale: float | nn.Parameter | None = None,
    ) -> None:
        super().__init__(net, event_shape)
        self.log_scale = scale if isinstance(scale, nn.Parameter) else None
        fixed = scale is not None and not isinstance(scale, nn.Parameter)
        self.scale = check_number("scale", scale, above=LEAST_SCALE) if fixed else None

    family: type[dist.Normal] | type[dist.Laplace]

    def forward(self, *parents: Tensor) -> dist.TorchDistribution:
        d = self.family(*self._loc_and_scale(parents), validate_args=False)
        if self.scale is None or not self.event_dim:
            return d.to_event(self.event_dim)
        fixed = _OfScale(d, self.event_dim, validate_args=False)
        fixed.number = self.scale
        return fixed

    def _loc_and_scale(self, parents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if self.log_scale is not None:
            (loc,) = self._parameters_of(parents, 1)
            return loc, self.log_scale.to(loc.dtype).exp().expand_as(loc)
        if self.scale is not None:
            (loc,) = self._parameters_of(parents, 1)
            return loc, constant((self.scale,), loc.dtype, loc.device).expand_as(loc)
        loc, raw = self._parameters_of(parents, 2)
        return loc, _scale(raw)


def _scale(raw: Tensor) -> Tensor:
    # The offset makes the scale 1 where raw is 0, about what a fresh network returns.
    return SCALE_FLOOR + nn.functional.softplus(raw + math.log(math.expm1(1 - SCALE_FLOOR)))


class Normal(_LocationScale):
    r"""A diagonal Gaussian, :math:`N(\mu(parents), \sigma)`.

    Args:
        net: gives :math:`\mu` and r, or :math:`\mu` alone where the scale is given.
        event_shape: the shape of one value, or None for one dimension of any size.
        scale: None for :math:`\sigma = 10^{-4} + \mathrm{softplus}(r + c)`, with c such that r = 0 gives
            :math:`\sigma = 1`; a number for a fixed :math:`\sigma`; a Parameter, broadcast over the event, for a
            learned :math:`\log\sigma`.

    Raises:
        ValueError: in ``forward``, the network's output does not fit.
    """

    family = dist.Normal


class Laplace(_LocationScale):
    r"""Independent Laplace variables; the arguments are those of :class:`Normal`.

    .. math:: p(x) = \exp(-|x - \mu| / \sigma) / (2 \sigma)
    """

    family = dist.Laplace


class MultivariateNormal(Conditional):
    r"""A Gaussian whose dimensions depend on each other.

    .. math:: N(\mu, L L^T), \qquad L = \mathrm{diag}(s) (I + N)

    Args:
        net: gives :math:`\mu`, r and the entries of the strictly lower triangular N, row by row:
            ``(.., D (D + 3) / 2)``. s comes of r as :class:`Normal`'s :math:`\sigma` does, and 0 everywhere is N(0, I).

    As a posterior it leaves the axes of the latents to the model, where a diagonal one pulls them to those along which
    the exact posterior factorises. No product of experts takes it.

    Raises:
        ValueError: in ``forward``, the network's output does not fit.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net)

    def forward(self, *parents: Tensor) -> dist.TorchDistribution:
        out = self.output(parents)
        size = (math.isqrt(9 + 8 * out.shape[-1]) - 3) // 2
        if size < 1 or size * (size + 3) // 2 != out.shape[-1]:
            raise ValueError(f"expected D (D + 3) / 2 outputs of the network for some D, got {out.shape[-1]}")
        loc, raw, below = out.split([size, size, size * (size - 1) // 2], -1)
        # row i of N has its i entries, and a 1 behind them
        rows = zip(below.split(list(range(size)), -1), range(size), strict=True)
        unit = [nn.functional.pad(nn.functional.pad(row, (0, 1), value=1.0), (0, size - 1 - i)) for row, i in rows]
        scale_tril = _scale(raw)[..., None] * torch.stack(unit, -2)
        return dist.MultivariateNormal(loc, scale_tril=scale_tril, validate_args=False)


class NormalMixture(Conditional):
    r"""A mixture of diagonal Gaussians, weights and all: :math:`\sum_c \pi_c N(\mu_c, \sigma_c^2)`.

    Args:
        net: gives K logits, and then :math:`\mu_c` and r of each component as :class:`Normal` has them:
            ``(.., K + 2 K D)``.
        components: K.

    Its draws are differentiated implicitly, so that the weights learn by them too. Where components lie far apart that
    gradient varies wildly: ``IWAE(stratified=...)`` then does better. See :class:`~pyro_mm.distributions.Mixture`.

    Raises:
        ValueError: in ``forward``, the network's output does not fit.
    """

    def __init__(self, net: nn.Module, components: int) -> None:
        super().__init__(net)
        self.components = check_integer("components", components, least=1)

    def forward(self, *parents: Tensor) -> dist.TorchDistribution:
        out, k = self.output(parents), self.components
        if out.shape[-1] <= k or (out.shape[-1] - k) % (2 * k):
            raise ValueError(f"expected {k} + 2 * {k} * D outputs of the network, got {out.shape[-1]}")
        loc, raw = out[..., k:].unflatten(-1, (2, k, -1)).unbind(-3)
        components = dist.Normal(loc, _scale(raw), validate_args=False).to_event(1)
        return Mixture(components, out[..., :k].log_softmax(-1))


class _OfScale(dist.Independent):
    r"""Independent Normal or Laplace variables of one fixed scale, scored by one sum and one constant.

    .. math:: -\tfrac{1}{2 \sigma^2} \sum_d (x_d - \mu_d)^2 - D \log(\sigma \sqrt{2 \pi}), \qquad
              -\tfrac1\sigma \sum_d |x_d - \mu_d| - D \log(2 \sigma)
    """

    number: float

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        new = super().expand(batch_shape, _instance)
        new.number = self.number
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        loc, normal, number = self.base_dist.loc, isinstance(self.base_dist, dist.Normal), self.number
        shape = broadcast_shape(loc.shape, value.shape)
        dtype = torch.promote_types(loc.dtype, value.dtype)
        # one pass over the data, and one over its gradient, where a difference and its square take several
        apart = nn.functional.mse_loss if normal else nn.functional.l1_loss
        each = apart(loc.expand(shape).to(dtype), value.expand(shape).to(dtype), reduction="none")
        total = each.flatten(each.dim() - self.reinterpreted_batch_ndims).sum(-1)
        weight, unit = (0.5 / number**2, number * math.sqrt(2 * math.pi)) if normal else (1 / number, 2 * number)
        return -weight * total - math.prod(self.event_shape) * math.log(unit)
