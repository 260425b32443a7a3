"""Distributions given by flows: noise transformed by an invertible map."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor

from ..utils.arguments import describe


def flow_distribution(flow: Any, dtype: torch.dtype) -> FlowDistribution:
    """Return the distribution of a flow of zuko.

    Args:
        flow: a distribution of zuko, with a ``transform`` to the noise and a ``base``. Its event shape is ``(D,)``.
        dtype: of the flow's parameters.

    Raises:
        TypeError: another object.
    """
    if not hasattr(flow, "transform") or not hasattr(flow, "base"):
        raise TypeError(f"expected a flow of zuko, with a transform and a base, got one that gives {describe(flow)}")
    return FlowDistribution(flow.base, [InverseFlow(flow.transform, dtype)], validate_args=False)


class FlowDistribution(dist.TransformedDistribution):
    """A transformed distribution whose density takes one pass of the flow's networks.

    It has ``rsample``, and draws can be made from given noise, unlike those of ``pyro.contrib.zuko.ZukoToPyro``.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        # as wide as the context, which the slopes of zuko's transformations are not by themselves
        value = value.expand(broadcast_shape(value.shape, self.batch_shape + self.event_shape))
        noise, log_slope = self.transforms[0].flow.call_and_ladj(value)
        log_prob: Tensor = self.base_dist.log_prob(noise) + log_slope
        return log_prob


class InverseFlow(torch.distributions.Transform):
    """The transformation from noise to a draw: the inverse of a flow's. Noise may have any dtype."""

    domain = codomain = torch.distributions.constraints.real_vector
    bijective = True

    def __init__(self, flow: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.flow = flow
        self.dtype = dtype

    def _call(self, x: Tensor) -> Tensor:
        x_of_noise: Tensor = self.flow.inv(x.to(self.dtype))
        return x_of_noise

    def _inverse(self, y: Tensor) -> Tensor:
        noise: Tensor = self.flow(y)
        return noise

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        log_slope: Tensor = -self.flow.log_abs_det_jacobian(y, x)
        return log_slope
