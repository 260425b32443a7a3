"""The Fréchet distance between two sets of pictures, in the features of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ..utils.arguments import check_function, check_tensor, describe

CHUNK = 256  # rows at once


@torch.no_grad()
def frechet_distance(
    real: Tensor | Iterable[Tensor],
    fake: Tensor | Iterable[Tensor],
    features: Callable[[Tensor], Tensor] | None = None,
) -> float:
    r"""The squared Fréchet distance of two normal distributions fitted to features of real and of generated data.

    :func:`gaussian_frechet` of the means :math:`\mu` and the covariances :math:`\Sigma` (over N - 1) of f(x). With the
    pool3 features of the published Inception network it is the FID (Heusel et al. 2017, arXiv 1706.08500); with any
    other f it can be compared only under the same f. Its bias is upward and falls with N, and with fewer rows than
    features the covariances are singular: compare at one N, well above the number of features.

    Args:
        real, fake: ``(N, *event)``, or iterables of such tensors, so that not all of it is held at once.
        features: f, ``(B, *event) -> (B, D)``, any further dimensions flattened, called in its present mode; None
            for the values themselves.

    Raises:
        ValueError: there are fewer than two rows, or features that are not finite.
    """
    if features is not None:
        check_function("features", features, ("values",))
    return gaussian_frechet(*_moments(real, features, "real"), *_moments(fake, features, "fake"))


def gaussian_frechet(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> float:
    r"""The squared Fréchet (2-Wasserstein) distance of two normal distributions.

    .. math:: |\mu_1 - \mu_2|^2 + \mathrm{tr}\, \Sigma_1 + \mathrm{tr}\, \Sigma_2
              - 2\, \mathrm{tr} (\Sigma_1^{1/2} \Sigma_2 \Sigma_1^{1/2})^{1/2}

    The last trace is the sum of the singular values of :math:`\Sigma_1^{1/2} \Sigma_2^{1/2}`: no square root is taken
    of a matrix that is not symmetric, nothing becomes complex, and singular covariances are as good as others.
    Negative eigenvalues, which only rounding makes, count as 0, and so does a negative distance. Dowson & Landau 1982.

    Args:
        mean, other_mean: ``(D,)``.
        covariance, other_covariance: ``(D, D)``, symmetric.
    """
    given = {
        "mean": mean, "covariance": covariance, "other_mean": other_mean, "other_covariance": other_covariance,
    }  # fmt: skip
    for argument, value in given.items():
        check_tensor(argument, value)
    a, b, m, n = (x.detach().double().cpu() for x in (covariance, other_covariance, mean, other_mean))
    if m.shape != n.shape or a.shape != b.shape or a.shape != (len(m), len(m)):
        raise ValueError(f"expected means (D,) and covariances (D, D), got {[tuple(x.shape) for x in (m, a, n, b)]}")
    overlap = torch.linalg.svdvals(_root(a) @ _root(b)).sum()
    distance = (m - n).square().sum() + a.trace() + b.trace() - 2 * overlap
    return max(0.0, distance.item())


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root."""
    values, vectors = torch.linalg.eigh((covariance + covariance.T) / 2)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def _rows(block: Tensor, what: str) -> Tensor:
    if check_tensor(what, block).dim() == 0:
        raise ValueError(f"expected {what} of shape (N, ..), got a single number")
    return block


def _moments(
    data: Tensor | Iterable[Tensor], features: Callable[[Tensor], Tensor] | None, what: str
) -> tuple[Tensor, Tensor]:
    """Mean ``(D,)`` and covariance ``(D, D)`` of features, in one pass and float64."""
    if isinstance(data, str | Mapping) or not isinstance(data, Tensor | Iterable):
        raise TypeError(f"expected {what} to be a tensor (N, ..) or an iterable of them, got {describe(data)}")
    blocks = [data] if isinstance(data, Tensor) else data
    count, shift, first, second = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for part in (part for block in blocks for part in _rows(block, what).split(CHUNK)):
        f = (part if features is None else features(part)).flatten(1).double().cpu()
        if not count:
            shift = f.mean(0)  # sums of squares about 0 lose the digits that a large mean takes
        count, f = count + len(f), f - shift
        first, second = first + f.sum(0), second + f.T @ f
    if count < 2:
        raise ValueError(f"expected at least two rows of {what} data, got {count}")
    if not bool(second.isfinite().all()):
        raise ValueError(f"features of {what} data that are not finite")
    mean = first / count
    return shift + mean, (second - count * torch.outer(mean, mean)) / (count - 1)
