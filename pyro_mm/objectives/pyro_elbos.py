"""Pyro's own ELBOs as estimators of a table: its terms become a (model, guide) pair, their weights site scales."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..batch.batch import Batch
from ..batch.masks import all_of
from ..handlers.elbos import traceable_form
from ..handlers.params import GRADIENT, announce_gradient
from ..scoring.structure import Callback, PairStructure
from ..scoring.term_pair import TermPair
from .expansion import ConcreteTerm, views


def stacks(estimator: ELBO) -> bool:
    """Whether one call can evaluate several weighted terms: it sums log-probabilities, and takes no logarithm."""
    return isinstance(estimator, Trace_ELBO | TraceGraph_ELBO)


def differentiable(estimator: ELBO) -> bool:
    """Whether it has a differentiable loss; if not, only ``loss_and_grads`` trains with it."""
    return not isinstance(estimator, TraceGraph_ELBO | RenyiELBO)


def check_penalty(estimator: ELBO, info: PairStructure) -> None:
    """Refuse the gradient of a penalty on several latents of which one is drawn without a derivative.

    Raises:
        ValueError: naming the site.
    """
    for site, kind in info.latents.items():
        if kind == "score" and len(info.latents) > 1 and torch.is_grad_enabled():
            raise ValueError(
                f"a term that decodes nothing is a KL, and under {type(estimator).__name__} that of what depends on "
                f"guide site {site!r} has no gradient with respect to its probabilities: give the site "
                'infer={"enumerate": "parallel"}, or take pyro.infer.Trace_ELBO or TraceGraph_ELBO'
            )


def loss(
    estimator: ELBO,
    model: Callback,
    guide: Callback,
    batch: Batch,
    rows: Sequence[ConcreteTerm],
    info: PairStructure,
    memo: Any,
    backward: bool,
    drawn: Mapping[str, float] | None = None,
) -> Any:
    """Minus the weighted sum of some terms: differentiable, or a number whose gradient was taken if ``backward``.

    Where modalities are ``drawn``, each with a scale, the others are not decoded.

    Raises:
        ValueError: a pairing that would be wrong (see :func:`pyro_mm.estimators.check_pairing`).
        TypeError: a differentiable loss of an estimator that has none.
    """
    name, weight = type(estimator).__name__, 1.0
    if isinstance(estimator, ReweightedWakeSleep | Trace_MMD | TraceTailAdaptive_ELBO):
        raise ValueError(f"{name} is no estimate of a term's value: use pyro_mm.estimators, or another pyro.infer.ELBO")
    if not stacks(estimator):
        (row,) = rows
        if isinstance(row.weight, Tensor):
            raise ValueError(
                f"{name} gives one number for all rows, and {row.label} weighs rows: use pyro_mm.estimators"
            )
        if not isinstance(row.likelihood, dict) and (outer := row.outer) is row.likelihood:
            weight, row.kl, row.likelihood = row.weight * outer, row.kl / outer, 1.0  # type: ignore[assignment]
            row.weight = 1.0
    if isinstance(estimator, RenyiELBO) and (weight != 1 or batch.total is not None):
        raise ValueError(
            "pyro.infer.RenyiELBO takes the scale of a subsampled plate, or a weight, into its logarithm, which is "
            "no bound: use pyro_mm.estimators.Renyi or IWAE"
        )
    if isinstance(estimator, TraceEnum_ELBO) and rows[0].encode_prior and any(info.model_only.values()):
        raise ValueError(
            f"{rows[0].label} encodes the prior, whose density is a sum over the class that only the model has, and "
            "pyro.infer.TraceEnum_ELBO takes that of the latents given one class: use AnalyticKL or IWAE of "
            "pyro_mm.estimators"
        )
    estimator = copy.copy(traceable_form(estimator))
    if not stacks(estimator) and rows[0].encode_prior:
        estimator.vectorize_particles = False  # Pyro's plate of particles is hidden from where the prior is drawn
    particles = estimator.num_particles if estimator.vectorize_particles else 1
    estimator.max_plate_nesting = info.nesting + (len(rows) > 1) + (particles > 1)
    if stacks(estimator) and particles > 1:
        # under our own plate, which everything that the pair runs can see: the sum of K terms weighing 1 / K each
        estimator.num_particles, estimator.vectorize_particles = 1, False
    else:
        particles = 1
    pair = TermPair(model, guide, views(rows, batch, info, {} if backward else memo, drawn), particles)
    scale = _Scale(rows, info.nesting, batch, 1 / particles)

    def weighted_model(*_: Any) -> None:
        with scale:
            pair.model()

    def weighted_guide(*_: Any) -> None:
        announce_gradient()
        with scale:
            pair.guide()

    # what is announced is for the estimator: SVI would make an optimiser for it
    with _frozen(model, [row.frozen for row in rows], name), poutine.block(hide=[GRADIENT]):
        if backward:
            return estimator.loss_and_grads(weighted_model, weighted_guide)
        if not torch.is_grad_enabled():
            return weight * estimator.loss(weighted_model, weighted_guide)
        if not differentiable(estimator):
            raise TypeError(f"{name} has no differentiable loss: use loss_and_grads, as SVI and pyro_mm.fit do")
        return weight * _differentiable_loss(estimator, weighted_model, weighted_guide)


def _differentiable_loss(estimator: ELBO, model: Callback, guide: Callback) -> Any:
    """The loss of a term, as a constant where there is nothing in it to differentiate."""
    try:
        return estimator.differentiable_loss(model, guide)
    except ValueError as error:
        if "cannot be differentiated" in str(error):  # frozen decoders, and a posterior without parameters
            return torch.as_tensor(estimator.loss(model, guide))
        if "share a common poutine.scale" in str(error):
            raise ValueError(
                f"{type(estimator).__name__} sums a class out of the product of what depends on it, and so takes one "
                "weight for all of that: give likelihood and KL the same weight, or use AnalyticKL or IWAE of "
                "pyro_mm.estimators"
            ) from error
        raise


@contextmanager
def _frozen(model: Callback, frozen: list[bool], name: str) -> Iterator[None]:
    """The model's parameters without gradient while the graph is built."""
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


class _Scale(Messenger):
    """Multiplies the scale of every site by its term's weight: ``likelihood`` for data, ``kl`` for latents."""

    def __init__(self, rows: Sequence[ConcreteTerm], nesting: int, batch: Batch, weight: float):
        super().__init__()
        self.rows, self.nesting, self.batch, self.weight = rows, nesting, batch, weight
        self._shares: list[float | Tensor] | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        within = any(frame.name == "data" for frame in msg["cond_indep_stack"])
        terms = [row.weight for row in self.rows] if within else self.shares
        # what weighs rows is float64, and the sites are of the data's type
        weights = [self.weight * w * self._site_weight(row, msg) for row, w in zip(self.rows, terms, strict=True)]
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

    @property
    def shares(self) -> list[float | Tensor]:
        """Weights of the terms for sites outside the data plate, computed on first use."""
        if self._shares is None:
            self._shares = [_share(row, self.batch) for row in self.rows]
        return self._shares

    def _site_weight(self, row: ConcreteTerm, msg: Any) -> float | Tensor:
        if not msg["is_observed"]:
            return row.kl
        return row.likelihood.get(msg["name"], 1.0) if isinstance(row.likelihood, dict) else row.likelihood


def _share(row: ConcreteTerm, batch: Batch) -> float | Tensor:
    """Weigh a term by its share in a mean, averaged over the rows for which there is one.

    A site outside the data plate is of no row, so that a mean over terms counts it once, whatever the rows have.
    """
    if not isinstance(row.weight, Tensor):
        return row.weight
    counts = all_of([batch.rows, row.counts])
    has_mean = torch.as_tensor(all_of([batch.rows, row.among > 0]), device=row.weight.device).expand_as(row.weight)
    return (row.weight * counts).sum() / has_mean.sum().clamp(min=1)
