"""Swaps of factors between rows: the modalities that change, and those that do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..utils.arguments import check_programs, check_seed, check_tensor
from ..utils.seeding import temporary_seed
from ..utils.text import align_columns, plus_minus
from .decoding import Decoded, choose_factors, decoding


@dataclass(frozen=True)
class Swaps:
    """Reconstructions with single factors taken from other rows, and the size of the change.

    Attributes:
        effects: factor -> modality -> the share of a swap of all factors that a swap of this one has.
        errors: the same, standard errors over rows; NaN where the share is.
        partners: the row whose factor each row gets, ``(N,)``.
        truth: modality -> values of the rows, ``(N, *event)``.
        reconstructions: modality -> means or, where none is known, draws, ``(N, *event)``; of a Categorical the
            probabilities of its classes.
        swapped: factor -> modality -> the same with the factor of the partner.
        lengths: sequence -> numbers of valid steps, ``(N,)``.

    Example:
        >>> none = torch.zeros(0)
        >>> Swaps({"w_x": {"x": 1.0, "y": 0.0}}, {"w_x": {"x": 0.1, "y": 0.0}}, none, {}, {}, {}, {})
        share of a change of all factors              x              y
          w_x                             1.000 ± 0.100  0.000 ± 0.000
    """

    effects: Mapping[str, Mapping[str, float]]
    errors: Mapping[str, Mapping[str, float]]
    partners: Tensor
    truth: Mapping[str, Tensor]
    reconstructions: Mapping[str, Tensor]
    swapped: Mapping[str, Mapping[str, Tensor]]
    lengths: Mapping[str, Tensor]

    def table(self) -> str:
        """Return the effects with their errors, one line per factor."""
        modalities = list(next(iter(self.effects.values())))
        lines = [
            [factor, *(plus_minus(row[m], self.errors[factor][m]) for m in modalities)]
            for factor, row in self.effects.items()
        ]
        return align_columns(["share of a change of all factors", *modalities], lines)

    def __repr__(self) -> str:
        return self.table()


def swaps(
    model: Callable[[Batch], object],
    guide: Callable[[Batch], object],
    batch: Batch,
    sites: Sequence[str] | str | None = None,
    *,
    partners: Tensor | None = None,
    seed: int | None = None,
    audit: bool = True,
) -> Swaps:
    r"""Decode every row with single factors of another row, and measure the change of each modality.

    .. math:: e(f, m) = \frac{\sum_n \| \hat x_m(f_{\pi(n)}, f^{-}_n) - \hat x_m(f_n, f^{-}_n) \|^2}
                             {\sum_n \| \hat x_m(f_{\pi(n)}, f^{-}_{\pi(n)}) - \hat x_m(f_n, f^{-}_n) \|^2}

    with the other factors :math:`f^{-}`, one draw of the latents per row from the guide, and reconstructions
    :math:`\hat x_m` as in :func:`gradient_norms`; of sequences the steps before the end of row n. It is exactly 0 for a
    modality that the factor does not enter, and 1 for one that depends on it alone. Factors are those of
    :func:`hsic_ratios`. Rows count if both they and their partners have the modality and, for a private factor, its
    own. The standard error is that of a ratio of means, over rows.

    Args:
        model, guide: callables of a batch.
        batch: N rows, 2 at least, which are decoded at once.
        sites: names of factors; None for all latents.
        partners: the row whose factor each row gets, integers ``(N,)``; None for the next row, and the first for the
            last.
        seed: of the draws; None uses torch's generator.
        audit: False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`).

    Returns:
        The effects, and the reconstructions that :func:`pyro_mm.plots.swaps` shows.

    Raises:
        ValueError: an unknown factor, fewer than two rows, or partners that are not row numbers.

    Example:
        >>> import pyro_mm as mm
        >>> model = mm.models.LinearGaussian({"x": torch.ones(3, 2), "y": torch.zeros(2, 2)})
        >>> found = swaps(model, mm.Guide(z=model.posterior), model.sample(10).only("x", "y"), seed=0)
        >>> found.effects["z"]["x"]
        1.0

    References:
        Tsai et al. 2019 (arXiv:1806.06176), for swaps of digits.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_seed(seed)
    if batch.size < 2:
        raise ValueError("expected two rows at least, between which factors are swapped, got one")
    others = _check_partners(partners, batch)

    whole = decoding(model, guide, batch, seed=seed, audit=audit, rows_per_pass=batch.size)
    with torch.no_grad(), whole as (rows, blocks):
        decoded = next(blocks)
        factors = choose_factors(sites, decoded)
        others = others.to(rows.device)
        moved = {name: value[others] for name, value in decoded.values.items()}
        plain = decoded.means()
        all_swapped = decoded.means(moved)
        each = {factor: decoded.means({factor: moved[factor]}) for factor in factors}
        measured = {f: _effects(decoded, others, f, (plain, each[f], all_swapped)) for f in factors}

        show = _Pictures(decoded, seed)
        batch_values = {name: rows[name].to(batch.device) for name in decoded.modalities}
        return Swaps(
            {f: {m: found[0] for m, found in row.items()} for f, row in measured.items()},
            {f: {m: found[1] for m, found in row.items()} for f, row in measured.items()},
            others.to(batch.device),
            batch_values,
            {name: x.to(batch.device) for name, x in show.of(plain, {}).items()},
            {f: {m: x.to(batch.device) for m, x in show.of(each[f], {f: moved[f]}).items()} for f in factors},
            {name: batch.lengths[name] for name in decoded.modalities if name in batch.lengths},
        )


def _check_partners(partners: Tensor | None, batch: Batch) -> Tensor:
    """Return row numbers ``(N,)``. Raises a TypeError or a ValueError for anything else."""
    if partners is None:
        return torch.arange(batch.size).roll(-1)
    check_tensor("partners", partners, (batch.size,))
    if partners.is_floating_point() or partners.dtype == torch.bool:
        raise TypeError(f"expected partners to be row numbers, integers, got {partners.dtype}")
    if bool(((partners < 0) | (partners >= batch.size)).any()):
        raise ValueError(f"expected partners to be row numbers from 0 to {batch.size - 1}")
    return partners.long()


def _effects(
    decoded: Decoded, partners: Tensor, factor: str, means: tuple[Mapping[str, Tensor], ...]
) -> dict[str, tuple[float, float]]:
    """Return modality -> (effect of a swap, standard error).

    Args:
        decoded: the rows.
        partners: their partners, ``(N,)``.
        factor: the factor that is swapped.
        means: modality -> means of the rows as they are, with that factor swapped, and with all of them swapped.
    """
    plain, one, every = means
    found = {}
    for name in decoded.modalities:
        if name not in plain:
            found[name] = (float("nan"), float("nan"))
            continue
        counts = decoded.counts(factor, name)
        rows = counts & counts[partners]
        change, largest = (_squares(other[name] - plain[name], decoded.valid(name))[rows] for other in (one, every))
        found[name] = _ratio_of_means(change, largest)
    return found


def _squares(difference: Tensor, valid: Tensor | None) -> Tensor:
    """Return the sum of squares of each row, of the steps that are valid, ``(N,)``."""
    if valid is not None:
        difference = torch.where(valid.reshape(*valid.shape, *(1,) * (difference.dim() - 2)), difference, 0.0)
    return difference.double().square().reshape(len(difference), -1).sum(1)


def _ratio_of_means(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return the ratio of the means of two numbers per row, and its standard error; NaN without a change."""
    if not len(x) or not y.sum() > 0:
        return float("nan"), float("nan")
    ratio = x.sum() / y.sum()
    n = len(x)
    error = (x - ratio * y).std(correction=1) / n**0.5 / y.mean() if n > 1 else torch.tensor(torch.nan)
    return ratio.item(), error.item()


class _Pictures:
    """Reconstructions that can be looked at: means, and draws under common random numbers where none is known.

    Args:
        decoded: the rows.
        seed: of the draws.
    """

    def __init__(self, decoded: Decoded, seed: int | None):
        self._decoded = decoded
        self._seed = 0 if seed is None else seed
        self._with_mean = decoded.has_mean()

    def of(self, means: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is shown of each modality, ``(N, *event)``.

        Args:
            means: modality -> means at these values.
            values: factor -> ``(N, ..)``, those that are swapped.
        """
        if len(self._with_mean) == len(self._decoded.modalities):
            return dict(means)
        with temporary_seed(self._seed, self._decoded.rows.device):
            draws = self._decoded.draws(values)
        return {name: means[name] if name in self._with_mean else draws[name] for name in self._decoded.modalities}
