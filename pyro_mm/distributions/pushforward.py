"""The distribution of a generator's output: noise through a network, with draws and without a density."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from pyro.distributions import ExpandedDistribution, MaskedDistribution, TorchDistribution
from torch import Size, Tensor
from torch.distributions import Distribution, Independent, constraints

from ..utils.network_keywords import call_network
from .base import Composite


class Pushforward(TorchDistribution):
    r"""The distribution of :math:`x = g(c, u), u \sim N(0, I)`, whose density is not known.

    Args:
        generator: g, a module of one tensor ``(.., N, F + U)``, the parents c and the noise u behind each other.
        parents: c, ``(.., N, F)``.
        noise: U, the number of dimensions of u.
        event_shape: the shape of one value; None for one dimension, whose size the first draw shows.
        known: holds the event shape under ``"event_shape"`` once it is known, for all distributions of one generator.
        keywords: lengths or covariates that the generator asks for.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = True

    def __init__(
        self,
        generator: Callable[..., Tensor],
        parents: Tensor,
        noise: int,
        event_shape: Size | None,
        known: dict[str, Size],
        keywords: Mapping[str, Any],
    ):
        self.generator = generator
        self.parents = parents
        self.noise = noise
        self._shape = event_shape
        self._known = known
        self._keywords = keywords
        super().__init__(parents.shape[:-1], validate_args=False)

    @property
    def keywords(self) -> tuple[str, ...]:
        """Names of what the generator gets beside parents and noise: lengths, covariates."""
        return tuple(self._keywords)

    @property
    def event_dim(self) -> int:
        return 1 if self._shape is None else len(self._shape)

    @property
    def event_shape(self) -> Size:
        if self._shape is not None:
            return self._shape
        if "event_shape" not in self._known:
            devices = [self.parents.device] if self.parents.device.type == "cuda" else []
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                self.sample()
        return self._known["event_shape"]

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return constraints.independent(constraints.real, self.event_dim)

    def expand(self, batch_shape: Sequence[int], _instance: Distribution | None = None) -> Self:
        parents = self.parents.expand(*batch_shape, self.parents.shape[-1])
        return type(self)(self.generator, parents, self.noise, self._shape, self._known, self._keywords)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Return draws ``(*sample_shape, *batch_shape, *event_shape)``, with a gradient to generator and parents.

        Raises:
            TypeError, ValueError: the generator returns no tensor, or one of another shape.
        """
        lead = (*sample_shape, *self.batch_shape)
        noise = torch.randn(*lead, self.noise, dtype=self.parents.dtype, device=self.parents.device)
        parents = self.parents.expand(*lead, self.parents.shape[-1])
        x = call_network(self.generator, (torch.cat([parents, noise], -1),), dict(self._keywords))
        if not isinstance(x, Tensor):
            raise TypeError(f"Implicit: expected a tensor from the generator, got {type(x).__name__}")
        if self._shape is not None and x.shape == (*lead, self._shape.numel()):
            x = x.reshape(*lead, *self._shape)
        fits = x.shape[: len(lead)] == lead and x.dim() == len(lead) + self.event_dim
        if not fits or (self._shape is not None and x.shape[len(lead) :] != self._shape):
            wanted = "(.., D)" if self._shape is None else f"(.., {', '.join(map(str, self._shape))})"
            raise ValueError(
                f"Implicit: expected draws of shape {wanted} from the generator for parents and noise of shape "
                f"{(*lead, self.parents.shape[-1] + self.noise)}, got {tuple(x.shape)}: give Implicit the event_shape"
            )
        if self._shape is None:
            self._known["event_shape"] = x.shape[len(lead) :]
        return x.to(torch.promote_types(x.dtype, torch.float32))

    def log_prob(self, value: Tensor) -> Tensor:
        """Raise a NotImplementedError: there is no density."""
        raise NotImplementedError("it is implicit, a generator that only gives draws")


def find_pushforward(d: Any) -> Pushforward | None:
    """Return the pushforward that a distribution is, under masks and expansions; None for any other distribution."""
    while isinstance(d, (Independent, MaskedDistribution, ExpandedDistribution)):
        d = d.base_dist
    if isinstance(d, Pushforward):
        return d
    parts = d._parts if isinstance(d, Composite) else ()
    return next((found for part in parts if (found := find_pushforward(part)) is not None), None)
