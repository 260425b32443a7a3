r"""The literature's pairs: from a paper to ``(model, guide, objective)``. The one place for networks and their sizes.

A recipe looks at a batch only to see what modalities there are and of which kind. An image, floats in {0, 1} of
shape ``(N, H, W)``, has a Bernoulli likelihood, and perceptrons for its logits and its encoder; a label, integers of
shape ``(N,)``, a Categorical one, a perceptron for its logits, and an encoder that is a table with a row for each
class. All papers train other networks on other data; what a docstring says of departures comes on top of that.

>>> import pyro_mm as mm
>>> train, test = mm.datasets.load("digits")
>>> model, guide, objective = mvae(train, latent=8)
"""

from collections.abc import Callable, Mapping

from .experts import code, hoelder, mmjsd, mmvae, mmvm, mopoe, mvae, mvtcae, unimodal_mean, vaevae
from .flows import jnf, jnf_second
from .joint_encoder import jmvae_kl, jmvae_zero, telbo, vaevae_joint
from .networks import Recipe
from .private_latents import dmvae, mmvae_plus
from .unimodal import cvae, vae

__all__ = [
    "RECIPES", "Recipe", "code", "cvae", "dmvae", "hoelder", "jmvae_kl", "jmvae_zero", "jnf", "jnf_second", "mmjsd",
    "mmvae", "mmvae_plus", "mmvm", "mopoe", "mvae", "mvtcae", "telbo", "unimodal_mean", "vae", "vaevae", "vaevae_joint",
]  # fmt: skip

RECIPES: Mapping[str, Callable[..., Recipe]] = {
    f.__name__.replace("_", "-"): f
    for f in (
        mvae, jmvae_kl, jmvae_zero, telbo, vaevae, vaevae_joint, mmvae, mmvae_plus, mopoe, mvtcae, mmjsd, unimodal_mean,
        dmvae, jnf, mmvm, code, hoelder, vae, cvae,
    )
}  # fmt: skip
"""The names of the command line; elsewhere call the functions."""
