"""Pools of Gaussian experts that are Gaussian, or a mixture of Gaussians, in closed form.

As in :mod:`pyro_mm.distributions`, nothing looks at a tensor's values in Python.
"""

import math
from collections.abc import Sequence

import torch
from pyro.distributions import Normal
from torch import Tensor

__all__ = ["STANDARD_NORMAL", "product_of_normals"]

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
    masks = [True] * len(locs) if masks is None else masks
    if not len(locs) == len(scales) == len(masks) > 0:
        sizes = f"{len(locs)}, {len(scales)} and {len(masks)}"
        raise ValueError(f"expected equally many locs, scales and masks, one at least; got {sizes}")
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
        if mask is not True:
            # Masked before the reciprocal, not after: inf ** -2 is 0, and so is its derivative.
            loc = torch.where(mask.unsqueeze(-1), loc, 0.0)
            scale = torch.where(mask.unsqueeze(-1), scale, math.inf)
        precision = scale.pow(-2)
        total = total + precision
        weighted = weighted + loc * precision
    if all(mask is False for mask in masks):
        total, weighted = torch.zeros_like(locs[0]) + total, torch.zeros_like(locs[0]) + weighted
    assert isinstance(total, Tensor)
    if prior is None and not any(mask is True for mask in masks):
        total = torch.where(total == 0, 1.0, total)
    return Normal(weighted / total, total.rsqrt(), validate_args=False)
