r"""Bijections from standard Normal numbers to draws of other distributions, precise in both tails."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Exponential, HalfNormal, Laplace, Transform, Uniform, constraints
from torch.special import log_ndtr, ndtri

from .base import base_distribution

FAMILIES = (Laplace, Exponential, HalfNormal, Uniform)


class NormalScores(Transform):
    r"""The increasing bijection :math:`z = F^{-1}(\Phi(u))`, F being the distribution function of a distribution.

    So u is standard Normal if z has that distribution. Tail probabilities are computed by themselves, and not as 1 - F.

    Args:
        d: a univariate Laplace, Exponential, HalfNormal or Uniform.

    Example:
        >>> transform = NormalScores(Laplace(torch.tensor(0.0), torch.tensor(1.0)))
        >>> u = torch.tensor([-10.0, 0.0, 10.0])
        >>> bool(torch.allclose(transform.inv(transform(u)), u))
        True
    """

    domain = constraints.real
    bijective = True
    sign = 1

    def __init__(self, d: Distribution):
        super().__init__()
        self.d: Any = d

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def codomain(self) -> Any:
        """The support of the distribution."""
        return self.d.support

    def same_parameters(self, other: NormalScores) -> bool:
        """Return True if the other bijection is of the same distribution."""
        names = self.d.arg_constraints
        return type(self.d) is type(other.d) and all(
            torch.equal(getattr(self.d, name), getattr(other.d, name)) for name in names
        )

    def _call(self, u: Tensor) -> Tensor:
        value: Tensor
        d = self.d
        if isinstance(d, Laplace):
            value = d.loc - d.scale * u.sign() * (math.log(2) + log_ndtr(-u.abs()))
            return value
        if isinstance(d, Exponential):
            value = -log_ndtr(-u) / d.rate
            return value
        if isinstance(d, HalfNormal):
            body = math.sqrt(2) * torch.erfinv(_lower_tail(u.clamp(max=0)))
            return d.scale * torch.where(u < 0, body, -ndtri(0.5 * _lower_tail(-u.clamp(min=0))))
        value = d.low + (d.high - d.low) * _lower_tail(u)
        return value

    def _inverse(self, z: Tensor) -> Tensor:
        below, above = self._tails(z)
        smaller = torch.minimum(below, above).clamp(min=torch.finfo(z.dtype).tiny)
        score: Tensor = torch.where(below < above, 1.0, -1.0) * ndtri(smaller)
        return score

    def log_abs_det_jacobian(self, u: Tensor, z: Tensor) -> Tensor:
        """Return log dz/du, of the shape of u."""
        d = self.d
        log_density = -(d.high - d.low).log() if isinstance(d, Uniform) else d.log_prob(z)
        return -0.5 * (u.square() + math.log(2 * math.pi)) - log_density

    def _tails(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the probabilities below and above z."""
        d = self.d
        if isinstance(d, Laplace):
            tail = 0.5 * (-((z - d.loc) / d.scale).abs()).exp()
            return torch.where(z < d.loc, tail, 1 - tail), torch.where(z < d.loc, 1 - tail, tail)
        if isinstance(d, Exponential):
            return -torch.expm1(-d.rate * z), (-d.rate * z).exp()
        if isinstance(d, HalfNormal):
            return torch.erf(z / (d.scale * math.sqrt(2))), 2 * _lower_tail(-z / d.scale)
        return (z - d.low) / (d.high - d.low), (d.high - z) / (d.high - d.low)


def normal_scores(d: Distribution) -> NormalScores | None:
    """Return the bijection from standard Normal numbers to draws of a distribution, entry by entry.

    Args:
        d: a distribution, also one inside of ``expand`` and ``to_event``.

    Returns:
        The bijection; None unless the family is Laplace, Exponential, HalfNormal or Uniform.
    """
    base = base_distribution(d)
    return NormalScores(base) if isinstance(base, FAMILIES) else None


def _lower_tail(u: Tensor) -> Tensor:
    """Return the standard Normal distribution function; ``torch.special.ndtr`` cancels in the tail."""
    tail: Tensor = log_ndtr(u).exp()
    return tail
