r"""The multimodal objectives of the literature, each a table of terms ``(encode, decode, given)``.

``*`` is all present modalities, ``m`` each of them in turn, ``others`` all but that one, ``P`` the prior, ``-`` the
empty set. :func:`MMD`, :func:`SlicedWasserstein` and :func:`HSIC` are statistics of the latents of a batch. Objectives
add and scale: ``elbo(kl=0) + 10 * MMD("z")``, ``sum([a, 0.5 * b])``; each part keeps its estimator.

``estimator=`` takes any ``pyro.infer.ELBO``; by default the KL is analytic where the posterior has one.
``print(objective)`` shows the table and what it bounds. Weights are finite and not negative, at every step; a table of
one's own, of Terms, may have negative ones. Other arguments raise a ``ValueError`` or a ``TypeError``.
"""

from .concrete_terms import TermKind
from .critics import Critic
from .discrepancies import HSIC, MMD, SlicedWasserstein
from .objective import Objective
from .tables import (
    beta_vae,
    cyclical,
    dmvae,
    elbo,
    jmvae_kl,
    masked,
    mixture_mean,
    mmjsd,
    mmvae,
    mmvm,
    mopoe,
    mvae,
    mvtcae,
    subset_mean,
    telbo,
    unimodal_mean,
    vaevae,
    warm_up,
)
from .terms import ALL, EACH, EVERY, OTHERS, PRIOR, Random, Symbol, Term
from .vae_gan import VAEGAN, Discriminator

__all__ = [
    "ALL",
    "EACH",
    "EVERY",
    "HSIC",
    "MMD",
    "OTHERS",
    "PRIOR",
    "VAEGAN",
    "Critic",
    "Discriminator",
    "Objective",
    "Random",
    "SlicedWasserstein",
    "Symbol",
    "Term",
    "TermKind",
    "beta_vae",
    "cyclical",
    "dmvae",
    "elbo",
    "jmvae_kl",
    "masked",
    "mixture_mean",
    "mmjsd",
    "mmvae",
    "mmvm",
    "mopoe",
    "mvae",
    "mvtcae",
    "subset_mean",
    "telbo",
    "unimodal_mean",
    "vaevae",
    "warm_up",
]  # fmt: skip
