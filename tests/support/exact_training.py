"""A training without noise: its loss is -log p(x) of a linear-Gaussian model, whose loadings are learned."""

from __future__ import annotations

import torch

import pyro_mm as mm
from pyro_mm.training import compile as compilation


def linear_pair(seed=0):
    """A linear-Gaussian model of two modalities in float64, and its exact posterior as the guide."""
    torch.manual_seed(seed)
    model = mm.models.LinearGaussian({"a": torch.randn(3, 2), "b": torch.randn(1, 2)}, noise=0.5).double()
    return model, mm.Guide(z=model.posterior)


def log_likelihood(model, guide, batch, *, step):
    """Minus log p of the rows, scaled up as a subsampled data plate does."""
    log_p = model.log_prob(batch).sum() * ((batch.total or batch.size) / batch.size)
    return mm.Loss(-log_p, {"log p": log_p.detach()})


def rows(n=100, seed=0, missing=True):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    a = z * torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64) + 1
    a = a + 0.3 * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    i = torch.arange(n)
    present = {"a": i % 5 != 1, "b": i % 5 != 2} if missing else None
    return mm.Batch({"a": a, "b": 1.5 * z}, present)


def parameters(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


def without_inductor(monkeypatch):
    """Let compiled trainings run their traced graphs as they are: the same code but for inductor's, and quick."""
    monkeypatch.setattr(compilation.CompiledStep, "_compile", lambda self, traced, inputs: traced.graph)
