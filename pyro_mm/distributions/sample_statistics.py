r"""Statistics of samples, without densities: maximum mean discrepancy, sliced Wasserstein distance, HSIC.

Each takes samples ``(.., N, D)`` of which a mask ``(.., N)`` may leave rows out, is differentiable, reads no value of
a tensor in Python, and computes in float32 or wider, also under autocast. A statistic of fewer rows than it needs is 0.

With distances r between points and a bandwidth h the kernels are

.. math:: k_{gaussian}(r) = \exp \Big( -\frac{r^2}{2 h^2} \Big), \qquad k_{imq}(r) = \frac{h^2}{h^2 + r^2},

and their mean where there are several bandwidths. Without a bandwidth h is the median of the distances between
different points that count, held constant in the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..utils.arguments import (
    check_choice,
    check_flags,
    check_function,
    check_integer,
    check_number,
    check_tensor,
    describe,
)

KERNELS = ("gaussian", "imq")

Kernel = str | Callable[[Tensor, Tensor], Tensor]
Bandwidth = float | tuple[float, ...] | None


def squared_mmd(
    x: Tensor,
    y: Tensor,
    *,
    kernel: Kernel = "gaussian",
    bandwidth: Any = None,
    unbiased: bool = True,
    paired: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Estimate the squared maximum mean discrepancy between the distributions of two samples.

    .. math:: MMD^2(P, Q) = E k(x, x') + E k(y, y') - 2 E k(x, y), \qquad x, x' \sim P, \; y, y' \sim Q

    The U-statistic averages over pairs of different rows, so that its mean is MMD² and it may be negative; the
    V-statistic averages over all pairs, is never negative, and its mean exceeds MMD² by a term of order 1 / N.

    Args:
        x: ``(.., N, D)``.
        y: ``(.., N', D)``.
        kernel: ``"gaussian"``, ``"imq"`` (inverse multiquadric), or a function of two samples ``(.., N, D)`` and
            ``(.., N', D)`` to ``(.., N, N')``.
        bandwidth: h in the units of x, or several; None for the median of the distances within the samples together.
        unbiased: True for the U-statistic, False for the V-statistic.
        paired: True if row n of y belongs to row n of x, and may depend on it: the U-statistic then leaves pairs of one
            row out of E k(x, y) too.
        mask: boolean ``(.., N)``, the rows that count of both samples, which then are of one size; None for all.

    Returns:
        ``(..)``; 0 if fewer rows count than the statistic needs, two for the U-statistic.

    Raises:
        TypeError, ValueError: samples or settings that do not fit.

    Example:
        >>> import torch, pyro_mm as mm
        >>> x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> bool(mm.distributions.squared_mmd(x[:500], x[500:], bandwidth=1.0).abs() < 0.01)
        True
        >>> bool(mm.distributions.squared_mmd(x[:500], x[500:] + 1.0, bandwidth=1.0) > 0.1)
        True

    References:
        Gretton et al. 2012 (JMLR 13, A Kernel Two-Sample Test).
    """
    check_flags(unbiased=unbiased, paired=paired)
    x, y = _check_samples(x, y)
    n = x.shape[-2]
    if (mask is not None or paired) and n != y.shape[-2]:
        raise ValueError(f"expected two samples of one size, whose rows go together, got {n} and {y.shape[-2]} rows")
    x, y = _expand_batch(x, y)
    count = None if mask is None else _check_mask(mask, x)
    x, y = _zero_rows(x, count), _zero_rows(y, count)
    pooled = torch.cat([x, y], -2)
    both = None if count is None else torch.cat([count, count], -1)
    with full_precision(x):
        gram = gram_matrix(pooled, kernel, check_bandwidth(bandwidth), both)
        weights = torch.ones_like(pooled[..., 0]) if both is None else both.to(x.dtype)
        gram = gram * (weights[..., :, None] * weights[..., None, :])

        own = _different_rows(n, x.device)
        other = _different_rows(y.shape[-2], x.device)
        within_x = gram[..., :n, :n]
        within_y = gram[..., n:, n:]
        between = gram[..., :n, n:]
        if unbiased:
            within_x, within_y = within_x * own, within_y * other
            between = between * own if paired else between

        size_x = weights[..., :n].sum(-1)
        size_y = weights[..., n:].sum(-1)
        less = 1 if unbiased else 0
        pairs = size_x * (size_x - 1) if unbiased and paired else size_x * size_y
        value = (
            within_x.sum((-2, -1)) / (size_x * (size_x - less)).clamp(min=1)
            + within_y.sum((-2, -1)) / (size_y * (size_y - less)).clamp(min=1)
            - 2 * between.sum((-2, -1)) / pairs.clamp(min=1)
        )
        return torch.where((size_x > less) & (size_y > less), value, torch.zeros_like(value))


def hsic(
    x: Tensor,
    y: Tensor,
    *,
    kernel: Kernel = "gaussian",
    bandwidth: Any = None,
    unbiased: bool = True,
    mask: Tensor | None = None,
) -> Tensor:
    r"""Estimate the Hilbert-Schmidt independence criterion of two variables from rows of both.

    .. math:: HSIC = E k(x, x') l(y, y') + E k(x, x') \, E l(y, y') - 2 E [ E k(x, x') \, E l(y, y') ],

    the squared MMD between the joint distribution and the product of its margins; 0 for independent variables. With the
    kernel matrices K and L, and :math:`\tilde K`, :math:`\tilde L` their copies with a diagonal of zeros,

    .. math:: \widehat{HSIC}_b = \frac{1}{N^2} \mathrm{tr}(K H L H), \qquad
              \widehat{HSIC}_u = \frac{1}{N (N - 3)} \Big[ \mathrm{tr}(\tilde K \tilde L)
              + \frac{1^T \tilde K 1 \; 1^T \tilde L 1}{(N - 1)(N - 2)} - \frac{2}{N - 2} 1^T \tilde K \tilde L 1 \Big],

    H = I - 1 1^T / N. The first is never negative; the second has the mean HSIC.

    Args:
        x: ``(.., N, D)``.
        y: ``(.., N, D')``; row n belongs to row n of x.
        kernel: as in :func:`squared_mmd`; of x as of y.
        bandwidth: h of both kernels, or several; None for the median of the distances in x, and in y.
        unbiased: True for the second estimate, False for the first.
        mask: boolean ``(.., N)``, the rows that count; None for all.

    Returns:
        ``(..)``; 0 if fewer rows count than the statistic needs, four for the unbiased one and two for the other.

    Raises:
        TypeError, ValueError: samples or settings that do not fit.

    Example:
        >>> import torch, pyro_mm as mm
        >>> x = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
        >>> independent = mm.distributions.hsic(x[:, :1], x[:, 1:], bandwidth=1.0)
        >>> bool(independent.abs() < 0.01 < mm.distributions.hsic(x[:, :1], x[:, :1] + 0.1 * x[:, 1:], bandwidth=1.0))
        True

    References:
        Gretton et al. 2005 (ALT, Measuring Statistical Dependence with Hilbert-Schmidt Norms); Song et al. 2012
        (JMLR 13, Feature Selection via Dependence Maximization).
    """
    check_flags(unbiased=unbiased)
    x, y = _check_samples(x, y, same_size=False)
    if x.shape[-2] != y.shape[-2]:
        raise ValueError(f"expected rows of both variables, got {x.shape[-2]} of one and {y.shape[-2]} of the other")
    x, y = _expand_batch(x, y)
    bandwidth = check_bandwidth(bandwidth)
    count = None if mask is None else _check_mask(mask, x)
    x, y = _zero_rows(x, count), _zero_rows(y, count)
    with full_precision(x):
        weights = torch.ones_like(x[..., 0]) if count is None else count.to(x.dtype)
        counted = weights[..., :, None] * weights[..., None, :]
        if unbiased:
            counted = counted * _different_rows(x.shape[-2], x.device)
        gram_x, gram_y = (gram_matrix(sample, kernel, bandwidth, count) * counted for sample in (x, y))
        size = weights.sum(-1)
        trace = (gram_x * gram_y).sum((-2, -1))
        totals = gram_x.sum((-2, -1)) * gram_y.sum((-2, -1))
        rows = (gram_x.sum(-1) * gram_y.sum(-1)).sum(-1)
        if unbiased:
            enough = size > 3
            n = size.clamp(min=4)
            value = (trace + totals / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))
        else:
            enough = size > 1
            n = size.clamp(min=1)
            value = trace / n**2 + totals / n**4 - 2 * rows / n**3
        return torch.where(enough, value, torch.zeros_like(value))


def sliced_wasserstein(
    x: Tensor, y: Tensor, *, projections: int = 50, p: float = 2.0, mask: Tensor | None = None
) -> Tensor:
    r"""Estimate the sliced Wasserstein distance between the distributions of two samples, to the power p.

    .. math:: SW_p^p(P, Q) = E_\theta W_p^p(\theta^T x, \theta^T y) \approx
              \frac{1}{L N} \sum_l \sum_n | (\theta_l^T x)_{(n)} - (\theta_l^T y)_{(n)} |^p

    with :math:`\theta_l` uniform on the unit sphere, drawn by torch's generator at every call, and ``(n)`` the n-th
    smallest. In one dimension it is the Wasserstein distance of the samples itself. It is positive for two samples of
    one distribution, and tends to 0 with N.

    Args:
        x, y: ``(.., N, D)``, of one size.
        projections: L.
        p: the power, 1 or more.
        mask: boolean ``(.., N)``, the rows that count of both samples; None for all.

    Returns:
        ``(..)``; 0 if no row counts.

    Raises:
        TypeError, ValueError: samples or settings that do not fit.

    Example:
        >>> import torch, pyro_mm as mm
        >>> mm.distributions.sliced_wasserstein(torch.tensor([[0.0], [1.0]]), torch.tensor([[4.0], [3.0]]), p=1)
        tensor(3.)

    References:
        Bonneel et al. 2015 (JMIV 51); Kolouri et al. 2019 (Sliced Wasserstein Auto-Encoders, ICLR).
    """
    x, y = _check_samples(x, y)
    check_integer("projections", projections, least=1)
    p = check_number("p", p, least=1)
    if x.shape[-2] != y.shape[-2]:
        raise ValueError(f"expected two samples of one size, got {x.shape[-2]} and {y.shape[-2]} rows")
    x, y = _expand_batch(x, y)
    count = None if mask is None else _check_mask(mask, x)
    x, y = _zero_rows(x, count), _zero_rows(y, count)
    with full_precision(x):
        directions = torch.randn(x.shape[-1], projections, dtype=x.dtype, device=x.device)
        directions = directions / directions.norm(dim=0)
        rows = torch.ones_like(x[..., 0], dtype=torch.bool) if count is None else count
        sorted_x, sorted_y = (_sorted_rows(sample @ directions, count) for sample in (x, y))
        size = rows.sum(-1)
        places = torch.arange(x.shape[-2], device=x.device)
        within = places < size[..., None]
        difference = torch.where(within[..., None], sorted_x - sorted_y, torch.zeros_like(sorted_x))
        distance = difference.square() if p == 2 else difference.abs().pow(p)
        return distance.sum((-2, -1)) / (projections * size.clamp(min=1))


# -- kernels ----------------------------------------------------------------------------------------------------------


def gram_matrix(x: Tensor, kernel: Kernel, bandwidth: Bandwidth, count: Tensor | None = None) -> Tensor:
    """Return the kernel of all pairs of rows.

    Args:
        x: ``(.., N, D)``.
        kernel, bandwidth: as in :func:`squared_mmd`.
        count: boolean ``(.., N)``, the rows among whose distances the median is taken; None for all.

    Returns:
        ``(.., N, N)``.
    """
    kernel = check_kernel(kernel)
    if not isinstance(kernel, str):
        gram = kernel(x, x)
        if not isinstance(gram, Tensor) or gram.shape != (*x.shape[:-1], x.shape[-2]):
            wanted = (*x.shape[:-1], x.shape[-2])
            raise ValueError(f"expected the kernel to return a tensor of shape {wanted}, got {describe(gram)}")
        return gram
    squared = squared_distances(x)
    if bandwidth is None:
        widths: list[Any] = [_median(squared, count)[..., None, None]]
    else:
        widths = [h**2 for h in (bandwidth if isinstance(bandwidth, tuple) else (bandwidth,))]
    if kernel == "gaussian":
        each = [(-squared / (2 * width)).exp() for width in widths]
    else:
        each = [width / (width + squared) for width in widths]
    mean: Tensor = sum(each[1:], each[0]) / len(each)
    return mean


def squared_distances(x: Tensor) -> Tensor:
    """Return the squared Euclidean distances of all pairs of rows.

    Args:
        x: ``(.., N, D)``.

    Returns:
        ``(.., N, N)``, 0 on the diagonal.
    """
    x = x - x.detach().mean(-2, keepdim=True)  # or the difference of large numbers would lose digits
    norms = x.square().sum(-1)
    squared = norms[..., :, None] + norms[..., None, :] - 2 * x @ x.mT
    return squared.clamp(min=0) * _different_rows(x.shape[-2], x.device)


@torch.no_grad()
def _median(squared: Tensor, count: Tensor | None) -> Tensor:
    """Return the median of squared distances between different rows that count, ``(..)``; 1 if there is none above 0.

    Args:
        squared: ``(.., N, N)``.
        count: boolean ``(.., N)``; None for all.
    """
    pairs = _different_rows(squared.shape[-1], squared.device)
    if count is not None:
        pairs = pairs & count[..., :, None] & count[..., None, :]
    median = squared.masked_fill(~pairs, torch.nan).flatten(-2).nanmedian(-1).values
    return torch.where(median > 0, median, torch.ones_like(median))


def _different_rows(size: int, device: torch.device) -> Tensor:
    """Return True for pairs of different rows, boolean ``(size, size)``."""
    return ~torch.eye(size, dtype=torch.bool, device=device)


def _sorted_rows(x: Tensor, count: Tensor | None) -> Tensor:
    """Sort rows within columns, ``(.., N, L)``, those that do not count last."""
    if count is None:
        return x.sort(dim=-2).values
    largest = torch.full_like(x, torch.finfo(x.dtype).max)
    return torch.where(count[..., None], x, largest).sort(dim=-2).values


# -- arguments --------------------------------------------------------------------------------------------------------


def check_kernel(kernel: Any) -> Kernel:
    """Return the name of a kernel, or a function of two samples. Raises a TypeError or a ValueError for others."""
    if isinstance(kernel, str):
        return check_choice("kernel", kernel, KERNELS)
    return check_function("kernel", kernel, ("x", "y"))


def check_bandwidth(bandwidth: Any) -> Bandwidth:
    """Return a positive number, a tuple of such, or None. Raises a TypeError or a ValueError for anything else."""
    if bandwidth is None:
        return None
    if isinstance(bandwidth, Iterable) and not isinstance(bandwidth, str | Tensor):
        each = tuple(check_number("bandwidth", h, above=0) for h in bandwidth)
        if not each:
            raise ValueError("expected one bandwidth at least, got none: None is the median of the distances")
        return each
    return check_number("bandwidth", bandwidth, above=0)


def full_precision(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast: a difference of products loses its digits in half precision."""
    return torch.autocast(x.device.type, enabled=False)


def _check_samples(x: Any, y: Any, same_size: bool = True) -> tuple[Tensor, Tensor]:
    """Return samples as floats of one type, float32 or wider. Raises a TypeError or a ValueError for anything else."""
    for argument, value in (("x", x), ("y", y)):
        if check_tensor(argument, value).dim() < 2:
            raise ValueError(f"expected {argument} of shape (.., N, D), got {tuple(value.shape)}")
        if value.is_complex():
            raise TypeError(f"expected {argument} to be real, got {value.dtype}")
    if same_size and x.shape[-1] != y.shape[-1]:
        raise ValueError(f"expected two samples of one dimension, got {x.shape[-1]} and {y.shape[-1]}")
    dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return x.to(dtype), y.to(dtype)


def _expand_batch(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return two samples with the same leading dimensions."""
    batch = torch.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    return x.expand(*batch, *x.shape[-2:]), y.expand(*batch, *y.shape[-2:])


def _zero_rows(x: Tensor, count: Tensor | None) -> Tensor:
    """Return a sample ``(.., N, D)`` with zeros in rows that do not count, whose values may be anything."""
    return x if count is None else torch.where(count[..., None], x, torch.zeros_like(x))


def _check_mask(mask: Any, x: Tensor) -> Tensor:
    """Return a mask as ``(.., N)`` of a sample ``(.., N, D)``. Raises a TypeError or a ValueError for anything else."""
    if check_tensor("mask", mask).dtype != torch.bool:
        raise TypeError(f"expected mask to be boolean, got {mask.dtype}")
    sizes = zip(mask.shape[::-1], x.shape[-2::-1], strict=False)
    fits = mask.dim() in range(1, x.dim()) and all(size in (1, known) for size, known in sizes)
    if not fits or mask.shape[-1] != x.shape[-2]:
        raise ValueError(f"expected a mask of {x.shape[-2]} rows, got shape {tuple(mask.shape)}")
    by_row: Tensor = mask.expand(x.shape[:-1])
    return by_row
