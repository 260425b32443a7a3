"""The oracle: a linear-Gaussian model, guides on it, and every term of every objective in closed form."""

import math
from itertools import combinations

import pyro.distributions as dist
import torch
from torch.distributions import kl_divergence

import pyro_mm as mm
from pyro_mm.distributions.base import diagonal


def oracle(modalities=3, latent=3, noise=0.7, seed=0):
    """A LinearGaussian model of a few small modalities."""
    generator = torch.Generator().manual_seed(seed)
    dims = {f"x{m}": 2 + m % 3 for m in range(modalities)}
    loadings = {n: torch.randn(d, latent, generator=generator) for n, d in dims.items()}
    offsets = {n: torch.randn(d, generator=generator) for n, d in dims.items()}
    return mm.models.LinearGaussian(loadings, {n: noise + 0.1 * i for i, n in enumerate(dims)}, offsets)


def every_pattern(model, rows=2, empty=True):
    """A batch that has each pattern of missing modalities, in ``rows`` rows each."""
    names = list(model.loadings)
    patterns = [s for size in range(0 if empty else 1, len(names) + 1) for s in combinations(names, size)]
    full = model.sample(rows * len(patterns))
    present = {n: torch.tensor([n in p for p in patterns for _ in range(rows)]) for n in names}
    return mm.Batch({n: full[n] for n in names}, present=present)


def encoders(model, hidden=(8,)):
    latent = next(iter(model.loadings.values())).shape[1]
    net = lambda w: mm.nn.MLP(w.shape[0], 2 * latent, hidden=hidden)  # noqa: E731
    return {n: mm.conditionals.Normal(net(w)) for n, w in model.loadings.items()}


class SigmaNormal(dist.Normal):
    """A normal whose K = 2D particles are sigma points: the mean of a quadratic over them is its expectation."""

    def rsample(self, sample_shape=()):
        latent = self.loc.shape[-1]
        if self.loc.dim() < 3:  # a look at the structure, without particles
            return self.loc
        assert self.loc.shape[0] == 2 * latent, "as many particles as sigma points"
        signs = math.sqrt(latent) * torch.cat([torch.eye(latent), -torch.eye(latent)])
        return self.loc + self.scale * signs.reshape(2 * latent, *[1] * (self.loc.dim() - 2), latent)

    def expand(self, batch_shape, _instance=None):
        return SigmaNormal(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class Sigma(torch.nn.Module):
    """A posterior with sigma points for draws."""

    def __init__(self, posterior):
        super().__init__()
        self.posterior = posterior

    def forward(self, batch):
        return SigmaNormal(*diagonal(self.posterior(batch))).to_event(1)


class ByHand:
    """Terms of one row in closed form: a diagonal q of every subset, decoders linear."""

    def __init__(self, model, posterior, batch, row):
        self.model, self.posterior, self.batch = model, posterior, batch[row : row + 1]
        self.present = tuple(n for n in batch.names if batch.present[n][row])

    def q(self, names):
        return self.posterior(self.batch.only(*names))

    def likelihood(self, q, names):
        """E_q log p(x_names | z)."""
        total = torch.zeros(())
        loc, scale = diagonal(q)
        for n in names:
            w, sigma = self.model.loadings[n], self.model.log_noise[n].exp()
            mean = self.model.likelihood(n, loc).log_prob(self.batch[n])
            total = total + mean - 0.5 * (scale.square() * w.square().sum(0)).sum() / sigma**2
        return total

    def prior(self):
        loc, scale = diagonal(self.q(()))
        return dist.Normal(torch.zeros_like(loc), torch.ones_like(scale)).to_event(1)

    def term(self, encode, decode, given=None, a=1.0, b=1.0):
        """``given=None`` is the prior, as is ``encode=None``."""
        q = self.prior() if encode is None else self.q(encode)
        r = self.prior() if given is None else self.q(given)
        return a * self.likelihood(q, decode) - b * kl_divergence(q, r)

    def subsets(self):
        return [s for k in range(1, len(self.present) + 1) for s in combinations(self.present, k)]
