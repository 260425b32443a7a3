"""How well modalities are told from each other, how alike draws are to data, and what a latent knows of a class.

:func:`class_probabilities`, :func:`cross_modal_accuracy` and :func:`confusion_matrix` are of labels that the model
predicts itself; :func:`cross_modal_coherence` and :func:`joint_coherence` of draws that a :func:`classifier` looks
at, which errs too: print its own accuracy beside them. :func:`linear_probe` is of the posterior means,
:func:`frechet_distance` of whole sets of pictures, :func:`mean_correlation` of latents that are known. Shares come
with standard errors: :class:`Share`.
"""

from .accuracy import class_probabilities, confusion_matrix, cross_modal_accuracy
from .classifiers import classifier
from .coherence import cross_modal_coherence, joint_coherence
from .frechet import frechet_distance, gaussian_frechet
from .identifiability import MeanCorrelation, mean_correlation
from .probe import linear_probe
from .proportion import Share

__all__ = [
    "MeanCorrelation", "Share", "class_probabilities", "classifier", "confusion_matrix", "cross_modal_accuracy",
    "cross_modal_coherence", "frechet_distance", "gaussian_frechet", "joint_coherence", "linear_probe",
    "mean_correlation",
]  # fmt: skip
