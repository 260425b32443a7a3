"""Random tables of terms, and what they are worth by their definition: an oracle that shares no code with the package.

The story is linear and Gaussian, ``z ~ Normal(0, 1)`` and ``x_m ~ Normal(W_m z + b_m, s_m)``. A guide multiplies an
expert for each modality with one of its own, so that q(z | nothing) is not p(z). Draws are given: all terms and rows
have the same noise, at which both sides are evaluated.
"""

import math
from dataclasses import dataclass, field
from itertools import combinations

import pyro
import pyro.distributions as dist
import torch
from numpy.polynomial.hermite_e import hermegauss
from torch import nn

from pyro_mm import objectives as tables

SYMBOLS = {"all": tables.ALL, "each": tables.EACH, "others": tables.OTHERS, "every": tables.EVERY}
LOG_2PI = math.log(2 * math.pi)


# -- a random table -------------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A term: each set is a kind of :data:`SYMBOLS`, "prior", ("random", index, rest) or a tuple of names."""

    encode: object
    decode: object
    given: object
    likelihood: object  # a number, or a mapping
    kl: float
    average: bool = False
    frozen: bool = False
    by_step: bool = False  # both weights as functions of the step

    @property
    def sets(self):
        return (self.encode, self.decode, self.given)

    @property
    def over(self):
        return "each" if {"each", "others"} & set(map(str, self.sets)) else "every" if "every" in self.sets else None

    def term(self, empty):
        def of(which):
            if which == "prior":
                return tables.PRIOR
            if which and which[0] == "random":
                return tables.Random(index=which[1], rest=which[2], empty=empty[which[1]])
            return SYMBOLS[which] if isinstance(which, str) else which

        def weight(w):
            return (lambda step: w * (step - 6)) if self.by_step else w  # of which tests take step 7

        likelihood = self.likelihood
        likelihood = (
            {n: weight(w) for n, w in likelihood.items()} if isinstance(likelihood, dict) else weight(likelihood)
        )
        return tables.Term(
            *map(of, self.sets), likelihood=likelihood, kl=weight(self.kl), average=self.average,
            freeze_decoder=self.frozen,
        )  # fmt: skip


def random_bound(rng, weights):
    """A random term of the kinds that most tables are made of: most of them bounds, but for their weights."""
    sets = rng.choice(["all", "all", "each", "every"]), rng.choice(["all", "all", "each"])
    if set(sets) == {"each", "every"}:
        sets = "every", "all"
    return Entry(*sets, "prior", *weights(), rng.random() < 0.3)


def random_entry(rng, names, weights, frozen, by_step=True):
    """A random term; ``weights()`` gives its likelihood weight and its weight of the KL."""

    def a_set(prior):
        kind = rng.choice(
            ["all", "all", "each", "each", "others", "every", "named", "named", "none", "random", "prior"]
        )
        if kind == "prior":
            return "prior" if prior else "all"
        if kind == "named":
            return tuple(rng.sample(names, rng.randint(1, len(names))))
        if kind == "none":
            return ()
        return ("random", rng.randint(0, 1), rng.random() < 0.5) if kind == "random" else kind

    while True:
        given = "prior" if rng.random() < 0.5 else a_set(True)
        sets = (a_set(True), a_set(False), given)
        if "every" not in sets or not {"each", "others"} & set(map(str, sets)):
            break
    likelihood, kl = weights()
    return Entry(
        *sets, likelihood, kl, rng.random() < 0.4, frozen and rng.random() < 0.25, by_step and rng.random() < 0.2
    )


def subsets(names, empty=False):
    return [s for size in range(0 if empty else 1, len(names) + 1) for s in combinations(names, size)]


# -- the pair -------------------------------------------------------------------------------------------------------


class GivenNormal(dist.Normal):
    """A normal whose draws have given noise, ``(K, D)``: that of particle k in every term and row."""

    noise = None  # set by the test

    def rsample(self, sample_shape=()):
        noise = GivenNormal.noise
        particles, latent = noise.shape
        if particles == 1:
            return self.loc + self.scale * noise[0]
        if self.loc.dim() < 3 or len(self.loc) != particles:  # a look at the structure, or a KL in closed form
            return self.loc
        return self.loc + self.scale * noise.reshape(particles, *[1] * (self.loc.dim() - 2), latent)

    def expand(self, batch_shape, _instance=None):
        return GivenNormal(self.loc.expand(batch_shape), self.scale.expand(batch_shape))


class Story(nn.Module):
    def __init__(self, generator, sizes, latent, log_noise=0.0):
        super().__init__()
        self.latent = latent
        self.w = nn.ParameterDict({n: torch.randn(d, latent, generator=generator) for n, d in sizes.items()})
        self.b = nn.ParameterDict({n: torch.randn(d, generator=generator) for n, d in sizes.items()})
        self.log_s = nn.ParameterDict(
            {n: log_noise + 0.3 * torch.randn(d, generator=generator) for n, d in sizes.items()}
        )

    def forward(self, batch):
        with batch.plate():
            prior = GivenNormal(torch.zeros(self.latent), torch.ones(self.latent)).to_event(1)
            z = pyro.sample("z", prior)
            for name in self.w:
                batch.observe(name, lambda z, name=name: self.decoded(name, z), z)

    def decoded(self, name, z):
        return dist.Normal(z @ self.w[name].T + self.b[name], self.log_s[name].exp()).to_event(1)


class Guide(nn.Module):
    """q(z | x_S) of precision ``p_0 + sum p_m`` and of mean ``sum (x_m B_m + c_m)`` over that precision.

    With a latent of one dimension, ``near`` makes it the exact posterior but for its precisions, of which it is the
    standard deviation on the scale of logarithms; None makes another one.
    """

    def __init__(self, generator, story, near=None):
        super().__init__()
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        latent = story.latent
        self.base = nn.Parameter((0.5 if near is None else near) * draw(latent))
        b, c, p = {}, {}, {}
        for name, w in story.w.items():
            by_noise = (w / story.log_s[name].exp().square()[:, None]).detach()
            b[name] = draw(*w.shape) if near is None else by_noise
            c[name] = draw(latent) if near is None else -story.b[name].detach() @ by_noise
            p[name] = 0.7 * draw(latent) if near is None else (w * by_noise).sum(0).log().detach() + near * draw(latent)
        self.b, self.c, self.log_p = nn.ParameterDict(b), nn.ParameterDict(c), nn.ParameterDict(p)

    def normal(self, parts):
        """Loc and scale, of ``(mask, value)`` by name."""
        precision, eta = self.base.exp(), torch.zeros_like(self.base)
        for name, (mask, value) in parts.items():
            precision = precision + mask * self.log_p[name].exp()
            eta = eta + mask * (value @ self.b[name] + self.c[name])
        return eta / precision, precision**-0.5

    def forward(self, batch):
        parts = {}
        for name in self.b:
            there = batch.presence(name)
            if there is not False:
                mask = there[..., None].to(self.base.dtype) if isinstance(there, torch.Tensor) else 1.0
                parts[name] = mask, batch[name]
        loc, scale = self.normal(parts)
        loc = loc.expand(*loc.shape[:-1], self.base.shape[0]) if loc.dim() > 1 else loc.expand(batch.size, -1)
        with batch.plate():
            pyro.sample("z", GivenNormal(loc, scale.expand(loc.shape)).to_event(1))


# -- what a table is worth ------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One row: its values, which modalities it has, and the random subset of each index."""

    values: dict
    present: list
    drawn: dict = field(default_factory=dict)


def log_normal(x, loc, scale):
    return (-0.5 * (((x - loc) / scale).square() + LOG_2PI) - torch.log(scale)).sum(-1)


class Formula:
    """The value of tables for one row, by their definition.

    ``way`` says how the estimator combines draws: "analytic", with the KL in closed form; "samples"; "pyro samples",
    where a term that decodes nothing in a row is by samples too; or a number, the order of Renyi's bound, which is a
    logarithm of a mean and that of IWAE at order 0. ``held`` are the modalities that any row has: a term which decodes
    none of them is a penalty.
    """

    def __init__(self, story, guide, names, noise, way, held=None, penalties_in_closed_form=True):
        self.story, self.guide, self.names, self.noise = story, guide, names, noise
        self.way, self.held = way, set(names if held is None else held)
        self.penalties_in_closed_form = penalties_in_closed_form

    def table(self, entries, row):
        return sum((self.entry(entry, row) for entry in entries), torch.zeros(()))

    def entry(self, entry, row):
        if not row.present:
            return torch.zeros(())
        sums = {None: [()], "each": [(n,) for n in self.names], "every": subsets(self.names)}[entry.over]
        values = [self.one(entry, chosen, row) for chosen in sums if self.counts(entry, chosen, row)]
        total = sum(values, torch.zeros(()))
        return total / len(values) if entry.average and values else total

    def nominal(self, which, chosen):
        if which == "all":
            return list(self.names)
        if which == "others":
            return [n for n in self.names if n not in chosen]
        return list(chosen) if which in ("each", "every") else list(which)

    def counts(self, entry, chosen, row):
        for which in (entry.encode, entry.given):
            if which != "prior" and not (which and which[0] == "random"):
                nominal = self.nominal(which, chosen)
                if nominal and not set(nominal) & set(row.present):
                    return False
        return True

    def members(self, which, chosen, row):
        if which == "prior":
            return None
        if which and which[0] == "random":
            _, index, rest = which
            return [n for n in row.present if (n in row.drawn[index]) != rest]
        return [n for n in self.nominal(which, chosen) if n in row.present]

    def q(self, names, row):
        if names is None:
            return torch.zeros(self.story.latent), torch.ones(self.story.latent)
        return self.guide.normal({n: (1.0, row.values[n]) for n in names})

    def likelihood(self, name, z, row, frozen):
        w, b, log_s = (part[name] for part in (self.story.w, self.story.b, self.story.log_s))
        if frozen:
            w, b, log_s = w.detach(), b.detach(), log_s.detach()
        return log_normal(row.values[name], z @ w.T + b, log_s.exp())

    def one(self, entry, chosen, row):
        encode, decode, given = (self.members(which, chosen, row) for which in entry.sets)
        (loc, scale), (r_loc, r_scale) = self.q(encode, row), self.q(given, row)
        ratio = scale / r_scale
        kl = (0.5 * (ratio.square() + ((loc - r_loc) / r_scale).square() - 1) - ratio.log()).sum()
        if not decode and self.in_closed_form(entry, chosen):
            return -entry.kl * kl
        z = loc + scale * self.noise
        scores = {n: self.likelihood(n, z, row, entry.frozen) for n in decode}
        log_ratio = log_normal(z, r_loc, r_scale) - log_normal(z, loc, scale)
        return self.combined(entry, scores, log_ratio, kl)

    def in_closed_form(self, entry, chosen):
        """Whether minus the KL is what a term is where it decodes nothing: of Pyro's estimators that of penalties."""
        if self.way != "pyro samples":
            return True
        is_random = entry.decode and entry.decode[0] == "random"
        penalty = not is_random and not self.held & set(self.nominal(entry.decode, chosen))
        return penalty and self.penalties_in_closed_form

    def combined(self, entry, scores, log_ratio, kl):
        mapping = isinstance(entry.likelihood, dict)
        weights = {n: entry.likelihood.get(n, 1.0) if mapping else entry.likelihood for n in scores}
        likelihood = sum((weights[n] * x for n, x in scores.items()), torch.zeros_like(log_ratio))
        if self.way == "analytic":
            return self.mean(likelihood) - entry.kl * kl
        if self.way in ("samples", "pyro samples"):
            return self.mean(likelihood + entry.kl * log_ratio)
        # a single positive weight is taken out of the logarithm
        outer = 1.0 if mapping or entry.likelihood <= 0 else entry.likelihood
        power = 1 - self.way
        return outer * self.log_mean(power * (likelihood + entry.kl * log_ratio) / outer) / power

    def mean(self, x):
        return x.mean(0)

    def log_mean(self, x):
        return x.logsumexp(0) - math.log(len(x))


class Expectation(Formula):
    """The expectation of a table's value over the draws of a latent of one dimension, by quadrature."""

    NODES = (60, 40, 24)  # by the number of draws

    def __init__(self, story, guide, names, way, draws):
        nodes, weights = (torch.as_tensor(x) for x in hermegauss(self.NODES[draws - 1]))
        noise = torch.stack(torch.meshgrid(*[nodes] * draws, indexing="ij")).reshape(draws, -1, 1)
        self.weights = torch.ones(())
        for _ in range(draws):
            self.weights = (self.weights[..., None] * weights / weights.sum()).flatten()
        super().__init__(story, guide, names, noise, way)

    def mean(self, x):
        return x.mean(0) @ self.weights

    def log_mean(self, x):
        return super().log_mean(x) @ self.weights


class Evidence:
    """Log-densities of a row under the story: of a set of its modalities, a normal with the latent integrated out."""

    def __init__(self, story, row):
        self.story, self.row = story, row

    def __call__(self, names):
        names = sorted(names)
        if not names:
            return 0.0
        w = torch.cat([self.story.w[n] for n in names])
        loc = torch.cat([self.story.b[n] for n in names])
        noise = torch.cat([self.story.log_s[n] for n in names]).exp().square()
        x = torch.cat([self.row.values[n] for n in names])
        return dist.MultivariateNormal(loc, w @ w.T + noise.diag()).log_prob(x).item()
