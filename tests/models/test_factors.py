"""What a story observes besides the modalities: ``pyro.factor``, or data that the batch does not hold.

With the exact posterior given the factor as guide, every draw of every term has one and the same value, which a sum
over a grid of the latent gives.
"""

import math
from itertools import combinations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_mm as mm
import pyro_mm.objectives.subsampling
from pyro_mm.objectives import ALL, EACH, PRIOR, Objective, Term, expansion, stacked_views

LOADINGS, NOISE = {"a": 1.3, "b": -0.8, "c": 0.5}, {"a": 0.7, "b": 0.5, "c": 1.1}
GRID = torch.linspace(-12, 12, 4001, dtype=torch.float64)
STEP = GRID[1] - GRID[0]
E, tables = mm.estimators, mm.objectives
FACTORS = ("factor", "observed")  # (z - 1)^2 of precision 2; an observation of z with noise 0.6


def weight(kind, z, told):
    """log of what the story weighs z by."""
    return 0.3 - (z - 1.0).square() if kind == "factor" else dist.Normal(z, 0.6).log_prob(told)


def story(kind, classes=False):
    def model(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7]))) if classes else 0.0
            z = pyro.sample("z", dist.Normal(1.5 * torch.as_tensor(y), 1.0))
            if kind == "factor":
                pyro.factor("weight", weight(kind, z, None))
            else:
                pyro.sample("weight", dist.Normal(z, 0.6), obs=batch.covariates["told"])
            for n in LOADINGS:
                batch.observe(n, lambda z, n=n: dist.Normal(LOADINGS[n] * z, NOISE[n]), z)

    return model


def exact(kind):
    """q(z | x_S, factor) in closed form."""

    def guide(batch):
        told = batch.covariates["told"]
        precision = 1 + (2 if kind == "factor" else 0.6**-2) + torch.zeros(())
        total = (2.0 if kind == "factor" else told / 0.6**2) + torch.zeros(())
        for n in LOADINGS:
            if (there := batch.presence(n)) is not False:
                there = torch.as_tensor(there).double()
                precision = precision + there * (LOADINGS[n] / NOISE[n]) ** 2
                total = total + there * LOADINGS[n] * batch[n] / NOISE[n] ** 2
        with batch.plate():
            pyro.sample("z", dist.Normal(total / precision, precision.rsqrt()))

    return guide


def rows(missing=False):
    values = {n: torch.tensor([0.5, -1.0, 2.0, 0.1]) + i for i, n in enumerate(LOADINGS)}
    present = {"a": [True, False, True, False], "b": [True, True, False, False]} if missing else {}
    return mm.Batch(values, present, {"told": torch.tensor([0.2, -0.5, 1.0, 2.0])})


def log_p(kind, batch, names):
    """log of the integral of p(z) e^factor prod_m p(x_m | z) over what of ``names`` is present, ``(N,)``."""
    total = dist.Normal(0.0, 1.0).log_prob(GRID) + weight(kind, GRID, batch.covariates["told"][:, None])
    for n in names:
        each = dist.Normal(LOADINGS[n] * GRID, NOISE[n]).log_prob(batch[n][:, None])
        total = total + torch.where(batch.present[n][:, None], each, 0.0)
    return total.logsumexp(-1) + STEP.log()


def posterior_kl(kind, batch, one, other):
    """KL(p(z | x_one, factor) || p(z | x_other, factor)), ``(N,)``."""
    q, r = (mm.encode(exact(kind), batch.only(*names))["z"] for names in (one, other))
    return torch.distributions.kl_divergence(q, r)


def alone(kind, batch):
    """The sum over present modalities of log p(x_m, factor)."""
    return sum(torch.where(batch.present[m], log_p(kind, batch, (m,)), 0.0) for m in LOADINGS)


def penalties(kind, batch):
    return sum(torch.where(batch.present[m], posterior_kl(kind, batch, LOADINGS, (m,)), 0.0) for m in LOADINGS)


def subset_average(kind, batch):
    each, counts = torch.zeros(4), torch.zeros(4)
    for s in (s for size in (1, 2, 3) for s in combinations(LOADINGS, size)):
        there = torch.stack([batch.present[m] for m in s]).any(0)
        each, counts = each + torch.where(there, log_p(kind, batch, s), 0.0), counts + there
    return each / counts


TABLES = {
    "elbo": (tables.elbo, lambda k, b: log_p(k, b, LOADINGS)),
    "vaevae": (tables.vaevae, lambda k, b: log_p(k, b, LOADINGS)),
    "masked": (tables.masked, lambda k, b: log_p(k, b, LOADINGS)),
    "mvae": (lambda e: tables.mvae(0, estimator=e), lambda k, b: log_p(k, b, LOADINGS) + alone(k, b)),
    "jmvae_kl": (
        lambda e: tables.jmvae_kl(0.3, estimator=e), lambda k, b: log_p(k, b, LOADINGS) - 0.3 * penalties(k, b)
    ),
    "each subset": (lambda e: Objective([Term(tables.EVERY, tables.EVERY, average=True)], e), subset_average),
    "each, twice as much": (
        lambda e: Objective([Term(EACH, EACH, likelihood=2.0, kl=2.0)], e), lambda k, b: 2 * alone(k, b)
    ),
}  # fmt: skip
ESTIMATORS = {
    "analytic": E.AnalyticKL, "iwae": lambda: E.IWAE(1), "iwae of 3": lambda: E.IWAE(3), "stl": E.StickTheLanding,
    "dreg": lambda: E.DReG(2), "trace": Trace_ELBO,
}  # fmt: skip


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("estimator", ["iwae", "iwae of 3", "stl", "dreg", "trace"])
@pytest.mark.parametrize("name", TABLES)
def test_a_factor_counts_once_in_the_log_joint(name, estimator, missing, kind, double):
    """Without variance, since every guide is exact given the factor; a penalty of Trace_ELBO alone has some."""
    build, expected = TABLES[name]
    batch = rows(missing)
    for vectorize in (True, False):
        objective = build(ESTIMATORS[estimator]())
        objective.vectorize = vectorize
        objective.loss(story(kind), exact(kind), batch)
        total = sum(value for label, value in objective.by_term.items() if estimator != "trace" or "-" not in label)
        if estimator == "trace" and vectorize:  # which knows only the sum of its terms
            continue
        wanted = expected(kind, batch)
        if estimator == "trace" and name == "jmvae_kl":
            wanted = wanted + 0.3 * penalties(kind, batch)
        torch.testing.assert_close(total, wanted.sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", FACTORS)
def test_a_factor_counts_in_a_row_whose_term_decodes_nothing(kind, double):
    """(-, a, P), where a is missing in some rows, or in all: the log of the factor's mean under the prior."""
    for batch in (rows(missing=True), rows().without("a")):
        for estimator in (E.IWAE(1), E.IWAE(3), E.StickTheLanding()):
            objective = Objective([Term((), ("a",))], estimator)
            objective.loss(story(kind), exact_given_nothing(kind), batch)
            expected = torch.where(batch.present["a"], math.nan, log_p(kind, batch, ()))
            weights = mm.scoring.importance.score(
                story(kind), exact_given_nothing(kind),
                stacked_views.stack_views(expansion.expand(objective.terms, batch, True), batch, info(kind, batch), {}),
                info(kind, batch),
            ).log_weights()[0, 0]  # fmt: skip
            lacking = ~batch.present["a"]
            torch.testing.assert_close(weights[lacking], expected[lacking], rtol=1e-9, atol=1e-9)


def info(kind, batch):
    return mm.scoring.structure.pair_structure(story(kind), exact(kind), batch)


def exact_given_nothing(kind):
    guide = exact(kind)
    return lambda batch: guide(batch.only())


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("estimator", ["analytic", "trace"])
def test_a_factor_counts_whole_where_only_some_modalities_are_decoded(kind, estimator, monkeypatch, double):
    """The mean over which modality is drawn is the whole, at one draw of z."""
    model, guide, batch = story(kind), exact(kind), rows()
    values = []
    for chosen in LOADINGS:
        monkeypatch.setattr(pyro_mm.objectives.subsampling, "_choice", lambda names, k, chosen=chosen: [chosen])
        torch.manual_seed(4)
        values.append(tables.elbo(ESTIMATORS[estimator]()).subsampled(1).differentiable_loss(model, guide, batch))
    torch.manual_seed(4)
    whole = tables.elbo(ESTIMATORS[estimator]()).differentiable_loss(model, guide, batch)
    torch.testing.assert_close(sum(values) / 3, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", FACTORS)
def test_a_factor_counts_in_likelihoods(kind, double):
    model, guide, batch = story(kind), exact(kind), rows(missing=True)
    for found in (
        mm.log_marginal(model, guide, batch, num_particles=3, seed=0),
        mm.annealed_importance(model, guide, batch, num_chains=2, temperatures=3, seed=0),
    ):
        torch.testing.assert_close(found.log_prob, log_p(kind, batch, LOADINGS), rtol=1e-9, atol=1e-9)
        assert found.quantity == "log p(a, b, c, weight)"
    share = mm.log_marginal(model, guide, batch, num_particles=4000, prior_share=0.5, seed=0)
    assert ((share.log_prob - log_p(kind, batch, LOADINGS)).abs() < 4.5 * share.standard_error).all()


@pytest.mark.parametrize("kind", FACTORS)
def test_a_factor_is_given_in_conditional_likelihoods(kind, double):
    model, guide, batch = story(kind), exact(kind), rows()
    found = mm.log_conditional(model, guide, batch, target="a", given="b", num_particles=3, seed=0)
    torch.testing.assert_close(found.log_prob, log_p(kind, batch, "ab") - log_p(kind, batch, "b"), rtol=1e-9, atol=1e-9)
    assert found.quantity == "log p(a | b, weight)"
    found = mm.log_conditional(model, guide, batch, target="a", num_particles=3, seed=0)
    torch.testing.assert_close(found.log_prob, log_p(kind, batch, "a"), rtol=1e-9, atol=1e-9)
    assert found.quantity == "log p(a, weight)"
    with pytest.raises(ValueError, match="some rows have a target and nothing of what is given"):
        mm.log_conditional(model, guide, rows(missing=True), target="c", given="a")


@pytest.mark.parametrize("kind", FACTORS)
def test_a_factor_stands_beside_a_class_that_is_summed_out(kind, double):
    """Within 4.5 standard errors of the sum over classes and the grid; the ELBO below it."""
    model, guide, batch = story(kind, classes=True), exact(kind), rows()
    total = torch.tensor([0.3, 0.7]).log()[:, None] + dist.Normal(torch.tensor([[0.0], [1.5]]), 1.0).log_prob(GRID)
    total = total.logsumexp(0) + weight(kind, GRID, batch.covariates["told"][:, None])
    for n in LOADINGS:
        total = total + dist.Normal(LOADINGS[n] * GRID, NOISE[n]).log_prob(batch[n][:, None])
    truth = total.logsumexp(-1) + STEP.log()
    found = mm.log_marginal(model, guide, batch, num_particles=20_000, seed=0)
    assert ((found.log_prob - truth).abs() < 4.5 * found.standard_error).all() and found.standard_error.max() < 0.02
    objective = Objective([Term(ALL, ALL), Term(PRIOR, (), PRIOR)], E.IWAE(2000))
    bound = -objective.loss(model, guide, batch)
    assert abs(bound - truth.sum()) < 0.3 and abs(objective.by_term["(P, -, P)"]) < 1e-9


@pytest.mark.parametrize("kind", FACTORS)
def test_a_factor_is_no_part_of_the_prior(kind, double):
    """(P, -, P) is 0, and (P, *, P) has the factor once: E[w] = p(x), of 4 rows 3000 times, 4.5 standard errors."""
    model, guide, batch = story(kind), exact(kind), rows()[torch.arange(4).repeat(3000)]
    objective = Objective([Term(PRIOR, (), PRIOR), Term(ALL, ALL)], E.IWAE(1))
    objective.loss(model, guide, batch)
    assert abs(objective.by_term["(P, -, P)"]) < 1e-9
    rows_of = expansion.expand([Term(PRIOR, ALL)], batch, True)
    views = stacked_views.stack_views(rows_of, batch, info(kind, batch), {})
    log_w = mm.scoring.importance.score(model, guide, views, info(kind, batch)).log_weights()[0, 0]
    ratio = (log_w - log_p(kind, rows(), LOADINGS).repeat(3000)).exp()
    assert abs(ratio.mean() - 1) < 4.5 * ratio.std() / len(batch) ** 0.5 and ratio.std() / len(batch) ** 0.5 < 0.1


@pytest.mark.parametrize("kind", FACTORS)
def test_evaluations_that_a_factor_excludes_are_refused(kind, double):
    model, guide, batch = story(kind), exact(kind), rows()
    with pytest.raises(ValueError, match="observes 'weight', which is no modality of the batch"):
        tables.mmjsd().loss(model, guide, batch)
    for call in (
        lambda: mm.bidirectional(model, guide, batch, temperatures=2),
        lambda: mm.calibration(model, guide, batch, num_draws=3),
    ):
        with pytest.raises(ValueError, match="observes 'weight', which is no modality of the batch, and simulated"):
            call()
    with pytest.raises(ValueError, match="is drawn from the prior without it"):
        mm.generate(model, guide, mm.Batch.empty(2, like=batch))
    drawn = mm.generate(model, guide, batch.only("a"), num_samples=3)
    assert {"a", "b", "c"} <= set(drawn)

    def weighing(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(batch.size), 1.0))
            pyro.factor("extra", torch.zeros(batch.size), has_rsample=True)

    with pytest.raises(ValueError, match="the guide has the observed site 'extra'"):
        mm.log_marginal(model, weighing, batch)


def test_a_check_takes_a_factor_for_what_it_is(double):
    found = mm.check(story("factor"), exact("factor"), tables.elbo(), rows(), num_particles=50, repeats=2)
    assert not found.sites.unmasked and abs(found.gap.value) < 4 * found.gap.error + 1e-9


def test_a_deterministic_site_is_no_factor(double):
    """It has a name for a value, and no log-probability."""

    def named(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            twice = pyro.deterministic("twice", 2 * z)
            for n in LOADINGS:
                batch.observe(n, lambda z, n=n: dist.Normal(LOADINGS[n] * z / 2, NOISE[n]), twice)

    def plain(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for n in LOADINGS:
                batch.observe(n, lambda z, n=n: dist.Normal(LOADINGS[n] * z, NOISE[n]), z)

    batch, losses = rows(missing=True), []
    for build in (tables.vaevae, tables.masked, tables.mmjsd, tables.dmvae):
        for model in (named, plain):
            torch.manual_seed(0)
            losses.append(build().loss(model, exact("factor"), batch))
    assert losses[::2] == pytest.approx(losses[1::2], rel=1e-12)
    assert set(mm.generate(named, exact("factor"), mm.Batch.empty(2, like=batch))) >= set(LOADINGS)
