"""Recipes: models, guides and objectives of papers, with networks that fit the modalities of a batch.

A recipe reads only the modalities of a batch, their kinds and their sizes. An image, floats in {0, 1} of shape ``(N, H,
W)``, has a Bernoulli likelihood, and perceptrons for its logits and its encoder. A label, integers of shape ``(N,)``,
has a Categorical likelihood, a perceptron for its logits, and an embedding for its encoder. The papers train other
networks on other data; the departures that a docstring lists come on top of that. ``mfm`` and ``mfm_variational`` have
networks for vectors, arrays, sequences, tokens and real labels too.

>>> import pyro_mm as mm
>>> train, test = mm.datasets.load("digits")
>>> model, guide, objective = mvae(train, latent=8)
>>> print(objective.bounds(train.names))
lower bound on log p(image, label) + log p(image) + log p(label)
>>> mm.encode(guide, test[:5].only("image"))["z"].mean.shape
torch.Size([5, 8])
"""

from collections.abc import Callable, Mapping

from .experts import code, hoelder, mmjsd, mmvae, mmvm, mopoe, mvae, mvtcae, unimodal_mean, vaevae
from .factorized import mfm, mfm_variational
from .flows import jnf, jnf_second, vaevae_flow
from .joint_encoder import jmvae_kl, jmvae_zero, telbo, vaevae_joint
from .networks import Recipe
from .private_latents import dmvae, mmvae_plus
from .unimodal import cvae, vae

__all__ = [
    "RECIPES", "Recipe", "code", "cvae", "dmvae", "hoelder", "jmvae_kl", "jmvae_zero", "jnf", "jnf_second", "mfm",
    "mfm_variational", "mmjsd", "mmvae", "mmvae_plus", "mmvm", "mopoe", "mvae", "mvtcae", "telbo", "unimodal_mean",
    "vae", "vaevae", "vaevae_flow", "vaevae_joint",
]  # fmt: skip

RECIPES: Mapping[str, Callable[..., Recipe]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        mvae, jmvae_kl, jmvae_zero, telbo, vaevae, vaevae_joint, mmvae, mmvae_plus, mopoe, mvtcae, mmjsd, unimodal_mean,
        dmvae, jnf, mmvm, code, hoelder, vae, cvae, mfm_variational,
        vaevae_flow,
    )
}  # fmt: skip
"""Recipe by its name on the command line; ``mfm`` has no likelihood to evaluate, and is not among them."""
