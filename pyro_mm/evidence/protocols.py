r"""Likelihoods as papers report them, by the names that they have there: one quantity, and more than one proposal.

With w the ``given`` modalities and x the ``target`` (Suzuki et al. 2016, arXiv:1611.01891, section 5):

======================== ========================= =======================================================
:func:`joint`            log p(x, w)               :math:`z \sim q(z | x, w)`
:func:`multiple`         log p(x)                  :math:`z \sim q(z | x, w)`, the joint proposal
:func:`single`           log p(x)                  :math:`z \sim q(z | x)`
:func:`conditional`      log p(x | w)              the joint one, less log p(w) from draws of the prior
:func:`both_ways`        log p(x | w) + log p(w|x) each likelihood under its own posterior
======================== ========================= =======================================================

``multiple`` and ``single`` estimate the same number: where they differ by more than their errors, one of the proposals
is too narrow. ``pyro_mm.log_conditional`` is the alternative to ``conditional``, with q(z | w) in the place of the
prior. All are in nats per row, with the bias, standard errors and diagnostics of :func:`pyro_mm.log_marginal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..batch.batch import Batch, check_batch
from ..sampling.particle_sampler import ProposalScheme
from ..sampling.proposals import Proposal
from ..scoring.audit.audit import audit as audited
from ..scoring.evaluation import evaluating, move_result
from ..scoring.program import Program
from ..scoring.sharing import share_evaluation
from ..utils.arguments import check_counts, check_names, check_programs
from ..utils.seeding import normalize_seed
from ..utils.sharing import sharing
from .evidence import Evidence
from .likelihood import estimate_log_marginal, importance_sampling, log_conditional, log_marginal
from .quantity import conditional_evidence, restrict_means, scored_steps

__all__ = ["PRIOR_DRAWS", "both_ways", "conditional", "joint", "multiple", "single"]

Names = Sequence[str]
PRIOR_DRAWS = 5000


def joint(model: Program, guide: Program, batch: Batch, target: Names, given: Names, **options: Any) -> Evidence:
    """Estimate log p(target, given) per row, under the guide's posterior given both.

    Args:
        model, guide (callable): a story and its guide, called with a batch.
        batch (Batch): N rows.
        target, given (sequence of str): names of modalities, without one in common; strings alone are refused.
        options: of :func:`pyro_mm.log_marginal`, such as ``num_particles``, ``proposal``, ``seed`` and ``devices``.

    Returns:
        An :class:`~pyro_mm.Evidence` of N rows, in nats per row.

    Raises:
        ValueError: a string in the place of a sequence, a name in both, or an unknown one.
    """
    target, given = _check_arguments(model, guide, batch, target, given)
    with evaluating(model, guide, batch, audit=False) as rows:
        return move_result(log_marginal(model, guide, rows.only(*target, *given), **options), rows, batch)


def multiple(model: Program, guide: Program, batch: Batch, target: Names, given: Names, **options: Any) -> Evidence:
    """Estimate log p(target) per row, under the guide's posterior given target and given.

    That proposal knows more than the likelihood asks for. It is narrower than p(z | target), so that its weights may
    have heavy tails: look at k-hat.

    Args:
        model, guide, batch, target, given, options: as in :func:`joint`, but another guide or batch as ``proposal``.

    Returns:
        An :class:`~pyro_mm.Evidence` of N rows, in nats per row.
    """
    target, given = _check_arguments(model, guide, batch, target, given)
    audit = options.pop("audit", True)
    devices = options.pop("devices", None)
    settings = importance_sampling(**options)

    def estimate() -> Evidence:
        with evaluating(model, guide, batch, audit=False) as rows:
            guide_batch = rows.only(*target, *given)
            evidence = estimate_log_marginal(
                model, guide, rows.only(*target), settings, guide_batch=guide_batch, audit=audit
            )
            return move_result(evidence, rows, batch)

    return share_evaluation("multiple", devices, model, guide, batch, options.get("seed"), estimate)


def single(model: Program, guide: Program, batch: Batch, target: Names, given: Names = (), **options: Any) -> Evidence:
    """Estimate log p(target) per row, under the guide's posterior given the target alone.

    Args:
        model, guide, batch, target, options: as in :func:`joint`.
        given (sequence of str): not used; it is there so that all protocols can be called alike.

    Returns:
        An :class:`~pyro_mm.Evidence` of N rows, in nats per row.
    """
    target, given = _check_arguments(model, guide, batch, target, given)
    with evaluating(model, guide, batch, audit=False) as rows:
        return move_result(log_marginal(model, guide, rows.only(*target), **options), rows, batch)


def conditional(
    model: Program,
    guide: Program,
    batch: Batch,
    target: Names,
    given: Names,
    *,
    prior_draws: int = PRIOR_DRAWS,
    seed: int | None = None,
    **options: Any,
) -> Evidence:
    r"""Estimate log p(target | given) per row, with the denominator from draws of the prior.

    .. math:: \log p(x | w) \approx \log p(x, w) - \log \frac1L \sum_l p(w | z_l), \qquad z_l \sim p(z)

    The error of the second part grows with what the given modalities say about z: it is small for labels and hopeless
    for images, as the standard error and k-hat say.

    Args:
        model, guide, batch, target, given, options: as in :func:`joint`. ``proposal`` applies to the joint part; the
            other part always draws from the prior, with the ``draws`` of an ``mm.Proposal``.
        prior_draws (int): L.
        seed (int): of all draws; None takes one from torch's generator.

    Returns:
        An :class:`~pyro_mm.Evidence` of N rows, in nats per row; exactly 0 in a row that lacks all targets.
    """
    target, given = _check_arguments(model, guide, batch, target, given)
    check_counts(prior_draws=prior_draws)
    devices = options.pop("devices", None)
    quantity = f"log p({', '.join(target)} | {', '.join(given)})"

    def estimate() -> Evidence:
        first_seed = sharing().broadcast(normalize_seed(seed))
        with evaluating(model, guide, batch, audit=False) as rows:
            if options.get("audit", True):
                audited(model, guide, rows.only(*target, *given), targets=target, givens=given)
            both = joint(model, guide, rows, target, given, seed=first_seed, **options)
            prior_options = _from_prior(options) | {"num_particles": prior_draws}
            marginal = log_marginal(model, guide, rows.only(*given), seed=first_seed + 1, **prior_options)
            steps = scored_steps(model, guide, rows, [name for name in target if rows.holds(name)])
            evidence = conditional_evidence(both, marginal, rows.having(target), quantity, steps)
            return move_result(evidence, rows, batch)

    return share_evaluation("conditional", devices, model, guide, batch, seed, estimate)


def both_ways(
    model: Program,
    guide: Program,
    batch: Batch,
    target: Names,
    given: Names,
    *,
    seed: int | None = None,
    **options: Any,
) -> Evidence:
    r"""Estimate log p(target | given) + log p(given | target) per row.

    Its mean is minus the variation of information,

    .. math:: -VI(x, w) = E[\log p(x | w) + \log p(w | x)]

    which the penalty of JMVAE-kl bounds: a larger alpha trades log p(x, w) for it. Each of the two is that of
    :func:`pyro_mm.log_conditional`, with draws of its own.

    Args:
        model, guide, batch, target, given, options: as in :func:`joint`.
        seed (int): of all draws; None takes one from torch's generator.

    Returns:
        An :class:`~pyro_mm.Evidence` of N rows, in nats per row; means are over the rows that have both.

    References:
        Suzuki et al. 2016, arXiv:1611.01891, section 3.3.
    """
    target, given = _check_arguments(model, guide, batch, target, given)
    devices = options.pop("devices", None)
    x, w = ", ".join(target), ", ".join(given)

    def estimate() -> Evidence:
        first_seed = sharing().broadcast(normalize_seed(seed))
        with evaluating(model, guide, batch, audit=False) as rows:
            one = log_conditional(model, guide, rows, target=target, given=given, seed=first_seed, **options)
            marginal = single(model, guide, rows, target, seed=first_seed + 2, **options)
            both = joint(model, guide, rows, target, given, seed=first_seed + 3, **options)
            total = replace(one - (marginal - both), quantity=f"log p({x} | {w}) + log p({w} | {x})")
            return move_result(restrict_means(total, rows.having(target) & rows.having(given)), rows, batch)

    return share_evaluation("both_ways", devices, model, guide, batch, seed, estimate)


def _check_arguments(
    model: Any, guide: Any, batch: Any, target: Any, given: Any
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Check a pair, a batch and names of modalities, and return target and given as tuples."""
    check_programs(model=model, guide=guide)
    check_batch(batch)
    wanted = "expected target and given to be sequences of names without one in common"
    if isinstance(target, str) or isinstance(given, str):
        raise ValueError(f"{wanted}, got a string: target={target!r}, given={given!r}")
    targets = check_names("target", target, batch, least=1)
    givens = check_names("given", given, batch)
    if set(targets) & set(givens):
        raise ValueError(f"{wanted}, got target={targets}, given={givens}")
    return targets, givens


def _from_prior(options: dict[str, Any]) -> dict[str, Any]:
    """Return options of ``log_marginal`` with all draws from the prior."""
    proposal = options.get("proposal")
    if not isinstance(proposal, ProposalScheme | str):
        return options | {"prior_share": 1.0}
    prior = replace(proposal, prior_share=1.0) if isinstance(proposal, Proposal) else Proposal(prior_share=1.0)
    return options | {"proposal": prior}
