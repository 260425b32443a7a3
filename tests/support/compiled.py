"""Comparisons of compiled steps with the programs that they were traced from."""

from __future__ import annotations

import itertools
import os

import torch

import pyro_mm as mm
from tests.support.contract import ESTIMATORS, MODELS, OBJECTIVES, POSTERIORS


def gradients(parameters):
    return [None if p.grad is None else p.grad.clone() for p in parameters]


def eager(objective, model, guide, batch, parameters, seed):
    """The loss and gradients of the programs, under a seed."""
    for p in parameters:
        p.grad = None
    torch.manual_seed(seed)
    loss = objective.differentiable_loss(model, guide, batch)
    loss.backward()
    return loss.detach(), gradients(parameters)


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0])
    for g, h in zip(one[1], other[1], strict=True):
        assert (g is None) == (h is None)
        if g is not None:
            torch.testing.assert_close(g, h, rtol=2e-4, atol=2e-5)


def agree(objective, model, guide, batches, backend=None):
    """The staged step on several batches against the programs, by value, by term and by gradient."""
    parameters = [*model.parameters(), *guide.parameters()]
    step = mm.stage(objective, model, guide, batches[0], backend=backend)
    for seed, batch in enumerate(batches):
        torch.manual_seed(seed)
        staged = step(batch).detach().clone(), gradients(parameters)
        terms = dict(step.by_term)
        assert step.reasons == [] and step.steps == seed + 1
        if hasattr(objective, "steps"):
            objective.steps = seed
        assert_same(staged, eager(objective, model, guide, batch, parameters, seed))
        for name, value in getattr(objective, "by_term", {}).items():
            torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-4)


TRACED = {name: make for name, make in ESTIMATORS.items() if name != "graph"}


def cases():
    """Every objective and every estimator, with posteriors and stories dealt out; all of them in the long mode."""
    if os.environ.get("PYRO_MM_LONG") == "1":
        return list(itertools.product(MODELS, POSTERIORS, OBJECTIVES, TRACED))
    count = max(len(OBJECTIVES), len(TRACED), len(POSTERIORS))
    deal = lambda names, shift=0: [list(names)[(i + shift) % len(names)] for i in range(count)]  # noqa: E731
    return list(zip(deal(MODELS), deal(POSTERIORS), deal(OBJECTIVES), deal(TRACED), strict=True))
