r"""Annealed importance sampling: log-likelihoods for rows on which importance sampling cannot be trusted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from ..batch.batch import Batch, check_batch
from ..sampling.ancestral import simulate
from ..scoring.audit.audit import audit as audited
from ..scoring.evaluation import evaluating, move_result
from ..scoring.structure import Callback
from ..utils.arguments import check_choice, check_counts, check_flags, check_programs
from ..utils.seeding import normalize_seed, temporary_seed
from .accumulator import evidence_from_weights
from .annealing_schedule import AnnealingSchedule
from .evidence import Evidence, concatenate
from .quantity import name_quantity, quantity_name, restrict_means

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
                path = AnnealingSchedule(
                    model, guide, rows, temperatures, leapfrog_steps, start, pilot_chains, vectorize
                )
                parts.append(evidence_from_weights(path.run(path.bridge.draws(num_chains)), ""))
        found = name_quantity(parts[0] if len(parts) == 1 else concatenate(parts), model, guide, whole)
        return move_result(found, whole, batch)


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
                quantity = quantity_name(model, guide, simulated)
                path = AnnealingSchedule(
                    model, guide, simulated, temperatures, leapfrog_steps, start, pilot_chains, vectorize
                )
                forward = evidence_from_weights(path.run(path.bridge.draws(num_chains)), quantity)
                back = evidence_from_weights(path.run(path.bridge.state(exact, num_chains), forward=False), quantity)
            running = {k: (-log_prob, error) for k, (log_prob, error) in back.running.items()}
            parts.append((forward, replace(back, log_prob=-back.log_prob, running=running)))
        lower, upper = zip(*parts, strict=True)
        bounds = tuple(restrict_means(concatenate(each), whole.having()) for each in (lower, upper))
        return move_result(bounds, whole, batch)


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
