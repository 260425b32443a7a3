"""Random tables equal their formula, and what calls itself a lower bound lies below the known evidence."""

import itertools
import os
import random

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyro_mm as mm
from pyro_mm.estimators import IWAE, AnalyticKL, DReG, Renyi, StickTheLanding
from tests.support.random_tables import (
    ClassFormula,
    ClassGuide,
    ClassStory,
    Evidence,
    Expectation,
    Formula,
    GivenNormal,
    Guide,
    MixtureExpectation,
    MixtureFormula,
    MixtureGuide,
    Row,
    Story,
    random_bound,
    random_entry,
    subsets,
)

CASES = 10_000 if os.environ.get("PYRO_MM_LONG") == "1" else 150
PARTS = 4  # tests that the cases are dealt out to
STEP = 7  # at which weights that are functions of the step are what the oracle takes them for


def pyros(kind, **options):
    return lambda k: kind(num_particles=k, vectorize_particles=k > 1, **options)


# an estimator of K particles, how it combines them, whether its gradient is that of its value, and more of the oracle
ESTIMATORS = {
    "AnalyticKL": (AnalyticKL, "analytic", True, {}),
    "IWAE": (IWAE, 0.0, True, {}),
    "DReG": (DReG, 0.0, False, {}),
    "Renyi 0.5": (lambda k: Renyi(0.5, k), 0.5, True, {}),
    "Renyi -1": (lambda k: Renyi(-1.0, k), -1.0, True, {}),
    "StickTheLanding": (StickTheLanding, "samples", False, {}),
    "Trace": (pyros(Trace_ELBO), "pyro samples", True, {"penalties_in_closed_form": False}),
    "TraceGraph": (pyros(TraceGraph_ELBO), "pyro samples", False, {"penalties_in_closed_form": False}),
    "TraceMeanField": (pyros(TraceMeanField_ELBO), "analytic", True, {}),
    "TraceEnum": (pyros(TraceEnum_ELBO, strict_enumeration_warning=False), "pyro samples", True, {}),
}


def weights_of_all_kinds(rng, names):
    def number():
        return rng.choice([0.0, 1.0, 1.0, 0.5, 2.0, 3.0, -0.5])

    def weights():
        kind = rng.random()
        if kind < 0.3:
            return {n: number() for n in rng.sample(names, rng.randint(1, len(names)))}, number()
        one = number()
        return one, one if kind < 0.6 else number()

    return weights


class Case:
    """A random story, guide, batch, table and estimator, from a seed."""

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        generator = torch.Generator().manual_seed(seed)
        self.names = ["a", "b", "c"][: rng.randint(1, 3)]
        latent = rng.randint(1, 2)
        sizes = {n: rng.randint(1, 3) for n in self.names}
        self.story = Story(generator, sizes, latent, private=rng.random() < 0.3)
        self.guide = Guide(generator, self.story, near=0.0 if latent == 1 and rng.random() < 0.2 else None)
        weights = weights_of_all_kinds(rng, self.names)
        self.entries = [random_entry(rng, self.names, weights, frozen=True) for _ in range(rng.randint(1, 3))]
        self.kind = rng.choice(list(ESTIMATORS))
        particles = rng.randint(1, 3)
        if self.kind == "TraceEnum" and any(entry.encode == "prior" for entry in self.entries):
            particles = 1  # they would be drawn one after another, and all have the same noise
        build, self.way, self.has_gradient, self.options = ESTIMATORS[self.kind]
        self.estimator = build(particles)
        self.noise = torch.randn(particles, latent, generator=generator)
        self.empty = [rng.random() < 0.5 for _ in range(2)]
        count = rng.randint(1, 3)
        self.values = {n: torch.randn(count, d, generator=generator) for n, d in sizes.items()}
        complete = rng.random() < 0.3
        self.present = {n: [complete or rng.random() < 0.6 for _ in range(count)] for n in self.names}
        self.rows = [self.row(i) for i in range(count)]
        self.vectorize = rng.random() < 0.7

    def formula(self, *args, **options):
        return Formula(*args, **options)

    def row(self, i):
        present = [n for n in self.names if self.present[n][i]]
        drawn = {}
        for index in range(2):
            choices = subsets(present, empty=self.empty[index] or not present)
            drawn[index] = self.rng.choice(choices)
        return Row({n: x[i] for n, x in self.values.items()}, present, drawn)

    def batch(self):
        """With padding, or as a part of a larger data set; and by what factor a loss is larger for the latter."""
        masks = {n: torch.tensor(m) for n, m in self.present.items()}
        batch, factor = mm.Batch(self.values, masks), 1.0
        if self.rng.random() < 0.2:
            batch, factor = batch.part_of(5 * batch.size), 5.0
        elif self.rng.random() < 0.2 and any(map(any, self.present.values())):
            batch = batch.padded(batch.size + 2)
        return batch, factor

    def objective(self):
        terms = [entry.term(self.empty) for entry in self.entries]
        objective = mm.objectives.Objective(terms, self.estimator, vectorize=self.vectorize)
        objective.steps = STEP
        return objective

    def random_subset(self, batch, index):
        """In the place of the package's own draw."""
        rows = [row.drawn[index] for row in self.rows]
        rows += [rows[0]] * (batch.size - len(rows))
        return {n: torch.tensor([n in drawn for drawn in rows]) & batch.present[n] for n in batch.names}

    def indices(self):
        """Of random sets, in the order in which a table draws them."""
        seen = [which[1] for e in self.entries for which in e.sets if which and which[0] == "random"]
        return list(dict.fromkeys(seen))

    def expected(self):
        held = {n for n in self.names if any(self.present[n])}
        formula = self.formula(self.story, self.guide, self.names, self.noise, self.way, held, **self.options)
        return sum((formula.table(self.entries, row) for row in self.rows), torch.zeros(()))


class ClassCase(Case):
    """The same of a class that the guide enumerates."""

    def __init__(self, seed):
        super().__init__(seed)
        rng, generator = self.rng, torch.Generator().manual_seed(seed)
        self.kind = rng.choice(["AnalyticKL", "IWAE", "TraceEnum"])
        ours = self.kind != "TraceEnum"
        build, _, self.has_gradient, _ = ESTIMATORS[self.kind]
        self.estimator, self.way = build(1 if self.kind != "IWAE" else 2), "summed out" if ours else "sums"
        self.story = ClassStory(generator, {n: x.shape[1] for n, x in self.values.items()}, rng.randint(2, 3))
        self.guide = ClassGuide(generator, self.story)
        for entry in self.entries:
            if entry.encode == "prior":  # whose class is drawn
                entry.encode = ()
            if ours and isinstance(entry.likelihood, dict):  # which are refused, as is a decoder held fixed
                entry.likelihood = 2.0
            entry.frozen = entry.frozen and not ours

    def formula(self, *args, **_):
        return ClassFormula(*args)


class MixtureCase(Case):
    """The same of a mixture posterior whose components all have their draws."""

    def __init__(self, seed):
        super().__init__(seed)
        rng, generator = self.rng, torch.Generator().manual_seed(seed)
        sizes = {n: x.shape[1] for n, x in self.values.items()}
        self.story = Story(generator, sizes, latent=2)
        self.guide = MixtureGuide(generator, self.story)
        self.way, draws = rng.choice(["inside", "outside"]), rng.randint(1, 3)
        self.noise = torch.randn((len(sizes) + 1) * draws, 2, generator=generator)
        self.kind, self.estimator, self.has_gradient = "stratified", IWAE(draws, stratified=self.way), True
        self.entries[0].encode, self.entries[0].decode, self.entries[0].given = "all", "all", "prior"
        self.options, self.vectorize = {}, True  # penalties by themselves take one draw of the whole mixture

    def formula(self, *args, **_):
        return MixtureFormula(*args)


def differing(case, monkeypatch):
    """How a table's value differs from its formula: in words, or empty; None where it is refused."""
    GivenNormal.noise = case.noise
    order = iter(case.indices())
    monkeypatch.setattr(
        "pyro_mm.objectives.expansion._random_subset", lambda batch, *_: case.random_subset(batch, next(order))
    )
    objective, (batch, factor) = case.objective(), case.batch()
    expected = -factor * case.expected()
    evaluate = objective.differentiable_loss if objective.differentiable else objective.loss
    try:
        found = torch.as_tensor(evaluate(case.story, case.guide, batch))
    except ValueError as error:
        if case.kind == "TraceEnum" and any(words in str(error) for words in ("weighs rows", "be differentiated")):
            return None
        raise
    if not np.isclose(float(found), float(expected), rtol=1e-9, atol=1e-9):
        return f"value {float(found)} for {float(expected)}"
    parameters = [*case.story.parameters(), *case.guide.parameters()]
    if not case.has_gradient or not expected.requires_grad:
        return ""
    if not found.requires_grad:
        return "no gradient"
    options = {"allow_unused": True, "materialize_grads": True}
    for one, other in zip(*(torch.autograd.grad(x, parameters, **options) for x in (found, expected)), strict=True):
        if not torch.allclose(one, other, rtol=1e-7, atol=1e-8):
            return f"a gradient of {one.flatten().tolist()} for {other.flatten().tolist()}"
    return ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", [Case, ClassCase, MixtureCase])
def test_a_random_table_equals_its_formula(kind, part, monkeypatch, double):
    refused = 0
    for seed in range(part, CASES if kind is Case else CASES // 2, PARTS):
        case = kind(seed)
        difference = differing(case, monkeypatch)
        refused += difference is None
        where = f"seed {seed}, {case.kind}, vectorize={case.vectorize}: {case.entries}, {case.present}"
        assert not difference, f"{difference}: {where}"
    assert refused < 0.1 * CASES / PARTS


# -- what calls itself a bound ---------------------------------------------------------------------------------------

# an estimator, the number of draws over which its mean is taken, and how it combines them
BOUNDS = {
    "AnalyticKL": (AnalyticKL(3), 1, "analytic"),
    "StickTheLanding": (StickTheLanding(3), 1, "samples"),
    "Trace": (Trace_ELBO(), 1, "samples"),
    "TraceEnum": (TraceEnum_ELBO(), 1, "samples"),
    "IWAE of one": (IWAE(1), 1, 0.0),
    "IWAE": (IWAE(3), 3, 0.0),
    "DReG": (DReG(3), 3, 0.0),
    "Renyi -1": (Renyi(-1.0, 3), 3, -1.0),
    "Renyi 0.2": (Renyi(0.2, 3), 3, 0.2),
    "Renyi 2": (Renyi(2.0, 2), 2, 2.0),
    "inside": (IWAE(1, stratified="inside"), None, "inside"),  # one draw of each component
    "outside": (IWAE(1, stratified="outside"), None, "outside"),
}


def weights_of_bounds(rng, names):
    def weights():
        one = rng.choice([0.0, 0.5, 1.0, 1.0, 2.0])
        kl = one if rng.random() < 0.75 else rng.choice([0.5, 1.0, 2.0, 3.0])
        if rng.random() < 0.3:
            some = names if rng.random() < 0.7 else rng.sample(names, rng.randint(1, len(names)))
            return dict.fromkeys(some, one), kl
        return one, kl

    return weights


class BoundCase:
    """A random table and estimator, and one row of a story whose guide may be its exact posterior, from a seed."""

    def __init__(self, seed):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.kind = rng.choice(list(BOUNDS))
        mixture = self.kind in ("inside", "outside")
        self.names = ["a", "b", "c"][: rng.randint(1, 2 if mixture else 3)]
        noise = rng.choice([-2.0, 0.0])  # by which densities are above 1, or below
        self.story = Story(generator, {n: rng.randint(1, 2) for n in self.names}, latent=1, log_noise=noise)
        near = rng.choice([0.0, 0.0, 0.2, 0.4, None])
        self.exact = near == 0.0 and not mixture
        self.guide = MixtureGuide(generator, self.story) if mixture else Guide(generator, self.story, near)
        weights = weights_of_bounds(rng, self.names)
        if rng.random() < 0.5:
            self.entries = [random_bound(rng, weights)]
        else:
            count = rng.randint(1, 2)
            self.entries = [random_entry(rng, self.names, weights, frozen=False, by_step=False) for _ in range(count)]
        self.empty = [rng.random() < 0.5 for _ in range(2)]
        z = torch.randn(1, generator=generator)
        near = {n: self.story.decoded(n, z).base_dist for n in self.names}
        values = {n: d.mean + d.stddev * torch.randn(d.mean.shape, generator=generator) for n, d in near.items()}
        present = [n for n in self.names if rng.random() < 0.75]
        self.row = Row(values, present or self.names[:1])

    def target(self):
        terms = [entry.term(self.empty) for entry in self.entries]
        objective = mm.objectives.Objective(terms, BOUNDS[self.kind][0])
        return objective.bounds(self.names, self.row.present)

    def value(self):
        """The mean over the estimator's draws, and over the random sets."""
        _, draws, way = BOUNDS[self.kind]
        of_mixture = draws is None
        draws = len(self.names) + 1 if of_mixture else draws
        kind = MixtureExpectation if of_mixture else Expectation
        formula = kind(self.story, self.guide, self.names, way, draws)
        indices = {which[1] for e in self.entries for which in e.sets if which and which[0] == "random"}
        options = [subsets(self.row.present, empty=self.empty[i]) if i in indices else [()] for i in range(2)]
        drawn = list(itertools.product(*options))
        rows = [Row(self.row.values, self.row.present, dict(enumerate(sets))) for sets in drawn]
        return sum(float(formula.table(self.entries, row)) for row in rows) / len(rows)

    def bounded(self, target):
        evidence = Evidence(self.story, self.row)
        marginal = sum(w * evidence(names) for names, w in target.log_evidence.items())
        return marginal + sum(w * (evidence(b | c) - evidence(c)) for (b, c), w in target.conditional.items())


@torch.no_grad()
def test_a_random_lower_bound_lies_below_what_it_bounds(double):
    """Expectations and evidences both exact, to the error of a quadrature; a surrogate says nothing."""
    checked = dict.fromkeys(("lower bound", "approximate"), 0)
    for seed in range(2 * CASES):
        case = BoundCase(seed)
        target = case.target()
        holds = target.kind == "lower bound" or (target.kind == "approximate" and case.exact)
        if not holds or target.random:
            continue
        checked[target.kind] += 1
        value, bound = case.value(), case.bounded(target)
        where = f"seed {seed}, {case.kind}, exact={case.exact}: {case.entries}, {case.row.present}"
        assert value <= bound + 1e-6 * (1 + abs(bound)), f"{value} is above {bound}, {target}: {where}"
    assert checked["lower bound"] > 0.1 * CASES and checked["approximate"] > 0.01 * CASES
