"""Find the structure of a (model, guide) pair by one run on two rows: sites, plates, and ways to differentiate."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..batch.batch import Batch
from ..batch.context import TermStack
from ..batch.masks import Presence
from ..distributions.base import has_atoms
from ..distributions.mixture import largest_mixture
from ..distributions.support import unwrap
from ..distributions.token_sequence import TokenSequence
from ..handlers.plates import sample_in_plates
from ..handlers.repeatability import BatchNormalisation, RandomNumbers, depends
from ..handlers.rewrite import EditSites
from ..utils.modules import preserve_buffers
from .program import Program
from .program_errors import explain_errors
from .structure_cache import PairCache


@dataclass(frozen=True)
class PairStructure:
    """Properties of a pair that one run on two rows shows, and that hold for all batches of the same form.

    Attributes:
        nesting: number of batch dimensions of the pair's plates, 1 or more.
        latents: latent site of the guide -> way to differentiate it: "pathwise", "enumerated" or "score".
        model_only: latent site that the guide lacks -> True if it can be enumerated.
        strata: the guide's first mixture whose components can be drawn from in turn; None if there is none.
        in_order: True if guide and model sample the sites that they share in the same order.
        modalities: observed sites of the model.
        parents: modalities that the model uses as parents of other sites.
        factors: observed sites that are no modality of the batch, such as a ``pyro.factor``.
        strings: observed sites of strings of tokens -> their end token, or None.
        random: True if networks draw random numbers when they run again, as dropout does.
        normalises: True if something computed from a latent goes through batch normalisation in training mode.
        global_latents: latents of the guide outside the plate ``"data"``, which all rows share.
        deterministic: latent sites of the guide that are a Delta in some rows.
        latent_numbers: numbers per row in all latents of the guide, those within plates of a row included.
    """

    nesting: int
    latents: Mapping[str, str]
    model_only: Mapping[str, bool]
    strata: Strata | None
    in_order: bool
    modalities: frozenset[str]
    parents: frozenset[str] = frozenset()
    factors: frozenset[str] = frozenset()
    strings: Mapping[str, int | None] = field(default_factory=dict)
    random: bool = False
    normalises: bool = False
    global_latents: frozenset[str] = frozenset()
    deterministic: frozenset[str] = frozenset()
    latent_numbers: int = 1

    @property
    def chained(self) -> bool:
        """True if the model uses a modality as a parent of another one."""
        return bool(self.parents)

    @property
    def enumerates(self) -> bool:
        """True if some latent is summed out."""
        return "enumerated" in self.latents.values() or any(self.model_only.values())


@dataclass(frozen=True)
class Strata:
    """A mixture in a guide whose components a stratified pass draws from in turn.

    Attributes:
        site: its latent site.
        components: number of components.
        varying: True if its weights depend on a latent drawn before it, so that they differ between particles.
    """

    site: str
    components: int
    varying: bool


def pair_structure(model: Program, guide: Program, batch: Batch, stratified: bool = False) -> PairStructure:
    """Return the structure of a pair on batches of this form, from one run on two rows.

    It is cached while both live, per form of the batch (modalities held, present in all rows, in none or in some). It
    is computed again once something that the run depends on has changed: a module, a parameter that is frozen, the mode
    of a module, a number, an ``infer`` dictionary; see :class:`~pyro_mm.utils.snapshot.Snapshot`.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        stratified: True to look for a mixture, too, in the guide where a modality is missing.

    Raises:
        ValueError, TypeError: an error of a program, with the site, the network and the shapes that it comes from; a
            guide with an observed site.
    """
    run = _structure_with_strata if stratified else _structure
    return _structures.get(model, guide, (stratified, *_form(batch)), lambda: batch[: min(2, batch.size)], run)


_structures: PairCache[PairStructure] = PairCache()


def _form(batch: Batch) -> tuple[Hashable, ...]:
    """Return all properties of a batch that may decide in Python what a program does: not its size, nor its values."""

    def where(presence: Presence) -> bool | str:
        return presence if isinstance(presence, bool) else "in some rows"

    modalities = [(n, where(batch.presence(n)), batch.holds(n)) for n in batch.names]
    values = [(batch[n].dtype, batch[n].shape[1:]) for n in batch.names if batch.holds(n)]
    others = [(n, x.dtype, x.shape[1:]) for n, x in [*batch.covariates.items(), *batch.lengths.items()]]
    return where(batch.rows), batch.device, torch.get_default_dtype(), *modalities, *values, *others


def _structure(model: Program, guide: Program, batch: Batch) -> PairStructure:
    """Run guide and model once on a few rows, and return the structure that the runs show."""
    watch = _Watch(batch)
    parents: set[str] = set()
    batch = batch.with_context(on_use=parents.add, draw_missing=watch.draw_missing)
    with explain_errors({"model": model, "guide": guide}, batch.size), _without_side_effects(model, guide, batch):
        guide_trace, random_in_guide = watch.run(guide, batch)
        model_trace, random_in_model = watch.run(model, batch, guide_trace)
        random = random_in_model or (random_in_guide and _draws_again(guide, batch))
        strata = _strata(latent_sites(guide_trace))
    _check_guide(guide_trace)

    in_guide = latent_sites(guide_trace)
    in_model = latent_sites(model_trace)
    observed = observed_sites(model_trace)
    sites = [*in_guide.values(), *in_model.values(), *observed.values()]
    frames = [frame for site in sites for frame in site["cond_indep_stack"]]
    return PairStructure(
        nesting=max([1, *(-frame.dim for frame in frames if frame.vectorized)]),
        latents={name: _way_to_differentiate(site) for name, site in in_guide.items()},
        model_only={n: bool(s["fn"].has_enumerate_support) for n, s in in_model.items() if n not in in_guide},
        strata=strata,
        in_order=[n for n in in_model if n in in_guide] == [n for n in in_guide if n in in_model],
        modalities=frozenset(observed),
        parents=frozenset(parents),
        factors=factor_sites(model_trace, batch),
        strings={n: d.end for n, s in observed.items() if isinstance(d := unwrap(s["fn"]), TokenSequence)},
        random=random,
        normalises=watch.normalisation.found,
        global_latents=frozenset(name for name, site in in_guide.items() if not in_data_plate(site)),
        deterministic=frozenset(name for name, site in in_guide.items() if has_atoms(site["fn"])),
        latent_numbers=sum(site["value"].numel() for site in in_guide.values()) // batch.size,
    )


@contextmanager
def _without_side_effects(model: Program, guide: Program, batch: Batch) -> Iterator[None]:
    """Restore generators and buffers after a run with gradients.

    Whether a distribution can be differentiated may depend on whether its parameters can.
    """
    devices = [batch.device] if batch.device.type == "cuda" else []
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.random.fork_rng(devices=devices),
        poutine.block(),
        preserve_buffers(model, guide),
    ):
        yield


def _check_guide(trace: Any) -> None:
    """Raise a ValueError if a guide observes a site that has a log-probability."""
    weighted = [name for name, site in observed_sites(trace).items() if _has_log_prob(site)]
    if weighted:
        raise ValueError(
            f"the guide has the observed site {weighted[0]!r}, a pyro.factor or a sample with obs=, whose "
            "log-probability no bound and no likelihood counts: take it out of the guide, or put it into the model"
        )


def _way_to_differentiate(site: Mapping[str, Any]) -> str:
    """Return "enumerated", "pathwise" or "score" for a latent site of a guide."""
    if site["infer"].get("enumerate") == "parallel":
        return "enumerated"
    return "pathwise" if site["fn"].has_rsample else "score"


class _Watch:
    """Runs programs, draws their latents and missing modalities, and watches their networks.

    Args:
        batch: a batch on the device of the runs.

    Attributes:
        random: the watch over random numbers of networks.
        normalisation: the watch over batch normalisation of what depends on a latent.
    """

    def __init__(self, batch: Batch) -> None:
        self.random = RandomNumbers(batch.device)
        self.normalisation = BatchNormalisation()

    def run(self, program: Program, batch: Batch, values: Any = None) -> tuple[Any, bool]:
        """Run a program.

        Args:
            program: a model or a guide.
            batch: the rows.
            values: a trace to replay the program against.

        Returns:
            (trace, True if networks drew random numbers).
        """
        self.random.found()
        replayed = poutine.replay(trace=values or poutine.Trace())
        with self.normalisation, poutine.trace() as traced, replayed, EditSites(self.draw):
            program(batch)
        return traced.trace, self.random.found()

    def draw(self, msg: dict[str, Any]) -> None:
        """Draw a latent as a tensor with a gradient, so that what is computed from it can be found."""
        if not msg["done"]:
            with self.random.paused():
                value = msg["fn"](*msg["args"], **msg["kwargs"])
            if value.is_floating_point() and not value.requires_grad:
                value = value.detach().requires_grad_()
            msg["value"] = value
            msg["done"] = True
        if msg["value"].requires_grad:
            self.normalisation.values.append(msg["value"])

    def draw_missing(self, name: str, d: Any, plates: tuple[int, ...]) -> Tensor:
        """Draw a missing modality."""
        with self.random.paused():
            return sample_in_plates(d, plates)


def _draws_again(guide: Program, batch: Batch) -> bool:
    """Return True if a guide's networks draw random numbers in a second run that finds what a step has cached."""
    view = batch.view({n: batch.presence(n) for n in batch.names}, TermStack({}), {})
    watch = _Watch(batch)
    trace, _ = watch.run(guide, view)
    _, again = watch.run(guide, view, trace)
    return again


def _strata(sites: Mapping[str, dict[str, Any]]) -> Strata | None:
    """Return the first mixture among a guide's sites that has one draw per row, without a plate inside the rows."""
    before: list[Tensor] = []
    for name, site in sites.items():
        inner = [f for f in site["cond_indep_stack"] if f.vectorized and f.name != "data" and f.size > 1]
        mixture = largest_mixture(site["fn"])
        if mixture is not None and not inner:
            return Strata(name, mixture.num_components, depends(mixture.log_weights, before))
        if site["value"].requires_grad:
            before.append(site["value"])
    return None


def _structure_with_strata(model: Program, guide: Program, batch: Batch) -> PairStructure:
    """Return the structure, with a mixture that a guide has only where a modality is missing, if it has one.

    A joint encoder with experts is such a guide. A guide that cannot be run with a missing modality has no mixture.
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
    """Return name -> site, for the latent sample sites of a trace, without the index sets of plates."""
    return {n: s for n, s in _sites(trace) if not s["is_observed"]}


def observed_sites(trace: Any) -> dict[str, dict[str, Any]]:
    """Return name -> site, for the observed sample sites of a trace, without those of ``pyro.deterministic``."""
    return {n: s for n, s in _sites(trace) if s["is_observed"] and not s["infer"].get("_deterministic", False)}


def in_data_plate(site: Mapping[str, Any]) -> bool:
    """Return True if a site is in the plate of the rows."""
    return any(frame.name == "data" for frame in site["cond_indep_stack"])


def is_factor(site: Mapping[str, Any]) -> bool:
    """Return True if a site is a ``pyro.factor``, which has a log-probability and no value."""
    return isinstance(site["fn"], dist.Unit)


def factor_sites(model_trace: Any, batch: Batch) -> frozenset[str]:
    """Return the observed sites that are no modality of a batch: a ``pyro.factor``, or data of another origin.

    A modality that the batch does not hold, and that the story observes by ``batch.observe``, is not among them.

    Args:
        model_trace: a trace of the model.
        batch: the rows that it ran on.
    """
    return frozenset(n for n, s in observed_sites(model_trace).items() if n not in batch and _has_log_prob(s))


def _has_log_prob(site: Mapping[str, Any]) -> bool:
    """Return True if an observed site has a log-probability, unlike a modality that is missing in every row."""
    return is_factor(site) or not site["infer"].get("is_auxiliary", False)


def _sites(trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (name, site) for the sample sites of a trace, without the index sets of plates."""
    return ((n, s) for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s))


def lacks_derivative(d: Any, value: Tensor) -> bool:
    """Return True if a draw has no derivative with respect to its parameters although these require gradients.

    Args:
        d: the distribution that it was drawn from.
        value: the draw.
    """
    if not torch.is_grad_enabled() or d.has_rsample:
        return False
    try:
        differentiable: bool = d.log_prob(value).requires_grad
        return differentiable
    except NotImplementedError:
        return False


def private_modality(site: str, modalities: frozenset[str]) -> str | None:
    """Return the modality whose private latent a site is, by its name ``"w_<modality>"``, or None."""
    return site[2:] if site.startswith("w_") and site[2:] in modalities else None
