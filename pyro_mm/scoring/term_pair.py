"""A term of an objective, or a stack of terms, as a (model, guide) pair of its own.

With sets of modalities A, B and C, a term is the ELBO of p(x_B | z) r(z) under q(z | x_A), where r is the model's
prior or q(z | x_C). Here a user's pair is turned into that of a term; :mod:`.importance` scores it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..batch.masks import add_event_dims, all_of, any_of, invert
from ..distributions.base import detach_distribution
from ..distributions.where import Where
from ..handlers.plates import FixedPlate, KnownPlates, sample_in_plates
from ..handlers.rewrite import EditSites
from .program import Program
from .structure import lacks_derivative, latent_sites, private_modality
from .views import TermViews

UNBROADCAST = (
    "Particles and terms are dimensions to the left of the rows here. If the story or the guide does not broadcast "
    "over them, pass vectorize=False to the objective or the function called (log_marginal, generate, calibration), "
    "and vectorize_particles=False to the estimator."
)


class TermPair:
    """The (model, guide) pair whose ELBO is one term, or a stack of terms, of another pair's objective.

    ``guide()`` samples q(z | x_A) and leaves its ``trace``; ``model()``, run after it, scores p(x_B | z) and r(z) at
    the values of that trace.

    Args:
        model, guide: the other pair, callables of a batch.
        views: N rows as T terms show them.
        num_particles: K, drawn under a plate of their own.
        plated: True for a plate of particles, False for none; None for a plate if K > 1.

    Attributes:
        source_model, source_guide: the other pair.
    """

    def __init__(
        self, model: Program, guide: Program, views: TermViews, num_particles: int = 1, plated: bool | None = None
    ):
        self.source_model = model
        self.source_guide = guide
        self.views = views
        self.num_particles = num_particles
        self.plated = num_particles > 1 if plated is None else plated  # whether particles have a plate
        self.particle_dim = -views.nesting - (views.terms > 1) - 1
        self.trace: Any = None
        self.given: Mapping[str, dict[str, Any]] = {}  # the latents of the guide given C, at the values of the trace
        self.draw: Callable[[dict[str, Any]], None] | None = None  # gives messages of the guide's sites their values
        self.drawn: Mapping[str, dict[str, Any]] = {}  # the guide's latent sites as it went on with them
        self.log_q: Mapping[str, Tensor] = {}
        self.without_derivative: set[str] = set()  # missing modalities whose draws pass no gradient on to their parents
        self.own_prior: dict[str, Any] = {}  # the latents as the model's own prior has them, where that is encoded
        self.prior: dict[str, Any] | None = None  # the latents that were drawn from it, where it is encoded
        self.missing_of_prior: dict[str, tuple[Tensor, int]] = {}  # and the draws of missing modalities among their
        # parents, each with its number of event dimensions

    @property
    def enum_dim(self) -> int:
        """Batch dimension of the first enumerated site, negative."""
        return self.particle_dim - self.plated

    @contextmanager
    def plates(self) -> Iterator[None]:
        try:
            with KnownPlates(), ExitStack() as stack:
                if self.plated:
                    stack.enter_context(FixedPlate("particles", self.num_particles, dim=self.particle_dim))
                if self.views.terms > 1:
                    stack.enter_context(FixedPlate("terms", self.views.terms, dim=-self.views.nesting - 1))
                yield
        except (RuntimeError, IndexError, ValueError) as error:
            if self.plated or self.views.terms > 1:
                error.add_note(UNBROADCAST)
            raise

    def row_latents(self, trace: Any = None) -> dict[str, dict[str, Any]]:
        """Return name -> site of the latents in a trace, by default the guide's, without those that are given."""
        given = self.views.given_latents or ()
        sites = latent_sites(self.trace if trace is None else trace)
        return {name: site for name, site in sites.items() if name not in given}

    def given_values(self) -> poutine.Trace:
        """Return the part of the guide's trace that holds the latents that are given."""
        given = poutine.Trace()
        for name, site in latent_sites(self.trace).items():
            if name in (self.views.given_latents or ()):
                given.add_node(name, **site)
        return given

    def guide(self, *_: Any) -> None:
        if self.prior is None:
            self.prior = {} if self.views.encode_prior is False else self.draw_prior()
        prior = self.prior

        def edit(msg: dict[str, Any]) -> None:
            self._weigh(msg)
            if msg["name"] in prior:
                mask = self.views.encode_prior
                fn = msg["fn"]
                p = prior[msg["name"]]
                value = msg["value"] if msg["done"] else fn.rsample() if fn.has_rsample else fn.sample()
                msg["fn"] = p["fn"]
                msg["value"] = p["value"]
                msg["done"] = True
                if isinstance(mask, Tensor):
                    msg["fn"] = Where(mask, p["fn"], fn)
                    msg["value"] = torch.where(add_event_dims(mask, fn.event_dim), p["value"], value)

        sample_in_plates = nullcontext() if self.draw is None else EditSites(self.draw)
        frozen = self.views.freeze_encoder
        with (
            torch.set_grad_enabled(torch.is_grad_enabled() and not frozen),
            poutine.trace() as trace,
            EditSites(edit),
            sample_in_plates,
            self.plates(),
        ):
            self.source_guide(self.views.encode)
        self.trace = trace.trace
        if frozen:
            for site in latent_sites(self.trace).values():
                site["fn"] = detach_distribution(site["fn"])
                site["value"] = site["value"].detach()

    def draw_prior(self, values: Any = None, missing: Mapping[str, tuple[Tensor, int]] | None = None) -> dict[str, Any]:
        """Sample the model's latents from its prior, under the plates of particles and terms.

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
                self.missing_of_prior[name] = sample_in_plates(d, plates), d.event_dim
            return self.missing_of_prior[name][0]

        with poutine.block(), poutine.trace() as trace, poutine.replay(trace=values or poutine.Trace()), self.plates():
            self.source_model(self.views.decode.with_context(draw_missing=drawer, values_only=True))
        return latent_sites(trace.trace)

    def draw_given(self) -> dict[str, Any]:
        """Sample the latents from the guide given the modalities of C, under the plates of particles and terms.

        Returns:
            Site name -> site.
        """
        with poutine.block(), poutine.trace() as trace, self.plates():
            self.source_guide(self.views.given)
        return latent_sites(trace.trace)

    def _of_prior(self, of_prior: Tensor | None, event_dim: int, otherwise: Callable[[], Tensor]) -> Tensor:
        """Return ``of_prior``, the prior's draw, in terms that encode the prior, and ``otherwise()`` in others."""
        mask = self.views.encode_prior
        if of_prior is None or mask is False:
            return otherwise()
        if mask is True:
            return of_prior
        return torch.where(add_event_dims(mask, event_dim), of_prior, otherwise())

    def _draw_missing(self, name: str, d: Any, plates: tuple[int, ...]) -> Tensor:
        of_prior, _ = self.missing_of_prior.get(name, (None, 0))
        value = self._of_prior(of_prior, d.event_dim, lambda: sample_in_plates(d, plates))
        if lacks_derivative(d, value):
            self.without_derivative.add(name)
        return value

    def model(self, *_: Any) -> None:
        given: dict[str, Any] = {}
        if self.views.given_prior is not True:
            with poutine.block(), poutine.trace() as trace, poutine.replay(trace=self.trace), self.plates():
                self.source_guide(self.views.given)
            given = latent_sites(trace.trace)
        self.given = given

        prior = self.prior or {}

        def edit(msg: dict[str, Any]) -> None:
            self._weigh(msg)
            if prior:
                self.own_prior[msg["name"]] = msg["fn"]
            if msg["name"] in given:
                mask = self.views.given_prior
                fn = given[msg["name"]]["fn"]
                if (modality := private_modality(msg["name"], self.views.modalities)) is not None:
                    mask = any_of([mask, invert(self.views.given.presence(modality))])
                if mask is not True:
                    msg["fn"] = Where(mask, msg["fn"], fn) if isinstance(mask, Tensor) else fn
            elif msg["name"] not in self.trace.nodes and msg["fn"].has_enumerate_support:
                msg["infer"].setdefault("enumerate", "parallel")
            elif msg["name"] not in self.trace.nodes and msg["name"] in prior:
                value = prior[msg["name"]]["value"]
                event_dim = msg["fn"].event_dim
                msg["value"] = self._of_prior(value, event_dim, lambda: msg["fn"](*msg["args"]))
                msg["done"] = True

        with EditSites(edit, self._weigh), self.plates():
            self.source_model(self.views.decode.with_context(draw_missing=self._draw_missing))

    def _weigh(self, msg: dict[str, Any]) -> None:
        """Scale and mask a site: rows with nothing present, and private latents that nothing decodes, score nothing."""
        own = private_modality(msg["name"], self.views.modalities)
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
            msg["mask"] = mask if msg["mask"] is None or mask is False else msg["mask"] & mask


def check_prior_gradient(prior: Mapping[str, Any]) -> None:
    """Refuse a gradient with respect to the parameters of a prior's discrete draws."""
    for name, site in prior.items():
        if not site["fn"].has_rsample and site["fn"].log_prob(site["value"]).requires_grad:
            raise ValueError(
                f"a term that encodes PRIOR, or compares with draws of it, draws {name!r} from the model's prior, and "
                "that draw has no derivative with respect to the parameters of its distribution: freeze these with "
                "requires_grad_(False), or train without such a term"
            )
