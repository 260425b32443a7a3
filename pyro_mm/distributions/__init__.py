"""Distributions of posteriors and data: mixtures, choices by row, products of Gaussian experts."""

from .base import diagonal, gumbel
from .gaussian_experts import STANDARD_NORMAL, product_of_normals
from .mixture import Mixture
from .where import Where

__all__ = ["STANDARD_NORMAL", "Mixture", "Where", "diagonal", "gumbel", "product_of_normals"]
