"""A linear story of x (2-d, implicit or explicit) and y (1-d), its guide, critics with exact logits, and rows."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import nn

import pyro_mm as mm

WEIGHT = torch.tensor([[1.0, 0.3], [-0.4, 0.8]])
OFFSET = torch.tensor([0.5, -0.5])
SCALE = 0.5


def linear_generator():
    """Return the generator of x = W z + b + s u."""
    net = nn.Linear(4, 2)
    with torch.no_grad():
        net.weight.copy_(torch.cat([WEIGHT, SCALE * torch.eye(2)], 1))
        net.bias.copy_(OFFSET)
    return net


def pair(implicit=True, seed=0):
    """Return a model and a guide, whose p(x | z) is that of :func:`linear_generator` either way."""
    torch.manual_seed(seed)
    if implicit:
        x = mm.conditionals.Implicit(linear_generator(), noise=2)
    else:
        decoder = nn.Linear(2, 2)
        with torch.no_grad():
            decoder.weight.copy_(WEIGHT)
            decoder.bias.copy_(OFFSET)
        x = mm.conditionals.Normal(decoder, scale=SCALE)
    torch.manual_seed(seed + 1)
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    model = mm.models.SharedLatent(prior, {"x": x, "y": mm.conditionals.Normal(nn.Linear(2, 1), scale=0.5)})
    experts = {"x": mm.conditionals.Normal(nn.Linear(2, 4)), "y": mm.conditionals.Normal(nn.Linear(1, 4))}
    return model, mm.Guide(z=mm.posteriors.ProductOfExperts(experts))


def rows(n=64, seed=0):
    """Return complete rows of the story."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 2, generator=generator)
    x = z @ WEIGHT.T + OFFSET + SCALE * torch.randn(n, 2, generator=generator)
    return mm.Batch({"x": x, "y": z[:, :1] + 0.5 * torch.randn(n, 1, generator=generator)})


class ExactLogits(nn.Module):
    """Logits of a critic against the posterior: log p(x | z) for fakes and a constant for other pairs.

    Args:
        constant: log p_d(x) in the place of the true one, so that the ratio is log p(x | z) itself if it is 0.
    """

    def __init__(self, constant=0.0):
        super().__init__()
        self.constant = nn.Parameter(torch.tensor(constant))

    def forward(self, pairs):
        x, z = pairs[..., :2], pairs[..., 2:]
        fake = dist.Normal(z @ WEIGHT.T.to(z) + OFFSET.to(z), SCALE).log_prob(x).sum(-1)
        zero = torch.zeros_like(fake) * self.constant
        return torch.stack([zero, fake, zero + self.constant], -1)


class Quadratic(nn.Module):
    """A linear function of the features of degree two, of which exact logits of Gaussians consist."""

    def __init__(self, dims, outputs):
        super().__init__()
        self.linear = nn.Linear(dims + dims * (dims + 1) // 2, outputs)
        self.places = torch.triu_indices(dims, dims)

    def forward(self, pairs):
        squares = pairs[..., self.places[0]] * pairs[..., self.places[1]]
        return self.linear(torch.cat([pairs, squares], -1))
