"""Every estimator beside every weight, posterior and kind of story: right by quadrature, or refused in words.

A cell is a story of one scalar latent with one feature (a parent that is observed or missing, a parent of the prior, a
latent of the model alone, an enumerated one, a private one, dropout, batch norm), a posterior, a table of weighted
terms and an estimator. Its value and its whole gradient, averaged over many copies of three rows, are compared with
Gauss-Hermite quadrature of the table's formula. The short mode takes a cover of all pairs, PYRO_MM_LONG=1 the product.
"""

import itertools
import math
import os
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO, config_enumerate
from torch import nn

import pyro_mm as mm

tables, E = mm.objectives, mm.estimators
Term = tables.Term

COPIES, REPEATS = 200, 16
# Of 16 repeats the mean's t statistic (15 degrees of freedom) exceeds 8 with probability 9e-7 for each of some 20
# numbers; repeats are means over 600 rows, so nearly normal.
LIMIT = 8.0

VALUES = {"a": torch.tensor([0.8, -1.1, 0.8]).double(), "b": torch.tensor([1.0, 1.0, 0.0]).double()}
PRESENT = {"a": torch.tensor([True, True, False]), "b": torch.tensor([True, False, True])}
LABELS = torch.tensor([0.9, -0.3, 0.5]).double()


# -- the programs under test -----------------------------------------------------------------------------------------


def parameter(value):
    return nn.Parameter(torch.tensor(value))


class Story(nn.Module):
    """z ~ Normal; a ~ Normal(slope z + offset + effect); b ~ Bernoulli(slope z + offset); the effect by feature."""

    def __init__(self, feature):
        super().__init__()
        self.feature = feature
        self.prior_loc, self.prior_log_scale = parameter(0.2), parameter(0.1)
        self.slope_a, self.offset_a, self.log_noise = parameter(0.9), parameter(-0.1), parameter(-0.2)
        self.slope_b, self.offset_b = parameter(1.2), parameter(0.3)
        self.logit, self.effect = parameter(0.4), parameter(0.7)
        self.dropout = nn.Dropout(0.5)

    def forward(self, batch):
        n, effect, shift = len(batch), torch.zeros(()), torch.zeros(())
        with batch.plate():
            if self.feature in ("present parent", "absent parent", "parent of the prior"):
                label = batch.observe("label", dist.Normal(self.logit, 1.0).expand([n]))
                effect = self.effect * label
            elif self.feature in ("class of the model", "class of the guide"):
                effect = self.effect * pyro.sample("y", dist.Bernoulli(logits=self.logit).expand([n]))
            if self.feature == "parent of the prior":
                shift, effect = effect, torch.zeros(())
            loc = (self.prior_loc + shift)[..., None]
            z = pyro.sample("z", dist.Normal(loc, self.prior_log_scale.exp()).to_event(1))
            if self.feature == "latent of the model":
                effect = self.effect * pyro.sample("u", dist.Normal(torch.zeros(n), 1.0))
            elif self.feature == "private":
                effect = self.effect * pyro.sample("w_a", dist.Normal(torch.zeros(n, 1), 1.0).to_event(1))[..., 0]
            batch.observe("a", self.decode_a, z, effect)
            batch.observe("b", lambda z: dist.Bernoulli(logits=self.slope_b * z[..., 0] + self.offset_b), z)

    def decode_a(self, z, effect):
        z = self.dropout(z) if self.feature == "dropout" else z
        return dist.Normal(self.slope_a * z[..., 0] + self.offset_a + effect, self.log_noise.exp())


class Expert(nn.Module):
    """Normal(loc + slope x, exp(log_scale)), x through dropout or batch norm by feature."""

    def __init__(self, feature, loc, slope, log_scale):
        super().__init__()
        self.loc, self.slope, self.log_scale = parameter(loc), parameter(slope), parameter(log_scale)
        layers = {"dropout": lambda: nn.Dropout(0.5), "batch norm": lambda: nn.BatchNorm1d(1, affine=False)}
        self.layer = layers.get(feature, nn.Identity)()

    def forward(self, x):
        loc = self.loc + self.slope * self.layer(x[:, None])
        return dist.Normal(loc, self.log_scale.exp().expand(loc.shape)).to_event(1)


class Class(nn.Module):
    """q(y | x): Bernoulli of logit + slope a, of logit alone where a is missing."""

    def __init__(self):
        super().__init__()
        self.logit, self.slope = parameter(-0.3), parameter(0.5)

    def forward(self, batch):
        there = torch.as_tensor(batch.presence("a"))
        logits = self.logit + torch.where(there, self.slope * batch["a"], 0.0)
        return dist.Bernoulli(logits=logits.expand(torch.broadcast_shapes(logits.shape, (len(batch),))))


def programs(feature, posterior):
    experts = {"a": Expert(feature, 0.1, 0.4, -0.4), "b": Expert(feature, -0.2, 0.5, -0.2)}
    kinds = {"product": mm.posteriors.ProductOfExperts, "mixture": mm.posteriors.MixtureOfExperts}
    sites = {"z": kinds[posterior](experts)}
    if feature == "private":
        sites["w_a"] = mm.posteriors.Private("a", Expert("", 0.3, 0.2, -0.5))
    if feature == "class of the guide":
        sites = {"y": Class()} | sites
    guide = mm.Guide(**sites)
    return Story(feature), guide


def rows_of(feature, copies=1):
    values, present = dict(VALUES), dict(PRESENT)
    if feature in ("present parent", "parent of the prior", "absent parent"):
        values["label"] = LABELS
        present["label"] = torch.full((3,), feature != "absent parent")
    repeat = lambda x: x.repeat(copies)  # noqa: E731
    return mm.Batch({n: repeat(v) for n, v in values.items()}, present={n: repeat(p) for n, p in present.items()})


# -- the formula, by quadrature --------------------------------------------------------------------------------------

GAUSS = tuple(torch.tensor(x) for x in hermegauss(12))


@dataclass(frozen=True)
class Concrete:
    """A term of one row: sets of modalities, None for the prior, and the weights."""

    encode: tuple[str, ...] | None
    decode: tuple[str, ...]
    given: tuple[str, ...] | None
    likelihood: float | dict[str, float] = 1.0
    kl: float = 1.0
    weight: float = 1.0
    frozen: bool = False


@dataclass(frozen=True)
class Particles:
    """All outcomes of one draw: probability, log p(x_B | z), log r - log q, and the mixture component."""

    probability: torch.Tensor
    likelihood: dict[str, torch.Tensor]
    ratio: torch.Tensor
    component: torch.Tensor
    component_weight: torch.Tensor


class Quadrature:
    """Expected values of a cell's estimator, as a differentiable function of the parameters of its programs."""

    def __init__(self, feature, posterior, model, guide, pyros):
        self.feature, self.posterior, self.model, self.guide = feature, posterior, model, guide
        self.pyros = pyros  # with whose estimators freeze_decoder holds all of the model
        self.batch = rows_of(feature)

    def encoded(self, name, row, state):
        """Location and scale of an expert."""
        expert = self.guide.posteriors["z"].experts[name]
        x = self.batch[name][row]
        if self.feature == "dropout":
            x = 2.0 * x * state[name]
        elif self.feature == "batch norm":
            every = self.batch[name]
            x = (x - every.mean()) / (every.var(unbiased=False) + 1e-5).sqrt()
        return expert.loc + expert.slope * x, expert.log_scale.exp()

    def components(self, names, row, state, label, frozen=False):
        """q(z | x_names): weights ``(C,)``, locations ``(C, 1, 1, L, 1)`` and scales of its components."""
        if names is None:
            model = constant(self.model) if frozen and self.pyros else self.model
            shift = model.effect * label if self.feature == "parent of the prior" else torch.zeros(1, 1)
            return torch.ones(1), (model.prior_loc + shift)[None, None, None], model.prior_log_scale.exp()[None]
        names = tuple(n for n in names if n in ("a", "b"))
        if not names:  # of a mixture all components count, alike, and so they are strata
            count = 2 if self.posterior == "mixture" else 1
            return torch.full((count,), 1 / count), torch.zeros(count, 1, 1, 1, 1), torch.ones(count)
        locs, scales = (torch.stack(x) for x in zip(*(self.encoded(n, row, state) for n in names), strict=True))
        if self.posterior == "mixture":
            return torch.full((len(names),), 1 / len(names)), locs[:, None, None, None, None], scales
        precision = 1 + scales.pow(-2).sum()
        loc = (locs * scales.pow(-2)).sum() / precision
        return torch.ones(1), loc.reshape(1, 1, 1, 1, 1), precision.rsqrt()[None]

    def classes(self, names, row, states, frozen):
        """log q(y | x_names), or log p(y)."""
        if names is None or self.feature == "class of the model":
            logit = (constant(self.model) if frozen and self.pyros else self.model).logit
        else:
            posterior = self.guide.posteriors["y"]
            logit = posterior.logit + (posterior.slope * self.batch["a"][row] if "a" in names else 0.0)
        return dist.Bernoulli(logits=logit).log_prob(states)

    def private(self, names, row):
        """q(w_a | x_names), or the prior's numbers."""
        if names is None or "a" not in names:
            return torch.zeros(()), torch.ones(())
        expert = self.guide.posteriors["w_a"].encoder
        return expert.loc + expert.slope * self.batch["a"][row], expert.log_scale.exp()

    def particles(self, term, row, state):
        nodes, weights = GAUSS
        probability = weights / weights.sum()
        label = self.batch["label"][row].reshape(1, 1) if "label" in self.batch else torch.zeros(1, 1)
        drawn = "label" in self.batch and "label" not in term.decode  # a parent that the term does not decode is drawn
        if drawn:
            # frozen decoders are those of the likelihood: a prior's own parent goes on learning
            held = term.frozen and (self.pyros or self.feature != "parent of the prior")
            logit = (constant(self.model) if held else self.model).logit
            label = (logit + nodes)[:, None]
        q, r = (self.components(names, row, state, label, term.frozen) for names in (term.encode, term.given))
        decode = constant(self.model) if term.frozen else self.model
        # axes: component, noise of z, noise of w_a or u, label or class, dropout of the decoder
        z = q[1] + (q[2][:, None] * nodes)[:, :, None, None, None]
        p = (q[0][:, None] * probability)[:, :, None, None, None]
        p = p * probability[:, None] if drawn else p
        log = lambda parts: torch.stack(  # noqa: E731
            [w.log() + dist.Normal(m, s).log_prob(z) for w, m, s in zip(*parts, strict=True)]
        ).logsumexp(0)
        ratio = log(r) - log(q)
        effect, seen = torch.zeros(()), z
        likelihood = {}
        if self.feature == "latent of the model":
            p = p * probability[:, None, None]
            effect = decode.effect * nodes[:, None, None]
        elif self.feature == "private" and "a" in term.decode:
            m, s = self.private(term.encode, row)
            w = (m + s * nodes)[:, None, None]
            p = p * probability[:, None, None]
            effect = decode.effect * w
            ratio = ratio + dist.Normal(*self.private(term.given, row)).log_prob(w) - dist.Normal(m, s).log_prob(w)
        elif self.feature in ("present parent", "parent of the prior", "absent parent"):
            if not drawn:
                likelihood["label"] = dist.Normal(decode.logit, 1.0).log_prob(label)
            if self.feature != "parent of the prior":
                effect = decode.effect * label
        if self.feature == "dropout" and "a" in term.decode:
            p, seen = p * torch.full((2,), 0.5), z * torch.tensor([0.0, 2.0])

        def decoded(effect):
            loc = decode.slope_a * seen + decode.offset_a + effect
            return dist.Normal(loc, decode.log_noise.exp()).log_prob(self.batch["a"][row])

        if self.feature in ("class of the model", "class of the guide"):
            states = torch.tensor([0.0, 1.0])
            log_q, log_r = (self.classes(names, row, states, term.frozen) for names in (term.encode, term.given))
            if term.decode and not (self.pyros and self.feature == "class of the guide"):  # summed out
                if "a" in term.decode:
                    each = [w + decoded(decode.effect * y) for w, y in zip(log_r, states, strict=True)]
                    likelihood["a"] = torch.stack(each).logsumexp(0)
            else:
                p, ratio = p * log_q.exp(), ratio + log_r - log_q
                if "a" in term.decode:
                    likelihood["a"] = decoded(decode.effect * states)
        elif "a" in term.decode:
            likelihood["a"] = decoded(effect)
        if "b" in term.decode:
            likelihood["b"] = dist.Bernoulli(logits=decode.slope_b * z + decode.offset_b).log_prob(self.batch["b"][row])
        shape = torch.broadcast_shapes(p.shape, ratio.shape, *(x.shape for x in likelihood.values()))
        index = torch.arange(len(q[0]))[:, None, None, None, None].expand(shape)
        flat = lambda x: x.expand(shape).flatten()  # noqa: E731
        return Particles(flat(p), {n: flat(x) for n, x in likelihood.items()}, flat(ratio), flat(index), q[0])

    def term(self, term, row, estimator):
        """The expected value of a term of a row."""
        total = torch.zeros(())
        states = [{}]
        if self.feature == "dropout":
            states = [{"a": s, "b": t} for s, t in itertools.product((0.0, 1.0), repeat=2)]
        for state in states:
            total = total + estimator(self.particles(term, row, state), term) / len(states)
        return term.weight * total

    def value(self, table, estimator):
        """The objective, averaged over the three rows."""
        total = torch.zeros(())
        for row in range(3):
            present = tuple(n for n in self.batch.names if self.batch.present[n][row])
            for term in table(present):
                total = total + self.term(term, row, estimator)
        return total / 3


def constant(model):
    """The same story, of constants."""
    frozen = Story(model.feature)
    frozen.load_state_dict(model.state_dict())
    for p in frozen.parameters():
        p.requires_grad_(False)
    return frozen


def split(term, names):
    """The weight outside of a logarithm, and those inside: per modality, and of the KL."""
    if isinstance(term.likelihood, dict):
        return 1.0, {n: term.likelihood.get(n, 1.0) for n in names}, term.kl
    return term.likelihood, dict.fromkeys(names, 1.0), term.kl / term.likelihood


def linear(particles, term):
    outer, inner, kl = split(term, particles.likelihood)
    log_w = sum((inner[n] * x for n, x in particles.likelihood.items()), kl * particles.ratio)
    return outer * (particles.probability * log_w).sum()


def of_two(reduce):
    """The expectation over two independent draws of a function of their log-weights."""

    def expectation(particles, term):
        if not particles.likelihood:
            return linear(particles, term)
        outer, inner, kl = split(term, particles.likelihood)
        log_w = sum((inner[n] * x for n, x in particles.likelihood.items()), kl * particles.ratio)
        p = particles.probability
        return outer * (p @ reduce(log_w[:, None], log_w[None, :]) @ p)

    return expectation


mean_of_weights = of_two(lambda u, v: torch.logaddexp(u, v) - math.log(2))


def renyi(alpha):
    power = 1 - alpha
    return of_two(lambda u, v: (torch.logaddexp(power * u, power * v) - math.log(2)) / power)


def outside(particles, term):
    """Two draws of every component, the mean over components of the logarithm."""
    total = torch.zeros(())
    for c, weight in enumerate(particles.component_weight):
        own = particles.component == c
        some = Particles(
            particles.probability[own] / weight,
            {n: x[own] for n, x in particles.likelihood.items()},
            particles.ratio[own],
            particles.component[own],
            particles.component_weight,
        )
        total = total + weight * mean_of_weights(some, term)
    return total


def inside(particles, term):
    """One draw of every component, the logarithm of the mean."""
    if not particles.likelihood:
        return linear(particles, term)
    outer, inner, kl = split(term, particles.likelihood)
    log_w = sum((inner[n] * x for n, x in particles.likelihood.items()), kl * particles.ratio)
    parts = []
    for c, weight in enumerate(particles.component_weight):
        own = particles.component == c
        parts.append((particles.probability[own] / weight, log_w[own] + weight.log()))
    (p, u), *rest = parts
    if not rest:
        return outer * (p @ u)
    ((q, v),) = rest
    return outer * (p @ torch.logaddexp(u[:, None], v[None, :]) @ q)


# -- the axes of the product -----------------------------------------------------------------------------------------

FEATURES = [
    "plain", "present parent", "absent parent", "parent of the prior", "latent of the model", "class of the model",
    "class of the guide", "private", "dropout", "batch norm",
]  # fmt: skip
POSTERIORS = ["product", "mixture"]


def others(present, name):
    return tuple(n for n in present if n != name)


TABLES = {
    "elbo": (tables.elbo, lambda s: [Concrete(s, s, None)]),
    "kl .5": (lambda e: tables.elbo(e, kl=0.5), lambda s: [Concrete(s, s, None, 1.0, 0.5)]),
    "kl 2 of the step": (lambda e: tables.elbo(e, kl=lambda step: 2.0), lambda s: [Concrete(s, s, None, 1.0, 2.0)]),
    "likelihood 2, kl 1.5": (
        lambda e: tables.Objective([Term(tables.ALL, tables.ALL, likelihood=2.0, kl=1.5)], e),
        lambda s: [Concrete(s, s, None, 2.0, 1.5)],
    ),
    "modality b times 3": (
        lambda e: tables.Objective([Term(tables.ALL, tables.ALL, likelihood={"b": 3.0}, kl=0.7)], e),
        lambda s: [Concrete(s, s, None, {"b": 3.0}, 0.7)],
    ),
    "jmvae": (
        lambda e: tables.jmvae_kl(0.3, e, kl=0.7),
        lambda s: [Concrete(s, s, None, 1.0, 0.7), *(Concrete(s, (), (m,), 1.0, 0.3) for m in s)],
    ),
    "telbo": (tables.telbo, lambda s: [Concrete(s, s, None), *(Concrete((m,), (m,), None, frozen=True) for m in s)]),
    "vaevae": (
        tables.vaevae,
        lambda s: [
            x
            for m in s
            for x in (
                Concrete((m,), (m,), None, weight=1 / len(s)),
                Concrete(s, others(s, m), (m,), weight=1 / len(s)),
            )
        ],
    ),
    "mmjsd": (
        lambda e: tables.mmjsd(0.4, e),
        lambda s: [
            *(Concrete((m,), s, s, 1.0, 0.6, weight=1 / len(s)) for m in s),
            Concrete(None, (), s, 1.0, 0.4),
        ],
    ),
}

ESTIMATORS = {
    "AnalyticKL": (E.AnalyticKL, linear),
    "AnalyticKL(2)": (lambda: E.AnalyticKL(2), linear),
    "IWAE": (lambda: E.IWAE(2), mean_of_weights),
    "one by one": (lambda: E.IWAE(2, vectorize_particles=False), mean_of_weights),
    "resampled": (lambda: E.IWAE(2, resample=True), mean_of_weights),
    "inside": (lambda: E.IWAE(1, stratified="inside"), inside),
    "outside": (lambda: E.IWAE(2, stratified="outside"), outside),
    "outside, resampled": (lambda: E.IWAE(2, stratified="outside", resample=True), outside),
    "DReG": (lambda: E.DReG(2), mean_of_weights),
    "StickTheLanding": (lambda: E.StickTheLanding(2), linear),
    "Renyi(.5)": (lambda: E.Renyi(0.5, 2), renyi(0.5)),
    "Renyi(2)": (lambda: E.Renyi(2.0, 2), renyi(2.0)),
    "Trace_ELBO": (Trace_ELBO, linear),
    "TraceMeanField_ELBO": (TraceMeanField_ELBO, linear),
    "TraceGraph_ELBO": (TraceGraph_ELBO, linear),
    "TraceEnum_ELBO": (TraceEnum_ELBO, linear),
}


def cells():
    kinds = [FEATURES, POSTERIORS, list(TABLES), list(ESTIMATORS)]
    product = list(itertools.product(*kinds))
    if os.environ.get("PYRO_MM_LONG") == "1":
        return product
    pairs = lambda c: {(i, c[i], j, c[j]) for i, j in itertools.combinations(range(4), 2)}  # noqa: E731
    missing, chosen = set().union(*map(pairs, product)), []
    while missing:
        best = max(product, key=lambda c: len(pairs(c) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


CLASSES = ("class of the model", "class of the guide")
OURS = [name for name in ESTIMATORS if not name.endswith("_ELBO")]
# What is refused, in words that match: (condition on feature, posterior, table and estimator, words).
REFUSED = [
    (lambda f, p, t, e: e in ("inside", "outside", "outside, resampled") and p == "product", "needs a mixture"),
    (lambda f, p, t, e: "resampled" in e and f in CLASSES, "chooses among draws, and an enumerated site is summed out"),
    (lambda f, p, t, e: e in ("DReG", "StickTheLanding") and f == "class of the guide", "guide site 'y' is enumerated"),
    (lambda f, p, t, e: e in OURS and f in CLASSES and t == "modality b times 3", "a weight per modality cannot be"),
    (lambda f, p, t, e: e in OURS and f in CLASSES and t == "telbo", "an enumerated site mixes them"),
    (lambda f, p, t, e: e in OURS and f in CLASSES and t == "mmjsd", "that draw has no derivative"),
    (lambda f, p, t, e: e not in OURS and f == "latent of the model", "latent site 'u' is in the model only"),
    (
        lambda f, p, t, e: e not in (*OURS, "TraceEnum_ELBO") and f == "class of the model",
        "discrete latent site 'y' is in the model only",
    ),
    (lambda f, p, t, e: e == "TraceMeanField_ELBO" and f == "class of the guide", "site 'y' has no rsample"),
    (lambda f, p, t, e: e == "TraceEnum_ELBO" and t in ("vaevae", "mmjsd"), "gives one number for all rows"),
    (
        lambda f, p, t, e: e == "TraceEnum_ELBO" and f == "class of the model" and t not in ("elbo", "telbo"),
        "takes one weight for all of that",
    ),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("cell", cells(), ids=" | ".join)
def test_a_combination_of_features_is_exact_or_refused(cell, double):
    feature, posterior, table, estimator = cell
    model, guide = programs(feature, posterior)
    make, formula = TABLES[table]
    build, reduce = ESTIMATORS[estimator]
    objective = make(build())
    shown = config_enumerate(guide) if feature == "class of the guide" else guide
    refused = [words for condition, words in REFUSED if condition(*cell)]
    if refused:
        with pytest.raises(ValueError, match="|".join(refused)):
            objective.loss_and_grads(model, shown, rows_of(feature))
        return
    batch = rows_of(feature, COPIES)
    parameters = [*model.parameters(), *guide.parameters()]
    torch.manual_seed(1)
    found = []
    for _ in range(REPEATS):
        for p in parameters:
            p.grad = None
        value = -objective.loss_and_grads(model, shown, batch)
        grads = [torch.zeros_like(p) if p.grad is None else -p.grad for p in parameters]
        found.append(torch.stack([torch.tensor(value), *grads]) / len(batch))
    expected = Quadrature(feature, posterior, model, guide, pyros=estimator not in OURS).value(formula, reduce)
    grads = torch.autograd.grad(expected, parameters, allow_unused=True)
    right = torch.stack([expected.detach(), *(torch.zeros(()) if g is None else g for g in grads)])
    mean = torch.stack(found).mean(0)
    error = torch.stack(found).std(0) / math.sqrt(REPEATS) + 1e-6
    score = (mean - right) / error
    assert score.abs().max() < LIMIT, (mean, right, score)
