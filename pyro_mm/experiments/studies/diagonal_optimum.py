r"""The optimum of an objective under diagonal Gaussian posteriors of a linear-Gaussian story, in closed form.

Expectations over rows of the story, and over draws of :math:`q(z | x_S) = N(A_S x_S, \mathrm{diag}(d_S))`, are closed
forms of the model's loadings W, of :math:`A_S` and :math:`d_S` for every subset S, and of the covariance of the rows.
L-BFGS maximises them in float64. A gap that remains is due to the objective and the family of posteriors, not to
networks or their training.
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
    r"""Return the gap between the evidence of the truth and that of an objective's optimal loadings.

    Args:
        story: the story of the rows; its offsets have no effect.
        objective: ``"masked"``, uniform over all subsets; or ``"mixture bound"``, the mean over all of them of
            :math:`E_{q_S} \log p(x | z) - KL(q_S \| p)`.

    Returns:
        :math:`(\ell^* - \ell) / |\ell^*|` and :math:`\ell^*`, the mean of log p(x) over rows under the truth.

    If the posterior given every subset is diagonal, as with
    :func:`~pyro_mm.datasets.simulated.orthonormal_loadings`, the gap of the masked objective is 0: at the truth each of
    its terms is an evidence or a conditional evidence.

    References:
        Tipping & Bishop 1999, for the evidence.
    """
    reduced = []
    noise = 0.0
    for name, loadings in story.loadings.items():
        scale = story.log_noise[name].detach().exp().double()
        _, size, directions = torch.linalg.svd(loadings.detach().double() / scale, full_matrices=False)
        in_span = size > 1e-6 * size.max()
        reduced.append(size[in_span, None] * directions[in_span])
        # directions orthogonal to the loadings are noise under any model, and add a constant
        rest = len(loadings) - int(in_span.sum())
        noise += 0.5 * rest * (1 + math.log(2 * math.pi)) + len(loadings) * scale.log().item()
    problem = _Population(reduced)
    evidence = problem.evidence(problem.truth) - noise
    found = problem.evidence(problem.best(objective)) - noise
    return (evidence - found) / abs(evidence), evidence


class _Population:
    """The distribution of rows ``x = W z + e`` with unit noise, whose modalities are slices of x.

    Args:
        loadings: those of each modality, float64 ``(d_m, D)``.
    """

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
        """Return E log p(x) over the rows under loadings ``w``, ``(d, D)``."""
        model = w @ w.T + torch.eye(self.size, dtype=torch.float64)
        fit = torch.linalg.solve(model, self.covariance).trace() + torch.logdet(model)
        return -0.5 * float(fit + self.size * math.log(2 * math.pi))

    def best(self, objective: str) -> Tensor:
        """Return the loadings ``(d, D)`` that maximise an objective together with its posteriors."""
        w = self.truth.clone().requires_grad_()
        means = {}
        log_variances = {}
        for s in self.subsets:  # start from the posteriors of the truth
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
    """Return the closure that L-BFGS evaluates: minus the objective, with its gradients."""

    def closure() -> float:
        optimizer.zero_grad()
        loss = -total()
        loss.backward()
        return loss.item()

    return closure


class _Value:
    """The values of the objectives at given parameters.

    Args:
        population: the distribution of the rows.
        w: loadings ``(d, D)``.
        means: subset -> A_S, ``(D, d_S)``.
        log_variances: subset -> the logarithm of d_S, ``(D,)``.
    """

    def __init__(
        self, population: _Population, w: Tensor, means: dict[Subset, Tensor], log_variances: dict[Subset, Tensor]
    ):
        self.population = population
        self.w = w
        self.means = means
        self.log_variances = log_variances

    def masked(self) -> Tensor:
        """Return the masked objective, uniform over all subsets."""
        full = self.population.all
        parts = []
        for s in self.population.subsets:
            rest = tuple(m for m in full if m not in s)
            parts.append(self.likelihood(s, s) - self.kl(s) + self.likelihood(full, rest) - self.kl(full, s))
        return torch.stack(parts).mean()

    def mixture_bound(self) -> Tensor:
        """Return the mean over all subsets of the bound that each has on the evidence of all modalities."""
        return torch.stack(
            [self.likelihood(s, self.population.all) - self.kl(s) for s in self.population.subsets]
        ).mean()

    def likelihood(self, given: Subset, target: Subset) -> Tensor:
        """Return ``E log p(x_target | z)`` with z from the posterior given the subset ``given``."""
        i = self.population.rows[given]
        j = self.population.rows[target]
        s = self.population.covariance
        w = self.w[j]
        predicted = w @ self.means[given]
        error = s[j][:, j].trace() - 2 * (predicted * s[j][:, i]).sum() + (predicted @ s[i][:, i] * predicted).sum()
        spread = (w**2 * self.log_variances[given].exp()).sum()
        return -0.5 * (error + spread + len(j) * math.log(2 * math.pi))

    def kl(self, given: Subset, other: Subset | None = None) -> Tensor:
        """Return ``E KL(q(z | x_given) || q(z | x_other))``; with None the second is the prior."""
        weights = self.w.new_zeros(self.population.latent, self.population.size).index_add(
            1, self.population.rows[given], self.means[given]
        )
        log_ratio = self.log_variances[given]
        scale = torch.ones_like(log_ratio)
        if other is not None:
            weights = weights.index_add(1, self.population.rows[other], -self.means[other])
            log_ratio, scale = log_ratio - self.log_variances[other], self.log_variances[other].exp()
        apart = ((weights @ self.population.covariance) * weights).sum(1) / scale
        return 0.5 * (log_ratio.exp() + apart - 1 - log_ratio).sum()
