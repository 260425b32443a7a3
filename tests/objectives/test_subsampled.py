"""Decoding some of the modalities: over all subsets that may be drawn, the mean is the whole, exactly."""

import os
import warnings
from itertools import combinations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_mm as mm
from pyro_mm.objectives import ALL, Objective, Term, expansion, subsampling
from tests.support.linear_gaussian import Sigma, encoders, every_pattern, oracle

E = mm.estimators
tables = mm.objectives
K = 2  # of five modalities, or of three

ESTIMATORS = {
    "AnalyticKL": lambda: E.AnalyticKL(2),
    "StickTheLanding": lambda: E.StickTheLanding(2),
    "IWAE": lambda: E.IWAE(1),
    "IWAE, resampled": lambda: E.IWAE(1, resample=True),
    "DReG": lambda: E.DReG(1),
    "Renyi": lambda: E.Renyi(0.5, 1),
    "Trace": lambda: Trace_ELBO(2, vectorize_particles=True),
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceGraph": TraceGraph_ELBO,
}
TABLES = {
    "elbo": tables.elbo,
    "jmvae_kl": lambda e: tables.jmvae_kl(estimator=e),
    "mvae": lambda e: tables.mvae(1, e, likelihood={"x0": 3.0}),
    "telbo": tables.telbo,
    "vaevae": tables.vaevae,
    "subset_mean": lambda e: tables.subset_mean(None, e),
    "mvtcae": lambda e: tables.mvtcae(estimator=e),
    "mmvm": lambda e: tables.mmvm(estimator=e),
    "masked": tables.masked,
}


def outcome(objective, model, guide, batch):
    """Loss, gradient and terms, under one noise."""
    parameters = [p for m in (model, guide) for p in m.parameters()]
    for p in parameters:
        p.grad = None
    torch.manual_seed(1)
    loss = objective.loss_and_grads(model, guide, batch)
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    return {"loss": torch.tensor(loss), "gradient": gradient, **objective.by_term}


def check_mean_over_subsets(objective, model, guide, batch, monkeypatch, names=None):
    """The mean over all subsets of two is the whole; and no subset alone is."""

    whole = outcome(objective, model, guide, batch)
    some, each = objective.subsampled(K), []
    for chosen in combinations(names or batch.names, K):
        monkeypatch.setattr(subsampling, "_choice", lambda names, k, chosen=chosen: chosen)
        each.append(outcome(some, model, guide, batch))
    assert all(abs(one["loss"] - whole["loss"]) > 1e-3 for one in each)
    for name, value in whole.items():
        mean = torch.stack([one[name] for one in each]).mean(0)
        torch.testing.assert_close(mean, value, rtol=1e-10, atol=1e-10)


@pytest.fixture
def pair(double):
    model = oracle(5)
    return model, mm.Guide(z=mm.posteriors.ProductOfExperts(encoders(model)))


WITH_PRIVATE = ["elbo", "dmvae", "jmvae_kl", "vaevae", "masked"]


def covering(tables):
    """Every table and every estimator at least once, ``masked`` with all; with PYRO_MM_LONG=1 all pairs."""
    pairs = [(t, e) for t in tables for e in ESTIMATORS]
    if os.environ.get("PYRO_MM_LONG") == "1":
        return pairs
    return [(t, e) for i, (t, e) in enumerate(pairs) if t == "masked" or i % (len(ESTIMATORS) + 1) == 0]


@pytest.mark.parametrize(("table", "estimator"), covering(TABLES))
def test_the_mean_over_all_decoded_subsets_is_the_whole_objective(table, estimator, pair, monkeypatch):
    """With rows of every pattern of missing modalities. Pyro's estimators take no mix of frozen decoders and others."""
    objective = TABLES[table](ESTIMATORS[estimator]())
    if estimator.startswith("Trace") and table in ("telbo", "mvtcae"):
        objective.vectorize = False
    check_mean_over_subsets(objective, *pair, every_pattern(pair[0], 1), monkeypatch)


@pytest.mark.parametrize("estimator", [TraceEnum_ELBO, lambda: RenyiELBO(num_particles=1)], ids=["enum", "renyi"])
def test_the_mean_over_all_decoded_subsets_is_the_whole_for_estimators_of_single_terms(estimator, pair, monkeypatch):
    model, guide = pair
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*enumeration.*")
        check_mean_over_subsets(tables.mvae(estimator=estimator()), model, guide, model.sample(4), monkeypatch)


@pytest.mark.parametrize("table", ["masked", "vaevae"])
def test_the_mean_over_all_decoded_subsets_is_the_whole_term_by_term_and_in_a_subsampled_data_plate(
    table, pair, monkeypatch
):
    model, guide = pair
    objective = TABLES[table](E.StickTheLanding())
    objective.vectorize = False
    check_mean_over_subsets(objective, model, guide, every_pattern(model, 1).part_of(100), monkeypatch)


@pytest.mark.parametrize("table", ["mmvae", "mmjsd", "mixture_mean"])
def test_the_mean_over_all_decoded_subsets_is_the_whole_for_a_mixture(table, double, monkeypatch):
    model = oracle(3)
    guide = mm.Guide(z=mm.posteriors.MixtureOfExperts(encoders(model)))
    build = {"mmvae": lambda: tables.mmvae(1), "mmjsd": tables.mmjsd, "mixture_mean": tables.mixture_mean}
    check_mean_over_subsets(build[table](), model, guide, every_pattern(model, 2), monkeypatch)


SIZES = {"a": 2, "b": 3, "c": 1}


def private_pair(discrete=False):
    """A shared latent of 2 and one of 2 for a and for b, not for c; "discrete" ones are drawn by their score."""
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    coins = dist.Bernoulli(logits=torch.zeros(2)).to_event(1)
    own, missing = (coins, coins) if discrete else (normal, dist.Normal(torch.full((2,), 0.3), 0.7).to_event(1))
    nets = {n: nn.Linear(4 if n in "ab" else 2, size) for n, size in SIZES.items()}
    decoders = {n: mm.conditionals.Normal(net, scale=0.6) for n, net in nets.items()}
    model = mm.models.PrivateLatents(normal, dict.fromkeys("ab", own), decoders)
    head = mm.conditionals.Bernoulli if discrete else mm.conditionals.Normal
    private = {
        f"w_{n}": mm.posteriors.Private(n, head(nn.Linear(SIZES[n], 2 if discrete else 4)), missing=missing)
        for n in "ab"
    }
    experts = {n: mm.conditionals.Normal(nn.Linear(size, 4)) for n, size in SIZES.items()}
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts(experts, prior=None), **private)
    values = {n: torch.randn(8, size) for n, size in SIZES.items()}
    bits = torch.arange(8)
    return model, guide, mm.Batch(values, {n: bits // 2**i % 2 == 0 for i, n in enumerate(SIZES)})


@pytest.mark.parametrize(("table", "estimator"), covering(WITH_PRIVATE))
def test_a_private_latent_counts_with_its_modality(table, estimator, double, monkeypatch):
    objective = getattr(tables, table)(estimator=ESTIMATORS[estimator]())
    check_mean_over_subsets(objective, *private_pair(), monkeypatch)


@pytest.mark.parametrize("estimator", [Trace_ELBO, TraceGraph_ELBO])
def test_a_private_latent_with_a_score_gradient_counts_with_its_modality(estimator, double, monkeypatch):
    check_mean_over_subsets(tables.mvae(estimator=estimator()), *private_pair(discrete=True), monkeypatch)


def test_a_modality_that_the_model_does_not_observe_is_not_drawn(double, monkeypatch):
    model, guide, batch = private_pair()
    del model.decoders["c"]
    seen = []
    monkeypatch.setattr(subsampling, "_choice", lambda names, k: seen.append(names) or names[:k])
    tables.elbo().subsampled(1).loss_and_grads(model, guide, batch)
    assert seen == [["a", "b"]]


def test_decoded_subsets_are_drawn_uniformly():
    names, draws = ["a", "b", "c", "d", "e"], 20_000
    counts = {frozenset(s): 0 for s in combinations(names, K)}
    for _ in range(draws):
        counts[frozenset(subsampling._choice(names, K))] += 1
    expected = draws / len(counts)
    # each count is binomial: five standard errors, which a count of ten passes in all but 6 of 10^6 runs
    assert all(abs(count - expected) < 5 * (expected * 0.9) ** 0.5 for count in counts.values())


@pytest.mark.parametrize("private", [False, True])
def test_the_mean_over_many_drawn_subsets_is_the_whole_objective(private, double):
    """As drawn in use: the latents are at sigma points, so that nothing else is random."""
    model = oracle(5)
    guide = mm.Guide(z=Sigma(mm.posteriors.ProductOfExperts(encoders(model))))
    batch, objective = every_pattern(model, 1), tables.mvae(estimator=E.AnalyticKL(6))
    if private:  # where the draws of the latents are not, they have no variance to speak of
        model, guide, batch = private_pair()
        for p in guide.posteriors.values():
            for module in p.modules():
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.weight[2:]), nn.init.constant_(module.bias[2:], -20.0)
        objective = tables.mvae()
    whole = objective.loss(model, guide, batch)
    some = objective.subsampled(2)
    draws = torch.tensor([some.differentiable_loss(model, guide, batch).item() for _ in range(225)])
    # four standard errors of a mean of 225: one seed in 15,000 fails; the seed is fixed
    assert abs(draws.mean() - whole) < 4 * draws.std() / 15 and draws.std() > 1


class Counted(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, x):
        self.calls += 1
        return self.module(x)


def small(count, posterior="ProductOfExperts", size=6, latent=4, scale=1.0):
    """A story of many small modalities, with its networks counted: ``(model, guide, decoders, encoders)``."""
    names = [f"x{i}" for i in range(count)]
    decoders = {n: Counted(mm.nn.MLP(latent, size, (8,))) for n in names}
    prior = dist.Normal(torch.zeros(latent), 1.0).to_event(1)
    model = mm.models.SharedLatent(prior, {n: mm.conditionals.Normal(d, scale=scale) for n, d in decoders.items()})
    if posterior == "SumPooling":
        networks = {n: Counted(mm.nn.MLP(size, 8, (8,))) for n in names}
        q = mm.posteriors.SumPooling(networks, mm.conditionals.Normal(mm.nn.MLP(8, 2 * latent, (8,))), 8)
    else:
        networks = {n: Counted(mm.nn.MLP(size, 2 * latent, (8,))) for n in names}
        q = mm.posteriors.ProductOfExperts({n: mm.conditionals.Normal(e) for n, e in networks.items()})
    return model, mm.Guide(z=q), decoders, networks


@pytest.mark.parametrize("estimator", [None, E.IWAE(1), Trace_ELBO()], ids=["default", "iwae", "trace"])
@pytest.mark.parametrize("table", [tables.masked, tables.vaevae, tables.mvae])
def test_only_the_decoders_drawn_are_run(table, estimator, monkeypatch):
    model, guide, decoders, networks = small(5)
    batch = mm.Batch({n: torch.randn(7, 6) for n in decoders})
    objective = table(estimator=estimator).subsampled(2)
    objective.loss(model, guide, batch)  # the first evaluation looks at the structure of the pair as well
    for counted in (*decoders.values(), *networks.values()):
        counted.calls = 0
    monkeypatch.setattr(subsampling, "_choice", lambda names, k: ["x1", "x4"])
    objective.loss_and_grads(model, guide, batch)
    assert [d.calls for d in decoders.values()] == [0, 1, 0, 0, 1]
    assert [e.calls for e in networks.values()] == [1] * 5
    assert [next(d.parameters()).grad is not None for d in decoders.values()] == [False, True, False, False, True]


def test_an_evaluation_without_gradient_is_of_the_whole(pair):
    model, guide = pair
    batch, losses = model.sample(4), []
    for objective in (tables.mvae(), tables.mvae().subsampled(2), Objective(tables.mvae().terms, subsample=1)):
        torch.manual_seed(2)
        losses.append(objective.loss(model, guide, batch))
        with torch.no_grad():
            torch.manual_seed(2)
            assert objective.differentiable_loss(model, guide, batch).item() == losses[-1]
    assert losses[0] == losses[1] == losses[2]


def test_an_objective_says_that_it_is_subsampled():
    objective = tables.masked().subsampled(8)
    assert repr(objective).startswith(
        "Objective, AnalyticKL(num_particles=1), modalities subsampled: 8 decoded per step;"
    )
    assert objective.subsample == 8 and objective.subsampled(None).subsample is None
    assert objective.target == tables.masked().target and "subsampled" not in repr(objective.subsampled(None))


@pytest.mark.parametrize(
    "estimator",
    [E.IWAE(2), E.DReG(5), E.Renyi(0.5, 3), E.IWAE(1, stratified="inside"), RenyiELBO(num_particles=2)],
    ids=lambda e: type(e).__name__,
)
def test_decoding_a_subset_is_refused_for_a_sum_inside_a_logarithm(estimator, double):
    model = oracle(3)
    guide = mm.Guide(z=mm.posteriors.MixtureOfExperts(encoders(model)))
    for build in (
        lambda: tables.elbo(estimator).subsampled(2),
        lambda: Objective([Term(ALL, ALL)], estimator, subsample=2),
    ):
        with pytest.raises(ValueError, match=r"the logarithm of a mean of weights.*decode them all"):
            build()
    objective = tables.elbo().subsampled(2)
    objective.estimator = estimator
    with pytest.raises(ValueError, match=type(estimator).__name__):
        objective.loss_and_grads(model, guide, model.sample(2))


def test_decoding_fewer_than_one_or_more_than_all_modalities_is_refused(pair):
    batch = pair[0].sample(2)
    with pytest.raises(ValueError, match="modalities to decode >= 1, got 0"):
        tables.elbo().subsampled(0)
    with pytest.raises(ValueError, match=r"1 to 5 modalities.*got 6"):
        tables.elbo().subsampled(6).loss_and_grads(*pair, batch)
    whole = outcome(tables.elbo(), *pair, batch)
    for name, value in outcome(tables.elbo().subsampled(5), *pair, batch).items():
        torch.testing.assert_close(value, whole[name])


def test_decoding_a_subset_is_refused_for_parents_and_enumerated_sites():
    def chain(batch):
        with batch.plate():
            x = batch.observe("x", dist.Normal(0.0, 1.0))
            batch.observe("y", lambda x: dist.Normal(x, 1.0), x)

    def mixed(batch):
        with batch.plate():
            c = pyro.sample("c", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
            for n in "xy":
                batch.observe(n, dist.Normal(c.float(), 1.0))

    batch = mm.Batch({n: torch.randn(3) for n in "xy"})
    for story, message in ((chain, "parent of another"), (mixed, "enumerated")):
        with pytest.raises(ValueError, match=f"{message}.*decode them all"):
            tables.elbo(E.IWAE(1)).subsampled(1).loss_and_grads(story, lambda batch: None, batch)


# -- training ---------------------------------------------------------------------------------------------------------


def trained(objective, posterior="ProductOfExperts", count=5, epochs=3, **options):
    torch.manual_seed(0)
    model, guide, decoders, _ = small(count, posterior)
    shared = torch.randn(40, 1)
    batch = mm.Batch({n: shared + 0.5 * torch.randn(40, 6) for n in decoders})
    history = mm.fit(model, guide, objective, batch, epochs=epochs, batch_size=16, progress=False, **options)
    return history, [p.detach().clone() for m in (model, guide) for p in m.parameters()]


@pytest.mark.parametrize("estimator", [None, TraceGraph_ELBO()], ids=["default", "graph"])
def test_a_seed_gives_the_same_training_twice(estimator):
    runs = [trained(tables.masked(estimator).subsampled(1), seed=4) for _ in range(2)]
    assert runs[0][0].to_dict() == runs[1][0].to_dict()
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_a_stopped_training_goes_on_with_the_same_draws(tmp_path):
    straight = trained(tables.masked().subsampled(2), epochs=4, seed=3)[1]
    trained(tables.masked().subsampled(2), epochs=2, seed=3, checkpoint=tmp_path / "run")
    resumed = trained(tables.masked().subsampled(2), epochs=4, seed=3, checkpoint=tmp_path / "run")[1]
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    with pytest.raises(ValueError, match=r"its objective is .*subsampled: 2"):
        trained(tables.masked().subsampled(3), epochs=4, seed=3, checkpoint=tmp_path / "run")


def test_a_parameter_that_no_subset_reaches_is_still_found():
    model, guide, decoders, _ = small(4)
    batch = mm.Batch({n: torch.randn(8, 6) for n in decoders})
    never = Objective([Term(ALL, ("x0", "x1"))], subsample=1)
    with pytest.raises(RuntimeError, match=r"no gradient reaches model.decoders.x2") as error:
        mm.fit(model, guide, never, batch, epochs=1, progress=False)
    assert "x0" not in str(error.value) and "x1" not in str(error.value)


def test_a_step_that_decodes_a_subset_is_not_compiled_and_says_why_once():
    with pytest.warns(UserWarning, match="not compiled.*drawn in Python") as caught:
        compiled = trained(tables.masked().subsampled(2), seed=1, compile=True)
    assert len([w for w in caught if "not compiled" in str(w.message)]) == 1
    for a, b in zip(compiled[1], trained(tables.masked().subsampled(2), seed=1)[1], strict=True):
        assert torch.equal(a, b)


def test_pyros_own_svi_trains_a_subsampled_objective():
    torch.manual_seed(0)
    model, guide, decoders, _ = small(4)
    batch = mm.Batch({n: torch.randn(64, 1).expand(-1, 6) for n in decoders})
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), tables.elbo().subsampled(2))
    before = svi.evaluate_loss(batch)
    for _ in range(60):
        svi.step(batch)
    assert svi.evaluate_loss(batch) < 0.9 * before


@pytest.mark.parametrize(
    ("subsample", "share"), [(None, 0.5), (4, 0.9)] if os.environ.get("PYRO_MM_LONG") == "1" else [(4, 0.9)]
)
def test_one_story_of_thirty_two_small_modalities_trains(subsample, share):
    """In 64 steps the loss of other rows falls by a half; by a tenth, where each decoder is in 8 of them or so."""
    names = [f"x{i}" for i in range(32)]
    truth = mm.models.LinearGaussian({n: torch.randn(4, 2) for n in names}, 0.5)
    values, test = truth.sample(256), truth.sample(128)
    rows = mm.Batch({n: values[n] for n in names}, {n: torch.rand(256) < 0.8 for n in names})
    model, guide, _, _ = small(32, "SumPooling", size=4, latent=2, scale=0.5)
    objective = tables.masked().subsampled(subsample)
    before = objective.loss(model, guide, test) / test.size
    adam = lambda parameters: torch.optim.Adam(parameters, 0.02)  # noqa: E731
    history = mm.fit(model, guide, objective, rows, epochs=8, batch_size=32, seed=0, optimizer=adam, progress=False)
    assert all(torch.tensor(column).isfinite().all() for column in history.to_dict().values())
    assert -truth.log_prob(test).mean().item() < objective.loss(model, guide, test) / test.size < share * before


@pytest.mark.parametrize("empty", [True, False])
def test_a_random_subset_of_very_many_modalities_has_half_of_them(empty):
    batch = mm.Batch({f"x{i}": torch.zeros(100, 1) for i in range(200)})
    size = torch.stack(list(expansion._random_subset(batch, empty).values())).sum(0).float()
    # the mean of 100 binomial counts of 200: five standard errors
    assert abs(size.mean() - 100) < 5 * 50**0.5 / 10
