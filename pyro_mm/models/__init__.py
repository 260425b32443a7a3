"""Generative stories. They know nothing of guides, objectives or estimators; a new one is a function of a batch."""

from .conditional_latent import ConditionalLatent
from .labelled import Labelled
from .linear_gaussian import LinearGaussian
from .private_latents import PrivateLatents
from .shared_latent import SharedLatent

__all__ = ["ConditionalLatent", "Labelled", "LinearGaussian", "PrivateLatents", "SharedLatent"]
