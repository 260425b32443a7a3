r"""Annealed importance sampling: log-likelihoods for rows on which importance sampling cannot be trusted."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..sampling.ancestral import simulate
from ..scoring.audit.audit import audit as audited
from ..scoring.evaluation import evaluating, returned
from ..scoring.structure import Callback
from ..utils.arguments import check_choice, check_counts, check_flags, check_programs
from ..utils.seeding import normalize_seed, temporary_seed
from .accumulator import evidence_of
from .annealing_target import State, TemperedDensity
from .evidence import Evidence, joined
from .likelihood import counting, described, quantity_of

ACCEPT = 0.8  # the acceptance rate that step sizes are tuned to
RATE = 0.3  # of the tuning of log step sizes, an update a transition
FORGET = 0.9  # how much of the chains' variance is remembered from one temperature to the next
JITTER = 0.5  # relative, of every trajectory's step: orbits of a Gaussian are periodic, and would return to their start
WARM = 20  # transitions at the first temperature, for a step size to start from
SMOOTH = 9  # grid points over which the pilot's measurements are averaged
UNIFORM = 0.1  # the share of the schedule that the pilot does not choose
PAIRS = 2**14  # (row, chain) pairs that move together


def annealed_importance(
    model: Callback,
    guide: Callback,
    batch: Batch,
    *,
    num_chains: int = 16,
    temperatures: int = 200,
    leapfrog_steps: int = 5,
    start: Literal["guide", "prior"] = "guide",
    pilot_chains: int = 16,
    seed: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
) -> Evidence:
    r"""log p(x_present) of every row, by annealing from the guide, or the prior, to the posterior.

    With :math:`f_t = q_0^{1 - \beta_t} p(x, \cdot)^{\beta_t}` and :math:`0 = \beta_0 < .. < \beta_T = 1`, chains start
    from :math:`z_0 \sim q_0` and move by Hamiltonian Monte Carlo that leaves each :math:`f_t` invariant:

    .. math:: \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) [\log p(x, z_{t-1}) - \log q_0(z_{t-1})], \quad E[w] = p(x)

    Other chains run beforehand, to choose for every row its temperatures, step sizes and the scales of its coordinates;
    then all of these are held fixed, so that the weights are unbiased.

    Args:
        model, guide: callables of a batch. All latents of the guide continuous, and all of the model's in the guide but
            enumerated ones, which are summed out.
        batch: N rows.
        num_chains: C, independent chains of every row.
        temperatures: T, spaced so that each step adds as much to the variance of the log-weights.
        leapfrog_steps: of every transition, of which there is one a temperature.
        start: what q_0 is.
        pilot_chains: chains of the run that tunes.
        seed: of all draws; None takes one from torch's generator, which is not otherwise touched.
        vectorize: False scores chain by chain, for stories that do not broadcast.
        audit: False spares the audit of the pair (:mod:`pyro_mm.scoring.audit`), and what it would refuse.

    Returns:
        The estimate from C weights, with the standard error, the effective sample size and, from 21 chains on, the
        k-hat of these; of a few chains, a row's error is itself rough. It is biased low by what the chains lag behind,
        and :func:`bidirectional` says how much that is. The difference of two of them is a conditional.

    Raises:
        ValueError: a discrete latent in the guide, one that only the model has, or a story that draws as it is scored.

    Neal 2001 (Statistics and Computing 11:125); for decoder-based models, Wu et al. 2017 (arXiv:1611.04273).
    """
    _check_options(model, guide, batch, num_chains, temperatures, leapfrog_steps, start, pilot_chains, vectorize)
    check_flags(audit=audit)
    seed, parts = normalize_seed(seed), []
    with evaluating(model, guide, batch, audit=audit, stacked=vectorize) as whole:
        size = _rows_at_once(whole, num_chains, pilot_chains)
        for first in range(0, whole.size, size):
            rows = whole if whole.size <= size else whole.block(slice(first, first + size))
            with temporary_seed(seed + first, whole.device):
                path = _Path(model, guide, rows, temperatures, leapfrog_steps, start, pilot_chains, vectorize)
                parts.append(evidence_of(path.run(path.bridge.draws(num_chains)), ""))
        found = described(parts[0] if len(parts) == 1 else joined(parts), model, guide, whole)
        return returned(found, whole, batch)


def bidirectional(
    model: Callback,
    guide: Callback,
    batch: Batch,
    *,
    num_chains: int = 16,
    temperatures: int = 200,
    leapfrog_steps: int = 5,
    start: Literal["guide", "prior"] = "guide",
    pilot_chains: int = 16,
    seed: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
) -> tuple[Evidence, Evidence]:
    r"""A lower and an upper bound on the log-likelihood of rows simulated from the model itself.

    Simulated rows come with an exact draw from their posterior: the latents that made them. Chains that start there and
    run down the temperatures have weights of mean 1 / p(x). So minus the log of their average bounds log p(x) from
    above as :func:`annealed_importance` bounds it from below, both in expectation, and the distance of the two bounds
    the error of either. It says what to expect on real rows as far as the model resembles them.

    Args:
        batch: says how many rows, which modalities each of them has, and the covariates; its values are not used.
        model, guide, and the others: as in :func:`annealed_importance`.

    Returns:
        (lower, upper) for the same simulated rows. The standard error of the upper bound is that of its chains given
        the one exact draw of the row; over many rows, the spread of the rows' bounds holds the rest.

    Grosse et al. 2015 (arXiv:1511.02543).
    """
    _check_options(model, guide, batch, num_chains, temperatures, leapfrog_steps, start, pilot_chains, vectorize)
    check_flags(audit=audit)
    seed = normalize_seed(seed)
    parts: list[tuple[Evidence, Evidence]] = []
    with evaluating(model, guide, batch, audit=False) as whole:
        size = _rows_at_once(whole, num_chains, pilot_chains)
        for first in range(0, whole.size, size):
            rows = whole if whole.size <= size else whole.block(slice(first, first + size))
            with temporary_seed(seed + first, whole.device):
                simulated, exact = simulate(model, rows, audit=False)
                if audit and not parts:
                    audited(model, guide, simulated, stacked=vectorize)
                quantity = quantity_of(model, guide, simulated)
                path = _Path(model, guide, simulated, temperatures, leapfrog_steps, start, pilot_chains, vectorize)
                forward = evidence_of(path.run(path.bridge.draws(num_chains)), quantity)
                back = evidence_of(path.run(path.bridge.state(exact, num_chains), forward=False), quantity)
            running = {k: (-log_prob, error) for k, (log_prob, error) in back.running.items()}
            parts.append((forward, replace(back, log_prob=-back.log_prob, running=running)))
        lower, upper = zip(*parts, strict=True)
        bounds = tuple(counting(joined(each), whole.having()) for each in (lower, upper))
        return returned(bounds, whole, batch)


def _check_options(
    model: Any,
    guide: Any,
    batch: Any,
    num_chains: Any,
    temperatures: Any,
    leapfrog_steps: Any,
    start: Any,
    pilot_chains: Any,
    vectorize: Any,
) -> None:
    """Raise a TypeError or a ValueError for what no chain can be run with."""
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_counts(num_chains=num_chains, temperatures=temperatures, leapfrog_steps=leapfrog_steps)
    check_counts(2, pilot_chains=pilot_chains)
    check_choice("start", start, ("guide", "prior"))
    check_flags(vectorize=vectorize)


def _rows_at_once(batch: Batch, num_chains: int, pilot_chains: int) -> int:
    return max(1, PAIRS // max(num_chains, pilot_chains))


class _Path:
    """The temperatures from q_0 to the posterior, a schedule for every row, and what tunes the moves at each."""

    def __init__(
        self,
        model: Callback,
        guide: Callback,
        batch: Batch,
        temperatures: int,
        leapfrog_steps: int,
        start: Literal["guide", "prior"],
        pilot_chains: int,
        vectorize: bool,
    ):
        self.bridge = TemperedDensity(model, guide, batch, start, vectorize)
        self.leapfrog_steps = leapfrog_steps
        self._tune(pilot_chains, temperatures)

    def _tune(self, chains: int, temperatures: int) -> None:
        """Runs pilot chains up a grid of temperatures, and from them chooses the schedule, step sizes and scales."""
        u = self.bridge.draws(chains)
        at, variance = self.bridge.at(u), {name: x.var(0) for name, x in u.items()}
        step = torch.full_like(at.log_p[0], 0.5)
        grid = torch.linspace(-4, 4, max(temperatures // 2, WARM) + 1, dtype=step.dtype, device=step.device).sigmoid()
        grid = (grid - grid[0]) / (grid[-1] - grid[0])
        steps, scales, speeds = [], [], [(at.log_p - at.log_q).std(0)]
        for t, beta in enumerate(grid[1:]):
            scale = {name: v.sqrt().clamp(min=1e-6) for name, v in variance.items()}
            for _ in range(WARM if t == 0 else 1):
                at, accept = self._move(at, beta, step, scale)
                step = (step * (RATE * (accept.mean(0) - ACCEPT)).exp()).clamp(1e-4, 10.0)
            steps.append(step)
            scales.append(scale)
            speeds.append((at.log_p - at.log_q).std(0))
            variance = {n: FORGET * v + (1 - FORGET) * at.u[n].var(0) for n, v in variance.items()}
        self.betas, place = _schedule(grid, torch.stack(speeds), temperatures)
        every = torch.arange(place.shape[1], device=place.device)
        self.steps = torch.stack(steps)[place, every]  # (T, N)
        self.scales = {n: torch.stack([scale[n] for scale in scales]) for n in u}
        self.place = place

    def run(self, u: dict[str, Tensor], forward: bool = True) -> Tensor:
        """Log-weights ``(C, N)`` of chains from the states u at one end of the path."""
        at = self.bridge.at(u)
        log_w = torch.zeros_like(at.log_p)
        for t in range(len(self.steps)) if forward else reversed(range(len(self.steps))):
            gap = self.betas[t + 1] - self.betas[t]
            if forward:
                log_w = log_w + gap * (at.log_p - at.log_q)
            scale = {n: self.bridge.of_rows(n, x, self.place[t]) for n, x in self.scales.items()}
            at, _ = self._move(at, self.betas[t + 1], self.steps[t], scale)
            if not forward:
                log_w = log_w - gap * (at.log_p - at.log_q)
        return log_w

    def _move(self, at: State, beta: Tensor, step: Tensor, scale: dict[str, Tensor]) -> tuple[State, Tensor]:
        """A Hamiltonian move of every chain at a temperature, and its acceptance probabilities ``(C, N)``."""
        bridge = self.bridge
        jitter = 1 + JITTER * (2 * torch.rand_like(at.log_p) - 1)
        wide = {n: bridge.spread(n, step * jitter) * scale[n] for n in at.u}
        p = bridge.momenta(at.u)
        before = at.energy(beta) + bridge.kinetic(p)
        new = at
        for _ in range(self.leapfrog_steps):
            slope = bridge.slope(new, beta)
            p = {n: x - 0.5 * wide[n] * slope[n] for n, x in p.items()}
            new = bridge.at({n: x + wide[n] * p[n] for n, x in new.u.items()})
            slope = bridge.slope(new, beta)
            p = {n: x - 0.5 * wide[n] * slope[n] for n, x in p.items()}
        log_accept = (before - new.energy(beta) - bridge.kinetic(p)).nan_to_num(nan=-math.inf).clamp(max=0)
        moved = torch.rand_like(log_accept).log() < log_accept
        return bridge.where(moved, new, at), log_accept.exp()


def _schedule(grid: Tensor, speeds: Tensor, temperatures: int) -> tuple[Tensor, Tensor]:
    """Temperatures ``(T + 1, N)`` at equal distances along the path, and the interval of the grid that each lies in.

    The distance of two temperatures is the integral of the standard deviation of log p(x, z) - log q_0(z), of which the
    log-weights' variance is made (Gelman & Meng 1998, Statistical Science 13:163). It is noisy, so it is smoothed, and
    mixed with the grid's own spacing.
    """
    speeds = speeds.nan_to_num(0.0, 0.0, 0.0)
    kernel = torch.ones(1, 1, SMOOTH, dtype=speeds.dtype, device=speeds.device) / SMOOTH
    padded = torch.nn.functional.pad(speeds.T[:, None], (SMOOTH // 2, SMOOTH // 2), mode="replicate")
    speeds = torch.nn.functional.conv1d(padded, kernel)[:, 0].T
    lengths = grid.diff()[:, None] * (speeds[1:] + speeds[:-1]) / 2
    share = lengths / lengths.sum(0).clamp(min=torch.finfo(lengths.dtype).tiny)
    share = torch.where(lengths.sum(0) > 0, (1 - UNIFORM) * share, 0.0) + UNIFORM / len(lengths)
    travelled = torch.cat([torch.zeros_like(share[:1]), share.cumsum(0)])
    travelled = travelled / travelled[-1]
    goals = torch.arange(1, temperatures + 1, dtype=grid.dtype, device=grid.device) / temperatures
    place = torch.searchsorted(travelled.T.contiguous(), goals.expand(speeds.shape[1], -1).contiguous()).T
    place = place.clamp(1, len(lengths)) - 1
    every = torch.arange(speeds.shape[1], device=grid.device)
    within = (goals[:, None] - travelled[place, every]) / share[place, every] * travelled[-1]
    betas = grid[place] + within.clamp(0, 1) * (grid[place + 1] - grid[place])
    betas[-1] = 1.0
    return torch.cat([torch.zeros_like(betas[:1]), betas]), place
