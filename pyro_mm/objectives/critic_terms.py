"""Terms whose likelihood of some modalities is a ratio of densities that critics give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from pyro.infer import ELBO
from torch import Tensor

from ..batch.batch import Batch
from ..distributions.pushforward import Pushforward, find_pushforward
from ..estimators import PerRow
from ..scoring.scores import Scores
from ..scoring.structure import PairStructure, latent_sites, private_modality
from .bounds import Target, is_linear
from .concrete_terms import ConcreteTerm
from .critics import Critic
from .term_kinds import DENSITY, Density
from .terms import EACH, PRIOR, Symbol, Term


class RatioDensity(Density):
    """A density term of which critics give the likelihood of some modalities, up to a constant.

    Args:
        critics: modality -> critic, of those that the term decodes.
        label: of the term, by which critics have networks.
    """

    def __init__(self, critics: Mapping[str, Critic], label: str):
        self.critics = dict(critics)
        self.label = label
        self.of_kl = [name for name, critic in critics.items() if critic.form.replaces_kl]
        self.replaces_kl = bool(self.of_kl)

    @cached_property
    def ratios(self) -> Mapping[str, Callable[[Any, Any], Tensor]]:
        return {name: partial(self._log_ratio, name, critic) for name, critic in self.critics.items()}

    def _log_ratio(self, name: str, critic: Critic, site: Any, pair: Any) -> Tensor:
        """Return the logarithm of the ratio for a modality's observed values, of its distribution's batch shape."""
        d = implicit_distribution(name, site)
        conditions = latents_of(pair.trace) if critic.form.replaces_kl else d.parents
        logits = critic.logits(self.label, site["value"], conditions, d.event_dim, frozen=True)
        ratio = critic.form.log_ratio(logits)
        mask = pair.views.decode.presence(name)
        return torch.where(mask, ratio, torch.zeros_like(ratio)) if isinstance(mask, Tensor) else ratio

    def check(self, term: ConcreteTerm, batch: Batch, structure: PairStructure) -> None:
        if structure.enumerates:
            everything = ", ".join(map(repr, self.critics))
            raise ValueError(
                f"{term.label}: a critic of {everything} compares draws of all latents, and a latent is enumerated: "
                "let the guide draw it"
            )
        if not self.replaces_kl:
            return
        names = ", ".join(map(repr, self.of_kl))
        if len(self.of_kl) > 1:
            raise ValueError(
                f"{term.label}: critics of {names} against the prior would each count the KL of the term: let all but "
                "one stand against the posterior, or join the modalities into one"
            )
        if term.encode_prior or not term.given_prior or all(mask is False for mask in term.encode.values()):
            raise ValueError(
                f"{term.label}: a critic of {names} against the prior stands for the KL from the guide to the prior, "
                "and the term has none: let it stand against the posterior"
            )
        for site in structure.latents:
            if (own := private_modality(site, structure.modalities)) is not None and own not in self.of_kl:
                raise ValueError(
                    f"{term.label}: a critic of {names} against the prior would count the KL of latent site {site!r}, "
                    f"which is private to {own!r}: let it stand against the posterior"
                )

    def values(self, terms: Sequence[ConcreteTerm], scores: Scores, estimator: PerRow) -> Sequence[Tensor]:
        if not self.replaces_kl:
            return super().values(terms, scores, estimator)
        (term,) = terms
        weight = _weight_of(term, self.of_kl[0])
        if not _equal(weight, term.kl):
            raise ValueError(
                f"{term.label}: a critic against the prior stands for likelihood and KL together, and they weigh "
                f"{_number(weight)} and {_number(term.kl)}: give kl the weight of that likelihood, kl=likelihood"
            )
        return super().values([replace(term, kl=0.0, has_kl=False)], scores, estimator)


def _weight_of(term: ConcreteTerm, name: str) -> float | Tensor:
    return term.likelihood.get(name, 1.0) if isinstance(term.likelihood, dict) else term.likelihood


def _equal(one: float | Tensor, other: float | Tensor) -> bool:
    """Return True if two weights are equal; those of a compiled step, which no program reads, are taken to be so."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return True  # the run before the step was compiled has compared them
    return one == other


def _number(weight: Any) -> str:
    return f"{float(weight):g}"


def assign_critics(terms: Sequence[ConcreteTerm], critics: Mapping[str, Critic]) -> list[ConcreteTerm]:
    """Return concrete terms, those that decode a modality with a critic as :class:`RatioDensity`."""
    return [_assign(term, critics) for term in terms]


def _assign(term: ConcreteTerm, critics: Mapping[str, Critic]) -> ConcreteTerm:
    own = {name: critic for name, critic in critics.items() if term.decode.get(name, False) is not False}
    return replace(term, kind=RatioDensity(own, term.label)) if own and term.kind is DENSITY else term


def check_ratio_estimator(terms: Sequence[ConcreteTerm], estimator: ELBO) -> None:
    """Raise a ValueError if an estimator cannot evaluate a term with critics."""
    for term in terms:
        if not isinstance(term.kind, RatioDensity):
            continue
        if not isinstance(estimator, PerRow):
            raise ValueError(
                f"{term.label}: {type(estimator).__name__} asks for a density of {', '.join(term.kind.critics)}, in "
                "the place of which a critic stands: take one of pyro_mm.estimators, such as AnalyticKL()"
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


def target_by_critics(found: Target, table: Sequence[Term], critics: Mapping[str, Critic]) -> Target:
    """Return the quantity that a table with critics estimates.

    Args:
        found: the quantity that it bounds if all modalities have densities.
        table: its terms.
        critics: modality -> critic.
    """
    if not critics or found.kind == "surrogate":
        return found
    text = f"estimates, by critics: {found} + {_entropies(found, critics)}"
    for name, critic in critics.items():
        if critic.form.replaces_kl and any(_hides_others(term, name) for term in table):
            text += f" + I_q(others; z | {name}), a bias by which latents may hide the other modalities"
    return Target("estimate", text)


def _entropies(found: Target, critics: Mapping[str, Critic]) -> str:
    """Return the entropies that a target has besides, in words; without their weights if sets are not known."""
    sets = [*found.log_evidence.items(), *((decode, weight) for (decode, _), weight in found.conditional.items())]
    if not sets:
        return f"entropies of {', '.join(critics)}"
    texts = []
    for name in critics:
        weight = sum(weight for names, weight in sets if name in names)
        if weight:
            texts.append(f"{'' if abs(weight - 1) < 1e-12 else f'{weight:.4g} '}H({name})")
    return " + ".join(texts) or "0"


def _hides_others(term: Term, name: str) -> bool:
    """Return True if a term may encode other modalities than the one of a critic against the prior."""
    decodes = isinstance(term.decode, Symbol) or name in term.decode
    alone = term.encode == (name,) or (term.encode is EACH and term.decode is EACH)
    return decodes and term.encode is not PRIOR and not alone
