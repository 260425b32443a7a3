r"""A pair's densities at unconstrained coordinates of the guide's latents, row by row and with gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import Constraint

from ..distributions.normal_scores import normal_scores
from ..scoring.model_scores import score_model
from ..scoring.program import Program
from ..scoring.reduction import LazyMapping, SiteReducer, sum_out
from ..scoring.structure import PairStructure, latent_sites
from ..scoring.term_pair import TermPair
from ..scoring.views import TermViews
from ..utils.global_state import override_validation
from ..utils.seeding import generator_state
from .ancestral import SiteValues


class LogDensities(NamedTuple):
    """Log-densities of C points of N rows, ``(C, N)`` each, in nats; the first two are of the coordinates.

    Attributes:
        guide: log q(z) plus the Jacobian's; None if it was not asked for.
        prior: log p(z) plus the Jacobian's.
        likelihood: log p(x | z).
    """

    guide: Tensor | None
    prior: Tensor
    likelihood: Tensor

    @property
    def joint(self) -> Tensor:
        """log p(x, z) plus the log-determinant of the Jacobian."""
        return self.prior + self.likelihood


class UnconstrainedPair:
    r"""The densities of a pair at flat unconstrained coordinates u of the guide's latents, for each row of a batch.

    All latents of a row, those in plates within it among them, are D numbers u, which ``torch.distributions.biject_to``
    transforms to their supports, z = T(u). The densities of u have the Jacobian's determinant:

    .. math:: \log p(x, u) = \log p(x, T(u)) + \log |\det T'(u)|

    Coordinates that no density depends on count nowhere, in a Jacobian neither: the latents of rows in which nothing is
    present, and the private ones of missing modalities. Sites that the guide enumerates are summed out, of its own
    density too.

    Latents outside the plate ``"data"``, which all rows share, are no coordinates: they are given, by draws of the
    guide (:meth:`draw_shared`). Point c is at draw ``c % G`` of G, whatever the points are for.

    Args:
        model, guide: callables of a batch.
        views: N rows as the guide sees them and as the model scores them.
        structure: sites of the pair.
        vectorize: True to score all points in one run of the model.
        method: the method that needs the coordinates, for errors.
        normal_priors: True for coordinates in which latents have a standard Normal prior, where that is possible
            (:func:`~pyro_mm.distributions.normal_scores.normal_scores`): no posterior then has heavier tails than a
            Normal, as far as the likelihood is bounded.

    Attributes:
        transforms: site -> bijection from its coordinates to its support.
        size: N.
        dimension: D.
        active: the coordinates that the densities depend on, boolean ``(N, D)``.

    Raises:
        ValueError: a discrete latent in the guide, one that only the model has and that cannot be summed out, a latent
            that is scaled, outside the plate ``"data"`` or whose support depends on another one, or a story that draws
            as it is scored.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        views: TermViews,
        structure: PairStructure,
        vectorize: bool = True,
        method: str = "annealing",
        normal_priors: bool = False,
    ):
        if unknown := [name for name, enumerable in structure.model_only.items() if not enumerable]:
            raise ValueError(
                f"{method} moves the guide's latents, and the guide lacks {unknown[0]!r}, a latent of the model: "
                "give the guide a site for it"
            )
        self.model, self.guide = model, guide
        self.views = views
        self.structure = structure
        self.vectorize = vectorize
        self.method = method
        self.size = views.encode.size
        self.enumerated = [name for name, how in structure.latents.items() if how == "enumerated"]

        pair = self.pair(1)
        with torch.no_grad():
            self.run_guide(pair)  # which leaves the encoders' outputs in the view's cache, without a graph
            self._check_sites(pair)
        sites = pair.row_latents()
        self._shared: SiteValues = {}  # latent that all rows share -> G draws of it
        self.take_shared(pair)
        self._trace = pair.trace.copy()
        for plate in {"data", "particles"} & set(self._trace.nodes):
            self._trace.remove_node(plate)  # its index set, of another number of points
        self.single_site = (
            len(latent_sites(pair.trace)) == 1 and not self.enumerated
        )  # whose distribution depends on no other latent
        self.transforms: dict[str, Transform] = {n: biject_to(s["fn"].support) for n, s in sites.items()}
        if normal_priors:
            self.transforms |= self._normal_scores()
        self._num_plates = {n: len(s["fn"].batch_shape) - 1 - vectorize for n, s in sites.items()}  # within a row
        self._lay_out(sites)
        self._check_scoring()

    # -- points -------------------------------------------------------------------------------------------------------

    def pair(self, num_particles: int) -> TermPair:
        """Return the pair for so many points; for one point without a plate if the model is run on each alone."""
        return TermPair(self.model, self.guide, self.views, num_particles, plated=self.vectorize)

    def run_guide(self, pair: TermPair) -> None:
        """Run a pair's guide, and leave its continuous latents in the pair's trace.

        A site that the guide enumerates is drawn here, and left out, so that the model enumerates it.
        """
        pair.guide()
        if self.enumerated:
            pair.trace = _without(pair.trace, self.enumerated)

    @torch.no_grad()
    def guide_draws(self, num_draws: int) -> Tensor:
        """Return the coordinates of independent draws from the guide, ``(C, N, D)``."""

        def draw(pair: TermPair, shared: poutine.Trace) -> SiteValues:
            with poutine.replay(trace=shared):
                self.run_guide(pair)
            return {name: site["value"] for name, site in pair.row_latents().items()}

        return self._draws(num_draws, draw)

    @torch.no_grad()
    def prior_draws(self, num_draws: int) -> Tensor:
        """Return the coordinates of independent draws from the model's prior, ``(C, N, D)``.

        Raises:
            ValueError: a latent that only the guide has.
        """

        def draw(pair: TermPair, shared: poutine.Trace) -> SiteValues:
            prior = pair.draw_prior(shared)
            if missing := [name for name in self.transforms if name not in prior]:
                raise ValueError(f"{self.method} needs latents that the model has, and {missing[0]!r} is not in it")
            return {name: prior[name]["value"] for name in self.transforms}

        return self._draws(num_draws, draw)

    # -- latents that all rows share ----------------------------------------------------------------------------------

    @property
    def has_shared(self) -> bool:
        """True if there are latents that all rows share."""
        return bool(self._shared)

    @torch.no_grad()
    def draw_shared(self, num_draws: int) -> None:
        """Draw the latents that all rows share from the guide, G times, in the place of the draws so far."""
        if not self._shared:
            return
        pairs = [self.pair(num_draws)] if self.vectorize else [self.pair(1) for _ in range(num_draws)]
        for pair in pairs:
            pair.guide()
        self.take_shared(*pairs)

    def take_shared(self, *pairs: TermPair) -> None:
        """Take the latents that all rows share from the traces of pairs: of one, or of one for each draw."""
        traces = [pair.given_values() for pair in pairs]
        if self.vectorize and not pairs[0].plated:
            self.set_shared({name: site["value"] for name, site in traces[0].nodes.items()})
            return
        values = {name: [trace.nodes[name]["value"] for trace in traces] for name in traces[0].nodes}
        self._shared = {name: x[0] if self.vectorize else torch.stack(x) for name, x in values.items()}

    def set_shared(self, values: Mapping[str, Tensor]) -> None:
        """Take one draw of the latents that all rows share, site -> value as the guide by itself draws it."""
        for name in self._shared:
            value = values[name]
            if self.vectorize:
                batch_dim = value.dim() - self._trace.nodes[name]["fn"].event_dim
                value = value.reshape(*[1] * (self.structure.nesting - batch_dim), *value.shape)
            self._shared[name] = value[None]

    def _shared_at(self, first: int, num_points: int) -> SiteValues:
        """Return the latents that all rows share at points from number ``first`` on: site -> ``(C, ..)``."""
        found = {}
        for name, values in self._shared.items():
            index = torch.arange(first, first + num_points, device=values.device) % len(values)
            found[name] = values[index]
        return found

    def _shared_trace(self, values: SiteValues) -> poutine.Trace:
        """Return a trace of latents that all rows share."""
        trace = poutine.Trace()
        for name, value in values.items():
            trace.add_node(name, **(self._trace.nodes[name] | {"value": value}))
        return trace

    def coordinates_of(self, latents: Mapping[str, Tensor], num_points: int) -> Tensor:
        """Return the coordinates of one value of the latents, repeated, ``(C, N, D)``.

        Args:
            latents: site -> ``(*plates, N, *event)``.
            num_points: C.
        """
        repeated = {}
        for name, transform in self.transforms.items():
            value = latents[name]
            missing = self._num_plates[name] + 1 - (value.dim() - transform.codomain.event_dim)
            value = value.reshape(*[1] * missing, *value.shape)
            repeated[name] = value.expand(num_points, *[-1] * value.dim())
        return self.flatten(repeated)

    def flatten(self, latents: SiteValues) -> Tensor:
        """Return the coordinates ``(C, N, D)`` of latents: site -> ``(C, *plates, N, *event)``."""
        parts = []
        for name, transform in self.transforms.items():
            u = transform.inv(latents[name])
            parts.append(u.movedim(1 + self._num_plates[name], 1).flatten(2) if u.dim() > 2 else u[..., None])
        return torch.cat(parts, -1)

    def latents_at(self, u: Tensor) -> SiteValues:
        """Return the latents at coordinates ``(C, N, D)``: site -> ``(C, *plates, N, *event)``."""
        return {name: self.transforms[name](x) for name, x in self._by_site(u).items()}

    def log_jacobian(self, u: Tensor, latents: SiteValues) -> Tensor:
        """Return the log-determinant of the Jacobian of the coordinates that count, ``(C, N)``.

        Args:
            u: ``(C, N, D)``.
            latents: the latents at these coordinates.
        """
        total = u.new_zeros(u.shape[:2])
        for name, x in self._by_site(u).items():
            log_det = self.transforms[name].log_abs_det_jacobian(x, latents[name])
            log_det = log_det.movedim(1 + self._num_plates[name], 1).flatten(2) if log_det.dim() > 2 else log_det
            log_det = log_det.reshape(*u.shape[:2], -1)
            total = total + torch.where(self._active_elements(name, log_det.shape[-1]), log_det, 0.0).sum(-1)
        return total

    # -- densities ----------------------------------------------------------------------------------------------------

    def log_densities(self, u: Tensor, guide: bool = True, first: int = 0) -> LogDensities:
        """Return the log-densities at coordinates ``(C, N, D)``, differentiable.

        Args:
            u: the coordinates.
            guide: False to leave log q out.
            first: number of the first of these points, by which they take the latents that all rows share.
        """
        with override_validation(False):  # a move may end anywhere
            latents = self.latents_at(u)
            jacobian = self.log_jacobian(u, latents)
            log_q, log_prior, likelihood = self._score_points(latents, guide, first)
            return LogDensities(None if log_q is None else log_q + jacobian, log_prior + jacobian, likelihood)

    def log_densities_in_chunks(self, u: Tensor, most: int, guide: bool = True) -> LogDensities:
        """Return the log-densities at coordinates ``(C, N, D)``, at most so many (row, point) pairs at once."""
        with torch.no_grad():
            parts = [self.log_densities(part, guide, first) for first, part in self.chunks(u, most)]
        log_q = torch.cat([part.guide for part in parts if part.guide is not None]) if guide else None
        return LogDensities(log_q, torch.cat([p.prior for p in parts]), torch.cat([p.likelihood for p in parts]))

    def joint_and_gradient(self, u: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Return log p(x, u), ``(C, N)``, and its gradient, ``(C, N, D)``, at most so many pairs at once."""
        values, gradients = [], []
        for first, part in self.chunks(u, most):
            with torch.enable_grad():
                part = part.detach().requires_grad_()
                value = self.log_densities(part, guide=False, first=first).joint
                gradients.append(gradient_of(value, part))
            values.append(value.detach())
        return torch.cat(values), torch.cat(gradients)

    def chunks(self, u: Tensor, most: int) -> Iterator[tuple[int, Tensor]]:
        """Yield (number of the first, points) for parts of at most so many (row, point) pairs, one point at least."""
        size = max(1, most // self.size)
        for first in range(0, len(u), size):
            yield first, u[first : first + size]

    def score_guide(self, pair: TermPair) -> dict[str, Tensor]:
        """Return log q at the values in a pair's trace, which keeps them: of each site, or of all under one name."""
        given = pair.trace
        if not self.single_site:
            with ExitStack() as stack:
                if self.enumerated:
                    stack.enter_context(poutine.enum(first_available_dim=pair.enum_dim))
                stack.enter_context(poutine.replay(trace=given))
                pair.guide()
        reducer = SiteReducer(pair, unscaled=True)
        log_q = {name: reducer.log_prob(site) for name, site in pair.row_latents().items()}
        if not self.enumerated:
            return log_q
        pair.trace = given
        return {"all latents": sum_out(list(log_q.values()), pair.enum_dim)}

    # -- inner --------------------------------------------------------------------------------------------------------

    def _check_sites(self, pair: TermPair) -> None:
        """Refuse latents that have no unconstrained coordinates, or densities that are of no row."""
        sites = pair.row_latents()
        if discrete := [n for n, s in sites.items() if getattr(s["fn"].support, "is_discrete", False)]:
            raise ValueError(
                f"{self.method} moves continuous latents, and {discrete[0]!r} is discrete: sum it out instead, by "
                "leaving it to the model alone"
            )
        reducer = SiteReducer(pair, unscaled=True)
        for site in sites.values():
            reducer.scale(site)  # raises for a site that is scaled or outside the plate "data"
        if len(sites) == 1:
            return

        again = self.pair(1)
        self.run_guide(again)
        for name, site in again.row_latents().items():
            bounds = zip(_bounds(site["fn"].support), _bounds(sites[name]["fn"].support), strict=True)
            if any(not torch.equal(one, other) for one, other in bounds):
                raise ValueError(
                    f"{self.method} needs latents of a fixed support, and that of {name!r} depends on another latent: "
                    "draw it from a distribution on a fixed interval, and transform it"
                )

    @torch.no_grad()
    def _normal_scores(self) -> dict[str, Transform]:
        """Return the bijections from standard Normal numbers to latents whose prior depends on no other latent."""
        one, other = self.pair(1).draw_prior(), self.pair(1).draw_prior()
        found: dict[str, Transform] = {}
        for name in self.transforms:
            if name not in one or name not in other:
                continue
            transform, again = normal_scores(one[name]["fn"]), normal_scores(other[name]["fn"])
            if transform is not None and again is not None and transform.same_parameters(again):
                found[name] = transform
        return found

    def _lay_out(self, sites: Mapping[str, dict[str, Any]]) -> None:
        """Find the shapes of the sites' coordinates, and the coordinates that count."""
        self._shapes: dict[str, tuple[torch.Size, torch.Size]] = {}  # site -> (plates, event) of its coordinates
        self._masks: dict[str, Tensor] = {}  # site -> whether it counts in a row and plate, (N, *plates)
        self.dimensions: dict[str, int] = {}
        for name, site in sites.items():
            fn = site["fn"]
            plates = fn.batch_shape[int(self.vectorize) : -1]
            event = self.transforms[name].inverse_shape(fn.batch_shape + fn.event_shape)[len(fn.batch_shape) :]
            self._shapes[name] = torch.Size(plates), torch.Size(event)
            self.dimensions[name] = math.prod(plates) * math.prod(event)
            mask = True if site["mask"] is None else site["mask"]
            mask = torch.as_tensor(mask, dtype=torch.bool, device=self.views.encode.device)
            self._masks[name] = mask.expand(fn.batch_shape).reshape(*plates, self.size).movedim(-1, 0)
        self.dimension = sum(self.dimensions.values())
        self.active = torch.cat([self._active_elements(name, size) for name, size in self.dimensions.items()], -1)

    def _active_elements(self, name: str, size: int) -> Tensor:
        """Return whether the elements of a site count, ``(N, size)``, size being a multiple of that of its plates."""
        mask = self._masks[name].flatten(1) if self._masks[name].dim() > 1 else self._masks[name][:, None]
        return mask.repeat_interleave(size // mask.shape[1], 1)

    def _check_scoring(self) -> None:
        """Refuse a story that draws while it is scored, whose density is random."""
        with torch.no_grad():
            u = self.guide_draws(2)
            state = generator_state(self.views.encode.device)
            self.log_densities(u, guide=False)
        if not torch.equal(state, generator_state(self.views.encode.device)):
            raise ValueError(
                f"{self.method} needs the density of the story, and this one draws while it is scored: a missing "
                "modality on which others depend, for instance. Make that a latent"
            )

    def _draws(self, num_draws: int, draw: Any) -> Tensor:
        shared = self._shared_at(0, num_draws)
        if self.vectorize:
            return self.flatten(draw(self.pair(num_draws), self._shared_trace(shared)))
        each = [self._shared_trace({n: x[c] for n, x in shared.items()}) for c in range(num_draws)]
        draws = [draw(self.pair(1), trace) for trace in each]
        return self.flatten({n: torch.stack([values[n] for values in draws]) for n in draws[0]})

    def _by_site(self, u: Tensor) -> SiteValues:
        """Return the coordinates of each site: ``(C, *plates, N, *event)`` from ``(C, N, D)``."""
        parts = u.split(list(self.dimensions.values()), -1)
        by_site = {}
        for (name, (plates, event)), x in zip(self._shapes.items(), parts, strict=True):
            by_site[name] = x.reshape(*x.shape[:2], *plates, *event).movedim(1, 1 + len(plates))
        return by_site

    def _score_points(self, latents: SiteValues, guide: bool, first: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """Return log q (or None), log p(z) and log p(x | z) of points, ``(C, N)`` each, without Jacobians."""
        num_points = len(next(iter(latents.values())))
        latents = latents | self._shared_at(first, num_points)
        if self.vectorize:
            return self._score(self.pair(num_points), latents, guide)
        each = [self._score(self.pair(1), {n: x[c] for n, x in latents.items()}, guide) for c in range(num_points)]
        log_q, log_prior, likelihood = zip(*each, strict=True)
        return torch.cat(log_q) if guide else None, torch.cat(log_prior), torch.cat(likelihood)

    def _score(self, pair: TermPair, latents: SiteValues, guide: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        pair.trace = self._trace.copy()
        for name, value in latents.items():
            pair.trace.nodes[name] = pair.trace.nodes[name] | {"value": value}
        pair.log_q = self.score_guide(pair) if guide else LazyMapping({})
        scores = score_model(pair, self.structure, unscaled=True)
        log_q = scores.log_proposal[:, 0] if guide else None
        likelihood = sum(scores.likelihood.values(), torch.zeros_like(scores.log_prior))
        return log_q, scores.log_prior[:, 0], likelihood[:, 0]


def _without(trace: Any, names: Sequence[str]) -> Any:
    """Return a trace without some sites."""
    trace = trace.copy()
    for name in names:
        trace.remove_node(name)
    return trace


def gradient_of(log_density: Tensor, u: Tensor) -> Tensor:
    """Return the gradient of log-densities ``(C, N)`` with respect to coordinates; zero where there is none."""
    if not log_density.requires_grad:
        return torch.zeros_like(u)
    (gradient,) = torch.autograd.grad(log_density.sum(), u, retain_graph=True, allow_unused=True)
    return torch.zeros_like(u) if gradient is None else gradient


def _bounds(support: Constraint) -> list[Tensor]:
    """Return the tensors that a support depends on, such as the bounds of an interval."""
    found: list[Tensor] = []
    for value in vars(support).values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Constraint):
            found += _bounds(value)
    return found
