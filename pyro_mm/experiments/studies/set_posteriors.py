"""Posteriors of a set of modalities beside the pools of experts, by name, of equal networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from torch import nn

from ... import conditionals, estimators, objectives, posteriors
from ...nn import MLP
from ...objectives.objective import Objective

Networks = Callable[[str, int], nn.Module]
"""From a modality and a size to a network from its values to ``(.., size)``."""


def rectifier() -> nn.Module:
    """A leaky rectifier with the slope of the papers' networks."""
    return nn.LeakyReLU(0.01)


def aggregated(
    kind: str, names: Sequence[str], networks: Networks, latent: int, size: int, components: int = 5
) -> nn.Module:
    """q(z | x_S) for every S, by one of the names of :data:`POSTERIORS`.

    Args:
        names: the modalities.
        networks: makes their encoders, or the features of a set.
        latent: D.
        size: of the features, and of the two hidden layers of the network that takes their sum.
        components: K, of the kinds that end on "mixture".

    Raises:
        ValueError: no such kind.
    """
    if kind not in POSTERIORS:
        raise ValueError(f"unknown posterior {kind!r}: expected one of {', '.join(POSTERIORS)}")
    return POSTERIORS[kind](names, networks, latent, size, components)


def _experts(pool: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def made(names: Sequence[str], networks: Networks, latent: int, size: int, components: int) -> nn.Module:
        return pool({name: conditionals.Normal(networks(name, 2 * latent)) for name in names})

    return made


class _Head(NamedTuple):
    """What takes the features of a set: how many numbers of latents D and components K, and what is made of them."""

    outputs: Callable[[int, int], int]
    of: Callable[[nn.Module, int], nn.Module]


NORMAL = _Head(lambda d, k: 2 * d, lambda net, k: conditionals.Normal(net))
MIXTURE = _Head(lambda d, k: k * (1 + 2 * d), conditionals.NormalMixture)
FULL = _Head(lambda d, k: d * (d + 3) // 2, lambda net, k: conditionals.MultivariateNormal(net))


def _set(pool: Callable[..., nn.Module], head: _Head = NORMAL) -> Callable[..., nn.Module]:
    def made(names: Sequence[str], networks: Networks, latent: int, size: int, components: int) -> nn.Module:
        net = MLP(size, head.outputs(latent, components), (size, size), rectifier)
        return pool({name: networks(name, size) for name in names}, head.of(net, components), size)

    return made


POSTERIORS: Mapping[str, Callable[..., nn.Module]] = {
    "SumPooling": _set(posteriors.SumPooling),
    "SelfAttention": _set(posteriors.SelfAttention),
    "SelfAttention, no last norm": _set(partial(posteriors.SelfAttention, normalized=False)),
    "SumPooling, full covariance": _set(posteriors.SumPooling, FULL),
    "SumPooling mixture": _set(posteriors.SumPooling, MIXTURE),
    "SelfAttention mixture": _set(posteriors.SelfAttention, MIXTURE),
    "PoE": _experts(posteriors.ProductOfExperts),
    "MoE": _experts(posteriors.MixtureOfExperts),
}
"""Sets whose features are summed, or attend to each other first (without the last normalisation too), with one Normal,
diagonal or not, or a mixture of diagonal ones at the end; and products and mixtures of experts, the product with the
prior among them."""


def objective(kind: str) -> Objective:
    """``"masked"``, with sticking-the-landing gradients of a posterior's own terms, or ``"mixture bound"``: of one
    random subset, the empty one included, that has to reconstruct all. Hirt et al. 2024 (arXiv:2309.00380)."""
    if kind == "masked":
        return objectives.masked(estimators.StickTheLanding())
    if kind == "mixture bound":
        return objectives.subset_mean(1, estimators.StickTheLanding(), empty=True)
    raise ValueError(f'expected "masked" or "mixture bound", got {kind!r}')
