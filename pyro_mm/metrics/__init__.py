"""Metrics of trained pairs: accuracy, coherence, image quality, and the information in a latent.

* Labels predicted by the model: :func:`class_probabilities`, :func:`cross_modal_accuracy`, :func:`confusion_matrix`.
* Samples judged by a :func:`classifier`: :func:`cross_modal_coherence`, :func:`joint_coherence`. The classifier errs
  too, so report its own accuracy beside them.
* Posterior means: :func:`linear_probe`.
* Sets of images: :func:`frechet_distance`.
* Inference: :func:`amortization_gap`, log p(x) minus the ELBO, by its two causes.
* Latents whose true values are known: :func:`mean_correlation`.

Proportions have standard errors: :class:`Share`.
"""

from .accuracy import class_probabilities, confusion_matrix, cross_modal_accuracy
from .amortization import AmortizationGap, amortization_gap
from .classifiers import classifier
from .coherence import cross_modal_coherence, joint_coherence
from .frechet import frechet_distance, gaussian_frechet
from .identifiability import MeanCorrelation, mean_correlation
from .probe import linear_probe
from .proportion import Share

__all__ = [
    "AmortizationGap", "MeanCorrelation", "Share", "amortization_gap", "class_probabilities", "classifier",
    "confusion_matrix", "cross_modal_accuracy", "cross_modal_coherence", "frechet_distance", "gaussian_frechet",
    "joint_coherence", "linear_probe", "mean_correlation",
]  # fmt: skip
