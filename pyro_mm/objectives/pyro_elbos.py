"""Pyro's own ELBOs as estimators of a table: its terms become a (model, guide) pair, their weights site scales."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from pyro import poutine
from pyro.infer import (
    ELBO,
    RenyiELBO,
    ReweightedWakeSleep,
    Trace_ELBO,
    Trace_MMD,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceTailAdaptive_ELBO,
)
from torch import Tensor

from ..batch.batch import Batch
from ..batch.masks import all_of
from ..handlers.elbos import traceable_form
from ..handlers.params import GRADIENT, announce_gradient
from ..handlers.rewrite import EditSites
from ..scoring.program import Program
from ..scoring.reduction import refuse_atoms
from ..scoring.structure import PairStructure, latent_sites
from ..scoring.term_pair import TermPair
from .concrete_terms import ConcreteTerm
from .evaluation import Evaluation, PassTotals, TermPass
from .stacked_views import stack_views


def stacks(estimator: ELBO) -> bool:
    """Return True if one call can evaluate several weighted terms: a sum of log-probabilities, without a logarithm."""
    return isinstance(estimator, Trace_ELBO | TraceGraph_ELBO)


def differentiable(estimator: ELBO) -> bool:
    """Return True if an estimator has a differentiable loss; if not, only ``loss_and_grads`` trains with it."""
    return not isinstance(estimator, TraceGraph_ELBO | RenyiELBO)


def check_penalty(estimator: ELBO, structure: PairStructure) -> None:
    """Refuse the gradient of a penalty on several latents if one of them is drawn without a derivative.

    Raises:
        ValueError: naming the site.
    """
    for site, kind in structure.latents.items():
        if kind == "score" and len(structure.latents) > 1 and torch.is_grad_enabled():
            raise ValueError(
                f"a term that decodes nothing is a KL, and {type(estimator).__name__} gives the KL of sites that "
                f"depend on guide site {site!r} no gradient with respect to the probabilities of {site!r}: give the "
                "site "
                'infer={"enumerate": "parallel"}, or take pyro.infer.Trace_ELBO or TraceGraph_ELBO'
            )


class PyroPass(TermPass):
    """Terms evaluated by one of Pyro's own estimators, which returns only their weighted sum."""

    def __init__(self, estimator: ELBO, terms: Sequence[ConcreteTerm]):
        self.estimator = estimator
        self.terms = terms
        self.name = type(estimator).__name__
        self._refuse_estimator()

    def evaluate(self, evaluation: Evaluation) -> PassTotals:
        """Return the weighted sum: differentiable, or a number if the estimator takes its gradient itself.

        Raises:
            ValueError: a pairing that would be wrong (see :func:`pyro_mm.estimators.check_pairing`).
            TypeError: a differentiable loss of an estimator that has none.
        """
        self._refuse_terms(evaluation)
        terms, weight = self._without_outer_weight()
        estimator, particles = self._adapt_estimator(evaluation)
        views = stack_views(terms, evaluation.batch, evaluation.structure, evaluation.fresh_cache(), evaluation.decoded)
        pair = TermPair(evaluation.model, evaluation.guide, views, particles)
        weights = _SiteWeights(terms, evaluation.structure.nesting, evaluation.batch, 1 / particles)
        scale = EditSites(weights.apply, weights.apply)

        def weighted_model(*_: Any) -> None:
            with scale:
                pair.model()
            self._refuse_deterministic(pair.given)

        def weighted_guide(*_: Any) -> None:
            announce_gradient()
            with scale:
                pair.guide()
            if any(term.kind.estimated or not term.frozen_encoder for term in terms):
                self._refuse_deterministic(latent_sites(pair.trace))

        # what is announced is for the estimator: SVI would make an optimiser for it
        with _frozen(evaluation.model, [term.frozen for term in terms], self.name), poutine.block(hide=[GRADIENT]):
            if evaluation.takes_gradient:
                loss = estimator.loss_and_grads(weighted_model, weighted_guide)
            elif not torch.is_grad_enabled():
                loss = weight * estimator.loss(weighted_model, weighted_guide)
            elif differentiable(estimator):
                loss = weight * _differentiable_loss(estimator, weighted_model, weighted_guide)
            else:
                raise TypeError(
                    f"{self.name} has no differentiable loss: use loss_and_grads, as SVI and pyro_mm.fit do"
                )
        return PassTotals([-loss], [terms[0].label] if len(terms) == 1 else [])

    def _refuse_estimator(self) -> None:
        if isinstance(self.estimator, ReweightedWakeSleep | Trace_MMD | TraceTailAdaptive_ELBO):
            raise ValueError(
                f"{self.name} is no estimate of a term's value: use pyro_mm.estimators, or another pyro.infer.ELBO"
            )

    def _refuse_deterministic(self, latents: Mapping[str, dict[str, Any]]) -> None:
        """Refuse latents without a density if some term has a KL."""
        if any(term.has_kl for term in self.terms):
            for site in latents.values():
                refuse_atoms(site)

    def _refuse_terms(self, evaluation: Evaluation) -> None:
        term = self.terms[0]
        enumerates = isinstance(self.estimator, TraceEnum_ELBO)
        if enumerates and term.encode_prior and any(evaluation.structure.model_only.values()):
            raise ValueError(
                f"{term.label} encodes the prior, whose density is a sum over a class that only the model has, and "
                "pyro.infer.TraceEnum_ELBO uses the density given one class: use AnalyticKL or IWAE of "
                "pyro_mm.estimators"
            )
        if isinstance(self.estimator, RenyiELBO):
            _, weight = self._without_outer_weight()
            if weight != 1 or evaluation.batch.total is not None:
                raise ValueError(
                    "pyro.infer.RenyiELBO takes the scale of a subsampled plate, or a weight, into its logarithm, "
                    "which is no bound: use pyro_mm.estimators.Renyi or IWAE"
                )

    def _without_outer_weight(self) -> tuple[Sequence[ConcreteTerm], Any]:
        """Return the terms, and a weight taken out of a single term whose estimator may take a logarithm."""
        if stacks(self.estimator):
            return self.terms, 1.0
        (term,) = self.terms
        if isinstance(term.share, Tensor):
            raise ValueError(
                f"{self.name} gives one number for all rows, and {term.label} weighs rows: use pyro_mm.estimators"
            )
        inner = replace(term, weight=1.0, share=1.0)
        outer: Any = 1.0
        if not isinstance(term.likelihood, dict) and term.outer is term.likelihood:
            outer = term.outer
            inner = replace(inner, kl=term.kl / outer, likelihood=1.0)
        return [inner], term.share * term.weight * outer

    def _adapt_estimator(self, evaluation: Evaluation) -> tuple[Any, int]:
        """Return a copy of the estimator for a pair of terms, and the particles that are drawn under our own plate."""
        estimator = copy.copy(traceable_form(self.estimator))
        if not stacks(estimator) and self.terms[0].encode_prior:
            estimator.vectorize_particles = False  # Pyro's plate of particles is hidden from where the prior is drawn
        particles = estimator.num_particles if estimator.vectorize_particles else 1
        estimator.max_plate_nesting = evaluation.structure.nesting + (len(self.terms) > 1) + (particles > 1)
        if not stacks(estimator) or particles == 1:
            return estimator, 1
        # under our own plate, which everything that the pair runs can see: the sum of K terms weighing 1 / K each
        estimator.num_particles = 1
        estimator.vectorize_particles = False
        return estimator, particles


def _differentiable_loss(estimator: ELBO, model: Program, guide: Program) -> Any:
    """Return the loss of a term, as a constant where there is nothing in it to differentiate."""
    try:
        return estimator.differentiable_loss(model, guide)
    except ValueError as error:
        if "cannot be differentiated" in str(error):  # frozen decoders, and a posterior without parameters
            return torch.as_tensor(estimator.loss(model, guide), device="cpu")
        if "share a common poutine.scale" in str(error):
            raise ValueError(
                f"{type(estimator).__name__} sums a class out of the joint density of all sites that depend on it, "
                "and so takes one weight for all of that: give likelihood and KL the same weight, or use AnalyticKL "
                "or IWAE of pyro_mm.estimators"
            ) from error
        raise


@contextmanager
def _frozen(model: Program, frozen: list[bool], name: str) -> Iterator[None]:
    """Hold the model's parameters fixed while the graph is built, if the terms freeze the decoders."""
    if any(frozen) and (not all(frozen) or not isinstance(model, torch.nn.Module)):
        raise ValueError(f"freeze_decoder with {name} needs a model that is an nn.Module")
    parameters = [p for p in model.parameters() if p.requires_grad] if any(frozen) else []  # type: ignore[attr-defined]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@dataclass
class _SiteWeights:
    """Weights of the sites of stacked terms: ``likelihood`` of data, ``kl`` of latents.

    Attributes:
        rows: the T terms.
        nesting: the number of batch dimensions to the right of the terms.
        batch: N rows.
        weight: a factor of all weights.
    """

    rows: Sequence[ConcreteTerm]
    nesting: int
    batch: Batch
    weight: float

    def apply(self, msg: dict[str, Any]) -> None:
        """Multiply the scale of a site by the weight of its term."""
        within = any(frame.name == "data" for frame in msg["cond_indep_stack"])
        terms = [row.share for row in self.rows] if within else self.shares
        # what weighs rows is float64, and the sites are of the data's type
        weights = [
            self.weight * share * row.weight * self._site_weight(row, msg)
            for row, share in zip(self.rows, terms, strict=True)
        ]
        if all(isinstance(w, float) for w in weights) and len(set(weights)) == 1:
            msg["scale"] = msg["scale"] * weights[0]
            return
        dtype = torch.get_default_dtype()
        full = [torch.as_tensor(w, dtype=dtype, device=self.batch.device) for w in weights]
        if len(full) == 1:
            msg["scale"] = msg["scale"] * full[0]
            return
        size = max(w.numel() for w in full)
        stacked = torch.stack([w.expand(size) for w in full])
        msg["scale"] = msg["scale"] * stacked.reshape(len(full), *[1] * (self.nesting - 1), size)

    @cached_property
    def shares(self) -> list[float | Tensor]:
        """Weights of the terms for sites outside the data plate, computed on first use."""
        return [_share(row, self.batch) for row in self.rows]

    def _site_weight(self, row: ConcreteTerm, msg: dict[str, Any]) -> float | Tensor:
        if not msg["is_observed"]:
            return row.kl
        return row.likelihood.get(msg["name"], 1.0) if isinstance(row.likelihood, dict) else row.likelihood


def _share(row: ConcreteTerm, batch: Batch) -> float | Tensor:
    """Weigh a term by its share in a mean, averaged over the rows for which there is one.

    A site outside the data plate belongs to no row, so that a mean over terms counts it once, whatever the rows have.
    """
    if not isinstance(row.share, Tensor):
        return row.share
    counts = all_of([batch.rows, row.counts])
    has_mean = torch.as_tensor(all_of([batch.rows, row.among > 0]), device=row.share.device).expand_as(row.share)
    return (row.share * counts).sum() / has_mean.sum().clamp(min=1)
