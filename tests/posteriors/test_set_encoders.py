"""Posteriors of sets: the order of modalities is lost, absent is deleted, and gradients go where they should."""

import copy
from itertools import permutations

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.batch import context
from pyro_mm.posteriors import experts as pools
from pyro_mm.posteriors import per_set, set_encoders
from pyro_mm.posteriors.private import PrivateOf
from pyro_mm.posteriors.set_encoders import AttentionLayer, SelfAttention, SumPooling
from tests.support.linear_gaussian import Sigma

SIZE, LATENT, N = 8, 2, 6
NAMES = ("a", "b", "c")
DIMS = {"a": 3, "b": 1, "c": 2}


def head():
    return mm.conditionals.Normal(mm.nn.MLP(SIZE, 2 * LATENT, (8,)))


def features(dims=DIMS):
    return {n: mm.nn.MLP(d, SIZE, (8,)) for n, d in dims.items()}


POSTERIORS = {
    "sum": lambda f: SumPooling(f, head(), SIZE),
    "attention": lambda f: SelfAttention(f, head(), SIZE, heads=2),
    "two layers": lambda f: SelfAttention(f, head(), SIZE, heads=4, layers=2),
    "no last norm": lambda f: SelfAttention(f, head(), SIZE, heads=2, normalized=False),
}


@pytest.fixture(params=POSTERIORS)
def posterior(request):
    torch.manual_seed(0)
    return POSTERIORS[request.param](features()).double()


@pytest.fixture
def rows():
    """Six rows, every modality missing from some, and one complete."""
    torch.manual_seed(1)
    present = {"a": [1, 1, 0, 0, 1, 0], "b": [1, 0, 1, 0, 1, 1], "c": [1, 1, 1, 1, 0, 0]}
    values = {n: torch.randn(N, d, dtype=torch.float64) for n, d in DIMS.items()}
    return mm.Batch(values, {n: torch.tensor(p).bool() for n, p in present.items()})


def parameters(d):
    return d.base_dist.loc, d.base_dist.scale


def same(x, y, tolerance=1e-12):
    for one, two in zip(parameters(x), parameters(y), strict=True):
        torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("order", list(permutations(NAMES))[1:])
def test_a_set_encoder_ignores_the_order_of_modalities(posterior, rows, order):
    """Of the batch's and of the networks'."""
    other = mm.Batch({n: rows[n] for n in order}, {n: rows.present[n] for n in order})
    same(posterior(rows), posterior(other))
    before = posterior(rows)
    posterior.features = nn.ModuleDict({n: posterior.features[n] for n in order})
    same(before, posterior(rows))


def test_a_set_encoder_with_one_network_for_all_ignores_which_modality_holds_which_value():
    """The sum forgets whose they were, and private latents go with them."""
    torch.manual_seed(0)
    net, own, whole, tip = (mm.nn.MLP(2, SIZE), nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), head())
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    masks = [torch.tensor(m).bool() for m in ([1, 1, 0, 0, 1], [1, 0, 1, 0, 0], [1, 1, 1, 0, 0])]
    for make in POSTERIORS.values():
        pool = make(dict.fromkeys(NAMES, net)).double()
        privates = {n: PrivateOf(pool, n, whole, own, tip).double() for n in NAMES}
        results = {}
        for order in permutations(range(3)):
            batch = mm.Batch({n: x[i] for n, i in zip(NAMES, order, strict=True)},
                             {n: masks[i] for n, i in zip(NAMES, order, strict=True)})  # fmt: skip
            results[order] = pool(batch), {i: privates[n](batch) for n, i in zip(NAMES, order, strict=True)}
        (z, w), *others = results.values()
        for other_z, other_w in others:
            same(z, other_z)
            for i in range(3):
                same(w[i], other_w[i])
        assert not torch.allclose(w[0].mean[0], w[1].mean[0])  # of a complete row
        assert torch.equal(w[1].mean[3], w[2].mean[3])  # where nothing is there, nothing tells them apart


def test_a_masked_modality_equals_a_deleted_one(posterior, rows):
    whole = posterior(rows)
    private = PrivateOf(posterior, "b", nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), head()).double()
    for i in range(N):
        held = [n for n in NAMES if rows.present[n][i]]
        alone = mm.Batch({n: rows[n][i : i + 1] for n in held})
        same(posterior(alone), posterior(rows[i : i + 1]))
        for one, many in ((posterior(alone), whole), (private(alone), private(rows))):
            for x, y in zip(parameters(one), parameters(many), strict=True):
                torch.testing.assert_close(x[0], y[i], rtol=1e-10, atol=1e-10)


def test_values_of_an_absent_modality_change_no_set_encoder(posterior, rows):
    values = {n: torch.where(rows.present[n][:, None], rows[n], 1e6) for n in NAMES}
    same(posterior(rows), posterior(mm.Batch(values, rows.present)))


def test_given_no_modality_a_set_encoder_is_its_head_at_zero(posterior, rows):
    same(posterior(rows.only()), posterior.head(torch.zeros(N, SIZE, dtype=torch.float64)))
    everything = posterior(mm.Batch({n: rows[n] for n in NAMES}, {n: torch.arange(N) != 2 for n in NAMES}))
    torch.testing.assert_close(everything.mean[2], posterior(rows.only()).mean[2])


def test_gradients_reach_the_networks_of_what_is_there(posterior, rows):
    """To every encoder that is present in one row, and to none that is absent in all; finite where nothing is."""
    masks = {"a": torch.arange(N) == 0, "b": torch.ones(N).bool(), "c": torch.zeros(N).bool()}
    few = mm.Batch({n: rows[n] for n in NAMES}, masks)
    posterior(few).mean.square().sum().backward()
    for name in "ab":
        assert all(p.grad.isfinite().all() and p.grad.any() for p in posterior.features[name].parameters())
    assert all(p.grad is None or not p.grad.any() for p in posterior.features["c"].parameters())
    posterior.zero_grad()
    empty = mm.Batch({n: rows[n] for n in NAMES}, {n: torch.arange(N) > 2 for n in NAMES})
    posterior(empty).mean[:3].square().sum().backward()
    assert all(p.grad is None or (p.grad.isfinite().all() and not p.grad.any()) for n in NAMES
               for p in posterior.features[n].parameters())  # fmt: skip
    assert all(p.grad.isfinite().all() for p in posterior.head.parameters())


def test_an_attention_layer_equals_torchs():
    torch.manual_seed(0)
    ours, theirs = AttentionLayer(SIZE, 4).double(), nn.MultiheadAttention(SIZE, 4, batch_first=True).double()
    theirs.load_state_dict({
        "in_proj_weight": ours.inward.weight, "in_proj_bias": ours.inward.bias,
        "out_proj.weight": ours.outward.weight, "out_proj.bias": ours.outward.bias,
    })  # fmt: skip
    states = torch.randn(N, 3, SIZE, dtype=torch.float64)
    there = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 1, 1], [1, 0, 0]]).bool()
    normed = ours.norm(states)
    expected, _ = theirs(normed, normed, normed, key_padding_mask=~there)
    answers = (there[:, None, :] | torch.eye(3).bool())[:, None]
    torch.testing.assert_close((ours(states, answers) - states)[there], expected[there])
    complete, _ = theirs(normed, normed, normed)
    torch.testing.assert_close(ours(states, None) - states, complete)


def test_a_set_encoder_gives_each_term_in_one_pass_its_own_set(posterior, rows):
    """One pass over all terms is as one term after the other; with sigma points for draws, to rounding."""
    torch.manual_seed(0)
    loadings = {n: torch.randn(d, LATENT, dtype=torch.float64) for n, d in DIMS.items()}
    model, guide = mm.models.LinearGaussian(loadings).double(), mm.Guide(z=Sigma(posterior))
    estimator = mm.estimators.AnalyticKL(num_particles=2 * LATENT)
    for make in (mm.objectives.mvae, mm.objectives.subset_mean, mm.objectives.mvtcae):
        losses = [make(estimator=estimator, vectorize=v).loss(model, guide, rows) for v in (True, False)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-10)


TABLES = ["elbo", "masked", "mvae", "vaevae", "jmvae_kl", "mvtcae", "mmjsd", "subset_mean", "mmvm", "telbo"]


def story():
    loadings = {n: torch.randn(d, LATENT, dtype=torch.float64) for n, d in DIMS.items()}
    return mm.models.LinearGaussian(loadings).double()


def outcome(objective, model, guide, batch):
    for p in (*model.parameters(), *guide.parameters()):
        p.grad = None
    torch.manual_seed(2)
    loss = objective.loss_and_grads(model, guide, batch)
    return loss, [p.grad for p in (*model.parameters(), *guide.parameters())]


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("table", TABLES)
def test_computations_that_terms_share_are_those_of_each_term(table, complete, posterior, rows, monkeypatch):
    """Loss and gradient, to rounding; for a posterior of z and a private latent's from the same tokens."""
    torch.manual_seed(3)
    batch = mm.Batch({n: rows[n] for n in NAMES}) if complete else rows
    decoders = {n: mm.conditionals.Normal(mm.nn.MLP(LATENT + (n == "a"), d, ()), scale=1.0) for n, d in DIMS.items()}
    prior, own = (dist.Normal(torch.zeros(size).double(), 1.0).to_event(1) for size in (LATENT, 1))
    model = mm.models.PrivateLatents(prior, {"a": own}, decoders).double()
    small = mm.conditionals.Normal(mm.nn.MLP(SIZE, 2, ()))
    private = PrivateOf(posterior, "a", nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE), small).double()
    guide, objective = mm.Guide(z=posterior, w_a=private), getattr(mm.objectives, table)()
    ours = outcome(objective, model, guide, batch)
    monkeypatch.setattr(set_encoders, "per_set", lambda batch, owner, f: f(batch))
    monkeypatch.setattr(set_encoders, "per_view", lambda batch, owner, f: f(batch))
    apart = outcome(objective, model, guide, batch)
    assert ours[0] == pytest.approx(apart[0], rel=1e-12)
    for one, two in zip(ours[1], apart[1], strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("table", ["mmvm", "vaevae"])
def test_a_product_that_terms_share_is_what_each_would_compute(table, rows, monkeypatch):
    """Loss and gradient, to rounding; and fewer products."""
    torch.manual_seed(4)
    experts = {n: mm.conditionals.Normal(mm.nn.MLP(d, 2 * LATENT, (8,))) for n, d in DIMS.items()}
    pair = story(), mm.Guide(z=pools.ProductOfExperts(experts)).double()
    objective, products, sizes = getattr(mm.objectives, table)(), pools.product_of_normals, []

    def counted(*args, **options):
        product = products(*args, **options)
        sizes.append(product.batch_shape[:-1].numel())
        return product

    monkeypatch.setattr(pools, "product_of_normals", counted)
    outcome(objective, *pair, rows)  # which looks at the pair first
    sizes.clear()
    ours = outcome(objective, *pair, rows)
    shared = sum(sizes)
    monkeypatch.setattr(pools, "per_set", lambda batch, owner, function, search_above: function(batch))
    sizes.clear()
    apart = outcome(objective, *pair, rows)
    assert shared < sum(sizes)
    assert ours[0] == pytest.approx(apart[0], rel=1e-12)
    for one, two in zip(ours[1], apart[1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("vectorize", [True, False])
@pytest.mark.parametrize(("table", "sets"), [("elbo", 1), ("masked", 2), ("vaevae", 4), ("jmvae_kl", 4), ("mmvm", 3)])
def test_the_network_of_a_set_is_run_once_a_step(table, sets, vectorize, rows):
    """On as many rows as there are sets that are encoded or given, each counted once: all, S, or one modality."""
    torch.manual_seed(0)
    posterior, seen = SumPooling(features(), head(), SIZE).double(), []
    posterior.head.net.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel()))
    objective = getattr(mm.objectives, table)(vectorize=vectorize)
    pair = story(), mm.Guide(z=posterior)
    objective.loss(*pair, rows)  # which looks at the pair first
    seen.clear()
    objective.loss(*pair, rows)
    assert sum(seen) == sets * N


def test_a_set_encoder_refuses_sizes_that_do_not_fit():
    with pytest.raises(ValueError, match="3 heads cannot share features of size 8"):
        SelfAttention(features(), head(), SIZE, heads=3)
    with pytest.raises(ValueError, match="expected features of size 9, got 8 of 'a'"):
        SumPooling(features(), head(), 9)(mm.Batch({n: torch.randn(2, d) for n, d in DIMS.items()}))
    with pytest.raises(ValueError, match="name: unknown modality 'd', expected one of 'a'"):
        PrivateOf(SumPooling(features(), head(), SIZE), "d", nn.Identity(), nn.Identity(), head())


def joint_and_each(f):
    """A joint encoder of what is complete, and one for each modality that an objective gives it alone."""
    experts = {n: mm.conditionals.Normal(mm.nn.MLP(d, 2 * LATENT, (8,))) for n, d in DIMS.items()}
    return mm.posteriors.JointEncoder(f, mm.conditionals.Normal(mm.nn.MLP(3 * SIZE, 2 * LATENT)), product(f, experts))


def product(f, experts=None):
    experts = experts or {n: mm.conditionals.Normal(mm.nn.MLP(d, 2 * LATENT, (8,))) for n, d in DIMS.items()}
    return pools.ProductOfExperts(experts)


ALONE = mm.objectives.Objective([mm.objectives.Term(mm.objectives.ALL, mm.objectives.ALL, "a")])


@pytest.mark.parametrize("table", [*TABLES, "given alone"])
@pytest.mark.parametrize("make", [*POSTERIORS.values(), product, joint_and_each])
def test_a_set_encoding_cached_without_gradient_is_computed_again_with_one(make, table, rows, monkeypatch):
    """One particle, resampled, is that particle: its gradient is the bound's own (where no penalty is drawn apart).
    And of more particles it is what it is if nothing is kept."""
    torch.manual_seed(5)
    pair = story(), mm.Guide(z=make(features())).double()

    def result(estimator):
        objective = copy.copy(ALONE if table == "given alone" else getattr(mm.objectives, table)())
        objective.estimator = estimator
        objective.loss(*pair, rows)  # which looks at the pair first
        return outcome(objective, *pair, rows)

    pairs = []
    if table not in ("jmvae_kl", "mmjsd", "mmvm"):
        pairs.append([result(mm.estimators.IWAE(1, resample=each)) for each in (False, True)])
    several = result(mm.estimators.IWAE(3, resample=True))
    for module in (context, per_set):
        monkeypatch.setattr(module, "is_cached", lambda memo, key: False)
    for one, two in [*pairs, (several, result(mm.estimators.IWAE(3, resample=True)))]:
        assert one[0] == pytest.approx(two[0], rel=1e-12)
        for each, other in zip(one[1], two[1], strict=True):
            each, other = (torch.zeros((), dtype=torch.float64) if g is None else g for g in (each, other))
            torch.testing.assert_close(*torch.broadcast_tensors(each, other), rtol=1e-9, atol=1e-9)
