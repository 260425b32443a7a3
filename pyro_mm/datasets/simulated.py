"""Data simulated from stories with known latents, with which a model's latents can be compared.

Every function takes a seed and returns the same on every machine. Latents are returned beside the batch, not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..utils.arguments import check_counts, check_integer, check_mapping, check_number
from .pairing import numpy_generator
from .simulated_factors import Factors as Factors
from .simulated_factors import factors as factors

CENTRES = (-5.0, 5.0)  # the range of the clusters' means
SCALES = (0.5, 3.0)  # the range of their standard deviations
SLOPE = 0.1  # of the leaky rectifier


def orthonormal_loadings(dims: Mapping[str, int], shared: int, private: int = 0, seed: int = 0) -> dict[str, Tensor]:
    r"""Sample loadings of a linear-Gaussian story whose columns are orthonormal within each modality.

    .. math:: W_m = [A_m, 0, \dots, B_m, \dots, 0], \qquad [A_m, B_m]^T [A_m, B_m] = I

    with :math:`A_m` the loadings of the shared latents and :math:`B_m` those of the modality's private latents, for
    which all other modalities have zeros. If all noise has one scale, the posterior of
    :class:`~pyro_mm.models.LinearGaussian` given any set of modalities is then diagonal.

    Args:
        dims: modality -> its dimension :math:`d_m`, at least ``shared + private``.
        shared: the number of latents shared by all M modalities.
        private: the number of private latents of each modality.
        seed: the seed of the loadings.

    Returns:
        modality -> float32 ``(d_m, shared + M * private)``, the shared columns first. The columns are the Q factor of
        a matrix with entries uniform in [-1, 1].

    Raises:
        ValueError: a modality has too few dimensions.

    References:
        Hirt et al. 2024 (arXiv:2309.00380).
    """
    _check_sizes(dims, seed)
    check_counts(0, shared=shared, private=private)
    rng = numpy_generator(seed, 0)
    loadings = {}
    for m, (name, size) in enumerate(dims.items()):
        if size < shared + private:
            raise ValueError(f"{name!r} has {size} dimensions, too few for {shared + private} orthonormal columns")
        own = np.linalg.qr(rng.uniform(-1, 1, (size, shared + private)))[0]
        full = np.zeros((size, shared + len(dims) * private))
        full[:, :shared] = own[:, :shared]
        start = shared + m * private
        full[:, start : start + private] = own[:, shared:]
        loadings[name] = torch.from_numpy(full).float()
    return loadings


def _check_sizes(dims: Any, seed: Any) -> None:
    """Raise a TypeError or a ValueError unless ``dims`` maps names to positive integers and ``seed`` is an integer."""
    for name, size in check_mapping("dims", dims, "numbers of dimensions", least=1).items():
        check_integer(f"dims[{name!r}]", size, 1)
    check_integer("seed", seed)


class Sources(NamedTuple):
    """Simulated rows with their true latents and the parameters that they were sampled from.

    Attributes:
        batch: N rows.
        latents: z, float32 ``(N, D)``.
        mixing: modality -> the function from z to its mean.
        centres: the mean of z in each cluster, float64 ``(clusters, D)``.
        scales: its standard deviation in each cluster, float64 ``(clusters, D)``.
    """

    batch: Batch
    latents: Tensor
    mixing: Mapping[str, Mixing]
    centres: Tensor
    scales: Tensor


def clustered(
    rows: int,
    latent: int,
    dims: Mapping[str, int],
    *,
    noise: float,
    clusters: int = 5,
    label: str | None = None,
    seed: int = 0,
    part: int = 0,
) -> Sources:
    r"""Simulate non-linear mixtures of latents whose distribution depends on an auxiliary label u.

    .. math:: u \sim \mathrm{uniform}, \quad z | u \sim N(\mu_u, \mathrm{diag}(s_u^2)), \quad
              x_m = B_m \, \mathrm{lrelu}(A_m z) + \epsilon_m, \quad \epsilon_m \sim N(0, \sigma^2 I)

    The entries of :math:`\mu_u` are uniform in [-5, 5], those of :math:`s_u` in [0.5, 3]. :math:`A_m` and :math:`B_m`
    have orthonormal columns and the leaky ReLU has slope 0.1, so that the mixing is injective, and z is identifiable
    up to permutation and scaling of its entries.

    Args:
        rows: the number of rows N, divided among the clusters as evenly as possible.
        latent: the number of latents D.
        dims: modality -> its dimension, at least D.
        noise: the standard deviation :math:`\sigma`.
        clusters: the number of values of u.
        label: the name of a modality that holds u, int64 ``(N,)``; with None u is the covariate ``"label"``.
        seed: the seed of the story and of its rows.
        part: rows of one story: each part has rows of its own (0 to train on, 1 to test on).

    Returns:
        The rows with their latents; values are float32 ``(N, d_m)``.

    Raises:
        ValueError: a modality has fewer dimensions than there are latents.

    References:
        Khemakhem et al. 2020 (iVAE, arXiv:1907.04809), without their Laplace sources; Hirt et al. 2024
        (arXiv:2309.00380). They reuse :math:`A_m` for :math:`B_m` if it is square; here they are two draws.
    """
    _check_sizes(dims, seed)
    check_counts(rows=rows, latent=latent, clusters=clusters)
    check_number("noise", noise, 0)
    check_integer("part", part, 0)

    rng = numpy_generator(seed, 0)
    centres = rng.uniform(*CENTRES, (clusters, latent))
    scales = rng.uniform(*SCALES, (clusters, latent))
    mixing = {}
    for name, size in dims.items():
        if size < latent:
            raise ValueError(f"{name!r} has {size} dimensions, and cannot be an injective mixture of {latent} latents")
        inner = np.linalg.qr(rng.uniform(-1, 1, (size, latent)))[0]
        outer = np.linalg.qr(rng.uniform(-1, 1, (size, size)))[0]
        mixing[name] = Mixing(torch.from_numpy(inner), torch.from_numpy(outer))

    rng = numpy_generator(seed, 1 + part)
    u = rng.permutation(np.arange(rows) % clusters)
    z = torch.from_numpy(centres[u] + scales[u] * rng.standard_normal((rows, latent)))
    values = {}
    for name, mix in mixing.items():
        error = torch.from_numpy(rng.standard_normal((rows, dims[name])))
        values[name] = (mix(z) + noise * error).float()

    classes = torch.from_numpy(u)
    batch = Batch(values, covariates={"label": classes}) if label is None else Batch({**values, label: classes})
    return Sources(batch, z.float(), mixing, torch.from_numpy(centres), torch.from_numpy(scales))


class Mixing:
    """A non-linear map from latents ``(.., D)`` to means ``(.., d)``: ``B lrelu(A z)``, in the dtype of z.

    Args:
        inner: A, ``(d, D)``.
        outer: B, ``(d, d)``.
    """

    def __init__(self, inner: Tensor, outer: Tensor):
        self.inner, self.outer = inner, outer

    def __call__(self, z: Tensor) -> Tensor:
        inner = self.inner.to(z.dtype)
        outer = self.outer.to(z.dtype)
        return torch.nn.functional.leaky_relu(z @ inner.T, SLOPE) @ outer.T


def missing(batch: Batch, rate: float, seed: int = 0) -> Batch:
    r"""Mask modalities at random, leaving at least one in every row.

    One of the M modalities of each row, chosen uniformly, stays. Each of the others stays with probability
    :math:`(M (1 - r) - 1) / (M - 1)`, so that a share r of all values is missing.

    Args:
        batch: N rows.
        rate: the share r of missing values, in [0, (M - 1) / M].
        seed: the seed of the choice.

    Returns:
        A batch of the same rows with other masks; a modality that was missing before stays missing.

    Raises:
        ValueError: ``rate`` is outside that range.

    >>> missing(Batch({"a": torch.zeros(1000), "b": torch.ones(1000)}), 0.25)
    Batch(size=1000, a() present: 77%, b() present: 74%)
    """
    check_batch(batch)
    check_number("rate", rate)
    check_integer("seed", seed)
    names = batch.names
    highest = (len(names) - 1) / len(names)
    if not 0 <= rate <= highest:
        raise ValueError(f"expected a rate from 0 to {highest:g}, since a row keeps one of {len(names)}; got {rate}")
    rng = numpy_generator(seed, 3)
    only = rng.integers(len(names), size=batch.size)  # the modality of each row that stays in any case
    probability = (len(names) * (1 - rate) - 1) / max(len(names) - 1, 1)
    stays = rng.uniform(size=(batch.size, len(names))) < probability

    masks = {}
    for m, name in enumerate(names):
        mask = torch.from_numpy(stays[:, m] | (only == m)).to(batch.device) & batch.present[name]
        masks[name] = bool(mask.any()) if bool(mask.all()) or not bool(mask.any()) else mask
    return batch._copy(_masks=masks)


def dimensions(names: Sequence[str], low: int = 30, high: int = 60, seed: int = 0) -> dict[str, int]:
    """Sample a dimension for each modality, uniform in ``[low, high)``.

    Args:
        names: the modalities.
        low, high: the range of the dimensions.
        seed: the seed.

    Returns:
        modality -> dimension.
    """
    return dict(zip(names, numpy_generator(seed, 4).integers(low, high, len(names)).tolist(), strict=True))
