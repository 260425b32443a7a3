"""Posteriors that pool unimodal experts: products, mixtures, and what lies between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn

from ..batch.batch import Batch
from ..batch.masks import Presence, all_of
from ..batch.masks import subsets as all_subsets
from ..conditionals.unconditional import Unconditional
from ..distributions.base import base_distribution, diagonal
from ..distributions.gaussian_experts import STANDARD_NORMAL, consensus_of_normals, pairwise_pool, product_of_normals
from ..distributions.mixture import Mixture
from ..utils.arguments import check_mapping, check_modules, check_names, check_number, describe
from ..utils.tensors import constant
from .per_set import per_set, rows_with_any


class PosteriorOfExperts(nn.Module):
    def __init__(self, experts: Mapping[str, nn.Module]):
        super().__init__()
        self.experts = nn.ModuleDict(check_modules("experts", experts))

    def encoded(self, batch: Batch) -> tuple[list[Any], list[Presence]]:
        """The experts' distributions and their masks; a modality that the batch holds no values of has neither."""
        names = [name for name in self.experts if batch.holds(name)]
        if not names:
            raise ValueError(f"the batch holds no values of {list(self.experts)}; Batch.empty(n, like=...) would")
        return [batch.encode(name, self.experts[name]) for name in names], [batch.presence(name) for name in names]

    def parameters_of(self, batch: Batch) -> tuple[list[Tensor], list[Tensor], list[Presence]]:
        """Means and scales of Normal experts, and their masks."""
        experts, masks = self.encoded(batch)
        held = [name for name in self.experts if batch.holds(name)]
        for name, expert in zip(held, experts, strict=True):
            if not isinstance(base_distribution(expert), torch.distributions.Normal):
                raise TypeError(
                    f"expert of {name!r}: {type(self).__name__} is of Normal experts, in closed form, and got "
                    f"{family_name(expert)}: use conditionals.Normal, or MixtureOfExperts, which takes Laplace too"
                )
        locs, scales = zip(*map(diagonal, experts), strict=True)
        return list(locs), list(scales), masks


class ProductOfExperts(PosteriorOfExperts):
    r"""The normalised product of Gaussian experts and a prior expert: precisions add.

    .. math:: q(z | x_S) \propto p_0(z) \prod_{m \in S} N(z; \mu_m, \sigma_m^2), \qquad
              \sigma^{-2} = \sigma_0^{-2} + \sum_{m \in S} \sigma_m^{-2}, \quad
              \mu = \sigma^2 \Big( \mu_0 \sigma_0^{-2} + \sum_{m \in S} \mu_m \sigma_m^{-2} \Big)

    Args:
        experts: modality -> encoder.
        prior: the prior expert, a diagonal Normal. None leaves it out; q(z | nothing) is then a standard normal.

    Wu & Goodman 2018 (arXiv:1802.05335); without the prior expert, MVTCAE (Hwang et al. 2021).
    """

    def __init__(self, experts: Mapping[str, nn.Module], prior: dist.Distribution | None = STANDARD_NORMAL):
        super().__init__(experts)
        self.prior = check_prior_expert(prior)

    def forward(self, batch: Batch) -> dist.Distribution:
        loc, scale = per_set(batch, self, self._product, few=4)
        return dist.Normal(loc, scale, validate_args=False).to_event(1)

    def _product(self, batch: Batch) -> tuple[Tensor, Tensor]:
        product = product_of_normals(*self.parameters_of(batch), prior=_normal(self.prior))
        return product.loc, product.scale


class MixtureOfExperts(PosteriorOfExperts):
    r"""The mixture of the experts of the present modalities, Normal or Laplace alike.

    .. math:: q(z | x_S) = \sum_{m \in S} \frac{\pi_m}{\sum_{l \in S} \pi_l} q_m(z | x_m)

    Args:
        experts: modality -> encoder, all of one family (Normal or Laplace).
        weights: modality -> weight pi_m, not negative; equal by default. One of 0 leaves an expert out, as if the
            modality had none.

    q(z | nothing) is the standard member of the family. Shi et al. 2019 (arXiv:1911.03393).

    Raises:
        ValueError: a weight that is negative or not finite, no positive one, or weights of other modalities.
        TypeError: a weight that is no number.
    """

    def __init__(self, experts: Mapping[str, nn.Module], weights: Mapping[str, float] | None = None):
        super().__init__(experts)
        if weights is not None and set(check_mapping("weights", weights, "numbers")) != set(experts):
            raise ValueError(f"expected a weight for each of {list(experts)}, got {list(weights)}")
        self.weights = dict.fromkeys(experts, 1.0)
        if weights is not None:
            self.weights = {n: check_number(f"the weight of {n!r}", weights[n], least=0) for n in experts}
        if not any(self.weights.values()):
            raise ValueError(f"expected a positive weight of one modality at least, got {self.weights}")

    def forward(self, batch: Batch) -> dist.Distribution:
        experts, masks = self.encoded(batch)
        families: set[Any] = {type(base_distribution(d)) for d in experts}
        if len(families) > 1:
            raise TypeError(f"expected experts of one family, got {sorted(f.__name__ for f in families)}")
        locs, scales = zip(*map(diagonal, experts), strict=True)
        locs, scales = torch.broadcast_tensors(*locs), torch.broadcast_tensors(*scales)
        loc, scale = torch.stack(locs, -2), torch.stack(scales, -2)
        some = rows_with_any(batch, (name for name, weight in self.weights.items() if weight > 0))
        if some is not True:  # where no expert counts, what they make of the row's hidden values must not be seen
            there = some[..., None, None] if isinstance(some, Tensor) else constant((False,), torch.bool, loc.device)
            loc, scale = torch.where(there, loc, 0.0), torch.where(there, scale, 1.0)
        components = families.pop()(loc, scale).to_event(1)
        weights = [self.weights[name] for name in self.experts if batch.holds(name)]
        return Mixture(components, _component_log_weights(masks, weights, locs[0]))


class MixtureOfProducts(PosteriorOfExperts):
    r"""The mixture, in equal parts, of the products of experts of all non-empty subsets of the present modalities.

    .. math:: q(z | x_S) = \frac{1}{2^{|S|} - 1} \sum_{\emptyset \neq A \subseteq S} q_A(z | x_A)

    Args:
        experts: modality -> encoder.
        prior: the prior expert of every product, or None.
        subsets: the subsets to take, by default all; a row counts those that are wholly present in it, and if it
            has none of them the mixture is that of all of them evaluated at what is present. A modality that the batch
            does not hold is one that is missing in every row.

    Sutter et al. 2021 (arXiv:2105.02470).
    """

    def __init__(
        self,
        experts: Mapping[str, nn.Module],
        prior: dist.Distribution | None = STANDARD_NORMAL,
        subsets: Sequence[Sequence[str]] | None = None,
    ):
        super().__init__(experts)
        self.prior = check_prior_expert(prior)
        self.takes_all = subsets is None
        self.subsets = all_subsets(list(experts)) if subsets is None else _subsets(subsets, experts)

    def forward(self, batch: Batch) -> dist.Distribution:
        locs, scales, masks = self.parameters_of(batch)
        held = [name for name in self.experts if batch.holds(name)]
        subsets = self.subsets
        if self.takes_all:  # each row then has one of those that are held, if it has anything
            subsets = [s for s in subsets if set(s) <= set(held)]
        # An expert that is out of a row is out of every product there: a product of nothing is the prior expert.
        for i, mask in enumerate(masks):
            if mask is not True:
                there = mask[..., None] if isinstance(mask, Tensor) else constant((False,), torch.bool, locs[i].device)
                locs[i], scales[i] = torch.where(there, locs[i], 0.0), torch.where(there, scales[i], torch.inf)
        locs, scales = (list(torch.broadcast_tensors(*x)) for x in (locs, scales))
        precisions = torch.stack(scales).pow(-2)
        weighted = torch.stack(locs) * precisions
        members = constant(tuple(float(n in s) for s in subsets for n in held), locs[0].dtype, locs[0].device)
        members = members.reshape(len(subsets), len(held))

        def sums(each: Tensor, start: float | Tensor) -> Tensor:
            total = (members @ each.flatten(1)).reshape(len(subsets), *each.shape[1:])
            return total.movedim(0, -2) + start

        p0 = _normal(self.prior)
        precision = sums(precisions, 0.0 if p0 is None else p0.scale.pow(-2))
        precision = torch.where(precision == 0, 1.0, precision) if p0 is None else precision
        loc = sums(weighted, 0.0 if p0 is None else p0.loc * p0.scale.pow(-2)) / precision
        there_of = dict(zip(held, masks, strict=True))
        present = [all_of(there_of.get(n, False) for n in s) for s in subsets]
        components = dist.Normal(loc, precision.rsqrt(), validate_args=False).to_event(1)
        return Mixture(components, _component_log_weights(present, [1.0] * len(subsets), locs[0]))


class DependentExperts(PosteriorOfExperts):
    r"""The consensus of Gaussian experts whose errors are correlated, as those of views of one thing are.

    .. math:: \sigma^2 = (1^T S^{-1} 1)^{-1}, \quad \mu = \sigma^2 \, 1^T S^{-1} (\mu_m)_{m \in S}, \qquad
              S_{ml} = \sigma_m \sigma_l (\rho + (1 - \rho) [m = l])

    entry by entry of z; :math:`\rho = 0` is the product of the experts. There is no prior expert; q(z | nothing) is a
    standard normal.

    Args:
        experts: modality -> encoder.
        correlation: :math:`\rho`, above -1 / (M - 1) and below 1.

    Mancisidor et al. 2025 (CoDE-VAE, arXiv:2505.01134).
    """

    def __init__(self, experts: Mapping[str, nn.Module], correlation: float):
        super().__init__(experts)
        low = -1 / (len(experts) - 1) if len(experts) > 1 else None
        self.correlation = check_number("correlation", correlation, above=low, below=1)

    def forward(self, batch: Batch) -> dist.Distribution:
        return consensus_of_normals(*self.parameters_of(batch), correlation=self.correlation).to_event(1)


class HoelderPooling(PosteriorOfExperts):
    r"""The Hölder pool of order 1/2 of Gaussian experts: the mixture of them and, as far as they overlap, of all pairs.

    .. math:: q(z | x_S) \propto \Big( \sum_{m \in S} \sqrt{q_m(z | x_m)} \Big)^2

    in closed form (:func:`pyro_mm.distributions.pairwise_pool`), M (M + 1) / 2 components. Their weights depend on the
    experts, and so have a gradient: a draw is differentiated implicitly (:class:`pyro_mm.distributions.Mixture`), and
    ``IWAE(stratified=...)`` takes draws from every component and the weights as they are, with less noise.

    Args:
        experts: modality -> encoder.

    q(z | nothing) is a standard normal. arXiv:2606.13381.
    """

    def forward(self, batch: Batch) -> dist.Distribution:
        loc, scale, log_weights = pairwise_pool(*self.parameters_of(batch))
        return Mixture(dist.Normal(loc, scale, validate_args=False).to_event(1), log_weights)


def family_name(d: Any) -> str:
    """Name the family of a distribution, or say what stands in its place."""
    return type(base_distribution(d)).__name__ if isinstance(d, torch.distributions.Distribution) else describe(d)


def check_prior_expert(prior: Any) -> Unconditional | None:
    """Return a prior expert as a module, None for none. Raises a TypeError for what is no diagonal Normal."""
    if prior is None:
        return None
    if not isinstance(prior, torch.distributions.Distribution) or not isinstance(
        base_distribution(prior), torch.distributions.Normal
    ):
        raise TypeError(f"expected prior to be a diagonal Normal or None, got {family_name(prior)}")
    return Unconditional(prior)


def _subsets(subsets: Any, experts: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """Return sets of modalities, each with an expert."""
    if isinstance(subsets, str) or not isinstance(subsets, Sequence) or not subsets:
        raise TypeError(f"expected subsets to be a list of sets of modalities, got {describe(subsets)}")
    return [check_names("subsets", subset, experts) for subset in subsets]


def _normal(prior: Unconditional | None) -> dist.Distribution | None:
    if prior is None or prior() is STANDARD_NORMAL:
        return None if prior is None else STANDARD_NORMAL
    return dist.Normal(*diagonal(prior()))


def _component_log_weights(masks: Sequence[Presence], weights: Sequence[float], like: Tensor) -> Tensor:
    """Log-weights of components, ``(.., N, C)``: minus infinity where a component is out of a row."""
    log_weights = torch.tensor(weights, dtype=like.dtype, device=like.device).log()
    if all(m is True for m in masks):
        return log_weights.expand(*like.shape[:-1], -1)
    shape = broadcast_shape(*(m.shape for m in masks if isinstance(m, Tensor)), like.shape[:-1])
    there = [m.expand(shape) if isinstance(m, Tensor) else torch.full(shape, m, device=like.device) for m in masks]
    return torch.where(torch.stack(there, -1), log_weights, -torch.inf)
