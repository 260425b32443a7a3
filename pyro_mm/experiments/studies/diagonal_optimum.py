r"""What the best diagonal Gaussian posteriors make of a linear-Gaussian story, without networks, data or noise.

Expectations over rows drawn from the story, and over draws of :math:`q(z | x_S) = N(A_S x_S, \mathrm{diag}(d_S))`, are
closed forms of the loadings W of the model, of :math:`A_S` and :math:`d_S` for every subset S, and of the covariance
of the rows; their maximum is found by L-BFGS in float64. What is left of a gap there is of the objective and of the
family, and none of a network or of its training.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, pairwise

import torch
from torch import Tensor

from ...models import LinearGaussian

Subset = tuple[int, ...]
ITERATIONS = 4000


def diagonal_optimum(story: LinearGaussian, objective: str) -> tuple[float, float]:
    r"""The loadings that an objective is highest for, by how much their evidence lies below the truth's.

    Args:
        story: what rows are drawn from; its offsets count for nothing.
        objective: ``"masked"``, uniform over all subsets; or ``"mixture bound"``, the mean over all of them of
            :math:`E_{q_S} \log p(x | z) - KL(q_S \| p)`.

    Returns:
        :math:`(\ell^* - \ell) / |\ell^*|` and :math:`\ell^*`, the mean of log p(x) over rows under the truth.

    Where the posterior given every subset is diagonal, as with
    :func:`~pyro_mm.datasets.simulated.orthonormal_loadings`, the masked objective's is 0: at the truth each of its
    terms is an evidence or a conditional evidence. Tipping & Bishop 1999 for the evidence.
    """
    reduced, noise = [], 0.0
    for name, loadings in story.loadings.items():
        scale = story.log_noise[name].detach().exp().double()
        _, size, directions = torch.linalg.svd(loadings.detach().double() / scale, full_matrices=False)
        kept = size > 1e-6 * size.max()
        reduced.append(size[kept, None] * directions[kept])
        # what is orthogonal to the loadings is noise to any model, and a constant
        rest = len(loadings) - int(kept.sum())
        noise += 0.5 * rest * (1 + math.log(2 * math.pi)) + len(loadings) * scale.log().item()
    problem = _Population(reduced)
    evidence = problem.evidence(problem.truth) - noise
    found = problem.evidence(problem.best(objective)) - noise
    return (evidence - found) / abs(evidence), evidence


class _Population:
    """Rows ``x = W z + e`` of unit noise, whose modalities are slices of x."""

    def __init__(self, loadings: list[Tensor]):
        self.truth = torch.cat(loadings)
        self.size, self.latent = self.truth.shape
        self.covariance = self.truth @ self.truth.T + torch.eye(self.size, dtype=torch.float64)
        starts = torch.tensor([0, *(len(w) for w in loadings)]).cumsum(0).tolist()
        self.all = tuple(range(len(loadings)))
        self.subsets: list[Subset] = [s for k in range(len(loadings) + 1) for s in combinations(self.all, k)]
        rows = [torch.arange(a, b) for a, b in pairwise(starts)]
        self.rows = {s: torch.cat([torch.arange(0), *(rows[m] for m in s)]) for s in self.subsets}

    def evidence(self, w: Tensor) -> float:
        model = w @ w.T + torch.eye(self.size, dtype=torch.float64)
        fit = torch.linalg.solve(model, self.covariance).trace() + torch.logdet(model)
        return -0.5 * (fit + self.size * math.log(2 * math.pi)).item()

    def best(self, objective: str) -> Tensor:
        w = self.truth.clone().requires_grad_()
        means, log_variances = {}, {}
        for s in self.subsets:  # from the truth's own posteriors
            seen = self.truth[self.rows[s]]
            precision = torch.eye(self.latent, dtype=torch.float64) + seen.T @ seen
            means[s] = torch.linalg.solve(precision, seen.T).contiguous().requires_grad_()
            log_variances[s] = (-precision.diagonal().log()).requires_grad_()
        value = _Value(self, w, means, log_variances)
        total = {"masked": value.masked, "mixture bound": value.mixture_bound}[objective]
        optimizer = torch.optim.LBFGS(
            [w, *means.values(), *log_variances.values()],
            max_iter=ITERATIONS,
            history_size=50,
            line_search_fn="strong_wolfe",
            tolerance_grad=1e-8,
            tolerance_change=1e-12,
        )
        optimizer.step(_closure(optimizer, total))
        return w.detach()


def _closure(optimizer: torch.optim.Optimizer, total: Callable[[], Tensor]) -> Callable[[], float]:
    def closure() -> float:
        optimizer.zero_grad()
        loss = -total()
        loss.backward()
        return loss.item()

    return closure


class _Value:
    """The objectives at one set of parameters."""

    def __init__(self, of: _Population, w: Tensor, means: dict[Subset, Tensor], log_variances: dict[Subset, Tensor]):
        self.of, self.w, self.means, self.log_variances = of, w, means, log_variances

    def masked(self) -> Tensor:
        full, parts = self.of.all, []
        for s in self.of.subsets:
            rest = tuple(m for m in full if m not in s)
            parts.append(self.likelihood(s, s) - self.kl(s) + self.likelihood(full, rest) - self.kl(full, s))
        return torch.stack(parts).mean()

    def mixture_bound(self) -> Tensor:
        return torch.stack([self.likelihood(s, self.of.all) - self.kl(s) for s in self.of.subsets]).mean()

    def likelihood(self, given: Subset, target: Subset) -> Tensor:
        """``E log p(x_target | z)``, z from the posterior given other rows of x."""
        i, j = self.of.rows[given], self.of.rows[target]
        s, w = self.of.covariance, self.w[j]
        predicted = w @ self.means[given]
        error = s[j][:, j].trace() - 2 * (predicted * s[j][:, i]).sum() + (predicted @ s[i][:, i] * predicted).sum()
        spread = (w**2 * self.log_variances[given].exp()).sum()
        return -0.5 * (error + spread + len(j) * math.log(2 * math.pi))

    def kl(self, given: Subset, other: Subset | None = None) -> Tensor:
        """``E KL(q(z | x_given) || q(z | x_other))``, or to the prior."""
        weights = self.w.new_zeros(self.of.latent, self.of.size).index_add(1, self.of.rows[given], self.means[given])
        log_ratio = self.log_variances[given]
        scale = torch.ones_like(log_ratio)
        if other is not None:
            weights = weights.index_add(1, self.of.rows[other], -self.means[other])
            log_ratio, scale = log_ratio - self.log_variances[other], self.log_variances[other].exp()
        apart = ((weights @ self.of.covariance) * weights).sum(1) / scale
        return 0.5 * (log_ratio.exp() + apart - 1 - log_ratio).sum()
