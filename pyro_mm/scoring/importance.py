r"""Log importance weights of a (model, guide) pair, for one term of an objective or a stack of them in one pass.

Every bound and every evidence estimate here is a function of

.. math:: \log w_{kn} = \log p(x_{n,B} \mid z_{kn}) + \log r(z_{kn}) - \log q(z_{kn}), \qquad z_{kn} \sim q

with q the guide given the modalities A, and r the model's prior or the guide given the modalities C.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..distributions.base import has_atoms
from ..distributions.mixture import draw_from_stratum
from ..utils.arguments import check_counts, check_flags, check_programs
from .classes import split_by_class
from .draws import Draws, StackedDraws
from .evaluation import evaluating, move_result
from .reduction import LazyMapping, SiteReducer, average, eliminate, expect, sum_out
from .scores import Path, Scores
from .structure import (
    Callback,
    PairStructure,
    in_data_plate,
    lacks_derivative,
    latent_sites,
    observed_sites,
    pair_structure,
)
from .term_pair import TermPair, check_prior_gradient
from .views import TermViews


def score(
    model: Callback,
    guide: Callback,
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
    strata = _Strata(structure, views, num_particles) if stratify else None
    pair = TermPair(model, guide, views, num_particles if strata is None else strata.particles)
    propose(pair, structure, None if strata is None else partial(strata.draw, pair))
    with torch.set_grad_enabled(torch.is_grad_enabled() and not resample):
        stand_ins = _stand_ins(pair) if paths and torch.is_grad_enabled() else {}
        scores = score_model(pair, structure, stand_ins=stand_ins, draws=draws)
    log_component = None if strata is None else strata.log_weights(pair)
    scores.log_component = log_component
    if resample:
        rescore = partial(_rescore, pair, structure, log_component)
        scores.rescore = rescore
        first = torch.arange(0, pair.num_particles, num_particles, device=views.decode.device)  # of each component
        first = first[:, None, None].expand(-1, views.terms, views.decode.size)
        scores.kl = partial(_resampled_kl, scores.kl, lambda: rescore(first).kl())
    return scores


def no_rescoring_reason(structure: PairStructure, views: TermViews) -> str | None:
    """Return the reason why a particle that is scored twice would not be scored the same, or None."""
    if structure.random:
        return "networks draw random numbers, as dropout does in training mode, and would draw others"
    if structure.normalises:
        return "what depends on latents goes through batch normalisation in training mode, whose rows would be others"
    # what the prior was drawn given, in terms that encode it, is chosen with its draws
    drawing = [masks for t, masks in enumerate(views.decode.terms()) if t not in views.prior_terms]
    if structure.model_only and drawing:
        return f"latent {sorted(structure.model_only)[0]!r} is in the model only, and would be drawn anew"
    for name in sorted(structure.parents):
        if any(masks.get(name, False) is not True for masks in drawing):
            return f"modality {name!r} is the parent of another one and missing in some rows, and would be drawn anew"
    return None


def _resampled_kl(of_all: Callable[[], Tensor], of_some: Callable[[], Tensor]) -> Tensor:
    """Return the KL of all particles, with the gradient of that of some of them."""
    with torch.no_grad():
        value = of_all()
    if not torch.is_grad_enabled():
        return value
    some = of_some()
    return value + some - some.detach()


class _Strata:
    """Draws from each component of a guide's mixture in turn, and their log-weights."""

    def __init__(self, structure: PairStructure, views: TermViews, num_particles: int):
        if structure.strata is None:
            raise ValueError("stratified draws need a mixture posterior, and the guide has none")
        self.site = structure.strata.site
        self.components = structure.strata.components
        self.each = num_particles
        self.particles = num_particles * self.components
        self.device = views.encode.device
        self.log_weight: Tensor | None = None

    def draw(self, pair: TermPair, msg: dict[str, Any]) -> None:
        """Set the value of the mixture's site in its message; leave the messages of other sites alone."""
        if msg["name"] != self.site:
            return
        fn = msg["fn"]
        index = torch.arange(self.particles, device=self.device) // self.each
        index = index.reshape(-1, *[1] * (-pair.particle_dim - 1)) if pair.plated else index
        msg["value"], self.log_weight = draw_from_stratum(fn, index.expand(fn.batch_shape), self.components)
        msg["done"] = True

    def log_weights(self, pair: TermPair) -> Tensor:
        """The log-weight of each particle's stratum, ``(K, T, N)``."""
        shape = SiteReducer(pair)
        alike = -math.log(self.components)
        if self.log_weight is None:
            raise ValueError(
                f"stratified draws need the guide's mixture {self.site!r}, and it did not sample that site"
            )
        if self.log_weight.dim() >= -pair.enum_dim:
            raise ValueError(
                f"the mixture {self.site!r} is given an enumerated site, with which its weights would be summed out: "
                "use stratified=None, or sample the mixture first"
            )
        of_prior = pair.views.encode_prior
        if of_prior is False:
            return shape.full(self.log_weight)
        if of_prior is True:
            return shape.full(torch.full_like(self.log_weight, alike))
        return shape.full(torch.where(of_prior, alike, self.log_weight))


def _stand_ins(pair: TermPair) -> dict[str, Tensor]:
    """Return detached copies of the values of pathwise sites, leaves to differentiate log q with respect to."""
    sites = latent_sites(pair.trace)
    return {n: s["value"].detach().requires_grad_() for n, s in sites.items() if s["value"].requires_grad}


def _sources(pair: TermPair, name: str, stand_in: Tensor, summed: bool) -> list[Tensor]:
    """Return the tensors by which log q depends on the value of a site.

    They are the stand-in, at which the site's own density is evaluated, and the guide's draw, on which latents sampled
    after it depend. If the model's prior takes the guide's place in some terms, its draw is among them, too, unless its
    density is ``summed`` over classes: the run of the model at the guide's draws gives that density.
    """
    sources = [stand_in, pair.drawn[name]["value"]]
    if not summed and name in (pair.prior or {}):
        sources.append(pair.prior[name]["value"])  # type: ignore[index]
    return list({id(x): x for x in sources if x.requires_grad}.values())


def _rescore(pair: TermPair, structure: PairStructure, log_component: Tensor | None, index: Tensor) -> Scores:
    """Recompute the particles ``index``, ``(C, T, N)``, of a pair with gradients."""
    some = TermPair(pair.source_model, pair.source_guide, pair.views, len(index))
    terms = index.shape[1:2] if pair.views.terms > 1 else ()

    def take_chosen(value: Tensor, events: int) -> Tensor:
        if not pair.plated:
            return value
        dim = value.dim() - events + pair.particle_dim
        place = index.reshape(len(index), *terms, *[1] * (pair.views.nesting - 1), index.shape[-1], *[1] * events)
        shape = (*value.shape[:dim], len(index), *value.shape[dim + 1 :])
        value = value.gather(dim, place.expand(shape))
        return value if some.plated else value.squeeze(dim)

    def at_chosen(sites: Mapping[str, Any]) -> poutine.Trace:
        chosen = poutine.Trace()  # without the plates, whose sizes are other ones
        for name, site in sites.items():
            value = site["value"]
            chosen.add_node(name, **site | {"value": take_chosen(value, value.dim() - len(site["fn"].batch_shape))})
        return chosen

    chosen = at_chosen(latent_sites(pair.trace))
    if pair.views.encode_prior is not False:
        missing = {name: (take_chosen(x, events), events) for name, (x, events) in pair.missing_of_prior.items()}
        some.prior = some.draw_prior(at_chosen(pair.prior or {}), missing)
    with poutine.replay(trace=chosen):
        propose(some, structure)
    scores = score_model(some, structure)
    scores.log_component = None if log_component is None else log_component.gather(0, index)
    return scores


def propose(pair: TermPair, structure: PairStructure, draw: Callable[[dict[str, Any]], None] | None = None) -> None:
    """Run the pair's guide, and leave its trace and log q in the pair.

    Each pathwise value becomes a node of the autograd graph of its own.

    Args:
        pair: the pair.
        structure: its structure.
        draw: may give the messages of latent sites other values; None draws as the guide does.
    """
    pair.draw = draw
    with ExitStack() as stack:
        if structure.enumerates:
            stack.enter_context(poutine.enum(first_available_dim=pair.enum_dim))
        pair.guide()
    pair.draw = None  # so that a second run of the guide draws as it does
    if pair.prior and torch.is_grad_enabled():
        check_prior_gradient(pair.prior)
    trace = pair.trace.copy()
    pair.drawn = latent_sites(pair.trace)
    for name, site in pair.drawn.items():
        if site["value"].requires_grad:
            # a node that only the scores hang on: its gradient is theirs, not that of sites sampled after it
            trace.nodes[name] = site | {"value": site["value"].view_as(site["value"])}
    pair.trace = trace
    shape = SiteReducer(pair)

    def log_prob(site: dict[str, Any]) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not pair.views.freeze_encoder):
            return shape.log_prob(site)

    pair.log_q = LazyMapping({name: partial(log_prob, site) for name, site in pair.row_latents().items()})


def _with_values(sites: Mapping[str, Any], values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return sites with other values in the place of their own, where there are any."""
    return {name: site | {"value": values.get(name, site["value"])} for name, site in sites.items()}


def score_model(
    pair: TermPair,
    structure: PairStructure,
    unscaled: bool = False,
    stand_ins: Mapping[str, Tensor] | None = None,
    draws: bool = False,
    classes_of: str | None = None,
) -> Scores:
    """Run the pair's model against ``pair.trace``, and reduce the log-probabilities of both to scores.

    Args:
        pair: a pair whose guide has run (:func:`propose`).
        structure: its structure.
        unscaled: True refuses sites with a scale of their own.
        draws: True keeps the values behind the scores.
        stand_ins: values of sites at which ``log_proposal`` is evaluated in the place of their own.
        classes_of: a site that :func:`~.classes.classes_of_site` allows, by whose classes the joint density is split.

    Raises:
        ValueError: with ``unscaled``, a site with a scale of its own, whose likelihood would be no likelihood.
    """
    theirs = pair.row_latents()
    dims = _enumerated_dims(theirs)
    free_dim = min([pair.enum_dim + 1, *dims.values()]) - 1  # to the left of what the guide enumerates
    model_trace = run_model(pair, structure)
    shape = SiteReducer(pair, unscaled)
    ours = pair.row_latents(model_trace)
    _check_given(pair, model_trace)
    proposal = pair.log_q
    likelihood = {name: shape.log_prob(site) for name, site in observed_sites(model_trace).items()}
    enumerated = {name for name, site in {**ours, **theirs}.items() if "_enumerate_dim" in site["infer"]}
    undifferentiated = set(pair.without_derivative)
    for name in set(ours) - set(theirs) - enumerated:
        _warn_of_prior(name)  # drawn from its prior, so that proposal and prior cancel
        if lacks_derivative(ours[name]["fn"], ours[name]["value"]):
            undifferentiated.add(name)
    shared = {name: site for name, site in ours.items() if name in theirs or name in enumerated}
    prior = LazyMapping({name: partial(shape.log_prob, site) for name, site in shared.items()})
    for site in ours.values():
        shape.scale(site)  # which may refuse it, and finds the factor
    stand_ins = stand_ins or {}
    with_stand_ins = partial(_with_values, values=stand_ins)
    at_stand_ins = {n: partial(shape.log_prob, site) for n, site in with_stand_ins(theirs).items()}
    log_q = LazyMapping(at_stand_ins) if stand_ins else proposal
    inside: set[str] = set()
    if enumerated:
        # an enumerated site is summed out, whatever the guide's weights; sites drawn given it go into the sum
        inside = {n for n, x in proposal.items() if n in enumerated or x.dim() > -pair.enum_dim - 1}
        factors = [*prior.values(), *(-proposal[n] for n in inside - enumerated)]
        summed = shape.full(sum_out(factors, pair.enum_dim))
        joint = shape.full(sum_out([*factors, *likelihood.values()], pair.enum_dim))
        terms = {"*": joint - summed}
        outside = [n for n in proposal if n not in inside]

        def log_proposal(log_q: Mapping[str, Tensor], sites: Mapping[str, Any]) -> Tensor:
            return _or_prior(pair, shape, sites, shape.total(log_q[n] for n in outside))

        log_prior: Callable[[], Tensor] = lambda: summed  # noqa: E731
    else:
        terms = {name: shape.full(x) for name, x in likelihood.items()}
        log_prior = lambda: shape.total(prior.values())  # noqa: E731

        def log_proposal(log_q: Mapping[str, Tensor], sites: Mapping[str, Any]) -> Tensor:
            return shape.total(log_q.values())

    def kl() -> Tensor:
        summed_in_model = bool(enumerated - set(dims))
        if not dims and (summed_in_model or not structure.in_order):
            return average(log_proposal(proposal, shared) - scores.log_prior, scores.log_component)
        if summed_in_model or not structure.in_order:
            parts = [*proposal.values(), *(-x for x in eliminate(list(prior.values()), free_dim))]
        else:
            parts = [shape.kl(name, site, ours.get(name), proposal, prior) for name, site in theirs.items()]
        classes = {dim: shape.log_prob(theirs[name], scaled=False) for name, dim in dims.items()}
        return average(shape.total(expect(x, classes) for x in parts), scores.log_component)

    paths = [
        Path(s["value"], shape.reducer(s), _sources(pair, n, stand_ins[n], bool(enumerated)) if stand_ins else [])
        for n, s in theirs.items()
        if s["value"].requires_grad
    ]
    scores = Scores(terms, log_prior, lambda: log_proposal(log_q, with_stand_ins(shared)), kl, paths, shape.factor)
    scores.undifferentiated = tuple(sorted(undifferentiated))
    scores.deterministic = tuple(name for name, site in theirs.items() if has_atoms(site["fn"]))
    if draws:
        scores.draws = Draws(pair, model_trace)
    if classes_of is not None:
        rest = [x for name, x in prior.items() if name != classes_of]
        rest += [*(-proposal[n] for n in inside - enumerated), *likelihood.values()]
        scores.log_joint_by_class = split_by_class(ours[classes_of], rest, shape)
    return scores


def _check_given(pair: TermPair, model_trace: Any) -> None:
    """Raise a ValueError if a latent that is given lies in the plate of the rows in the model."""
    for name, site in latent_sites(model_trace).items():
        if name in (pair.views.given_latents or ()) and in_data_plate(site):
            raise ValueError(
                f"site {name!r} lies in the plate 'data' in the model and outside it in the guide: a latent is of each "
                "row in both, or of none in both"
            )


def run_model(pair: TermPair, structure: PairStructure) -> Any:
    """Run the pair's model against ``pair.trace``, with its discrete sites enumerated, and return its trace."""
    free_dim = min([pair.enum_dim + 1, *_enumerated_dims(latent_sites(pair.trace)).values()]) - 1
    with ExitStack() as stack:
        traced = stack.enter_context(poutine.trace())
        if structure.enumerates:
            stack.enter_context(poutine.enum(first_available_dim=free_dim))
        stack.enter_context(poutine.replay(trace=pair.trace))
        pair.model()
    return traced.trace


def _enumerated_dims(sites: Mapping[str, Any]) -> dict[str, int]:
    """Return the batch dimension, negative, of each enumerated site."""
    return {name: site["infer"]["_enumerate_dim"] for name, site in sites.items() if "_enumerate_dim" in site["infer"]}


def _or_prior(pair: TermPair, shape: SiteReducer, sites: Mapping[str, Any], log_q: Tensor) -> Tensor:
    """Return log q; in terms that encode the prior, the prior's log-density with enumerated sites summed out.

    The prior draws latents given one class, and their density given that class alone would be a wrong one.
    """
    if (encoded := pair.views.encode_prior) is False:
        return log_q
    factors = [shape.log_prob(site | {"fn": pair.own_prior[name]}) for name, site in sites.items()]
    log_p = shape.full(sum_out(factors, pair.enum_dim))
    return torch.where(encoded.reshape(-1, 1), log_p, log_q) if isinstance(encoded, Tensor) else log_p


def log_weights(
    model: Callback,
    guide: Callback,
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
        lambda: torch.stack([s.kl() for s in each]).mean(0),
        [Path(p.value, reduce_in_pass(p.reduce, k), p.sources) for k, s in enumerate(each) for p in s.paths],
        each[0].factor,
        undifferentiated=each[0].undifferentiated,
        deterministic=each[0].deterministic,
        draws=StackedDraws(draws) if len(draws) == len(each) else None,
    )


def _warn_of_prior(site: str) -> None:
    warnings.warn(
        f"latent site {site!r} is in the model and not in the guide: it is drawn from its prior", stacklevel=4
    )
