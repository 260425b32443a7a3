"""Experiments over several seeds: ``pyro-mm reproduce`` by these names."""

from collections.abc import Mapping

from . import identifiable, linear
from . import mnist_usps_word as pictures
from .study import Study

STUDIES: Mapping[str, Study] = {
    "hirt-linear": linear.study("Linear-Gaussian, shared and private latents", 5, linear.QUOTED),
    "hirt-linear-dense": linear.study("Linear-Gaussian, shared latents only", 0, linear.QUOTED),
    "hirt-identifiable": identifiable.BIMODAL,
    "hirt-identifiable-multi": identifiable.MULTI,
    "hirt-mnist": pictures.MNIST,
}
