"""Priors that are trained, or that depend on a covariate: modules whose ``forward(batch)`` is a distribution."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..distributions.flow import flow_distribution
from ..distributions.mixture import Mixture
from ..utils.arguments import check_flag, check_head, check_integer, check_name, describe
from ..utils.network_calls import apply_network

__all__ = ["Component", "Flow", "GivenCovariate", "MixturePrior"]


class MixturePrior(nn.Module):
    r"""A trainable mixture of K Gaussians, diagonal along the axes of z or along trainable ones.

    .. math:: p(z) = \sum_{c=1}^K \pi_c N(A^{-1} z; \mu_c, \mathrm{diag}(\sigma_c^2)) \, |\det A|^{-1}

    with :math:`\log\pi`, :math:`\mu` and :math:`\log\sigma` as parameters. Initially the weights are equal, the scales
    are 1, A is I, and the centres are drawn from N(0, 1), so that the components differ.

    Args:
        components: K.
        latent: the dimensions D of z.
        mixing: True to train A, whose columns are the axes; False for A = I. If a decoder begins with an affine map,
            both are the same model: A only determines which coordinates are the sources :math:`s = A^{-1} z`, and lets
            z turn to axes that suit the posterior.

    Raises:
        TypeError: an argument of another type.
        ValueError: a number below 1.

    Example:
        >>> import torch, pyro_mm as mm
        >>> prior = mm.priors.MixturePrior(components=3, latent=2)
        >>> p = prior(mm.Batch({"x": torch.zeros(5, 1)}))
        >>> p.batch_shape, p.event_shape, p.num_components
        (torch.Size([]), torch.Size([2]), 3)

    References:
        Dilokthanakul et al. 2016 (arXiv:1611.02648); Hirt et al. 2024 (arXiv:2309.00380).
    """

    def __init__(self, components: int, latent: int, mixing: bool = False):
        super().__init__()
        check_integer("components", components, least=1)
        check_integer("latent", latent, least=1)
        check_flag("mixing", mixing)
        self.logits = nn.Parameter(torch.zeros(components))
        self.loc = nn.Parameter(torch.randn(components, latent))
        self.log_scale = nn.Parameter(torch.zeros(components, latent))
        self.mixing = nn.Parameter(torch.eye(latent)) if mixing else None

    def forward(self, batch: Batch) -> dist.Distribution:
        """Return p(z), of batch shape ``()`` and event shape ``(D,)``."""
        sources = Mixture(self.components(), self.logits.log_softmax(-1))
        return (
            sources
            if self.mixing is None
            else _TransformedMixture(sources, [_Linear(self.mixing)], validate_args=False)
        )

    def components(self) -> dist.TorchDistribution:
        """Return the distribution of the sources s in each component: batch shape ``(K,)``, event shape ``(D,)``."""
        return dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(1)

    def sources(self, z: Tensor) -> Tensor:
        """Return the sources :math:`s = A^{-1} z`.

        Args:
            z: ``(.., D)``.

        Returns:
            ``(.., D)``.
        """
        return z if self.mixing is None else _Linear(self.mixing).inv(z)


class Component(nn.Module):
    r"""The distribution of a label that states the mixture component of its row's latent, by Bayes' rule.

    .. math:: p(u | z) = \frac{\pi_u N(s; \mu_u, \mathrm{diag}(\sigma_u^2))}
                              {\sum_c \pi_c N(s; \mu_c, \mathrm{diag}(\sigma_c^2))}, \qquad s = A^{-1} z

    It is the decoder of the label in a story whose prior is the mixture: then p(u, z, x) is
    :math:`p(u) p(z | u) \prod_m p(x_m | z)` for rows with a label, and its sum over u for others, which is the
    conditional prior of an identifiable model with labels that may be missing. A network in its place would leave the
    axes of z to p(z) alone.

    Args:
        prior: the :class:`MixturePrior` of the story. Labels are integers below its K.

    Raises:
        TypeError: another prior.

    Example:
        >>> import torch, pyro_mm as mm
        >>> prior = mm.priors.MixturePrior(components=3, latent=2)
        >>> decoders = {"x": mm.conditionals.Normal(mm.nn.MLP(2, 20)), "label": mm.priors.Component(prior)}
        >>> model = mm.models.SharedLatent(prior, decoders)
        >>> batch = mm.Batch({"x": torch.zeros(5, 10), "label": torch.zeros(5).long()})
        >>> mm.simulate(model, batch)[0]["label"].shape
        torch.Size([5])

    References:
        Khemakhem et al. 2020 (iVAE, arXiv:1907.04809); Hirt et al. 2024 (arXiv:2309.00380).
    """

    def __init__(self, prior: MixturePrior):
        super().__init__()
        if not isinstance(prior, MixturePrior):
            raise TypeError(f"expected prior to be a MixturePrior, got {describe(prior)}")
        self.prior = prior

    def forward(self, z: Tensor) -> dist.Distribution:
        """Return p(u | z): a Categorical of K classes and batch shape ``(..)`` for z ``(.., D)``."""
        log_densities = self.prior.components().log_prob(self.prior.sources(z)[..., None, :])
        return dist.Categorical(logits=self.prior.logits + log_densities, validate_args=False)


class _Linear(torch.distributions.Transform):
    """The linear map of a vector by an invertible matrix."""

    domain = codomain = torch.distributions.constraints.real_vector
    bijective = True

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.matrix = matrix

    def _call(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T

    def _inverse(self, y: Tensor) -> Tensor:
        inverse: Tensor = y @ torch.linalg.inv(self.matrix).T
        return inverse

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        log_det: Tensor = torch.linalg.slogdet(self.matrix).logabsdet.expand(x.shape[:-1])
        return log_det


class _TransformedMixture(dist.TransformedDistribution):
    """A linearly transformed distribution, whose mean is the transformed mean."""

    @property
    def mean(self) -> Tensor:
        mean: Tensor = self.transforms[0](self.base_dist.mean)
        return mean


class Flow(nn.Module):
    r"""A trainable normalising flow as the prior of a latent.

    .. math:: z = f^{-1}(u), \quad u \sim N(0, I), \qquad p(z) = N(f(z); 0, I) \, |\det \partial f / \partial z|

    Its divergence from a posterior has no closed form, so that estimators with KLs in closed form (``AnalyticKL``)
    estimate this one by draws. A flow that depends on a covariate is
    ``GivenCovariate(name, conditionals.Flow(net, flow))``.

    Args:
        flow: a flow of :mod:`zuko` without a context, such as ``zuko.flows.NSF(features=D)``. Of the posterior's draws
            it computes the density in one pass; draws from an autoregressive flow take D passes, from coupling layers
            one (:class:`~pyro_mm.conditionals.Flow`).

    Raises:
        TypeError: no module.
        ValueError: a module that gives no distribution of zuko by itself, such as a flow with a context.

    Example:
        >>> import torch, pyro_mm as mm
        >>> from pyro_mm.utils.global_state import import_zuko  # leaves the checks of other distributions on
        >>> zuko = import_zuko()
        >>> prior = mm.priors.Flow(zuko.flows.MAF(features=2, transforms=2))
        >>> p = prior(mm.Batch({"x": torch.zeros(5, 1)}))
        >>> p.batch_shape, p.event_shape
        (torch.Size([]), torch.Size([2]))

    References:
        Rezende & Mohamed 2015 (arXiv:1505.05770); Chen et al. 2017 (arXiv:1611.02731).
    """

    def __init__(self, flow: nn.Module):
        super().__init__()
        if not isinstance(flow, nn.Module):
            raise TypeError(f"expected flow to be a flow of zuko, such as zuko.flows.NSF(2), got {describe(flow)}")
        self.flow = flow
        try:
            with torch.no_grad():
                d = flow_distribution(flow(), self._dtype())
                d.log_prob(d.sample())  # zuko builds its transformations only here
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"expected flow to be a flow of zuko without a context, got {type(flow).__name__}. One that depends on "
                "a covariate goes into a conditionals.Flow, and that into GivenCovariate"
            ) from error

    def forward(self, batch: Batch) -> dist.Distribution:
        """Return p(z), of batch shape ``()`` and event shape ``(D,)``."""
        return flow_distribution(self.flow(), self._dtype())

    def _dtype(self) -> torch.dtype:
        """Return the dtype of the flow's parameters."""
        floats = (p.dtype for p in self.flow.parameters() if p.is_floating_point())
        return next(floats, torch.get_default_dtype())


class GivenCovariate(nn.Module):
    r"""The prior p(z | u) given a covariate: with it z is identifiable up to permutation and scaling.

    Args:
        name: the covariate u of the batch, ``(N, *event)``.
        conditional: module mapping u to a distribution of batch shape ``(N,)`` and event shape ``(D,)``, such as
            ``conditionals.Normal(nn.Embedding(classes, 2 * D))`` for an auxiliary label. If its signature has a
            parameter ``covariates``, it gets all of them by keyword.

    Raises:
        TypeError: a name or a module of another kind.
        ValueError: when called with a batch without that covariate.

    Example:
        >>> import torch, pyro_mm as mm
        >>> prior = mm.priors.GivenCovariate("site", mm.conditionals.Normal(torch.nn.Embedding(3, 2 * 2)))
        >>> batch = mm.Batch({"x": torch.zeros(5, 1)}, covariates={"site": torch.tensor([0, 1, 2, 0, 1])})
        >>> prior(batch).batch_shape, prior(batch).event_shape
        (torch.Size([5]), torch.Size([2]))

    References:
        Khemakhem et al. 2020 (iVAE, arXiv:1907.04809); Hirt et al. 2024 (arXiv:2309.00380).
    """

    def __init__(self, name: str, conditional: nn.Module):
        super().__init__()
        self.name = check_name("name", name, what="covariate")
        self.conditional = check_head("conditional", conditional, "covariate")

    def forward(self, batch: Batch) -> dist.Distribution:
        """Return p(z | u), of batch shape ``(N,)``."""
        covariate = batch.covariate(self.name, "the prior")
        keywords = batch.head_keywords(self.conditional, "the conditional of GivenCovariate")
        return apply_network(f"covariate {self.name!r}", self.conditional, covariate, keywords)
