"""Figures of stories, training, samples, latents, calibration, likelihoods, the roles of factors, and robustness.

A function that draws one panel takes ``ax=`` and returns the ``matplotlib.axes.Axes``, those of a new figure
(``ax.figure``) by default; one that draws several returns the ``matplotlib.figure.Figure``. Figures are made without
pyplot, so that no window, backend or global state is touched: ``figure.savefig("curve.png")`` writes one, and a
notebook shows it. matplotlib is imported at the first call.

======================== ==================================================================== =======
:func:`graph`            the graphical model of a story, by graphviz
:func:`training_curve`   the loss, and the terms of the objective in words                    Figure
:func:`image_grid`       images in grey or colour                                             Figure
:func:`captions`         images with captions under them                                      Figure
:func:`cross_modal`      samples of a modality given others, with the truth beside            Figure
:func:`sequences`        sequences with bands of draws                                        Figure
:func:`latent_view`      latents in a plane, by principal components or given                 Axes
:func:`traversal`        a modality as single coordinates of a latent move                    Figure
:func:`convergence`      likelihoods against the number of draws                              Figure
:func:`evidence_rows`    the likelihood of each row against its k-hat                         Axes
:func:`bound_ladder`     importance-weighted bounds against the number of draws               Axes
:func:`forest`           differences of compared models with both errors                      Axes
:func:`coherence`        coherences as bars                                                   Axes
:func:`confusion`        predicted and true classes                                           Axes
:func:`ranks`            calibration by ranks                                                 Figure
:func:`gradient_norms`   heat maps of factors and steps                                       Figure
:func:`hsic_ratios`      dependence of reconstructions on factors, as bars                    Axes
:func:`swap_effects`     effects of swapped factors, as a heat map                            Axes
:func:`swaps`            reconstructions with swapped factors                                 Figure
:func:`robustness`       accuracy and reconstruction against noise                            Figure
======================== ==================================================================== =======
"""

from .calibration import ranks
from .classes import coherence, confusion
from .factors import gradient_norms, hsic_ratios, swap_effects, swaps
from .histories import training_curve
from .latents import latent_view, traversal
from .likelihoods import convergence
from .noise import robustness
from .rows import bound_ladder, evidence_rows, forest
from .samples import captions, cross_modal, image_grid
from .sequence_panels import sequences
from .stories import graph

__all__ = [
    "bound_ladder", "captions", "coherence", "confusion", "convergence", "cross_modal", "evidence_rows", "forest",
    "gradient_norms", "graph", "hsic_ratios", "image_grid", "latent_view", "ranks", "robustness", "sequences",
    "swap_effects", "swaps", "training_curve", "traversal",
]  # fmt: skip
