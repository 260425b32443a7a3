"""Compare two particles in one pass with the second one by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ...batch.batch import Batch
from ...batch.context import TermStack
from ...handlers.rewrite import EditSites
from ...utils.seeding import generator_state, temporary_seed
from ..structure import PairStructure, latent_sites, observed_sites, pair_structure
from ..term_pair import TermPair
from ..views import TermViews
from .densities import densities, run_program

TOLERANCE = 1e-3, 1e-5  # of a log-density in float32: absolute, and relative


LOW_PRECISION_TOLERANCE = 2e-2, 1e-3  # in half precision, and on accelerators, whose products may have ten bits


def stacking_problem(model: Any, guide: Any, few: Batch, seen: Batch) -> str:
    """Give the reason that densities differ with particles to the left of the rows; empty if they do not.

    Everything is shown that there are values of, since a modality that is hidden may be decoded for draws of it; and
    what is hidden stays so for a pair that cannot be run otherwise.
    """
    info: PairStructure = pair_structure(model, guide, seen)
    for shown in (few._copy(_masks={n: few.holds(n) for n in few.names}), few):
        try:
            return _compare_with_one_particle(model, guide, shown, info)
        except _NotComparable:
            continue
    return ""


class _NotComparable(Exception):
    """Rows on which particles cannot be told from rows."""


def _compare_with_one_particle(model: Any, guide: Any, shown: Batch, info: PairStructure) -> str:
    """Give the reason that two particles in one pass differ from the second by itself; empty if they do not.

    Raises:
        _Incomparable: the pair draws as it is scored, or cannot be run on these rows without particles either.
    """
    try:
        with temporary_seed(0, shown.device):
            pair, of_model = _run_two_particles(model, guide, shown, info)
    except Exception as error:
        try:
            of_guide = run_program(guide, shown, 0)
            densities(of_guide), densities(run_program(model, shown, 0, of_guide))
        except Exception as plain:
            raise _NotComparable from plain  # which it says by itself
        return (
            "the story or the guide fails with particles or terms to the left of the rows, a dimension that its "
            f"networks may take for that of rows: {error}. Pass vectorize=False, or write it for (.., N, *event)."
        )
    stacked = {**latent_sites(pair.trace), **latent_sites(of_model)}
    alone: dict[str, Tensor] = {}
    try:
        with temporary_seed(1, shown.device):
            state = generator_state(shown.device)
            traces = _run_second_particle(model, guide, shown, stacked)
            random = not torch.equal(state, generator_state(shown.device))
            for trace in traces:
                alone |= {
                    n: s["fn"].log_prob(s["value"]) for n, s in {**latent_sites(trace), **observed_sites(trace)}.items()
                }
            again = _run_second_particle(model, guide, shown, stacked)
    except Exception as error:
        raise _NotComparable from error
    if random:
        raise _NotComparable
    dim = pair.particle_dim
    sites = {**latent_sites(pair.trace), **latent_sites(of_model), **observed_sites(of_model)}
    for name, one in alone.items():
        if name not in sites:
            continue
        log_prob = sites[name]["fn"].log_prob(sites[name]["value"])
        second = log_prob.select(dim, 1) if log_prob.dim() >= -dim and log_prob.shape[dim] == 2 else log_prob
        fits = second.numel() == one.numel() and torch.allclose(
            second.reshape(one.shape), one, atol=_tolerance(one)[0], rtol=_tolerance(one)[1], equal_nan=True
        )
        if not fits and _is_deterministic(name, one, again):
            what = f"p({name} | ..)" if name in observed_sites(of_model) else f"the density of {name}"
            return (
                f"{name}: {what} of a particle is another one among particles than by itself, so a network takes "
                "particles, a dimension to the left of the rows, for rows (a LogSoftmax(dim=1), say, where dim=-1 is "
                "meant, or a BatchNorm1d). Pass vectorize=False, or write it for shapes (.., N, *event)."
            )
    return ""


def _run_two_particles(model: Any, guide: Any, shown: Batch, info: PairStructure) -> tuple[TermPair, Any]:
    view = shown.view({n: shown.presence(n) for n in shown.names}, TermStack({}), {})
    pair = TermPair(model, guide, TermViews(view, view, view, info.nesting, modalities=info.modalities), 2, plated=True)
    with poutine.block():
        pair.guide()
        with poutine.trace() as trace, poutine.replay(trace=pair.trace):
            pair.model()
    for site in observed_sites(trace.trace).values():
        site["fn"].log_prob(site["value"])
    return pair, trace.trace


def _run_second_particle(model: Any, guide: Any, shown: Batch, stacked: dict[str, dict[str, Any]]) -> list[Any]:
    """Traces of guide and model at the second particle's values."""
    second = {}
    for name, site in stacked.items():
        frame = next((f for f in site["cond_indep_stack"] if f.name == "particles"), None)
        value, event_dim = site["value"], site["fn"].event_dim
        if frame is not None and value.dim() - event_dim >= -frame.dim:
            place = frame.dim - event_dim
            value = value.select(place, 1) if value.shape[place] == 2 else value.select(place, 0)
        second[name] = value
    given = _fixed_latents(second)
    view = shown.view({n: shown.presence(n) for n in shown.names}, TermStack({}), None)  # what is missing is not drawn
    with poutine.block():
        with poutine.trace() as of_guide, given:
            guide(view)
        with poutine.trace() as of_model, given:
            model(view)
    return [of_guide.trace, of_model.trace]


def _fixed_latents(values: dict[str, Tensor]) -> EditSites:
    """Return a handler that gives latent sites values, in the shape of their distributions."""

    def fix(msg: dict[str, Any]) -> None:
        if msg["name"] not in values:
            return
        value = values[msg["name"]]
        shape = msg["fn"].shape()
        while value.dim() > len(shape) and value.shape[0] == 1:
            value = value[0]
        msg["value"], msg["done"] = value, True

    return EditSites(fix)


def _tolerance(x: Tensor) -> tuple[float, float]:
    rough = x.device.type != "cpu" or x.dtype in (torch.float16, torch.bfloat16)
    return LOW_PRECISION_TOLERANCE if rough else TOLERANCE


def _is_deterministic(name: str, one: Tensor, again: Sequence[Any]) -> bool:
    """Return True if a density is the same in a second run; else a generator that is not torch's draws in it."""
    for trace in again:
        if name in trace.nodes:
            site = trace.nodes[name]
            return torch.equal(site["fn"].log_prob(site["value"]), one)
    return False
