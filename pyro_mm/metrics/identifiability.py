"""Whether latents were found again, up to what no data can tell."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..utils.arguments import check_choice, check_integer, check_tensor
from ..utils.global_state import preserve_process_settings

Kind = Literal["pearson", "spearman", "rdc"]
WAVES, FREQUENCY = 20, 0.5  # of the randomised dependence coefficient
ROUNDING = 16  # machine epsilons within which an entry, or a linear function of entries, does not vary


class MeanCorrelation(NamedTuple):
    """Mean correlation coefficients between true and estimated latents, 1 where these were found.

    ``strong`` allows for a permutation and a rescaling of the entries, ``weak`` for any affine map. ``_in`` is of the
    rows that the permutation or the map was fitted to, ``_out`` of others.
    """

    strong_in: float
    strong_out: float
    weak_in: float
    weak_out: float


def mean_correlation(
    latents: Tensor, estimates: Tensor, *, kind: Kind = "pearson", fitted: int | None = None
) -> MeanCorrelation:
    r"""The mean correlation coefficient (MCC) of true latents and what a model infers in their place.

    .. math:: \mathrm{MCC} = \max_\pi \frac1D \sum_d |\mathrm{corr}(z_d, \hat z_{\pi(d)})|

    over permutations :math:`\pi` (SciPy's assignment). The weak one is that of the canonical variates of z and
    :math:`\hat z`: of D pairs of linear functions that correlate as much as they can, each pair uncorrelated with the
    others.

    Args:
        latents: z, ``(N, D)``.
        estimates: :math:`\hat z`, ``(N, D)``: posterior means, or draws, of the same rows.
        kind: of correlation. That of ranks, "spearman", allows for any increasing function of each entry; "rdc" for
            nearly any function: it is the largest correlation of linear functions of 20 sines, of random frequencies
            and phases, of the ranks of either (the randomised dependence coefficient, Lopez-Paz et al. 2013,
            arXiv:1304.7717, with frequencies and phases from N(0, 1/4)).
        fitted: the first so many rows choose permutation and map, and the rest is out of sample; half by default.

    Raises:
        ValueError: shapes that do not fit, or too few rows on either side.

    Khemakhem et al. 2020 (ICE-BeeM, arXiv:2002.11537), who name the two; Hirt et al. 2024 (arXiv:2309.00380), in
    whose released code all but the strong one out of sample are "rdc", and the weak one is of the best pair only.
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
    # what a network of lower precision has made varies by its rounding errors, if by nothing else
    exact = max(ROUNDING * max(_epsilon(latents), _epsilon(estimates)), 1e-9)
    z, found = (_without_rounding(x) for x in (latents, estimates))
    here, there = (z[:fitted], found[:fitted]), (z[fitted:], found[fitted:])
    pairs = _assigned(_correlations(*here, kind))
    maps = _canonical(*here, exact)
    variates, others = ([(x - mean) @ m for x, (mean, m) in zip(part, maps, strict=True)] for part in (here, there))
    same = _assigned(_correlations(variates[0], variates[1], kind))
    return MeanCorrelation(
        _mean(_correlations(*here, kind), pairs),
        _mean(_correlations(*there, kind), pairs),
        _mean(_correlations(variates[0], variates[1], kind), same),
        _mean(_correlations(others[0], others[1], kind), same),
    )


def _epsilon(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if x.is_floating_point() else 0.0


def _without_rounding(x: Tensor) -> Tensor:
    """Return ``x`` in float64, with exact constants in the place of entries that vary by no more than rounding."""
    values = x.detach().cpu().double()
    spread, size = values.amax(0) - values.amin(0), values.abs().amax(0)
    return torch.where(spread <= ROUNDING * _epsilon(x) * size, values[:1], values)


def _correlations(x: Tensor, y: Tensor, kind: Kind) -> np.ndarray:
    """``|corr(x_i, y_j)|``, ``(D, D)``; of an entry that does not vary, 0."""
    if kind != "pearson":
        with preserve_process_settings():
            from scipy.stats import rankdata

        x, y = (torch.from_numpy(rankdata(v.numpy(), axis=0)) for v in (x, y))
    if kind == "rdc":
        return np.array([[float(torch.linalg.svdvals(a.T @ b)[0]) for b in _waves(y)] for a in _waves(x)])
    x, y = map(_centred, (x, y))
    norms = x.norm(dim=0)[:, None] * y.norm(dim=0)
    return torch.where(norms > 0, (x.T @ y).abs() / norms, 0.0).numpy()


def _waves(ranks: Tensor) -> list[Tensor]:
    r"""An orthonormal basis of the centred sines of every entry's ranks, ``(N, WAVES)`` each, columns of zeros in it.

    Of two entries the largest singular value of a product of theirs is :math:`\max_{a, b} \mathrm{corr}(\sum_k a_k
    \sin(\omega_k r / N + \phi_k), \sum_k b_k \sin(\omega_k r' / N + \phi_k))`, with r and r' the ranks, ``(N,)``.
    """
    frequency, phase = FREQUENCY * torch.randn(2, WAVES, dtype=ranks.dtype, generator=torch.Generator().manual_seed(0))
    found = []
    for rank in ranks.T:
        if not rank.ne(rank[0]).any():
            found.append(ranks.new_zeros(len(rank), WAVES))
            continue
        wave = torch.sin((rank / len(rank))[:, None] * frequency + phase)
        left, size, _ = torch.linalg.svd(wave - wave.mean(0), full_matrices=False)
        found.append(left * (size > 1e-6 * size[0]))
    return found


def _assigned(correlations: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with preserve_process_settings():
        from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(correlations, maximize=True)


def _mean(correlations: np.ndarray, pairs: tuple[np.ndarray, np.ndarray]) -> float:
    return float(correlations[pairs].mean())


def _centred(x: Tensor) -> Tensor:
    """Return the deviations of every column from its mean, exactly 0 where it is constant."""
    return torch.where((x == x[:1]).all(0), 0.0, x - x.mean(0))


def _canonical(x: Tensor, y: Tensor, exact: float) -> list[tuple[Tensor, Tensor]]:
    """Compute the mean of each, and the map from it to its canonical variates, by singular values of what is whitened.

    Args:
        x, y: ``(N, D)`` each.
        exact: the share of the largest singular value below which a direction of standardised columns does not vary,
            and the correlation below which two variates have none. Such directions are left out: their maps are 0, for
            what is whitened there is rounding errors.
    """
    parts = []
    for v in (x, y):
        centred = _centred(v)
        scale = centred.std(0)
        scale = torch.where(scale > 0, scale, torch.inf)
        left, size, right = torch.linalg.svd(centred / scale, full_matrices=False)
        varies = size > exact * size[0]
        whiten = right.T / torch.where(varies, size, torch.inf) / scale[:, None]
        parts.append((v.mean(0), left * varies, whiten))
    turns = torch.linalg.svd(parts[0][1].T @ parts[1][1])
    correlated = exact < turns.S
    mean_x, _, whiten_x = parts[0]
    mean_y, _, whiten_y = parts[1]
    return [(mean_x, whiten_x @ turns.U * correlated), (mean_y, whiten_y @ turns.Vh.T * correlated)]
