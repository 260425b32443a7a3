"""Constructors of the posteriors and objectives that the studies compare, in tables by the names of their rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from ... import conditionals, estimators, objectives, posteriors
from ...nn import MLP
from ...objectives.objective import Objective

Networks = Callable[[str, int], nn.Module]
"""From a modality and a size to a network from the modality's values to ``(.., size)``."""


def rectifier() -> nn.Module:
    """Make a leaky rectifier with slope 0.01, as in the papers' networks."""
    return nn.LeakyReLU(0.01)


@dataclass(frozen=True)
class PooledExperts:
    """A constructor of posteriors that pool one Normal expert per modality.

    Args:
        pool: the class of the posterior, from modality -> expert.
    """

    pool: Callable[..., nn.Module]

    def __call__(
        self, names: Sequence[str], networks: Networks, latent: int, size: int, components: int = 5
    ) -> nn.Module:
        """Build q(z | x_S).

        Args:
            names: the modalities.
            networks: makes the encoder of each modality, with ``2 * latent`` outputs.
            latent: the dimension D of z.
            size, components: not used; they are those of :class:`PooledFeatures`.
        """
        return self.pool({name: conditionals.Normal(networks(name, 2 * latent)) for name in names})


@dataclass(frozen=True)
class Head:
    """The last layer of a posterior of features: from a network's outputs to a distribution of z.

    Args:
        num_outputs: from the dimension D of z and the number K of mixture components to the number of outputs.
        build: from the network and K to the conditional distribution.
    """

    num_outputs: Callable[[int, int], int]
    build: Callable[[nn.Module, int], nn.Module]


DIAGONAL = Head(lambda d, k: 2 * d, lambda net, k: conditionals.Normal(net))
MIXTURE = Head(lambda d, k: k * (1 + 2 * d), conditionals.NormalMixture)
FULL_COVARIANCE = Head(lambda d, k: d * (d + 3) // 2, lambda net, k: conditionals.MultivariateNormal(net))


@dataclass(frozen=True)
class PooledFeatures:
    """A constructor of posteriors that pool features of the modalities, and map the pooled features to z.

    Args:
        pool: the class of the posterior, from (modality -> network, conditional, size of the features).
        head: the kind of distribution.
    """

    pool: Callable[..., nn.Module]
    head: Head = DIAGONAL

    def __call__(
        self, names: Sequence[str], networks: Networks, latent: int, size: int, components: int = 5
    ) -> nn.Module:
        """Build q(z | x_S).

        Args:
            names: the modalities.
            networks: makes the network of each modality, with ``size`` outputs.
            latent: the dimension D of z.
            size: the number of features, and the width of the two hidden layers behind the pool.
            components: the number K of components, for :data:`MIXTURE`.
        """
        net = MLP(size, self.head.num_outputs(latent, components), (size, size), rectifier)
        features = {name: networks(name, size) for name in names}
        return self.pool(features, self.head.build(net, components), size)


SetPosterior = PooledExperts | PooledFeatures

POSTERIORS: Mapping[str, SetPosterior] = {
    "SumPooling": PooledFeatures(posteriors.SumPooling),
    "SelfAttention": PooledFeatures(posteriors.SelfAttention),
    "SelfAttention, no last norm": PooledFeatures(partial(posteriors.SelfAttention, normalized=False)),
    "SumPooling, full covariance": PooledFeatures(posteriors.SumPooling, FULL_COVARIANCE),
    "SumPooling mixture": PooledFeatures(posteriors.SumPooling, MIXTURE),
    "SelfAttention mixture": PooledFeatures(posteriors.SelfAttention, MIXTURE),
    "PoE": PooledExperts(posteriors.ProductOfExperts),
    "MoE": PooledExperts(posteriors.MixtureOfExperts),
}
"""Name in the tables -> constructor. The product of experts has the prior among its experts."""

OBJECTIVES: Mapping[str, Callable[[], Objective]] = {
    "masked": lambda: objectives.masked(estimators.StickTheLanding()),
    "mixture bound": lambda: objectives.subset_mean(1, estimators.StickTheLanding(), empty=True),
}
"""Name in the tables -> constructor. Hirt et al. 2024 (arXiv:2309.00380).

The mixture bound encodes one random subset per step, the empty one included, and has it reconstruct all modalities.
Both use sticking-the-landing gradients.
"""
