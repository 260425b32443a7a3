r"""Gap between the evidence and the ELBO of a guide, split into that of its family and that of its encoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..distributions.base import base_distribution
from ..distributions.where import Where
from ..evidence.evidence import Evidence
from ..evidence.likelihood import log_marginal
from ..sampling.fitted_posterior import unconstrained_pair
from ..sampling.fitted_proposal import ROWS_AT_ONCE, fit_posteriors
from ..sampling.particle_sampler import ProposalScheme
from ..sampling.row_normals import NormalFit, RowNormals
from ..sampling.unconstrained import UnconstrainedPair
from ..sampling.weighted import BlockSizes, row_blocks
from ..scoring.evaluation import evaluating, move_result
from ..scoring.program import Program
from ..scoring.structure import in_data_plate, latent_sites, pair_structure
from ..utils.arguments import check_choice, check_counts, check_flags, check_programs, check_seed
from ..utils.seeding import normalize_seed, part_seed, temporary_seed

Family = Literal["diagonal", "full"]
DRAWS_AT_ONCE = 1000  # of a block of rows, which bounds the memory
FIT_PART, DRAW_PART = 0, 1  # parts of a block's seed


@dataclass(frozen=True)
class AmortizationGap:
    r"""Gap between log-evidence and ELBO, per row, as the sum of an approximation and an amortization gap.

    .. math:: \underbrace{\log p(x) - L(q)}_\text{total} = \underbrace{\log p(x) - L(q^*)}_\text{approximation} +
              \underbrace{L(q^*) - L(q)}_\text{amortization}

    with q the guide and q* the best Normal of its family for the row. Printed, it gives the means over rows.

    Attributes:
        evidence (Evidence): log p(x) of N rows, with its errors and diagnostics. Doubtful rows have doubtful gaps.
        elbo, elbo_error (Tensor): L(q) and its standard error by the draws, ``(N,)``, in nats.
        best_elbo, best_elbo_error (Tensor): L(q*) and its standard error, ``(N,)``, in nats.
        amortization_error (Tensor): standard error of L(q*) - L(q), ``(N,)``, of paired draws where the guide is a
            diagonal Normal.
        family (str): the Normals that q* is the best of: ``"diagonal"`` or ``"full"`` covariance.
        of_guide (bool): True if the guide belongs to the family; False for a mixture, a flow, or a latent given another
            one. Then the amortization gap compares it with a Normal all the same, and is negative where it is better.
        failed (Tensor): rows in which the fit found no finite density, boolean ``(N,)``.
        mean_errors (Mapping): standard errors of the means of ``elbo``, ``best_elbo`` and ``amortization``.
    """

    evidence: Evidence
    elbo: Tensor
    elbo_error: Tensor
    best_elbo: Tensor
    best_elbo_error: Tensor
    amortization_error: Tensor
    family: str
    of_guide: bool
    failed: Tensor
    mean_errors: Mapping[str, float] = field(repr=False)

    def __len__(self) -> int:
        """Return the number of rows N."""
        return len(self.elbo)

    @property
    def total(self) -> Tensor:
        """log p(x) - L(q), ``(N,)``, in nats."""
        return self.evidence.log_prob - self.elbo

    @property
    def approximation(self) -> Tensor:
        """log p(x) - L(q*), ``(N,)``, in nats: the cost of the family at its best."""
        return self.evidence.log_prob - self.best_elbo

    @property
    def amortization(self) -> Tensor:
        """L(q*) - L(q), ``(N,)``, in nats: the cost of the encoder beyond that of the family."""
        return self.best_elbo - self.elbo

    @property
    def total_error(self) -> Tensor:
        """Standard error of ``total``, ``(N,)``, in nats."""
        return (self.evidence.standard_error.square() + self.elbo_error.square()).sqrt()

    @property
    def approximation_error(self) -> Tensor:
        """Standard error of ``approximation``, ``(N,)``, in nats."""
        return (self.evidence.standard_error.square() + self.best_elbo_error.square()).sqrt()

    def mean(self) -> dict[str, tuple[float, float]]:
        """Return ``"total"``, ``"approximation"`` and ``"amortization"`` -> (mean over rows, its standard error).

        The errors are those by the draws, of these very rows. Rows are those of the evidence that count.
        """
        rows = self.evidence.counted
        evidence_error = self.evidence.mean()[1]
        errors = {
            "total": math.hypot(evidence_error, self.mean_errors["elbo"]),
            "approximation": math.hypot(evidence_error, self.mean_errors["best_elbo"]),
            "amortization": self.mean_errors["amortization"],
        }
        return {name: (getattr(self, name)[rows].mean().item(), error) for name, error in errors.items()}

    def __repr__(self) -> str:
        text = {name: f"{value:.3f} ± {error:.3f}" for name, (value, error) in self.mean().items()}
        best = f"the best Normal with {self.family} covariance"
        other = "" if self.of_guide else " (not the guide's family)"
        failed = int(self.failed.sum())
        return (
            f"AmortizationGap({self.evidence.quantity} - ELBO: {text['total']} nats per row = {text['approximation']} "
            f"for {best}{other} + {text['amortization']} for the encoder; mean of {self.evidence.rows_text}, "
            f"k-hat > 0.7 in {self.evidence.untrusted():.1%}{f', {failed} not fitted' if failed else ''}"
            f"{''.join(f'; {note}' for note in self.evidence.notes)})"
        )


def amortization_gap(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    *,
    num_particles: int = 1000,
    family: Family | None = None,
    rounds: int = 30,
    proposal: ProposalScheme | Program | Batch | str | None = "fitted",
    seed: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
) -> AmortizationGap:
    r"""Split log p(x) minus the ELBO into the cost of the guide's family and that of its encoder, per row.

    .. math:: \log p(x_S) - L(q) = [\log p(x_S) - L(q^*)] + [L(q^*) - L(q)], \qquad
              L(q) = E_q[\log p(x_S, z) - \log q(z)], \quad q^* = \mathrm{argmax}_{q' \in Q} L(q')

    The first part, the approximation gap, is :math:`KL(q^* \| p(z | x_S))`: what the best Normal of the family Q costs,
    whatever network computes it. The second, the amortization gap, is what the guide loses by computing q for all rows
    with one network, and can be had back by a better encoder or longer training.

    **The family.** Q is that of Normals in unconstrained coordinates of all latents of a row: with diagonal covariance
    for a guide whose sites are independent diagonal Normals, or LogNormals; with full covariance for a guide of one
    site that is a MultivariateNormal. Any other guide, such as a mixture, a flow or a latent given another one, is
    compared with Normals of full covariance, which ``result.of_guide`` says. q* is fitted to each row by gradients,
    from the guide on (:func:`~pyro_mm.encode`), and so is a local optimum; as far as it has not settled, L(q*) is too
    low and the approximation gap too large.

    **Errors.** By the draws. L(q*) and L(q) are estimated from the same noise where the guide is a diagonal Normal, so
    that their difference has a far smaller error than either. log p(x_S) is too low where k-hat is large
    (``result.evidence``), and then so is the approximation gap.

    Args:
        model, guide (callable): a story and its guide, called with a batch. All latents of the guide are continuous;
            discrete ones that only the model has are summed out. Latents that all rows share are given by draws.
        batch (Batch): N rows. Rows in which nothing is present have no gap and do not count in means.
        num_particles (int): K, draws per row, of each of the three terms.
        family (str): ``"diagonal"`` or ``"full"`` covariance; None for that of the guide.
        rounds (int): rounds of the fit.
        proposal: the way to draw for log p(x_S), as in :func:`~pyro_mm.log_marginal`.
        seed (int): of all draws; None takes one from torch's generator, which is not otherwise used.
        vectorize (bool): False scores draws one by one, for stories that do not broadcast.
        audit (bool): False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`) and its errors.

    Returns:
        An :class:`AmortizationGap`; ``mean()`` has the means and their errors.

    Raises:
        ValueError: an unknown family, fewer than two draws, or a pair that :class:`~pyro_mm.Fitted` refuses.

    Example:
        A guide that is the best diagonal Normal, but for its mean, which is off by one half in two coordinates:

        >>> import torch, pyro_mm as mm
        >>> import pyro.distributions as dist
        >>> model = mm.models.LinearGaussian({"x": torch.tensor([[1.0, 1.0], [1.0, 0.0]])}, noise=1.0)
        >>> precision = torch.tensor([[3.0, 1.0], [1.0, 2.0]])
        >>> best = precision.diagonal().rsqrt()
        >>> guide = mm.Guide(z=lambda batch: dist.Normal(model.posterior(batch).mean + 0.5, best).to_event(1))
        >>> gap = mm.metrics.amortization_gap(model, guide, model.sample(20), seed=0)
        >>> approximation, amortization = gap.mean()["approximation"][0], gap.mean()["amortization"][0]
        >>> abs(approximation - 0.5 * torch.tensor(6.0 / 5.0).log().item()) < 0.02
        True
        >>> abs(amortization - 0.5 * 0.25 * precision.sum().item()) < 0.02
        True

    References:
        Cremer et al. 2018, "Inference suboptimality in variational autoencoders", ICML, arXiv:1801.03558.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_counts(2, num_particles=num_particles)
    check_counts(rounds=rounds)
    check_flags(vectorize=vectorize)
    check_seed(seed)
    if family is not None:
        check_choice("family", family, ("diagonal", "full"))
    seed = normalize_seed(seed)
    with evaluating(model, guide, batch, audit=audit, stacked=vectorize) as rows, torch.no_grad():
        evidence = log_marginal(
            model, guide, rows, num_particles=num_particles, proposal=proposal, seed=seed, vectorize=vectorize,
            audit=False,
        )  # fmt: skip
        structure = pair_structure(model, guide, rows)
        own = _guide_family(guide, rows, part_seed(seed, DRAW_PART))
        fit = NormalFit(rounds, widen=0.0, settle=True, diagonal=(family or own or "full") == "diagonal")
        sums = _Sums(num_particles)
        for first, part in row_blocks(rows, ROWS_AT_ONCE):
            with temporary_seed(part_seed(seed + 1 + first, FIT_PART), rows.device):
                pair = unconstrained_pair(model, guide, part, structure, vectorize)
                fitted = fit_posteriors(pair, fit, BlockSizes().pairs_to_decode(part))
            with temporary_seed(part_seed(seed + 1 + first, DRAW_PART), rows.device):
                counted = evidence.counted[first : first + part.size]
                sums.add_rows(pair, fitted.normals, _guide_normal(pair, guide, part, own), part, counted)
            sums.failed.append(fitted.failed)
        chosen = "diagonal" if fit.diagonal else "full"
        found = sums.result(evidence, chosen, own in ("diagonal", chosen))
        return move_result(found, rows, batch)


class _Sums:
    """Sums over draws of L(q), L(q*) and their difference, for each row and for each draw."""

    names = ("elbo", "best_elbo", "amortization")

    def __init__(self, num_draws: int):
        self.num_draws = num_draws
        self.failed: list[Tensor] = []
        self._means: list[Tensor] = []  # of a block of rows, (3, N)
        self._errors: list[Tensor] = []
        self._by_draw: Tensor | None = None  # sums over rows that count, (3, K)
        self._num_rows = 0

    def add_rows(
        self,
        pair: UnconstrainedPair,
        normals: RowNormals,
        guide_normal: tuple[Tensor, Tensor] | None,
        batch: Batch,
        counted: Tensor,
    ) -> None:
        """Draw from the guide and the fitted Normals of a block of rows.

        Args:
            pair: the densities of the rows.
            normals: q* of the rows.
            guide_normal: mean and deviations of the guide ``(N, D)``, if it is a diagonal Normal.
            batch: the rows.
            counted: rows that means are over, boolean ``(N,)``.
        """
        most = BlockSizes().pairs_to_decode(batch)
        parts = []
        for first in range(0, self.num_draws, DRAWS_AT_ONCE):
            num_draws = min(DRAWS_AT_ONCE, self.num_draws - first)
            pair.draw_shared(num_draws)
            u = pair.guide_draws(num_draws)
            noise = torch.randn_like(u) if guide_normal is None else (u - guide_normal[0]) / guide_normal[1]
            best = normals.transform(noise, torch.zeros_like(noise[..., 0], dtype=torch.long))
            of_guide = pair.log_densities_in_chunks(u, most)
            of_best = pair.log_densities_in_chunks(best, most, guide=False)
            assert of_guide.guide is not None
            elbo = (of_guide.joint - of_guide.guide).double()
            best_elbo = (of_best.joint - normals.log_prob(best)).double()
            parts.append(torch.stack([elbo, best_elbo, best_elbo - elbo]))
        terms = torch.cat(parts, 1)
        self._means.append(terms.mean(1))
        self._errors.append(terms.std(1) / self.num_draws**0.5)
        by_draw = torch.where(counted, terms, 0.0).sum(-1)
        self._by_draw = by_draw if self._by_draw is None else self._by_draw + by_draw
        self._num_rows += int(counted.sum())

    def result(self, evidence: Evidence, family: str, of_guide: bool) -> AmortizationGap:
        """Return the gap that all rows give."""
        assert self._by_draw is not None  # there is one row at least
        dtype = evidence.log_prob.dtype
        elbo, best_elbo, _ = torch.cat(self._means, -1).to(dtype)
        elbo_error, best_error, difference_error = torch.cat(self._errors, -1).to(dtype)
        mean_errors = self._by_draw.std(1) / self.num_draws**0.5 / max(1, self._num_rows)
        return AmortizationGap(
            evidence, elbo, elbo_error, best_elbo, best_error, difference_error, family, of_guide,
            torch.cat(self.failed), dict(zip(self.names, mean_errors.tolist(), strict=True)),
        )  # fmt: skip


def _guide_family(guide: Program, batch: Batch, seed: int) -> Family | None:
    """Return the family of Normals that a guide belongs to in unconstrained coordinates; None for none."""
    with temporary_seed(seed, batch.device):
        one, other = _row_sites(guide, batch), _row_sites(guide, batch)
    if len(one) == 1:
        (site,) = one.values()
        (again,) = other.values()
        d, e = base_distribution(site), base_distribution(again)
        if isinstance(d, dist.MultivariateNormal) and isinstance(e, dist.MultivariateNormal):
            same = torch.equal(d.loc, e.loc) and torch.equal(d.scale_tril, e.scale_tril)
            return "full" if same else None
    for name, site in one.items():
        parameters = _normal_parameters(site)
        again_parameters = _normal_parameters(other[name])
        if parameters is None or again_parameters is None:
            return None
        # equal in two runs of other draws: it depends on no latent
        if not all(torch.equal(x, y) for x, y in zip(parameters, again_parameters, strict=True)):
            return None
    return "diagonal"


def _row_sites(guide: Program, batch: Batch) -> dict[str, Any]:
    """Return the guide's distribution of each latent of the rows."""
    with poutine.block(), poutine.trace() as traced:
        guide(batch)
    return {name: site["fn"] for name, site in latent_sites(traced.trace).items() if in_data_plate(site)}


def _normal_parameters(d: Any) -> tuple[Tensor, Tensor] | None:
    """Return mean and deviation of a Normal, or of the logarithm of a LogNormal; None for another distribution."""
    shape = d.batch_shape + d.event_shape
    base = base_distribution(d)
    if isinstance(base, Where):
        one = _normal_parameters(base.p)
        other = _normal_parameters(base.q)
        if one is None or other is None or isinstance(base_distribution(base.p), dist.LogNormal):
            return None
        return tuple(base.choose(x.expand(shape), y.expand(shape)) for x, y in zip(one, other, strict=True))  # type: ignore[return-value]
    if isinstance(base, torch.distributions.Normal | dist.LogNormal):
        return base.loc.expand(shape), base.scale.expand(shape)
    return None


def _guide_normal(
    pair: UnconstrainedPair, guide: Program, batch: Batch, family: Family | None
) -> tuple[Tensor, Tensor] | None:
    """Return the mean and the deviations of a diagonal Normal guide, ``(N, D)`` each; None for another guide."""
    if family != "diagonal":
        return None
    means, ends = {}, {}
    for name, d in _row_sites(guide, batch).items():
        parameters = _normal_parameters(d)
        assert parameters is not None
        mean, deviation = (x[None] for x in parameters)
        means[name] = pair.transforms[name](mean)
        ends[name] = pair.transforms[name](mean + deviation)
    mean = pair.flatten(means)[0]
    return mean, pair.flatten(ends)[0] - mean
