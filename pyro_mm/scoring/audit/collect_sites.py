"""Collect the sites of a pair from one run of guide and model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine

from ...batch.batch import Batch
from ...distributions.support import support_of
from ..program_errors import explain_errors
from ..structure import is_factor, latent_sites, observed_sites
from .missing_reads import Read, find_reads_of_missing
from .padding_reads import find_networks_that_read_ahead, find_reads_of_padding
from .sites import Sites
from .value_reads import ValueReads
from .value_shapes import shape_mismatches


def collect_sites(model: Any, guide: Any, few_rows: Batch, guide_batch: Batch, hides: bool) -> Sites:
    """Run guide and model once on a few rows, and return their sites and the mistakes in them.

    Args:
        model, guide: callables of a batch; None for one that is not run.
        few_rows: a few rows.
        guide_batch: the same rows as the guide sees them.
        hides: True to run the pair again with modalities hidden one by one.

    Raises:
        ValueError, TypeError: an error of a program, with the site, the network and the shapes that it comes from.
    """
    programs = {name: f for name, f in (("model", model), ("guide", guide)) if f is not None}
    reads = {name: ValueReads() for name in ("model", "guide")}
    guide_trace = model_trace = None
    devices = [few_rows.device] if few_rows.device.type == "cuda" else []
    # the generators are in the caller's state: pyro.param may draw its first value here
    with torch.random.fork_rng(devices=devices):
        if guide is not None:
            with explain_errors(programs, guide_batch.size):
                guide_trace = poutine.trace(guide).get_trace(reads["guide"].recording_batch(guide_batch))
        if model is not None:
            replayed = model if guide_trace is None else poutine.replay(model, trace=guide_trace)
            with explain_errors(programs, few_rows.size):
                model_trace = poutine.trace(replayed).get_trace(reads["model"].recording_batch(few_rows))
    reads_missing = [] if guide is None else find_reads_of_missing(model, guide, few_rows, guide_batch, hides)
    sites = sites_of_traces(few_rows, model_trace, guide_trace, reads, reads_missing)
    return replace(sites, reads_padding=tuple(find_reads_of_padding(model, guide, few_rows, guide_batch)))


def sites_of_traces(
    few_rows: Batch,
    model_trace: Any,
    guide_trace: Any,
    reads: Mapping[str, ValueReads],
    reads_missing: Sequence[Read] = (),
) -> Sites:
    """Return the sites of a pair from its traces.

    Args:
        few_rows: the rows that the programs ran on.
        model_trace, guide_trace: their traces; None for a program that was not run.
        reads: ``"model"`` and ``"guide"`` -> the values that it asked for.
        reads_missing: reads of missing values, found by further runs.
    """
    in_guide = {} if guide_trace is None else latent_sites(guide_trace)
    in_model = {} if model_trace is None else latent_sites(model_trace)
    observed = {} if model_trace is None else observed_sites(model_trace)
    both = model_trace is not None and guide_trace is not None

    model_only = [name for name in in_model if name not in in_guide]
    guide_only = [name for name, site in in_guide.items() if name not in in_model and not _is_auxiliary(site)]
    enumerated = {name for name, site in in_guide.items() if site["infer"].get("enumerate") == "parallel"}
    enumerated |= {name for name in model_only if in_model[name]["fn"].has_enumerate_support}
    unmasked = [name for name, site in observed.items() if name not in few_rows and not _is_auxiliary(site)]
    unheld = [name for name, site in observed.items() if name not in few_rows and _is_auxiliary(site)]
    asked = [(who, name) for who, of_program in reads.items() for name in of_program.unknown]
    sites = [*in_guide.items(), *in_model.items(), *observed.items()]

    return Sites(
        model=tuple(in_model),
        guide=tuple(in_guide),
        observed=tuple(observed),
        summed_out=tuple(name for name in in_model if name in enumerated),
        from_prior=tuple(name for name in model_only if name not in enumerated) if both else (),
        guide_only=tuple(guide_only) if both else (),
        outside=tuple(dict.fromkeys(name for name, site in sites if "data" not in _frames(site))),
        scaled=tuple(dict.fromkeys(name for name, site in sites if _is_scaled(site))),
        unobserved=() if model_trace is None else tuple(name for name in few_rows.names if name not in observed),
        unheld=tuple(name for name in unheld if not is_factor(observed[name])),
        unmasked=tuple(name for name in unmasked if not is_factor(observed[name])),
        reads_missing=tuple(reads_missing),
        read=frozenset(reads["model"].read),
        reads_ahead=tuple(find_networks_that_read_ahead(observed)),
        unknown=tuple((who, n) for who, n in asked if n not in few_rows and n not in in_guide and n not in in_model),
        unasked=() if guide_trace is None else tuple(n for n in few_rows.names if n not in reads["guide"].asked),
        swapped=both and not observed and any(name in few_rows for name in observed_sites(guide_trace)),
        misfits=tuple(shape_mismatches(observed, few_rows)),
        supports={n: s for n, site in observed.items() if n in few_rows and (s := support_of(site["fn"])) is not None},
    )


def _is_auxiliary(site: Mapping[str, Any]) -> bool:
    auxiliary: bool = site["infer"].get("is_auxiliary", False)
    return auxiliary


def _frames(site: Mapping[str, Any]) -> dict[str, Any]:
    """Return plate -> its frame, for the plates that a site is in."""
    return {frame.name: frame for frame in site["cond_indep_stack"]}


def _is_scaled(site: Mapping[str, Any]) -> bool:
    """Return True if a site has a scale besides that of a subsampled data plate."""
    frames = _frames(site)
    own = frames["data"].full_size / frames["data"].size if "data" in frames else 1.0
    scale = site["scale"]
    return not (isinstance(scale, float | int) and math.isclose(scale, own))
