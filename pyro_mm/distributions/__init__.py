"""Distributions of posteriors and data: mixtures, choices by row, products of Gaussian experts."""

from .base import diagonal, gumbel
from .gaussian_experts import STANDARD_NORMAL, consensus_of_normals, pairwise_pool, product_of_normals
from .mixture import Mixture
from .where import Where

__all__ = [
    "STANDARD_NORMAL", "Mixture", "Where", "consensus_of_normals", "diagonal", "gumbel", "pairwise_pool",
    "product_of_normals",
]  # fmt: skip
