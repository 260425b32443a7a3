"""The plan of an evaluation: a table and a batch become concrete terms, and these the passes that evaluate them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from pyro.infer import ELBO
from torch import Tensor

from ..batch.batch import Batch
from ..estimators import AnalyticKL, PerRow
from ..scoring.structure import PairStructure
from ..scoring.training_objective import plain_attributes
from . import pyro_elbos
from .concrete_terms import ConcreteTerm
from .critic_terms import NO_FEATURES, assign_critics, check_ratio_estimator
from .critics import Critic, Key
from .evaluation import PerRowPass, TermPass
from .expansion import expand
from .feature_likelihood import FeatureLikelihood
from .terms import Term, check_modalities

NO_CRITICS: Mapping[Key, Critic] = {}


def plan(
    table: Sequence[Term],
    estimator: ELBO,
    batch: Batch,
    structure: PairStructure,
    *,
    vectorize: bool = True,
    critics: Mapping[Key, Critic] = NO_CRITICS,
    features: Mapping[str, FeatureLikelihood] = NO_FEATURES,
) -> list[TermPass]:
    """Return the passes that evaluate a table on a batch, with all weights 1.

    Args:
        table: terms.
        estimator: evaluates the terms that are densities.
        batch: N rows.
        structure: structure of the pair on batches like this one.
        vectorize: False gives each term a pass of its own.
        critics: modality, or modalities, -> critic that stands for the likelihood.
        features: modality -> likelihood of features that stands for that of its values.

    Raises:
        ValueError: a model whose log joint has a factor that no term of the table counts; or an estimator that cannot
            evaluate one of the terms.
    """
    if structure.factors and not any(term.of_joint for term in table):
        raise ValueError(
            f"the model observes {sorted(structure.factors)[0]!r}, which is no modality of the batch. Only terms given "
            "PRIOR that decode something count such a site, and this table has none: take one that does (elbo, vaevae, "
            "masked), or leave the site out of the story"
        )
    terms = assign_critics(expand(table, batch, bool(structure.factors)), critics, features)
    check_ratio_estimator(terms, estimator)
    for term in terms:
        if term.frozen and not term.kind.as_pair:
            raise ValueError(f"{term.label}: freeze_decoder is of terms that are densities")
        term.kind.check(term, batch, structure)

    # Pyro's estimators freeze a model as a whole
    one_pass = isinstance(estimator, PerRow) or not any(term.frozen for term in terms)
    groups = [[term] for term in terms]
    if vectorize and one_pass:
        groups = _groups(terms, estimator, structure)
    # frozen encoders last, so that they find what the others have computed
    groups.sort(key=lambda group: group[0].frozen_encoder)
    return [_pass(group, estimator, structure) for group in groups]


class PlanCache:
    """Plans of one objective, used again as long as nothing that they depend on has changed.

    A plan depends on the rows themselves only if modalities are missing in some of them, or if random sets are drawn;
    such a plan is made anew for every batch.
    """

    MOST = 64

    def __init__(self) -> None:
        self._plans: dict[Hashable, tuple[tuple[object, ...], list[TermPass]]] = {}

    def get(
        self,
        table: Sequence[Term],
        estimator: ELBO,
        batch: Batch,
        structure: PairStructure,
        vectorize: bool,
        critics: Mapping[Key, Critic] = NO_CRITICS,
        features: Mapping[str, FeatureLikelihood] = NO_FEATURES,
    ) -> list[TermPass]:
        """Return the plan of these arguments, which are those of :func:`plan`."""
        presence = tuple([batch.presence(name) for name in batch.names])
        if any(isinstance(mask, Tensor) for mask in presence) or any(term.is_random for term in table):
            return self._make(table, estimator, batch, structure, vectorize, critics, features)
        owners = (table, estimator, structure, critics, features)
        key = (batch.names, presence, vectorize, plain_attributes(estimator), *map(id, owners))
        if key not in self._plans:
            if len(self._plans) >= self.MOST:
                self._plans.clear()
            # the owners are kept, so that no other objects get their identities
            made = self._make(table, estimator, batch, structure, vectorize, critics, features)
            self._plans[key] = owners, made
        return self._plans[key][1]

    @staticmethod
    def _make(
        table: Sequence[Term],
        estimator: ELBO,
        batch: Batch,
        structure: PairStructure,
        vectorize: bool,
        critics: Mapping[Key, Critic],
        features: Mapping[str, FeatureLikelihood],
    ) -> list[TermPass]:
        check_modalities(table, batch.names, structure.modalities)
        made = plan(table, estimator, batch, structure, vectorize=vectorize, critics=critics, features=features)
        return made if any(term.has_step_weights for term in table) else [each.with_weights(table) for each in made]


def _groups(terms: Sequence[ConcreteTerm], estimator: ELBO, structure: PairStructure) -> list[list[ConcreteTerm]]:
    """Return the terms by the pass that evaluates them: one for all, but for those that cannot share it."""
    apart: list[Callable[[ConcreteTerm], object]] = [lambda term: term.frozen_encoder]
    if any(term.kind.ratios for term in terms):
        apart.append(lambda term: id(term) if term.kind.ratios else None)
    if structure.deterministic:  # a pass in which a KL is computed has to have a density of all draws
        apart.append(lambda term: term.kind.as_pair and term.has_kl)
    if isinstance(estimator, PerRow):
        if estimator.resample:  # such a pass has no gradient for other kinds of term
            apart.append(lambda term: term.kind.estimated)
        if estimator.stratified is not None:  # its draws are not those of the guide, but of its components in turn
            apart.append(lambda term: term.kind.needs_draws)
    elif pyro_elbos.stacks(estimator):
        apart.append(lambda term: term.kind.as_pair)
    else:
        apart.append(id)
    if "enumerated" in structure.latents.values():  # a site is drawn where the prior takes the guide's place
        apart.append(lambda term: term.encode_prior)
    groups: dict[tuple[object, ...], list[ConcreteTerm]] = {}
    for term in terms:
        groups.setdefault(tuple(is_so(term) for is_so in apart), []).append(term)
    return list(groups.values())


def _pass(terms: list[ConcreteTerm], estimator: ELBO, structure: PairStructure) -> TermPass:
    """Return the pass of terms that go together."""
    if isinstance(estimator, PerRow):
        estimated = any(term.kind.estimated for term in terms)
        return PerRowPass(estimator if estimated else _plain(estimator, terms), terms, structure)
    kind = terms[0].kind
    if kind.as_pair and (kind.estimated or pyro_elbos.stacks(estimator)):
        return pyro_elbos.PyroPass(estimator, terms)
    if kind.as_pair:
        pyro_elbos.check_penalty(estimator, structure)
    return PerRowPass(_plain(estimator, terms), terms, structure)


def _plain(estimator: ELBO, terms: Sequence[ConcreteTerm]) -> AnalyticKL:
    """Return an estimator for terms that the objective's own does not evaluate; it draws as many particles, if any."""
    if not any(term.kind.needs_draws for term in terms):
        return AnalyticKL()
    return AnalyticKL(estimator.num_particles, vectorize_particles=estimator.vectorize_particles)
