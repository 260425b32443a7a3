"""Terms whose likelihood of some modalities is a ratio of densities by critics, or one of features."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from ..batch.batch import Batch
from ..batch.masks import all_of, any_of
from ..distributions.pushforward import Pushforward, find_pushforward
from ..estimators import PerRow
from ..handlers.graph_tracing import is_tracing
from ..scoring.reduction import SiteReducer
from ..scoring.scores import Scores
from ..scoring.structure import PairStructure, latent_sites, private_modality
from .bounds import Target, is_linear
from .concrete_terms import ConcreteTerm
from .critics import Critic, Key, key_text, names_of
from .feature_likelihood import FeatureLikelihood
from .term_kinds import DENSITY, Density
from .terms import EACH, PRIOR, Symbol, Term


class RatioDensity(Density):
    """A density term of which critics give the likelihood of some modalities, up to a constant.

    Args:
        critics: modality, or modalities, -> critic, of those that the term decodes.
        label: of the term, by which critics have networks.
        features: modality -> likelihood of features in the place of its own, of those that the term decodes.
    """

    def __init__(self, critics: Mapping[Key, Critic], label: str, features: Mapping[str, FeatureLikelihood]):
        self.critics = dict(critics)
        self.label = label
        self.features = dict(features)
        self.of_kl = [key for key, critic in critics.items() if critic.form.replaces_kl]
        self.replaces_kl = bool(self.of_kl)

    @cached_property
    def ratios(self) -> Mapping[str, Callable[[Any, Any], Tensor]]:
        found: dict[str, Callable[[Any, Any], Tensor]] = {}
        for key, critic in self.critics.items():
            first, *others = names_of(key)
            found[first] = partial(self._log_ratio, key, critic)
            found |= {name: partial(_counted_with_another, name) for name in others}
        return found | {name: likelihood.log_density for name, likelihood in self.features.items()}

    def _log_ratio(self, key: Key, critic: Critic, site: Any, pair: Any) -> Tensor:
        """Return the logarithm of the ratio for the observed values, of the batch shape of a modality's distribution.

        Args:
            key: modalities of the critic, the first of which has the site.
            critic: the critic.
            site: the site.
            pair: the run.
        """
        names = names_of(key)
        d = implicit_distribution(names[0], site)
        conditions = d.parents
        if critic.form.replaces_kl:
            _refuse_scale(site, pair)
            conditions = latents_of(pair.trace)
        x = observed_values(pair.views.decode, names, conditions)
        ratio = critic.form.log_ratio(critic.logits(self.label, x, conditions, frozen=True))
        masks = [pair.views.decode.presence(name) for name in names]
        counts = any_of(masks)
        if not isinstance(counts, Tensor):
            return ratio
        if isinstance(complete := all_of(masks), Tensor) and complete is not counts:
            ratio = torch.where(complete, ratio, torch.full_like(ratio, math.nan))
        return torch.where(counts, ratio, torch.zeros_like(ratio))

    def check(self, term: ConcreteTerm, batch: Batch, structure: PairStructure) -> None:
        for key in self.critics:
            _check_together(term, names_of(key))
        if structure.enumerates and self.critics:
            everything = ", ".join(map(key_text, self.critics))
            raise ValueError(
                f"{term.label}: a critic of {everything} compares draws of all latents, and a discrete latent is "
                "summed out here: let the guide draw it (without config_enumerate), or give the modality a likelihood"
            )
        if self.replaces_kl:
            self._check_kl(term, structure)

    def _check_kl(self, term: ConcreteTerm, structure: PairStructure) -> None:
        """Raise a ValueError for a term whose KL no critic against the prior can stand for."""
        names = ", ".join(map(key_text, self.of_kl))
        if len(self.of_kl) > 1:
            every = tuple(name for key in self.of_kl for name in names_of(key))
            raise ValueError(
                f"{term.label}: critics of {names} against the prior would each count the KL of the term: give them "
                f"one critic together, with_critics({{{every!r}: Critic(net, 'prior')}}), or let all but one "
                "stand against the posterior"
            )
        if term.encode_prior or not term.given_prior or all(mask is False for mask in term.encode.values()):
            raise ValueError(
                f"{term.label}: a critic of {names} against the prior stands for the KL from the guide to the prior, "
                "and the term has none: let it stand against the posterior"
            )
        if structure.chained:
            raise ValueError(
                f"{term.label}: in this story {', '.join(sorted(structure.parents))} is a parent of another modality, "
                f"and a critic of {names} against the prior knows latents alone: let it stand against the posterior"
            )
        judged = names_of(self.of_kl[0])
        for site in structure.latents:
            if (own := private_modality(site, structure.modalities)) is not None and own not in judged:
                raise ValueError(
                    f"{term.label}: a critic of {names} against the prior would count the KL of latent site {site!r}, "
                    f"which is private to {own!r}: let it stand against the posterior"
                )

    def values(self, terms: Sequence[ConcreteTerm], scores: Scores, estimator: PerRow) -> Sequence[Tensor]:
        if not self.replaces_kl:
            return super().values(terms, scores, estimator)
        (term,) = terms
        (key,) = self.of_kl
        for name in names_of(key):
            weight = likelihood_weight(term, name)
            if not _equal(weight, term.kl):
                raise ValueError(
                    f"{term.label}: a critic against the prior stands for likelihood and KL together, and they weigh "
                    f"{_number(weight)} and {_number(term.kl)}: give kl the weight of that likelihood, kl=likelihood"
                )
        # in rows without the modality no critic stands for the KL
        mask = term.decode[names_of(key)[0]]
        kl = torch.where(mask, 0.0, torch.ones((), device=mask.device) * term.kl) if isinstance(mask, Tensor) else 0.0
        rest = replace(term, kl=kl, has_kl=isinstance(mask, Tensor))
        return super().values([rest], scores, estimator)


def likelihood_weight(term: ConcreteTerm, name: str) -> float | Tensor:
    """Return the weight of a modality's likelihood inside of a term."""
    return term.likelihood.get(name, 1.0) if isinstance(term.likelihood, dict) else term.likelihood


def _counted_with_another(name: str, site: Any, pair: Any) -> Tensor:
    """Return zeros, for a modality whose likelihood counts with that of another one of its critic."""
    d = implicit_distribution(name, site)
    return d.parents.new_zeros(d.batch_shape)


def _check_together(term: ConcreteTerm, names: Sequence[str]) -> None:
    """Raise a ValueError if a term decodes one of the modalities of a critic, in some row, without the others."""
    masks = [term.decode.get(name, False) for name in names]
    if all(mask is masks[0] for mask in masks):
        return
    some, every = any_of(masks), all_of(masks)
    # the ratio of a compiled step, which reads no masks, is NaN where they differ
    if isinstance(some, Tensor) and isinstance(every, Tensor) and (is_tracing() or torch.equal(some, every)):
        return
    alone = [name for name, mask in zip(names, masks, strict=True) if mask is False] or names[1:]
    raise ValueError(
        f"{term.label} decodes {names[0] if names[0] not in alone else names[-1]!r} without {', '.join(alone)} in some "
        f"rows, and one critic judges {'+'.join(names)} together: take a table whose terms decode them together, such "
        "as elbo(), and rows that have all of them or none"
    )


def _refuse_scale(site: Any, pair: Any) -> None:
    """Raise a ValueError if a story scales a site whose ratio stands for the KL too."""
    scale = SiteReducer(pair).scale(site)
    chosen = pair.views.scale.get(site["name"], 1.0)  # of modalities that a subsampled objective decodes
    if isinstance(scale, Tensor) or not math.isclose(scale, chosen):
        raise ValueError(
            f"site {site['name']!r} is scaled by the story, and a critic against the prior stands for its KL too, "
            "which is not: leave out poutine.scale, and give terms weights, or let the critic stand against the "
            "posterior"
        )


def _equal(one: float | Tensor, other: float | Tensor) -> bool:
    """Return True if two weights are equal; those of a compiled step, which no program reads, are taken to be so."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return True  # the run before the step was compiled has compared them
    return one == other


def _number(weight: Any) -> str:
    return f"{float(weight):g}"


NO_FEATURES: Mapping[str, FeatureLikelihood] = {}


def assign_critics(
    terms: Sequence[ConcreteTerm],
    critics: Mapping[Key, Critic],
    features: Mapping[str, FeatureLikelihood] = NO_FEATURES,
) -> list[ConcreteTerm]:
    """Return concrete terms, those that decode a modality with a critic, or by features, as :class:`RatioDensity`."""
    return [_assign(term, critics, features) for term in terms]


def _assign(
    term: ConcreteTerm, critics: Mapping[Key, Critic], features: Mapping[str, FeatureLikelihood]
) -> ConcreteTerm:
    decoded = {name for name, mask in term.decode.items() if mask is not False}
    own = {key: critic for key, critic in critics.items() if not decoded.isdisjoint(names_of(key))}
    of_features = {name: features[name] for name in features if name in decoded}
    if term.kind is not DENSITY or not (own or of_features):
        return term
    return replace(term, kind=RatioDensity(own, term.label, of_features))


def check_ratio_estimator(terms: Sequence[ConcreteTerm], estimator: ELBO) -> None:
    """Raise a ValueError if an estimator cannot evaluate a term with critics, or with likelihoods of features."""
    for term in terms:
        if not isinstance(term.kind, RatioDensity):
            continue
        if not isinstance(estimator, PerRow):
            names = ", ".join([*map(key_text, term.kind.critics), *term.kind.features])
            stand = "critic stands" if term.kind.critics else "discriminator's layer stands"
            raise ValueError(
                f"{term.label}: {type(estimator).__name__} asks for a density of {names}, in the place of which a "
                f"{stand}: take one of pyro_mm.estimators, such as AnalyticKL()"
            )
        if term.kind.replaces_kl and not is_linear(estimator):
            raise ValueError(
                f"{term.label}: {estimator!r} weighs the draws of a row by its own posterior, and the ratio of a "
                "critic against the prior is of latents of all rows together: take AnalyticKL(), or a critic against "
                "the posterior"
            )


def implicit_distribution(name: str, site: Any) -> Pushforward:
    """Return the distribution of an implicit modality. Raises a ValueError for a modality with a density."""
    found = find_pushforward(site["fn"])
    if found is None:
        raise ValueError(
            f"modality {name!r} has a density in the story, and a critic besides: leave it out of with_critics, or "
            "decode it by conditionals.Implicit"
        )
    if found.keywords:
        raise ValueError(
            f"the generator of {name!r} asks for {' and '.join(found.keywords)} by keyword, which its critic is not "
            "shown, so that its ratio would be a mean over them: give covariates as a parent, "
            f"batch.observe({name!r}, implicit, z, batch.covariates[..]); a modality with lengths cannot have a critic"
        )
    return found


def latents_of(trace: Any) -> Tensor:
    """Return the latents of a guide's trace, flattened and behind each other, ``(.., N, F)``.

    Raises:
        ValueError: no latent has real draws.
    """
    parts = []
    for site in latent_sites(trace).values():
        value = site["value"]
        lead = value.shape[: value.dim() - site["fn"].event_dim]
        dtype = value.dtype if value.is_floating_point() else torch.get_default_dtype()
        parts.append(value.reshape(*lead, -1).to(dtype))
    if not parts:
        raise ValueError("a critic against the prior compares latents, and the guide has none")
    shape = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    return torch.cat([part.expand(*shape, -1) for part in parts], -1)


def observed_values(batch: Batch, names: Sequence[str], like: Tensor) -> Tensor:
    """Return the values of modalities, flattened and behind each other, ``(N, D)``, of the type of ``like``."""
    each = [batch[name].reshape(batch.size, -1).to(like.dtype) for name in names]
    return each[0] if len(each) == 1 else torch.cat(each, -1)


def target_by_critics(
    found: Target, table: Sequence[Term], critics: Mapping[Key, Critic], names: Sequence[str] | None = None
) -> Target:
    """Return the quantity that a table with critics estimates.

    Args:
        found: the quantity that it bounds if all modalities have densities.
        table: its terms.
        critics: modality, or modalities, -> critic.
        names: the batch's modalities; None if they are not known.
    """
    if not critics or found.kind == "surrogate":
        return found
    text = f"estimates, by critics: {found} + {_entropies(found, critics)}"
    for key, critic in critics.items():
        if not critic.form.replaces_kl:
            continue
        judged = ", ".join(names_of(key))
        if any(_hides_others(term, key, names) for term in table):
            text += f" + I_q(others; z | {judged}), a bias by which latents may hide the other modalities"
        elif dict(found.log_evidence) == {frozenset(names_of(key)): 1.0} and not found.conditional:
            text += f", which is - KL(q({judged}, z) || p({judged}, z)), without bias"
    return Target("estimate", text)


def _entropies(found: Target, critics: Mapping[Key, Critic]) -> str:
    """Return the entropies that a target has besides, in words; without their weights if sets are not known."""
    sets = [*found.log_evidence.items(), *((decode, weight) for (decode, _), weight in found.conditional.items())]
    if not sets:
        return f"entropies of {', '.join(map(key_text, critics))}"
    texts = []
    for key in critics:
        weight = sum(weight for names, weight in sets if set(names_of(key)) <= set(names))
        if weight:
            joint = ", ".join(names_of(key))
            texts.append(f"{'' if abs(weight - 1) < 1e-12 else f'{weight:.4g} '}H({joint})")
    return " + ".join(texts) or "0"


def _hides_others(term: Term, key: Key, names: Sequence[str] | None) -> bool:
    """Return True if a term may encode modalities that a critic against the prior does not judge.

    Args:
        term: a term of the table.
        key: modalities of the critic.
        names: the batch's modalities; None if they are not known.
    """
    judged = set(names_of(key))
    if term.encode is PRIOR or not (isinstance(term.decode, Symbol) or judged & set(term.decode)):
        return False
    if names is not None and set(names) <= judged:
        return False
    if isinstance(term.encode, Symbol):
        return not (term.encode is EACH and term.decode is EACH)
    return not set(term.encode) <= judged
