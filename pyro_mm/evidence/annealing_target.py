r"""The densities between a guide, or the prior, and the posterior: in unconstrained coordinates, with their slopes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import biject_to

from ..batch.batch import Batch
from ..batch.context import TermStack
from ..scoring.importance import score_model
from ..scoring.reduction import SiteReducer
from ..scoring.structure import Callback, latent_sites, pair_structure
from ..scoring.term_pair import TermPair
from ..scoring.views import TermViews
from ..utils.global_state import override_validation
from ..utils.seeding import generator_state

Values = dict[str, Tensor]


@dataclass
class ChainState:
    """Where C chains of N rows are: coordinates ``(C, .., N, ..)``, their log-densities ``(C, N)`` and gradients."""

    u: Values
    log_q: Tensor
    log_p: Tensor
    slope_q: Values
    slope_p: Values

    def energy(self, beta: Tensor) -> Tensor:
        r""":math:`-(1 - \beta) \log q_0(u) - \beta \log p(x, u)`, ``(C, N)``."""
        return -(1 - beta) * self.log_q - beta * self.log_p


class TemperedDensity:
    """log q_0(u) and log p(x, u) of a pair on the rows of a batch, u being its latents without their constraints.

    Raises:
        ValueError: a discrete latent in the guide, one that only the model has, or a story that draws as it is scored.
    """

    def __init__(
        self, model: Callback, guide: Callback, batch: Batch, start: Literal["guide", "prior"], vectorize: bool = True
    ):
        if start not in ("guide", "prior"):
            raise ValueError(f"expected start 'guide' or 'prior', got {start!r}")
        self.start, self.vectorize, self.info = start, vectorize, pair_structure(model, guide, batch)
        if lonely := [name for name, enumerable in self.info.model_only.items() if not enumerable]:
            raise ValueError(f"annealing moves the guide's latents, and it lacks {lonely[0]!r}, which the model has")
        view = batch.view({n: batch.presence(n) for n in batch.names}, TermStack({}), {}, batch.rows)
        self.views = TermViews(view, view, view, self.info.nesting, modalities=self.info.modalities)
        self.model, self.guide = model, guide
        pair = self._pair(1)
        with torch.no_grad():
            pair.guide()  # which leaves what the encoders say in the view's memory, without a graph
        sites = latent_sites(pair.trace)
        if discrete := [n for n, s in sites.items() if getattr(s["fn"].support, "is_discrete", False)]:
            raise ValueError(f"annealing moves continuous latents, and {discrete[0]!r} is discrete: sum it out instead")
        self.trace = pair.trace.copy()
        for plate in {"data", "particles"} & set(self.trace.nodes):
            self.trace.remove_node(plate)  # its index set, of another number of chains
        self.factorises = len(sites) == 1  # so that the guide's distributions need not be asked for again
        self.transforms = {n: biject_to(s["fn"].support) for n, s in sites.items()}
        self.inner = {n: len(s["fn"].batch_shape) - 1 - vectorize for n, s in sites.items()}  # plates within a row
        u = self.draws(2)
        before = generator_state(batch.device)
        self.masses = self._masses(u)
        if not torch.equal(before, generator_state(batch.device)):
            raise ValueError(
                "annealing needs the density of the story, and this one draws while it is scored: a missing modality "
                "on which others depend, for instance. Make that a latent"
            )

    def _masses(self, u: Values) -> Values:
        """1 for latents that a density depends on, 0 for those of empty rows and private ones of missing modalities.

        Nothing would hold these back, the least so where a constraint's Jacobian draws them outwards.
        """
        with torch.enable_grad(), override_validation(False):
            z = {n: t(u[n]).detach().requires_grad_() for n, t in self.transforms.items()}
            of_q, of_p = (_slopes(x, z) for x in self._scored(z))
        masses = {}
        for name, t in self.transforms.items():
            some = (of_q[name] != 0) | (of_p[name] != 0)
            some = some.flatten(some.dim() - t.codomain.event_dim).any(-1) if t.codomain.event_dim else some
            some = some.any(0).to(u[name].dtype)
            masses[name] = some.reshape(*some.shape, *[1] * t.domain.event_dim)
        return masses

    @torch.no_grad()
    def draws(self, num_chains: int) -> Values:
        """Coordinates of independent draws from q_0."""
        if self.vectorize:
            return self._free(self._drawn(self._pair(num_chains)))
        each = [self._drawn(self._pair(1)) for _ in range(num_chains)]
        return self._free({n: torch.stack([values[n] for values in each]) for n in each[0]})

    def state(self, values: Values, num_chains: int) -> Values:
        """The coordinates of one and the same draw of the latents for every chain."""
        placed = {}
        for name, transform in self.transforms.items():
            value = values[name]
            missing = self.inner[name] + 1 - (value.dim() - transform.codomain.event_dim)
            placed[name] = value.reshape(*[1] * missing, *value.shape).expand(
                num_chains, *[-1] * (missing + value.dim())
            )
        return self._free(placed)

    def at(self, u: Values) -> ChainState:
        """The state of chains at coordinates u."""
        with torch.enable_grad(), override_validation(False):  # a move may end anywhere, and is then rejected
            u = {n: x.detach().requires_grad_() for n, x in u.items()}
            z = {n: t(u[n]) for n, t in self.transforms.items()}
            jacobian = sum(self._rows(n, t.log_abs_det_jacobian(u[n], z[n])) for n, t in self.transforms.items())
            log_q, log_p = (x + jacobian for x in self._scored(z))
            slope_q, slope_p = _slopes(log_q, u), _slopes(log_p, u)
        return ChainState({n: x.detach() for n, x in u.items()}, log_q.detach(), log_p.detach(), slope_q, slope_p)

    def slope(self, at: ChainState, beta: Tensor) -> Values:
        """The gradient of a state's energy at the temperatures of its rows, zero for what does not move."""
        each = {n: self.spread(n, beta.expand(1, at.log_p.shape[-1])) for n in at.u}
        return {n: self.masses[n] * (-(1 - b) * at.slope_q[n] - b * at.slope_p[n]) for n, b in each.items()}

    def of_rows(self, name: str, x: Tensor, index: Tensor) -> Tensor:
        """Of every row the entry of x ``(G, .., N, ..)`` that index ``(N,)`` says: ``(.., N, ..)``."""
        dim = 1 + self.inner[name]
        rows = torch.arange(len(index), device=index.device)
        return x.movedim(dim, 1)[index, rows].movedim(0, dim - 1)

    def spread(self, name: str, x: Tensor) -> Tensor:
        """``(C, N)``, to broadcast with the coordinates of a site."""
        event = [1] * self.transforms[name].domain.event_dim
        return x.reshape(len(x), *[1] * self.inner[name], x.shape[-1], *event)

    def momenta(self, u: Values) -> Values:
        """A draw of momenta: standard normal, and zero of coordinates that no density depends on."""
        return {n: torch.randn_like(x) * self.masses[n] for n, x in u.items()}

    def kinetic(self, momenta: Values) -> Tensor:
        """Half the sum of the squared momenta of every chain and row, ``(C, N)``."""
        return sum(0.5 * self._rows(n, p.square()) for n, p in momenta.items())  # type: ignore[return-value]

    def where(self, moved: Tensor, new: ChainState, old: ChainState) -> ChainState:
        """The new state of the chains and rows that moved, and the old one of the others."""

        def pick(one: Values, other: Values) -> Values:
            return {n: torch.where(self.spread(n, moved), one[n], other[n]) for n in one}

        return ChainState(
            pick(new.u, old.u),
            torch.where(moved, new.log_q, old.log_q),
            torch.where(moved, new.log_p, old.log_p),
            pick(new.slope_q, old.slope_q),
            pick(new.slope_p, old.slope_p),
        )

    def _pair(self, num_chains: int) -> TermPair:
        return TermPair(self.model, self.guide, self.views, num_chains, plated=self.vectorize)

    def _drawn(self, pair: TermPair) -> Values:
        if self.start == "prior":
            drawn = pair.draw_prior()
            return {n: drawn[n]["value"] for n in self.transforms}
        pair.guide()
        return {n: s["value"] for n, s in latent_sites(pair.trace).items()}

    def _free(self, values: Values) -> Values:
        return {n: t.inv(values[n]) for n, t in self.transforms.items()}

    def _rows(self, name: str, x: Tensor) -> Tensor:
        """Sums all dimensions of ``(C, .., N, ..)`` but those of chains and rows."""
        return x.movedim(1 + self.inner[name], 1).reshape(x.shape[0], x.shape[1 + self.inner[name]], -1).sum(-1)

    def _scored(self, z: Values) -> tuple[Tensor, Tensor]:
        """log q_0(z) and log p(x, z), ``(C, N)`` each."""
        chains = len(next(iter(z.values())))
        if self.vectorize:
            return self._scored_by(self._pair(chains), z)
        each = [self._scored_by(self._pair(1), {n: x[c] for n, x in z.items()}) for c in range(chains)]
        log_q, log_p = zip(*each, strict=True)
        return torch.cat(log_q), torch.cat(log_p)

    def _scored_by(self, pair: TermPair, z: Values) -> tuple[Tensor, Tensor]:
        pair.trace = self.trace.copy()
        for name, value in z.items():
            pair.trace.nodes[name] = pair.trace.nodes[name] | {"value": value}
        if self.start == "guide":
            if not self.factorises:
                with poutine.replay(trace=pair.trace):
                    pair.guide()
            shape = SiteReducer(pair)
            pair.log_q = {name: shape.log_prob(site) for name, site in latent_sites(pair.trace).items()}
        scores = score_model(pair, self.info, unscaled=True)
        log_q = scores.log_proposal if self.start == "guide" else scores.log_prior
        return log_q[:, 0], sum(scores.likelihood.values(), scores.log_prior)[:, 0]


def _slopes(total: Tensor, u: Values) -> Values:
    grads = torch.autograd.grad(total.sum(), list(u.values()), retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(u.items(), grads, strict=True)}
