"""Distributions for posteriors: mixtures, choices per row, products of Gaussian experts; and statistics of samples.

All distributions are plain Pyro distributions. Nothing here reads a tensor's values in Python, so that all of it traces
with ``make_fx`` and can be captured in a CUDA graph.
"""

from .base import diagonal, gumbel
from .gaussian_experts import STANDARD_NORMAL, product_of_normals
from .mixture import Mixture
from .sample_statistics import hsic, sliced_wasserstein, squared_mmd
from .where import Where

__all__ = [
    "STANDARD_NORMAL", "Mixture", "Where", "diagonal", "gumbel", "hsic", "product_of_normals", "sliced_wasserstein",
    "squared_mmd",
]  # fmt: skip
