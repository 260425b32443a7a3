"""What every story, posterior, objective and estimator keeps, from dicts of constructors."""

import copy
import io
import itertools
import os

import pytest
import torch
from pyro import poutine

import pyro_mm as mm
from pyro_mm.scoring.structure import latent_sites
from tests.support.contract import DIMS, ESTIMATORS, MODELS, OBJECTIVES, POSTERIORS, E, data, pair, tables
from tests.support.linear_gaussian import oracle


def all_pairs():
    """Each two of the four kinds of thing together at least once; with PYRO_MM_LONG=1 the full product."""
    kinds = [list(MODELS), list(POSTERIORS), list(OBJECTIVES), list(ESTIMATORS)]
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


@pytest.mark.parametrize("names", all_pairs(), ids=" | ".join)
def test_every_combination_trains(names):
    model, guide = pair(*names[:2])
    objective = OBJECTIVES[names[2]](ESTIMATORS[names[3]]())
    batch = data()
    before = {n: (batch[n].clone(), batch.present[n].clone()) for n in batch.names}
    loss = objective.loss_and_grads(model, guide, batch)
    assert torch.tensor(loss).isfinite()
    for n, p in [*model.named_parameters(), *guide.named_parameters()]:
        assert p.grad is None or p.grad.isfinite().all(), n
    reached = {n for n, p in [*model.named_parameters(), *guide.named_parameters()] if p.grad is not None}
    everything = {n for n, _ in [*model.named_parameters(), *guide.named_parameters()]}
    if names[1] != "joint and unimodal":  # whose unimodal encoders serve incomplete rows only
        assert reached == everything
    assert torch.tensor(objective.loss(model, guide, batch)).isfinite()
    for n, (value, present) in before.items():
        assert torch.equal(batch[n], value) and torch.equal(batch.present[n], present)


# Factors are networks between latents that "private" has as well and decoders: three kinds of posterior will do.
PAIRS = [
    (model, posterior)
    for model in MODELS
    for posterior in POSTERIORS
    if model != "factorized" or posterior in ("product", "mixture of products", "joint")
]


@pytest.mark.parametrize(("model", "posterior"), PAIRS)
class TestEveryPair:
    def test_sites_of_every_guide_are_the_latents_of_its_story(self, model, posterior):
        model, guide = pair(model, posterior)
        drawn = poutine.trace(guide).get_trace(data())
        modelled = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(data())
        assert set(latent_sites(drawn)) == set(latent_sites(modelled))

    def test_every_pair_loads_the_weights_that_it_saved(self, model, posterior):
        first, second = pair(model, posterior), pair(model, posterior)
        file = io.BytesIO()
        mm.save(file, *first)
        file.seek(0)
        mm.load(file, *second)
        batch = data()
        values = []
        for p in (first, second):
            torch.manual_seed(0)
            values.append(mm.log_weights(*p, batch, 2))
        assert torch.equal(*values)

    def test_masking_equals_deleting(self, model, posterior):
        """What lies under a mask, and whether the modality is held at all, changes nothing."""
        model, guide = pair(model, posterior)
        batch = data()
        other = mm.Batch({"a": 1 - batch["a"], "b": batch["b"] + 9, "c": (batch["c"] + 1) % 4})
        swapped = {
            n: torch.where(batch.present[n].reshape(-1, *[1] * (batch[n].dim() - 1)), batch[n], other[n])
            for n in batch.names
        }
        values = []
        for rows in (batch, batch._copy(_values=swapped)):
            torch.manual_seed(0)
            values.append(mm.log_weights(model, guide, rows, 3))
        assert torch.equal(*values)

    def test_every_pair_has_evidence_and_draws_whatever_the_chunks(self, model, posterior):
        model, guide = pair(model, posterior)
        batch = data()
        evidence = mm.log_marginal(model, guide, batch, num_particles=30, seed=0)
        assert evidence.log_prob.isfinite().all() and abs(evidence.log_prob[-1]) < 1e-12
        parts = mm.log_marginal(model, guide, batch, num_particles=30, seed=0, chunk=5)
        torch.testing.assert_close(evidence.log_prob, parts.log_prob, rtol=1e-5, atol=1e-5)
        draws = mm.generate(model, guide, batch, num_samples=2)
        assert {n: tuple(x.shape) for n, x in draws.items()} == {n: (2, 6, *e) for n, e in DIMS.items()}

    def test_evidence_depends_on_neither_chunks_nor_rows(self, model, posterior, double):
        """Chunks to 1e-10; the order of rows, and which rows come along, within the stated error."""
        model, guide = pair(model, posterior)
        batch = data(12)
        before = {n: (batch[n].clone(), batch.present[n].clone()) for n in batch.names}

        def estimate(rows, particles=600, **options):
            return mm.log_marginal(model, guide, batch[rows], num_particles=particles, seed=3, **options)

        whole = estimate(torch.arange(12))
        one = estimate(torch.arange(12), particles=20)
        for chunk in (5, 30):
            parts = estimate(torch.arange(12), particles=20, chunk=chunk)
            for column in ("log_prob", "standard_error", "ess", "pareto_k"):
                torch.testing.assert_close(
                    getattr(parts, column), getattr(one, column), rtol=1e-10, atol=1e-10, equal_nan=True
                )
        order = torch.randperm(12)
        alone = [estimate([row]) for row in range(12)]
        for log_prob, error in (
            (estimate(order).log_prob[order.argsort()], estimate(order).standard_error[order.argsort()]),
            (torch.cat([e.log_prob for e in alone]), torch.cat([e.standard_error for e in alone])),
        ):
            both = (error.square() + whole.standard_error.square()).sqrt()
            # of 24 differences in each of 14 pairs one is beyond 4.5 errors with probability 2e-3, were they normal
            assert ((log_prob - whole.log_prob).abs() < 4.5 * both + 1e-9).all()
        for n, (value, present) in before.items():
            assert torch.equal(batch[n], value) and torch.equal(batch.present[n], present)

    def test_every_pair_works_in_float64(self, model, posterior, double):
        model, guide = pair(model, posterior)
        batch = data()
        assert mm.log_weights(model, guide, batch, 2).dtype == torch.float64
        assert tables.masked(E.IWAE(2)).differentiable_loss(model, guide, batch).dtype == torch.float64

    @pytest.mark.parametrize("default", ["meta", pytest.param("cuda", marks=pytest.mark.cuda)])
    def test_every_pair_works_on_the_cpu_under_another_default_device(self, model, posterior, default, double):
        """The same numbers as without it: no tensor is made on the default device where the rows are elsewhere."""
        model, guide = pair(model, posterior)
        batch = data()
        weights = [copy.deepcopy(m.state_dict()) for m in (model, guide)]

        def results():
            for module, state in zip((model, guide), weights, strict=True):
                module.load_state_dict(state)
            torch.manual_seed(0)
            loss = tables.masked(E.IWAE(2)).loss_and_grads(model, guide, batch)
            log_weights = mm.log_weights(model, guide, batch, 2)
            evidence = mm.log_marginal(model, guide, batch, num_particles=5, seed=0)
            draws = mm.generate(model, guide, batch, num_samples=2, seed=0)
            history = mm.fit(model, guide, tables.elbo(), batch, epochs=1, seed=0, device="cpu", progress=False)
            losses = torch.tensor([loss, *history.to_dict()["loss"]], device="cpu")
            return [losses, log_weights, evidence.log_prob, *draws.values(), *model.parameters(), *guide.parameters()]

        expected = [x.detach().clone() for x in results()]
        with torch.device(default):
            found = results()
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.device.type == "cpu"
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name", ["product", "product without prior", "mixture", "mixture of products", "dependent", "hoelder"]
)
def test_the_order_of_experts_does_not_matter(name, double):
    model = oracle(3)
    nets = {n: mm.conditionals.Normal(mm.nn.MLP(w.shape[0], 6, (8,))) for n, w in model.loadings.items()}
    kind = {"product": mm.posteriors.ProductOfExperts, "mixture": mm.posteriors.MixtureOfExperts}
    kind |= {"mixture of products": mm.posteriors.MixtureOfProducts}
    kind |= {"product without prior": lambda e: mm.posteriors.ProductOfExperts(e, prior=None)}
    kind |= {"dependent": lambda e: mm.posteriors.DependentExperts(e, 0.4), "hoelder": mm.posteriors.HoelderPooling}
    batch, z = model.sample(5), torch.randn(5, 3)
    batch = mm.Batch(
        {n: batch[n] for n in batch.names}, present={"x1": torch.tensor([1, 0, 1, 0, 1], dtype=torch.bool)}
    )
    forwards = kind[name](nets)(batch).log_prob(z)
    backwards = kind[name](dict(reversed(nets.items())))(batch).log_prob(z)
    torch.testing.assert_close(forwards, backwards, rtol=1e-12, atol=0)


def test_a_pool_of_one_expert_is_that_expert(double):
    net = mm.conditionals.Normal(mm.nn.MLP(3, 6, (8,)))
    batch, z = mm.Batch({"x": torch.randn(4, 3)}), torch.randn(4, 3)
    for posterior in (
        mm.posteriors.ProductOfExperts({"x": net}, prior=None),
        mm.posteriors.MixtureOfExperts({"x": net}),
        mm.posteriors.MixtureOfProducts({"x": net}, prior=None),
        mm.posteriors.DependentExperts({"x": net}, 0.4),
        mm.posteriors.HoelderPooling({"x": net}),
    ):
        torch.testing.assert_close(posterior(batch).log_prob(z), net(batch["x"]).log_prob(z), rtol=1e-11, atol=0)
