r"""Marginal and conditional log-likelihoods by importance sampling, each row with its error and its diagnostics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..batch.batch import Batch, check_batch
from ..sampling.proposals import DrawMethod, Proposal
from ..sampling.weighted import weighted_blocks
from ..scoring.audit.audit import audit as audited
from ..scoring.evaluation import evaluating, returned
from ..scoring.structure import Callback, pair_structure
from ..utils.arguments import (
    check_counts,
    check_flag,
    check_flags,
    check_function,
    check_names,
    check_programs,
    check_seed,
)
from ..utils.network_calls import ROWS
from ..utils.seeding import normalize_seed
from .accumulator import WeightAccumulator
from .evidence import Evidence, concatenate
from .quantity import conditional_evidence, name_quantity


def log_marginal(
    model: Callback,
    guide: Callback,
    batch: Batch,
    *,
    num_particles: int = 1000,
    proposal: Callback | Batch | None = None,
    draws: DrawMethod = "independent",
    stratify: bool = True,
    prior_share: float = 0.0,
    seed: int | None = None,
    chunk: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
) -> Evidence:
    r"""log p(x_present) of every row: the joint or a marginal, as the batch's masks say.

    .. math:: \log p(x_S) \approx \log \frac1K \sum_k \frac{p(x_S | z_k) p(z_k)}{q(z_k)}, \qquad z_k \sim q(z | x_S)

    Args:
        model, guide: callables of a batch. Row-local enumerated sites are summed out; a latent that only the model
            has is drawn from its prior.
        batch: N rows. A row in which nothing is present has log-likelihood 0, and does not count in means.
        num_particles: K.
        proposal: another guide to draw from; or the same rows as another batch, for the guide to see instead of
            ``batch`` (with ``batch.only("image")`` and ``proposal=batch``: log p(image) under q(z | image, label)).
        draws: ``"independent"``, ``"antithetic"`` (pairs) or ``"quasi"`` (scrambled Sobol points; the standard error
            is then that of 20 randomisations).
        stratify: takes each component of a mixture posterior in its proportion of the draws, and not at random.
        prior_share: the share of draws taken from the model's prior in place of the guide; 1 is sampling the prior.
            The weights are those of the mixture of the two, and none exceeds p(x | z) / prior_share.
        seed: of the draws; None takes one from torch's generator, which is not otherwise touched.
        chunk: (row, particle) pairs decoded at once, which bounds the memory (encoders see 4096 rows at once) and
            changes no digit of the result but by rounding. By default so many that the widest modality has 2^20
            numbers, 2^14 at most; on CUDA 2^16.
        vectorize: False draws particle by particle, for stories that do not broadcast.
        audit: False spares the audit of the pair (:mod:`pyro_mm.scoring.audit`), and what it would refuse.

    Raises:
        ValueError: a site that is scaled, or outside the plate ``"data"``: its weights would be no likelihoods.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    if proposal is not None and not isinstance(proposal, Batch):
        check_function("proposal", proposal)
    _check_options(num_particles, seed, chunk, vectorize)
    sampler = proposal if proposal is not None and not isinstance(proposal, Batch) else guide
    how = Proposal(draws, stratify, prior_share)
    seed = normalize_seed(seed)
    seen = proposal if isinstance(proposal, Batch) else batch
    if check_batch(seen, "proposal").size != check_batch(batch).size:
        raise ValueError(f"the proposal's batch has {seen.size} rows, and the batch {batch.size}")
    stacked = vectorize and num_particles > 1
    with evaluating(model, sampler, batch, audit=audit, stacked=stacked, seen=seen) as rows:
        shown = seen.to(rows.device) if seen is not batch else rows
        found = _log_marginal(model, sampler, rows, shown, num_particles, how, seed, chunk, vectorize)
        found = name_quantity(found, model, sampler, rows, shown)
        return returned(found, rows, batch)


def _log_marginal(
    model: Callback,
    sampler: Callback,
    batch: Batch,
    seen: Batch,
    num_particles: int,
    how: Proposal,
    seed: int,
    chunk: int | None,
    vectorize: bool,
) -> Evidence:
    """Estimate the log-likelihood of all rows, so many at a time as are encoded at once."""
    parts = []
    for start in range(0, batch.size, ROWS):
        whole = batch.size <= ROWS
        rows, shown = (b if whole else b.block(slice(start, start + ROWS)) for b in (batch, seen))
        sums: Any = None
        blocks = weighted_blocks(model, sampler, rows, shown, num_particles, how, seed + start, chunk, vectorize)
        for each, _, log_w in blocks:
            sums = sums or WeightAccumulator(num_particles, each.group)
            sums.add(log_w)
        parts.append(sums.evidence(""))
    return parts[0] if len(parts) == 1 else concatenate(parts)


def log_conditional(
    model: Callback,
    guide: Callback,
    batch: Batch,
    *,
    target: Sequence[str] | str,
    given: Sequence[str] | str = (),
    num_particles: int = 1000,
    draws: DrawMethod = "independent",
    stratify: bool = True,
    prior_share: float = 0.0,
    seed: int | None = None,
    chunk: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
) -> Evidence:
    r"""log p(x_target | x_given) of every row, as far as they are present in it.

    .. math:: \log p(x_T | x_G) = \log p(x_T, x_G) - \log p(x_G)

    Each of the two is estimated under a proposal of its own, q(z | x_T, x_G) and q(z | x_G), and their errors add in
    quadrature; ``ess`` and ``pareto_k`` are the worse of the two. A row that lacks all targets has 0, exactly, and does
    not count in means.

    Args:
        target, given: names of modalities, without one in common.
        model, guide, batch, and the others: as in :func:`log_marginal`.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    _check_options(num_particles, seed, chunk, vectorize)
    targets, givens = check_names("target", target, batch), check_names("given", given, batch)
    if set(targets) & set(givens) or not targets:
        raise ValueError(f"expected targets, and none of them given: target={targets}, given={givens}")
    seed = normalize_seed(seed)
    options: dict[str, Any] = {
        "num_particles": num_particles, "draws": draws, "stratify": stratify, "prior_share": prior_share,
        "chunk": chunk, "vectorize": vectorize, "audit": audit,
    }  # fmt: skip
    with evaluating(model, guide, batch, audit=False) as rows:
        if check_flag("audit", audit):
            shown, stacked = rows.only(*targets, *givens), vectorize and num_particles > 1
            audited(model, guide, shown, targets=targets, givens=givens, stacked=stacked)
        joint = log_marginal(model, guide, rows.only(*targets, *givens), seed=seed, **options)
        factors = sorted(pair_structure(model, guide, rows).factors)
        if factors and givens and bool((rows.having(targets) & ~rows.having(givens)).any()):
            raise ValueError(
                f"some rows have a target and nothing of what is given, {list(givens)}, where a conditional would need "
                f"the probability of {factors[0]!r} alone, which the story observes beside the modalities: leave these "
                "rows out"
            )
        condition = [*givens, *factors] if givens else []
        quantity = f"log p({', '.join(targets if givens else [*targets, *factors])}"
        quantity += f" | {', '.join(condition)})" if condition else ")"
        if not givens:
            return returned(replace(joint, quantity=quantity), rows, batch)
        marginal = log_marginal(model, guide, rows.only(*givens), seed=seed + 1, **options)
        return returned(conditional_evidence(joint, marginal, rows.having(targets), quantity), rows, batch)


def _check_options(num_particles: Any, seed: Any, chunk: Any, vectorize: Any) -> None:
    """Raise a TypeError or a ValueError for options that no likelihood can be estimated with."""
    check_counts(num_particles=num_particles)
    check_seed(seed)
    if chunk is not None:
        check_counts(chunk=chunk)
    check_flags(vectorize=vectorize)
