"""Mixtures of experts, choices and restrictions: plain Pyro distributions.

Nothing here looks at a tensor's values in Python, so all of it traces with ``make_fx`` and can be captured in
a CUDA graph. For the same reason nothing here validates more than shapes.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import broadcast_shape  # torch's own takes longer than what its result is for
from torch import Size, Tensor
from torch.distributions import Distribution

from ..utils.arguments import check_tensor
from .base import (
    Composite,
    append_dims,
    base_distribution,
    check_distribution,
    diagonal,
    expand_distribution,
    expand_to,
    gumbel,
    select_components,
)
from .where import Where


class Mixture(Composite):
    r"""A mixture along the last batch dimension of ``components``.

    .. math:: p(z) = \sum_c w_c \, p_c(z)

    A draw takes an index from the weights, for every element by itself, and that component's pathwise draw. Its
    derivative tells how the draw moves with the *components*; the weights act through the index, which has none.
    With learned weights a pathwise gradient would silently lack that term, so ``has_rsample`` then holds only for
    Normal components, whose draw is differentiated implicitly, with ``F_d(z_d | z_<d)`` held fixed for every entry d:

    .. math:: \frac{\partial z}{\partial\phi} = -\Big(\frac{\partial F}{\partial z}\Big)^{-1}
        \frac{\partial F}{\partial\phi}, \qquad F_d(z_d | z_{<d}) = \sum_c w_c(z_{<d}) \, \Phi_{cd}(z_d), \quad
        w_c(z_{<d}) \propto w_c \prod_{e < d} p_{ce}(z_e).

    Figurnov et al. 2018 (arXiv:1805.08498), section 4. Right in the mean, but a draw between two components moves by
    the inverse of the density there: at 3 standard deviations from either, the derivative with respect to a weight has
    a standard deviation of 4 about a mean of 1.5, and at 4 one of 47 about 2. ``IWAE(stratified=...)`` has none.

    Args:
        components: a distribution of batch shape ``(*B, C)``.
        log_weights: broadcastable with ``(*B, C)``, normalised here; ``-inf`` leaves a component out of a row. A row
            of nothing but ``-inf`` counts as one of equal weights: finite, for its maker to mask.

    Raises:
        ValueError: the components have no batch dimension, or the last dimensions do not match.
    """

    def __init__(self, components: TorchDistribution, log_weights: Tensor) -> None:
        check_distribution("components", components)
        check_tensor("log_weights", log_weights)
        if not components.batch_shape or log_weights.shape[-1:] not in [(1,), components.batch_shape[-1:]]:
            shapes = f"{tuple(components.batch_shape)} and {tuple(log_weights.shape)}"
            raise ValueError(f"expected components and log_weights of shape (*B, C), got {shapes}")
        self.num_components: int = components.batch_shape[-1]
        log_weights = log_weights.expand(*log_weights.shape[:-1], self.num_components)
        nothing = log_weights.isneginf().all(-1, keepdim=True)
        self._log_weights = log_weights.masked_fill(nothing, 0.0).log_softmax(-1)
        self._components = components
        batch_shape = Size(broadcast_shape(components.batch_shape[:-1], log_weights.shape[:-1]))
        super().__init__(batch_shape, components)

    @property
    def components(self) -> TorchDistribution:
        """The components, with batch shape ``(*B, C)``."""
        return expand_distribution(self._components, self.batch_shape + (self.num_components,))

    @property
    def log_weights(self) -> Tensor:
        """The normalised log weights, of shape ``(*B, C)``."""
        return self._log_weights.expand(self.batch_shape + (self.num_components,))

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return super().has_rsample and (not self._log_weights.requires_grad or self._normal)

    @property
    def _normal(self) -> bool:
        return isinstance(base_distribution(self._components), torch.distributions.Normal)

    @property
    def mean(self) -> Tensor:
        return self._average(self._components.mean)

    @property
    def variance(self) -> Tensor:
        between = (self._components.mean - self.mean.unsqueeze(-1 - self.event_dim)).square()
        return self._average(self._components.variance + between)

    def _average(self, x: Tensor) -> Tensor:
        weights = append_dims(self._log_weights.exp(), self.event_dim)
        return (weights * x).sum(-1 - self.event_dim).expand(self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        log_p = self._components.log_prob(value.unsqueeze(-1 - self.event_dim))
        # Filled, since -inf + log_p is NaN where the density of a component that is left out is not finite.
        joint = (self._log_weights + log_p).masked_fill(self._log_weights.isneginf(), -math.inf)
        return expand_to(joint.logsumexp(-1), self.batch_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self._draw(self._index(sample_shape), pathwise=False)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        if not self.has_rsample:
            raise NotImplementedError(
                "a pathwise draw needs components with rsample, and takes no gradient to the weights of any that are "
                "not Normal: detach log_weights, use sample and a score-function estimator, or stratify by "
                "component_rsample"
            )
        if self._log_weights.requires_grad:
            return self._implicit(self.sample(sample_shape))
        return self._draw(self._index(sample_shape), pathwise=True)

    def component_rsample(self, index: Tensor) -> Tensor:
        """A pathwise draw from component ``index`` of every element, whatever the weights (to stratify).

        Args:
            index: a long tensor that broadcasts with the batch shape, which is that of the draw.
        """
        return self._draw(expand_to(index, self.batch_shape), pathwise=True)

    def component_sample(self, index: Tensor) -> Tensor:
        """As :meth:`component_rsample`, but of components without rsample too, and without a derivative."""
        with torch.no_grad():
            return self._draw(expand_to(index, self.batch_shape), pathwise=False)

    def chosen(self, index: Tensor) -> TorchDistribution:
        """Component ``index`` of every element, for components that are Normal or Laplace.

        Args:
            index: a long tensor of shape ``(.., *batch_shape)``, which is the result's batch shape.

        Raises:
            NotImplementedError: components of another family.
        """
        family: Any = type(base_distribution(self._components))
        if not issubclass(family, (torch.distributions.Normal, torch.distributions.Laplace)):
            raise NotImplementedError(f"components of type {family.__name__} cannot be taken one by one")
        loc, scale = (select_components(x, index, self.event_dim) for x in diagonal(self._components))
        return family(loc, scale, validate_args=False).to_event(self.event_dim)

    def _index(self, sample_shape: Sequence[int]) -> Tensor:
        like = self._log_weights
        shape = Size(sample_shape) + self.batch_shape + (self.num_components,)
        return (like + gumbel(torch.rand(shape, dtype=like.dtype, device=like.device))).argmax(-1)

    def _implicit(self, z: Tensor) -> Tensor:
        """``z``, ``(*, *batch, *event)``, with the derivative of a draw that keeps its values of F."""
        n = self.event_dim
        flat = lambda x: x.flatten(x.dim() - n) if n else x[..., None]  # noqa: E731
        loc, scale = map(flat, diagonal(self._components))  # (*B, C, D)
        out = self._log_weights.isneginf()[..., None]
        loc, scale = loc.masked_fill(out, 0.0), scale.masked_fill(out, 1.0)
        noise = (flat(z).unsqueeze(-2) - loc) / scale
        log_p = -0.5 * noise.square() - scale.log()
        before = torch.cat([torch.zeros_like(log_p[..., :1]), log_p[..., :-1].cumsum(-1)], -1)
        share = (self._log_weights[..., None] + before).softmax(-2)  # w_c(z_<d)
        below = share * torch.special.ndtr(noise)
        cdf = below.sum(-2)
        with torch.no_grad():
            slope = -noise / scale  # of the log-density of one entry of a component
            moved = below.mT @ slope - cdf[..., None] * (share.mT @ slope)
            density = (share * log_p.exp()).sum(-2) / math.sqrt(2 * math.pi)
            tiny = torch.finfo(density.dtype).tiny
            jacobian = moved.tril(-1) + torch.diag_embed(density.clamp(min=tiny))
        step = torch.linalg.solve_triangular(jacobian, (cdf - cdf.detach())[..., None], upper=False)[..., 0]
        return z - step.reshape(z.shape)

    def _draw(self, index: Tensor, pathwise: bool) -> Tensor:
        """The draw of component ``index``, of shape ``(*index.shape, *event_shape)``."""
        if isinstance(base_distribution(self._components), (torch.distributions.Normal, torch.distributions.Laplace)):
            return self.chosen(index).rsample()
        components = expand_distribution(self._components, index.shape + (self.num_components,))
        draws = components.rsample() if pathwise else components.sample()
        where = append_dims(index, 1 + self.event_dim).expand(index.shape + (1,) + self.event_shape)
        return draws.gather(index.dim(), where).squeeze(index.dim())


def largest_mixture(fn: Distribution) -> Mixture | None:
    """Find the mixture of most components that a distribution is, or chooses for some of its elements."""
    if isinstance(fn, Where):
        found = [m for m in (largest_mixture(fn.p), largest_mixture(fn.q)) if m is not None]
        return max(found, key=lambda m: m.num_components, default=None)
    return fn if isinstance(fn, Mixture) else None


def draw_from_stratum(fn: TorchDistribution, index: Tensor, strata: int) -> tuple[Tensor, Tensor]:
    """Draw from stratum ``index`` of a distribution, pathwise: from that component, where it is a mixture of as many.

    Elsewhere the strata are alike, each the whole distribution with weight 1 / ``strata``.

    Args:
        index: long tensor of the batch shape.
        strata: their number S.

    Returns:
        The draw, and the log-weight of its stratum, of the batch shape. The average of draws over the strata, by these
        weights, is one over the distribution.

    Raises:
        ValueError: a distribution without a pathwise draw.
    """
    if isinstance(fn, Mixture) and fn.num_components == strata:
        return fn.component_rsample(index), fn.log_weights.gather(-1, index[..., None])[..., 0]
    if isinstance(fn, Where):
        p, q = (draw_from_stratum(expand_distribution(part, fn.batch_shape), index, strata) for part in (fn.p, fn.q))
        return fn.choose(p[0], q[0]), torch.where(fn.condition, p[1], q[1])
    if not fn.has_rsample:
        raise ValueError(f"stratified draws need distributions with rsample, and {type(fn).__name__} has none here")
    value = fn.rsample()
    return value, value.new_full(fn.batch_shape, -math.log(strata))
