"""Dependence of reconstructions on factors: normalised HSIC of each factor and each modality, with errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..distributions.sample_statistics import Kernel, check_bandwidth, check_kernel, gram_matrix
from ..scoring.structure import private_modality
from ..utils.arguments import check_flags, check_programs, check_seed
from ..utils.text import align_columns, plus_minus
from .decoding import Decoded, as_vectors, choose_factors, decoding

MOST_ROWS = 5000  # of kernel matrices, which hold as many squared
LEAST_ROWS = 5  # for which the estimate without one of them is defined
NO_DEPENDENCE = 1e-12  # an HSIC below is rounding error


@dataclass(frozen=True)
class HSICRatios:
    r"""Normalised HSIC of factors and reconstructions, with standard errors over rows.

    Attributes:
        ratios: factor -> modality -> :math:`r`, 0 if independent, 1 if one is a scaled rotation of the other.
        errors: the same, standard errors; NaN where :math:`r` is not defined.
        rows: factor -> modality -> the number of rows that count.
        shared_to_private: (shared factor, modality) -> (ratio, standard error) of :math:`r` of that factor to that of
            the modality's private one, the :math:`r_m` of the paper; unstable where the latter is near 0.
        settings: kernel, bandwidth and estimate in words.

    Example:
        >>> found = HSICRatios({"z": {"x": 0.5}}, {"z": {"x": 0.1}}, {"z": {"x": 9}}, {}, "gaussian kernel")
        >>> print(found)
        normalised HSIC with the reconstruction              x
          z                                      0.500 ± 0.100
        9 rows; gaussian kernel
    """

    ratios: Mapping[str, Mapping[str, float]]
    errors: Mapping[str, Mapping[str, float]]
    rows: Mapping[str, Mapping[str, int]]
    shared_to_private: Mapping[tuple[str, str], tuple[float, float]]
    settings: str

    def table(self) -> str:
        """Return the ratios with their errors, one line per factor."""
        modalities = list(next(iter(self.ratios.values())))
        lines = [
            [factor, *(plus_minus(row[m], self.errors[factor][m]) for m in modalities)]
            for factor, row in self.ratios.items()
        ]
        return align_columns(["normalised HSIC with the reconstruction", *modalities], lines)

    def __repr__(self) -> str:
        counts = sorted({n for row in self.rows.values() for n in row.values()})
        rows = f"{counts[0]} rows" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} rows"
        lines = [self.table(), f"{rows}; {self.settings}"]
        if self.shared_to_private:
            each = (f"{f} to w_{m} {plus_minus(*ratio)}" for (f, m), ratio in self.shared_to_private.items())
            lines.append(f"shared to private: {', '.join(each)}")
        return "\n".join(lines)


def hsic_ratios(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    sites: Sequence[str] | str | None = None,
    *,
    kernel: Kernel = "gaussian",
    bandwidth: Any = None,
    unbiased: bool = True,
    seed: int | None = None,
    audit: bool = True,
) -> HSICRatios:
    r"""Estimate the normalised HSIC of each factor and the reconstruction of each modality.

    .. math:: r(f, \hat x_m) = \frac{HSIC(f, \hat x_m)}{\sqrt{HSIC(f, f) \, HSIC(\hat x_m, \hat x_m)}}, \qquad
              \hat x_m = E[x_m | f_1, f_2, \ldots]

    over rows, with one draw of the latents per row from the guide, and :func:`pyro_mm.distributions.hsic`. It is 0 for
    a factor that the reconstruction does not depend on, and 1 if one is a rotation and scaling of the other, under the
    median bandwidth; factors that explain half of the variance each have ratios between. Factors of a latent are those
    of a story with methods ``factors`` and ``decode``, such as :class:`~pyro_mm.models.Factorized`; of other stories,
    the latents themselves, and what the story names by ``pyro.deterministic``, if ``sites`` does too.

    The mean of a Categorical is its vector of probabilities. A modality without a mean that is known, such as a string
    of :class:`~pyro_mm.conditionals.Tokens`, is drawn in its place, as indicators of its tokens. Steps behind the end
    of a sequence are 0. Rows that lack the modality do not count, nor for a private factor those that lack its own.

    The standard error is the jackknife's over rows, with the bandwidth held fixed. For independent variables, where
    the estimate is degenerate, it is too large rather than too small.

    Args:
        model, guide: callables of a batch.
        batch: N rows, 5000 at most, since kernel matrices have N² entries.
        sites: names of factors; None for all latents.
        kernel: as in :func:`pyro_mm.distributions.hsic`, of factors as of reconstructions.
        bandwidth: h of both, in their units; None for the median of the distances of each.
        unbiased: True for ratios of unbiased estimates, which may be slightly negative or above 1; False for the
            biased ones of the paper, :math:`\mathrm{tr}(K H L H) / (\|H K H\| \|H L H\|)`, in [0, 1], of which
            independent variables have more than 0, by an amount of order 1 / N.
        seed: of the draws; None uses torch's generator.
        audit: False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`).

    Returns:
        Ratios and their errors, for each factor and modality.

    Raises:
        ValueError: an unknown factor, too many rows, or fewer than 5 that count.

    Example:
        >>> import torch, pyro_mm as mm
        >>> model = mm.models.LinearGaussian({"x": torch.eye(2), "y": torch.zeros(2, 2)})
        >>> found = hsic_ratios(model, mm.Guide(z=model.posterior), model.sample(50), seed=0)
        >>> [round(found.ratios["z"][name], 3) for name in "xy"]
        [1.0, 0.0]

    References:
        Tsai et al. 2019 (arXiv:1806.06176), whose kernel :math:`\exp(-r^2 / \sigma^2)` has :math:`h = \sigma / \sqrt 2`
        and whose r_m is ``shared_to_private``; Gretton et al. 2005 (ALT).
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_flags(unbiased=unbiased)
    check_seed(seed)
    kernel, bandwidth = check_kernel(kernel), check_bandwidth(bandwidth)
    if batch.size > MOST_ROWS:
        raise ValueError(
            f"expected {MOST_ROWS} rows at most, whose kernel matrices fit in memory, got {batch.size}: take some of "
            "them, batch[torch.randperm(len(batch))[:2000]]"
        )
    samples = _Samples(sites)
    with torch.no_grad(), decoding(model, guide, batch, seed=seed, audit=audit) as (_, blocks):
        for decoded in blocks:
            samples.add(decoded)
    estimate = _Estimate(kernel, bandwidth, unbiased)
    parts = {pair: estimate.of(*samples.pair(*pair)) for pair in samples.pairs}
    ratios = {pair: _jackknife(*leave_one_out) for pair, leave_one_out in parts.items()}
    return HSICRatios(
        {f: {m: ratios[f, m][0] for m in samples.modalities} for f in samples.factors},
        {f: {m: ratios[f, m][1] for m in samples.modalities} for f in samples.factors},
        {f: {m: samples.number(f, m) for m in samples.modalities} for f in samples.factors},
        _shared_to_private(parts, samples),
        str(estimate),
    )


class _Samples:
    """Factors and reconstructions of all rows, collected block by block.

    Args:
        sites: names of factors; None for all latents.
    """

    def __init__(self, sites: Sequence[str] | str | None):
        self._sites = sites
        self.factors: tuple[str, ...] = ()
        self.modalities: tuple[str, ...] = ()
        self._values: dict[str, list[Tensor]] = {}
        self._reconstructions: dict[str, list[Tensor]] = {}
        self._counts: dict[tuple[str, str], list[Tensor]] = {}

    def add(self, decoded: Decoded) -> None:
        """Add the rows of a block."""
        self.factors = choose_factors(self._sites, decoded)
        self.modalities = decoded.modalities
        with_mean = decoded.has_mean()
        means = decoded.means()
        draws = decoded.draws() if len(with_mean) < len(self.modalities) else {}
        for name in self.factors:
            self._values.setdefault(name, []).append(decoded.values[name])
        for name in self.modalities:
            x = means[name] if name in with_mean else draws[name]
            valid = decoded.valid(name)
            if valid is not None:
                x = torch.where(valid.reshape(*valid.shape, *(1,) * (x.dim() - 2)), x, 0)
            self._reconstructions.setdefault(name, []).append(x)
            for factor in self.factors:
                self._counts.setdefault((factor, name), []).append(decoded.counts(factor, name))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs of a factor and a modality."""
        return [(factor, name) for factor in self.factors for name in self.modalities]

    def number(self, factor: str, modality: str) -> int:
        """Return the number of rows that count for a pair."""
        return int(torch.cat(self._counts[factor, modality]).sum())

    def private(self, factor: str) -> str | None:
        """Return the modality to which a factor is private, or None."""
        return private_modality(factor, frozenset(self.modalities))

    def pair(self, factor: str, modality: str) -> tuple[Tensor, Tensor]:
        """Return the rows of a factor and of a reconstruction that count, ``(n, D)`` and ``(n, D')``.

        Raises:
            ValueError: fewer rows count than the estimate needs.
        """
        rows = torch.cat(self._counts[factor, modality])
        if int(rows.sum()) < LEAST_ROWS:
            raise ValueError(
                f"{factor!r} and {modality!r}: expected {LEAST_ROWS} rows at least that have what both are inferred "
                f"from, got {int(rows.sum())}"
            )
        x = as_vectors(torch.cat(self._values[factor])[rows])
        y = as_vectors(torch.cat(self._reconstructions[modality])[rows])
        return x, y


class _Estimate:
    """The estimate of HSIC: its kernel, its bandwidth, and its bias.

    Args:
        kernel, bandwidth, unbiased: as in :func:`hsic_ratios`.
    """

    def __init__(self, kernel: Kernel, bandwidth: Any, unbiased: bool):
        self.kernel = kernel
        self.bandwidth = bandwidth
        self.unbiased = unbiased

    def __str__(self) -> str:
        name = self.kernel if isinstance(self.kernel, str) else getattr(self.kernel, "__name__", "own")
        if not isinstance(self.kernel, str):
            width = "its own"
        elif self.bandwidth is None:
            width = "the median of the distances of each"
        else:
            each = self.bandwidth if isinstance(self.bandwidth, tuple) else (self.bandwidth,)
            width = ", ".join(f"{h:g}" for h in each)
        kind = "unbiased estimates" if self.unbiased else "biased estimates"
        return f"{name} kernel, bandwidth {width}; {kind}; errors of the jackknife over rows"

    def of(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised HSIC, and that without each row, ``()`` and ``(n,)``."""
        k, l_ = (gram_matrix(sample, self.kernel, self.bandwidth).double() for sample in (x, y))
        if self.unbiased:
            k, l_ = (gram - gram.diagonal().diag_embed() for gram in (k, l_))
        both = leave_one_out(k, l_, self.unbiased)
        own_x, own_y = (leave_one_out(gram, gram, self.unbiased) for gram in (k, l_))
        whole, each = (_normalise(*three) for three in zip(both, own_x, own_y, strict=True))
        return whole, each


def _normalise(both: Tensor, own_x: Tensor, own_y: Tensor) -> Tensor:
    """Return HSIC over the root of the two of each variable with itself; 0 if one of them does not vary."""
    varies = (own_x > NO_DEPENDENCE) & (own_y > NO_DEPENDENCE)
    scale = (own_x.clamp(min=NO_DEPENDENCE) * own_y.clamp(min=NO_DEPENDENCE)).sqrt()
    return torch.where(varies, both / scale, 0.0)


def leave_one_out(k: Tensor, l_: Tensor, unbiased: bool) -> tuple[Tensor, Tensor]:
    """Return HSIC of two kernel matrices, and that without each row.

    Args:
        k, l_: ``(n, n)``, symmetric; with a diagonal of zeros for the unbiased estimate.
        unbiased: True for the estimate whose mean is HSIC.

    Returns:
        ``()`` and ``(n,)``.
    """
    n = len(k)
    product = (k * l_).sum(1)
    diagonal_k, diagonal_l = k.diagonal(), l_.diagonal()
    sums_k, sums_l = k.sum(1), l_.sum(1)
    totals = sums_k.sum(), sums_l.sum()
    whole = _hsic(product.sum(), totals[0] * totals[1], sums_k @ sums_l, n, unbiased)

    trace = product.sum() - 2 * product + diagonal_k * diagonal_l
    total_k, total_l = (
        total - 2 * sums + diagonal
        for total, sums, diagonal in zip(totals, (sums_k, sums_l), (diagonal_k, diagonal_l), strict=True)
    )
    cross = sums_k @ sums_l - l_ @ sums_k - k @ sums_l + product
    cross = cross - (sums_k - diagonal_k) * (sums_l - diagonal_l)
    return whole, _hsic(trace, total_k * total_l, cross, n - 1, unbiased)


def _hsic(trace: Tensor, totals: Tensor, rows: Tensor, n: int, unbiased: bool) -> Tensor:
    """Return HSIC from sums over two kernel matrices of n rows: of products, totals, and row sums."""
    if unbiased:
        return (trace + totals / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)) / (n * (n - 3))
    return trace / n**2 + totals / n**4 - 2 * rows / n**3


def _jackknife(whole: Tensor, each: Tensor) -> tuple[float, float]:
    """Return an estimate and its standard error from those without each row."""
    n = len(each)
    error = ((n - 1) / n * (each - each.mean()).square().sum()).sqrt()
    return whole.item(), error.item()


def _shared_to_private(
    parts: Mapping[tuple[str, str], tuple[Tensor, Tensor]], samples: _Samples
) -> dict[tuple[str, str], tuple[float, float]]:
    """Return the ratio of each shared factor's dependence to the private one's, for modalities that have both."""
    found = {}
    for name in samples.modalities:
        own = [factor for factor in samples.factors if samples.private(factor) == name]
        for factor in samples.factors:
            if not own or samples.private(factor) is not None:
                continue
            shared, each_shared = parts[factor, name]
            private, each_private = parts[own[0], name]
            if private > NO_DEPENDENCE:
                found[factor, name] = _jackknife(shared / private, each_shared / each_private)
    return found
