"""Draws, data and likelihoods of a trained pair as ArviZ's inference data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..evidence.evidence import Evidence
from ..sampling.predictive import SampleSettings, draw_samples
from ..sampling.resampling import Resampling
from ..scoring.evaluation import evaluating
from ..utils.arguments import check_counts, check_flags, check_programs, check_seed, describe
from ..utils.arviz import build_inference_data
from ..utils.seeding import temporary_seed

STATS = ("standard_error", "ess", "pareto_k")


@torch.no_grad()
def to_arviz(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    *,
    num_samples: int = 1000,
    resample: bool = False,
    evidence: Evidence | None = None,
    seed: int | None = None,
    prior: bool = False,
    vectorize: bool = True,
    audit: bool = True,
) -> Any:
    r"""Draws of latents and modalities for every row, beside the data: an ``InferenceData``, or a ``DataTree``.

    The groups, with dimensions ``(chain=1, draw=S, row=N, *plates, *event)`` where there are draws:

    * ``posterior``: :math:`z \sim q(z | x_{present})`, or p(z) in a row with nothing present, of every latent of the
      model; the private latent of a missing modality from p given the others. One that the guide lacks is drawn from
      its posterior given the others if it is discrete, else from p.
    * ``posterior_predictive``: :math:`x_m \sim p(x_m | z)` of every modality, missing or not, with these same z.
    * ``observed_data``: the values, ``(row, *event)``. Missing floats are NaN; what is wholly missing is left out.
    * ``constant_data``: ``<modality>_present`` for each that is not complete, which integers need, and covariates.
    * ``log_likelihood`` and ``sample_stats``: of ``evidence``, one draw of them (the latents are integrated out): the
      first in nats, the others its ``standard_error`` (nats), ``ess`` and ``pareto_k``.
    * ``prior`` and ``prior_predictive``: the same from the model alone, given its covariates.

    Args:
        num_samples: S; S N values of every site and modality are held in memory.
        resample: draws the latents of every row anew by their importance weights, as ``generate`` does.
        evidence: of these rows.
        seed: of the draws; None goes on with torch's generator.
        prior: whether to draw from the prior as well.
        vectorize: False draws sample by sample, for stories that do not broadcast.
        audit: False spares the audit of the pair (:mod:`pyro_mm.scoring.audit`), and what it would refuse.

    Raises:
        ValueError: an evidence of another number of rows, or fewer than one sample.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_counts(num_samples=num_samples)
    check_flags(resample=resample, prior=prior, vectorize=vectorize)
    check_seed(seed)
    if evidence is not None and not isinstance(evidence, Evidence):
        raise TypeError(f"expected evidence to be an Evidence or None, got {describe(evidence)}")
    if evidence is not None and len(evidence) != batch.size:
        raise ValueError(f"expected an evidence of the batch's {batch.size} rows, got one of {len(evidence)}")
    draws: dict[str, dict[str, Tensor]] = {}
    stacked = vectorize and (num_samples > 1 or resample)
    with (
        evaluating(model, guide, batch, audit=audit, stacked=stacked, draws=True) as rows,
        temporary_seed(seed, rows.device),
    ):
        resampling = Resampling() if resample else None
        settings = SampleSettings(num_samples, resampling=resampling, vectorize=vectorize)
        _, *found = draw_samples(model, guide, rows, settings)
        draws["posterior"], draws["posterior_predictive"] = found
        if prior:
            settings = SampleSettings(num_samples, vectorize=vectorize)
            _, *found = draw_samples(model, guide, rows.only(), settings)
            draws["prior"], draws["prior_predictive"] = found
    groups: dict[str, dict[str, np.ndarray]] = {
        group: {name: _numpy(x)[None] for name, x in of.items()} for group, of in draws.items()
    }
    groups |= _data(batch)
    if evidence is not None:
        groups["log_likelihood"] = {evidence.quantity: _numpy(evidence.log_prob)[None, None]}
        groups["sample_stats"] = {name: _numpy(getattr(evidence, name))[None, None] for name in STATS}
    sampled = [group for group in groups if not group.endswith("_data")]
    dims = {
        name: ["row", *(f"{name}_dim_{i}" for i in range(x.ndim - 1 - 2 * (group in sampled)))]
        for group, of in groups.items()
        for name, x in of.items()
    }
    return build_inference_data(
        {g: of for g, of in groups.items() if of}, coords={"row": np.arange(batch.size)}, dims=dims
    )


def _data(batch: Batch) -> dict[str, dict[str, np.ndarray]]:
    values, constant = {}, {name: _numpy(x) for name, x in batch.covariates.items()}
    for name in batch.names:
        mask = batch.presence(name)
        if mask is not True:
            constant[f"{name}_present"] = _numpy(batch.present[name])
        if mask is False or not batch.holds(name):
            continue
        x = batch[name]
        if isinstance(mask, Tensor) and x.is_floating_point():
            x = torch.where(mask.reshape(-1, *[1] * (x.dim() - 1)), x, torch.nan)
        values[name] = _numpy(x)
    return {"observed_data": values, "constant_data": constant}


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()
