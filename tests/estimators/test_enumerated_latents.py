"""Tables of latents that the guide enumerates, against sums over their classes."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import kl_divergence

import pyro_mm as mm
from pyro_mm.estimators import IWAE, AnalyticKL
from pyro_mm.objectives import ALL, EACH, PRIOR, Objective, Random, Term

tables = mm.objectives
PARALLEL = {"enumerate": "parallel"}
CLASSES = 3
PRESENT = {"a": [True, True, False, True], "b": [True, False, True, True]}


class Story(nn.Module):
    """y ~ Cat(p), z | y ~ Normal(m_y, s) if asked for, a | y, z and b | y."""

    def __init__(self, continuous):
        super().__init__()
        self.continuous = continuous
        self.logits = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))
        self.at = nn.Parameter(torch.tensor([-1.0, 0.4, 1.3]))
        self.odds = nn.Parameter(torch.tensor([0.5, -0.7, 0.2]))

    def prior(self):
        return dist.Categorical(logits=self.logits)

    def z(self, y):
        return dist.Normal(self.at[y], 0.8)

    def likelihood(self, name, y):
        return dist.Normal(self.at[y], 0.7) if name == "a" else dist.Bernoulli(logits=self.odds[y])

    def forward(self, batch):
        with batch.plate():
            y = pyro.sample("y", self.prior())
            if self.continuous:
                pyro.sample("z", self.z(y))
            for name in batch.names:
                batch.observe(name, lambda y, name=name: self.likelihood(name, y), y)


class Logits(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, CLASSES)

    def forward(self, x):
        return dist.Categorical(logits=self.linear(x[..., None]))


class Enumerating(nn.Module):
    def __init__(self, continuous, infer=None):
        super().__init__()
        self.continuous, self.infer = continuous, infer or PARALLEL
        prior = dist.Categorical(logits=torch.tensor([0.1, 0.2, -0.1]))
        self.y = mm.posteriors.ProductOfCategoricals({"a": Logits(), "b": Logits()}, prior=prior)
        self.shift = nn.Parameter(torch.tensor([0.2, -0.5, 0.9]))

    def z(self, y, sets):
        """Of z given y the posterior knows how many modalities it sees."""
        return dist.Normal(self.shift[y] * (1 + sets), 0.4)

    def forward(self, batch):
        with batch.plate():
            y = pyro.sample("y", self.y(batch), infer=self.infer)
            if self.continuous:
                sets = sum(batch.present[name].to(self.shift.dtype) for name in batch.names)
                pyro.sample("z", self.z(y, sets))


class BySums:
    """Terms of one row, by sums over the classes."""

    def __init__(self, model, guide, batch, row):
        self.model, self.guide, self.row = model, guide, batch[row : row + 1]
        self.present = [name for name in batch.names if batch.present[name][row]]
        self.classes = torch.arange(CLASSES)

    def q(self, names):
        return self.model.prior() if names is PRIOR else self.guide.y(self.row.only(*names))

    def z(self, names):
        return self.model.z(self.classes) if names is PRIOR else self.guide.z(self.classes, float(len(names)))

    def term(self, encode, decode, given=PRIOR, a=1.0, b=1.0):
        q, r = self.q(encode), self.q(given)
        likelihood = sum(self.model.likelihood(n, self.classes).log_prob(self.row[n]) for n in decode)
        kl = kl_divergence(q, r).sum()
        if self.model.continuous:
            kl = kl + (q.probs * kl_divergence(self.z(encode), self.z(given))).sum()
        return a * (q.probs * likelihood).sum() - b * kl


def others(row, name):
    return [n for n in row.present if n != name]


# a table, what it is in one row, and whether its weights differ by row, which TraceEnum_ELBO cannot take
TABLES = {
    "jmvae_kl": (
        lambda e: tables.jmvae_kl(10.0, e, kl=0.7),
        lambda r: r.term(r.present, r.present, b=0.7) + sum(r.term(r.present, [], [m], b=10.0) for m in r.present),
        False,
    ),
    "mmjsd": (
        lambda e: tables.mmjsd(0.4, e),
        lambda r: (
            sum(r.term([m], r.present, r.present, b=0.6) for m in r.present) / len(r.present)
            + r.term(PRIOR, [], r.present, b=0.4)
        ),
        True,
    ),
    "vaevae": (
        lambda e: tables.vaevae(e),
        lambda r: sum(r.term([m], [m]) + r.term(r.present, others(r, m), [m]) for m in r.present) / len(r.present),
        True,
    ),
    "mvtcae": (
        lambda e: tables.mvtcae(0.6, 0.8, e),
        lambda r: (
            r.term(r.present, r.present, a=0.4, b=0.32)
            + sum(r.term(r.present, others(r, m), [m], a=0.6, b=0.48) for m in r.present) / len(r.present)
        ),
        True,
    ),
    "penalties": (
        lambda e: Objective([Term(ALL, (), EACH, kl=2.0), Term(EACH, (), PRIOR, kl=0.5), Term((), (), ALL)], e),
        lambda r: (
            sum(r.term(r.present, [], [m], b=2.0) + r.term([m], [], b=0.5) for m in r.present)
            + r.term([], [], r.present)
        ),
        False,
    ),
}


def batch_of(complete):
    values = {"a": torch.tensor([0.7, -1.1, 0.3, 0.1]), "b": torch.tensor([1.0, 0.0, 1.0, 1.0])}
    return mm.Batch(values, {} if complete else {n: torch.tensor(p) for n, p in PRESENT.items()})


def compare(objective, formula, model, guide, batch, rel=1e-10):
    parameters = [p for p in (*model.parameters(), *guide.parameters()) if p.requires_grad]
    exact = -sum(formula(BySums(model, guide, batch, i)) for i in range(batch.size))
    wanted = torch.autograd.grad(exact, parameters, allow_unused=True, materialize_grads=True)
    loss = objective.differentiable_loss(model, guide, batch)
    assert loss.item() == pytest.approx(exact.item(), rel=rel)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize("complete", [True, False], ids=["complete", "missing"])
@pytest.mark.parametrize("name", TABLES)
def test_under_trace_enum_a_table_is_its_sum_over_classes(name, complete, vectorize, double):
    build, formula, weighs_rows = TABLES[name]
    model, guide = Story(continuous=False), Enumerating(continuous=False)
    if name == "mmjsd":  # whose term under the prior has no gradient with respect to that
        model.logits.requires_grad_(False)
    objective = build(TraceEnum_ELBO())
    objective.vectorize = vectorize
    if weighs_rows and not complete:
        with pytest.raises(ValueError, match="weighs rows"):
            objective.loss(model, guide, batch_of(complete))
        return
    compare(objective, formula, model, guide, batch_of(complete))


@pytest.mark.parametrize("complete", [True, False], ids=["complete", "missing"])
@pytest.mark.parametrize("continuous", [True, False], ids=["y and z", "y"])
@pytest.mark.parametrize("estimator", [TraceEnum_ELBO(), AnalyticKL(), IWAE(3), IWAE(2, vectorize_particles=False)])
def test_a_penalty_is_the_kl_whatever_the_estimator(estimator, continuous, complete, double):
    build, formula, _ = TABLES["penalties"]
    model, guide = Story(continuous), Enumerating(continuous)
    compare(build(estimator), formula, model, guide, batch_of(complete))


@pytest.mark.parametrize("estimator", [AnalyticKL(), IWAE(2)])
def test_a_term_that_decodes_nothing_is_the_kl_whatever_the_estimator(estimator, monkeypatch, double):
    """Of the subset that was drawn a row may have nothing: what is left of (S, S, P) is the distance of q(y | -)."""
    model, guide, batch = Story(continuous=True), Enumerating(continuous=True), batch_of(True)
    nothing = torch.full((4,), False)
    monkeypatch.setattr("pyro_mm.objectives.expansion._random_subset", lambda *_: {"a": nothing, "b": nothing})
    compare(Objective([Term(Random(), Random())], estimator), lambda r: r.term([], []), model, guide, batch)


@pytest.mark.parametrize("estimator", [AnalyticKL(), IWAE(3)])
def test_classes_of_the_model_and_of_the_guide_are_summed_out_together(estimator, double):
    """Two sites summed out, one of which the guide enumerates: each has a dimension of its own."""
    of_y, of_w = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([[0.6, 0.1, 0.3], [0.2, 0.2, 0.6], [0.3, 0.3, 0.4]])
    at = torch.tensor([[-1.0, 0.0, 1.0], [2.0, 0.5, -0.3], [0.1, 0.7, 1.5]])
    guess = torch.tensor([0.3, 0.3, 0.4])

    def model(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(of_y))
            w = pyro.sample("w", dist.Categorical(of_w[y]))
            batch.observe("a", lambda y, w: dist.Normal(at[y, w], 0.5), y, w)

    def guide(batch):
        with batch.plate():
            pyro.sample("y", dist.Categorical(guess), infer=PARALLEL)

    x = torch.tensor([0.3, -0.7])
    joint = (of_y[:, None] * of_w).log() + dist.Normal(at, 0.5).log_prob(x[:, None, None])
    log_p = joint.flatten(1).logsumexp(-1).sum().item()
    assert -tables.elbo(estimator).loss(model, guide, mm.Batch({"a": x})) == pytest.approx(log_p, rel=1e-12)
    kl = 2 * (guess * (guess / of_y).log()).sum().item()
    penalty = Objective([Term(ALL, ())], estimator).loss(model, guide, mm.Batch({"a": x}))
    assert penalty == pytest.approx(kl, rel=1e-12)


def test_a_penalty_on_what_is_drawn_given_a_class_is_refused_without_enumeration(double):
    model, guide = Story(continuous=True), Enumerating(continuous=True, infer={"enumerate": "sequential"})
    objective, batch = tables.jmvae_kl(1.0, TraceEnum_ELBO()), batch_of(True)
    with pytest.raises(ValueError, match="guide site 'y' no gradient with respect to the probabilities"):
        objective.loss_and_grads(model, guide, batch)
    objective.loss(model, guide, batch)  # which asks for no gradient


@pytest.mark.parametrize("estimator", [RenyiELBO(num_particles=2), TraceMeanField_ELBO()])
def test_estimators_that_do_not_enumerate_refuse_a_guide_that_does(estimator, double):
    with pytest.raises(ValueError, match="'y' has no rsample"):
        tables.elbo(estimator).loss(Story(continuous=False), Enumerating(continuous=False), batch_of(True))
