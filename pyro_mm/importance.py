r"""Log importance weights of a (model, guide) pair, for one term of an objective or a stack of them in one pass.

Every bound and every evidence estimate here is a function of

.. math:: \log w_{kn} = \log p(x_{n,B} \mid z_{kn}) + \log r(z_{kn}) - \log q(z_{kn}), \qquad z_{kn} \sim q

with q the guide given the modalities A, and r the model's prior or the guide given the modalities C.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from .batch import Batch
from .distributions import Mixture
from .evaluation import evaluating, returned
from .pairs import Callback, Pair, Rewrite, Structure, Views, latents, observed, structure
from .presence import Presence, constant
from .reduction import Lazy, Reduce, average, eliminate, expect, sum_out


@dataclass
class Scores:
    """Log-probabilities of K particles, T terms and N rows; plates within a row are summed, enumerated sites too.

    ``likelihood[m]``, ``log_prior`` (log r) and ``log_proposal`` (log q) have shape ``(K, T, N)``; the latter two are
    computed when they are first looked at, for a KL in closed form needs neither. ``kl()`` is KL(q || r), ``(T, N)``,
    in closed form site by site where Pyro knows it, and averaged over what the guide enumerates. ``paths`` are the
    latent values as the scores saw them, each a node of its own in the autograd graph, with a function that reduces a
    tensor of its shape to ``(K, T, N)``. ``factor`` is the data plate's size over its subsample's. ``log_component``
    is, in a stratified pass, the log-weight of the mixture component that each particle was drawn from.
    ``again(index)``, of scores that have no gradient, are those of the particles ``index``, ``(C, T, N)``, once more
    and with it.
    """

    likelihood: dict[str, Tensor]
    prior: Callable[[], Tensor]
    proposal: Callable[[], Tensor]
    kl: Callable[[], Tensor]
    paths: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = field(default_factory=list)
    factor: float = 1.0
    log_component: Tensor | None = None
    again: Callable[[Tensor], Scores] | None = None

    @cached_property
    def log_prior(self) -> Tensor:
        """log r(z)."""
        return self.prior()

    @cached_property
    def log_proposal(self) -> Tensor:
        """log q(z)."""
        return self.proposal()

    @property
    def like(self) -> Tensor:
        """One of the tensors of shape ``(K, T, N)``, for its shape and kind."""
        return next(iter(self.likelihood.values())) if self.likelihood else self.log_prior

    def log_weights(self) -> Tensor:
        """``log p(x_B | z) + log r(z) - log q(z)``, of shape ``(K, T, N)``."""
        return sum(self.likelihood.values(), self.log_prior) - self.log_proposal

    def take(self, terms: list[int]) -> Scores:
        """The scores of some of the terms."""

        def taken(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: reduce(x)[:, terms]

        return Scores(
            {name: x[:, terms] for name, x in self.likelihood.items()},
            lambda: self.log_prior[:, terms],
            lambda: self.log_proposal[:, terms],
            lambda: self.kl()[terms],
            [(value, taken(reduce)) for value, reduce in self.paths],
            self.factor,
            None if self.log_component is None else self.log_component[:, terms],
            None if self.again is None else lambda index: self._all_again(index, terms).take(terms),
        )

    def _all_again(self, index: Tensor, terms: list[int]) -> Scores:
        full = index.new_zeros(len(index), self.like.shape[1], index.shape[-1])
        full[:, terms] = index
        return self.again(full)  # type: ignore[misc]

    def share(self, carriers: list[int], decodes: Sequence[Mapping[str, Presence]]) -> None:
        """Gives every term t the likelihoods that term ``carriers[t]`` decoded, where t decodes them."""
        for name, value in self.likelihood.items():
            each = value.unbind(1)
            given = [(each[c], decode[name]) for c, decode in zip(carriers, decodes, strict=True)]
            zero = torch.zeros_like(each[0])
            self.likelihood[name] = torch.stack(
                [torch.where(m, x, zero) if isinstance(m, Tensor) else x if m else zero for x, m in given], 1
            )

    def freeze(self, terms: list[int]) -> None:
        """Stops the gradient of the likelihood of some terms at the decoders; it still reaches the latent values.

        By the first-order identity ``l(z) -> l(z0) + <dl/dz, z - z0>`` with l(z0) and dl/dz held constant, which
        asks nothing of the decoders and so serves a story of any form.
        """
        if terms and "*" in self.likelihood:
            raise ValueError(
                "freeze_decoder needs a likelihood apart from the prior, and an enumerated site mixes them"
            )
        if not terms or not torch.is_grad_enabled():
            return
        if (again := self.again) is not None:

            def frozen_again(index: Tensor) -> Scores:
                scores = again(index)
                scores.freeze(terms)
                return scores

            self.again = frozen_again
            return
        flags = tuple(t in terms for t in range(self.like.shape[1]))
        frozen_terms = constant(flags, torch.bool, self.like.device)[:, None]
        for name, value in self.likelihood.items():
            if not value.requires_grad:
                continue
            values = [z for z, _ in self.paths]
            total = value[:, terms].sum()
            # no value has a derivative where the guide is frozen too
            slopes = torch.autograd.grad(total, values, retain_graph=True, allow_unused=True) if values else ()
            frozen = value.detach()
            for slope, (z, reduce) in zip(slopes, self.paths, strict=True):
                if slope is not None:
                    frozen = frozen + reduce(slope * (z - z.detach()))
            self.likelihood[name] = torch.where(frozen_terms, frozen, value)


def score(
    model: Callback,
    guide: Callback,
    views: Views,
    info: Structure,
    num_particles: int = 1,
    *,
    vectorize: bool = True,
    stratify: bool = False,
    rescore: bool = False,
    resample: bool = False,
) -> Scores:
    """Runs the guide, and the model against it, for ``num_particles`` particles of every term.

    ``stratify`` draws ``num_particles`` from each component of a mixture posterior, component-major along K.
    ``vectorize=False`` runs particle by particle, for stories that do not broadcast. ``rescore`` runs a guide of
    several latents once more at the values drawn, for path derivatives of log q through a latent given another.
    ``resample`` scores without gradient, for who will choose among the particles.

    Raises:
        ValueError: a site outside the plate ``"data"``, whose weight is of no single row.
    """
    if not vectorize and not stratify and num_particles > 1:
        return _stack([score(model, guide, views, info, rescore=rescore) for _ in range(num_particles)])
    pair = Pair(model, guide, views, num_particles * (info.components if stratify else 1))
    log_component = None

    def each_component(msg: dict[str, Any]) -> None:
        nonlocal log_component
        fn = msg["fn"]
        if isinstance(fn, Mixture):
            index = torch.arange(pair.num_particles, device=fn.log_weights.device) // num_particles
            index = index.reshape(-1, *[1] * (-pair.particle_dim - 1)) if pair.plated else index
            msg["value"], msg["done"] = fn.component_rsample(index), True
            index = index.expand(fn.batch_shape)
            log_component = Reduce(pair).full(fn.log_weights.gather(-1, index[..., None])[..., 0])

    propose(pair, info, each_component if stratify else None, rescore)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not resample):
        scores = score_model(pair, info)
    scores.log_component = log_component
    if resample and torch.is_grad_enabled():
        again = partial(_again, pair, info, log_component)
        scores.again = again
        first = torch.arange(0, pair.num_particles, num_particles, device=views.decode.device)  # of each component
        first = first[:, None, None].expand(-1, views.terms, views.decode.size)
        scores.kl = lambda: again(first).kl()
    return scores


def _again(pair: Pair, info: Structure, log_component: Tensor | None, index: Tensor) -> Scores:
    """The scores of some of a pair's particles, ``index`` of shape ``(C, T, N)``, with their gradient."""
    some = Pair(pair._model, pair._guide, pair.views, len(index))
    terms = index.shape[1:2] if pair.views.terms > 1 else ()

    def taken(value: Tensor, events: int) -> Tensor:
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
            chosen.add_node(name, **site | {"value": taken(value, value.dim() - len(site["fn"].batch_shape))})
        return chosen

    chosen = at_chosen(latents(pair.trace))
    if pair.views.encode_prior is not False:
        missing = {name: (taken(x, events), events) for name, (x, events) in pair.missing_of_prior.items()}
        some.prior = some.draw_prior(at_chosen(pair.prior or {}), missing)
    with poutine.replay(trace=chosen):
        propose(some, info)
    scores = score_model(some, info)
    scores.log_component = None if log_component is None else log_component.gather(0, index)
    return scores


def propose(
    pair: Pair, info: Structure, draw: Callable[[dict[str, Any]], None] | None = None, rescore: bool = False
) -> None:
    """Runs the pair's guide; leaves its trace, each pathwise value a graph node of its own, and log q in the pair.

    ``draw`` may give the messages of latent sites values of its own.
    """
    with ExitStack() as stack:
        if info.enumerates:
            stack.enter_context(poutine.enum(first_available_dim=pair.enum_dim))
        if draw is not None:
            stack.enter_context(Rewrite(draw))
        pair.guide()
    if pair.prior and torch.is_grad_enabled():
        _check_prior_gradient(pair.prior)
    trace = pair.trace.copy()
    for name, site in latents(trace).items():
        if site["value"].requires_grad:
            # a node that only the scores hang on: its gradient is theirs, not that of sites sampled after it
            trace.nodes[name] = site | {"value": site["value"].view_as(site["value"])}
    pair.trace = trace
    if rescore and len(info.latents) > 1 and torch.is_grad_enabled():
        with poutine.replay(trace=trace):
            pair.guide()
    shape = Reduce(pair)
    pair.log_q = Lazy({name: partial(shape.log_prob, site) for name, site in latents(pair.trace).items()})


def _check_prior_gradient(prior: Mapping[str, Any]) -> None:
    """Refuses to differentiate the expectation under a prior with respect to what its discrete draws depend on."""
    for name, site in prior.items():
        if not site["fn"].has_rsample and site["fn"].log_prob(site["value"]).requires_grad:
            raise ValueError(
                f"a term that encodes PRIOR draws {name!r} from the model's prior, and that draw has no derivative "
                "with respect to what its probabilities depend on: freeze that with requires_grad_(False), or train "
                "without such a term"
            )


def score_model(pair: Pair, info: Structure, unscaled: bool = False) -> Scores:
    """Runs the pair's model against ``pair.trace`` and adds up what both say.

    Raises:
        ValueError: with ``unscaled``, a site with a scale of its own, whose likelihood would be no likelihood.
    """
    theirs = latents(pair.trace)
    dims = {name: site["infer"]["_enumerate_dim"] for name, site in theirs.items() if "_enumerate_dim" in site["infer"]}
    free_dim = min([pair.enum_dim + 1, *dims.values()]) - 1  # to the left of what the guide enumerates
    with ExitStack() as stack:
        traced = stack.enter_context(poutine.trace())
        if info.enumerates:
            stack.enter_context(poutine.enum(first_available_dim=free_dim))
        stack.enter_context(poutine.replay(trace=pair.trace))
        pair.model()
    shape, ours = Reduce(pair, unscaled), latents(traced.trace)
    proposal = pair.log_q
    likelihood = {name: shape.log_prob(site) for name, site in observed(traced.trace).items()}
    enumerated = {name for name, site in {**ours, **theirs}.items() if "_enumerate_dim" in site["infer"]}
    for name in set(ours) - set(theirs) - enumerated:
        _warn_of_prior(name)  # drawn from its prior, so that proposal and prior cancel
    shared = {name: site for name, site in ours.items() if name in theirs or name in enumerated}
    prior = Lazy({name: partial(shape.log_prob, site) for name, site in shared.items()})
    for site in ours.values():
        shape.scale(site)  # which may refuse it, and finds the factor
    if enumerated:
        # an enumerated site is summed out, whatever the guide's weights; sites drawn given it go into the sum
        inside = {n for n, x in proposal.items() if n in enumerated or x.dim() > -pair.enum_dim - 1}
        factors = [*prior.values(), *(-proposal[n] for n in inside - enumerated)]
        summed = shape.full(sum_out(factors, pair.enum_dim))
        joint = shape.full(sum_out([*factors, *likelihood.values()], pair.enum_dim))
        terms = {"*": joint - summed}
        outside = [x for n, x in proposal.items() if n not in inside]
        log_proposal: Callable[[], Tensor] = lambda: _or_prior(pair, shape, shared, shape.total(outside))  # noqa: E731
        log_prior: Callable[[], Tensor] = lambda: summed  # noqa: E731
    else:
        terms = {name: shape.full(x) for name, x in likelihood.items()}
        log_prior = lambda: shape.total(prior.values())  # noqa: E731
        log_proposal = lambda: shape.total(proposal.values())  # noqa: E731

    def kl() -> Tensor:
        summed_in_model = bool(enumerated - set(dims))
        if not dims and (summed_in_model or not info.in_order):
            return average(scores.log_proposal - scores.log_prior, scores.log_component)
        if summed_in_model or not info.in_order:
            parts = [*proposal.values(), *(-x for x in eliminate(list(prior.values()), free_dim))]
        else:
            parts = [shape.kl(name, site, ours.get(name), proposal, prior) for name, site in theirs.items()]
        log_q = {dim: shape.log_prob(theirs[name], scaled=False) for name, dim in dims.items()}
        return average(shape.total(expect(x, log_q) for x in parts), scores.log_component)

    paths = [(s["value"], shape.reducer(s)) for s in theirs.values() if s["value"].requires_grad]
    scores = Scores(terms, log_prior, log_proposal, kl, paths, shape.factor)
    return scores


def _or_prior(pair: Pair, shape: Reduce, sites: Mapping[str, Any], log_q: Tensor) -> Tensor:
    """The log-density of the prior, enumerated sites summed out, in the terms that encode it, and log q in the others.

    Not that of the latents given the one class which they were drawn given.
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
    r"""Log importance weights of every row, ``log p(x_n, z_kn) - log q(z_kn | x_n)``, z from the guide.

    Args:
        model, guide: callables of a batch. Row-local enumerated sites are summed out; a latent that only the model
            has is drawn from its prior.
        batch: N rows; what is missing in a row is left out of it.
        num_particles: K.
        vectorize: False runs particle by particle, for stories that do not broadcast.
        audit: False spares the audit of the pair on a few rows (:mod:`pyro_mm.audit`), and what it would refuse.

    Modules run in evaluation mode; a loss to train by is an :class:`~pyro_mm.objectives.Objective`'s.

    Returns:
        ``(K, N)``, in nats, without the scale of a subsampled data plate; differentiable. The mean of their
        exponentials over K is an unbiased estimate of p(x_n).

    Raises:
        ValueError: a site outside the plate ``"data"``.
    """
    with evaluating(model, guide, batch, audit=audit) as rows:
        info = structure(model, guide, rows)
        scores = score(model, guide, Views.of(rows, info), info, num_particles, vectorize=vectorize)
        return returned(scores.log_weights()[:, 0], rows, batch)


def _stack(each: list[Scores]) -> Scores:
    """One ``Scores`` of K particles out of K of one particle."""

    def cat(pick: Callable[[Scores], Tensor]) -> Tensor:
        return torch.cat([pick(s) for s in each])

    def placed(reduce: Callable[[Tensor], Tensor], k: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.nn.functional.pad(reduce(x), (0, 0, 0, 0, k, len(each) - 1 - k))

    return Scores(
        {name: cat(lambda s, n=name: s.likelihood[n]) for name in each[0].likelihood},  # type: ignore[misc]
        lambda: cat(lambda s: s.log_prior),
        lambda: cat(lambda s: s.log_proposal),
        lambda: torch.stack([s.kl() for s in each]).mean(0),
        [(value, placed(reduce, k)) for k, s in enumerate(each) for value, reduce in s.paths],
        each[0].factor,
    )


def _warn_of_prior(site: str) -> None:
    warnings.warn(
        f"latent site {site!r} is in the model and not in the guide: it is drawn from its prior", stacklevel=4
    )
