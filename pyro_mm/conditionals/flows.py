"""Distributions given by normalising flows."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn

from ..utils.arguments import check_function, describe
from .base import Conditional


class Flow(Conditional):
    r"""A normalising flow whose transformation depends on the parents.

    .. math:: x = f_c^{-1}(u), \quad u \sim N(0, I), \quad c = \mathrm{net}(parents), \qquad
        p(x) = N(f_c(x); 0, I) \, |\det \partial f_c / \partial x|

    Args:
        net: a module from the parents to the context c, ``(.., C)``.
        flow: a flow of :mod:`zuko`, such as ``zuko.flows.MAF(features=D, context=C)``: a module that maps a context
            to a distribution with a ``transform`` f to a ``base``. Its event shape is ``(D,)``.

    An autoregressive flow scores in one pass and draws in D passes; coupling layers (``NICE``, ``RealNVP``) take one
    pass for either.

    Raises:
        TypeError: in ``forward``, the flow returns no distribution of zuko.

    References:
        Rezende & Mohamed 2015 (arXiv:1505.05770); Papamakarios et al. 2017 (arXiv:1705.07057).
    """

    def __init__(self, net: nn.Module, flow: nn.Module) -> None:
        super().__init__(net)
        self.flow = check_function("flow", flow, ("context",))

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Return the flow's distribution given the context ``(.., C)``."""
        d = self.flow(output)
        if not hasattr(d, "transform") or not hasattr(d, "base"):
            raise TypeError(f"expected a flow of zuko, with a transform and a base, got one that gives {describe(d)}")
        return _FlowDistribution(d.base, [_InverseFlow(d.transform, output.dtype)], validate_args=False)


class _InverseFlow(torch.distributions.Transform):
    """The transformation from noise to a draw: the inverse of a flow's. Noise may have any dtype."""

    domain = codomain = torch.distributions.constraints.real_vector
    bijective = True

    def __init__(self, flow: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.flow = flow
        self.dtype = dtype

    def _call(self, x: Tensor) -> Tensor:
        return self.flow.inv(x.to(self.dtype))

    def _inverse(self, y: Tensor) -> Tensor:
        return self.flow(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.flow.log_abs_det_jacobian(y, x)


class _FlowDistribution(dist.TransformedDistribution):
    """A transformed distribution whose density takes one pass of the flow's networks.

    It has ``rsample``, and draws can be made from given noise, unlike those of ``pyro.contrib.zuko.ZukoToPyro``.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        # as wide as the context, which the slopes of zuko's transformations are not by themselves
        value = value.expand(broadcast_shape(value.shape, self.batch_shape + self.event_shape))
        noise, log_slope = self.transforms[0].flow.call_and_ladj(value)
        return self.base_dist.log_prob(noise) + log_slope
