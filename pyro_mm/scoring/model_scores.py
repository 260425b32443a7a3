"""Log-densities of a pair's two runs, reduced to one number per particle, term and row."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..distributions.base import has_atoms
from .classes import split_by_class
from .draws import Draws
from .program_runs import check_given, enumerated_dims, run_model
from .reduction import LazyMapping, SiteReducer, average, eliminate, expect, sum_out
from .scores import Path, Scores
from .structure import PairStructure, lacks_derivative, observed_sites
from .term_pair import TermPair


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
        pair: a pair whose guide has run (:func:`~.program_runs.propose`).
        structure: its structure.
        unscaled: True refuses sites with a scale of their own.
        stand_ins: values of sites at which ``log_proposal`` is evaluated in the place of their own.
        draws: True keeps the values behind the scores.
        classes_of: a site that :func:`~.classes.classes_of_site` allows, by whose classes the joint density is split.

    Raises:
        ValueError: with ``unscaled``, a site with a scale of its own, whose likelihood would be no likelihood.
    """
    densities = _densities_of(pair, structure, unscaled)
    scores = Scores(
        densities.likelihood(),
        densities.log_prior,
        partial(densities.log_proposal_at, stand_ins or {}),
        densities.kl,
        densities.paths(stand_ins),
        densities.reducer.factor,
        undifferentiated=densities.undifferentiated,
        deterministic=tuple(name for name, site in densities.of_guide.items() if has_atoms(site["fn"])),
    )
    if draws:
        scores.draws = Draws(pair, densities.model_trace)
    if classes_of is not None:
        scores.log_joint_by_class = densities.log_joint_by_class(classes_of)
    return scores


def _densities_of(pair: TermPair, structure: PairStructure, unscaled: bool) -> _Densities:
    """Run the pair's model, and return the log-densities of its sites and of the guide's."""
    model_trace = run_model(pair, structure)
    check_given(pair, model_trace)
    latents = {**pair.row_latents(model_trace), **pair.row_latents()}
    enumerated = {name for name, site in latents.items() if "_enumerate_dim" in site["infer"]}
    kind = _SummedDensities if enumerated else _Densities
    return kind(pair, structure, model_trace, enumerated, unscaled)


class _Densities:
    """Log-densities of the sites of a pair, of which none is enumerated, and what the scores are made of.

    Args:
        pair: a pair whose guide has run.
        structure: its structure.
        model_trace: the trace of its model at the guide's draws.
        enumerated: latent sites that are summed out.
        unscaled: True refuses sites with a scale of their own.

    Attributes:
        of_guide, of_model: latent sites of the rows in each.
        of_both: those of the model that the guide draws, or that are enumerated.
        log_p: observed site -> log-probability.
        log_r, log_q: latent site -> log-density of the prior, and of the guide, on first use.
    """

    def __init__(
        self, pair: TermPair, structure: PairStructure, model_trace: Any, enumerated: set[str], unscaled: bool
    ):
        self.pair = pair
        self.structure = structure
        self.model_trace = model_trace
        self.enumerated = enumerated
        self.reducer = SiteReducer(pair, unscaled)

        self.of_guide = pair.row_latents()
        self.of_model = pair.row_latents(model_trace)
        drawn_or_enumerated = {*self.of_guide, *enumerated}
        self.of_both = {name: site for name, site in self.of_model.items() if name in drawn_or_enumerated}
        self.undifferentiated = self._undifferentiated()

        self.log_q = pair.log_q
        self.log_p = {name: self.reducer.log_prob(site) for name, site in observed_sites(model_trace).items()}
        self.log_r = LazyMapping({name: partial(self.reducer.log_prob, site) for name, site in self.of_both.items()})
        for site in self.of_model.values():
            self.reducer.scale(site)  # which may refuse it, and finds the factor

    def _undifferentiated(self) -> tuple[str, ...]:
        """Return the sites whose draws have no derivative; warn of those that only the model draws."""
        found = set(self.pair.without_derivative)
        for name in set(self.of_model) - set(self.of_both):
            warnings.warn(
                f"latent site {name!r} is in the model and not in the guide: it is drawn from its prior", stacklevel=6
            )
            if lacks_derivative(self.of_model[name]["fn"], self.of_model[name]["value"]):
                found.add(name)
        return tuple(sorted(found))

    def likelihood(self) -> dict[str, Tensor]:
        """Return log p(x | z) of each observed site, ``(K, T, N)``."""
        return {name: self.reducer.full(x) for name, x in self.log_p.items()}

    def log_prior(self) -> Tensor:
        """Return log r(z), ``(K, T, N)``; what only the model draws is left out, since it cancels with its proposal."""
        return self.reducer.total(self.log_r.values())

    def log_proposal(self, log_q: Mapping[str, Tensor], sites: Mapping[str, Any]) -> Tensor:
        """Return log q(z), ``(K, T, N)``.

        Args:
            log_q: latent site of the guide -> its log-density.
            sites: latent sites of the model, at the same values.
        """
        return self.reducer.total(log_q.values())

    def log_proposal_at(self, values: Mapping[str, Tensor]) -> Tensor:
        """Return log q(z) with other values of sites in the place of their own, ``(K, T, N)``."""
        if not values:
            return self.log_proposal(self.log_q, self.of_both)
        guide_sites = _with_values(self.of_guide, values)
        log_q = LazyMapping({name: partial(self.reducer.log_prob, site) for name, site in guide_sites.items()})
        return self.log_proposal(log_q, _with_values(self.of_both, values))

    def kl(self, scores: Scores) -> Tensor:
        """Return KL(q || r), ``(T, N)``: site by site in closed form where that is the KL of the whole.

        Args:
            scores: those of the pair, for the weights of strata.
        """
        dims = enumerated_dims(self.of_guide)
        summed_in_model = bool(self.enumerated - set(dims))
        by_site = self.structure.in_order and not summed_in_model

        if by_site:
            parts = [
                self.reducer.kl(name, site, self.of_model.get(name), self.log_q, self.log_r)
                for name, site in self.of_guide.items()
            ]
        elif dims:
            free_dim = min([self.pair.enum_dim + 1, *dims.values()]) - 1  # to the left of what the guide enumerates
            parts = [*self.log_q.values(), *(-x for x in eliminate(list(self.log_r.values()), free_dim))]
        else:
            ratio = self.log_proposal(self.log_q, self.of_both) - scores.log_prior
            return average(ratio, scores.log_component)

        classes = {dim: self.reducer.log_prob(self.of_guide[name], scaled=False) for name, dim in dims.items()}
        return average(self.reducer.total(expect(x, classes) for x in parts), scores.log_component)

    def paths(self, stand_ins: Mapping[str, Tensor] | None) -> list[Path]:
        """Return the latent values with a gradient, and with stand-ins the sources of each."""
        return [
            Path(site["value"], self.reducer.reducer(site), self._sources(name, stand_ins[name]) if stand_ins else [])
            for name, site in self.of_guide.items()
            if site["value"].requires_grad
        ]

    def _sources(self, name: str, stand_in: Tensor) -> list[Tensor]:
        """Return the tensors by which log q depends on the value of a site.

        They are the stand-in, at which the site's own density is evaluated, and the guide's draw, on which latents
        sampled after it depend. If the model's prior takes the guide's place in some terms, its draw is among them,
        too, unless its density is summed over classes: the run of the model at the guide's draws gives that density.
        """
        sources = [stand_in, self.pair.drawn[name]["value"]]
        if not self.enumerated and name in (self.pair.prior or {}):
            sources.append(self.pair.prior[name]["value"])  # type: ignore[index]
        return list({id(x): x for x in sources if x.requires_grad}.values())

    def log_joint_by_class(self, name: str) -> Tensor:
        """Return log p(x_B, z, y = c) for the classes of the site y, ``(C, K, T, N)``."""
        others = [x for site, x in self.log_r.items() if site != name]
        return split_by_class(self.of_model[name], [*others, *self.log_p.values()], self.reducer)


class _SummedDensities(_Densities):
    """Log-densities of a pair of which some sites are enumerated, and summed out of its scores.

    An enumerated site is summed out, whatever the guide's weights; sites that the guide draws given it go into the sum.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.inside = {
            name for name, x in self.log_q.items() if name in self.enumerated or x.dim() > -self.pair.enum_dim - 1
        }
        self.log_q_inside = [-self.log_q[name] for name in self.inside - self.enumerated]
        self.factors = [*self.log_r.values(), *self.log_q_inside]
        self.summed_prior = self._sum_out(self.factors)

    def _sum_out(self, factors: list[Tensor]) -> Tensor:
        return self.reducer.full(sum_out(factors, self.pair.enum_dim))

    def likelihood(self) -> dict[str, Tensor]:
        """Return the log of the joint density summed out, less that of the prior summed out."""
        return {"*": self._sum_out([*self.factors, *self.log_p.values()]) - self.summed_prior}

    def log_prior(self) -> Tensor:
        return self.summed_prior

    def log_proposal(self, log_q: Mapping[str, Tensor], sites: Mapping[str, Any]) -> Tensor:
        """Return log q of the sites that are not summed out; in terms that encode the prior, the prior's density.

        The prior draws latents given one class, and their density given that class alone would be a wrong one.
        """
        of_guide = self.reducer.total(log_q[name] for name in self.log_q if name not in self.inside)
        encoded = self.pair.views.encode_prior
        if encoded is False:
            return of_guide
        own_prior = self.pair.own_prior
        of_prior = self._sum_out(
            [self.reducer.log_prob(site | {"fn": own_prior[name]}) for name, site in sites.items()]
        )
        if not isinstance(encoded, Tensor):
            return of_prior
        return torch.where(encoded.reshape(-1, 1), of_prior, of_guide)

    def log_joint_by_class(self, name: str) -> Tensor:
        others = [x for site, x in self.log_r.items() if site != name]
        return split_by_class(self.of_model[name], [*others, *self.log_q_inside, *self.log_p.values()], self.reducer)


def _with_values(sites: Mapping[str, Any], values: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return sites with other values in the place of their own, where there are any."""
    return {name: site | {"value": values.get(name, site["value"])} for name, site in sites.items()}
