"""Collect the sites of a pair by one run of both programs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine

from ...batch.batch import Batch
from ...distributions.support import support_of
from ..program_errors import explained
from ..structure import is_factor, latent_sites, observed_sites
from .missing_reads import find_reads_of_missing
from .sites import Sites
from .value_reads import ValueReads
from .value_shapes import shape_mismatches


def collect_sites(model: Any, guide: Any, few: Batch, seen: Batch, hides: bool) -> Sites:
    """The sites of a pair, by a run of both; and by two more who reads values of what is missing."""
    heard: dict[str, ValueReads] = {name: ValueReads() for name in ("model", "guide")}
    devices = [few.device] if few.device.type == "cuda" else []
    of_guide = of_model = None
    programs = {name: f for name, f in (("model", model), ("guide", guide)) if f is not None}
    # the state of torch's generators as the caller has it: pyro.param may draw its first value here
    with torch.random.fork_rng(devices=devices):
        if guide is not None:
            with explained(programs, seen.size):
                of_guide = poutine.trace(guide).get_trace(heard["guide"].listening(seen))
        if model is not None:
            replayed = model if of_guide is None else poutine.replay(model, trace=of_guide)
            with explained(programs, few.size):
                of_model = poutine.trace(replayed).get_trace(heard["model"].listening(few))
    reads_missing: list[tuple[str, str]] = []
    if guide is not None:
        reads_missing = find_reads_of_missing(model, guide, few, seen, hides)
    return sites_of_traces(model, guide, few, of_model, of_guide, heard, reads_missing)


def sites_of_traces(
    model: Any,
    guide: Any,
    few: Batch,
    of_model: Any,
    of_guide: Any,
    heard: dict[str, ValueReads],
    reads_missing: Sequence[tuple[str, str]],
) -> Sites:
    theirs = {} if of_guide is None else latent_sites(of_guide)
    ours, seen = ({}, {}) if of_model is None else (latent_sites(of_model), observed_sites(of_model))
    sites = [*theirs.items(), *ours.items(), *seen.items()]
    auxiliary = {n for n, site in seen.items() if site["infer"].get("is_auxiliary", False)}
    marked = {n for n, site in theirs.items() if site["infer"].get("is_auxiliary", False)}
    enumerable = {n for n, s in ours.items() if n not in theirs and s["fn"].has_enumerate_support}
    summed = enumerable | {n for n, s in theirs.items() if s["infer"].get("enumerate") == "parallel"}
    named = [n for n in seen if n not in few and n not in auxiliary]
    unknown = [(who, n) for who, h in heard.items() for n in h.unknown if n not in few and n not in {**theirs, **ours}]
    both = of_model is not None and of_guide is not None
    return Sites(
        model=tuple(ours),
        guide=tuple(theirs),
        observed=tuple(seen),
        summed_out=tuple(n for n in ours if n in summed),
        from_prior=tuple(n for n in ours if n not in theirs and n not in enumerable) if both else (),
        guide_only=tuple(n for n in theirs if n not in ours and n not in marked) if both else (),
        outside=tuple(dict.fromkeys(n for n, s in sites if "data" not in {f.name for f in s["cond_indep_stack"]})),
        scaled=tuple(dict.fromkeys(n for n, s in sites if _scaled(s))),
        unobserved=tuple(n for n in few.names if n not in seen) if of_model is not None else (),
        unheld=tuple(n for n in seen if n not in few and n in auxiliary and not is_factor(seen[n])),
        unmasked=tuple(n for n in named if not is_factor(seen[n])),
        reads_missing=tuple(reads_missing),
        read=frozenset(heard["model"].read),
        unknown=tuple(unknown),
        unasked=tuple(n for n in few.names if n not in heard["guide"].asked) if of_guide is not None else (),
        swapped=both and not seen and any(n in few for n in observed_sites(of_guide)),
        misfits=tuple(shape_mismatches(seen, few)),
        supports={n: s for n, site in seen.items() if n in few and (s := support_of(site["fn"])) is not None},
    )


def _scaled(site: dict[str, Any]) -> bool:
    """Return True if a site has a scale besides that of a subsampled data plate."""
    frames = {frame.name: frame for frame in site["cond_indep_stack"]}
    own = frames["data"].full_size / frames["data"].size if "data" in frames else 1.0
    scale = site["scale"]
    return not (isinstance(scale, float | int) and math.isclose(scale, own))
