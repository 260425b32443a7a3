"""A term of an objective, or a stack of terms, as a (model, guide) pair of its own.

With sets of modalities A, B and C, a term is the ELBO of p(x_B | z) r(z) under q(z | x_A), where r is the model's
prior or q(z | x_C). What makes that pair out of a user's pair is here, and what it is worth is elsewhere.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from .batch import Batch
from .distributions import Where
from .draws import Counted, draw
from .plates import Plate
from .presence import Presence, all_of, any_of, negated, over_events
from .registration import buffers_kept
from .scatter import Stack

Callback = Callable[..., Any]
UNBROADCAST = (
    "Particles and terms are dimensions to the left of the rows here. If the story or the guide does not broadcast "
    "over them, pass vectorize=False to the objective or the function called (log_marginal, generate, calibration), "
    "and vectorize_particles=False to the estimator."
)


# -- what a pair looks like ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Structure:
    """What one run on two rows shows of a pair.

    ``nesting`` is the number of batch dimensions of its plates; ``latents`` says of each guide site how it can be
    differentiated ("pathwise", "enumerated" or "score"); ``model_only`` maps each latent site that the guide lacks
    to whether it can be enumerated; ``components`` is the number of components of a mixture posterior, else 0;
    ``in_order`` says that guide and model sample the sites that they share in one order; ``modalities`` are the
    model's observed sites; ``chained`` says that the model uses one of them, as a parent of another; ``factors`` are
    those of the observed sites that are no modality of the batch, such as a ``pyro.factor``.
    """

    nesting: int
    latents: Mapping[str, str]
    model_only: Mapping[str, bool]
    components: int
    in_order: bool
    modalities: frozenset[str]
    chained: bool = False
    factors: frozenset[str] = frozenset()

    @property
    def enumerates(self) -> bool:
        return "enumerated" in self.latents.values() or any(self.model_only.values())


_structures: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def structure(model: Callback, guide: Callback, batch: Batch) -> Structure:
    """The :class:`Structure` of a pair, found by one run on two rows and remembered as long as both live."""
    try:
        of_model = _structures.setdefault(model, weakref.WeakKeyDictionary())
        known = of_model.get(guide)
    except TypeError:  # a callable that cannot be a key
        return _structure(model, guide, batch[: min(2, batch.size)])
    if known is None:
        known = of_model[guide] = _structure(model, guide, batch[: min(2, batch.size)])
    return known


def _structure(model: Callback, guide: Callback, batch: Batch) -> Structure:
    devices = [batch.device] if batch.device.type == "cuda" else []
    # with gradients on: whether a distribution can be differentiated may depend on whether its parameters are
    no_inference, fork = torch.inference_mode(False), torch.random.fork_rng(devices=devices)
    used: set[str] = set()
    read: list[str] = []
    batch = batch.listened(used.add).noting_lengths(lambda: read.append(""))
    with no_inference, torch.enable_grad(), fork, poutine.block(), buffers_kept(model, guide):
        guide_trace = poutine.trace(guide).get_trace(batch)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(batch)
    if not read:
        batch.warn_unread_lengths()
    if weighed := [name for name, site in observed(guide_trace).items() if _scores(site)]:
        raise ValueError(
            f"the guide has the observed site {weighed[0]!r}, a pyro.factor or a sample with obs=: its log-probability "
            "is of no latent, and no bound or likelihood counts it. Take it out of the guide, or put it into the model"
        )
    sites = [*latents(guide_trace).values(), *latents(model_trace).values(), *observed(model_trace).values()]
    frames = [frame for site in sites for frame in site["cond_indep_stack"]]
    kinds, components = {}, 0
    for name, site in latents(guide_trace).items():
        enumerated = site["infer"].get("enumerate") == "parallel"
        kinds[name] = "enumerated" if enumerated else "pathwise" if site["fn"].has_rsample else "score"
        components = max(components, getattr(site["fn"], "num_components", 0))
    ours = latents(model_trace)
    return Structure(
        nesting=max([1, *(-frame.dim for frame in frames if frame.vectorized)]),
        latents=kinds,
        model_only={n: bool(s["fn"].has_enumerate_support) for n, s in ours.items() if n not in kinds},
        components=components,
        in_order=[n for n in ours if n in kinds] == [n for n in kinds if n in ours],
        modalities=frozenset(observed(model_trace)),
        chained=bool(used),
        factors=factors_of(model_trace, batch),
    )


def latents(trace: Any) -> dict[str, dict[str, Any]]:
    """The unobserved sample sites of a trace, by name; the index sets of subsampled plates are left out."""
    return {n: s for n, s in _sites(trace) if not s["is_observed"]}


def observed(trace: Any) -> dict[str, dict[str, Any]]:
    """The observed sample sites of a trace, by name; a ``pyro.deterministic`` is none."""
    return {n: s for n, s in _sites(trace) if s["is_observed"] and not s["infer"].get("_deterministic", False)}


def is_factor(site: Mapping[str, Any]) -> bool:
    """Whether a site is a ``pyro.factor``: it has a log-probability, and no value."""
    return isinstance(site["fn"], dist.Unit)


def factors_of(model_trace: Any, batch: Batch) -> frozenset[str]:
    """Name the observed sites that are no modality of a batch: a ``pyro.factor``, or data that it does not hold.

    A modality that the batch does not hold is neither, where the story observes it by ``batch.observe``.
    """
    return frozenset(n for n, s in observed(model_trace).items() if n not in batch and _scores(s))


def _scores(site: Mapping[str, Any]) -> bool:
    """Whether an observed site has a log-probability, unlike a modality that is missing in every row."""
    return is_factor(site) or not site["infer"].get("is_auxiliary", False)


def _sites(trace: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((n, s) for n, s in trace.nodes.items() if s["type"] == "sample" and not site_is_subsample(s))


# -- a term of an objective as a (model, guide) pair -----------------------------------------------------------------


@dataclass(frozen=True)
class Views:
    """The rows as the three sets of a term show them, T terms stacked at batch dim ``-(nesting + 1)``.

    ``encode_prior`` (``given_prior``) says where the model's prior takes the place of the guide given A (C): a
    bool, or a boolean tensor ``(T, 1, .., 1)``. ``scale`` maps modalities to what their own sites are scaled by.
    ``joint`` says where observed sites that are no modality, such as a ``pyro.factor``, count.
    """

    encode: Batch
    decode: Batch
    given: Batch
    nesting: int
    encode_prior: Presence = False
    given_prior: Presence = True
    terms: int = 1
    modalities: frozenset[str] = frozenset()
    scale: Mapping[str, float] = field(default_factory=dict)
    joint: Presence = True

    @staticmethod
    def of(batch: Batch, info: Structure, memo: dict[Any, Any] | None = None) -> Views:
        """The single term (*, *, prior): encode and decode all that is present."""
        view = batch.view({n: batch.presence(n) for n in batch.names}, Stack({}), {} if memo is None else memo)
        return Views(view, view, view, info.nesting, modalities=info.modalities)


class Rewrite(Messenger):
    """Hands every latent site's message to a function, which may change it; and every observed one's to another."""

    def __init__(
        self, edit: Callable[[dict[str, Any]], None], observed: Callable[[dict[str, Any]], None] | None = None
    ):
        super().__init__()
        self.edit, self.observed = edit, observed

    def _pyro_sample(self, msg: Any) -> None:
        edit = self.observed if msg["is_observed"] else self.edit
        if edit is not None and not site_is_subsample(msg):
            edit(msg)


class Pair:
    """The (model, guide) pair whose ELBO is one term, or a stack of terms, of another pair's objective.

    ``guide()`` samples q(z | x_A); ``model()``, run after it, scores p(x_B | z) and r(z). The values at which r is
    evaluated are those of ``trace``, which ``guide`` leaves behind; ``log_q`` is for who scores them.
    """

    def __init__(
        self, model: Callback, guide: Callback, views: Views, num_particles: int = 1, plated: bool | None = None
    ):
        self._model, self._guide, self.views = model, guide, views
        self.num_particles = num_particles
        self.plated = num_particles > 1 if plated is None else plated  # whether particles have a plate
        self.particle_dim = -views.nesting - (views.terms > 1) - 1
        self.trace: Any = None
        self.log_q: Mapping[str, Tensor] = {}
        self.own_prior: dict[str, Any] = {}  # the latents as the model's own prior has them, where that is encoded
        self.prior: dict[str, Any] | None = None  # the latents that were drawn from it, where it is encoded
        self.missing_of_prior: dict[str, tuple[Tensor, int]] = {}  # and the draws of missing modalities among their
        # parents, each with its number of event dimensions

    @property
    def enum_dim(self) -> int:
        """The first dimension that enumerated sites may use."""
        return self.particle_dim - self.plated

    @contextmanager
    def plates(self) -> Iterator[None]:
        try:
            with Counted(), ExitStack() as stack:
                if self.plated:
                    stack.enter_context(Plate("particles", self.num_particles, dim=self.particle_dim))
                if self.views.terms > 1:
                    stack.enter_context(Plate("terms", self.views.terms, dim=-self.views.nesting - 1))
                yield
        except (RuntimeError, IndexError, ValueError) as error:
            if self.plated or self.views.terms > 1:
                error.add_note(UNBROADCAST)
            raise

    def guide(self, *_: Any) -> None:
        if self.prior is None:
            self.prior = {} if self.views.encode_prior is False else self.draw_prior()
        prior = self.prior

        def edit(msg: dict[str, Any]) -> None:
            self._weigh(msg)
            if msg["name"] in prior:
                mask, fn, p = self.views.encode_prior, msg["fn"], prior[msg["name"]]
                value = fn.rsample() if fn.has_rsample else fn.sample()
                msg["fn"], msg["value"], msg["done"] = p["fn"], p["value"], True
                if isinstance(mask, Tensor):
                    msg["fn"] = Where(mask, p["fn"], fn)
                    msg["value"] = torch.where(over_events(mask, fn.event_dim), p["value"], value)

        with poutine.trace() as trace, Rewrite(edit), self.plates():
            self._guide(self.views.encode)
        self.trace = trace.trace

    def draw_prior(self, values: Any = None, missing: Mapping[str, tuple[Tensor, int]] | None = None) -> dict[str, Any]:
        """Samples the model's latents from its prior, under the plates of particles and terms.

        That prior is the one which :meth:`model` scores: a latent whose parent is a modality is drawn given its value
        where it is decoded, and given a draw of it elsewhere.

        Args:
            values: a trace whose latents are taken as they are.
            missing: draws of missing modalities that are taken as they are, as in ``missing_of_prior``.

        Returns:
            Site name -> site.
        """
        self.missing_of_prior = dict(missing or {})

        def drawer(name: str, d: Any, plates: tuple[int, ...]) -> Tensor:
            if name not in self.missing_of_prior:
                self.missing_of_prior[name] = draw(d, plates), d.event_dim
            return self.missing_of_prior[name][0]

        with poutine.block(), poutine.trace() as trace, poutine.replay(trace=values or poutine.Trace()), self.plates():
            self._model(self.views.decode.drawn_by(drawer, unscored=True))
        return latents(trace.trace)

    def _of_prior(self, of_prior: Tensor | None, event_dim: int, otherwise: Callable[[], Tensor]) -> Tensor:
        """The value that the prior's latents were drawn with in the terms that encode the prior, else another one."""
        mask = self.views.encode_prior
        if of_prior is None or mask is False:
            return otherwise()
        if mask is True:
            return of_prior
        return torch.where(over_events(mask, event_dim), of_prior, otherwise())  # type: ignore[arg-type]

    def _draw_missing(self, name: str, d: Any, plates: tuple[int, ...]) -> Tensor:
        of_prior, _ = self.missing_of_prior.get(name, (None, 0))
        return self._of_prior(of_prior, d.event_dim, lambda: draw(d, plates))

    def model(self, *_: Any) -> None:
        given: dict[str, Any] = {}
        if self.views.given_prior is not True:
            with poutine.block(), poutine.trace() as trace, poutine.replay(trace=self.trace), self.plates():
                self._guide(self.views.given)
            given = latents(trace.trace)

        prior = self.prior or {}

        def edit(msg: dict[str, Any]) -> None:
            self._weigh(msg)
            if prior:
                self.own_prior[msg["name"]] = msg["fn"]
            if msg["name"] in given:
                mask, fn = self.views.given_prior, given[msg["name"]]["fn"]
                if (modality := private(msg["name"], self.views.modalities)) is not None:
                    mask = any_of([mask, negated(self.views.given.presence(modality))])
                if mask is not True:
                    msg["fn"] = Where(mask, msg["fn"], fn) if isinstance(mask, Tensor) else fn
            elif msg["name"] not in self.trace.nodes and msg["fn"].has_enumerate_support:
                msg["infer"].setdefault("enumerate", "parallel")
            elif msg["name"] not in self.trace.nodes and msg["name"] in prior:
                value, event_dim = prior[msg["name"]]["value"], msg["fn"].event_dim
                msg["value"], msg["done"] = self._of_prior(value, event_dim, lambda: msg["fn"](*msg["args"])), True

        with Rewrite(edit, self._weigh), self.plates():
            self._model(self.views.decode.drawn_by(self._draw_missing))

    def _weigh(self, msg: dict[str, Any]) -> None:
        """A row with nothing present scores nothing, nor does the private latent of a modality not decoded."""
        own = private(msg["name"], self.views.modalities)
        modality: Any = msg["name"] if msg["is_observed"] else own
        if modality in self.views.scale:
            msg["scale"] = msg["scale"] * self.views.scale[modality]
        if not any(frame.name == "data" for frame in msg["cond_indep_stack"]):
            return
        mask = self.views.decode.rows
        if own is not None:
            mask = all_of([mask, self.views.decode.presence(own)])
        if msg["is_observed"] and msg["name"] not in self.views.decode:
            mask = all_of([mask, self.views.joint])
        if mask is not True and mask is not msg["mask"]:  # which is what batch.plate() has masked it by already
            msg["mask"] = mask if msg["mask"] is None else msg["mask"] & mask


def private(site: str, modalities: frozenset[str]) -> str | None:
    """The modality whose private latent this site is (``"w_<modality>"``), or None."""
    return site[2:] if site.startswith("w_") and site[2:] in modalities else None
