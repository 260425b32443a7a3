r"""Annealed importance sampling: log-likelihoods of rows on which importance sampling cannot be trusted."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..batch.batch import Batch, check_batch
from ..sampling.ancestral import SiteValues, simulate
from ..sampling.shared_blocks import share_tensors
from ..sampling.weighted import row_block
from ..scoring.audit.audit import audit as audited
from ..scoring.evaluation import evaluating, move_result
from ..scoring.given_latents import Given, draw_global_latents
from ..scoring.program import Program
from ..scoring.sharing import share_evaluation
from ..utils.arguments import check_choice, check_counts, check_flags, check_programs
from ..utils.seeding import normalize_seed, temporary_seed
from ..utils.sharing import sharing
from .accumulator import evidence_from_weights
from .annealing_schedule import AnnealingSchedule
from .annealing_target import STARTS, Start, TemperedDensity
from .evidence import Evidence, concatenate
from .quantity import name_quantity, notes_on_shared, quantity_name, restrict_means

PAIRS_AT_ONCE = 2**13


@dataclass(frozen=True)
class AnnealingSettings:
    """Settings of annealed importance sampling.

    Args:
        num_chains: C, chains per row.
        temperatures: T, steps from the start to the posterior.
        leapfrog_steps: steps of the move at each temperature.
        start: the density that chains start from.
        pilot_chains: chains of the run that tunes, per row.
        vectorize: True to score all chains in one run of the model.
        pairs_at_once: (row, chain) pairs that move together, which bounds the memory. It decides which random numbers a
            row gets, and so the digits of a result.

    Raises:
        TypeError: a setting of another type.
        ValueError: a setting out of its range.
    """

    num_chains: int = 16
    temperatures: int = 200
    leapfrog_steps: int = 5
    start: Start = "guide"
    pilot_chains: int = 16
    vectorize: bool = True
    pairs_at_once: int = PAIRS_AT_ONCE

    def __post_init__(self) -> None:
        check_counts(num_chains=self.num_chains, temperatures=self.temperatures, leapfrog_steps=self.leapfrog_steps)
        check_counts(2, pilot_chains=self.pilot_chains)
        check_choice("start", self.start, STARTS)
        check_flags(vectorize=self.vectorize)

    @property
    def name(self) -> str:
        """The name of the estimate, for an :class:`Evidence`."""
        start = {"guide": "the guide", "prior": "the prior", "fitted": "a fitted Normal"}[self.start]
        return f"annealing from {start} at {self.temperatures} temperatures"

    @property
    def rows_at_once(self) -> int:
        """The number of rows whose chains move together."""
        return max(1, self.pairs_at_once // max(self.num_chains, self.pilot_chains))

    def tune(self, model: Program, guide: Program, batch: Batch) -> AnnealingSchedule:
        """Return a schedule that is tuned on the rows of a batch."""
        density = TemperedDensity(model, guide, batch, self.start, self.vectorize)
        return AnnealingSchedule.tune(density, self.temperatures, self.leapfrog_steps, self.pilot_chains)


def annealed_importance(
    model: Program,
    guide: Program,
    batch: Batch,
    *,
    num_chains: int = 16,
    temperatures: int = 200,
    leapfrog_steps: int = 5,
    start: Start = "guide",
    pilot_chains: int = 16,
    seed: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
    devices: int | None = None,
) -> Evidence:
    r"""Estimate log p(x_S) per row by annealing from the guide, or the prior, to the posterior.

    With :math:`f_t = q_0^{1 - \beta_t} p(x, \cdot)^{\beta_t}` and :math:`0 = \beta_0 < \dots < \beta_T = 1`, each of C
    chains starts from :math:`z_0 \sim q_0` and moves by Hamiltonian Monte Carlo that leaves :math:`f_t` invariant:

    .. math:: \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) [\log p(x, z_{t-1}) - \log q_0(z_{t-1})], \qquad
              E[w] = p(x)

    Pilot chains run beforehand, to choose temperatures, step sizes and the scales of coordinates for each row; then
    all of these are held fixed, so that the weights are unbiased. Where all rows share latents, outside the plate
    ``"data"``, each chain has a draw of these from the guide, as each particle in :func:`~pyro_mm.log_marginal`.

    **Bias.** The mean of the weights is unbiased at any T and C; its logarithm is too low, the more so the more the
    chains lag behind. :func:`bidirectional` measures how much that is. **Standard error.** From the spread of C
    weights, by the delta method: itself rough for a few chains. **When not to trust a row.** As in
    :func:`~pyro_mm.log_marginal`: k-hat above 0.7 (known from C = 21 on), or a standard error above 0.5 nats; then take
    more temperatures first. If all chains miss a mode, no diagnostic shows it. The cost is about C T L evaluations of
    the model and its gradient per row, L being the leapfrog steps: use it for rows that importance sampling leaves in
    doubt.

    Args:
        model (callable): a story, called with a batch. Enumerated latents that only it has are summed out.
        guide (callable): called with a batch; all its latents are continuous.
        batch (Batch): N rows.
        num_chains (int): C, independent chains per row.
        temperatures (int): T, spaced so that each step adds as much to the variance of the log-weights.
        leapfrog_steps (int): L, of the one move at each temperature.
        start (str): q_0, ``"guide"``, ``"prior"``, or ``"fitted"``: the Normal that :class:`~pyro_mm.Fitted` fits to
            each row, from which a tenth of the temperatures may do.
        pilot_chains (int): chains per row of the run that tunes, two at least.
        seed (int): of all draws; None takes one from torch's generator, which is not otherwise used.
        vectorize (bool): False scores chain by chain, for stories that do not broadcast.
        audit (bool): False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`) and its errors.
        devices (int): processes that share out the blocks of rows, as in :func:`~pyro_mm.log_marginal`.

    Returns:
        An :class:`Evidence` of N rows, in nats per row, from C weights. The difference of two is a conditional.

    Raises:
        ValueError: a discrete latent in the guide, one that only the model has and that cannot be summed out, or a
            story that draws while it is scored.

    Example:
        A guide beside the posterior, with which importance sampling fails:

        >>> import torch, pyro_mm as mm
        >>> import pyro.distributions as dist
        >>> loadings = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])
        >>> model = mm.models.LinearGaussian({"x": loadings}, noise=0.5)
        >>> batch = mm.Batch({"x": torch.tensor([[1.0, 0.5, 2.0]])})
        >>> guide = mm.Guide(z=lambda batch: dist.Normal(model.posterior(batch).mean + 1.5, 0.2).to_event(1))
        >>> exact = model.log_prob(batch)
        >>> plain = mm.log_marginal(model, guide, batch, seed=0)
        >>> annealed = mm.annealed_importance(model, guide, batch, num_chains=64, temperatures=40, seed=0)
        >>> bool((plain.log_prob - exact).abs() > 3), bool((annealed.log_prob - exact).abs() < 0.6)
        (True, True)

    References:
        Neal 2001, "Annealed importance sampling", Statistics and Computing 11:125. Wu et al. 2017, "On the quantitative
        analysis of decoder-based generative models", arXiv:1611.04273.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    settings = AnnealingSettings(num_chains, temperatures, leapfrog_steps, start, pilot_chains, vectorize)
    check_flags(audit=audit)

    def estimate() -> Evidence:
        return estimate_by_annealing(model, guide, batch, settings, seed=normalize_seed(seed), audit=audit)

    return share_evaluation("annealed_importance", devices, model, guide, batch, seed, estimate)


def bidirectional(
    model: Program,
    guide: Program,
    batch: Batch,
    *,
    num_chains: int = 16,
    temperatures: int = 200,
    leapfrog_steps: int = 5,
    start: Start = "guide",
    pilot_chains: int = 16,
    seed: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
    devices: int | None = None,
) -> tuple[Evidence, Evidence]:
    r"""Bound the log-likelihood of rows simulated from the model from below and from above.

    Simulated rows come with an exact draw from their posterior: the latents that made them. Chains that start there and
    run down the temperatures have weights of mean 1 / p(x). So

    .. math:: E\Big[\log \frac1C \sum_c w_c^{\uparrow}\Big] \le \log p(x) \le
              E\Big[-\log \frac1C \sum_c w_c^{\downarrow}\Big]

    where the first is the estimate of :func:`annealed_importance`, and the mean gap of the two bounds the error of
    either. It says what to expect on real rows as far as the model resembles them.

    **Standard error.** That of the upper bound covers its chains. It leaves out the choice of the row's one exact draw,
    which shows in the spread of the bounds over many rows. **When not to trust it.** The bounds hold in expectation: in
    one row they may be the wrong way round. A guide that misses a mode leaves a gap only in rows whose exact draw lies
    in it.

    Args:
        model, guide: as in :func:`annealed_importance`.
        batch (Batch): N rows. Their number, masks and covariates are used, and their values are not.
        num_chains, temperatures, leapfrog_steps, start, pilot_chains, seed, vectorize, audit, devices: as in
            :func:`annealed_importance`.

    Returns:
        (lower, upper), each an :class:`Evidence` of the same N simulated rows, in nats per row.

    Example:
        >>> import torch, pyro_mm as mm
        >>> import pyro.distributions as dist
        >>> model = mm.models.LinearGaussian({"x": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, -1.0]])})
        >>> guide = mm.Guide(z=lambda batch: dist.Normal(model.posterior(batch).mean + 1.0, 0.4).to_event(1))
        >>> lower, upper = mm.bidirectional(model, guide, model.sample(50), temperatures=20, seed=0)
        >>> 0 < upper.mean()[0] - lower.mean()[0] < 0.3
        True

    References:
        Grosse et al. 2015, "Sandwiching the marginal likelihood using bidirectional Monte Carlo", arXiv:1511.02543.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    settings = AnnealingSettings(num_chains, temperatures, leapfrog_steps, start, pilot_chains, vectorize)
    check_flags(audit=audit)

    def bound() -> tuple[Evidence, Evidence]:
        return bound_both_ways(model, guide, batch, settings, seed=normalize_seed(seed), audit=audit)

    return share_evaluation("bidirectional", devices, model, guide, batch, seed, bound)


def estimate_by_annealing(
    model: Program, guide: Program, batch: Batch, settings: AnnealingSettings, *, seed: int, audit: bool = True
) -> Evidence:
    """Estimate log p(x_S) per row as :func:`annealed_importance` does, block by block of rows.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        settings: the settings of annealing.
        seed: seed of all draws; that of rank 0 counts for all processes.
        audit: True to audit the pair.
    """
    seed = sharing().broadcast(seed)
    with evaluating(model, guide, batch, audit=audit, stacked=settings.vectorize) as whole:

        def estimate(first: int) -> Evidence:
            rows = row_block(whole, first, settings.rows_at_once)
            with temporary_seed(seed + first, whole.device):
                schedule = settings.tune(model, guide, rows)
                draws = schedule.density.initial_draws(settings.num_chains)
                shared = schedule.density.has_shared
                part = evidence_from_weights(schedule.log_weights(draws), "", shared)
                cost = schedule.density.num_gradients
                return replace(part, proposal=settings.name, evaluations=cost, gradients=cost)

        parts = share_tensors(range(0, whole.size, settings.rows_at_once), estimate, whole.device)
        evidence = name_quantity(parts[0] if len(parts) == 1 else concatenate(parts), model, guide, whole)
        return move_result(evidence, whole, batch)


def bound_both_ways(
    model: Program, guide: Program, batch: Batch, settings: AnnealingSettings, *, seed: int, audit: bool = True
) -> tuple[Evidence, Evidence]:
    """Bound the log-likelihood of simulated rows as :func:`bidirectional` does, block by block of rows.

    Args:
        model, guide: callables of a batch.
        batch: N rows, whose masks and covariates the simulated rows get.
        settings: the settings of annealing.
        seed: seed of all draws; that of rank 0 counts for all processes.
        audit: True to audit the pair.
    """
    seed = sharing().broadcast(seed)
    with evaluating(model, guide, batch, audit=False) as whole:

        def bound(first: int) -> tuple[Evidence, Evidence]:
            rows = row_block(whole, first, settings.rows_at_once)
            with temporary_seed(seed + first, whole.device):
                shared = draw_global_latents(guide, rows)
                simulated, latents = simulate(Given(model, shared) if shared else model, rows, audit=False)
                latents |= {name: site["value"] for name, site in shared.items()}
                if audit and first == 0:
                    audited(model, guide, simulated, stacked=settings.vectorize)
                schedule = settings.tune(model, guide, simulated)
                quantity = quantity_name(model, guide, simulated)
                lower = _lower_bound(schedule, settings.num_chains, quantity)
                return lower, _upper_bound(schedule, latents, settings.num_chains, quantity)

        parts = share_tensors(range(0, whole.size, settings.rows_at_once), bound, whole.device)
        notes = notes_on_shared(model, guide, whole)
        below, above = (
            restrict_means(replace(concatenate(side), notes=notes), whole.having()) for side in zip(*parts, strict=True)
        )
        return move_result((below, above), whole, batch)


def _lower_bound(schedule: AnnealingSchedule, num_chains: int, quantity: str) -> Evidence:
    """Run chains from q_0 up to the posterior."""
    draws = schedule.density.initial_draws(num_chains)
    return evidence_from_weights(schedule.log_weights(draws), quantity, schedule.density.has_shared)


def _upper_bound(schedule: AnnealingSchedule, latents: SiteValues, num_chains: int, quantity: str) -> Evidence:
    """Run chains from an exact posterior draw of each row, and of what all rows share, down to q_0."""
    schedule.density.set_shared(latents)
    draws = schedule.density.coordinates_of(latents, num_chains)
    inverse = evidence_from_weights(schedule.log_weights(draws, forward=False), quantity)
    running = {k: (-log_prob, error) for k, (log_prob, error) in inverse.running.items()}
    return replace(inverse, log_prob=-inverse.log_prob, running=running)
