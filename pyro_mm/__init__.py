"""Multimodal deep generative models in Pyro: stories, posteriors, objectives and estimators as four separate values."""

import sys
from importlib import import_module
from typing import Any

from .utils import quiet_import  # noqa: F401  # before anything else imports Pyro

# isort: split
from . import conditionals, datasets, distributions, estimators, metrics, models, nn, objectives, posteriors, recipes
from .batch.batch import Batch
from .batch.stream import Stream
from .diagnostics.check_report import Check
from .diagnostics.comparison import Comparison, compare
from .diagnostics.inference_data import to_arviz
from .diagnostics.pair_check import check
from .diagnostics.sbc import Calibration, calibration
from .evidence import protocols
from .evidence.annealing import annealed_importance, bidirectional
from .evidence.class_probabilities import ClassProbabilities, class_probabilities
from .evidence.evidence import Evidence
from .evidence.likelihood import log_conditional, log_marginal
from .models import priors
from .posteriors.guide import Guide
from .sampling.ancestral import simulate
from .sampling.encode import encode
from .sampling.fitted_posterior import FittedPosterior
from .sampling.fitted_proposal import Fitted
from .sampling.predictive import generate, posterior_draws
from .sampling.proposals import Proposal
from .scoring.importance import log_weights
from .scoring.training_objective import Loss, Player, TrainingObjective
from .training import callbacks
from .training.compile import stage
from .training.history import History
from .training.loop import fit
from .training.replay import replay
from .training.weights import load, save

__version__ = "0.2.0"

__all__ = [
    "Batch", "Calibration", "Check", "ClassProbabilities", "Comparison", "Evidence", "Fitted", "FittedPosterior",
    "Guide", "History", "Loss", "Player", "Proposal", "Stream", "TrainingObjective", "annealed_importance",
    "bidirectional", "calibration", "callbacks", "check", "class_probabilities", "compare", "conditionals", "datasets",
    "distributions", "encode", "estimators", "fit", "generate", "load", "log_conditional", "log_marginal",
    "log_weights", "metrics", "models", "nn", "objectives", "plots", "posterior_draws", "posteriors", "priors",
    "protocols", "recipes", "replay", "save", "simulate", "stage", "to_arviz",
]  # fmt: skip

# Modules that have moved into a folder, under the names that they are known by.
sys.modules[f"{__name__}.callbacks"] = callbacks
sys.modules[f"{__name__}.priors"] = priors
sys.modules[f"{__name__}.protocols"] = protocols


def __getattr__(name: str) -> Any:
    """Import ``plots`` at its first use: matplotlib takes longer to load than everything else of the package."""
    if name == "plots":
        return import_module(f"{__name__}.plots")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List what is public, and not the folders that it comes from."""
    return [*__all__, "__version__"]
