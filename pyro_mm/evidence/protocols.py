r"""The likelihoods that papers print, by the names that they have there: one quantity, and more than one proposal.

With w the ``given`` modalities and x the ``target`` (Suzuki et al. 2016, arXiv:1611.01891, section 5):

======================== ========================= =======================================================
:func:`joint`            log p(x, w)               :math:`z \sim q(z | x, w)`
:func:`multiple`         log p(x)                  :math:`z \sim q(z | x, w)`, the joint proposal
:func:`single`           log p(x)                  :math:`z \sim q(z | x)`
:func:`conditional`      log p(x | w)              the joint one, less log p(w) from draws of the prior
:func:`both_ways`        log p(x | w) + log p(w|x) each likelihood under its own posterior
======================== ========================= =======================================================

``multiple`` and ``single`` estimate the same number: where they differ, one of the proposals is too narrow.
``pyro_mm.log_conditional`` is the alternative to ``conditional``, with q(z | w) in the place of the prior.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ..batch.batch import Batch, check_batch
from ..scoring.audit.audit import audit as audited
from ..scoring.evaluation import evaluating, returned
from ..utils.arguments import check_counts, check_names, check_programs
from ..utils.seeding import normalize_seed
from .evidence import Evidence
from .likelihood import log_conditional, log_marginal
from .quantity import conditional_evidence, restrict_means

__all__ = ["PRIOR_DRAWS", "both_ways", "conditional", "joint", "multiple", "single"]

Callback = Callable[[Batch], Any]
Names = Sequence[str]
PRIOR_DRAWS = 5000


def _names(model: Any, guide: Any, batch: Any, target: Any, given: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return target and given as names of modalities, after a look at the pair and the batch."""
    check_programs(model=model, guide=guide)
    check_batch(batch)
    wanted = "expected target and given to be sequences of names without one in common"
    if isinstance(target, str) or isinstance(given, str):
        raise ValueError(f"{wanted}, got a string: target={target!r}, given={given!r}")
    targets, givens = check_names("target", target, batch, least=1), check_names("given", given, batch)
    if set(targets) & set(givens):
        raise ValueError(f"{wanted}, got target={targets}, given={givens}")
    return targets, givens


def joint(model: Callback, guide: Callback, batch: Batch, target: Names, given: Names, **options: Any) -> Evidence:
    """log p(target, given), each row under the guide's posterior of both.

    Args:
        model, guide, batch: as in :func:`pyro_mm.log_marginal`.
        target, given: sequences of names of modalities, without one in common.
        options: of :func:`pyro_mm.log_marginal`: ``num_particles``, ``seed``, ..

    Raises:
        ValueError: a string in the place of a sequence, or a name in both.
    """
    target, given = _names(model, guide, batch, target, given)
    with evaluating(model, guide, batch, audit=False) as rows:
        return returned(log_marginal(model, guide, rows.only(*target, *given), **options), rows, batch)


def multiple(model: Callback, guide: Callback, batch: Batch, target: Names, given: Names, **options: Any) -> Evidence:
    """log p(target), under the posterior of target and given. Arguments as of :func:`joint`."""
    target, given = _names(model, guide, batch, target, given)
    with evaluating(model, guide, batch, audit=False) as rows:
        seen = rows.only(*target, *given)
        return returned(log_marginal(model, guide, rows.only(*target), proposal=seen, **options), rows, batch)


def single(
    model: Callback, guide: Callback, batch: Batch, target: Names, given: Names = (), **options: Any
) -> Evidence:
    """log p(target), under the posterior of the target alone. Arguments as of :func:`joint`."""
    target, given = _names(model, guide, batch, target, given)
    with evaluating(model, guide, batch, audit=False) as rows:
        return returned(log_marginal(model, guide, rows.only(*target), **options), rows, batch)


def conditional(
    model: Callback,
    guide: Callback,
    batch: Batch,
    target: Names,
    given: Names,
    *,
    prior_draws: int = PRIOR_DRAWS,
    seed: int | None = None,
    **options: Any,
) -> Evidence:
    """log p(target | given): the joint one, less log p(given) from ``prior_draws`` draws of the prior.

    Its error for the second part grows with what the given modalities tell of z: for labels it is small, for images
    it is hopeless, as its standard error says. Other arguments as of :func:`joint`.
    """
    target, given = _names(model, guide, batch, target, given)
    check_counts(prior_draws=prior_draws)
    seed = normalize_seed(seed)
    quantity = f"log p({', '.join(target)} | {', '.join(given)})"
    with evaluating(model, guide, batch, audit=False) as rows:
        if options.get("audit", True):
            audited(model, guide, rows.only(*target, *given), targets=target, givens=given)
        both = joint(model, guide, rows, target, given, seed=seed, **options)
        options |= {"num_particles": prior_draws, "prior_share": 1.0}
        marginal = log_marginal(model, guide, rows.only(*given), seed=seed + 1, **options)
        return returned(conditional_evidence(both, marginal, rows.having(target), quantity), rows, batch)


def both_ways(
    model: Callback,
    guide: Callback,
    batch: Batch,
    target: Names,
    given: Names,
    *,
    seed: int | None = None,
    **options: Any,
) -> Evidence:
    r"""log p(target | given) + log p(given | target), whose mean is minus the variation of information.

    .. math:: -VI(x, w) = E[\log p(x | w) + \log p(w | x)]

    What the penalty of JMVAE-kl bounds: a larger alpha trades log p(x, w) for it (Suzuki et al. 2016, section 3.3).
    Each of the two is :func:`pyro_mm.log_conditional`'s, with draws of its own. Arguments as of :func:`joint`.
    """
    target, given = _names(model, guide, batch, target, given)
    seed = normalize_seed(seed)
    x, w = ", ".join(target), ", ".join(given)
    with evaluating(model, guide, batch, audit=False) as rows:
        one = log_conditional(model, guide, rows, target=target, given=given, seed=seed, **options)
        marginal = single(model, guide, rows, target, seed=seed + 2, **options)
        both = joint(model, guide, rows, target, given, seed=seed + 3, **options)
        found = replace(one - (marginal - both), quantity=f"log p({x} | {w}) + log p({w} | {x})")
        both_there = rows.having(target) & rows.having(given)
        return returned(restrict_means(found, both_there), rows, batch)
