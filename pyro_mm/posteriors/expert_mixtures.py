"""Posteriors that mix Gaussian or Laplace experts: of single modalities, of subsets, and of pairs."""

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
from ..distributions.base import base_distribution, diagonal
from ..distributions.gaussian_experts import STANDARD_NORMAL, pairwise_pool
from ..distributions.mixture import Mixture
from ..utils.arguments import check_mapping, check_names, check_number, describe
from ..utils.tensors import constant
from .experts import PosteriorOfExperts, check_equal_events, check_prior_expert, prior_normal
from .per_set import rows_with_any


class MixtureOfExperts(PosteriorOfExperts):
    r"""The mixture of the experts of the present modalities, which are all Normal or all Laplace.

    .. math:: q(z | x_S) = \sum_{m \in S} \frac{\pi_m}{\sum_{l \in S} \pi_l} q_m(z | x_m)

    A missing modality leaves the mixture. In a row without any, q is the standard member of the family.

    Args:
        experts: modality -> encoder, a module mapping ``(N, *event)`` to a Normal or Laplace of event shape ``(D,)``.
        weights: modality -> weight :math:`\pi_m`, not negative; equal by default. A weight of 0 leaves an expert out,
            as if the modality had none.

    Raises:
        TypeError: a weight that is not a number, or experts of two families.
        ValueError: a weight that is negative or not finite, no positive one, weights of other modalities, or experts
            of unlike event shapes.

    Example:
        >>> import torch, pyro_mm as mm
        >>> unit = mm.conditionals.Laplace(torch.nn.Identity(), scale=1.0)  # Laplace(x, 1)
        >>> posterior = mm.posteriors.MixtureOfExperts({"a": unit, "b": unit}, weights={"a": 1.0, "b": 3.0})
        >>> q = posterior(mm.Batch({"a": torch.zeros(5, 2), "b": torch.ones(5, 2)}))
        >>> q.batch_shape, q.event_shape, q.num_components
        (torch.Size([5]), torch.Size([2]), 2)
        >>> q.mean[0]
        tensor([0.7500, 0.7500])

    References:
        Shi et al. 2019 (MMVAE, arXiv:1911.03393).
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
        """Return q(z | x_S): a mixture of batch shape ``(N,)`` and event shape ``(D,)``, a component per expert."""
        experts, masks = self.encoded(batch)
        names = self.names_held(batch)
        families: set[Any] = {type(base_distribution(d)) for d in experts}
        if len(families) > 1:
            raise TypeError(f"expected experts of one family, got {sorted(f.__name__ for f in families)}")
        parameters = list(map(diagonal, experts))
        check_equal_events(type(self).__name__, names, experts)

        locs = torch.broadcast_tensors(*(loc for loc, _ in parameters))
        scales = torch.broadcast_tensors(*(scale for _, scale in parameters))
        loc = torch.stack(locs, -2)
        scale = torch.stack(scales, -2)

        weighted = rows_with_any(batch, (name for name, weight in self.weights.items() if weight > 0))
        if weighted is not True:  # rows in which no expert counts: nothing may depend on their hidden values
            no_rows = constant((False,), torch.bool, loc.device)
            counts = weighted[..., None, None] if isinstance(weighted, Tensor) else no_rows
            loc = torch.where(counts, loc, 0.0)
            scale = torch.where(counts, scale, 1.0)

        components = families.pop()(loc, scale).to_event(1)
        return Mixture(components, _component_log_weights(masks, [self.weights[name] for name in names], locs[0]))


class MixtureOfProducts(PosteriorOfExperts):
    r"""The mixture, with equal weights, of the products of experts of all non-empty subsets of the present modalities.

    .. math:: q(z | x_S) = \frac{1}{2^{|S|} - 1} \sum_{\emptyset \neq A \subseteq S} q_A(z | x_A)

    A subset with a missing modality leaves the mixture. In a row that has none of the subsets, the mixture is that of
    all of them evaluated at the modalities that are present: the prior expert, if nothing is.

    Args:
        experts: modality -> encoder, a module mapping ``(N, *event)`` to a Normal of event shape ``(D,)``.
        prior: the prior expert of every product, a diagonal Normal of event shape ``(D,)``; None leaves it out.
        subsets: the subsets A, all 2^M - 1 by default. A modality that the batch does not hold is missing in every row.

    Raises:
        TypeError: subsets that are not a sequence; an expert or a prior expert that is not a diagonal Normal.
        ValueError: a subset with an unknown modality, more than 16 modalities without ``subsets``, or experts of
            unlike event shapes.

    Example:
        >>> import torch, pyro_mm as mm
        >>> unit = mm.conditionals.Normal(torch.nn.Identity(), scale=1.0)  # N(x, 1)
        >>> posterior = mm.posteriors.MixtureOfProducts({"a": unit, "b": unit})
        >>> q = posterior(mm.Batch({"a": torch.tensor([[2.0]]), "b": torch.tensor([[4.0]])}))
        >>> q.components.mean[0, :, 0]  # of {a}, {b} and {a, b}, each with the prior expert N(0, 1)
        tensor([1., 2., 2.])

    References:
        Sutter et al. 2021 (MoPoE, arXiv:2105.02470).
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
        self.subsets = all_subsets(list(experts)) if subsets is None else _check_subsets(subsets, experts)

    def forward(self, batch: Batch) -> dist.Distribution:
        """Return q(z | x_S): a mixture of batch shape ``(N,)`` and event shape ``(D,)``, a component per subset."""
        locs, scales, masks = self.parameters_of(batch)
        names = self.names_held(batch)
        subsets = self.subsets
        if self.takes_all:  # each row then has one of those whose modalities are held, if it has anything
            subsets = [subset for subset in subsets if set(subset) <= set(names)]

        loc, scale = self._products(locs, scales, masks, names, subsets)
        components = dist.Normal(loc, scale, validate_args=False).to_event(1)
        presence = dict(zip(names, masks, strict=True))
        complete = [all_of(presence.get(name, False) for name in subset) for subset in subsets]
        return Mixture(components, _component_log_weights(complete, [1.0] * len(subsets), loc[..., 0, :]))

    def _products(
        self,
        locs: list[Tensor],
        scales: list[Tensor],
        masks: list[Presence],
        names: list[str],
        subsets: Sequence[Sequence[str]],
    ) -> tuple[Tensor, Tensor]:
        """Multiply the experts of each subset that are present in a row.

        Args:
            locs, scales: of each expert, ``(.., N, D)``.
            masks: the rows that have each modality.
            names: the modality of each expert.
            subsets: names of modalities.

        Returns:
            Means and scales of the products, ``(.., N, C, D)`` for C subsets.
        """
        present = [_zero_precision(loc, scale, mask) for loc, scale, mask in zip(locs, scales, masks, strict=True)]
        means = torch.stack(torch.broadcast_tensors(*(loc for loc, _ in present)))
        precisions = torch.stack(torch.broadcast_tensors(*(scale for _, scale in present))).pow(-2)
        weighted = means * precisions
        members = constant(tuple(float(n in s) for s in subsets for n in names), locs[0].dtype, locs[0].device)
        members = members.reshape(len(subsets), len(names))

        def sum_over_members(values: Tensor, start: float | Tensor) -> Tensor:
            total = (members @ values.flatten(1)).reshape(len(subsets), *values.shape[1:])
            return total.movedim(0, -2) + start

        prior = prior_normal(self.prior, locs[0])
        precision = sum_over_members(precisions, 0.0 if prior is None else prior.scale.pow(-2))
        precision = torch.where(precision == 0, 1.0, precision) if prior is None else precision
        loc = sum_over_members(weighted, 0.0 if prior is None else prior.loc * prior.scale.pow(-2)) / precision
        return loc, precision.rsqrt()


class HoelderPooling(PosteriorOfExperts):
    r"""The Hölder pool of order 1/2 of Gaussian experts: a mixture of the experts and of all their pairs.

    .. math:: q(z | x_S) \propto \Big( \sum_{m \in S} \sqrt{q_m(z | x_m)} \Big)^2

    in closed form (:func:`pyro_mm.distributions.gaussian_experts.pairwise_pool`), with M (M + 1) / 2 components; a
    pair counts as far as its experts overlap. The weights thus depend on the experts and have a gradient: a draw is
    differentiated implicitly (:class:`pyro_mm.distributions.Mixture`), and ``IWAE(stratified=...)``, which draws from
    every component, has less noise. A missing modality leaves the pool with its pairs. In a row without any, q is
    N(0, I).

    Args:
        experts: modality -> encoder, a module mapping ``(N, *event)`` to a Normal of event shape ``(D,)``.

    Raises:
        TypeError: an expert that is not a diagonal Normal.
        ValueError: experts of unlike event shapes.

    Example:
        >>> import torch, pyro_mm as mm
        >>> unit = mm.conditionals.Normal(torch.nn.Identity(), scale=1.0)  # N(x, 1)
        >>> posterior = mm.posteriors.HoelderPooling({"a": unit, "b": unit})
        >>> q = posterior(mm.Batch({"a": torch.tensor([[0.0], [0.0]]), "b": torch.tensor([[0.0], [9.0]])}))
        >>> q.log_weights.exp().detach()  # of a, b and their pair: half of the pool where they agree, else nothing
        tensor([[2.5000e-01, 2.5000e-01, 5.0000e-01],
                [4.9998e-01, 4.9998e-01, 4.0064e-05]])

    References:
        arXiv:2606.13381.
    """

    def forward(self, batch: Batch) -> dist.Distribution:
        """Return q(z | x_S): a mixture of batch shape ``(N,)`` and event shape ``(D,)``, with learned weights."""
        loc, scale, log_weights = pairwise_pool(*self.parameters_of(batch))
        return Mixture(dist.Normal(loc, scale, validate_args=False).to_event(1), log_weights)


def _zero_precision(loc: Tensor, scale: Tensor, mask: Presence) -> tuple[Tensor, Tensor]:
    """Return mean and scale of an expert with 0 and infinity in the rows without its modality."""
    if mask is True:
        return loc, scale
    present = mask[..., None] if isinstance(mask, Tensor) else constant((False,), torch.bool, loc.device)
    return torch.where(present, loc, 0.0), torch.where(present, scale, torch.inf)


def _check_subsets(subsets: Any, experts: Mapping[str, nn.Module]) -> list[tuple[str, ...]]:
    """Return subsets of modalities as tuples. Raises a TypeError or a ValueError unless each has an expert."""
    if isinstance(subsets, str) or not isinstance(subsets, Sequence) or not subsets:
        raise TypeError(f"expected subsets to be a list of sets of modalities, got {describe(subsets)}")
    return [check_names("subsets", subset, experts) for subset in subsets]


def _component_log_weights(masks: Sequence[Presence], weights: Sequence[float], like: Tensor) -> Tensor:
    """Return the log-weights of C components per row, not normalised: minus infinity where one is masked.

    Args:
        masks: for each component the rows in which it counts, ``(.., N)`` or a bool.
        weights: for each component a number.
        like: ``(.., N, D)``, whose type, device and leading dimensions the result has.

    Returns:
        ``(.., N, C)``.
    """
    log_weights = torch.tensor(weights, dtype=like.dtype, device=like.device).log()
    if all(mask is True for mask in masks):
        return log_weights.expand(*like.shape[:-1], -1)
    shape = broadcast_shape(*(m.shape for m in masks if isinstance(m, Tensor)), like.shape[:-1])
    full = [m.expand(shape) if isinstance(m, Tensor) else torch.full(shape, m, device=like.device) for m in masks]
    return torch.where(torch.stack(full, -1), log_weights, -torch.inf)
