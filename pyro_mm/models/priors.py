"""Priors that are learned, or that depend on a covariate: modules whose ``forward(batch)`` is a distribution."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..distributions.mixture import Mixture
from ..utils.arguments import check_flag, check_function, check_integer, check_name, describe
from ..utils.network_calls import apply_network

__all__ = ["Component", "GivenCovariate", "MixturePrior"]


class MixturePrior(nn.Module):
    r"""A learned mixture of diagonal Gaussians, along the axes of z or along learned ones.

    .. math:: p(z) = \sum_{c=1}^K \pi_c N(A^{-1} z; \mu_c, \mathrm{diag}(\sigma_c^2)) \, |\det A|^{-1}

    with :math:`\log\pi`, :math:`\mu` and :math:`\log\sigma` as parameters. At first the weights are equal, the scales
    1, A is I and the centres are drawn from N(0, 1), so that the components are told apart.

    Args:
        components: K.
        latent: the dimensions of z.
        mixing: whether A is learned too; else it is I. Where a decoder begins with an affine map the two are one and
            the same model: A only says which coordinates are the sources, :math:`s = A^{-1} z`, and lets z turn to
            the axes that suit the posterior.

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
        sources = Mixture(self.components(), self.logits.log_softmax(-1))
        return sources if self.mixing is None else _Mixed(sources, [_Linear(self.mixing)], validate_args=False)

    def components(self) -> dist.TorchDistribution:
        """What the sources s are drawn from, of batch shape ``(K,)``."""
        return dist.Normal(self.loc, self.log_scale.exp(), validate_args=False).to_event(1)

    def sources(self, z: Tensor) -> Tensor:
        """:math:`s = A^{-1} z`, of the same shape."""
        return z if self.mixing is None else _Linear(self.mixing).inv(z)


class Component(nn.Module):
    r"""The likelihood of a label that names the component of its row's latent: by Bayes' rule, without a network.

    .. math:: p(u | z) = \frac{\pi_u N(s; \mu_u, \mathrm{diag}(\sigma_u^2))}
                              {\sum_c \pi_c N(s; \mu_c, \mathrm{diag}(\sigma_c^2))}, \qquad s = A^{-1} z

    With it as the label's decoder beside its prior a story is :math:`p(u) p(z | u) \prod_m p(x_m | z)` for rows with a
    label and without: the conditional prior of an identifiable model, whose label may be missing. A network in its
    place leaves the axes of z to the shape of p(z) alone.

    Args:
        prior: the :class:`MixturePrior` of the story; labels are integers below its K.

    Khemakhem et al. 2020 (iVAE, arXiv:1907.04809); Hirt et al. 2024 (arXiv:2309.00380).
    """

    def __init__(self, prior: MixturePrior):
        super().__init__()
        if not isinstance(prior, MixturePrior):
            raise TypeError(f"expected prior to be a MixturePrior, got {describe(prior)}")
        self.prior = prior

    def forward(self, z: Tensor) -> dist.Distribution:
        each = self.prior.components().log_prob(self.prior.sources(z)[..., None, :])
        return dist.Categorical(logits=self.prior.logits + each, validate_args=False)


class _Linear(torch.distributions.Transform):
    domain = codomain = torch.distributions.constraints.real_vector
    bijective = True

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.matrix = matrix

    def _call(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T

    def _inverse(self, y: Tensor) -> Tensor:
        return y @ torch.linalg.inv(self.matrix).T

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.slogdet(self.matrix).logabsdet.expand(x.shape[:-1])


class _Mixed(dist.TransformedDistribution):
    @property
    def mean(self) -> Tensor:
        return self.transforms[0](self.base_dist.mean)


class GivenCovariate(nn.Module):
    r"""The prior of an identifiable story, p(z | u): what makes z known up to permutation and scaling.

    Args:
        name: the covariate u of the batch, ``(N, *event)``.
        conditional: module mapping it to a distribution of batch shape ``(N,)``, such as
            ``conditionals.Normal(nn.Embedding(classes, 2 * D))`` for an auxiliary label.

    Khemakhem et al. 2020 (iVAE, arXiv:1907.04809); Hirt et al. 2024 (arXiv:2309.00380).

    Raises:
        ValueError: the batch has no such covariate.
    """

    def __init__(self, name: str, conditional: nn.Module):
        super().__init__()
        self.name = check_name("name", name, what="covariate")
        self.conditional = check_function("conditional", conditional, ("covariate",))

    def forward(self, batch: Batch) -> dist.Distribution:
        covariate = batch.covariate(self.name, "the prior")
        return apply_network(f"covariate {self.name!r}", self.conditional, covariate)
