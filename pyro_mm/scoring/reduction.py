"""Reduction of the log-probabilities of a pair's sites to one number per particle, term and row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import kl_divergence

from ..distributions.base import base_distribution, has_atoms
from ..distributions.pushforward import find_pushforward
from .term_pair import TermPair


class LazyMapping(Mapping[str, Tensor]):
    """A mapping whose values are computed on first use."""

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]):
        self._makers = makers
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def average(x: Tensor, log_component: Tensor | None = None) -> Tensor:
    """Average over particles; in a stratified pass, over those of each component by its weight.

    Args:
        x: ``(K, T, N)``.
        log_component: log-weight of each particle's component, ``(K, T, N)``, or None.

    Returns:
        ``(T, N)``.
    """
    if log_component is None:
        return x[0] if len(x) == 1 else x.mean(0)
    weight = log_component.exp()
    return (x.masked_fill(log_component == -math.inf, 0.0) * weight).sum(0) / weight.sum(0)


def sum_out(factors: list[Tensor], enum_dim: int) -> Tensor:
    """Return the log of the product of factors, summed over all dimensions from ``enum_dim`` leftwards."""
    return sum(eliminate(factors, enum_dim), torch.zeros(()))


def eliminate(factors: list[Tensor], enum_dim: int) -> list[Tensor]:
    """Sum out all dimensions from ``enum_dim`` leftwards, by variable elimination.

    Args:
        factors: log-factors; a dimension is summed over the product of those that have it.
        enum_dim: the rightmost dimension to sum out, a negative number.

    Returns:
        Log-factors without these dimensions.
    """
    while any(x.dim() >= -enum_dim for x in factors):
        dim = -max(x.dim() for x in factors)
        those = [x for x in factors if x.dim() == -dim]
        factors = [x for x in factors if x.dim() < -dim]
        factors.append(sum(those[1:], those[0]).logsumexp(dim))
    return factors


def expect(x: Tensor, log_q: Mapping[int, Tensor]) -> Tensor:
    """Average over enumerated sites, by the guide's probabilities.

    Args:
        x: a value for every combination of the classes that it depends on.
        log_q: dimension of an enumerated site -> log-probability of its classes, given those of sites to its right.

    Returns:
        The mean, without these dimensions.
    """
    for dim in sorted(log_q):  # the leftmost site was sampled last
        if x.dim() >= -dim:
            x = (log_q[dim].exp() * x).sum(dim)
    return x


def refuse_atoms(site: dict[str, Any]) -> None:
    """Raise a ValueError if the density of a site is asked for, and its distribution has none."""
    if has_atoms(site["fn"]):
        raise ValueError(
            f"site {site['name']!r} is deterministic (a Delta) in some rows, and has no density there, which a KL, an "
            "importance weight, a likelihood and calibration need. Train it with kl=0 and a statistic of its draws, as "
            "in elbo(kl=0) + 10 * MMD(..), or as the constant left side of a penalty, "
            "Term(.., (), .., freeze_encoder=True)"
        )


def refuse_implicit(site: dict[str, Any]) -> None:
    """Raise a ValueError if the density of an implicit modality is asked for."""
    if find_pushforward(site["fn"]) is not None:
        name = site["name"]
        raise ValueError(
            f"modality {name!r} is implicit (conditionals.Implicit): its generator gives draws, and it has no density, "
            "which objectives, likelihoods, weights, comparisons and calibration need. Train it by a critic, "
            f"objective.with_critics({{{name!r}: mm.objectives.Critic(net)}}); for the other modalities alone, pass "
            f"batch.without({name!r})"
        )


def _density(site: dict[str, Any]) -> Tensor:
    """Return log p of a site's value. Raises a ValueError for a distribution without a density."""
    refuse_implicit(site)
    refuse_atoms(site)
    try:
        log_prob: Tensor = site["fn"].log_prob(site["value"])
        return log_prob
    except NotImplementedError as error:
        family = type(base_distribution(site["fn"])).__name__
        raise ValueError(
            f"site {site['name']!r}: {family} has no density here{f' ({error})' if str(error) else ''}, which "
            "objectives and likelihoods need: only draws can be made of it"
        ) from error


class SiteReducer:
    """Reduction of the log-probabilities of a pair's sites to ``(K, T, N)``."""

    def __init__(self, pair: TermPair, unscaled: bool = False):
        self.pair = pair
        self.unscaled = unscaled
        self.factor = 1.0
        self.size = pair.views.decode.size

    def log_prob(self, site: dict[str, Any], scaled: bool = True) -> Tensor:
        """Return a site's log-probability: masked, scaled but not by the data plate, summed over other plates."""
        ratio = self.pair.views.ratios.get(site["name"])
        scale = self.scale(site) if scaled else 1.0
        log_prob = _density(site) if ratio is None else ratio(site, self.pair)
        if "_enumerate_dim" not in site["infer"] or site["mask"] is None:
            return self.rows(scale_and_mask(log_prob, scale, site["mask"]), site)
        # a masked site is to weigh nothing, and it is summed over: its classes share a weight of one
        mask = torch.as_tensor(site["mask"], device=log_prob.device)
        share = -math.log(log_prob.shape[site["infer"]["_enumerate_dim"]])
        return self.rows(torch.where(mask, scale * log_prob, share), site)

    def scale(self, site: dict[str, Any]) -> Any:
        """Return the site's own scale, without that of a subsampled data plate, which is :attr:`factor`."""
        frames = {frame.name: frame for frame in site["cond_indep_stack"]}
        if "data" not in frames:
            raise ValueError(self._outside_text(site))
        data = frames["data"]
        scale = site["scale"]
        if data.full_size != data.size:
            self.factor = data.full_size / data.size
            scale = scale / self.factor
        if self.unscaled and not (isinstance(scale, float | int) and math.isclose(scale, 1.0)):
            raise ValueError(
                f"site {site['name']!r} is scaled by {scale}, so its log-probability is no log-likelihood: leave out "
                "poutine.scale here"
            )
        return scale

    def _outside_text(self, site: dict[str, Any]) -> str:
        """Return the reason why a site outside the plate ``"data"`` is refused."""
        text = f"site {site['name']!r} lies outside the plate 'data', so its log-probability is of no single row: "
        if self.pair.views.given_latents is None:
            return text + "put it in `with batch.plate():`, or train with pyro.infer.Trace_ELBO or TraceMeanField_ELBO"
        if site["is_observed"]:
            return text + "observe it in `with batch.plate():`"
        return (
            text + "an evaluation takes draws of such a latent from the guide, and the guide has none outside "
            f"the plate: give it pyro.sample({site['name']!r}, ..) before its `with batch.plate():`"
        )

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
        k = self.pair.num_particles
        t = self.pair.views.terms
        lead = ((k,) if self.pair.plated else ()) + ((t,) if t > 1 else ())
        return x.expand(*lead, *[1] * (self.pair.views.nesting - 1), self.size).reshape(k, t, self.size)

    def total(self, terms: Iterable[Tensor]) -> Tensor:
        terms = list(terms)
        return self.full(sum(terms[1:], terms[0]) if terms else torch.zeros((), device=self.pair.views.decode.device))

    def kl(
        self, name: str, q: dict[str, Any], r: dict[str, Any] | None, log_q: Mapping[str, Tensor], log_r: LazyMapping
    ) -> Tensor:
        if r is None:
            return log_q[name]
        if q["mask"] is False:  # private to a modality that nothing decodes
            return torch.zeros((), device=self.pair.views.decode.device)
        refuse_atoms(r)
        if not self.pair.views.freeze_encoder:  # else log q(z) is a constant, which is left out
            refuse_atoms(q)
        try:
            kl = kl_divergence(q["fn"], r["fn"])
        except NotImplementedError:
            if has_atoms(q["fn"]):
                return -log_r[name]
            _check_gradient(name, q, log_q[name])
            return log_q[name] - log_r[name]
        return self.rows(scale_and_mask(kl, self.scale(q), q["mask"]), q)

    def reducer(self, site: dict[str, Any]) -> Callable[[Tensor], Tensor]:
        event_dim = site["fn"].event_dim

        def reduce(x: Tensor) -> Tensor:
            return self.full(self.rows(x.flatten(x.dim() - event_dim).sum(-1) if event_dim else x, site))

        return reduce


def _check_gradient(name: str, site: dict[str, Any], log_q: Tensor) -> None:
    """Refuse to differentiate a KL by draws that have no derivative."""
    drawn = not site["fn"].has_rsample and "_enumerate_dim" not in site["infer"]
    if drawn and log_q.requires_grad:
        raise ValueError(
            f"the KL of guide site {name!r} has no closed form, and its draws have no derivative: "
            "enumerate the site, or give it a distribution with rsample"
        )
