r"""Normals fitted to the posteriors of many rows at once, from gradients of their log-densities alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .spectra import clamp_eigenvalues, clamp_singular_values, widen_singular_values

Target = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Points ``(C, N, D)`` -> (log-densities of the rows there ``(C, N)``, gradients ``(C, N, D)``)."""

State = tuple[Tensor, Tensor, Tensor, Tensor]
"""Means ``(S, N, D)``, scales, mean whitened gradients, and whitened Hessians of the log-density there."""

FIRST_RADIUS = 0.5  # of a step of the mean, in units of sqrt(D) deviations; its largest value is 1
RADIUS_GROWTH = 1.4  # of the radius after a round that did not make the bound worse
# where the density is quadratic as far as the bound tells, steps may be longer
FAST_GROWTH = 4.0
LARGEST_FAST_RADIUS = 4.0
PREDICTED_SHARE = (0.8, 1.25)  # of the gain that a quadratic density would give
NARROW = 0.3  # deviations that several Normals start with, in units of the guide's
LARGEST_FALL = 3.0  # nats by which a round may lower the bound below the row's best before it is taken back
CURVATURE_RANGE = (0.25, 100.0)  # of the whitened precision in one round
LEAST_CURVATURE = 0.05  # of it in the step of the mean, where the scale is diagonal
WIDENED_DIMENSIONS = 20
DEVIATION_RANGE = (1e-6, 1.1)  # in units of the prior's deviations, which are estimates


@dataclass(frozen=True)
class RowNormals:
    r"""Mixtures of S Normals with full covariance, one mixture for each of N rows.

    .. math:: q_n(u) = \sum_s \pi_{sn} N(u; \mu_{sn}, L_{sn} L_{sn}^\top)

    over the coordinates that are active in the row. The others are drawn, too, and have no density.

    Attributes:
        mean: ``(S, N, D)``.
        scale_tril: L, lower triangular, ``(S, N, D, D)``.
        log_weights: log pi, ``(S, N)``.
        active: boolean ``(N, D)``.
    """

    mean: Tensor
    scale_tril: Tensor
    log_weights: Tensor
    active: Tensor

    def log_prob(self, u: Tensor) -> Tensor:
        """Return log q at points ``(K, N, D)``, ``(K, N)``."""
        return (self.component_log_probs(u) + self.log_weights[:, None]).logsumexp(0)

    def component_log_probs(self, u: Tensor) -> Tensor:
        """Return the log-density of each Normal at points ``(K, N, D)``, ``(S, K, N)``."""
        white = torch.einsum("snij,sknj->skni", self._inverse, u - self.mean[:, None])
        squares = torch.where(self.active, white, 0.0).square().sum(-1)
        return self._log_norm[:, None] - 0.5 * squares

    def transform(self, noise: Tensor, component: Tensor) -> Tensor:
        """Return draws ``(K, N, D)`` from standard normal noise ``(K, N, D)`` and components, long ``(K, N)``."""
        draws = torch.empty_like(noise)
        for s, (mean, scale) in enumerate(zip(self.mean, self.scale_tril, strict=True)):
            own = mean + torch.einsum("nij,knj->kni", scale, noise)
            draws = own if s == 0 else torch.where((component == s)[..., None], own, draws)
        return draws

    @cached_property
    def _inverse(self) -> Tensor:
        identity = torch.eye(self.mean.shape[-1], dtype=self.mean.dtype, device=self.mean.device)
        inverse: Tensor = torch.linalg.solve_triangular(
            self.scale_tril, identity.expand_as(self.scale_tril), upper=False
        )
        return inverse

    @cached_property
    def _log_norm(self) -> Tensor:
        """The log-density at the mean, ``(S, N)``."""
        log_scales = self.scale_tril.diagonal(dim1=-2, dim2=-1).log() + 0.5 * math.log(2 * math.pi)
        return -torch.where(self.active, log_scales, 0.0).sum(-1)


@dataclass(frozen=True)
class NormalFit:
    """Settings of the fit of Normals to rows.

    Args:
        rounds: T, successive improvements.
        draws: M, points per round at which the gradient is taken, half as many in the first half of the rounds; None
            for max(64, 2 D); rounded up to a multiple of four, as they come in pairs.
        components: S, Normals per row.
        widen: the share by which the directions that the data determine are widened at the end.
        diagonal: True for the best Normals with diagonal covariance, False for full covariance.
        settle: True to shorten the steps of the second half, one after another, which averages their noise, in rows
            that have arrived: for a fit that is a result by itself.
    """

    rounds: int = 8
    draws: int | None = None
    components: int = 1
    widen: float = 0.15
    diagonal: bool = False
    settle: bool = False

    def draws_for(self, dimension: int) -> int:
        """Return M for D coordinates."""
        draws = max(64, 2 * dimension) if self.draws is None else self.draws
        return -(-draws // 4) * 4


@dataclass(frozen=True)
class FittedRows:
    """Normals fitted to rows.

    Attributes:
        normals: the Normals, weighted by halves: equally, and by the bounds on the evidence that they attain.
        failed: rows in which no finite density was found, and whose Normal is the start, boolean ``(N,)``.
        gradients: gradients per row that the fit has taken.
    """

    normals: RowNormals
    failed: Tensor
    gradients: int


def fit_row_normals(
    target: Target, guide_draws: Tensor, prior_deviation: Tensor, active: Tensor, settings: NormalFit
) -> FittedRows:
    r"""Fit Normals to the densities of N rows.

    It maximises :math:`E[\log p(\mu + L \epsilon)] + \log |L|` over :math:`\mu` and :math:`L`, by Newton steps whose
    Hessian is that of a regression of whitened gradients :math:`\gamma = L^\top g` on the noise :math:`\epsilon`.
    By Stein's lemma :math:`E[\gamma \epsilon^\top] = L^\top E[\nabla^2 \log p] L`.

    Args:
        target: the log-densities of the rows, up to a constant, and their gradients.
        guide_draws: points from which the fit starts, ``(G, N, D)``.
        prior_deviation: the standard deviations of the prior, ``(N, D)``, which no fitted one exceeds.
        active: the coordinates that the densities depend on, boolean ``(N, D)``. The others stay at the start.
        settings: the settings of the fit.

    References:
        Salimans & Knowles 2013, "Fixed-form variational posterior approximation through stochastic linear regression",
        Bayesian Analysis 8:837. Opper & Archambeau 2009, "The variational Gaussian approximation revisited", Neural
        Computation 21:786.
    """
    start, deviation = _start(target, guide_draws, prior_deviation, settings.components)
    pinned = _pin_inactive(target, start[0], deviation, active)
    fit = _Fit(start, torch.diag_embed(deviation.expand_as(start)), prior_deviation, settings.diagonal)
    rounds = _schedule(settings, start.shape[-1])
    for index, (num_draws, ridge) in enumerate(rounds):
        fit.step_share = 1 / max(1, index - len(rounds) // 2 + 2) if settings.settle else 1.0
        fit.improve(pinned, _antithetic_directions(num_draws, start), ridge)

    failed = ~(fit.found_density & fit.finite)
    mean = torch.where(failed[..., None], start, fit.mean)
    scale = torch.where(failed[..., None, None], torch.diag_embed(deviation.expand_as(start)), fit.scale)
    scale = _widened(scale, prior_deviation, settings.widen)
    mean, scale_tril = _apart(mean, scale, start, deviation, active)
    weights = 0.5 * fit.best_bound.softmax(0).nan_to_num(1.0) + 0.5 / settings.components
    log_weights = (weights / weights.sum(0)).log()
    gradients = settings.components * sum(num_draws for num_draws, _ in rounds)
    return FittedRows(RowNormals(mean, scale_tril, log_weights, active), failed.all(0), gradients)


class _Fit:
    """State of the fit of S Normals to N rows, and the best state so far of each."""

    def __init__(self, mean: Tensor, scale: Tensor, prior_deviation: Tensor, diagonal: bool = False):
        self.mean = mean
        self.scale = scale
        self.prior_deviation = prior_deviation
        self.diagonal = diagonal
        self.step_share = 1.0  # of a Newton step that is taken
        self.largest_radius = math.sqrt(mean.shape[-1])
        self.radius = torch.full_like(mean[..., 0], FIRST_RADIUS * math.sqrt(mean.shape[-1]))
        self.last_bound = torch.full_like(self.radius, -math.inf)
        self.predicted_gain = torch.zeros_like(self.radius)
        self.best: State | None = None
        self.best_bound = torch.full_like(self.radius, -math.inf)

    @property
    def found_density(self) -> Tensor:
        """Rows in which a round has found a finite bound, boolean ``(S, N)``."""
        return self.best_bound > -math.inf

    @property
    def finite(self) -> Tensor:
        """Rows whose present state is finite, boolean ``(S, N)``."""
        return self.mean.isfinite().all(-1) & self.scale.isfinite().flatten(-2).all(-1)

    def improve(self, target: Target, noise: Tensor, ridge: float) -> None:
        """Make one round: estimate gradient and Hessian at the present Normals, and take a Newton step.

        Args:
            target: the log-densities and their gradients.
            noise: ``(M, D)``, of mean 0.
            ridge: the weight of the Hessian -I, that of the present Normals, in draws.
        """
        num_components = len(self.mean)
        points = self.mean + torch.einsum("snij,mj->msni", self.scale, noise)
        value, gradient = target(points.flatten(0, 1))
        value = value.unflatten(0, (-1, num_components))
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0).unflatten(0, (-1, num_components))

        log_scale = torch.linalg.slogdet(self.scale)[1]
        bound = (value.mean(0) + log_scale).nan_to_num(-math.inf, -math.inf, -math.inf)
        white = torch.einsum("snij,msni->msnj", self.scale, gradient)
        mean_gradient = white.mean(0)
        hessian = _regressed_hessian(white - mean_gradient, noise, ridge)
        mean_gradient, hessian = self._take_back_worse(bound, mean_gradient, hessian)
        self._step(mean_gradient, hessian)

    def _take_back_worse(self, bound: Tensor, gradient: Tensor, hessian: Tensor) -> tuple[Tensor, Tensor]:
        """Return to the best state in rows where the bound has fallen far below its own, and adapt the radius."""
        now = (self.mean, self.scale, gradient, hessian)
        if self.best is None:
            self.best, self.best_bound, self.last_bound = now, bound, bound
            return gradient, hessian
        worse = ~(bound >= self.best_bound - LARGEST_FALL)
        share = (bound - self.last_bound) / self.predicted_gain
        quadratic = (share > PREDICTED_SHARE[0]) & (share < PREDICTED_SHARE[1]) & (self.predicted_gain > 1)
        fast = (FAST_GROWTH * self.radius).clamp(max=LARGEST_FAST_RADIUS * self.largest_radius)
        grown = torch.where(quadratic, fast, (RADIUS_GROWTH * self.radius).clamp(max=self.largest_radius))
        self.last_bound = torch.where(worse, self.best_bound, bound)
        self.radius = torch.where(worse, 0.5 * self.radius, grown)
        now = _where_rows(worse, self.best, now)
        self.best = _where_rows(bound > self.best_bound, now, self.best)
        self.best_bound = torch.maximum(bound, self.best_bound)
        self.mean, self.scale, gradient, hessian = now
        return gradient, hessian

    def _step(self, gradient: Tensor, hessian: Tensor) -> None:
        """Take a Newton step of the mean, within the radius, and set the scale by the Hessian."""
        # a diagonal scale leaves directions in which the density is far flatter than along the axes
        least = LEAST_CURVATURE if self.diagonal else CURVATURE_RANGE[0]
        curvature = clamp_eigenvalues(-hessian, least, CURVATURE_RANGE[1])
        root, _ = torch.linalg.cholesky_ex(curvature)
        step = torch.cholesky_solve(gradient[..., None], root)[..., 0]
        length = step.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(step.dtype).tiny)
        step = step * (self.radius[..., None] / length).clamp(max=1.0)
        # a row whose step ends at the radius is still on its way
        step = torch.where(length > self.radius[..., None], 1.0, self.step_share) * step

        by_mean = (gradient * step + 0.5 * step * _apply(hessian, step)).sum(-1)
        self.mean = self.mean + _apply(self.scale, step)
        if self.diagonal:
            own = -hessian.diagonal(dim1=-2, dim2=-1)
            narrowing = own.clamp(*CURVATURE_RANGE)
            self.predicted_gain = by_mean + 0.5 * (own * (1 - 1 / narrowing) - narrowing.log()).sum(-1)
            relative = self.scale.diagonal(dim1=-2, dim2=-1) * narrowing.rsqrt() / self.prior_deviation
            self.scale = torch.diag_embed(self.prior_deviation * relative.clamp(*DEVIATION_RANGE))
            return

        kept = torch.cholesky_solve(-hessian, root)  # the whitened precision, as narrowing by the root leaves it
        traces = (-hessian - kept).diagonal(dim1=-2, dim2=-1).sum(-1)
        self.predicted_gain = by_mean + 0.5 * traces - root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        narrowed = torch.linalg.solve_triangular(root.mT, self.scale, upper=True, left=False)
        relative = narrowed / self.prior_deviation[..., None]
        self.scale = self.prior_deviation[..., None] * clamp_singular_values(relative, *DEVIATION_RANGE)


def _start(target: Target, guide_draws: Tensor, prior_deviation: Tensor, components: int) -> tuple[Tensor, Tensor]:
    """Return means ``(S, N, D)`` and deviations ``(N, D)`` from which the fit starts.

    One Normal starts as wide as the guide around its mean. Several start from draws of the guide that lie far apart,
    and narrow, so that each goes to a mode of its own.
    """
    draws = torch.where(guide_draws.isfinite(), guide_draws, 0.0)
    deviation = draws.std(0)
    deviation = torch.where(deviation > 0, deviation, prior_deviation)
    if components == 1:
        return draws.mean(0, keepdim=True), torch.minimum(deviation, prior_deviation)

    value = target(draws)[0].nan_to_num(-math.inf, -math.inf, -math.inf)
    best = value.topk(max(components, len(draws) // 4), dim=0).indices
    rows = torch.arange(draws.shape[1], device=draws.device)
    candidates = draws[best, rows]
    chosen = [candidates[0]]
    distance = torch.full_like(value[: len(best)], math.inf)
    for _ in range(components - 1):
        squares = ((candidates - chosen[-1]) / deviation).square().sum(-1)
        distance = torch.minimum(distance, squares)
        chosen.append(candidates[distance.argmax(0), rows])
    return torch.stack(chosen), NARROW * torch.minimum(deviation, prior_deviation)


def _pin_inactive(target: Target, mean: Tensor, deviation: Tensor, active: Tensor) -> Target:
    """Give the inactive coordinates a Normal of their own to fit: the start, which they then stay at."""

    def pinned(points: Tensor) -> tuple[Tensor, Tensor]:
        value, gradient = target(points)
        white = torch.where(active, 0.0, (points - mean) / deviation)
        return value - 0.5 * white.square().sum(-1), torch.where(active, gradient, -white / deviation)

    return pinned


def _antithetic_directions(num_draws: int, like: Tensor) -> Tensor:
    """Return M normal vectors in pairs of opposite signs, orthogonal to each other in groups of D, ``(M, D)``."""
    dimension = like.shape[-1]
    half = num_draws // 2
    groups = -(-half // dimension)
    normal = torch.randn(groups, dimension, dimension, dtype=like.dtype, device=like.device)
    directions = torch.linalg.qr(normal)[0]
    lengths = torch.randn_like(normal).norm(dim=-1, keepdim=True)
    noise = (directions * lengths).flatten(0, 1)[:half]
    return torch.cat([noise, -noise])


def _schedule(settings: NormalFit, dimension: int) -> list[tuple[int, float]]:
    """Return the number of draws of each round, and the weight of the present Hessian in it.

    The first half of the rounds comes near on half the draws. In the second half the weight grows, which makes the
    result an average over rounds.
    """
    num_draws = settings.draws_for(dimension)
    early = settings.rounds // 2
    rounds = [(num_draws // 2, dimension / 2)] * early
    return rounds + [(num_draws, (dimension + num_draws * late) / 2) for late in range(1, settings.rounds - early + 1)]


def _regressed_hessian(white: Tensor, noise: Tensor, ridge: float) -> Tensor:
    """Return the mean Hessian in whitened coordinates, ``(S, N, D, D)``, by a regression towards -I.

    Args:
        white: whitened gradients without their mean, ``(M, S, N, D)``.
        noise: ``(M, D)``.
        ridge: the weight of -I, in draws.
    """
    dimension = noise.shape[-1]
    identity = torch.eye(dimension, dtype=noise.dtype, device=noise.device)
    inverse = torch.linalg.inv(noise.mT @ noise + ridge * identity)
    cross = torch.einsum("msni,mj->snij", white + noise[:, None, None], noise)
    change = cross @ inverse
    symmetric: Tensor = 0.5 * (change + change.mT) - identity
    return symmetric


def _widened(scale: Tensor, prior_deviation: Tensor, widen: float) -> Tensor:
    r"""Widen every principal deviation s, in units of the prior's, by :math:`1 + a (1 - s^2)`.

    Here a is ``widen``, and more in fewer than 20 dimensions, where width costs less.
    """
    if not widen:
        return scale
    a = widen * max(1.0, (WIDENED_DIMENSIONS / scale.shape[-1]) ** 0.5)
    return prior_deviation[..., None] * widen_singular_values(scale / prior_deviation[..., None], a)


def _apart(mean: Tensor, scale: Tensor, start: Tensor, deviation: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the triangular scale, with inactive coordinates exactly at the start and independent."""
    triangle = torch.linalg.qr(scale.mT, mode="r")[1].mT
    triangle = triangle * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    both = active[..., None] & active[..., None, :]
    return torch.where(active, mean, start[0]), torch.where(both, triangle, torch.diag_embed(deviation))


def _apply(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _where_rows(rows: Tensor, one: State, other: State) -> State:
    """Return one state in the rows ``(S, N)`` that are True, and the other elsewhere."""
    mean, scale, gradient, hessian = (
        torch.where(rows.reshape(*rows.shape, *[1] * (x.dim() - 2)), x, y) for x, y in zip(one, other, strict=True)
    )
    return mean, scale, gradient, hessian
