r"""The literature's pairs: from a paper to ``(model, guide, objective)``. The one place for networks and their sizes.

A recipe looks at a batch only to see what modalities there are and of which kind. An image, floats in {0, 1} of
shape ``(N, H, W)``, has a Bernoulli likelihood, and perceptrons for its logits and its encoder; a label, integers of
shape ``(N,)``, a Categorical one, a perceptron for its logits, and an encoder that is a table with a row for each
class. All papers train other networks on other data; what a docstring says of departures comes on top of that.

>>> import pyro_mm as mm
>>> train, test = mm.datasets.load("digits")
>>> model, guide, objective = mvae(train, latent=8)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import pyro.distributions as dist
import torch
from pyro.infer import ELBO
from torch import nn

from . import conditionals, objectives, posteriors
from .batch import Batch
from .guides import Guide
from .models import SharedLatent
from .nn import MLP
from .objective import Objective

Hidden = Sequence[int]
Estimator: TypeAlias = ELBO | None
LATENT, HIDDEN = 16, (128,)


class Recipe(NamedTuple):
    """What a paper proposes, as three values that can be taken apart: ``model, guide, objective = mvae(train)``."""

    model: SharedLatent
    guide: Guide
    objective: Objective


def mvae(
    batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None, label_weight: float = 1.0
) -> Recipe:
    """MVAE: a product of experts, and the sum of the joint bound and the unimodal ones.

    Wu & Goodman 2018 (arXiv:1802.05335). They weigh the label's likelihood by 50 and warm the KL up. The weight here
    is 1: any other makes the sum a surrogate, and on the digits 10 and 50 made every likelihood worse.
    """
    weights = {name: label_weight for name in batch if _is_label(batch, name)}
    objective = objectives.mvae(estimator=estimator, likelihood=weights or 1.0)
    return Recipe(_story(batch, latent, hidden), _product(batch, latent, hidden), objective)


def jmvae_kl(
    batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None, alpha: float = 0.1
) -> Recipe:
    """JMVAE-kl: a joint encoder, and unimodal encoders drawn near to it.

    Suzuki et al. 2016 (arXiv:1611.01891). They warm the KL up.
    """
    objective = objectives.jmvae_kl(alpha, estimator)
    return Recipe(_story(batch, latent, hidden), _joint(batch, latent, hidden), objective)


def jmvae_zero(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """JMVAE-zero: a joint encoder that is given zeros for what is missing, and never trained on them.

    Suzuki et al. 2016 (arXiv:1611.01891), their baseline. Zeros stand for features, not for the values.
    """
    guide = Guide(z=_joint_encoder(batch, latent, hidden))
    return Recipe(_story(batch, latent, hidden), guide, objectives.elbo(estimator))


def telbo(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """The triple ELBO: a joint encoder trained with the decoders, and unimodal encoders trained against them.

    Vedantam et al. 2018 (arXiv:1705.10762). They weigh the likelihoods, and have a product of experts over the
    attributes of an incomplete description.
    """
    return Recipe(_story(batch, latent, hidden), _joint(batch, latent, hidden), objectives.telbo(estimator))


def vaevae(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """Wu & Goodman's objective of every modality's evidence and the others' given it.

    Wu & Goodman 2019 (arXiv:1912.05075). The posterior here is a product of experts.
    """
    return Recipe(_story(batch, latent, hidden), _product(batch, latent, hidden), objectives.vaevae(estimator))


def mmvae(
    batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None, num_particles: int = 10
) -> Recipe:
    """MMVAE: a mixture of Laplace experts, with K importance-weighted draws from each.

    Shi et al. 2019 (arXiv:1911.03393), the looser bound that they train. The gradient is plain reparameterisation in
    place of their DReG, which is biased with a stratified mixture; the prior's scale is not learned; and no
    modality's likelihood is weighed.
    """
    experts = _encoders(batch, latent, hidden, conditionals.Laplace)
    prior = dist.Laplace(torch.zeros(latent), 1.0).to_event(1)
    guide = Guide(z=posteriors.MixtureOfExperts(experts))
    return Recipe(_story(batch, latent, hidden, prior), guide, objectives.mmvae(num_particles, estimator=estimator))


def mopoe(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """MoPoE, as it is trained: the mean over all subsets of the bounds that encode the product of a subset's experts.

    Sutter et al. 2021 (arXiv:2105.02470). Without their beta; every subset's product has the prior expert. The mixture
    of these products is ``posteriors.MixtureOfProducts``, and its own, tighter bound ``objectives.mopoe``.
    """
    objective = objectives.subset_mean(estimator=estimator)
    return Recipe(_story(batch, latent, hidden), _product(batch, latent, hidden), objective)


def mvtcae(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """MVTCAE: a product of experts without the prior, and bounds given each modality besides the joint one.

    Hwang et al. 2021 (NeurIPS). With beta = 1.
    """
    guide = Guide(z=posteriors.ProductOfExperts(_encoders(batch, latent, hidden), prior=None))
    return Recipe(_story(batch, latent, hidden), guide, objectives.mvtcae(estimator=estimator))


def mmjsd(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """mmJSD: a Jensen-Shannon divergence between the experts and the prior, with their product as dynamic prior.

    Sutter et al. 2020 (arXiv:2006.08242). Without their modality-specific latents.
    """
    return Recipe(_story(batch, latent, hidden), _product(batch, latent, hidden), objectives.mmjsd(estimator=estimator))


def unimodal_mean(batch: Batch, latent: int = LATENT, hidden: Hidden = HIDDEN, estimator: Estimator = None) -> Recipe:
    """A mixture of experts trained expert by expert, each reconstructing all: looser than the mixture's own bound.

    The form with one particle that much work after Shi et al. 2019 (arXiv:1911.03393) trains under MMVAE's name,
    with Gaussian experts.
    """
    guide = Guide(z=posteriors.MixtureOfExperts(_encoders(batch, latent, hidden)))
    return Recipe(_story(batch, latent, hidden), guide, objectives.unimodal_mean(estimator))


RECIPES: Mapping[str, Callable[..., Recipe]] = {
    f.__name__.replace("_", "-"): f
    for f in (mvae, jmvae_kl, jmvae_zero, telbo, vaevae, mmvae, mopoe, mvtcae, mmjsd, unimodal_mean)
}
"""The names of the command line; elsewhere call the functions."""


def _is_label(batch: Batch, name: str) -> bool:
    value = batch[name]
    image = value.is_floating_point() and value.dim() > 2
    if not image and (value.is_floating_point() or value.dim() != 1):
        raise ValueError(
            f"{name!r} is neither an image, floats of shape (N, H, W), nor a label, integers of shape (N,): it is "
            f"{value.dtype} of shape {tuple(value.shape)}. A recipe has no networks for it; write the story instead"
        )
    return not image


def _classes(batch: Batch, name: str) -> int:
    return int(batch[name].max()) + 1


def _story(batch: Batch, latent: int, hidden: Hidden, prior: dist.Distribution | None = None) -> SharedLatent:
    def decoder(name: str) -> nn.Module:
        if _is_label(batch, name):
            return conditionals.Categorical(MLP(latent, _classes(batch, name), hidden))
        event = batch[name].shape[1:]
        return conditionals.Bernoulli(MLP(latent, event.numel(), hidden), event)

    prior = dist.Normal(torch.zeros(latent), 1.0).to_event(1) if prior is None else prior
    return SharedLatent(prior, {name: decoder(name) for name in batch})


def _features(batch: Batch, name: str, out: int, hidden: Hidden) -> nn.Module:
    if _is_label(batch, name):
        return nn.Embedding(_classes(batch, name), out)
    return MLP(batch[name][0].numel(), out, hidden)


def _encoders(
    batch: Batch, latent: int, hidden: Hidden, family: type[nn.Module] = conditionals.Normal
) -> dict[str, nn.Module]:
    return {name: family(_features(batch, name, 2 * latent, hidden)) for name in batch}


def _product(batch: Batch, latent: int, hidden: Hidden) -> Guide:
    return Guide(z=posteriors.ProductOfExperts(_encoders(batch, latent, hidden)))


def _joint_encoder(
    batch: Batch, latent: int, hidden: Hidden, partial: nn.Module | None = None
) -> posteriors.JointEncoder:
    """Features of one hidden layer less than an encoder, whose last one is the head's."""
    width = hidden[-1]
    features = {name: nn.Sequential(_features(batch, name, width, hidden[:-1]), nn.ReLU()) for name in batch}
    head = conditionals.Normal(MLP(width * len(features), 2 * latent, hidden[-1:]))
    return posteriors.JointEncoder(features, head, partial)


def _joint(batch: Batch, latent: int, hidden: Hidden) -> Guide:
    unimodal = posteriors.ProductOfExperts(_encoders(batch, latent, hidden), prior=None)
    return Guide(z=_joint_encoder(batch, latent, hidden, unimodal))
