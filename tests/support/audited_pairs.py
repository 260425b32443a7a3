"""Pairs that the audit of a pair looks at, and the calls that it stands before."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_mm as mm

tables = mm.objectives


LATENT = 2


class Column(nn.Module):
    """An encoder of one number per row, however it is shaped."""

    def __init__(self):
        super().__init__()
        self.net = mm.nn.MLP(1, 2 * LATENT, (8,))

    def forward(self, x):
        return self.net(x.float().reshape(*x.shape[:1], -1)[..., :1])


def prior():
    return dist.Normal(torch.zeros(LATENT), 1.0).to_event(1)


def guide_of(**encoders):
    return mm.Guide(z=mm.posteriors.ProductOfExperts({n: mm.conditionals.Normal(e) for n, e in encoders.items()}))


def pair(decoders, encoders):
    return mm.models.SharedLatent(prior(), decoders), guide_of(**encoders)


def fitted(model, guide, batch, **options):
    return mm.fit(model, guide, tables.elbo(), batch, epochs=1, progress=False, **options)


DOORS = {
    "fit": fitted,
    "log_marginal": lambda m, g, b, **o: mm.log_marginal(m, g, b, num_particles=4, **o),
    "log_weights": lambda m, g, b, **o: mm.log_weights(m, g, b, 4, **o),
    "generate": lambda m, g, b, **o: mm.generate(m, g, b, 4, **o),
    "posterior_draws": lambda m, g, b, **o: mm.posterior_draws(m, g, b, 4, **o),
    "annealed_importance": lambda m, g, b, **o: mm.annealed_importance(
        m, g, b, num_chains=2, temperatures=2, pilot_chains=2, leapfrog_steps=1, **o
    ),
    "compare": lambda m, g, b, **o: mm.compare({"a": (m, g), "b": (m, g)}, b, num_particles=4, **o),
    "to_arviz": lambda m, g, b, **o: mm.to_arviz(m, g, b, num_samples=4, **o),
}  # fmt: skip


def guide_of_a(batch):
    with batch.plate():
        pyro.sample("z", dist.Normal(batch["a"], 1.0).to_event(1))


def two(present=None):
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(8, 2, generator=generator) for name in "ab"}
    return mm.Batch(values, None if present is None else {"b": present})


SOME = torch.tensor([True, False] * 4)


def story(batch):
    with batch.plate():
        z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([len(batch)]))
        batch.observe("x", lambda z: dist.Normal(z, 0.7), z)


def in_minibatches(batch):
    rows = [batch[[i]] for i in range(batch.size)]
    joined = lambda several: mm.Batch({"x": torch.cat([one["x"] for one in several])})  # noqa: E731
    return torch.utils.data.DataLoader(rows, batch_size=4, collate_fn=joined)
