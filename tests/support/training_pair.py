"""A small pair to train, and rows for it."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import nn

import pyro_mm as mm


def pair():
    """A shared-latent model of two modalities, and its guide: fresh weights each time."""
    normal = lambda i, o: mm.conditionals.Normal(nn.Linear(i, 2 * o))  # noqa: E731
    z = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    model = mm.models.SharedLatent(z, {"a": normal(2, 3), "b": normal(2, 1)})
    return model, mm.Guide(z=mm.posteriors.ProductOfExperts({"a": normal(3, 2), "b": normal(1, 2)}))


def data(n=100, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 1, generator=generator)
    a = z * torch.tensor([2.0, -1.0, 0.5]) + 0.3 * torch.randn(n, 3, generator=generator) + 1
    b = 1.5 * z + 0.3 * torch.randn(n, 1, generator=generator)
    i = torch.arange(n)
    return mm.Batch({"a": a, "b": b}, {"a": i % 5 != 1, "b": i % 5 != 2})
