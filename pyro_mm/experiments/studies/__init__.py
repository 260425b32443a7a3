"""Experiments over several seeds, by their names in ``pyro-mm reproduce``."""

from collections.abc import Mapping

from . import (
    critics,
    factorized,
    flow_images,
    identifiable,
    image_decoders,
    jmvae_gan,
    kanji,
    known_factors,
    linear,
    mnist_usps_word,
    scenes,
    wasserstein_autoencoders,
)
from .study import Study

STUDIES: Mapping[str, Study] = {
    "critics-gaussian": critics.GAUSSIAN,
    "flow-mnist": flow_images.MNIST,
    "wu-goodman-digits": image_decoders.DIGITS,
    "hirt-linear": linear.study("Linear-Gaussian, shared and private latents", 5, linear.QUOTED),
    "hirt-linear-dense": linear.study("Linear-Gaussian, shared latents only", 0, linear.QUOTED),
    "hirt-identifiable": identifiable.BIMODAL,
    "hirt-identifiable-multi": identifiable.MULTI,
    "hirt-mnist": mnist_usps_word.MNIST,
    "mfm-mosi": factorized.MOSI,
    "mfm-mmmo": factorized.MMMO,
    "mfm-pom": factorized.POM,
    "mfm-digits": factorized.DIGITS,
    "mfm-factors": known_factors.FACTORS,
    "jmvae-gan-mnist": jmvae_gan.MNIST,
    "wae-mnist": wasserstein_autoencoders.MNIST,
    "wu-goodman-kanji": kanji.KANJI,
    "wu-goodman-kanji-small": kanji.SMALL_KANJI,
    "wu-goodman-scenes": scenes.SCENES,
    "wu-goodman-scenes-small": scenes.SMALL_SCENES,
}
