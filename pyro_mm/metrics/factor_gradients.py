"""Norms of the derivatives of reconstructions in factors, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..utils.arguments import check_flags, check_names, check_programs, check_seed
from ..utils.text import align_columns, plus_minus
from .decoding import Decoded, choose_factors, decoding

COLUMNS_PER_PASS = 64  # entries of a reconstruction whose derivatives are computed together
ROWS_PER_PASS = 128


@dataclass(frozen=True)
class GradientNorms:
    r"""Norms :math:`\|\partial \hat x_t / \partial f\|` per factor, modality and step, with errors over rows.

    Attributes:
        norms: modality -> means over the rows that have step t, ``(F, T)``, factors in the order of ``factors``; NaN
            where no row has it. T is 1 for a modality that is no sequence.
        errors: the same, standard errors over rows; NaN for a single row.
        rows: modality -> numbers of rows, ``(F, T)``.
        factors: names of the F factors.
        standardised: True if derivatives are per standard deviation of the factor.

    Example:
        >>> one, zero = torch.ones(1, 2), torch.zeros(1, 2)
        >>> GradientNorms({"x": one}, {"x": zero}, {"x": 5 * one}, ("z",), False)
        gradient norm of the reconstruction, mean over steps              x
          z                                                   1.000 ± 0.000
        per unit of the factor
    """

    norms: Mapping[str, Tensor]
    errors: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]
    factors: tuple[str, ...]
    standardised: bool

    def table(self) -> str:
        """Return means over steps with their errors, one line per factor and one column per modality.

        The error is the mean of those of the steps: an upper bound, exact if all steps of a row go together.
        """
        lines = []
        for i, factor in enumerate(self.factors):
            cells = [
                plus_minus(self.norms[name][i].nanmean().item(), self.errors[name][i].nanmean().item())
                for name in self.norms
            ]
            lines.append([factor, *cells])
        return align_columns(["gradient norm of the reconstruction, mean over steps", *self.norms], lines)

    def __repr__(self) -> str:
        unit = "standard deviation" if self.standardised else "unit"
        return f"{self.table()}\nper {unit} of the factor"


def gradient_norms(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    sites: Sequence[str] | str | None = None,
    *,
    sequences: Sequence[str] | str = (),
    standardise: bool = False,
    seed: int | None = None,
    audit: bool = True,
) -> GradientNorms:
    r"""Compute the norms of the derivatives of each modality's reconstruction in each factor, step by step.

    .. math:: g_t = \frac{1}{N_t} \sum_{n : T_n > t} \Big\| \frac{\partial \hat x_{nt}}{\partial f_n} \Big\|_F, \qquad
              \hat x_{nt} = E[x_{nt} | f_n]

    with the Frobenius norm of a Jacobian of as many rows as a step has entries, exact by reverse-mode differentiation
    at one draw of the latents per row from the guide. Factors are those of :func:`hsic_ratios`; other latents are held
    fixed, and what the story makes of the factor moves with it. A factor that a modality does not depend on has a norm
    of exactly 0.

    A modality with lengths is a sequence, whose steps are those before the end. The mean of a Categorical is its vector
    of probabilities; of a string of :class:`~pyro_mm.conditionals.Tokens` it is the vector of probabilities of each
    token given those before it in the row. Rows that lack the modality do not count, nor for a private factor those
    that lack its own. The standard error is over rows. It assumes that no network mixes rows, as the audit checks.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        sites: names of factors; None for all latents that are real.
        sequences: names of modalities without lengths whose first dimension is time too.
        standardise: True for derivatives per standard deviation of each entry of the factor over rows, which makes
            factors of different scales comparable.
        seed: of the draws; None uses torch's generator.
        audit: False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`).

    Returns:
        Norms, and their errors.

    Raises:
        ValueError: an unknown or discrete factor, a modality without a known mean, or no row that counts.

    Example:
        >>> import torch, pyro_mm as mm
        >>> loadings = {"x": torch.tensor([[3.0, 0.0], [0.0, 4.0]]), "y": torch.zeros(1, 2)}
        >>> model = mm.models.LinearGaussian(loadings)
        >>> found = gradient_norms(model, mm.Guide(z=model.posterior), model.sample(9), sequences="x")
        >>> found.norms["x"], found.norms["y"]
        (tensor([[3., 4.]], dtype=torch.float64), tensor([[0.]], dtype=torch.float64))

    References:
        Tsai et al. 2019 (arXiv:1806.06176), section on interpretation.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_flags(standardise=standardise)
    check_seed(seed)
    in_time = frozenset((*check_names("sequences", sequences, batch), *batch.lengths))
    found = _Norms(sites, in_time, standardise)
    with decoding(model, guide, batch, seed=seed, audit=audit, rows_per_pass=ROWS_PER_PASS) as (_, blocks):
        held = list(blocks)
        scales = _deviations(held, choose_factors(sites, held[0], real=True)) if standardise else {}
        for decoded in held:
            found.add(decoded, scales)
    return found.result()


def _deviations(blocks: Sequence[Decoded], factors: Sequence[str]) -> dict[str, Tensor]:
    """Return the standard deviation over rows of each entry of each factor."""
    values = {name: torch.cat([block.values[name] for block in blocks]) for name in factors}
    return {name: x.std(0, correction=0) for name, x in values.items()}


class _Norms:
    """Norms of all rows, collected block by block.

    Args:
        sites: names of factors; None for all latents that are real.
        in_time: the modalities whose first dimension is time.
        standardised: True if derivatives are per standard deviation.
    """

    def __init__(self, sites: Sequence[str] | str | None, in_time: frozenset[str], standardised: bool):
        self._sites = sites
        self._in_time = in_time
        self._standardised = standardised
        self.factors: tuple[str, ...] = ()
        self._norms: dict[str, list[Tensor]] = {}
        self._counts: dict[str, list[Tensor]] = {}

    def add(self, decoded: Decoded, scales: Mapping[str, Tensor]) -> None:
        """Add the rows of a block.

        Args:
            decoded: the rows.
            scales: factor -> the size of a unit of its entries; empty for 1.
        """
        self.factors = choose_factors(self._sites, decoded, real=True)
        squares = self._squares(decoded, scales)
        for name, parts in squares.items():
            steps = parts.shape[2] if name in self._in_time and parts.dim() > 2 else 1
            norms = parts.reshape(len(self.factors), len(decoded.rows), steps, -1).sum(-1).sqrt()
            counts = torch.stack([decoded.counts(factor, name) for factor in self.factors])[..., None]
            valid = decoded.valid(name)
            counts = counts.expand(norms.shape) if valid is None else counts & valid
            self._norms.setdefault(name, []).append(norms.cpu())
            self._counts.setdefault(name, []).append(counts.cpu())

    def _squares(self, decoded: Decoded, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return modality -> squared norms of the derivatives of each entry, ``(F, N, *event)``.

        Raises:
            ValueError: a modality without a known mean.
        """
        found: dict[str, dict[str, Tensor]] = {name: {} for name in decoded.modalities}
        for group in decoded.independent(self.factors):
            with torch.enable_grad():
                inputs = {f: decoded.values[f].detach().clone().requires_grad_() for f in group}
                means = decoded.means(inputs)
            if unknown := [name for name in decoded.modalities if name not in means]:
                raise ValueError(
                    f"modality {unknown[0]!r}: its distribution has no mean that is known, whose derivative could be "
                    "computed: take a batch and a story without it"
                )
            for name, mean in means.items():
                parts = _squared_derivatives(mean, list(inputs.values()), [scales.get(f) for f in group])
                parts = parts.reshape(len(group), *mean.shape)
                found[name].update(zip(group, parts, strict=True))
        return {name: torch.stack([parts[f] for f in self.factors]) for name, parts in found.items()}

    def result(self) -> GradientNorms:
        """Return means over the rows that count, and their errors.

        Raises:
            ValueError: no row counts.
        """
        norms, errors, rows = {}, {}, {}
        for name, parts in self._norms.items():
            values = torch.cat(parts, 1)
            counts = torch.cat(self._counts[name], 1)
            number = counts.sum(1)
            if not number.any():
                raise ValueError(f"modality {name!r}: no row has it, and what its factors are inferred from")
            values = torch.where(counts, values, 0.0)
            mean = values.sum(1) / number
            squares = torch.where(counts, (values - mean[:, None]).square(), 0.0).sum(1)
            norms[name], rows[name] = mean, number
            errors[name] = (squares / (number - 1) / number).sqrt()
        return GradientNorms(norms, errors, rows, self.factors, self._standardised)


def _squared_derivatives(y: Tensor, inputs: Sequence[Tensor], scales: Sequence[Tensor | None]) -> Tensor:
    """Return the squared norm of the derivative of each entry of each row in each input.

    Args:
        y: ``(N, *event)``, of which row n depends on row n of the inputs alone.
        inputs: I tensors ``(N, ..)``.
        scales: of each input the size of a unit of its entries; None for 1.

    Returns:
        Float64, ``(I, N, entries)``.
    """
    flat = y.reshape(len(y), -1)
    found = torch.zeros(len(inputs), *flat.shape, dtype=torch.float64, device=y.device)
    if not flat.requires_grad:
        return found
    for columns in torch.arange(flat.shape[1], device=y.device).split(COLUMNS_PER_PASS):
        for i, gradient in enumerate(_derivatives(flat[:, columns], inputs)):
            if gradient is not None:
                scale = scales[i]
                scaled = gradient if scale is None else gradient * scale
                found[i, :, columns] = scaled.double().square().reshape(*scaled.shape[:2], -1).sum(-1).T
    return found


def _derivatives(y: Tensor, inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Return the derivatives of each column ``(N, C)`` in each input, ``(C, N, ..)``; None where there is none.

    All columns are differentiated in one batch where the operations of the networks allow for it, else one by one.
    """
    one_each = torch.eye(y.shape[1], dtype=y.dtype, device=y.device)[:, None].expand(-1, len(y), -1)
    options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
    try:
        return torch.autograd.grad(y, inputs, one_each, is_grads_batched=True, **options)
    except RuntimeError:  # an operation that cannot be batched
        each = [torch.autograd.grad(y, inputs, one, **options) for one in one_each]
        return [None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)]
