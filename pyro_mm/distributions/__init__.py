"""Distributions for posteriors: mixtures, choices per row, products of Gaussian experts.

All are plain Pyro distributions. None reads a tensor's values in Python, so that all of them trace with ``make_fx`` and
can be captured in a CUDA graph.
"""

from .base import diagonal, gumbel
from .gaussian_experts import STANDARD_NORMAL, product_of_normals
from .mixture import Mixture
from .where import Where

__all__ = ["STANDARD_NORMAL", "Mixture", "Where", "diagonal", "gumbel", "product_of_normals"]
