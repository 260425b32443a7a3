"""Multimodal deep generative models in Pyro: stories, posteriors, objectives and estimators as four separate values."""

from . import (
    conditionals,
    datasets,
    distributions,
    estimators,
    metrics,
    models,
    nn,
    objectives,
    posteriors,
    priors,
    protocols,
    recipes,
)
from .annealed import annealed_importance, bidirectional
from .batch import Batch
from .calibration import Calibration, calibration
from .compiled import stage
from .diagnostics import Check, Comparison, check, compare, to_arviz
from .evidence import Evidence
from .guides import Guide, encode
from .importance import log_weights
from .likelihood import log_conditional, log_marginal
from .predictive import generate, posterior_draws, simulate
from .saving import load, save
from .train import History, fit

__version__ = "0.1.0"

__all__ = [
    "Batch", "Calibration", "Check", "Comparison", "Evidence", "Guide", "History", "annealed_importance",
    "bidirectional", "calibration", "check", "compare", "conditionals", "datasets", "distributions", "encode",
    "estimators", "fit", "generate", "load", "log_conditional", "log_marginal", "log_weights", "metrics", "models",
    "nn", "objectives", "posterior_draws", "posteriors", "priors", "protocols", "recipes", "save", "simulate",
    "stage", "to_arviz",
]  # fmt: skip
