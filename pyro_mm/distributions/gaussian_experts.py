"""Pools of Gaussian experts that are Gaussian, or a mixture of Gaussians, in closed form.

As in :mod:`pyro_mm.distributions`, nothing looks at a tensor's values in Python.
"""

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
    r"""The normalised product of Gaussian experts: precisions add.

    .. math:: p_0(z) \prod_i N(z; \mu_i, \sigma_i)^{m_i} \propto N(z; \mu, \sigma), \quad
        \sigma^{-2} = \sigma_0^{-2} + \sum_i m_i \sigma_i^{-2}, \quad
        \mu = \sigma^2 \big(\mu_0 \sigma_0^{-2} + \sum_i m_i \mu_i \sigma_i^{-2}\big)

    A masked expert adds an exact zero: masking equals deleting to the last bit, whatever its tensors hold. Where
    neither an expert nor the prior is in, the result is N(0, 1). Wu & Goodman 2018 (arXiv:1802.05335), section 2.2.

    Args:
        locs: the :math:`\mu_i`, each of shape ``(*batch, D)``.
        scales: the :math:`\sigma_i`, likewise.
        masks: the :math:`m_i`: True (in, as every expert is if ``masks`` is None), False (left out, its tensors
            untouched) or a boolean tensor that broadcasts with the *batch* shape.
        prior: the expert :math:`p_0`, or None to leave it out.

    Returns:
        A Normal of batch shape ``(*batch, D)``; the caller adds ``.to_event(1)``.

    Raises:
        ValueError: there is no expert, or the sequences differ in length.
    """
    masks = _check_experts(locs, scales, masks)
    if prior is not None and not isinstance(prior, torch.distributions.Normal):
        raise TypeError(f"expected prior to be a Normal or None, got {describe(prior)}")
    total: float | Tensor = 0.0
    weighted: float | Tensor = 0.0
    if prior is STANDARD_NORMAL:
        total = 1.0  # a number: tensors of the CPU within a step keep inductor from using CUDA graphs
    elif prior is not None:
        total = prior.scale.pow(-2)
        weighted = prior.loc * total
    for loc, scale, mask in zip(locs, scales, masks, strict=True):
        if mask is False:
            continue
        # Masked before the reciprocal, not after: inf ** -2 is 0, and so is its derivative.
        precision = _replace_masked(scale, mask, math.inf).pow(-2)
        total = total + precision
        weighted = weighted + _replace_masked(loc, mask, 0.0) * precision
    if all(mask is False for mask in masks):
        total, weighted = torch.zeros_like(locs[0]) + total, torch.zeros_like(locs[0]) + weighted
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
    r"""The consensus of Gaussian experts whose errors are correlated: the best linear unbiased combination of them.

    .. math:: \sigma^2 = (1^T S^{-1} 1)^{-1}, \quad \mu = \sigma^2 \, 1^T S^{-1} (\mu_1, \dots, \mu_n)^T, \qquad
        S_{ii} = \sigma_i^2, \quad S_{ij} = \rho \sigma_i \sigma_j

    for every entry of z by itself. The correlation matrix is :math:`(1 - \rho) I + \rho 1 1^T`, and so, by Sherman and
    Morrison, with :math:`a_i = 1 / \sigma_i`, their mean :math:`\bar a`, and likewise :math:`b_i = a_i \mu_i`,

    .. math:: \sigma^{-2} = \frac{\sum_i (a_i - \bar a)^2}{1 - \rho} + \frac{n \bar a^2}{1 + (n - 1) \rho}, \quad
        \mu \sigma^{-2} = \frac{\sum_i (a_i - \bar a)(b_i - \bar b)}{1 - \rho}
        + \frac{n \bar a \bar b}{1 + (n - 1) \rho}.

    A masked expert is left out of S: its row and column, and of n. With :math:`\rho = 0` it is the product of the
    experts; with :math:`\rho > 0` experts that agree narrow it less, and one much wider than the others may weigh
    less than nothing. Where no expert is in, the result is N(0, 1). Winkler 1981 (Management Science 27:479);
    Mancisidor et al. 2025 (arXiv:2505.01134).

    Args:
        locs, scales, masks: as of :func:`product_of_normals`.
        correlation: :math:`\rho`, above -1 / (M - 1) for M experts and below 1.

    Raises:
        ValueError: a correlation outside of that range, no expert, or sequences that differ in length.
    """
    masks, m = _check_experts(locs, scales, masks), len(locs)
    correlation = check_number("correlation", correlation, above=-1 / (m - 1) if m > 1 else None, below=1)
    if all(mask is False for mask in masks):
        return product_of_normals(locs, scales, masks, prior=None)
    a, b, here = [], [], []
    for loc, scale, mask in zip(locs, scales, masks, strict=True):
        if mask is False:
            continue
        # masked before the reciprocal, as above
        a.append(_replace_masked(scale, mask, math.inf).reciprocal())
        b.append(_replace_masked(loc, mask, 0.0) * a[-1])
        here.append(1.0 if mask is True else mask.unsqueeze(-1).to(loc.dtype))
    # summed in order, so that what is masked adds an exact zero
    n: float | Tensor = sum(here[1:], here[0])
    if any(isinstance(h, Tensor) for h in here) and not any(mask is True for mask in masks):
        n = n.clamp(min=1)  # type: ignore[union-attr]
    mean_a, mean_b = sum(a[1:], a[0]) / n, sum(b[1:], b[0]) / n
    spread = [h * (x - mean_a) for h, x in zip(here, a, strict=True)]
    within = [x.square() for x in spread]
    across = [x * (y - mean_b) for x, y in zip(spread, b, strict=True)]
    apart, shared = 1 / (1 - correlation), n / (1 + (n - 1) * correlation)
    precision = apart * sum(within[1:], within[0]) + shared * mean_a.square()
    weighted = apart * sum(across[1:], across[0]) + shared * mean_a * mean_b
    if not any(mask is True for mask in masks):
        precision = torch.where(precision == 0, 1.0, precision)
    return Normal(weighted / precision, precision.rsqrt(), validate_args=False)


def pairwise_pool(
    locs: Sequence[Tensor], scales: Sequence[Tensor], masks: Sequence[bool | Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The Hölder pool of order 1/2 of Gaussian experts, exactly: a mixture of them and of all their pairs.

    .. math:: q(z) \propto \Big(\sum_m \sqrt{N(z; \mu_m, \sigma_m)}\Big)^2
        = \sum_m N(z; \mu_m, \sigma_m) + 2 \sum_{i < j} S_{ij} N(z; \mu_{ij}, \sigma_{ij})

    .. math:: \mu_{ij} = \frac{\mu_i \sigma_j^2 + \mu_j \sigma_i^2}{\sigma_i^2 + \sigma_j^2}, \quad
        \sigma_{ij}^2 = \frac{2 \sigma_i^2 \sigma_j^2}{\sigma_i^2 + \sigma_j^2}, \quad
        S_{ij} = \prod_d \sqrt{\frac{2 \sigma_i \sigma_j}{\sigma_i^2 + \sigma_j^2}}
        \exp\Big(-\frac{(\mu_i - \mu_j)^2}{4 (\sigma_i^2 + \sigma_j^2)}\Big)_d

    with the Bhattacharyya coefficients S. A masked expert takes the pairs that it is in with it; where none is in, all
    components are N(0, 1). arXiv:2606.13381.

    Args:
        locs, scales, masks: as of :func:`product_of_normals`.

    Returns:
        ``(loc, scale, log_weights)`` of shapes ``(*batch, C, D)``, the same, and ``(*batch, C)``, for
        C = M (M + 1) / 2 components: the experts, then their pairs. The weights are not normalised; those that are out
        of a row are minus infinity.

    Raises:
        ValueError: there is no expert, or the sequences differ in length.
    """
    masks, m = _check_experts(locs, scales, masks), len(locs)
    # what is out is N(0, 1), and so is then the mixture of a row in which nothing is in
    locs = [torch.zeros_like(x) if m is False else _replace_masked(x, m, 0.0) for x, m in zip(locs, masks, strict=True)]
    scales = [
        torch.ones_like(x) if m is False else _replace_masked(x, m, 1.0) for x, m in zip(scales, masks, strict=True)
    ]
    locs, scales = (list(torch.broadcast_tensors(*x)) for x in (locs, scales))
    centres, widths = list(locs), list(scales)
    log_weights = [torch.zeros_like(locs[0][..., 0])] * m
    present = list(masks)
    for i, j in combinations(range(m), 2):
        vi, vj = scales[i].square(), scales[j].square()
        both = vi + vj
        centres.append((locs[i] * vj + locs[j] * vi) / both)
        widths.append(scales[i] * scales[j] * (2 / both).sqrt())
        overlap = 0.5 * (2 * scales[i] * scales[j] / both).log() - (locs[i] - locs[j]).square() / (4 * both)
        log_weights.append(math.log(2) + overlap.sum(-1))
        either = [mask for mask in (masks[i], masks[j]) if mask is not True]
        out = any(mask is False for mask in either)
        present.append(False if out else either[0] & either[-1] if either else True)  # type: ignore[operator]
    shape = torch.broadcast_shapes(log_weights[0].shape, *(x.shape for x in present if isinstance(x, Tensor)))
    weights = [
        torch.where(p, w, -math.inf) if isinstance(p, Tensor) else w if p else torch.full_like(w, -math.inf)
        for p, w in zip(present, log_weights, strict=True)
    ]
    return torch.stack(centres, -2), torch.stack(widths, -2), torch.stack([w.expand(shape) for w in weights], -1)


def _replace_masked(x: Tensor, mask: bool | Tensor, other: float) -> Tensor:
    """``x`` where the mask, of the batch's shape, holds; else a number. As it is under a mask that is no tensor."""
    return torch.where(mask.unsqueeze(-1), x, other) if isinstance(mask, Tensor) else x


def _check_experts(
    locs: Sequence[Tensor], scales: Sequence[Tensor], masks: Sequence[bool | Tensor] | None
) -> Sequence[bool | Tensor]:
    for argument, each in (("locs", locs), ("scales", scales)):
        if not isinstance(each, Sequence):
            raise TypeError(f"expected {argument} to be a sequence of tensors, got {describe(each)}")
    masks = [True] * len(locs) if masks is None else masks
    if not isinstance(masks, Sequence):
        raise TypeError(f"expected masks to be a sequence of booleans or boolean tensors, got {describe(masks)}")
    if not len(locs) == len(scales) == len(masks) > 0:
        sizes = f"{len(locs)}, {len(scales)} and {len(masks)}"
        raise ValueError(f"expected equally many locs, scales and masks, one at least; got {sizes}")
    for loc, scale, mask in zip(locs, scales, masks, strict=True):
        if mask is not False:  # the tensors of one that is out are not looked at
            check_tensor("every one of locs", loc)
            check_tensor("every one of scales", scale)
    return masks
