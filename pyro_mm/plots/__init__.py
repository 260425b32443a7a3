"""Figures of training, samples, latents, calibration, likelihoods, the roles of factors, and robustness.

A function that may draw several panels returns a ``matplotlib.figure.Figure``, and one of a single panel that takes
``ax=`` returns its ``Axes``. Figures are made without pyplot, so that no window, backend or global state is touched:
``figure.savefig("curve.png")`` writes one, and a notebook shows it. matplotlib is imported at the first call.
"""

from .calibration import ranks
from .factors import gradient_norms, hsic_ratios, swaps
from .histories import training_curve
from .likelihoods import convergence
from .noise import robustness
from .samples import confusion, image_grid, latent_view

__all__ = [
    "confusion", "convergence", "gradient_norms", "hsic_ratios", "image_grid", "latent_view", "ranks", "robustness",
    "swaps", "training_curve",
]  # fmt: skip
