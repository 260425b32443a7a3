"""Random tables of terms, and what they are worth by their definition: an oracle that shares no code with the package.

The story is linear and Gaussian, ``z ~ Normal(0, 1)`` and ``x_m ~ Normal(W_m z + b_m, s_m)``, with ``V_m w_m`` more
in its mean where modalities have private latents ``w_m ~ Normal(0, 1)``. A guide multiplies an expert for each modality
with one of its own, so that q(z | nothing) is not p(z). Draws are given: all terms, rows and latents have the same
noise, at which both sides are evaluated.
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
from pyro_mm.distributions.mixture import Mixture

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
    def __init__(self, generator, sizes, latent, log_noise=0.0, private=False):
        super().__init__()
        self.latent, self.private = latent, private
        self.w = nn.ParameterDict({n: torch.randn(d, latent, generator=generator) for n, d in sizes.items()})
        self.b = nn.ParameterDict({n: torch.randn(d, generator=generator) for n, d in sizes.items()})
        self.log_s = nn.ParameterDict(
            {n: log_noise + 0.3 * torch.randn(d, generator=generator) for n, d in sizes.items()}
        )

        shapes = sizes if private else {}
        self.v = nn.ParameterDict({n: torch.randn(d, latent, generator=generator) for n, d in shapes.items()})

    def forward(self, batch):
        prior = GivenNormal(torch.zeros(self.latent), torch.ones(self.latent)).to_event(1)
        with batch.plate():
            z = pyro.sample("z", prior)
            for name in self.w:
                latents = [z, pyro.sample(f"w_{name}", prior)] if self.private else [z]
                batch.observe(name, lambda *latents, name=name: self.decoded(name, *latents), *latents)

    def decoded(self, name, z, w=None):
        mean = z @ self.w[name].T + self.b[name]
        mean = mean if w is None else mean + w @ self.v[name].T
        return dist.Normal(mean, self.log_s[name].exp()).to_event(1)


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
        shapes = {n: v.shape for n, v in story.v.items()}
        self.of_w = nn.ParameterDict({n: draw(*shape) for n, shape in shapes.items()})
        self.log_scale_w = nn.ParameterDict({n: 0.5 * draw(latent) for n in shapes})

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
            for name in self.of_w:
                loc, scale = torch.zeros(len(self.base)), torch.ones(len(self.base))
                if name in parts:
                    seen = torch.as_tensor(parts[name][0]) > 0
                    own_loc, own_scale = self.private(name, batch[name])
                    loc, scale = torch.where(seen, own_loc, loc), torch.where(seen, own_scale, scale)
                pyro.sample(f"w_{name}", GivenNormal(loc, scale.expand(loc.shape)).to_event(1))

    def private(self, name, value):
        """Loc and scale of a private latent given its modality."""
        return value @ self.of_w[name], self.log_scale_w[name].exp()


# -- what a table is worth ------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One row: its values, which modalities it has, and the random subset of each index."""

    values: dict
    present: list
    drawn: dict = field(default_factory=dict)


def log_normal(x, loc, scale):
    return (-0.5 * (((x - loc) / scale).square() + LOG_2PI) - torch.log(scale)).sum(-1)


def divergence(loc, scale, r_loc, r_scale):
    """KL of diagonal normals."""
    ratio = scale / r_scale
    return (0.5 * (ratio.square() + ((loc - r_loc) / r_scale).square() - 1) - ratio.log()).sum()


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

    def q_private(self, name, names, row):
        if names is None or name not in names:
            return torch.zeros(self.story.latent), torch.ones(self.story.latent)
        return self.guide.private(name, row.values[name])

    def likelihood(self, name, latents, row, frozen):
        stories = (self.story.w, self.story.v)
        weights = [part[name].detach() if frozen else part[name] for part in stories[: len(latents)]]
        b, log_s = (part[name].detach() if frozen else part[name] for part in (self.story.b, self.story.log_s))
        mean = sum((x @ w.T for x, w in zip(latents, weights, strict=True)), b)
        return log_normal(row.values[name], mean, log_s.exp())

    def one(self, entry, chosen, row):
        encode, decode, given = (self.members(which, chosen, row) for which in entry.sets)
        pairs = [(self.q(encode, row), self.q(given, row))]  # of z, and of the private latents of what is decoded
        if self.story.private:
            pairs += [(self.q_private(n, encode, row), self.q_private(n, given, row)) for n in decode]
        kl = sum((divergence(*q, *r) for q, r in pairs), torch.zeros(()))
        if not decode and self.in_closed_form(entry, chosen):
            return -entry.kl * kl
        draws = [loc + scale * self.noise for (loc, scale), _ in pairs]
        ratios = [log_normal(x, *r) - log_normal(x, *q) for x, (q, r) in zip(draws, pairs, strict=True)]
        private = draws[1:] or [None] * len(decode)
        latents = [[x for x in (draws[0], w) if x is not None] for w in private]
        scores = {n: self.likelihood(n, x, row, entry.frozen) for n, x in zip(decode, latents, strict=True)}
        return self.combined(entry, scores, sum(ratios[1:], ratios[0]), kl)

    def in_closed_form(self, entry, chosen):
        """Whether minus the KL is what a term is where it decodes nothing: of Pyro's estimators that of penalties."""
        return self.way != "pyro samples" or (self.is_penalty(entry, chosen) and self.penalties_in_closed_form)

    def is_penalty(self, entry, chosen):
        is_random = entry.decode and entry.decode[0] == "random"
        return not is_random and not self.held & set(self.nominal(entry.decode, chosen))

    def weighed(self, entry, scores):
        """The log-likelihoods by name, each with its weight: one that a mapping does not name weighs 1."""
        weights = entry.likelihood if isinstance(entry.likelihood, dict) else dict.fromkeys(scores, entry.likelihood)
        return sum((weights.get(n, 1.0) * x for n, x in scores.items()), torch.zeros(()))

    def combined(self, entry, scores, log_ratio, kl):
        mapping = isinstance(entry.likelihood, dict)
        likelihood = self.weighed(entry, scores) + torch.zeros_like(log_ratio)
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


# -- a latent of classes ----------------------------------------------------------------------------------------------


class ClassStory(nn.Module):
    """A class y of the prior's probabilities, and ``x_m ~ Normal(at_m[y], s_m)``."""

    private = False

    def __init__(self, generator, sizes, classes):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(classes, generator=generator))
        self.at = nn.ParameterDict({n: torch.randn(classes, d, generator=generator) for n, d in sizes.items()})
        self.log_s = nn.ParameterDict({n: 0.3 * torch.randn(d, generator=generator) for n, d in sizes.items()})

    def forward(self, batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(logits=self.logits))
            for name in self.at:
                batch.observe(name, lambda y, name=name: self.decoded(name, y), y)

    def decoded(self, name, y):
        return dist.Normal(self.at[name][y], self.log_s[name].exp()).to_event(1)


class ClassGuide(nn.Module):
    """q(y | x_S), enumerated, of logits ``base + sum (x_m B_m + c_m)``."""

    def __init__(self, generator, story):
        super().__init__()
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.base = nn.Parameter(draw(len(story.logits)))
        self.b = nn.ParameterDict({n: draw(*at.mT.shape) for n, at in story.at.items()})
        self.c = nn.ParameterDict({n: draw(len(at)) for n, at in story.at.items()})

    def logits(self, parts):
        return sum((mask * (value @ self.b[n] + self.c[n]) for n, (mask, value) in parts.items()), self.base)

    def forward(self, batch):
        parts = {n: (batch.present[n][..., None].to(self.base.dtype), batch[n]) for n in self.b if n in batch}
        with batch.plate():
            pyro.sample("y", dist.Categorical(logits=self.logits(parts)), infer={"enumerate": "parallel"})


class ClassFormula(Formula):
    """Tables of a class that the guide enumerates.

    ``way`` is "sums", the expectation under q(y | x_A), or "summed out", as by the package's own estimators: under
    r(y | x_C), inside the logarithm, so that a term is the evidence of what it decodes, whatever the guide's weights.
    """

    def q(self, names, row):
        if names is None:
            return self.story.logits.log_softmax(-1)
        return self.guide.logits({n: (1.0, row.values[n]) for n in names}).log_softmax(-1)

    def one(self, entry, chosen, row):
        encode, decode, given = (self.members(which, chosen, row) for which in entry.sets)
        log_q, log_r = self.q(encode, row), self.q(given, row)
        if entry.frozen and given is None and not self.is_penalty(entry, chosen):
            log_r = log_r.detach()  # Pyro's estimators hold the whole model fixed
        kl = (log_q.exp() * (log_q - log_r)).sum()
        if not decode:
            return -entry.kl * kl
        each = {}
        for n in decode:
            at, log_s = self.story.at[n], self.story.log_s[n]
            each[n] = log_normal(row.values[n], *((x.detach() if entry.frozen else x) for x in (at, log_s.exp())))
        if self.way == "summed out":
            return entry.likelihood * (log_r + sum(each.values())).logsumexp(-1)
        return (log_q.exp() * self.weighed(entry, each)).sum() - entry.kl * kl


# -- a mixture of experts -------------------------------------------------------------------------------------------


class MixtureGuide(nn.Module):
    """q(z | x_S), the mean of the present modalities' experts; of nothing one that is no expert's."""

    def __init__(self, generator, story):
        super().__init__()
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        latent = story.latent
        self.base = nn.Parameter(draw(latent))
        self.b = nn.ParameterDict({n: draw(*w.shape) for n, w in story.w.items()})
        self.log_scale = nn.ParameterDict({n: 0.5 * draw(latent) for n in ("base", *story.w)})

    def expert(self, name, value):
        """Loc and scale of an expert; of that of nothing for "base"."""
        return self.base if name == "base" else value @ self.b[name], self.log_scale[name].exp()

    def forward(self, batch):
        experts = [self.expert("base", None)] + [self.expert(n, batch[n]) for n in self.b]
        size = (batch.size, len(self.base))
        loc, scale = (torch.stack([x.expand(size) for x in part], -2) for part in zip(*experts, strict=True))
        there = torch.stack(torch.broadcast_tensors(*(batch.present[n] for n in self.b)), -1)
        there = torch.cat([~there.any(-1, keepdim=True), there], -1)
        log_weights = torch.where(there, 0.0, -math.inf)
        with batch.plate():
            pyro.sample("z", Mixture(GivenNormal(loc, scale).to_event(1), log_weights))


class MixtureFormula(Formula):
    """Tables under stratified draws: K of each component, "inside" of the logarithm or "outside".

    The noise is that of all components' draws, the one of nothing first; under the prior there are as many strata.
    """

    def experts(self, names, row):
        """Of a set the components' places and normals."""
        every = ["base", *self.names]
        if names is None:
            return [(i, (torch.zeros(self.story.latent), torch.ones(self.story.latent))) for i in range(len(every))]
        return [(every.index(n), self.guide.expert(n, row.values.get(n))) for n in names or ["base"]]

    def log_density(self, z, names, row):
        experts = self.experts(names, row)
        return torch.stack([log_normal(z, *normal) for _, normal in experts]).logsumexp(0) - math.log(len(experts))

    def one(self, entry, chosen, row):
        encode, decode, given = (self.members(which, chosen, row) for which in entry.sets)
        draws = self.noise.unflatten(0, (len(self.names) + 1, -1))
        values, divergences = [], []
        for place, (loc, scale) in self.experts(encode, row):
            z = loc + scale * draws[place]
            log_ratio = self.log_density(z, given, row) - self.log_density(z, encode, row)
            divergences.append(-self.mean(log_ratio))
            likelihood = {n: self.likelihood(n, [z], row, entry.frozen) for n in decode}
            weights = (
                entry.likelihood if isinstance(entry.likelihood, dict) else dict.fromkeys(decode, entry.likelihood)
            )
            values.append(sum((weights.get(n, 1.0) * x for n, x in likelihood.items()), entry.kl * log_ratio))
        if not decode:
            return -entry.kl * torch.stack(divergences).mean()
        outer = 1.0 if isinstance(entry.likelihood, dict) or entry.likelihood <= 0 else entry.likelihood
        if self.way == "inside":
            return outer * self.log_mean(torch.cat(values) / outer)
        return outer * torch.stack([self.log_mean(x / outer) for x in values]).mean()


# -- expectations and evidences -------------------------------------------------------------------------------------


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


class MixtureExpectation(Expectation, MixtureFormula):
    """The same of stratified draws."""


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
