"""Mixtures whose draws are differentiable, and stratified draws from them.

Nothing here reads a tensor's values in Python, so that it traces with ``make_fx`` and can be captured in a CUDA graph.
For the same reason only shapes are validated.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import broadcast_shape  # torch's own takes longer than the operation
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

    A draw samples an index by the weights, for every element separately, and then that component, pathwise. The
    derivative of the draw is one with respect to the *components*: the weights act through the index, which has no
    derivative. With trainable weights a pathwise gradient would silently lack that part, and so ``has_rsample`` then is
    True for Normal components only, whose draw is differentiated implicitly, at fixed values of ``F_d(z_d | z_<d)``
    for every entry d:

    .. math:: \frac{\partial z}{\partial\phi} = -\Big(\frac{\partial F}{\partial z}\Big)^{-1}
        \frac{\partial F}{\partial\phi}, \qquad F_d(z_d | z_{<d}) = \sum_c w_c(z_{<d}) \, \Phi_{cd}(z_d), \quad
        w_c(z_{<d}) \propto w_c \prod_{e < d} p_{ce}(z_e).

    That gradient is unbiased, but between two components a draw moves by the inverse of the density there: at 3
    standard deviations from either, the derivative with respect to a weight has a standard deviation of 4 about a mean
    of 1.5, and at 4 one of 47 about 2. ``IWAE(stratified=...)`` does not need it.

    Args:
        components: a distribution of batch shape ``(*B, C)``.
        log_weights: broadcastable with ``(*B, C)``, normalised here; minus infinity leaves a component out of a row.
            A row with nothing else has equal weights: finite numbers, which the caller should mask.

    Raises:
        TypeError: components that are not a distribution, or log-weights that are not a tensor.
        ValueError: the components have no batch dimension, or the last dimensions do not match.

    Example:
        >>> import torch, pyro_mm as mm, pyro.distributions as dist
        >>> components = dist.Normal(torch.tensor([[0.0, 4.0]]).T, 1.0).to_event(1)  # two, in one dimension
        >>> mixture = mm.distributions.Mixture(components, torch.tensor([0.75, 0.25]).log())
        >>> mixture.batch_shape, mixture.event_shape, mixture.mean
        (torch.Size([]), torch.Size([1]), tensor([1.]))

    References:
        Figurnov et al. 2018 (arXiv:1805.08498), section 4.
    """

    def __init__(self, components: TorchDistribution, log_weights: Tensor) -> None:
        check_distribution("components", components)
        check_tensor("log_weights", log_weights)
        if not components.batch_shape or log_weights.shape[-1:] not in [(1,), components.batch_shape[-1:]]:
            shapes = f"{tuple(components.batch_shape)} and {tuple(log_weights.shape)}"
            raise ValueError(f"expected components and log_weights of shape (*B, C), got {shapes}")
        self.num_components: int = components.batch_shape[-1]
        log_weights = log_weights.expand(*log_weights.shape[:-1], self.num_components)
        all_masked = log_weights.isneginf().all(-1, keepdim=True)
        self._log_weights = log_weights.masked_fill(all_masked, 0.0).log_softmax(-1)
        self._components = components
        batch_shape = Size(broadcast_shape(components.batch_shape[:-1], log_weights.shape[:-1]))
        super().__init__(batch_shape, components)

    @property
    def components(self) -> TorchDistribution:
        """The components, a distribution of batch shape ``(*B, C)``."""
        return expand_distribution(self._components, self.batch_shape + (self.num_components,))

    @property
    def log_weights(self) -> Tensor:
        """The normalised log-weights, ``(*B, C)``."""
        return self._log_weights.expand(self.batch_shape + (self.num_components,))

    @property
    def has_rsample(self) -> bool:
        return super().has_rsample and (not self._log_weights.requires_grad or self._has_normal_components)

    @property
    def _has_normal_components(self) -> bool:
        """True if the components are Normal."""
        return isinstance(base_distribution(self._components), torch.distributions.Normal)

    @property
    def mean(self) -> Tensor:
        return self._average(self._components.mean)

    @property
    def variance(self) -> Tensor:
        between = (self._components.mean - self.mean.unsqueeze(-1 - self.event_dim)).square()
        return self._average(self._components.variance + between)

    def _average(self, x: Tensor) -> Tensor:
        """Return the weighted mean over components of ``(*B, C, *event)``."""
        weights = append_dims(self._log_weights.exp(), self.event_dim)
        return (weights * x).sum(-1 - self.event_dim).expand(self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        log_p = self._components.log_prob(value.unsqueeze(-1 - self.event_dim))
        # filled, since -inf + log_p is NaN where the density of a component with no weight is not finite
        joint = (self._log_weights + log_p).masked_fill(self._log_weights.isneginf(), -math.inf)
        return expand_to(joint.logsumexp(-1), self.batch_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            return self._draw(self._index(sample_shape), pathwise=False)

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        if not self.has_rsample:
            raise NotImplementedError(
                "a pathwise draw needs components with rsample, and gives the weights a gradient only if all "
                "components are Normal: detach log_weights, use sample and a score-function estimator, or stratify "
                "by component_rsample"
            )
        if self._log_weights.requires_grad:
            return self._implicit(self.sample(sample_shape))
        return self._draw(self._index(sample_shape), pathwise=True)

    def component_rsample(self, index: Tensor) -> Tensor:
        """Draw pathwise from one component of every element, for stratified sampling.

        Args:
            index: of the component, integers that broadcast with the batch shape.

        Returns:
            ``(*batch_shape, *event_shape)``.
        """
        return self._draw(expand_to(index, self.batch_shape), pathwise=True)

    def component_sample(self, index: Tensor) -> Tensor:
        """Draw from one component of every element, without a derivative; see :meth:`component_rsample`."""
        with torch.no_grad():
            return self._draw(expand_to(index, self.batch_shape), pathwise=False)

    def chosen(self, index: Tensor) -> TorchDistribution:
        """Return the distribution of one component of every element, for Normal or Laplace components.

        Args:
            index: of the component, integers ``(.., *batch_shape)``: the batch shape of the result.

        Raises:
            NotImplementedError: components of another family.
        """
        family: Any = type(base_distribution(self._components))
        if not issubclass(family, (torch.distributions.Normal, torch.distributions.Laplace)):
            raise NotImplementedError(f"components of type {family.__name__} cannot be taken one by one")
        loc, scale = (select_components(x, index, self.event_dim) for x in diagonal(self._components))
        return family(loc, scale, validate_args=False).to_event(self.event_dim)

    def _index(self, sample_shape: Sequence[int]) -> Tensor:
        """Sample component indices by their weights: integers ``(*sample_shape, *batch_shape)``."""
        log_weights = self._log_weights
        shape = Size(sample_shape) + self.batch_shape + (self.num_components,)
        uniform = torch.rand(shape, dtype=log_weights.dtype, device=log_weights.device)
        return (log_weights + gumbel(uniform)).argmax(-1)

    def _implicit(self, z: Tensor) -> Tensor:
        """Return a draw with its implicit derivative, at fixed values of the conditional CDFs F_d.

        Args:
            z: the draw, ``(*, *batch_shape, *event_shape)``.
        """
        event_dim = self.event_dim

        def flatten_event(x: Tensor) -> Tensor:
            return x.flatten(x.dim() - event_dim) if event_dim else x[..., None]

        loc, scale = map(flatten_event, diagonal(self._components))  # (*B, C, D)
        masked = self._log_weights.isneginf()[..., None]
        loc, scale = loc.masked_fill(masked, 0.0), scale.masked_fill(masked, 1.0)
        noise = (flatten_event(z).unsqueeze(-2) - loc) / scale

        log_p = -0.5 * noise.square() - scale.log()  # of each entry of each component, up to a constant
        log_p_before = torch.cat([torch.zeros_like(log_p[..., :1]), log_p[..., :-1].cumsum(-1)], -1)
        weights = (self._log_weights[..., None] + log_p_before).softmax(-2)  # w_c(z_<d)
        weighted_cdf = weights * torch.special.ndtr(noise)
        cdf = weighted_cdf.sum(-2)

        with torch.no_grad():
            slope = -noise / scale  # of the log-density of one entry of a component
            off_diagonal = weighted_cdf.mT @ slope - cdf[..., None] * (weights.mT @ slope)
            density = (weights * log_p.exp()).sum(-2) / math.sqrt(2 * math.pi)
            tiny = torch.finfo(density.dtype).tiny
            jacobian = off_diagonal.tril(-1) + torch.diag_embed(density.clamp(min=tiny))  # dF_d / dz_e
        step = torch.linalg.solve_triangular(jacobian, (cdf - cdf.detach())[..., None], upper=False)[..., 0]
        reparameterized: Tensor = z - step.reshape(z.shape)
        return reparameterized

    def _draw(self, index: Tensor, pathwise: bool) -> Tensor:
        """Draw from component ``index``: ``(*index.shape, *event_shape)``."""
        if isinstance(base_distribution(self._components), (torch.distributions.Normal, torch.distributions.Laplace)):
            pathwise_draw: Tensor = self.chosen(index).rsample()
            return pathwise_draw
        components = expand_distribution(self._components, index.shape + (self.num_components,))
        draws = components.rsample() if pathwise else components.sample()
        gather_index = append_dims(index, 1 + self.event_dim).expand(index.shape + (1,) + self.event_shape)
        chosen: Tensor = draws.gather(index.dim(), gather_index).squeeze(index.dim())
        return chosen


def largest_mixture(fn: Distribution) -> Mixture | None:
    """Return the mixture with the most components that a distribution is or, as a Where, contains; None for none."""
    if isinstance(fn, Where):
        found = [m for m in (largest_mixture(fn.p), largest_mixture(fn.q)) if m is not None]
        return max(found, key=lambda m: m.num_components, default=None)
    return fn if isinstance(fn, Mixture) else None


def draw_from_stratum(fn: TorchDistribution, index: Tensor, strata: int) -> tuple[Tensor, Tensor]:
    """Draw pathwise from one of S strata of a distribution.

    The strata of a mixture of S components are its components. Those of any other distribution are alike: each is the
    whole distribution, with weight 1 / S. The sum over strata of weighted functions of draws is an unbiased estimate of
    the mean under the distribution.

    Args:
        fn: the distribution.
        index: of the stratum, integers of the batch shape.
        strata: their number S.

    Returns:
        The draw ``(*batch_shape, *event_shape)``, and the log-weight of its stratum, ``batch_shape``.

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
