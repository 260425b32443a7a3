r"""Log importance weights of a (model, guide) pair, for one term of an objective or a stack of them in one pass.

Every bound and every evidence estimate here is a function of

.. math:: \log w_{kn} = \log p(x_{n,B} \mid z_{kn}) + \log r(z_{kn}) - \log q(z_{kn}), \qquad z_{kn} \sim q

with q the guide given the modalities A, and r the model's prior or the guide given the modalities C.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..utils.arguments import check_counts, check_flags, check_programs
from .draws import StackedDraws
from .evaluation import evaluating, move_result
from .model_scores import score_model
from .program import Program
from .program_runs import propose
from .rescoring import no_rescoring_reason, resampled_kl, rescore
from .scores import Path, Scores
from .strata import Strata
from .structure import PairStructure, latent_sites, pair_structure
from .term_pair import TermPair
from .views import TermViews


def score(
    model: Program,
    guide: Program,
    views: TermViews,
    structure: PairStructure,
    num_particles: int = 1,
    *,
    vectorize: bool = True,
    stratify: bool = False,
    paths: bool = False,
    resample: bool = False,
    draws: bool = False,
) -> Scores:
    """Run the guide, and the model against its draws, for some particles of every term.

    Args:
        model, guide: callables of a batch.
        views: N rows as T terms show them.
        structure: structure of the pair on such rows.
        num_particles: K.
        vectorize: False runs particle by particle, for stories that do not broadcast.
        stratify: draws K from each of the C components of a mixture posterior, ``C K`` in all, those of one component
            together. Where a term encodes the prior there are as many strata, all alike.
        paths: lets ``log_proposal`` depend on latent values alone, for path derivatives.
        resample: scores without gradient, to choose among the particles and rescore those chosen. Where these could
            not be scored as they were the first time (:func:`no_rescoring_reason`) it warns, and scores with gradient.
        draws: keeps the values behind the scores.

    Raises:
        ValueError: a site outside the plate ``"data"``, which has no weight per row.
    """
    if not vectorize and not stratify and num_particles > 1:
        each = [score(model, guide, views, structure, paths=paths, draws=draws) for _ in range(num_particles)]
        return _stack(each)
    resample = resample and torch.is_grad_enabled()
    if resample and (reason := no_rescoring_reason(structure, views)) is not None:
        resample = False
        warnings.warn(f"resample=True differentiates all particles here, and saves no time: {reason}", stacklevel=4)
    strata = Strata(structure, views, num_particles) if stratify else None
    pair = TermPair(model, guide, views, num_particles if strata is None else strata.particles)
    propose(pair, structure, None if strata is None else partial(strata.draw, pair))
    with torch.set_grad_enabled(torch.is_grad_enabled() and not resample):
        stand_ins = _stand_ins(pair) if paths and torch.is_grad_enabled() else {}
        scores = score_model(pair, structure, stand_ins=stand_ins, draws=draws)
    log_component = None if strata is None else strata.log_weights(pair)
    scores.log_component = log_component
    if resample:
        scores.rescore = partial(rescore, pair, structure, log_component)
        first = torch.arange(0, pair.num_particles, num_particles, device=views.decode.device)  # of each component
        first = first[:, None, None].expand(-1, views.terms, views.decode.size)
        scores.divergence = partial(
            resampled_kl, scores.divergence, partial(rescore, pair, structure, log_component, first)
        )
    return scores


def _stand_ins(pair: TermPair) -> dict[str, Tensor]:
    """Return detached copies of the values of pathwise sites, leaves to differentiate log q with respect to."""
    sites = latent_sites(pair.trace)
    return {n: s["value"].detach().requires_grad_() for n, s in sites.items() if s["value"].requires_grad}


def log_weights(
    model: Program,
    guide: Program,
    batch: Batch,
    num_particles: int = 1,
    *,
    vectorize: bool = True,
    audit: bool = True,
) -> Tensor:
    r"""Return log importance weights per row, ``log p(x_n, z_kn) - log q(z_kn | x_n)``, z from the guide.

    Args:
        model, guide: callables of a batch. Row-local enumerated sites are summed out; a latent that only the model
            has is drawn from its prior. A latent outside the plate ``"data"`` is drawn once per particle, and given:
            neither its prior nor its posterior is in the weights, which are not to train by.
        batch: N rows; what is missing in a row is left out of it.
        num_particles: K.
        vectorize: False runs particle by particle, for stories that do not broadcast.
        audit: False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`) and its errors.

    Modules run in evaluation mode; a loss to train by is an :class:`~pyro_mm.objectives.Objective`'s.

    Returns:
        ``(K, N)``, in nats, without the scale of a subsampled data plate; differentiable. The mean of their
        exponentials over K is an unbiased estimate of p(x_n).

    Raises:
        ValueError: a site outside the plate ``"data"`` that the guide lacks, or that is observed.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_counts(num_particles=num_particles)
    check_flags(vectorize=vectorize)
    stacked = vectorize and num_particles > 1
    with evaluating(model, guide, batch, audit=audit, stacked=stacked) as rows:
        structure = pair_structure(model, guide, rows)
        views = TermViews.of(rows, structure).given_globals(structure)
        scores = score(model, guide, views, structure, num_particles, vectorize=vectorize)
        return move_result(scores.log_weights()[:, 0], rows, batch)


def _stack(each: list[Scores]) -> Scores:
    """Stack the scores of K passes of one particle each."""

    def cat(pick: Callable[[Scores], Tensor]) -> Tensor:
        return torch.cat([pick(s) for s in each])

    def reduce_in_pass(reduce: Callable[[Tensor], Tensor], k: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.nn.functional.pad(reduce(x), (0, 0, 0, 0, k, len(each) - 1 - k))

    draws = [s.draws for s in each if s.draws is not None]
    return Scores(
        {name: cat(lambda s, n=name: s.likelihood[n]) for name in each[0].likelihood},  # type: ignore[misc]
        lambda: cat(lambda s: s.log_prior),
        lambda: cat(lambda s: s.log_proposal),
        lambda _: torch.stack([s.kl() for s in each]).mean(0),
        [Path(p.value, reduce_in_pass(p.reduce, k), p.sources) for k, s in enumerate(each) for p in s.paths],
        each[0].factor,
        undifferentiated=each[0].undifferentiated,
        deterministic=each[0].deterministic,
        draws=StackedDraws(draws) if len(draws) == len(each) else None,
    )
