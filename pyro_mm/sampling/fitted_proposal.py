r"""A proposal fitted to each row: Normals by gradients of the log joint, mixed with the guide and the prior."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..scoring.scores import Scores
from ..scoring.structure import PairStructure
from ..scoring.term_pair import TermPair
from ..utils.arguments import check_counts, check_number
from ..utils.seeding import part_seed
from .guide_sampler import FIRST_STREAM
from .particle_sampler import ParticleSampler, ProposalScheme, RowBlock
from .row_normals import FittedRows, NormalFit, fit_row_normals
from .streams import REPLICATES, Systematic
from .unconstrained import UnconstrainedPair

START_DRAWS = 128  # of the guide, from whose mean and deviations the fit starts
SCALE_DRAWS = 256  # of the prior, for its deviations
LEAST_SHARE = 0.05  # of the guide, the prior and all Normals together, where they have a share at all
EM_STEPS = 20
STRATA = 10  # particles that share a stratified choice of the component: errors need many groups of them
ROWS_AT_ONCE = 256  # whose covariances are held at a time
# on CUDA, where a round takes as long for few rows as for many
CUDA_ROWS_AT_ONCE = 4096
CUDA_NUMBERS_AT_ONCE = 2**24  # of the covariances of all these rows


@dataclass(frozen=True)
class Fitted(ProposalScheme):
    r"""Settings by which an importance sampler fits its proposal to the posterior of each row.

    For each row n, in unconstrained coordinates of all its latents (those in which a Laplace, Exponential, half-Normal
    or Uniform prior is standard Normal; the logarithm of positive ones, and so on), the proposal density is

    .. math:: q_n(z) = \sum_{s=1}^S \pi_{sn} N(z; \mu_{sn}, L_{sn} L_{sn}^\top) + \pi_{gn} \, q(z | x_S)
              + \pi_{pn} \, p(z)

    and every weight is :math:`p(x_S, z) / q_n(z)`, whichever part its draw comes from (the balance heuristic).

    **The fit.** :math:`\mu` and :math:`L` maximise :math:`E_\epsilon[\log p(x_S, \mu + L \epsilon)] + \log |L|`, that
    is, they minimise :math:`KL(N \| p(z | x_S))`. Each of T rounds takes the gradients g of :math:`\log p` at M points
    :math:`\mu + L \epsilon`, regresses :math:`\gamma = L^\top g` on :math:`\epsilon`, whose coefficient is the mean
    Hessian in whitened coordinates (Stein's lemma), and makes a Newton step within a trust radius. No deviation exceeds
    the prior's. At the end each principal deviation s, in units of the prior's, is widened by
    :math:`1 + a (1 - s^2)`, as the tails of a proposal should be wider than those of a posterior; a is ``widen``, times
    :math:`\sqrt{20 / D}` below 20 dimensions, where width costs less.

    **The shares** of the parts are refitted for each row on pilot draws, which are thrown away.

    **Unbiased.** Fit and shares are fixed before the K particles are drawn, so that the mean of their weights is an
    unbiased estimate of :math:`p(x_S)`, however good or bad the fit is. Standard errors, effective sizes and k-hat are
    those of any proposal.

    **Cost.** 3/4 M T gradients, each worth about 1.9 evaluations, beside those of pilot and particles. It pays where
    the guide leaves rows in doubt, as amortised guides mostly do. Memory is bounded: 256 rows are fitted at a time, on
    CUDA up to 4,096.

    Where all rows share latents, outside the plate ``"data"``, the fit is to the mean of :math:`\log p` over draws of
    these from the guide.

    **When it is weak.** Where posteriors are skewed, as under a Laplace prior: more rounds and draws, and more width
    (``rounds=24, draws=128, widen=0.4``), brought the rows in doubt from 45 % to 10 % on Fashion-MNIST. Where they have
    several modes, as fits from one start find one of them: take ``components`` above 1. Where they have tails heavier
    than a Normal's: the shares of guide and prior bound the weights, but the effective size falls. As with any
    proposal, k-hat says so, unless all parts miss a mode.

    It is passed as ``proposal=`` wherever an :class:`mm.Proposal <pyro_mm.Proposal>` is, and ``proposal="fitted"`` is
    ``proposal=mm.Fitted()``. Discrete latents are summed out: those that only the model has, and those that the guide
    enumerates.

    Args:
        rounds (int): T, rounds of the fit.
        draws (int): M, points per round and Normal, half as many in the first half of the rounds; None for
            max(64, 2 D), with D coordinates per row.
        components (int): S, Normals per row, which start from different draws of the guide.
        guide_share (float): share of the guide to begin with; 0 for none, and then its density is not needed.
        prior_share (float): share of the model's prior to begin with; 0 for none.
        widen (float): the share by which directions that the data determine are widened; 0 for none.
        pilot (int): draws per row on which the shares are refitted; 0 keeps them as they are.

    Raises:
        TypeError: a setting of another type.
        ValueError: a setting out of its range, or shares that leave none for the Normals.

    Example:
        A guide that is too narrow and beside the posterior:

        >>> import torch, pyro_mm as mm
        >>> import pyro.distributions as dist
        >>> model = mm.models.LinearGaussian({"a": torch.eye(2), "b": torch.ones(3, 2)}, noise=0.5)
        >>> guide = mm.Guide(z=lambda batch: dist.Normal(model.posterior(batch).mean + 1.0, 0.1).to_event(1))
        >>> batch = mm.Batch({"a": torch.tensor([[1.0, -1.0], [0.5, 2.0]]), "b": torch.zeros(2, 3)})
        >>> fitted = mm.log_marginal(model, guide, batch, proposal="fitted", seed=0)
        >>> bool(((fitted.log_prob - model.log_prob(batch)).abs() < 0.05).all()), fitted.untrusted()
        (True, 0.0)

    References:
        Salimans & Knowles 2013, "Fixed-form variational posterior approximation through stochastic linear regression",
        Bayesian Analysis 8:837. Opper & Archambeau 2009, "The variational Gaussian approximation revisited", Neural
        Computation 21:786. Hesterberg 1995, "Weighted average importance sampling and defensive mixture distributions",
        Technometrics 37:185. Veach & Guibas 1995, "Optimally combining sampling techniques for Monte Carlo rendering",
        SIGGRAPH. Cappé et al. 2008, "Adaptive importance sampling in general mixture classes", Statistics and Computing
        18:447. Owen 2013, "Monte Carlo theory, methods and examples", chapters 9 and 10.
    """

    rounds: int = 8
    draws: int | None = None
    components: int = 1
    guide_share: float = 0.1
    prior_share: float = 0.05
    widen: float = 0.15
    pilot: int = 200

    def __post_init__(self) -> None:
        check_counts(rounds=self.rounds, components=self.components)
        check_counts(0, pilot=self.pilot)
        if self.draws is not None:
            check_counts(2, draws=self.draws)
        check_number("guide_share", self.guide_share, 0, 1)
        check_number("prior_share", self.prior_share, 0, 1)
        check_number("widen", self.widen, 0, 1)
        if self.guide_share + self.prior_share >= 1:
            raise ValueError(
                f"expected shares of the guide and the prior that leave one for the fitted Normals, got "
                f"guide_share={self.guide_share} and prior_share={self.prior_share}: their sum must be below 1"
            )

    def rows_at_once(self, structure: PairStructure, device: torch.device) -> int:
        """Return the number of rows whose Normals are held at a time: 256, or on CUDA more if they are small."""
        if device.type != "cuda":
            return ROWS_AT_ONCE
        fitting = CUDA_NUMBERS_AT_ONCE // max(1, structure.latent_numbers) ** 2
        return max(ROWS_AT_ONCE, min(CUDA_ROWS_AT_ONCE, fitting))

    def sampler(self, rows: RowBlock) -> ParticleSampler:
        """Return a sampler of particles for a block of rows, whose Normals are fitted here."""
        return FittedSampler(rows, self)


class FittedSampler(ParticleSampler):
    """Particles from Normals fitted to each row, the guide and the prior, in shares of each row's own.

    Args:
        rows: the rows, the pair and the number of particles K.
        settings: the settings of the proposal.
    """

    def __init__(self, rows: RowBlock, settings: Fitted):
        self.pairs_at_once = rows.pairs_at_once
        self.pair = UnconstrainedPair(
            rows.model,
            rows.guide,
            rows.views,
            rows.structure,
            rows.vectorize,
            method="a fitted proposal",
            normal_priors=True,
        )
        fitted = self._fit(settings)
        self.normals = fitted.normals
        self.fallback = fitted.failed
        self.num_gradients = fitted.gradients

        # components of the mixture: S Normals, and the guide and the prior if they have a share
        self.guide_index = settings.components if settings.guide_share else None
        self.prior_index = settings.components + (settings.guide_share > 0) if settings.prior_share else None
        self.needs_prior_density = self.prior_index is not None
        self.shares, least = self._first_shares(settings)
        if settings.pilot and len(least) > 1:
            self.num_pilot = settings.pilot
            self.shares = self._refit_shares(self.shares, least, part_seed(rows.seed, FIRST_STREAM + 2))

        # in a row without data all densities are 1: of one component alone, so that this holds to the last digit
        informed = self.pair.active.any(-1, keepdim=True)
        only_first = (torch.arange(len(least), device=rows.device) == 0).to(least.dtype)
        self.shares = torch.where(informed, self.shares, only_first)
        self.log_shares = self.shares.log()
        strata = 1 if len(least) == 1 else STRATA
        self.group_size = max(1, min(strata, rows.num_particles // REPLICATES))
        choice_seed = part_seed(rows.seed, FIRST_STREAM + 1)
        self.choices = Systematic(rows.num_particles, rows.size, self.group_size, 1, choice_seed, rows.device)

    def draw(self, pair: TermPair) -> None:
        self.pair.run_guide(pair)
        self.pair.take_shared(pair)
        values = {name: site["value"] for name, site in pair.row_latents().items()}
        from_guide = self.pair.flatten(values if pair.plated else {name: x[None] for name, x in values.items()})
        component = self._choose(self.choices.take(pair.num_particles), self.shares)
        u = self._mix(component, from_guide)

        latents = self.pair.latents_at(u)
        trace = pair.trace.copy()
        for name, site in pair.row_latents().items():
            trace.nodes[name] = site | {"value": latents[name].reshape(site["value"].shape)}
        pair.trace = trace

        log_parts = self.log_shares.T[: len(self.normals.mean), None] + self._log_normals(u)
        log_parts = log_parts - self.pair.log_jacobian(u, latents).nan_to_num(math.inf, math.inf, math.inf)
        if self.guide_index is not None:
            log_q = sum(self.pair.score_guide(pair).values(), torch.zeros(()))
            log_q = log_q.reshape(-1, self.pair.size).expand(len(u), -1) + self.log_shares[:, self.guide_index]
            log_parts = torch.cat([log_parts, log_q[None]])
        particles = [len(u), *[1] * (pair.views.nesting - 1)] if pair.plated else []
        pair.log_q = {"all but the prior": log_parts.logsumexp(0).reshape(*particles, self.pair.size)}

    def skip(self, pair: TermPair) -> None:
        self.choices.take(pair.num_particles)

    def log_density(self, scores: Scores, rows: slice = slice(None)) -> Tensor:
        log_q = scores.log_proposal[:, 0]
        if self.prior_index is None:
            return log_q
        return torch.logaddexp(log_q, self.log_shares[rows, self.prior_index] + scores.log_prior[:, 0])

    # -- the fit ------------------------------------------------------------------------------------------------------

    def _fit(self, settings: Fitted) -> FittedRows:
        """Fit Normals to the rows, from draws of the guide."""
        fit = NormalFit(settings.rounds, settings.draws, settings.components, settings.widen)
        return fit_posteriors(self.pair, fit, self.pairs_at_once)

    # -- shares -------------------------------------------------------------------------------------------------------

    def _first_shares(self, settings: Fitted) -> tuple[Tensor, Tensor]:
        """Return the shares to begin with, ``(N, C)``, and the least share of each component, ``(C,)``."""
        others = [share for share in (settings.guide_share, settings.prior_share) if share]
        normals = (1 - sum(others)) * self.normals.log_weights.exp().T
        shares = torch.cat([normals, normals.new_tensor(others).expand(len(normals), -1)], -1)
        least = [LEAST_SHARE / settings.components] * settings.components + [min(s, LEAST_SHARE) for s in others]
        return shares, shares.new_tensor(least)

    def _refit_shares(self, shares: Tensor, least: Tensor, seed: int) -> Tensor:
        """Refit the shares of each row on draws that are thrown away, ``(N, C)``.

        The weights of the draws, truncated, stand for the posterior; EM maximises the mixture's log-density under it.
        """
        self.pair.draw_shared(self.num_pilot)
        choices = Systematic(self.num_pilot, self.pair.size, self.num_pilot, 1, seed, shares.device)
        component = self._choose(choices.take(self.num_pilot), shares)
        from_guide = component.new_zeros(()) if self.guide_index is None else self.pair.guide_draws(self.num_pilot)
        u = self._mix(component, from_guide)
        scores = self.pair.log_densities_in_chunks(u, self.pairs_at_once, guide=self.guide_index is not None)
        parts = [*self._log_normals(u)]
        parts += [scores.guide] if self.guide_index is not None else []
        parts += [scores.prior] if self.prior_index is not None else []
        log_parts = torch.stack(parts, -1).nan_to_num(-math.inf, -math.inf, -math.inf)

        log_w = scores.joint - (log_parts + shares.log()).logsumexp(-1)
        weights = log_w.nan_to_num(-math.inf, -math.inf, -math.inf).softmax(0)
        weights = weights.clamp(max=self.num_pilot**-0.5)
        weights = weights / weights.sum(0)
        refit = shares
        for _ in range(EM_STEPS):
            refit = (weights[..., None] * (log_parts + refit.log()).softmax(-1)).sum(0)
        refit = torch.where(refit.isfinite().all(-1, keepdim=True), refit, shares)
        return least + (1 - least.sum()) * refit

    # -- draws --------------------------------------------------------------------------------------------------------

    def _choose(self, uniforms: Tensor, shares: Tensor) -> Tensor:
        """Return the component of each particle, ``(k, N)``, from uniforms ``(k, N)`` and shares ``(N, C)``."""
        cumulative = shares.double().cumsum(-1)
        cumulative = cumulative / cumulative[:, -1:]
        return (uniforms[..., None] >= cumulative).sum(-1).clamp(max=shares.shape[-1] - 1)

    def _mix(self, component: Tensor, from_guide: Tensor) -> Tensor:
        """Return coordinates ``(k, N, D)`` drawn from the components of particles ``(k, N)``."""
        noise = torch.randn(
            *component.shape, self.pair.dimension, dtype=self.normals.mean.dtype, device=component.device
        )
        u = self.normals.transform(noise, component)
        if self.guide_index is not None:
            u = torch.where((component == self.guide_index)[..., None], from_guide, u)
        if self.prior_index is not None:
            from_prior = self.pair.prior_draws(len(component))
            u = torch.where((component == self.prior_index)[..., None], from_prior, u)
        return u

    def _log_normals(self, u: Tensor) -> Tensor:
        """Return the log-density of each Normal at coordinates, ``(S, k, N)``; -inf where they are not finite."""
        return self.normals.component_log_probs(u).nan_to_num(-math.inf, -math.inf, -math.inf)


def fit_posteriors(pair: UnconstrainedPair, fit: NormalFit, pairs_at_once: int) -> FittedRows:
    """Fit Normals to the posteriors of the rows of a pair, from draws of its guide.

    Args:
        pair: the rows' densities.
        fit: settings of the fit.
        pairs_at_once: (row, point) pairs decoded at once.
    """
    # half as many as the points of an early round, so that in every round a point and its opposite share a draw
    pair.draw_shared(fit.draws_for(pair.dimension) // 4 * fit.components)
    prior = pair.prior_draws(SCALE_DRAWS)
    return fit_row_normals(
        lambda points: pair.joint_and_gradient(points, pairs_at_once),
        pair.guide_draws(START_DRAWS),
        prior_deviations(prior),
        pair.active,
        fit,
    )


def prior_deviations(draws: Tensor) -> Tensor:
    """Return the standard deviations of the prior in each row, ``(N, D)``, from draws ``(G, N, D)``.

    A coordinate whose deviation is that of the other rows, as far as so many draws tell, gets the one of all rows.
    """
    finite = torch.where(draws.isfinite(), draws, 0.0)
    own = finite.var(0).clamp(min=torch.finfo(draws.dtype).tiny)
    common = own.mean(0)
    noise = 5 * math.sqrt(2 / (len(draws) - 1))  # five standard errors of a Normal's variance
    alike = ((own / common) - 1).abs() < noise
    return torch.where(alike, common, own).sqrt()
