"""Fréchet distance between two sets of images, in the features of a network."""

from __future__ import annotations

import torch
from torch import Tensor

from ..utils.arguments import check_tensor
from .feature_rows import Features, Rows, feature_blocks


@torch.no_grad()
def frechet_distance(
    real: Rows,
    fake: Rows,
    features: Features | None = None,
) -> float:
    r"""Compute the squared Fréchet distance between normal distributions fitted to features of two data sets.

    The distance is :func:`gaussian_frechet` of the means and the sample covariances (over N - 1) of f(x). With the
    pool3 features of the published Inception network it is the FID; values under different f cannot be compared. Its
    bias is upward and falls with N, and with fewer rows than features the covariances are singular: compare values at
    the same N, well above the number of features.

    Args:
        real, fake: values, ``(N, *event)``, or iterables of such tensors, which bound the memory.
        features: f, maps ``(B, *event)`` to ``(B, D)``; further dimensions are flattened. A module is called in its
            present mode. None takes the values themselves.

    Returns:
        Squared distance, in squared units of the features.

    Raises:
        ValueError: fewer than two rows, or features that are not finite.

    References:
        Heusel et al. 2017 (arXiv:1706.08500).

    >>> x = torch.tensor([[0.0], [1.0], [2.0]])
    >>> frechet_distance(x, x + 3)
    9.0
    """
    return gaussian_frechet(*_moments(real, features, "real"), *_moments(fake, features, "fake"))


def gaussian_frechet(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    r"""Compute the squared Fréchet (2-Wasserstein) distance between two normal distributions.

    .. math:: |\mu_1 - \mu_2|^2 + \mathrm{tr}\, \Sigma_1 + \mathrm{tr}\, \Sigma_2
              - 2\, \mathrm{tr} (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2}

    The last trace is computed as the sum of the singular values of :math:`\Sigma_1^{1/2} \Sigma_2^{1/2}`, which is
    real and holds for singular covariances too. Negative eigenvalues and a negative distance, which are rounding
    errors, count as 0.

    Args:
        mean, other_mean: ``(D,)``.
        covariance, other_covariance: ``(D, D)``, symmetric.

    Returns:
        Squared distance.

    Raises:
        ValueError: shapes that do not fit.

    References:
        Dowson & Landau 1982 (Journal of Multivariate Analysis).

    >>> gaussian_frechet(torch.zeros(2), torch.eye(2), torch.ones(2), torch.eye(2))
    2.0
    """
    given = {
        "mean": mean, "covariance": covariance, "other_mean": other_mean, "other_covariance": other_covariance,
    }  # fmt: skip
    for argument, value in given.items():
        check_tensor(argument, value)
    mean, covariance, other_mean, other_covariance = (x.detach().double().cpu() for x in given.values())
    square = (len(mean), len(mean))
    if other_mean.shape != mean.shape or covariance.shape != square or other_covariance.shape != square:
        shapes = [tuple(x.shape) for x in given.values()]
        raise ValueError(f"expected means (D,) and covariances (D, D), got {shapes}")

    between_means = (mean - other_mean).square().sum()
    overlap = torch.linalg.svdvals(_square_root(covariance) @ _square_root(other_covariance)).sum()
    distance = between_means + covariance.trace() + other_covariance.trace() - 2 * overlap
    return max(0.0, float(distance))


def _square_root(covariance: Tensor) -> Tensor:
    """Return the symmetric square root of a positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    root: Tensor = vectors * values.clamp(min=0).sqrt() @ vectors.T
    return root


def _moments(data: Rows, features: Features | None, what: str) -> tuple[Tensor, Tensor]:
    """Compute the mean ``(D,)`` and the covariance ``(D, D)`` of features, in float64 and one pass over the data."""
    count = 0
    shift = torch.zeros(())
    first_moment = torch.zeros(())
    second_moment = torch.zeros(())
    for f in feature_blocks(data, features, what):
        if not count:
            shift = f.mean(0)  # sums of squares about 0 would lose precision where the mean is large
        f = f - shift
        count += len(f)
        first_moment = first_moment + f.sum(0)
        second_moment = second_moment + f.T @ f

    if count < 2:
        raise ValueError(f"expected at least two rows of {what} data, got {count}")
    mean = first_moment / count
    return shift + mean, (second_moment - count * torch.outer(mean, mean)) / (count - 1)
