"""Metrics of trained pairs: accuracy, coherence, image quality, and the information in a latent.

* Labels predicted by the model: :func:`class_probabilities`, :func:`cross_modal_accuracy`, :func:`confusion_matrix`.
* Samples judged by a :func:`classifier`: :func:`cross_modal_coherence`, :func:`joint_coherence`. The classifier errs
  too, so report its own accuracy beside them.
* Posterior means: :func:`linear_probe`; :func:`label_information` in nats, and the gain of one model over another;
  :func:`box_overlap` of bounding boxes, by :func:`intersection_over_union`.
* Two sets of rows: :func:`frechet_distance`, :func:`kernel_distance`, :func:`precision_recall`; all of these for
  samples of a modality, whether it has a density or not: :func:`sample_quality`.
* Inference: :func:`amortization_gap`, log p(x) minus the ELBO, by its two causes.
* Latents whose true values are known: :func:`mean_correlation`.
* The role of each latent, or of each factor of a factorised story: :func:`hsic_ratios`, :func:`gradient_norms`,
  :func:`swaps`.
* Noise and missing modalities at test time: :func:`robustness`.

Proportions have standard errors: :class:`Share`.
"""

from .accuracy import class_probabilities, confusion_matrix, cross_modal_accuracy
from .amortization import AmortizationGap, amortization_gap
from .boxes import BoxOverlap, box_overlap, intersection_over_union
from .classifiers import classifier
from .coherence import cross_modal_coherence, joint_coherence
from .corrupted_inputs import Robustness, robustness
from .dependence import HSICRatios, hsic_ratios
from .factor_gradients import GradientNorms, gradient_norms
from .factor_swaps import Swaps, swaps
from .frechet import frechet_distance, gaussian_frechet
from .identifiability import MeanCorrelation, mean_correlation
from .kernel_distances import KernelDistance, kernel_distance
from .prdc import PRDC, precision_recall
from .probe import LabelInformation, label_information, linear_probe
from .proportion import Share
from .sample_report import SampleQuality, sample_quality

__all__ = [
    "PRDC", "AmortizationGap", "BoxOverlap", "GradientNorms", "HSICRatios", "KernelDistance", "LabelInformation",
    "MeanCorrelation", "Robustness", "SampleQuality", "Share", "Swaps", "amortization_gap", "box_overlap",
    "class_probabilities", "classifier", "confusion_matrix", "cross_modal_accuracy", "cross_modal_coherence",
    "frechet_distance", "gaussian_frechet", "gradient_norms", "hsic_ratios", "intersection_over_union",
    "joint_coherence", "kernel_distance", "label_information", "linear_probe", "mean_correlation", "precision_recall",
    "robustness", "sample_quality", "swaps",
]  # fmt: skip
