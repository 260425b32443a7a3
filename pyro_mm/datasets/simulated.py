"""Data drawn from stories whose latents are known, to weigh what a model finds against them.

Every function takes a seed and gives the same on every machine. Latents come beside the batch, and not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..utils.arguments import check_counts, check_integer, check_mapping, check_number
from .pairing import generator

CENTRES, SCALES = (-5.0, 5.0), (0.5, 3.0)  # of the clusters: between what they are drawn uniformly
SLOPE = 0.1


def orthonormal_loadings(dims: Mapping[str, int], shared: int, private: int = 0, seed: int = 0) -> dict[str, Tensor]:
    r"""Loadings of a linear-Gaussian story whose columns are orthonormal within each modality.

    .. math:: W_m = [A_m, 0, \dots, B_m, \dots, 0], \qquad [A_m, B_m]^T [A_m, B_m] = I

    with :math:`A_m` the loadings of what all share and :math:`B_m` those of what is the modality's own, which all
    others have zeros for. With noise of one scale the posterior of
    :class:`~pyro_mm.models.LinearGaussian` given any of the modalities is then diagonal.

    Args:
        dims: modality -> :math:`d_m`, at least ``shared + private``.
        shared, private: latent dimensions of all, and of each modality.
        seed: of the loadings.

    Returns:
        modality -> float32 ``(d_m, shared + M private)``, the shared columns first: the Q of a matrix with entries
        uniform in [-1, 1], as Hirt et al. 2024 (arXiv:2309.00380) have it.

    Raises:
        ValueError: a modality has too few dimensions.
    """
    _check_sizes(dims, seed)
    check_counts(0, shared=shared, private=private)
    rng, loadings = generator(seed, 0), {}
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
    """Raise a TypeError or a ValueError unless every modality has a number of dimensions."""
    for name, size in check_mapping("dims", dims, "numbers of dimensions", least=1).items():
        check_integer(f"dims[{name!r}]", size, 1)
    check_integer("seed", seed)


class Sources(NamedTuple):
    """Rows, and what they were drawn from: the latents ``(N, D)`` and the mixing of each modality."""

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
    r"""Non-linear mixtures of latents whose distribution depends on an auxiliary label.

    .. math:: u \sim \mathrm{uniform}, \quad z | u \sim N(\mu_u, \mathrm{diag}(s_u^2)), \quad
              x_m = B_m \, \mathrm{lrelu}(A_m z) + \epsilon_m, \quad \epsilon_m \sim N(0, \sigma^2 I)

    :math:`\mu_u` is uniform in [-5, 5], :math:`s_u` in [0.5, 3]; :math:`A_m` and :math:`B_m` have orthonormal columns
    and the leaky ReLU the slope 0.1, so that the mixing is injective, and z is identifiable up to permutation and
    scaling of its entries. Khemakhem et al. 2020 (iVAE, arXiv:1907.04809), without their Laplace sources; Hirt et al.
    2024 (arXiv:2309.00380). They reuse :math:`A_m` for :math:`B_m` where it is square; here they are two draws.

    Args:
        rows: N; of every cluster as many, to one.
        latent: D.
        dims: modality -> its dimensions, at least D.
        noise: :math:`\sigma`.
        clusters: the number of values of u.
        label: a name makes u, int64 ``(N,)``, one more modality; with None it is the covariate ``"label"``.
        seed: of the story; ``part`` draws other rows from the same one (0 to train on, 1 to test on).

    Raises:
        ValueError: a modality has fewer dimensions than the latent.
    """
    _check_sizes(dims, seed)
    check_counts(rows=rows, latent=latent, clusters=clusters)
    check_number("noise", noise, 0)
    check_integer("part", part, 0)
    rng = generator(seed, 0)
    centres, scales = rng.uniform(*CENTRES, (clusters, latent)), rng.uniform(*SCALES, (clusters, latent))
    mixing = {}
    for name, size in dims.items():
        if size < latent:
            raise ValueError(f"{name!r} has {size} dimensions, and cannot be an injective mixture of {latent} latents")
        inner = np.linalg.qr(rng.uniform(-1, 1, (size, latent)))[0]
        outer = np.linalg.qr(rng.uniform(-1, 1, (size, size)))[0]
        mixing[name] = Mixing(torch.from_numpy(inner), torch.from_numpy(outer))
    rng = generator(seed, 1 + part)
    u = rng.permutation(np.arange(rows) % clusters)
    z = torch.from_numpy(centres[u] + scales[u] * rng.standard_normal((rows, latent)))
    values = {
        n: (f(z) + noise * torch.from_numpy(rng.standard_normal((rows, dims[n])))).float() for n, f in mixing.items()
    }
    classes = torch.from_numpy(u)
    batch = Batch(values, covariates={"label": classes}) if label is None else Batch({**values, label: classes})
    return Sources(batch, z.float(), mixing, torch.from_numpy(centres), torch.from_numpy(scales))


class Mixing:
    """``z (.., D) -> B lrelu(A z) (.., d)``, in the type of z."""

    def __init__(self, inner: Tensor, outer: Tensor):
        self.inner, self.outer = inner, outer

    def __call__(self, z: Tensor) -> Tensor:
        inner, outer = self.inner.to(z.dtype), self.outer.to(z.dtype)
        return torch.nn.functional.leaky_relu(z @ inner.T, SLOPE) @ outer.T


def missing(batch: Batch, rate: float, seed: int = 0) -> Batch:
    r"""The same rows with modalities missing at random, every row keeping one at least.

    One modality of a row, drawn uniformly, stays; each of the others stays with probability
    :math:`(M (1 - r) - 1) / (M - 1)`, so that a share r of all is missing.

    Args:
        rate: r, from 0 to (M - 1) / M.
        seed: of the choice.

    Raises:
        ValueError: the rate is not in that range.
    """
    check_batch(batch)
    check_number("rate", rate)
    check_integer("seed", seed)
    names, top = batch.names, (len(batch.names) - 1) / len(batch.names)
    if not 0 <= rate <= top:
        raise ValueError(f"expected a rate from 0 to {top:g}, since a row keeps one of {len(names)}; got {rate}")
    rng = generator(seed, 3)
    kept = rng.integers(len(names), size=batch.size)
    odds = (len(names) * (1 - rate) - 1) / max(len(names) - 1, 1)
    stays = rng.uniform(size=(batch.size, len(names))) < odds
    masks = {}
    for m, name in enumerate(names):
        mask = torch.from_numpy(stays[:, m] | (kept == m)).to(batch.device) & batch.present[name]
        masks[name] = bool(mask.any()) if bool(mask.all()) or not bool(mask.any()) else mask
    return batch._copy(_masks=masks)


def dimensions(names: Sequence[str], low: int = 30, high: int = 60, seed: int = 0) -> dict[str, int]:
    """A size for each modality, uniform in ``[low, high)``."""
    return dict(zip(names, generator(seed, 4).integers(low, high, len(names)).tolist(), strict=True))
