"""Recovery of known latents, up to the transformations that data cannot identify."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..utils.arguments import check_choice, check_integer, check_tensor
from ..utils.global_state import preserve_process_settings

Kind = Literal["pearson", "spearman", "rdc"]
NUM_WAVES = 20  # random sines of the randomised dependence coefficient
FREQUENCY = 0.5  # standard deviation of their frequencies and phases
ROUNDING = 16  # machine epsilons; an entry whose relative range is smaller counts as constant


class MeanCorrelation(NamedTuple):
    """Mean correlation coefficients between true and estimated latents, in [0, 1]; 1 if they are identified.

    The strong coefficient allows for a permutation and a rescaling of the entries, the weak one for any affine map.

    Attributes:
        strong_in: strong coefficient on the rows that the permutation was fitted to.
        strong_out: strong coefficient on the other rows.
        weak_in: weak coefficient on the rows that the affine map was fitted to.
        weak_out: weak coefficient on the other rows.
    """

    strong_in: float
    strong_out: float
    weak_in: float
    weak_out: float


def mean_correlation(
    latents: Tensor, estimates: Tensor, *, kind: Kind = "pearson", fitted: int | None = None
) -> MeanCorrelation:
    r"""Compute the mean correlation coefficient (MCC) between true and estimated latents.

    .. math:: \mathrm{MCC} = \max_\pi \frac1D \sum_d |\mathrm{corr}(z_d, \hat z_{\pi(d)})|

    The maximum is over permutations :math:`\pi`, by SciPy's linear assignment. The weak coefficient is the MCC of the
    canonical variates of z and :math:`\hat z`: D pairs of linear functions of maximal correlation, each pair
    uncorrelated with the others.

    Args:
        latents: true latents z, ``(N, D)``.
        estimates: posterior means or draws :math:`\hat z` of the same rows, ``(N, D)``.
        kind: ``"pearson"``; ``"spearman"``, the correlation of ranks, which is invariant to an increasing function of
            each entry; or ``"rdc"``, the randomised dependence coefficient, which is invariant to nearly any function
            of an entry. That is the largest correlation between linear functions of 20 sines of the ranks, with
            frequencies and phases from N(0, 1/4).
        fitted: number of leading rows to which permutation and affine map are fitted; the other rows are out of
            sample. Half of the rows by default.

    Returns:
        The strong and the weak coefficient, in and out of sample.

    Raises:
        ValueError: shapes that do not fit, or D + 1 rows or fewer in or out of sample.

    References:
        Khemakhem et al. 2020 (ICE-BeeM, arXiv:2002.11537), for the strong and the weak coefficient. Lopez-Paz et al.
        2013 (arXiv:1304.7717), for the randomised dependence coefficient. Hirt et al. 2024 (arXiv:2309.00380): in
        their released code all but the strong coefficient out of sample are ``"rdc"``, and the weak one is that of
        the best pair only.

    >>> z = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    >>> [round(x, 3) for x in mean_correlation(z, -3 * z.flip(1) + 1)]
    [1.0, 1.0, 1.0, 1.0]
    """
    check_tensor("latents", latents)
    check_tensor("estimates", estimates)
    check_choice("kind", kind, ("pearson", "spearman", "rdc"))
    if latents.dim() != 2 or latents.shape != estimates.shape:
        shapes = f"{tuple(latents.shape)} and {tuple(estimates.shape)}"
        raise ValueError(f"expected latents and estimates of one shape (N, D), got {shapes}")
    rows, size = latents.shape
    fitted = rows // 2 if fitted is None else check_integer("fitted", fitted)
    if min(fitted, rows - fitted) <= size + 1:
        raise ValueError(f"expected more than {size + 1} rows on either side, got {fitted} and {rows - fitted}")

    # the output of a network of low precision varies at least by its rounding errors
    tolerance = max(ROUNDING * max(_epsilon(latents), _epsilon(estimates)), 1e-9)
    z = _without_rounding(latents)
    z_hat = _without_rounding(estimates)

    strong = _in_and_out_of_sample(z, z_hat, fitted, kind)
    (z_mean, z_map), (z_hat_mean, z_hat_map) = _canonical_maps(z[:fitted], z_hat[:fitted], tolerance)
    weak = _in_and_out_of_sample((z - z_mean) @ z_map, (z_hat - z_hat_mean) @ z_hat_map, fitted, kind)
    return MeanCorrelation(*strong, *weak)


def _in_and_out_of_sample(x: Tensor, y: Tensor, fitted: int, kind: Kind) -> tuple[float, float]:
    """Compute the MCC of the first ``fitted`` rows, and of the others under the same permutation."""
    in_sample = _correlations(x[:fitted], y[:fitted], kind)
    out_of_sample = _correlations(x[fitted:], y[fitted:], kind)
    pairs = _best_assignment(in_sample)
    return float(in_sample[pairs].mean()), float(out_of_sample[pairs].mean())


def _epsilon(x: Tensor) -> float:
    """Return the machine epsilon of a tensor's type, 0 for integers."""
    return torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0


def _without_rounding(x: Tensor) -> Tensor:
    """Return ``x`` in float64, with entries that vary by no more than rounding errors made constant."""
    values = x.detach().cpu().double()
    spread = values.amax(0) - values.amin(0)
    magnitude = values.abs().amax(0)
    return torch.where(spread <= ROUNDING * _epsilon(x) * magnitude, values[:1], values)


def _correlations(x: Tensor, y: Tensor, kind: Kind) -> np.ndarray:
    """Compute ``|corr(x_i, y_j)|``, ``(D, D)``; 0 for an entry that does not vary."""
    if kind != "pearson":
        with preserve_process_settings():
            from scipy.stats import rankdata

        x, y = (torch.from_numpy(rankdata(v.numpy(), axis=0)) for v in (x, y))
    if kind == "rdc":
        return np.array([[float(torch.linalg.svdvals(a.T @ b)[0]) for b in _waves(y)] for a in _waves(x)])
    x = _centred(x)
    y = _centred(y)
    norms = x.norm(dim=0)[:, None] * y.norm(dim=0)
    return torch.where(norms > 0, (x.T @ y).abs() / norms, 0.0).numpy()


def _waves(ranks: Tensor) -> list[Tensor]:
    r"""Return an orthonormal basis of the centred random sines of each entry's ranks, ``(N, NUM_WAVES)`` each.

    For two entries A and B, the largest singular value of :math:`A^T B` is :math:`\max_{a, b} \mathrm{corr}(\sum_k a_k
    \sin(\omega_k r / N + \phi_k), \sum_k b_k \sin(\omega_k r' / N + \phi_k))`, with their ranks r and r', ``(N,)``.
    Directions that do not vary are columns of zeros.
    """
    generator = torch.Generator().manual_seed(0)
    frequency, phase = FREQUENCY * torch.randn(2, NUM_WAVES, dtype=ranks.dtype, generator=generator)
    bases = []
    for rank in ranks.T:
        if not rank.ne(rank[0]).any():
            bases.append(ranks.new_zeros(len(rank), NUM_WAVES))
            continue
        waves = torch.sin((rank / len(rank))[:, None] * frequency + phase)
        left, singular_values, _ = torch.linalg.svd(waves - waves.mean(0), full_matrices=False)
        bases.append(left * (singular_values > 1e-6 * singular_values[0]))
    return bases


def _best_assignment(correlations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows, columns) of the permutation with the largest sum of correlations."""
    with preserve_process_settings():
        from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(correlations, maximize=True)
    return rows, columns


def _centred(x: Tensor) -> Tensor:
    """Return the deviations of each column from its mean, exactly 0 for a constant column."""
    return torch.where((x == x[:1]).all(0), 0.0, x - x.mean(0))


def _canonical_maps(x: Tensor, y: Tensor, tolerance: float) -> list[tuple[Tensor, Tensor]]:
    """Compute the means of ``x`` and ``y``, and the maps ``(D, D)`` from deviations to canonical variates.

    Args:
        x, y: ``(N, D)`` each.
        tolerance: fraction of the largest singular value below which a direction of the standardised columns is
            rounding error, and correlation below which two variates are uncorrelated. The maps are 0 there.
    """
    x_whitened, whiten_x = _whiten(x, tolerance)
    y_whitened, whiten_y = _whiten(y, tolerance)
    left, correlations, right = torch.linalg.svd(x_whitened.T @ y_whitened)
    correlated = correlations > tolerance
    return [(x.mean(0), whiten_x @ left * correlated), (y.mean(0), whiten_y @ right.T * correlated)]


def _whiten(x: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return an orthonormal basis of the centred columns ``(N, D)``, and the map ``(D, D)`` from deviations to it."""
    centred = _centred(x)
    scale = centred.std(0)
    scale = torch.where(scale > 0, scale, torch.inf)
    left, singular_values, right = torch.linalg.svd(centred / scale, full_matrices=False)
    varies = singular_values > tolerance * singular_values[0]
    return left * varies, right.T / torch.where(varies, singular_values, torch.inf) / scale[:, None]
