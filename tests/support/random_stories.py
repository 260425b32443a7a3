"""Stories of random rows: mixtures of classes, whose likelihoods SciPy knows, and linear maps of a Normal latent."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from scipy.special import logsumexp
from torch import nn

import pyro_mm as mm
from pyro_mm.distributions.base import diagonal
from tests.support.random_batches import NUM_CLASSES
from tests.support.random_tables import GivenNormal

CLASSES = 3  # of the latent
TOKENS = 4
LATENT = 2


def family(kind, table, dims):
    """Return the distribution of a kind of modality whose parameters are a table, ``(.., *event)`` of ``dims``."""
    if kind in ("real", "sequence"):
        return dist.Normal(table, 0.7).to_event(dims)
    if kind == "bits":
        return dist.Bernoulli(logits=table).to_event(dims)
    if kind == "counts":
        return dist.Poisson(table.exp()).to_event(dims)
    return dist.Categorical(logits=table).to_event(dims)


class ClassStory(nn.Module):
    """A story of a latent class c: each modality has independent entries given c, of the family of its kind.

    Args:
        kinds: modality -> kind.
        events: modality -> event shape.
        rng: NumPy's generator.
        dtype: of the parameters.
    """

    def __init__(self, kinds, events, rng, dtype=torch.float64):
        super().__init__()
        self.kinds, self.events = kinds, events
        self.logits = rng.normal(size=CLASSES)
        self.numbers = {name: rng.normal(size=self.shape(name)) for name in kinds}  # as float64, for the oracle
        self.weights = nn.Parameter(torch.tensor(self.logits, dtype=dtype))
        self.tables = nn.ParameterList([torch.tensor(x, dtype=dtype) for x in self.numbers.values()])
        self.places = {name: i for i, name in enumerate(kinds)}

    def shape(self, name):
        categories = {"classes": (NUM_CLASSES,), "tokens": (TOKENS,)}.get(self.kinds[name], ())
        return (CLASSES, *self.events[name], *categories)

    def forward(self, batch):
        with batch.plate():
            c = pyro.sample("c", dist.Categorical(logits=self.weights), infer={"enumerate": "parallel"})
            for name in self.kinds:
                batch.observe(name, lambda c, name=name: self.density(name, c), c)

    def density(self, name, c):
        return family(self.kinds[name], self.tables[self.places[name]][c], len(self.events[name]))

    # -- the oracle -------------------------------------------------------------------------------------------------

    def log_likelihood(self, column):
        """Return log p(x_m | c) of each row and class, ``(N, classes)``, 0 where the modality is missing."""
        table = self.numbers[column.name][None]
        x = column.values[:, None]
        if column.kind in ("real", "sequence"):
            each = stats.norm.logpdf(x, table, 0.7)
        elif column.kind == "bits":
            each = stats.bernoulli.logpmf(x, 1 / (1 + np.exp(-table)))
        elif column.kind == "counts":
            each = stats.poisson.logpmf(x, np.exp(table))
        else:
            normed = table - logsumexp(table, axis=-1, keepdims=True)
            normed, index = np.broadcast_arrays(normed, x[..., None].astype(int))
            each = np.take_along_axis(normed, index[..., :1], -1)[..., 0]
        each = np.where(column.valid()[:, None], each, 0)
        return each.reshape(*each.shape[:2], -1).sum(-1)

    def log_marginal(self, data, names):
        """Return log p of the modalities that a row has among ``names``, ``(N,)``."""
        prior = self.logits - logsumexp(self.logits)
        rows = sum((self.log_likelihood(data.columns[n]) for n in names), np.zeros((data.size, CLASSES)))
        return logsumexp(prior + rows, axis=1)

    def class_probabilities(self, data):
        """Return p(c | x) of each row, ``(N, classes)``."""
        rows = sum(self.log_likelihood(column) for column in data.columns.values())
        joint = self.logits + rows
        return np.exp(joint - logsumexp(joint, axis=1, keepdims=True))


def no_guide(batch):
    """The guide of a story all of whose latents are summed out."""


def story_of(data, rng, dtype=torch.float64):
    """Return a :class:`ClassStory` of some rows."""
    kinds = {name: column.kind for name, column in data.columns.items()}
    return ClassStory(kinds, {name: column.event for name, column in data.columns.items()}, rng, dtype)


def subsets(names):
    """Return the subsets of some names, the empty one included."""
    return [s for size in range(len(names) + 1) for s in combinations(names, size)]


# -- a continuous latent --------------------------------------------------------------------------------------------


class LatentStory(nn.Module):
    """A story of z ~ Normal(0, 1): the parameters of each modality are a linear map of z."""

    def __init__(self, data):
        super().__init__()
        self.kinds = {name: column.kind for name, column in data.columns.items()}
        self.events = {name: column.event for name, column in data.columns.items()}
        self.maps = nn.ModuleDict({name: nn.Linear(LATENT, int(np.prod(self.shape(name)))) for name in self.kinds})

    def shape(self, name):
        return (*self.events[name], *([NUM_CLASSES] if self.kinds[name] == "classes" else []))

    def forward(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            for name in self.kinds:
                batch.observe(name, lambda z, name=name: self.density(name, z), z)

    def density(self, name, z):
        table = self.maps[name](z)
        return family(self.kinds[name], table.reshape(*table.shape[:-1], *self.shape(name)), len(self.events[name]))


class Encoder(nn.Module):
    """A linear map of the entries of a value to two numbers per latent."""

    def __init__(self, event):
        super().__init__()
        self.dims = len(event)
        self.map = nn.Linear(int(np.prod(event)), 2 * LATENT)

    def forward(self, x):
        flat = x[..., None] if self.dims == 0 else x.flatten(-self.dims)
        return self.map(flat.to(self.map.weight.dtype))


class SameNoise(nn.Module):
    """A diagonal posterior whose draws have the noise of :class:`tests.support.random_tables.GivenNormal`."""

    def __init__(self, posterior):
        super().__init__()
        self.posterior = posterior

    def forward(self, batch):
        return GivenNormal(*diagonal(self.posterior(batch))).to_event(1)


POSTERIORS = {
    "product": mm.posteriors.ProductOfExperts,
    "product without prior": lambda experts: mm.posteriors.ProductOfExperts(experts, prior=None),
    "mixture": mm.posteriors.MixtureOfExperts,
    "mixture of products": mm.posteriors.MixtureOfProducts,
    "dependent": lambda experts: mm.posteriors.DependentExperts(experts, 0.4),
}


def latent_pair(data, posterior="product", same_noise=False):
    """Return a :class:`LatentStory` of some rows without lengths, and a guide."""
    experts = {name: mm.conditionals.Normal(Encoder(column.event)) for name, column in data.columns.items()}
    q = POSTERIORS[posterior](experts)
    return LatentStory(data), mm.Guide(z=SameNoise(q) if same_noise else q)
