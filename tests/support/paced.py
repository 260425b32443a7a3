"""A training with another pace of its checks and its checkpoint than that of ``mm.fit``."""

import inspect

import pyro_mm as mm
from pyro_mm.scoring.prepare_objective import prepare_objective
from pyro_mm.training.options import TrainingOptions
from pyro_mm.training.trainer import run_training

DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(mm.fit).parameters.items()
    if parameter.default is not parameter.empty
}


def fit_at(pace, model, guide, objective, train, **options):
    """Train as ``mm.fit`` does, with its options, at a pace."""
    chosen = DEFAULTS | options
    force_resume = chosen.pop("resume") == "force"
    assert chosen.pop("logger") is None  # of which mm.fit makes a callback
    settings = TrainingOptions(**chosen, force_resume=force_resume, pace=pace)
    return run_training(model, guide, prepare_objective(objective), train, settings)
