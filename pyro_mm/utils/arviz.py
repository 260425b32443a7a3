"""The one place that knows that ArviZ 0.x and 1.x build inference data, and compare models, differently."""

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
    """ArviZ's inference data from arrays of shape ``(chain, draw, ..)``, by group and variable.

    An ``InferenceData`` under ArviZ 0.x, a ``DataTree`` under 1.x; both give a group as ``data[group]``. Variables of
    ``observed_data`` and ``constant_data`` have neither chain nor draw. ``dims`` names the dimensions after these, the
    first ones at least, and ``coords`` are the coordinates of such a dimension.
    """
    with preserve_process_settings():
        import arviz as az  # here, because it takes seconds

    data = {group: dict(variables) for group, variables in groups.items()}
    options: dict[str, Any] = {} if dims is None else {"coords": dict(coords or {}), "dims": dict(dims)}
    return az.from_dict(data, **options) if _new(az) else az.from_dict(**data, **options)


def compare_log_likelihoods(
    log_prob: Mapping[str, np.ndarray],
    pareto_k: Mapping[str, np.ndarray],
    num_particles: Mapping[str, int],
    threshold: float,
    reference: str | None = None,
    **options: Any,
) -> Any:
    r"""ArviZ's comparison of models by their log-likelihoods of the same N rows, ``(N,)`` each, in nats.

    Stacking exponentiates them, which those of an image do not survive: rows are handed over less their best, which
    changes neither weights nor differences. ``elpd`` and ``se`` are those of the sum of what was given.

    Args:
        pareto_k: of each model and row; NaN is unknown.
        num_particles: the draws behind them.
        threshold: of ``pareto_k``.
        reference: the model that differences are to; ArviZ 0.x has no other than the best one.
        options: of ``arviz.compare``.
    """
    with preserve_process_settings():
        import arviz as az
        from xarray import DataArray

    if reference is not None and _new(az):
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
        candidates[name] = _elpd(az, fields)
    return az.compare(candidates, **options)


def _elpd(az: Any, fields: dict[str, Any]) -> Any:
    """The log-likelihoods as what ArviZ's ``loo`` returns, which is what its ``compare`` takes."""
    if _new(az):
        with preserve_process_settings():
            from arviz_stats import utils

        # older ones have one class for all kinds
        return utils.ELPDDataLOO(**fields) if hasattr(utils, "ELPDDataLOO") else utils.ELPDData(kind="loo", **fields)
    with preserve_process_settings():
        from arviz.stats.stats_utils import ELPDData

    names = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
    return ELPDData(data=[*fields.values()], index=[names.get(name, name) for name in fields])


def _new(az: Any) -> bool:
    return int(az.__version__.split(".")[0]) >= 1
