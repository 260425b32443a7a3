r"""Marginal and conditional log-likelihoods by importance sampling, with standard errors and diagnostics per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..batch.batch import Batch, check_batch
from ..sampling.guide_sampler import DrawMethod
from ..sampling.particle_sampler import ParticleSampler, ProposalScheme
from ..sampling.proposals import resolve_proposal
from ..sampling.shared_blocks import SharedBlock, share_blocks, shared_weights
from ..sampling.weighted import BlockSizes, ImportanceSampling
from ..scoring.audit.audit import audit as audited
from ..scoring.evaluation import evaluating, move_result
from ..scoring.program import Program
from ..scoring.sharing import share_evaluation
from ..scoring.structure import pair_structure
from ..utils.arguments import (
    check_counts,
    check_flag,
    check_flags,
    check_function,
    check_names,
    check_programs,
    check_seed,
)
from ..utils.seeding import normalize_seed
from ..utils.sharing import sharing
from .accumulator import WeightAccumulator
from .evidence import Evidence, concatenate
from .quantity import conditional_evidence, name_quantity, scored_steps


def log_marginal(
    model: Program,
    guide: Program,
    batch: Batch,
    *,
    num_particles: int = 1000,
    proposal: ProposalScheme | Program | Batch | str | None = None,
    draws: DrawMethod | None = None,
    stratify: bool | None = None,
    prior_share: float | None = None,
    seed: int | None = None,
    chunk: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
    devices: int | None = None,
) -> Evidence:
    r"""Estimate log p(x_S) per row by importance sampling, S being the modalities present in the row.

    .. math:: \log p(x_S) \approx \log \frac1K \sum_{k=1}^K w_k, \qquad
              w_k = \frac{p(x_S | z_k) \, p(z_k)}{q(z_k)}, \qquad z_k \sim q(z | x_S)

    So it is the joint log-likelihood for rows that are complete, and a marginal one for ``batch.only("image")``.

    Where latents :math:`\theta` lie outside the plate ``"data"``, all rows share them, and no row has a likelihood of
    its own. Then p(x_S) stands for :math:`E_{q(\theta)}[p(x_S | \theta)]`, the predictive density of a row under the
    guide's :math:`q(\theta)`, with one draw of :math:`\theta` per particle: ``evidence.notes`` says so. It is not the
    marginal likelihood of all rows together.

    **Bias.** The mean of the weights is an unbiased estimate of p(x_S). Its logarithm is too low, by about half the
    squared standard error (Jensen); the expectation is the IWAE bound of K particles, which rises with K.

    **Standard error.** By the delta method, :math:`\mathrm{sd}(w) / (\sqrt K \, \bar w)`, in nats; for draws that
    depend on each other, from the spread of independent groups of them. It holds below about 0.5 nats.

    **When not to trust a row.** A k-hat above 0.7 (:attr:`Evidence.pareto_k`) says that the weights have a tail so
    heavy that their variance is too large or infinite: few draws carry the sum, the estimate is more likely too low
    than too high, and the standard error, which misses the same tail, is too small. ``evidence.summary()`` lists such
    rows. A k-hat below 0.7 is no proof: a guide that misses a mode of the posterior altogether looks well. Remedies are
    ``proposal="fitted"``, which fits the proposal to each row (:class:`~pyro_mm.Fitted`), more particles, and
    :func:`~pyro_mm.annealed_importance`.

    Args:
        model (callable): a story, called with a batch. Row-local enumerated sites are summed out; a latent that only
            the model has is drawn from its prior.
        guide (callable): called with a batch.
        batch (Batch): N rows. A row in which nothing is present has log-likelihood 0, and does not count in means.
        num_particles (int): K, draws per row.
        proposal: the way to draw: an :class:`mm.Proposal <pyro_mm.Proposal>` from the guide, the default; or an
            :class:`mm.Fitted <pyro_mm.Fitted>` to each row, ``"fitted"`` with its defaults. Or another guide to draw
            from; or the same rows as another batch for the guide to see in the place of ``batch``: with
            ``batch.only("image")`` and ``proposal=batch``, log p(image) under q(z | image, label).
        draws, stratify, prior_share: fields of a :class:`~pyro_mm.Proposal` one by one, in the place of one, or beside
            another guide or batch.
        seed (int): of all draws; None takes one from torch's generator, which is not otherwise used.
        chunk (int): (row, particle) pairs decoded at once, which bounds the memory (encoders see 4096 rows at once) and
            changes no digit but by rounding. By default so many that the widest modality has 2^20 numbers, at most
            2^14; on CUDA 2^16.
        vectorize (bool): False scores particle by particle, for stories that do not broadcast.
        audit (bool): False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`) and its errors.
        devices (int): processes that share out the blocks of rows and draws, and forked for the call on this machine's
            CPU. None takes those that there are: all processes of torchrun, which all have to make the call, and get
            the whole result; 1 is this process alone. The numbers are those of one process.

    Returns:
        An :class:`Evidence` of N rows, in nats per row.

    Raises:
        ValueError: a site that is scaled, or observed outside the plate ``"data"``, whose weights would be no
            likelihoods; a latent outside that plate which the guide lacks or enumerates; a
            :class:`~pyro_mm.Proposal` and its fields beside it; a proposal that the guide cannot be sampled by.

    Example:
        A story whose evidence is known, and a guide wider than its posterior:

        >>> import torch, pyro_mm as mm
        >>> import pyro.distributions as dist
        >>> model = mm.models.LinearGaussian({"a": torch.eye(2), "b": torch.ones(3, 2)}, noise=0.5)
        >>> batch = mm.Batch({"a": torch.tensor([[1.0, -1.0], [0.5, 2.0]]), "b": torch.zeros(2, 3)})
        >>> def wider(batch):
        ...     q = model.posterior(batch)
        ...     return dist.Normal(q.mean, 1.3 * q.stddev).to_event(1)
        >>> guide = mm.Guide(z=wider)
        >>> evidence = mm.log_marginal(model, guide, batch, num_particles=5000, seed=0)
        >>> exact = model.log_prob(batch)
        >>> bool(((evidence.log_prob - exact).abs() < 4 * evidence.standard_error).all())
        True
        >>> quasi = mm.log_marginal(model, guide, batch, num_particles=5000, seed=0, proposal=mm.Proposal("quasi"))
        >>> bool((quasi.standard_error < evidence.standard_error).all())
        True

    References:
        Burda et al. 2016, "Importance weighted autoencoders", arXiv:1509.00519. Vehtari et al. 2024, "Pareto smoothed
        importance sampling", JMLR 25:72.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    sampled_guide, guide_batch, scheme = split_proposal(proposal, guide, batch)
    settings = importance_sampling(
        num_particles=num_particles, proposal=scheme, draws=draws, stratify=stratify, prior_share=prior_share,
        seed=seed, chunk=chunk, vectorize=vectorize,
    )  # fmt: skip

    def estimate() -> Evidence:
        return estimate_log_marginal(model, sampled_guide, batch, settings, guide_batch=guide_batch, audit=audit)

    return share_evaluation("log_marginal", devices, model, sampled_guide, batch, seed, estimate)


def split_proposal(proposal: Any, guide: Program, batch: Batch) -> tuple[Program, Batch, ProposalScheme | None]:
    """Return the guide to draw from, the batch that it sees, and the way to draw, from ``proposal=``.

    Args:
        proposal: a scheme or its name, another guide, the same rows as another batch, or None.
        guide: the guide that is drawn from unless another one is proposed.
        batch: the rows that it sees unless others are proposed.

    Raises:
        TypeError: a proposal of another type.
        ValueError: a batch of another number of rows.
    """
    if proposal is None:
        return guide, batch, None
    if isinstance(proposal, ProposalScheme | str):
        return guide, batch, resolve_proposal(proposal)
    if not isinstance(proposal, Batch):
        return check_function("proposal", proposal), batch, None
    if check_batch(proposal, "proposal").size != batch.size:
        raise ValueError(f"the proposal's batch has {proposal.size} rows, and the batch {batch.size}")
    return guide, proposal, None


def importance_sampling(
    *,
    num_particles: int = 1000,
    proposal: ProposalScheme | str | None = None,
    draws: DrawMethod | None = None,
    stratify: bool | None = None,
    prior_share: float | None = None,
    seed: int | None = None,
    chunk: int | None = None,
    vectorize: bool = True,
) -> ImportanceSampling:
    """Return the settings of an importance sampler from the keywords of :func:`log_marginal`.

    Raises:
        TypeError: a keyword of another type.
        ValueError: a keyword out of its range, or a proposal and its fields beside it.
    """
    check_counts(num_particles=num_particles)
    check_seed(seed)
    if chunk is not None:
        check_counts(chunk=chunk)
    check_flags(vectorize=vectorize)
    scheme = resolve_proposal(proposal, draws=draws, stratify=stratify, prior_share=prior_share)
    sizes = BlockSizes(decoded_pairs=chunk)
    return ImportanceSampling(num_particles, normalize_seed(seed), scheme, vectorize, sizes)


def estimate_log_marginal(
    model: Program,
    guide: Program,
    batch: Batch,
    settings: ImportanceSampling,
    *,
    guide_batch: Batch | None = None,
    audit: bool = True,
) -> Evidence:
    """Estimate log p(x_S) per row in evaluation mode, block by block of rows.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        settings: K, the proposal, the seed and the sizes of blocks.
        guide_batch: the same rows as the guide sees them; ``batch`` by default.
        audit: True to audit the pair.
    """
    guide_batch = batch if guide_batch is None else guide_batch
    settings = replace(settings, seed=sharing().broadcast(settings.seed))
    with evaluating(model, guide, batch, audit=audit, stacked=settings.stacked, guide_batch=guide_batch) as rows:
        shown = rows if guide_batch is batch else guide_batch.to(rows.device)

        def accumulate(block: SharedBlock) -> tuple[Evidence, int]:
            return _accumulate(model, guide, block.rows, settings.for_rows(block.first), block.shown)

        parts = share_blocks(model, guide, rows, shown, settings, accumulate)
        evidence = concatenate([evidence for evidence, _ in parts])
        evidence = name_quantity(evidence, model, guide, rows, shown)
        if failed := sum(failed for _, failed in parts):
            remark = f"the fit found no finite density in {failed} of {batch.size} rows: their Normals are the guide's"
            evidence = replace(evidence, notes=(*evidence.notes, remark))
        return move_result(evidence, rows, batch)


def _accumulate(
    model: Program, guide: Program, batch: Batch, settings: ImportanceSampling, guide_batch: Batch
) -> tuple[Evidence, int]:
    """Return the evidence of one block of rows, without a name, and the number of rows that could not be fitted."""
    accumulator: WeightAccumulator | None = None
    for log_weights, sampler, shared in shared_weights(model, guide, batch, settings, guide_batch):
        accumulator = accumulator or WeightAccumulator(settings.num_particles, sampler.group_size, shared)
        accumulator.add(log_weights)
    assert accumulator is not None  # there is one particle at least
    evidence = name_proposal(accumulator.evidence(""), settings, sampler)
    return evidence, 0 if sampler.fallback is None else int(sampler.fallback.sum())


def name_proposal(evidence: Evidence, settings: ImportanceSampling, sampler: ParticleSampler) -> Evidence:
    """Return an evidence with the proposal that its draws come from, and their cost."""
    return replace(
        evidence,
        proposal=repr(settings.proposal),
        evaluations=settings.num_particles + sampler.num_pilot,
        gradients=sampler.num_gradients,
    )


def log_conditional(
    model: Program,
    guide: Program,
    batch: Batch,
    *,
    target: Sequence[str] | str,
    given: Sequence[str] | str = (),
    num_particles: int = 1000,
    proposal: ProposalScheme | str | None = None,
    draws: DrawMethod | None = None,
    stratify: bool | None = None,
    prior_share: float | None = None,
    seed: int | None = None,
    chunk: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
    devices: int | None = None,
) -> Evidence:
    r"""Estimate log p(x_T | x_G) per row: the target modalities T given the modalities G, as far as present.

    .. math:: \log p(x_T | x_G) = \log p(x_T, x_G) - \log p(x_G)

    Each of the two is an estimate of :func:`log_marginal` under a proposal of its own, q(z | x_T, x_G) and
    q(z | x_G), with draws of its own.

    **Bias.** Each term is too low by about half its squared error, so that the difference is off by half the difference
    of the two, in either direction. **Standard error.** The two errors in quadrature. **When not to trust a row.**
    ``ess`` and ``pareto_k`` are the worse of the two: with a k-hat above 0.7 in the marginal, whose estimate is then
    too low, the conditional may be too high. The difference of two large log-likelihoods that are almost equal has a
    large error.

    Args:
        model, guide, batch: as in :func:`log_marginal`.
        target (str or sequence of str): names of modalities, one at least. A row that lacks all of them has 0, exactly,
            and does not count in means.
        given (str or sequence of str): names of other modalities. A row that lacks all of them has log p(x_T).
        num_particles, draws, stratify, prior_share, seed, chunk, vectorize, audit, devices: as in
            :func:`log_marginal`.
        proposal (Proposal, Fitted or ``"fitted"``): the way to draw, for each of the two estimates by itself.

    Returns:
        An :class:`Evidence` of N rows, in nats per row.

    Raises:
        ValueError: a modality in both, no target, or an unknown name; and as :func:`log_marginal` does.

    Example:
        >>> import torch, pyro_mm as mm
        >>> model = mm.models.LinearGaussian({"a": torch.eye(2), "b": torch.ones(3, 2)}, noise=0.5)
        >>> batch = model.sample(4)
        >>> evidence = mm.log_conditional(model, mm.Guide(z=model.posterior), batch, target="a", given="b", seed=0)
        >>> evidence.quantity
        'log p(a | b)'
        >>> torch.allclose(evidence.log_prob, model.log_conditional(batch, ["a"], ["b"]), atol=1e-4)
        True
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    settings = importance_sampling(
        num_particles=num_particles, proposal=proposal, draws=draws, stratify=stratify, prior_share=prior_share,
        seed=seed, chunk=chunk, vectorize=vectorize,
    )  # fmt: skip
    targets, givens = check_names("target", target, batch), check_names("given", given, batch)
    if set(targets) & set(givens) or not targets:
        raise ValueError(f"expected targets, and none of them given: target={targets}, given={givens}")
    check_flag("audit", audit)

    def estimate() -> Evidence:
        return _estimate_log_conditional(model, guide, batch, targets, givens, settings, audit)

    return share_evaluation("log_conditional", devices, model, guide, batch, seed, estimate)


def _estimate_log_conditional(
    model: Program,
    guide: Program,
    batch: Batch,
    targets: Sequence[str],
    givens: Sequence[str],
    settings: ImportanceSampling,
    audit: bool,
) -> Evidence:
    """Estimate log p(x_T | x_G) per row in evaluation mode, as :func:`log_conditional` does."""
    settings = replace(settings, seed=sharing().broadcast(settings.seed))
    with evaluating(model, guide, batch, audit=False) as rows:
        both = rows.only(*targets, *givens)
        if audit:
            audited(model, guide, both, targets=targets, givens=givens, stacked=settings.stacked)
        joint = estimate_log_marginal(model, guide, both, settings, audit=audit)

        factors = sorted(pair_structure(model, guide, rows).factors)
        if factors and givens and bool((rows.having(targets) & ~rows.having(givens)).any()):
            raise ValueError(
                f"some rows have a target and nothing of what is given, {list(givens)}, where a conditional would need "
                f"the probability of {factors[0]!r} alone, which the story observes beside the modalities: leave these "
                "rows out"
            )

        if not givens:
            evidence = replace(joint, quantity=f"log p({', '.join([*targets, *factors])})")
            return move_result(evidence, rows, batch)
        quantity = f"log p({', '.join(targets)} | {', '.join([*givens, *factors])})"
        other_seed = replace(settings, seed=normalize_seed(settings.seed + 1))
        marginal = estimate_log_marginal(model, guide, rows.only(*givens), other_seed, audit=audit)
        observed = [name for name in targets if rows.holds(name)]
        steps = None if factors else scored_steps(model, guide, rows, observed)
        evidence = conditional_evidence(joint, marginal, rows.having(targets), quantity, steps)
        return move_result(evidence, rows, batch)
