r"""Log importance weights of a (model, guide) pair, for one term of an objective or a stack of them in one pass.

Every bound and every evidence estimate here is a function of

.. math:: \log w_{kn} = \log p(x_{n,B} \mid z_{kn}) + \log r(z_{kn}) - \log q(z_{kn}), \qquad z_{kn} \sim q

with q the guide given the modalities A, and r the model's prior or the guide given the modalities C.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from .batch import Batch
from .distributions import Mixture
from .pairs import Callback, Pair, Rewrite, Structure, Views, latents, observed, structure


@dataclass
class Scores:
    """Log-probabilities of K particles, T terms and N rows; plates within a row are summed, enumerated sites too.

    ``likelihood[m]``, ``log_prior`` (log r) and ``log_proposal`` (log q) have shape ``(K, T, N)``. ``kl()`` is
    KL(q || r), ``(T, N)``, in closed form site by site where Pyro knows it. ``paths`` are the latent values as the
    scores saw them, each a node of its own in the autograd graph, with a function that reduces a tensor of its
    shape to ``(K, T, N)``. ``factor`` is the data plate's size over its subsample's. ``log_component`` is, in a
    stratified pass, the log-weight of the mixture component that each particle was drawn from.
    """

    likelihood: dict[str, Tensor]
    log_prior: Tensor
    log_proposal: Tensor
    kl: Callable[[], Tensor]
    paths: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = field(default_factory=list)
    factor: float = 1.0
    log_component: Tensor | None = None

    def log_weights(self) -> Tensor:
        """``log p(x_B | z) + log r(z) - log q(z)``, of shape ``(K, T, N)``."""
        return sum(self.likelihood.values(), self.log_prior) - self.log_proposal

    def take(self, terms: list[int]) -> Scores:
        """The scores of some of the terms."""

        def taken(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: reduce(x)[:, terms]

        return Scores(
            {name: x[:, terms] for name, x in self.likelihood.items()},
            self.log_prior[:, terms],
            self.log_proposal[:, terms],
            lambda: self.kl()[terms],
            [(value, taken(reduce)) for value, reduce in self.paths],
            self.factor,
            None if self.log_component is None else self.log_component[:, terms],
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
        frozen_terms = torch.zeros(self.log_prior.shape[1], 1, dtype=torch.bool, device=self.log_prior.device)
        frozen_terms[terms] = True
        for name, value in self.likelihood.items():
            if not value.requires_grad:
                continue
            values = [z for z, _ in self.paths]
            slopes = torch.autograd.grad(value[:, terms].sum(), values, retain_graph=True, allow_unused=True)
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
) -> Scores:
    """Runs the guide, and the model against it, for ``num_particles`` particles of every term.

    ``stratify`` draws ``num_particles`` from each component of a mixture posterior, component-major along K.
    ``vectorize=False`` runs particle by particle, for stories that do not broadcast. ``rescore`` runs a guide of
    several latents once more at the values drawn, for path derivatives of log q through a latent given another.

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
    scores = score_model(pair, info)
    scores.log_component = log_component
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
    pair.log_q = {name: shape.log_prob(site) for name, site in latents(pair.trace).items()}


def score_model(pair: Pair, info: Structure, unscaled: bool = False) -> Scores:
    """Runs the pair's model against ``pair.trace`` and adds up what both say.

    Raises:
        ValueError: with ``unscaled``, a site with a scale of its own, whose likelihood would be no likelihood.
    """
    with ExitStack() as stack:
        traced = stack.enter_context(poutine.trace())
        if info.enumerates:
            stack.enter_context(poutine.enum(first_available_dim=pair.enum_dim))
        stack.enter_context(poutine.replay(trace=pair.trace))
        pair.model()
    shape, theirs, ours = Reduce(pair, unscaled), latents(pair.trace), latents(traced.trace)
    proposal = dict(pair.log_q)
    prior = {name: shape.log_prob(site) for name, site in ours.items()}
    likelihood = {name: shape.log_prob(site) for name, site in observed(traced.trace).items()}
    enumerated = {name for name, site in {**ours, **theirs}.items() if "_enumerate_dim" in site["infer"]}
    for name in set(ours) - set(theirs) - enumerated:
        _warn_of_prior(name)
        del prior[name]  # drawn from its prior, so that proposal and prior cancel
    if enumerated:
        # an enumerated site is summed out, whatever the guide's weights; sites drawn given it go into the sum
        inside = {n for n, x in proposal.items() if n in enumerated or x.dim() > -pair.enum_dim - 1}
        factors = [*prior.values(), *(-proposal[n] for n in inside - enumerated)]
        log_prior = shape.full(sum_out(factors, pair.enum_dim))
        joint = shape.full(sum_out([*factors, *likelihood.values()], pair.enum_dim))
        terms = {"*": joint - log_prior}
        log_proposal = shape.total(x for n, x in proposal.items() if n not in inside)
    else:
        terms = {name: shape.full(x) for name, x in likelihood.items()}
        log_prior, log_proposal = shape.total(prior.values()), shape.total(proposal.values())

    def kl() -> Tensor:
        if enumerated or not info.in_order:
            return (log_proposal - log_prior).mean(0)
        rows = (shape.kl(site, ours.get(name), proposal[name], prior.get(name)) for name, site in theirs.items())
        return shape.total(rows).mean(0)

    paths = [(s["value"], shape.reducer(s)) for s in theirs.values() if s["value"].requires_grad]
    return Scores(terms, log_prior, log_proposal, kl, paths, shape.factor)


def log_weights(
    model: Callback, guide: Callback, batch: Batch, num_particles: int = 1, *, vectorize: bool = True
) -> Tensor:
    r"""Log importance weights of every row, ``log p(x_n, z_kn) - log q(z_kn | x_n)``, z from the guide.

    Args:
        model, guide: callables of a batch. Row-local enumerated sites are summed out; a latent that only the model
            has is drawn from its prior.
        batch: N rows; what is missing in a row is left out of it.
        num_particles: K.
        vectorize: False runs particle by particle, for stories that do not broadcast.

    Returns:
        ``(K, N)``, in nats, without the scale of a subsampled data plate; differentiable. The mean of their
        exponentials over K is an unbiased estimate of p(x_n).

    Raises:
        ValueError: a site outside the plate ``"data"``.
    """
    info = structure(model, guide, batch)
    scores = score(model, guide, Views.of(batch, info), info, num_particles, vectorize=vectorize)
    return scores.log_weights()[:, 0]


def sum_out(factors: list[Tensor], enum_dim: int) -> Tensor:
    """The log of the sum, over all dimensions from ``enum_dim`` leftwards, of the product of exponentiated factors.

    By variable elimination: a dimension at a time, over the factors that have it.
    """
    while any(x.dim() >= -enum_dim for x in factors):
        dim = -max(x.dim() for x in factors)
        those = [x for x in factors if x.dim() == -dim]
        factors = [x for x in factors if x.dim() < -dim]
        factors.append(sum(those[1:], those[0]).logsumexp(dim))
    return sum(factors, torch.zeros(()))  # type: ignore[return-value]


class Reduce:
    """Brings the log-probabilities of a pair's sites to ``(K, T, N)``."""

    def __init__(self, pair: Pair, unscaled: bool = False):
        self.pair, self.unscaled, self.factor = pair, unscaled, 1.0
        self.size = pair.views.decode.size

    def log_prob(self, site: dict[str, Any]) -> Tensor:
        """Masked, scaled by the site's own scale but not by the data plate's, summed over other plates."""
        scale, log_prob = self._scale(site), site["fn"].log_prob(site["value"])
        if "_enumerate_dim" not in site["infer"] or site["mask"] is None:
            return self.rows(scale_and_mask(log_prob, scale, site["mask"]), site)
        # a masked site is to weigh nothing, and it is summed over: its classes share a weight of one
        mask = torch.as_tensor(site["mask"], device=log_prob.device)
        share = -math.log(log_prob.shape[site["infer"]["_enumerate_dim"]])
        return self.rows(torch.where(mask, scale * log_prob, share), site)

    def _scale(self, site: dict[str, Any]) -> Any:
        frames = {frame.name: frame for frame in site["cond_indep_stack"]}
        if "data" not in frames:
            raise ValueError(
                f"site {site['name']!r} lies outside the plate 'data', so its log-probability is of no single row: "
                "put it in `with batch.plate():`, or train with pyro.infer.Trace_ELBO or TraceMeanField_ELBO"
            )
        data = frames["data"]
        scale = site["scale"]
        if data.full_size != data.size:
            self.factor = data.full_size / data.size
            scale = scale / self.factor
        if self.unscaled and not (isinstance(scale, float | int) and math.isclose(scale, 1.0)):
            raise ValueError(f"site {site['name']!r} is scaled by {scale}, so its log-probability is no log-likelihood")
        return scale

    def rows(self, x: Tensor, site: dict[str, Any]) -> Tensor:
        for frame in site["cond_indep_stack"]:
            if frame.vectorized and frame.name not in ("data", "terms", "particles"):
                if "_enumerate_dim" in site["infer"]:
                    raise ValueError(
                        f"site {site['name']!r} is enumerated inside the plate {frame.name!r}: only sites directly in "
                        "the plate 'data' can be summed out here; use a sequential plate, or pyro.infer.TraceEnum_ELBO"
                    )
                x = x.sum(frame.dim, keepdim=True) if x.dim() >= -frame.dim else x
        return x

    def full(self, x: Tensor) -> Tensor:
        k, t = self.pair.num_particles, self.pair.views.terms
        lead = ((k,) if self.pair.plated else ()) + ((t,) if t > 1 else ())
        return x.expand(*lead, *[1] * (self.pair.views.nesting - 1), self.size).reshape(k, t, self.size)

    def total(self, terms: Iterable[Tensor]) -> Tensor:
        terms = list(terms)
        return self.full(sum(terms[1:], terms[0]) if terms else torch.zeros((), device=self.pair.views.decode.device))

    def kl(self, q: dict[str, Any], r: dict[str, Any] | None, log_q: Tensor, log_r: Tensor | None) -> Tensor:
        if r is None or log_r is None:
            return log_q
        try:
            kl = kl_divergence(q["fn"], r["fn"])
        except NotImplementedError:
            return log_q - log_r
        return self.rows(scale_and_mask(kl, self._scale(q), q["mask"]), q)

    def reducer(self, site: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        event_dim = site["fn"].event_dim

        def reduce(x: Tensor) -> Tensor:
            return self.full(self.rows(x.flatten(x.dim() - event_dim).sum(-1) if event_dim else x, site))

        return reduce


def _stack(each: list[Scores]) -> Scores:
    """One ``Scores`` of K particles out of K of one particle."""

    def cat(pick: Callable[[Scores], Tensor]) -> Tensor:
        return torch.cat([pick(s) for s in each])

    def placed(reduce: Callable[[Tensor], Tensor], k: int) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.nn.functional.pad(reduce(x), (0, 0, 0, 0, k, len(each) - 1 - k))

    return Scores(
        {name: cat(lambda s, n=name: s.likelihood[n]) for name in each[0].likelihood},  # type: ignore[misc]
        cat(lambda s: s.log_prior),
        cat(lambda s: s.log_proposal),
        lambda: torch.stack([s.kl() for s in each]).mean(0),
        [(value, placed(reduce, k)) for k, s in enumerate(each) for value, reduce in s.paths],
        each[0].factor,
    )


def _warn_of_prior(site: str) -> None:
    warnings.warn(
        f"latent site {site!r} is in the model and not in the guide: it is drawn from its prior", stacklevel=4
    )
