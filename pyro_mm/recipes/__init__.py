"""Recipes: models, guides and objectives of papers, with networks that fit the modalities of a batch.

A recipe reads the modalities of a batch: their types, shapes and values say their kind, by which likelihoods and
networks are chosen.

============= ========================================= ========================= ==============================
kind          values                                    likelihood                encoder
============= ========================================= ========================= ==============================
``class``     integers ``(N,)``                         Categorical               embedding
``number``    floats ``(N,)``                           Normal                    perceptron
``bits``      booleans, or floats 0 and 1, ``(N, ..)``  Bernoulli                 perceptron, or convolutions
``grey``      other floats in [0, 1], ``(N, H, W)``     Bernoulli                 perceptron
``counts``    other whole floats from 0, ``(N, D)``     NegativeBinomial          perceptron on log(1 + x)
``vector``    other floats ``(N, D)``                   Normal                    perceptron
``tokens``    integers ``(N, T)`` with lengths          Tokens                    LSTM
``sequence``  floats ``(N, T, D)`` with lengths         Normal                    LSTM
``array``     all other floats                          Normal                    perceptron, or convolutions
============= ========================================= ========================= ==============================

Normals have a learned standard deviation for each feature, and one for all entries of an array. Images ``(N, C, H, W)``
have convolutions where both sides have eight pixels at least. Grey levels are read as probabilities of bits, the form
in which images are given whose bits are drawn anew in every epoch; without such draws their cross-entropy is no
likelihood, and ``Evidence`` says so.

All recipes take ``networks=``, by modality: the name of a kind in place of the one that is read off, or
:class:`Networks` of your own:

* ``networks={"rna": "counts"}``: integers ``(N, D)`` could be counts or tokens, and are refused otherwise;
* ``networks={"image": "array"}``: grey levels with a Normal density;
* ``networks={"photo": Networks(encoder=.., decoder=..)}``: functions that make networks of the sizes asked for.

The papers train other networks on other data; the departures that a docstring lists come on top of that.

>>> import pyro_mm as mm
>>> train, test = mm.datasets.load("digits")
>>> model, guide, objective = mvae(train, latent=8)
>>> print(objective.bounds(train.names))
lower bound on log p(image, label) + log p(image) + log p(label)
>>> mm.encode(guide, test[:5].only("image"))["z"].mean.shape
torch.Size([5, 8])
"""

from collections.abc import Callable, Mapping

from .adversarial import jmvae_gan
from .experts import code, hoelder, mmjsd, mmvae, mmvm, mopoe, mvae, mvtcae, unimodal_mean, vaevae
from .factorized import mfm, mfm_variational
from .flows import jnf, jnf_second, vaevae_flow
from .joint_encoder import jmvae_kl, jmvae_zero, telbo, vaevae_joint
from .modality_networks import Networks
from .networks import Recipe
from .private_latents import dmvae, mmvae_plus
from .unimodal import cvae, vae

__all__ = [
    "RECIPES", "Networks", "Recipe", "code", "cvae", "dmvae", "hoelder", "jmvae_gan", "jmvae_kl", "jmvae_zero", "jnf",
    "jnf_second", "mfm", "mfm_variational", "mmjsd", "mmvae", "mmvae_plus", "mmvm", "mopoe", "mvae", "mvtcae", "telbo",
    "unimodal_mean", "vae", "vaevae", "vaevae_flow", "vaevae_joint",
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
