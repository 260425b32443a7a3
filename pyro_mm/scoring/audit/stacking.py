"""Find networks that take particles, which stand to the left of the rows, for rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ...batch.batch import Batch
from ...batch.context import TermStack
from ...distributions.pushforward import find_pushforward
from ...handlers.rewrite import EditSites
from ...utils.seeding import generator_state, temporary_seed
from ..structure import PairStructure, latent_sites, observed_sites, pair_structure
from ..term_pair import TermPair
from ..views import TermViews
from .densities import densities, run_program

TOLERANCE = 1e-3, 1e-5  # of a log-density in float32: absolute, and relative
LOW_PRECISION_TOLERANCE = 2e-2, 1e-3  # in half precision, and on accelerators, whose products may have ten bits


def stacking_problem(model: Any, guide: Any, few_rows: Batch, guide_batch: Batch) -> str:
    """Return the reason why particles cannot stand to the left of the rows; empty if they can.

    Two particles are run in one pass, and the second one by itself: its densities are to be the same. Modalities that
    are missing, but have values, are shown, since a missing modality may be decoded for draws of it; if the pair
    cannot be run so, they are hidden.

    Args:
        model, guide: callables of a batch.
        few_rows: a few rows.
        guide_batch: the same rows as the guide sees them.
    """
    structure = pair_structure(model, guide, guide_batch)
    for shown in (few_rows._copy(_masks={name: few_rows.holds(name) for name in few_rows.names}), few_rows):
        try:
            return _compare_with_one_particle(model, guide, shown, structure)
        except _NotComparable:
            continue
    return ""


class _NotComparable(Exception):
    """A pair that cannot be run without particles either, or that draws random numbers in its densities."""


def _compare_with_one_particle(model: Any, guide: Any, shown: Batch, structure: PairStructure) -> str:
    """Return the reason why two particles in one pass differ from the second by itself; empty if they do not.

    Raises:
        _NotComparable: there is no result to compare with.
    """
    try:
        with temporary_seed(0, shown.device):
            pair, model_trace = _run_two_particles(model, guide, shown, structure)
    except Exception as error:
        _check_without_particles(model, guide, shown)
        return (
            "the story or the guide fails with particles or terms to the left of the rows, a dimension that its "
            f"networks may take for that of rows: {error}. Pass vectorize=False, or write it for (.., N, *event)."
        )
    latents = {**latent_sites(pair.trace), **latent_sites(model_trace)}
    observed = observed_sites(model_trace)
    alone, again = _densities_of_second_particle(model, guide, shown, latents)

    sites = {**latents, **observed}
    for name in (name for name in alone if name in sites):
        second = _second_particle(_log_prob(sites[name]), pair.particle_dim)
        # a density that differs in a second run too has random numbers of a generator that is not torch's
        if not _close(second, alone[name]) and name in again and torch.equal(alone[name], again[name]):
            what = f"p({name} | ..)" if name in observed else f"the density of {name}"
            return (
                f"{name}: {what} of a particle is another one among particles than by itself, so a network takes "
                "particles, a dimension to the left of the rows, for rows (a LogSoftmax(dim=1), say, where dim=-1 is "
                "meant, or a BatchNorm1d). Pass vectorize=False, or write it for shapes (.., N, *event)."
            )
    return ""


def _check_without_particles(model: Any, guide: Any, shown: Batch) -> None:
    """Raise :class:`_NotComparable` if a pair cannot be run on these rows without particles either."""
    try:
        guide_trace = run_program(guide, shown, 0)
        densities(guide_trace)
        densities(run_program(model, shown, 0, guide_trace))
    except Exception as error:
        raise _NotComparable from error


def _run_two_particles(model: Any, guide: Any, shown: Batch, structure: PairStructure) -> tuple[TermPair, Any]:
    """Run a pair with a plate of two particles; return it, with the guide's trace, and the model's trace."""
    view = shown.view({name: shown.presence(name) for name in shown.names}, TermStack({}), {})
    pair = TermPair(
        model, guide, TermViews(view, view, view, structure.nesting, modalities=structure.modalities), 2, plated=True
    )
    with poutine.block():
        pair.guide()
        with poutine.trace() as trace, poutine.replay(trace=pair.trace):
            pair.model()
    for site in observed_sites(trace.trace).values():
        if find_pushforward(site["fn"]) is None:
            _log_prob(site)  # errors of a density are those of a run
    return pair, trace.trace


def _densities_of_second_particle(
    model: Any, guide: Any, shown: Batch, latents: Mapping[str, dict[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return site -> log-density at the second particle's values, without particles, from each of two runs.

    Raises:
        _NotComparable: the pair cannot be run so, or draws random numbers.
    """
    values = {name: _value_of_second_particle(site) for name, site in latents.items()}
    try:
        with temporary_seed(1, shown.device):
            state = generator_state(shown.device)
            one = dict(_densities_at(model, guide, shown, values))
            random = not torch.equal(state, generator_state(shown.device))
            other = dict(_densities_at(model, guide, shown, values))
    except Exception as error:
        raise _NotComparable from error
    if random:
        raise _NotComparable
    return one, other


def _value_of_second_particle(site: Mapping[str, Any]) -> Tensor:
    """Return the second particle's value at a latent site; the value itself if it is shared by all particles."""
    value: Tensor = site["value"]
    event_dim: int = site["fn"].event_dim
    frame = next((f for f in site["cond_indep_stack"] if f.name == "particles"), None)
    if frame is None or value.dim() - event_dim < -frame.dim:
        return value
    dim = frame.dim - event_dim
    return value.select(dim, 1 if value.shape[dim] == 2 else 0)


def _densities_at(model: Any, guide: Any, shown: Batch, values: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield (site, log-density) of guide and model at values of the latents."""
    given = _fixed_latents(values)
    # None: what is missing is not drawn
    view = shown.view({name: shown.presence(name) for name in shown.names}, TermStack({}), None)
    with poutine.block():
        with poutine.trace() as in_guide, given:
            guide(view)
        with poutine.trace() as in_model, given:
            model(view)
    for trace in (in_guide.trace, in_model.trace):
        for name, site in {**latent_sites(trace), **observed_sites(trace)}.items():
            if find_pushforward(site["fn"]) is None:
                yield name, _log_prob(site)


def _fixed_latents(values: dict[str, Tensor]) -> EditSites:
    """Return a handler that gives latent sites values, in the shape of their distributions."""

    def fix(msg: dict[str, Any]) -> None:
        if msg["name"] not in values:
            return
        value = values[msg["name"]]
        shape = msg["fn"].shape()
        while value.dim() > len(shape) and value.shape[0] == 1:
            value = value[0]
        msg["value"] = value
        msg["done"] = True

    return EditSites(fix)


def _log_prob(site: Mapping[str, Any]) -> Tensor:
    log_prob: Tensor = site["fn"].log_prob(site["value"])
    return log_prob


def _second_particle(log_prob: Tensor, dim: int) -> Tensor:
    """Return the second entry of a dimension of particles; the tensor itself if it has none."""
    return log_prob.select(dim, 1) if log_prob.dim() >= -dim and log_prob.shape[dim] == 2 else log_prob


def _close(one: Tensor, other: Tensor) -> bool:
    """Return True if two log-densities have as many entries, and these are equal up to rounding."""
    if one.numel() != other.numel():
        return False
    low_precision = other.device.type != "cpu" or other.dtype in (torch.float16, torch.bfloat16)
    atol, rtol = LOW_PRECISION_TOLERANCE if low_precision else TOLERANCE
    return torch.allclose(one.reshape(other.shape), other, atol=atol, rtol=rtol, equal_nan=True)
