r"""The densities between a guide, or the prior, and the posterior, in unconstrained coordinates with gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.context import TermStack
from ..sampling.fitted_proposal import fit_posteriors
from ..sampling.row_normals import NormalFit
from ..sampling.unconstrained import UnconstrainedPair, gradient_of
from ..sampling.weighted import BlockSizes
from ..scoring.program import Program
from ..scoring.structure import pair_structure
from ..scoring.views import TermViews
from ..utils.arguments import check_choice
from ..utils.global_state import override_validation

Start = Literal["guide", "prior", "fitted"]
STARTS = ("guide", "prior", "fitted")


@dataclass
class ChainState:
    """Coordinates of C chains for each of N rows, with their log-densities and gradients.

    Attributes:
        u: unconstrained coordinates, ``(C, N, D)``.
        log_q, log_p: log q_0(u) and log p(x, u), Jacobians included, ``(C, N)``, in nats.
        gradient_q, gradient_p: their gradients, ``(C, N, D)``.
    """

    u: Tensor
    log_q: Tensor
    log_p: Tensor
    gradient_q: Tensor
    gradient_p: Tensor

    @property
    def log_ratio(self) -> Tensor:
        """The log-ratio log p(x, u) - log q_0(u), ``(C, N)``, which a change of temperature weighs."""
        return self.log_p - self.log_q

    def energy(self, beta: Tensor) -> Tensor:
        r"""Return :math:`-(1 - \beta) \log q_0(u) - \beta \log p(x, u)`, ``(C, N)``; beta is ``(N,)``."""
        return -(1 - beta) * self.log_q - beta * self.log_p

    def energy_gradient(self, beta: Tensor) -> Tensor:
        """Return the gradient of the energy at the rows' temperatures, ``(N,)`` or one for all, ``(C, N, D)``."""
        return -(1 - beta)[..., None] * self.gradient_q - beta[..., None] * self.gradient_p

    def select(self, accepted: Tensor, old: ChainState) -> ChainState:
        """Return this state in the chains and rows that are accepted, boolean ``(C, N)``, and the old one elsewhere."""
        each = accepted[..., None]
        return ChainState(
            torch.where(each, self.u, old.u),
            torch.where(accepted, self.log_q, old.log_q),
            torch.where(accepted, self.log_p, old.log_p),
            torch.where(each, self.gradient_q, old.gradient_q),
            torch.where(each, self.gradient_p, old.gradient_p),
        )


class TemperedDensity(UnconstrainedPair):
    r"""The path of densities :math:`q_0(u)^{1 - \beta} p(x, u)^\beta` of a pair, for each row of a batch.

    u are the guide's latents in unconstrained coordinates (:class:`UnconstrainedPair`).

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        start: the density q_0 at beta = 0: the guide, the model's prior, or a Normal that is fitted to each row here.
        vectorize: True to score all chains in one run of the model.

    Attributes:
        num_gradients: evaluations of the model's gradient so far, per row.

    Raises:
        ValueError: a discrete latent in the guide, one that only the model has, or a story that draws as it is scored.
    """

    def __init__(self, model: Program, guide: Program, batch: Batch, start: Start, vectorize: bool = True):
        check_choice("start", start, STARTS)
        self.start = start
        structure = pair_structure(model, guide, batch)
        view = batch.view({n: batch.presence(n) for n in batch.names}, TermStack({}), {}, batch.rows)
        views = TermViews(view, view, view, structure.nesting, modalities=structure.modalities)
        views = views.given_globals(structure)
        super().__init__(model, guide, views, structure, vectorize)
        self.num_gradients = 0
        if start == "fitted":
            with torch.no_grad():
                fitted = fit_posteriors(self, NormalFit(), BlockSizes().pairs_to_decode(batch))
            self.normals = fitted.normals
            self.num_gradients = fitted.gradients

    def initial_draws(self, num_chains: int) -> Tensor:
        """Return coordinates of independent draws from q_0, ``(C, N, D)``, each given latents that all rows share."""
        self.draw_shared(num_chains)
        if self.start == "prior":
            return self.prior_draws(num_chains)
        if self.start == "guide":
            return self.guide_draws(num_chains)
        mean = self.normals.mean[0]
        noise = torch.randn(num_chains, *mean.shape, dtype=mean.dtype, device=mean.device)
        return self.normals.transform(noise, noise.new_zeros(noise.shape[:2], dtype=torch.long))

    def state_at(self, u: Tensor) -> ChainState:
        """Return the state of chains at coordinates ``(C, N, D)``; gradients are zero where no density depends."""
        self.num_gradients += len(u)
        with torch.enable_grad(), override_validation(False):
            u = u.detach().requires_grad_()
            densities = self.log_densities(u, guide=self.start == "guide")
            log_p = densities.joint
            if self.start == "fitted":
                log_q = self.normals.log_prob(u)
            else:
                log_q = densities.prior if densities.guide is None else densities.guide
            gradient_q, gradient_p = gradient_of(log_q, u), gradient_of(log_p, u)
        return ChainState(u.detach(), log_q.detach(), log_p.detach(), gradient_q, gradient_p)
