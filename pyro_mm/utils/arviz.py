"""Inference data and model comparison for ArviZ 0.x and 1.x alike: only this file knows how they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .global_state import preserve_process_settings


def build_inference_data(
    groups: Mapping[str, Mapping[str, Any]],
    *,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """Build ArviZ's inference data from arrays.

    Args:
        groups: group -> variable -> array ``(chain, draw, ..)``. Variables of ``observed_data`` and ``constant_data``
            have neither chain nor draw.
        coords: dimension -> its coordinates.
        dims: variable -> names of its dimensions after chain and draw, at least of the first ones.

    Returns:
        An ``InferenceData`` under ArviZ 0.x, a ``DataTree`` under 1.x. Both give a group as ``data[group]``.
    """
    with preserve_process_settings():
        import arviz as az  # here, because it takes seconds

    data = {group: dict(variables) for group, variables in groups.items()}
    options: dict[str, Any] = {} if dims is None else {"coords": dict(coords or {}), "dims": dict(dims)}
    return az.from_dict(data, **options) if _is_version_1(az) else az.from_dict(**data, **options)


def compare_log_likelihoods(
    log_prob: Mapping[str, np.ndarray],
    pareto_k: Mapping[str, np.ndarray],
    num_particles: Mapping[str, int],
    threshold: float,
    reference: str | None = None,
    **options: Any,
) -> Any:
    r"""Compare models by their log-likelihoods of the same rows, with ``arviz.compare``.

    Stacking exponentiates log-likelihoods, which underflow for images. So the best model's value is subtracted in each
    row first, which changes neither weights nor differences; ``elpd`` and ``se`` are computed from the rows as given.

    Args:
        log_prob: model -> log-likelihood per row ``(N,)``, in nats.
        pareto_k: model -> k-hat per row ``(N,)``; NaN if unknown.
        num_particles: model -> draws per row.
        threshold: k-hat above it makes ArviZ warn.
        reference: the model that differences are taken to; ignored by ArviZ 0.x, which takes the best one.
        options: keyword arguments of ``arviz.compare``.

    Returns:
        The data frame of ``arviz.compare``, a row per model.
    """
    with preserve_process_settings():
        import arviz as az
        from xarray import DataArray

    if reference is not None and _is_version_1(az):
        options["reference"] = reference
    best: Any = np.max([*log_prob.values()], axis=0)
    if str(options.get("method") or "stacking").lower() != "stacking":
        best = 0.0  # the Bayesian bootstrap takes its errors from what it is given

    candidates = {}
    for name, x in log_prob.items():
        k = pareto_k[name]
        fields: dict[str, Any] = {
            "elpd": float(x.sum()), "se": float(np.sqrt(len(x) * x.var())), "p": np.nan,
            "n_samples": num_particles[name], "n_data_points": len(x), "warning": bool((k > threshold).any()),
            "elpd_i": DataArray(x - best, dims="row"), "pareto_k": DataArray(k, dims="row"), "scale": "log",
            "good_k": threshold,
        }  # fmt: skip
        candidates[name] = _build_elpd(az, fields)
    return az.compare(candidates, **options)


def _build_elpd(az: Any, fields: dict[str, Any]) -> Any:
    """Build the object that ArviZ's ``loo`` returns and its ``compare`` takes."""
    if _is_version_1(az):
        with preserve_process_settings():
            from arviz_stats import utils

        # older ones have one class for all kinds
        return utils.ELPDDataLOO(**fields) if hasattr(utils, "ELPDDataLOO") else utils.ELPDData(kind="loo", **fields)

    with preserve_process_settings():
        from arviz.stats.stats_utils import ELPDData

    names = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
    return ELPDData(data=[*fields.values()], index=[names.get(name, name) for name in fields])


def _is_version_1(az: Any) -> bool:
    """Return True for ArviZ 1.0 and later."""
    return int(az.__version__.split(".")[0]) >= 1
