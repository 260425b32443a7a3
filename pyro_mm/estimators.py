r"""Estimators of a bound and of its gradient, by draws from the guide.

All are ``pyro.infer.ELBO``\ s, so each serves alone in ``SVI`` or as the ``estimator`` of any objective, and all are
functions of one quantity, the log importance weights of :mod:`pyro_mm.scoring.importance`, per row.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pyro.infer import ELBO, RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor

from .batch.batch import Batch
from .distributions.base import gumbel
from .scoring.importance import score
from .scoring.program import Program
from .scoring.reduction import average
from .scoring.scores import Scores
from .scoring.structure import PairStructure, pair_structure
from .scoring.training_objective import Layout, Loss, PreparedObjective, StepWeights, plain_attributes
from .scoring.views import TermViews
from .utils.arguments import check_choice, check_counts, check_flags, check_number

Weight = float | Tensor | Mapping[str, float | Tensor]


class PerRow(ELBO, PreparedObjective):
    """A lower bound on every row's log-evidence, computed from the row's own log-weights.

    By itself it is an objective too: the bound on the log-evidence of what is present.

    Args:
        num_particles: K, the draws from the guide for every row.
        vectorize_particles: False runs them one after another, for stories that do not broadcast.
    """

    stratified: Literal["inside", "outside"] | None = None
    resample = False
    needs: tuple[str, ...] = ("pathwise", "enumerated")
    paths = False

    def __init__(self, num_particles: int = 1, *, vectorize_particles: bool = True):
        check_counts(num_particles=num_particles)
        check_flags(vectorize_particles=vectorize_particles)
        super().__init__(num_particles=num_particles)
        self.vectorize_particles = vectorize_particles

    def __repr__(self) -> str:
        return f"{type(self).__name__}(num_particles={self.num_particles})"

    def bound(self, scores: Scores, likelihood: Weight = 1.0, kl: Weight = 1.0) -> Tensor:
        """Return the bound of every term and row.

        Args:
            scores: log-densities of K particles, T terms and N rows.
            likelihood: weight of the log-likelihoods, or modality -> weight; each broadcasts to ``(T, N)``.
            kl: weight of log r - log q, which broadcasts to ``(T, N)``.

        Returns:
            ``(T, N)``, in nats.
        """
        raise NotImplementedError

    def scores(
        self, model: Program, guide: Program, views: TermViews, info: PairStructure, *, draws: bool = False
    ) -> Scores:
        """Draw the particles that :meth:`bound` needs.

        Args:
            model, guide: callables of a batch.
            views: the rows as T terms show them.
            info: the structure of the pair on such rows.
            draws: True to keep the values behind the scores in ``scores.draws``.

        Raises:
            ValueError: gradients are enabled, and the draws of a latent that only the model has have no derivative.
        """
        scores = score(
            model,
            guide,
            views,
            info,
            self.num_particles,
            vectorize=self.vectorize_particles,
            stratify=self.stratified is not None,
            paths=self.paths,
            resample=self.resample,
            draws=draws,
        )
        _check_derivatives(scores, info)
        return scores

    @property
    def estimator_name(self) -> str:
        return type(self).__name__

    @property
    def ignores_padding(self) -> bool:  # type: ignore[override]
        """True for the estimators of this module, whose bound is 0 in a row that weighs nothing."""
        return type(self) in (AnalyticKL, IWAE, Renyi, StickTheLanding, DReG)

    def evaluate(self, model: Program, guide: Program, batch: Batch, *, step: int | Tensor = 0) -> Loss:
        """Return minus the bound, summed over rows and scaled by the data plate."""
        if type(self).differentiable_loss is not PerRow.differentiable_loss:  # a subclass with a loss of its own
            return Loss(self.differentiable_loss(model, guide, batch))
        return Loss(self._loss(model, guide, batch))

    def _loss(self, model: Program, guide: Program, batch: Batch) -> Tensor:
        structure = pair_structure(model, guide, batch, self.stratified is not None)
        check_pairing(self, structure)
        scores = self.scores(model, guide, TermViews.of(batch, structure), structure)
        return -self.bound(scores).sum() * scores.factor

    def step_weights(self, names: tuple[str, ...], step: int) -> StepWeights:
        return StepWeights(form=plain_attributes(self))

    def layout(self, batch: Batch) -> Layout:
        return Layout(stacked=stacks_particles(self))

    # -- as a pyro.infer.ELBO ---------------------------------------------------------------------------------------

    def differentiable_loss(self, model: Program, guide: Program, batch: Batch) -> Tensor:
        """Return minus the bound, summed over rows and scaled by the data plate; differentiable."""
        return self._loss(model, guide, batch)

    def loss(self, model: Program, guide: Program, batch: Batch) -> float:
        """Return minus the bound, as a number."""
        with torch.no_grad():
            return self.evaluate(model, guide, batch).total.item()

    def loss_and_grads(self, model: Program, guide: Program, batch: Batch) -> float:
        """Return minus the bound, as a number, and add its gradient to the parameters'."""
        return self.evaluate_with_gradient(model, guide, batch, step=0).total.item()

    def _get_trace(self, *_: Any) -> Any:
        raise TypeError(f"{type(self).__name__} works on log-weights and has no traces of its own")


class AnalyticKL(PerRow):
    r"""The evidence lower bound with the KL of every latent site in closed form where one is known.

    .. math:: \frac1K \sum_k \log p(x \mid z_k) - KL(q \| r)

    A site whose KL has no closed form, any story with an enumerated site, and a guide that samples the model's
    sites in another order take the KL from the same K draws.

    Args:
        num_particles: K, the draws from the guide for every row.
        vectorize_particles: False runs them one after another, for stories that do not broadcast.

    References:
        Kingma & Welling 2014 (arXiv:1312.6114).
    """

    def bound(self, scores: Scores, likelihood: Weight = 1.0, kl: Weight = 1.0) -> Tensor:
        if "*" in scores.likelihood:  # an enumerated site is summed out, and so is its KL
            return average(weighted_log_ratio(scores, likelihood, kl))
        mean = average(_likelihood(scores, likelihood))
        return mean if _has_no_kl(scores, kl) else mean - kl * scores.kl()  # type: ignore[operator]


class IWAE(PerRow):
    r"""The importance-weighted bound, by reparameterised gradients.

    .. math:: \log \frac1K \sum_k w_k, \qquad w_k = p(x, z_k) / q(z_k \mid x)

    With K = 1 it is the evidence lower bound, by samples. For a mixture posterior :math:`q = \sum_c \pi_c q_c`,
    ``stratified`` draws K particles from every component c, always weighted by the whole mixture's density:

    * ``"inside"``: :math:`\log \sum_c \pi_c \frac1K \sum_k w_{ck}`, the tighter;
    * ``"outside"``: :math:`\sum_c \pi_c \log \frac1K \sum_k w_{ck}`, the "looser" bound of MMVAE's authors.

    If a guide has several mixtures, only the first is stratified. Its weights may depend on a latent drawn before it,
    and so differ between particles, except for ``"outside"``. Where a term encodes the prior, or a row has no mixture,
    there are C strata of K draws from the whole, each with weight 1 / C.

    ``resample`` scores the K particles without gradient, draws one of them by its normalised weight (one per component
    for ``"outside"``), and differentiates that one alone:

    .. math:: \nabla \log \frac1K \sum_k w_k = \sum_k \tilde w_k \nabla \log w_k = E_{k \sim \tilde w} \nabla \log w_k

    The value is the same; the gradient has the same mean and more variance. It takes K + 3 evaluations of the decoders
    in place of 3 K (a backward pass counts as two), so that where decoders dominate the cost there can be more
    particles in the same time. The chosen particle is scored a second time, which has to give the same result. Where it
    would not, all particles are differentiated, with a warning that gives the reason: dropout or batch normalisation in
    decoders (in training mode), a latent that only the model has, a missing modality that is the parent of another one.

    Args:
        num_particles: K, the draws from the guide for every row; of a stratified mixture from every component.
        stratified: ``"inside"`` or ``"outside"``, for a mixture posterior; None draws from the mixture as a whole.
        resample: True to differentiate one particle drawn by its weight in the place of all K.
        vectorize_particles: False runs them one after another, for stories that do not broadcast.

    Raises:
        TypeError, ValueError: an argument of another kind or outside of its range.

    References:
        Burda et al. 2016 (arXiv:1509.00519); Shi et al. 2019 (arXiv:1911.03393).
    """

    def __init__(
        self,
        num_particles: int = 10,
        *,
        stratified: Literal["inside", "outside"] | None = None,
        resample: bool = False,
        vectorize_particles: bool = True,
    ):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        check_flags(resample=resample)
        if stratified is not None:
            check_choice("stratified", stratified, ("inside", "outside"))
        if (stratified or resample) and not vectorize_particles:
            what = "stratified draws are" if stratified else "resampled draws are"
            raise ValueError(f"{what} made in one pass: vectorize_particles=False excludes them")
        self.stratified = stratified
        self.resample = resample

    def __repr__(self) -> str:
        stratified = f", stratified={self.stratified!r}" if self.stratified else ""
        resample = ", resample=True" if self.resample else ""
        return f"IWAE(num_particles={self.num_particles}{stratified}{resample})"

    def bound(self, scores: Scores, likelihood: Weight = 1.0, kl: Weight = 1.0) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and scores.rescore is None):
            log_w = weighted_log_ratio(scores, likelihood, kl)
            value = self._mean(log_w, scores.log_component)
        if scores.rescore is None:
            return value
        surrogate = self._resample(scores, log_w, likelihood, kl)
        return value + surrogate - surrogate.detach()

    def _mean(self, log_w: Tensor, log_share: Tensor | None) -> Tensor:
        """Return the bound ``(T, N)`` of log-weights and the log-weights of their strata, both ``(C K, T, N)``."""
        if log_share is None or self.stratified is None:
            return log_w.logsumexp(0) - math.log(len(log_w))
        # a stratum that is out of a row has weight zero there, and its particles must not reach the gradient
        log_w = log_w.masked_fill(log_share == -math.inf, 0.0)
        if self.stratified == "inside":
            return (log_w + log_share).logsumexp(0) - math.log(self.num_particles)
        each, share = self._strata(log_w, log_share)
        return (each * share).sum(0)

    def _strata(self, log_w: Tensor, log_share: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bound of each stratum, and its weight: both ``(C, T, N)``."""
        shape = (-1, self.num_particles, *log_w.shape[1:])
        each = log_w.reshape(shape).logsumexp(1) - math.log(self.num_particles)
        return each, log_share.reshape(shape)[:, 0].exp()

    def _resample(self, scores: Scores, log_w: Tensor, likelihood: Weight, kl: Weight) -> Tensor:
        """Return ``(T, N)`` whose gradient has the mean of the bound's, from one particle of each choice."""
        log_share = scores.log_component if self.stratified else None
        apart = self.stratified == "outside" and log_share is not None
        if log_share is not None:
            log_w = log_w.masked_fill(log_share == -math.inf, 0.0)
        choices = log_w.reshape(-1, self.num_particles, *log_w.shape[1:]) if apart else log_w[None]
        if log_share is not None and not apart:
            choices = choices + log_share.detach()
        chosen = (choices + gumbel(torch.rand_like(choices))).argmax(1)
        offset = torch.arange(len(chosen), device=chosen.device)[:, None, None] * choices.shape[1]
        some = scores.rescore(chosen + offset)  # type: ignore[misc]
        one = weighted_log_ratio(some, likelihood, kl)
        if log_share is None:
            return one[0]
        if not apart:
            return one[0] + some.log_component[0]  # type: ignore[index]
        each, share = self._strata(log_w, log_share)
        one = one.masked_fill(share == 0, 0.0)
        return (one * share.detach() + each.detach() * share).sum(0)


class Renyi(PerRow):
    r"""Rényi's variational bound of order alpha.

    .. math:: \frac{1}{1 - \alpha} \log \frac1K \sum_k w_k^{1 - \alpha}

    A lower bound for every alpha >= 0 (alpha = 0 is :class:`IWAE`); for alpha < 0 no bound at all. Unlike
    ``pyro.infer.RenyiELBO`` it keeps the scale of a subsampled plate outside of the logarithm.

    Args:
        alpha: the order, any number but 1.
        num_particles: K, the draws from the guide for every row.
        vectorize_particles: False runs them one after another, for stories that do not broadcast.

    Raises:
        ValueError: alpha is 1, where the bound is the evidence lower bound.

    References:
        Li & Turner 2016 (arXiv:1602.02311).
    """

    def __init__(self, alpha: float, num_particles: int = 10, *, vectorize_particles: bool = True):
        alpha = check_number("alpha", alpha)
        if alpha == 1:
            raise ValueError("alpha = 1 is the evidence lower bound itself: use IWAE(num_particles=1) or AnalyticKL()")
        super().__init__(num_particles, vectorize_particles=vectorize_particles)
        self.alpha = alpha

    def __repr__(self) -> str:
        return f"Renyi(alpha={self.alpha:g}, num_particles={self.num_particles})"

    def bound(self, scores: Scores, likelihood: Weight = 1.0, kl: Weight = 1.0) -> Tensor:
        power = 1 - self.alpha
        log_w = weighted_log_ratio(scores, likelihood, kl)
        return ((power * log_w).logsumexp(0) - math.log(self.num_particles)) / power


class StickTheLanding(PerRow):
    r"""The evidence lower bound by samples, without the score of q in its gradient.

    The value is :math:`\frac1K \sum_k \log w_k`; the gradient with respect to the guide's parameters is only that
    through the latent values, :math:`\partial \log w / \partial z \cdot dz / d\phi`. It vanishes, draw by draw,
    where the guide is the exact posterior. What it leaves out is :math:`-b \, \nabla_\phi \log q_\phi(z)` at z held
    fixed, whose mean is 0 whatever the weight b of the KL, so that no weight makes it biased.

    Args:
        num_particles: K, the draws from the guide for every row.
        vectorize_particles: False runs them one after another, for stories that do not broadcast.

    References:
        Roeder et al. 2017 (arXiv:1703.09194).
    """

    needs = ("pathwise",)
    paths = True

    def bound(self, scores: Scores, likelihood: Weight = 1.0, kl: Weight = 1.0) -> Tensor:
        log_w = weighted_log_ratio(scores, likelihood, kl)
        weight = torch.full_like(log_w, 1 / log_w.shape[0])
        return _path_gradient(scores, log_w.mean(0), weight, torch.ones_like(log_w), likelihood, kl)


class DReG(PerRow):
    r"""The importance-weighted bound with doubly reparameterised gradients.

    The value is that of :class:`IWAE`, :math:`L = \log \frac1K \sum_k w_k` with
    :math:`\log w = \ell + b (\log r - \log q)`, where :math:`\ell` is the weighted log-likelihood and b the weight of
    the KL (over that of the likelihood, where this is one number). With :math:`\tilde w_k = w_k / \sum_j w_j` held
    constant, the gradient is

    .. math:: \nabla_\theta: \sum_k \tilde w_k \nabla_\theta \log w_k, \qquad
              \nabla_\phi: \sum_k \tilde w_k \, (1 - b + b \tilde w_k) \,
              \frac{\partial \log w_k}{\partial z_k} \frac{d z_k}{d \phi},

    for b = 1 with :math:`\tilde w_k^2`; unbiased for every b, and for b = 1 zero draw by draw where the guide is the
    exact posterior. Where r is the guide given other modalities, :math:`\nabla_\theta` holds for its parameters too.

    Derivation. Through :math:`z_k = z(\epsilon_k, \phi)` and through q's own parameters,

    .. math:: \nabla_\phi E[L] = E \Big[ \sum_k \tilde w_k \frac{\partial \log w_k}{\partial z_k} \frac{d z_k}{d \phi}
              - b \sum_k \tilde w_k \nabla_\phi \log q_\phi(z_k) \big|_{z_k} \Big].

    For a function f of :math:`z_k` whose parameters are held fixed, the score-function gradient and the pathwise one
    have the same mean: :math:`E[f \, \nabla_\phi \log q_\phi(z_k)] = E[\partial f / \partial z_k \cdot d z_k / d\phi]`.
    With :math:`f = \tilde w_k` and :math:`\partial \tilde w_k / \partial z_k = \tilde w_k (1 - \tilde w_k) \,
    \partial \log w_k / \partial z_k` the second sum becomes
    :math:`-b \sum_k \tilde w_k (1 - \tilde w_k) \, \partial \log w_k / \partial z_k \cdot d z_k / d\phi`.

    z_k stands for all latents of particle k: a guide that samples a latent given another one is handled whole. The draw
    of one particle must not change the weight of another, as it does under batch normalisation over particles.

    Args:
        num_particles: K, the draws from the guide for every row.
        vectorize_particles: False runs them one after another, for stories that do not broadcast.

    References:
        Tucker et al. 2019 (arXiv:1810.04152), who have b = 1.
    """

    needs = ("pathwise",)
    paths = True

    def __init__(self, num_particles: int = 10, *, vectorize_particles: bool = True):
        super().__init__(num_particles, vectorize_particles=vectorize_particles)

    def bound(self, scores: Scores, likelihood: Weight = 1.0, kl: Weight = 1.0) -> Tensor:
        log_w = weighted_log_ratio(scores, likelihood, kl)
        value = log_w.logsumexp(0) - math.log(self.num_particles)
        weight = log_w.detach().softmax(0)
        path_weight = (1 - kl) + kl * weight  # type: ignore[operator]
        return _path_gradient(scores, value, weight, path_weight, likelihood, kl)


def stacks_particles(estimator: Any) -> bool:
    """Return True if an estimator draws its particles in one pass, to the left of the rows."""
    many = getattr(estimator, "num_particles", 1) > 1 or getattr(estimator, "stratified", None) is not None
    return bool(many and getattr(estimator, "vectorize_particles", False))


def weighted_log_ratio(scores: Scores, likelihood: Weight = 1.0, kl: Weight = 1.0) -> Tensor:
    """Return ``sum_m likelihood_m log p(x_m | z) + kl (log r(z) - log q(z))``, of shape ``(K, T, N)``.

    Args:
        scores: log-densities of K particles, T terms and N rows.
        likelihood: weight of the log-likelihoods, or modality -> weight; each broadcasts to ``(T, N)``.
        kl: weight of log r - log q, which broadcasts to ``(T, N)``.
    """
    weighted = _likelihood(scores, likelihood)
    return weighted if _has_no_kl(scores, kl) else weighted + kl * (scores.log_prior - scores.log_proposal)  # type: ignore[operator]


def _has_no_kl(scores: Scores, kl: Weight) -> bool:
    """Return True if the KL weighs nothing and could not be computed, since a latent has no density."""
    return bool(scores.deterministic) and isinstance(kl, int | float) and kl == 0


def check_pairing(estimator: ELBO, info: PairStructure) -> None:
    """Refuse an estimator that would be wrong, or silently not train, for the sites of a pair.

    Args:
        estimator: one of this module or of ``pyro.infer``.
        info: the structure of the pair.

    Raises:
        ValueError: naming the site and the reason.
    """
    name = type(estimator).__name__
    if isinstance(estimator, PerRow):
        for site, kind in info.latents.items():
            if kind not in estimator.needs:
                why = "has neither rsample nor enumeration" if kind == "score" else "is enumerated"
                raise ValueError(
                    f"{name} differentiates through the latent values, but guide site {site!r} {why}: "
                    "use pyro.infer.TraceGraph_ELBO or Trace_ELBO, or IWAE with the site enumerated"
                )
        if estimator.resample and info.enumerates:
            raise ValueError(
                "resample=True chooses among draws, and an enumerated site is summed out: use resample=False"
            )
        if isinstance(estimator, DReG) and estimator.num_particles > 1 and info.normalises:
            raise ValueError(
                f"{name} needs particles whose weights do not depend on each other, and batch normalisation (in "
                "training mode) of what depends on a latent mixes them: use IWAE, LayerNorm or GroupNorm, or eval()"
            )
        if estimator.stratified and info.strata is None:
            raise ValueError(
                f"stratified={estimator.stratified!r} needs a mixture posterior, and the guide has none with one draw "
                "per row (of a mixture inside a further plate each element chooses by itself)"
            )
        if estimator.stratified == "outside" and info.strata is not None and info.strata.varying:
            raise ValueError(
                f'stratified="outside" averages over the components of {info.strata.site!r}, whose weights '
                'depend on a latent drawn before it and so differ between particles: use "inside", or sample it first'
            )
    else:
        for site, discrete in info.model_only.items():
            if not discrete:
                raise ValueError(
                    f"latent site {site!r} is in the model only, where {name} would count the log-probability of a "
                    "draw from its prior: give the guide a site for it, or take an estimator of pyro_mm"
                )
            if isinstance(estimator, Trace_ELBO | TraceGraph_ELBO | RenyiELBO):
                raise ValueError(
                    f"discrete latent site {site!r} is in the model only, where {name} would draw it from its "
                    "prior and count its log-probability: pyro.infer.TraceEnum_ELBO, and IWAE of pyro_mm, sum it out"
                )
    if isinstance(estimator, RenyiELBO | TraceMeanField_ELBO):
        for site, kind in info.latents.items():
            if kind != "pathwise":
                raise ValueError(f"guide site {site!r} has no rsample, so {name} gives its parameters no gradient")


def _check_derivatives(scores: Scores, structure: PairStructure) -> None:
    """Refuse, or warn of, draws of the model that stop a gradient, as they have no derivative."""
    for name in scores.undifferentiated:
        if name in structure.model_only:
            raise ValueError(
                f"latent site {name!r} is in the model only, and its draws have no derivative with respect to the "
                "parameters of its distribution, which would get a wrong gradient: freeze these with "
                "requires_grad_(False), take a distribution with rsample, or one that can be enumerated"
            )
        warnings.warn(
            f"modality {name!r} is missing in some rows and the parent of another one, and its draws there have no "
            "derivative: what its probabilities depend on learns nothing through them. Make it a latent that is summed "
            "out, as models.Labelled does, for the whole gradient",
            stacklevel=4,
        )


def _likelihood(scores: Scores, weight: Weight) -> Tensor:
    if not scores.likelihood:
        return torch.zeros_like(scores.like)
    if isinstance(weight, Mapping):
        if "*" in scores.likelihood:
            raise ValueError(
                "a weight per modality cannot be given if an enumerated site is summed out of all modalities together: "
                "give one likelihood weight, or draw the site"
            )
        return sum(weight.get(name, 1.0) * x for name, x in scores.likelihood.items())  # type: ignore[return-value]
    return weight * sum(scores.likelihood.values())  # type: ignore[return-value]


def _path_gradient(
    scores: Scores, value: Tensor, weight: Tensor, path_weight: Tensor, likelihood: Weight, kl: Weight
) -> Tensor:
    r"""Return ``value`` with a gradient that is not its own:

    .. math:: \sum_k a_k (\nabla_\theta \log w_k + b_k \, \partial_z \log w_k \, dz_k / d\phi)

    Here a is ``weight`` and b is ``path_weight``, both ``(K, T, N)``. Through log q(z), only its derivatives with
    respect to the values z count, and not those with respect to q's parameters.
    """
    if not torch.is_grad_enabled():
        return value
    model_part = _likelihood(scores, likelihood)
    log_q = torch.zeros_like(model_part)
    if not _has_no_kl(scores, kl):
        model_part = model_part + kl * scores.log_prior  # type: ignore[operator]
        log_q = kl * scores.log_proposal  # type: ignore[operator]
    surrogate = (weight * model_part).sum(0)
    if scores.paths:
        sources = [source for path in scores.paths for source in path.sources]
        slopes = dict(zip(map(id, sources), _slopes(weight * log_q, sources), strict=True))
        of_model = _slopes(weight * model_part, [path.value for path in scores.paths])
        for path, h in zip(scores.paths, of_model, strict=True):
            z = path.value
            reduce = path.reduce
            g = sum(slopes[id(source)] for source in path.sources)
            # the surrogate passes h on to the guide already, with weight one
            surrogate = surrogate + ((path_weight - 1) * reduce(h * z) - path_weight * reduce(g * z)).sum(0)
    return value.detach() + surrogate - surrogate.detach()


def _slopes(total: Tensor, values: list[Tensor]) -> list[Tensor]:
    if not total.requires_grad:
        return [torch.zeros_like(z) for z in values]
    slopes = torch.autograd.grad(total.sum(), values, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(z) if s is None else s for s, z in zip(slopes, values, strict=True)]
