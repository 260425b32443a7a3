"""Properties of a (model, guide) pair that one run on two rows shows."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..batch.batch import Batch
from ..batch.context import TermStack
from ..batch.masks import Presence
from ..distributions.mixture import largest_mixture
from ..handlers.plates import sample_in_plates
from ..handlers.repeatability import BatchNormalisation, RandomNumbers, depends
from ..handlers.rewrite import EditSites
from ..utils.modules import buffers_kept
from .program_errors import explained
from .structure_cache import PairCache

Callback = Callable[..., Any]


@dataclass(frozen=True)
class PairStructure:
    """Properties of a pair that one run on two rows shows.

    ``nesting`` is the number of batch dimensions of its plates; ``latent_sites`` says of each guide site how it can be
    differentiated ("pathwise", "enumerated" or "score"); ``model_only`` maps each latent site that the guide lacks
    to whether it can be enumerated; ``strata`` is the guide's mixture whose components can be taken in turn, if any;
    ``in_order`` says that guide and model sample the sites that they share in one order; ``modalities`` are the
    model's observed sites; ``parents`` are those that the model uses, as parents of others; ``factors`` are those of
    the observed sites that are no modality of the batch, such as a ``pyro.factor``. ``random`` says that networks that
    run again draw random numbers, such as dropout; ``normalises`` that what depends on a latent goes through batch
    normalisation in training mode.
    """

    nesting: int
    latents: Mapping[str, str]
    model_only: Mapping[str, bool]
    strata: Strata | None
    in_order: bool
    modalities: frozenset[str]
    parents: frozenset[str] = frozenset()
    factors: frozenset[str] = frozenset()
    random: bool = False
    normalises: bool = False

    @property
    def chained(self) -> bool:
        """True if the model uses a modality as a parent of another one."""
        return bool(self.parents)

    @property
    def enumerates(self) -> bool:
        return "enumerated" in self.latents.values() or any(self.model_only.values())


@dataclass(frozen=True)
class Strata:
    """The mixture that a stratified pass draws from component by component: one latent site of a guide.

    ``varying`` says that its weights depend on a latent drawn before it, so that they differ between particles.
    """

    site: str
    components: int
    varying: bool


def pair_structure(model: Callback, guide: Callback, batch: Batch, stratified: bool = False) -> PairStructure:
    """Return the :class:`PairStructure` of a pair on batches like this one, from one run on two rows.

    It is cached while both live, per form of the batch (modalities held, present in all rows, in none or in some), and
    found again once a parameter was frozen or freed, a module replaced, or its mode changed.

    Args:
        stratified: whether to look for a mixture also in what the guide is where a modality is missing.
    """
    run = _structure_with_strata if stratified else _structure
    return _structures.get(model, guide, (stratified, *_form(batch)), lambda: batch[: min(2, batch.size)], run)


_structures = PairCache()


def _form(batch: Batch) -> tuple[Hashable, ...]:
    """Return all that may decide in Python what a story or a guide does with a batch: not its rows, nor values."""

    def where(presence: Presence) -> bool | str:
        return presence if isinstance(presence, bool) else "in some rows"

    modalities = [(n, where(batch.presence(n)), batch.holds(n)) for n in batch.names]
    values = [(batch[n].dtype, batch[n].shape[1:]) for n in batch.names if batch.holds(n)]
    others = [(n, x.dtype, x.shape[1:]) for n, x in [*batch.covariates.items(), *batch.lengths.items()]]
    return where(batch.rows), batch.device, torch.get_default_dtype(), *modalities, *values, *others


def _structure(model: Callback, guide: Callback, batch: Batch) -> PairStructure:
    devices = [batch.device] if batch.device.type == "cuda" else []
    # with gradients on: whether a distribution can be differentiated may depend on whether its parameters are
    no_inference, fork = torch.inference_mode(False), torch.random.fork_rng(devices=devices)
    used: set[str] = set()
    read: list[str] = []
    watch = _Watch(batch)
    batch = batch.with_context(on_use=used.add, on_lengths=lambda: read.append(""), draw_missing=watch.draw_missing)
    told = explained({"model": model, "guide": guide}, batch.size)
    with told, no_inference, torch.enable_grad(), fork, poutine.block(), buffers_kept(model, guide):
        guide_trace, in_guide = watch.run(guide, batch)
        model_trace, in_model = watch.run(model, batch, guide_trace)
        random = in_model or (in_guide and _draws_again(guide, batch))
        strata = _strata(latent_sites(guide_trace))
    if not read:
        batch.warn_unread_lengths()
    if weighed := [name for name, site in observed_sites(guide_trace).items() if _scores(site)]:
        raise ValueError(
            f"the guide has the observed site {weighed[0]!r}, a pyro.factor or a sample with obs=: its log-probability "
            "is of no latent, and no bound or likelihood counts it. Take it out of the guide, or put it into the model"
        )
    sites = [
        *latent_sites(guide_trace).values(),
        *latent_sites(model_trace).values(),
        *observed_sites(model_trace).values(),
    ]
    frames = [frame for site in sites for frame in site["cond_indep_stack"]]
    kinds = {}
    for name, site in latent_sites(guide_trace).items():
        enumerated = site["infer"].get("enumerate") == "parallel"
        kinds[name] = "enumerated" if enumerated else "pathwise" if site["fn"].has_rsample else "score"
    ours = latent_sites(model_trace)
    return PairStructure(
        nesting=max([1, *(-frame.dim for frame in frames if frame.vectorized)]),
        latents=kinds,
        model_only={n: bool(s["fn"].has_enumerate_support) for n, s in ours.items() if n not in kinds},
        strata=strata,
        in_order=[n for n in ours if n in kinds] == [n for n in kinds if n in ours],
        modalities=frozenset(observed_sites(model_trace)),
        parents=frozenset(used),
        factors=factor_sites(model_trace, batch),
        random=random,
        normalises=watch.normalisation.found,
    )


class _Watch:
    """Runs programs, draws their latents and missing modalities, and notes what their networks do besides."""

    def __init__(self, batch: Batch) -> None:
        self.random = RandomNumbers(batch.device)
        self.normalisation = BatchNormalisation()

    def run(self, program: Callback, batch: Batch, values: Any = None) -> tuple[Any, bool]:
        """Return the trace of a run, replayed against another one's, and whether its networks drew random numbers."""
        self.random.found()
        replayed = poutine.replay(trace=values or poutine.Trace())
        with self.normalisation, poutine.trace() as traced, replayed, EditSites(self.draw):
            program(batch)
        return traced.trace, self.random.found()

    def draw(self, msg: dict[str, Any]) -> None:
        """Draw a latent as a tensor with a gradient, so that what depends on it can be told."""
        if not msg["done"]:
            with self.random.paused():
                value = msg["fn"](*msg["args"], **msg["kwargs"])
            if value.is_floating_point() and not value.requires_grad:
                value = value.detach().requires_grad_()
            msg["value"], msg["done"] = value, True
        if msg["value"].requires_grad:
            self.normalisation.values.append(msg["value"])

    def draw_missing(self, name: str, d: Any, plates: tuple[int, ...]) -> Tensor:
        """Draw a missing modality."""
        with self.random.paused():
            return sample_in_plates(d, plates)


def _draws_again(guide: Callback, batch: Batch) -> bool:
    """Return whether a guide's networks draw random numbers when it runs a second time on what a step has cached."""
    view, watch = batch.view({n: batch.presence(n) for n in batch.names}, TermStack({}), {}), _Watch(batch)
    trace, _ = watch.run(guide, view)
    _, again = watch.run(guide, view, trace)
    return again


def _strata(sites: Mapping[str, dict[str, Any]]) -> Strata | None:
    """Find the first mixture among a guide's sites that has one draw per row, and no plate within it."""
    before: list[Tensor] = []
    for name, site in sites.items():
        inner = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != "data" and f.size > 1]
        mixture = largest_mixture(site["fn"])
        if mixture is not None and not inner:
            return Strata(name, mixture.num_components, depends(mixture.log_weights, before))
        if site["value"].requires_grad:
            before.append(site["value"])
    return None


def _structure_with_strata(model: Callback, guide: Callback, batch: Batch) -> PairStructure:
    """Look for a mixture that a guide has only where a modality is missing, as a joint encoder with experts has.

    Where it has none its draws are all of one stratum; a guide that cannot be run so is one that has no mixture.
    """
    found = _structure(model, guide, batch)
    shown = [name for name in batch.names if batch.presence(name) is not False]
    if found.strata is not None or len(shown) < 2:
        return found
    try:
        return replace(found, strata=_structure(model, guide, batch.without(shown[-1])).strata)
    except Exception:
        return found


def latent_sites(trace: Any) -> dict[str, dict[str, Any]]:
    """The unobserved sample sites of a trace, by name; the index sets of subsampled plates are left out."""
    return {n: s for n, s in _sites(trace) if not s["is_observed"]}


def observed_sites(trace: Any) -> dict[str, dict[str, Any]]:
    """The observed sample sites of a trace, by name; a ``pyro.deterministic`` is none."""
    return {n: s for n, s in _sites(trace) if s["is_observed"] and not s["infer"].get("_deterministic", False)}


def is_factor(site: Mapping[str, Any]) -> bool:
    """Return True if a site is a ``pyro.factor``: it has a log-probability, and no value."""
    return isinstance(site["fn"], dist.Unit)


def factor_sites(model_trace: Any, batch: Batch) -> frozenset[str]:
    """Name the observed sites that are no modality of a batch: a ``pyro.factor``, or data that it does not hold.

    A modality that the batch does not hold is neither, where the story observes it by ``batch.observe``.
    """
    return frozenset(n for n, s in observed_sites(model_trace).items() if n not in batch and _scores(s))


def _scores(site: Mapping[str, Any]) -> bool:
    """Return True if an observed site has a log-probability, unlike a modality that is missing in every row."""
    return is_factor(site) or not site["infer"].get("is_auxiliary", False)


def _sites(trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((n, s) for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s))


def lacks_derivative(d: Any, value: Tensor) -> bool:
    """Return whether a draw has no derivative by what its probabilities depend on, where one is asked for."""
    if not torch.is_grad_enabled() or d.has_rsample:
        return False
    try:
        return d.log_prob(value).requires_grad
    except NotImplementedError:
        return False


def private_modality(site: str, modalities: frozenset[str]) -> str | None:
    """The modality whose private latent this site is (``"w_<modality>"``), or None."""
    return site[2:] if site.startswith("w_") and site[2:] in modalities else None
