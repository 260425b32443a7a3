"""Closed-form pools of Gaussian experts: their product, their consensus, and their Hölder pool."""

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from pyro.distributions import Normal
from torch import Tensor

from ..utils.arguments import check_number, check_tensor, describe

STANDARD_NORMAL = Normal(0.0, 1.0)


def product_of_normals(
    locs: Sequence[Tensor],
    scales: Sequence[Tensor],
    masks: Sequence[bool | Tensor] | None = None,
    prior: Normal | None = STANDARD_NORMAL,
) -> Normal:
    r"""Return the normalised product of Gaussian experts: precisions add.

    .. math:: p_0(z) \prod_i N(z; \mu_i, \sigma_i)^{m_i} \propto N(z; \mu, \sigma), \quad
        \sigma^{-2} = \sigma_0^{-2} + \sum_i m_i \sigma_i^{-2}, \quad
        \mu = \sigma^2 \big(\mu_0 \sigma_0^{-2} + \sum_i m_i \mu_i \sigma_i^{-2}\big)

    A masked expert adds an exact zero: masking equals deleting to the last bit, whatever its tensors contain. Without
    an expert and a prior, the result is N(0, 1).

    Args:
        locs: the :math:`\mu_i`, each of shape ``(*batch, D)``.
        scales: the :math:`\sigma_i`, likewise.
        masks: the :math:`m_i`: booleans that broadcast with the *batch* shape, or True or False for all rows. None for
            True for every expert. The tensors of an expert with False are not read.
        prior: the expert :math:`p_0`; None leaves it out.

    Returns:
        A Normal of batch shape ``(*batch, D)``; the caller adds ``.to_event(1)``.

    Raises:
        TypeError: arguments of another kind.
        ValueError: there is no expert, or the sequences differ in length.

    Example:
        >>> import torch, pyro_mm as mm
        >>> locs, scales = [torch.tensor([3.0]), torch.tensor([6.0])], [torch.ones(1), torch.ones(1)]
        >>> mm.distributions.product_of_normals(locs, scales).mean  # with the prior, (0 + 3 + 6) / 3
        tensor([3.])
        >>> mm.distributions.product_of_normals(locs, scales, masks=[True, False], prior=None).mean
        tensor([3.])

    References:
        Wu & Goodman 2018 (arXiv:1802.05335), section 2.2.
    """
    masks = _check_experts(locs, scales, masks)
    if prior is not None and not isinstance(prior, torch.distributions.Normal):
        raise TypeError(f"expected prior to be a Normal or None, got {describe(prior)}")
    total: float | Tensor = 0.0
    weighted: float | Tensor = 0.0
    if prior is STANDARD_NORMAL:
        total = 1.0  # a number, since a CPU tensor within a step keeps inductor from using CUDA graphs
    elif prior is not None:
        total = prior.scale.pow(-2)
        weighted = prior.loc * total
    for loc, scale, mask in zip(locs, scales, masks, strict=True):
        if mask is False:
            continue
        # masked before the reciprocal, not after: inf ** -2 is 0, and so is its derivative
        precision = _replace_masked(scale, mask, math.inf).pow(-2)
        total = total + precision
        weighted = weighted + _replace_masked(loc, mask, 0.0) * precision
    if all(mask is False for mask in masks):
        total = torch.zeros_like(locs[0]) + total
        weighted = torch.zeros_like(locs[0]) + weighted
    assert isinstance(total, Tensor)
    if prior is None and not any(mask is True for mask in masks):
        total = torch.where(total == 0, 1.0, total)
    return Normal(weighted / total, total.rsqrt(), validate_args=False)


def consensus_of_normals(
    locs: Sequence[Tensor],
    scales: Sequence[Tensor],
    masks: Sequence[bool | Tensor] | None = None,
    correlation: float = 0.0,
) -> Normal:
    r"""Return the best linear unbiased combination of Gaussian experts whose errors are correlated.

    .. math:: \sigma^2 = (1^T S^{-1} 1)^{-1}, \quad \mu = \sigma^2 \, 1^T S^{-1} (\mu_1, \dots, \mu_n)^T, \qquad
        S_{ii} = \sigma_i^2, \quad S_{ij} = \rho \sigma_i \sigma_j

    for every entry of z separately. The correlation matrix is :math:`(1 - \rho) I + \rho 1 1^T`. Its inverse, by
    Sherman and Morrison, gives with :math:`a_i = 1 / \sigma_i`, :math:`b_i = a_i \mu_i` and their means over i

    .. math:: \sigma^{-2} = \frac{\sum_i (a_i - \bar a)^2}{1 - \rho} + \frac{n \bar a^2}{1 + (n - 1) \rho}, \quad
        \mu \sigma^{-2} = \frac{\sum_i (a_i - \bar a)(b_i - \bar b)}{1 - \rho}
        + \frac{n \bar a \bar b}{1 + (n - 1) \rho}.

    A masked expert leaves S, and is not counted in n. With :math:`\rho = 0` this is the product of the experts. With
    :math:`\rho > 0` experts that agree narrow it less, and one much wider than the others may have a negative weight.
    Without an expert, the result is N(0, 1).

    Args:
        locs, scales, masks: as in :func:`product_of_normals`.
        correlation: :math:`\rho`, above -1 / (M - 1) for M experts and below 1.

    Returns:
        A Normal of batch shape ``(*batch, D)``; the caller adds ``.to_event(1)``.

    Raises:
        TypeError: arguments of another kind.
        ValueError: a correlation outside of that range, no expert, or sequences that differ in length.

    References:
        Winkler 1981 (Management Science 27:479); Mancisidor et al. 2025 (arXiv:2505.01134).
    """
    masks = _check_experts(locs, scales, masks)
    experts = len(locs)
    correlation = check_number("correlation", correlation, above=-1 / (experts - 1) if experts > 1 else None, below=1)
    if all(mask is False for mask in masks):
        return product_of_normals(locs, scales, masks, prior=None)

    a, b, counts = [], [], []
    for loc, scale, mask in zip(locs, scales, masks, strict=True):
        if mask is False:
            continue
        # masked before the reciprocal, as in the product
        a.append(_replace_masked(scale, mask, math.inf).reciprocal())
        b.append(_replace_masked(loc, mask, 0.0) * a[-1])
        counts.append(1.0 if mask is True else mask.unsqueeze(-1).to(loc.dtype))

    # summed in order, so that a masked expert adds an exact zero
    n: float | Tensor = sum(counts[1:], counts[0])
    if any(isinstance(count, Tensor) for count in counts) and not any(mask is True for mask in masks):
        n = n.clamp(min=1)  # type: ignore[union-attr]
    mean_a = sum(a[1:], a[0]) / n
    mean_b = sum(b[1:], b[0]) / n
    deviations = [count * (x - mean_a) for count, x in zip(counts, a, strict=True)]
    squares = [x.square() for x in deviations]
    products = [x * (y - mean_b) for x, y in zip(deviations, b, strict=True)]

    within = 1 / (1 - correlation)
    between = n / (1 + (n - 1) * correlation)
    precision = within * sum(squares[1:], squares[0]) + between * mean_a.square()
    weighted = within * sum(products[1:], products[0]) + between * mean_a * mean_b
    if not any(mask is True for mask in masks):
        precision = torch.where(precision == 0, 1.0, precision)
    return Normal(weighted / precision, precision.rsqrt(), validate_args=False)


def pairwise_pool(
    locs: Sequence[Tensor], scales: Sequence[Tensor], masks: Sequence[bool | Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return the Hölder pool of order 1/2 of Gaussian experts: a mixture of the experts and of all their pairs.

    .. math:: q(z) \propto \Big(\sum_m \sqrt{N(z; \mu_m, \sigma_m)}\Big)^2
        = \sum_m N(z; \mu_m, \sigma_m) + 2 \sum_{i < j} S_{ij} N(z; \mu_{ij}, \sigma_{ij})

    .. math:: \mu_{ij} = \frac{\mu_i \sigma_j^2 + \mu_j \sigma_i^2}{\sigma_i^2 + \sigma_j^2}, \quad
        \sigma_{ij}^2 = \frac{2 \sigma_i^2 \sigma_j^2}{\sigma_i^2 + \sigma_j^2}, \quad
        S_{ij} = \prod_d \sqrt{\frac{2 \sigma_i \sigma_j}{\sigma_i^2 + \sigma_j^2}}
        \exp\Big(-\frac{(\mu_i - \mu_j)^2}{4 (\sigma_i^2 + \sigma_j^2)}\Big)_d

    with the Bhattacharyya coefficients S. A masked expert leaves the mixture with its pairs. Without an expert, all
    components are N(0, 1).

    Args:
        locs, scales, masks: as in :func:`product_of_normals`.

    Returns:
        Locations ``(*batch, C, D)``, scales ``(*batch, C, D)`` and log-weights ``(*batch, C)`` of C = M (M + 1) / 2
        components: the experts, then their pairs. The log-weights are not normalised, and minus infinity where a
        component is masked.

    Raises:
        TypeError: arguments of another kind.
        ValueError: there is no expert, or the sequences differ in length.

    References:
        arXiv:2606.13381.
    """
    masks = _check_experts(locs, scales, masks)
    # a masked expert is N(0, 1), and so then is the mixture in a row without any
    present_locs = [_standard_where_masked(x, mask, 0.0) for x, mask in zip(locs, masks, strict=True)]
    present_scales = [_standard_where_masked(x, mask, 1.0) for x, mask in zip(scales, masks, strict=True)]
    mu = torch.broadcast_tensors(*present_locs)
    sigma = torch.broadcast_tensors(*present_scales)

    centres = list(mu)
    widths = list(sigma)
    log_weights = [torch.zeros_like(mu[0][..., 0])] * len(mu)
    present = list(masks)
    for i, j in combinations(range(len(mu)), 2):
        variance_i, variance_j = sigma[i].square(), sigma[j].square()
        total = variance_i + variance_j
        centres.append((mu[i] * variance_j + mu[j] * variance_i) / total)
        widths.append(sigma[i] * sigma[j] * (2 / total).sqrt())
        log_overlap = 0.5 * (2 * sigma[i] * sigma[j] / total).log() - (mu[i] - mu[j]).square() / (4 * total)
        log_weights.append(math.log(2) + log_overlap.sum(-1))
        present.append(_both(masks[i], masks[j]))

    shape = torch.broadcast_shapes(log_weights[0].shape, *(x.shape for x in present if isinstance(x, Tensor)))
    masked_weights = [_log_weight(w, mask).expand(shape) for w, mask in zip(log_weights, present, strict=True)]
    return torch.stack(centres, -2), torch.stack(widths, -2), torch.stack(masked_weights, -1)


def _standard_where_masked(x: Tensor, mask: bool | Tensor, standard: float) -> Tensor:
    """Return locations or scales of an expert with those of N(0, 1) where it is masked."""
    return torch.full_like(x, standard) if mask is False else _replace_masked(x, mask, standard)


def _both(first: bool | Tensor, second: bool | Tensor) -> bool | Tensor:
    """Return the conjunction of two masks, each a tensor or a bool."""
    if first is False or second is False:
        return False
    if first is True:
        return second
    return first if second is True else first & second


def _log_weight(log_weight: Tensor, mask: bool | Tensor) -> Tensor:
    """Return the log-weight of a component, minus infinity where it is masked."""
    if isinstance(mask, Tensor):
        return torch.where(mask, log_weight, -math.inf)
    return log_weight if mask else torch.full_like(log_weight, -math.inf)


def _replace_masked(x: Tensor, mask: bool | Tensor, other: float) -> Tensor:
    """Return ``x`` with a number in place of masked entries; as it is if the mask is a bool.

    Args:
        x: ``(*batch, D)``.
        mask: booleans of the batch shape.
        other: the number.
    """
    return torch.where(mask.unsqueeze(-1), x, other) if isinstance(mask, Tensor) else x


def _check_experts(
    locs: Sequence[Tensor], scales: Sequence[Tensor], masks: Sequence[bool | Tensor] | None
) -> Sequence[bool | Tensor]:
    """Return masks, one for each expert. Raises a TypeError or a ValueError for unusable locs, scales or masks."""
    for argument, value in (("locs", locs), ("scales", scales)):
        if not isinstance(value, Sequence):
            raise TypeError(f"expected {argument} to be a sequence of tensors, got {describe(value)}")
    masks = [True] * len(locs) if masks is None else masks
    if not isinstance(masks, Sequence):
        raise TypeError(f"expected masks to be a sequence of booleans or boolean tensors, got {describe(masks)}")
    if not len(locs) == len(scales) == len(masks) > 0:
        sizes = f"{len(locs)}, {len(scales)} and {len(masks)}"
        raise ValueError(f"expected equally many locs, scales and masks, one at least; got {sizes}")
    for loc, scale, mask in zip(locs, scales, masks, strict=True):
        if mask is not False:  # the tensors of an expert with False are not read
            check_tensor("every one of locs", loc)
            check_tensor("every one of scales", scale)
    return masks
