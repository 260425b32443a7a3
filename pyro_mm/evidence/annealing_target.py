r"""The densities between a guide, or the prior, and the posterior, in unconstrained coordinates with gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from ..batch.batch import Batch
from ..batch.context import TermStack
from ..sampling.ancestral import SiteValues
from ..scoring.importance import score_model
from ..scoring.reduction import SiteReducer
from ..scoring.structure import Callback, latent_sites, pair_structure
from ..scoring.term_pair import TermPair
from ..scoring.views import TermViews
from ..utils.global_state import override_validation
from ..utils.seeding import generator_state


@dataclass
class ChainState:
    """Coordinates of C chains for each of N rows, with their log-densities and gradients.

    Attributes:
        u: site -> unconstrained coordinates, ``(C, *plates, N, *event)``.
        log_q, log_p: log q_0(u) and log p(x, u), Jacobians included, ``(C, N)``, in nats.
        gradient_q, gradient_p: site -> their gradients, of the shape of the coordinates.
    """

    u: SiteValues
    log_q: Tensor
    log_p: Tensor
    gradient_q: SiteValues
    gradient_p: SiteValues

    @property
    def log_ratio(self) -> Tensor:
        """The log-ratio log p(x, u) - log q_0(u), ``(C, N)``, which a change of temperature weighs."""
        return self.log_p - self.log_q

    def energy(self, beta: Tensor) -> Tensor:
        r"""Return :math:`-(1 - \beta) \log q_0(u) - \beta \log p(x, u)`, ``(C, N)``; beta is ``(N,)``."""
        return -(1 - beta) * self.log_q - beta * self.log_p


class TemperedDensity:
    r"""The path of densities :math:`q_0(u)^{1 - \beta} p(x, u)^\beta` of a pair, for each row of a batch.

    u are the guide's latents, transformed to unconstrained coordinates by ``torch.distributions.biject_to``.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        start: the density q_0 at beta = 0, the guide or the model's prior.
        vectorize: True to score all chains in one run of the model.

    Attributes:
        transforms: site -> bijection from its coordinates to its support.
        movable: site -> 1 for coordinates that a density depends on, 0 for others, ``(*plates, N, 1, ..)``.

    Raises:
        ValueError: a discrete latent in the guide, one that only the model has, or a story that draws as it is scored.
    """

    def __init__(
        self, model: Callback, guide: Callback, batch: Batch, start: Literal["guide", "prior"], vectorize: bool = True
    ):
        if start not in ("guide", "prior"):
            raise ValueError(f"expected start 'guide' or 'prior', got {start!r}")
        self.model, self.guide = model, guide
        self.start = start
        self.vectorize = vectorize
        self.structure = pair_structure(model, guide, batch)
        if unknown := [name for name, enumerable in self.structure.model_only.items() if not enumerable]:
            raise ValueError(
                f"annealing moves the guide's latents, and the guide lacks {unknown[0]!r}, a latent of the model: "
                "give the guide a site for it"
            )

        view = batch.view({n: batch.presence(n) for n in batch.names}, TermStack({}), {}, batch.rows)
        self.views = TermViews(view, view, view, self.structure.nesting, modalities=self.structure.modalities)
        pair = self._pair(1)
        with torch.no_grad():
            pair.guide()  # which leaves the encoders' outputs in the view's cache, without a graph
        sites = latent_sites(pair.trace)
        if discrete := [n for n, s in sites.items() if getattr(s["fn"].support, "is_discrete", False)]:
            raise ValueError(f"annealing moves continuous latents, and {discrete[0]!r} is discrete: sum it out instead")

        self._trace = pair.trace.copy()
        for plate in {"data", "particles"} & set(self._trace.nodes):
            self._trace.remove_node(plate)  # its index set, of another number of chains
        self._single_site = len(sites) == 1  # whose distribution depends on no other latent, and is kept
        self.transforms = {n: biject_to(s["fn"].support) for n, s in sites.items()}
        self._num_plates = {n: len(s["fn"].batch_shape) - 1 - vectorize for n, s in sites.items()}  # within a row

        u = self.initial_draws(2)
        state = generator_state(batch.device)
        self.movable = self._movable(u)
        if not torch.equal(state, generator_state(batch.device)):
            raise ValueError(
                "annealing needs the density of the story, and this one draws while it is scored: a missing modality "
                "on which others depend, for instance. Make that a latent"
            )

    @torch.no_grad()
    def initial_draws(self, num_chains: int) -> SiteValues:
        """Return coordinates of independent draws from q_0: site -> ``(C, *plates, N, *event)``."""
        if self.vectorize:
            return self._unconstrain(self._draw(self._pair(num_chains)))
        draws = [self._draw(self._pair(1)) for _ in range(num_chains)]
        return self._unconstrain({n: torch.stack([values[n] for values in draws]) for n in draws[0]})

    def coordinates_of(self, latents: Mapping[str, Tensor], num_chains: int) -> SiteValues:
        """Return the coordinates of one draw of the latents, repeated for each chain.

        Args:
            latents: site -> ``(*plates, N, *event)``.
            num_chains: C.
        """
        repeated = {}
        for name, transform in self.transforms.items():
            value = latents[name]
            missing = self._num_plates[name] + 1 - (value.dim() - transform.codomain.event_dim)
            value = value.reshape(*[1] * missing, *value.shape)
            repeated[name] = value.expand(num_chains, *[-1] * value.dim())
        return self._unconstrain(repeated)

    def state_at(self, u: SiteValues) -> ChainState:
        """Return the state of chains at coordinates u: site -> ``(C, *plates, N, *event)``."""
        with torch.enable_grad(), override_validation(False):  # a move may end anywhere, and is then rejected
            u = {n: x.detach().requires_grad_() for n, x in u.items()}
            z = {n: t(u[n]) for n, t in self.transforms.items()}
            jacobian = sum(self.sum_per_row(n, t.log_abs_det_jacobian(u[n], z[n])) for n, t in self.transforms.items())
            log_q, log_p = (x + jacobian for x in self._log_densities(z))
            gradient_q, gradient_p = _gradients(log_q, u), _gradients(log_p, u)
        u = {n: x.detach() for n, x in u.items()}
        return ChainState(u, log_q.detach(), log_p.detach(), gradient_q, gradient_p)

    def energy_gradient(self, state: ChainState, beta: Tensor) -> SiteValues:
        """Return the gradient of a state's energy at the rows' temperatures ``(N,)``; zero for fixed coordinates."""
        gradients = {}
        for name in state.u:
            b = self.expand_rows(name, beta.expand(1, state.log_p.shape[-1]))
            gradient = -(1 - b) * state.gradient_q[name] - b * state.gradient_p[name]
            gradients[name] = self.movable[name] * gradient
        return gradients

    def select(self, accepted: Tensor, new: ChainState, old: ChainState) -> ChainState:
        """Return the new state of the chains and rows that are accepted, boolean ``(C, N)``, else the old one."""

        def pick(one: SiteValues, other: SiteValues) -> SiteValues:
            return {n: torch.where(self.expand_rows(n, accepted), one[n], other[n]) for n in one}

        return ChainState(
            pick(new.u, old.u),
            torch.where(accepted, new.log_q, old.log_q),
            torch.where(accepted, new.log_p, old.log_p),
            pick(new.gradient_q, old.gradient_q),
            pick(new.gradient_p, old.gradient_p),
        )

    # -- shapes -------------------------------------------------------------------------------------------------------

    def expand_rows(self, name: str, x: Tensor) -> Tensor:
        """Reshape ``(C, N)`` to broadcast with the coordinates of a site, ``(C, *plates, N, *event)``."""
        event = [1] * self.transforms[name].domain.event_dim
        return x.reshape(len(x), *[1] * self._num_plates[name], x.shape[-1], *event)

    def sum_per_row(self, name: str, x: Tensor) -> Tensor:
        """Sum ``(C, *plates, N, ..)``, as the coordinates of a site, over all dimensions but chains and rows."""
        rows_dim = 1 + self._num_plates[name]
        return x.movedim(rows_dim, 1).reshape(x.shape[0], x.shape[rows_dim], -1).sum(-1)

    def select_per_row(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        """Select entry ``index[n]`` of dimension 0 for each row n.

        Args:
            name: of a site.
            x: ``(G, *plates, N, *event)``.
            index: ``(N,)``, long.

        Returns:
            ``(*plates, N, *event)``.
        """
        rows_dim = 1 + self._num_plates[name]
        rows = torch.arange(len(index), device=index.device)
        return x.movedim(rows_dim, 1)[index, rows].movedim(0, rows_dim - 1)

    # -- densities ----------------------------------------------------------------------------------------------------

    def _movable(self, u: SiteValues) -> SiteValues:
        """Return 1 for coordinates that a density depends on, and 0 for others.

        These are the latents of empty rows and the private ones of missing modalities. No force would hold them back,
        least of all where a constraint's Jacobian pushes them outwards.
        """
        with torch.enable_grad(), override_validation(False):
            z = {n: t(u[n]).detach().requires_grad_() for n, t in self.transforms.items()}
            gradient_q, gradient_p = (_gradients(x, z) for x in self._log_densities(z))
        movable = {}
        for name, t in self.transforms.items():
            depends = (gradient_q[name] != 0) | (gradient_p[name] != 0)
            if t.codomain.event_dim:
                depends = depends.flatten(depends.dim() - t.codomain.event_dim).any(-1)
            depends = depends.any(0).to(u[name].dtype)
            movable[name] = depends.reshape(*depends.shape, *[1] * t.domain.event_dim)
        return movable

    def _pair(self, num_chains: int) -> TermPair:
        return TermPair(self.model, self.guide, self.views, num_chains, plated=self.vectorize)

    def _draw(self, pair: TermPair) -> SiteValues:
        """Draw latents from q_0."""
        if self.start == "prior":
            prior = pair.draw_prior()
            return {n: prior[n]["value"] for n in self.transforms}
        pair.guide()
        return {n: s["value"] for n, s in latent_sites(pair.trace).items()}

    def _unconstrain(self, latents: SiteValues) -> SiteValues:
        return {n: t.inv(latents[n]) for n, t in self.transforms.items()}

    def _log_densities(self, z: SiteValues) -> tuple[Tensor, Tensor]:
        """Return log q_0(z) and log p(x, z), ``(C, N)`` each, without Jacobians."""
        num_chains = len(next(iter(z.values())))
        if self.vectorize:
            return self._score(self._pair(num_chains), z)
        chains = [self._score(self._pair(1), {n: x[c] for n, x in z.items()}) for c in range(num_chains)]
        log_q, log_p = zip(*chains, strict=True)
        return torch.cat(log_q), torch.cat(log_p)

    def _score(self, pair: TermPair, z: SiteValues) -> tuple[Tensor, Tensor]:
        pair.trace = self._trace.copy()
        for name, value in z.items():
            pair.trace.nodes[name] = pair.trace.nodes[name] | {"value": value}
        if self.start == "guide":
            if not self._single_site:
                with poutine.replay(trace=pair.trace):
                    pair.guide()
            reducer = SiteReducer(pair)
            pair.log_q = {name: reducer.log_prob(site) for name, site in latent_sites(pair.trace).items()}

        scores = score_model(pair, self.structure, unscaled=True)
        log_q = scores.log_proposal if self.start == "guide" else scores.log_prior
        return log_q[:, 0], sum(scores.likelihood.values(), scores.log_prior)[:, 0]


def _gradients(log_density: Tensor, u: SiteValues) -> SiteValues:
    """Return the gradient of log-densities ``(C, N)`` with respect to each site's coordinates; zero if none."""
    gradients = torch.autograd.grad(log_density.sum(), list(u.values()), retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(u.items(), gradients, strict=True)}
