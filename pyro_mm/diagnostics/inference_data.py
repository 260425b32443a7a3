"""Conversion of draws, data and log-likelihoods of a trained pair to ArviZ's inference data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..evidence.evidence import Evidence
from ..sampling.predictive import SampleSettings, draw_samples
from ..sampling.resampling import Resampling
from ..scoring.evaluation import evaluating
from ..scoring.structure import pair_structure
from ..utils.arguments import check_counts, check_flags, check_programs, check_seed, describe
from ..utils.arviz import build_inference_data
from ..utils.seeding import temporary_seed

STATISTICS = ("standard_error", "ess", "pareto_k")  # attributes of Evidence, one number per row


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
    r"""Draw latents and modalities for each row, and return them with the data as ArviZ's inference data.

    Groups with draws have dimensions ``(chain=1, draw=S, row=N, *plates, *event)``:

    * ``posterior``: :math:`z \sim q(z | x_{present})` for each latent of the model; p(z) in a row with nothing present.
      The private latent of a missing modality is from p given the others. A latent that the guide lacks is drawn from
      its posterior given the others if it is discrete, else from p.
    * ``posterior_predictive``: :math:`x_m \sim p(x_m | z)` for each modality, missing or not, with the same z.
    * ``observed_data``: the values, ``(row, *event)``. Missing floats are NaN; a modality that no row has is left out.
    * ``constant_data``: the mask ``<modality>_present`` of each modality that some rows lack, and the covariates.
    * ``log_likelihood`` and ``sample_stats``: the log-likelihoods of ``evidence`` in nats, as one draw, since latents
      are integrated out; and their ``standard_error`` (nats), ``ess`` and ``pareto_k``.
    * ``prior`` and ``prior_predictive``: the same from the model alone, given its covariates.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        num_samples: S; memory holds S N values of each site and modality.
        resample: True resamples the latents of each row by their importance weights, as ``generate`` does.
        evidence: log-likelihoods of the same rows, or None.
        seed: of the draws; None uses torch's generator.
        prior: True draws from the prior as well.
        vectorize: False draws samples one by one, for stories that do not broadcast.
        audit: False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`).

    Returns:
        An ``InferenceData`` under ArviZ 0.x, a ``DataTree`` under 1.x.

    Raises:
        ValueError: an evidence of another number of rows, or fewer than one sample.
        TypeError: an evidence that is not an ``Evidence``.

    Example::

        data = mm.to_arviz(model, guide, test, evidence=mm.log_marginal(model, guide, test))
        arviz.summary(data, var_names=["z"])
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
    draws: dict[str, Mapping[str, Tensor]] = {}
    stacked = vectorize and (num_samples > 1 or resample)
    with (
        evaluating(model, guide, batch, audit=audit, stacked=stacked, draws=True) as rows,
        temporary_seed(seed, rows.device),
    ):
        settings = SampleSettings(num_samples, resampling=Resampling() if resample else None, vectorize=vectorize)
        of_all_rows = pair_structure(model, guide, rows).global_latents
        samples = draw_samples(model, guide, rows, settings)
        draws |= {"posterior": samples.model_latents, "posterior_predictive": samples.modalities}
        if prior:
            settings = SampleSettings(num_samples, vectorize=vectorize, prior=True)
            samples = draw_samples(model, guide, rows.only(), settings)
            draws |= {"prior": samples.model_latents, "prior_predictive": samples.modalities}

    groups: dict[str, dict[str, np.ndarray]] = {
        group: {name: _numpy(x)[None] for name, x in values.items()} for group, values in draws.items()
    }
    groups |= _data(batch)
    if evidence is not None:
        groups["log_likelihood"] = {evidence.quantity: _numpy(evidence.log_prob)[None, None]}
        groups["sample_stats"] = {name: _numpy(getattr(evidence, name))[None, None] for name in STATISTICS}
    return build_inference_data(
        {group: values for group, values in groups.items() if values},
        coords={"row": np.arange(batch.size)},
        dims=_dimensions(groups, of_all_rows),
    )


def _dimensions(groups: Mapping[str, Mapping[str, np.ndarray]], of_all_rows: frozenset[str]) -> dict[str, list[str]]:
    """Name the dimensions of each variable after chain and draw, which data do not have.

    Args:
        groups: group -> variable -> values.
        of_all_rows: variables that all rows share, which have no dimension of rows.
    """
    dims = {}
    for group, values in groups.items():
        leading = 0 if group.endswith("_data") else 2
        for name, x in values.items():
            own = x.ndim - leading - (name not in of_all_rows)
            dims[name] = ["row"] * (name not in of_all_rows) + [f"{name}_dim_{i}" for i in range(own)]
    return dims


def _data(batch: Batch) -> dict[str, dict[str, np.ndarray]]:
    """Return the observed values, and the masks and covariates, as groups of arrays."""
    values = {}
    constant = {name: _numpy(x) for name, x in batch.covariates.items()}
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
    """Return a tensor as an array, on the CPU and without gradient."""
    return x.detach().cpu().numpy()
