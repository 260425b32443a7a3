"""Posteriors of dependent and pooled experts, of flows, and of parts: densities, deletion, and the rows they see."""

from itertools import permutations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm.distributions.where import Where
from pyro_mm.posteriors import DependentExperts, Either, Given, HoelderPooling, JointEncoder
from pyro_mm.utils.global_state import import_zuko

zuko = import_zuko()  # a plain import would switch off the checks of all distributions, in all tests
DIMS = {"a": 3, "b": 2, "c": 4}
LATENT = 2


def experts(names=tuple(DIMS)):
    return {n: mm.conditionals.Normal(mm.nn.MLP(DIMS[n], 2 * LATENT, (8,))) for n in names}


def flow(name):
    made = zuko.flows.MAF(LATENT, 4, transforms=2, hidden_features=(8,), activation=torch.nn.Tanh)
    return mm.conditionals.Flow(mm.nn.MLP(DIMS[name], 4, (8,)), made)


def flows(names=("a", "b")):
    return Either({n: flow(n) for n in names})


def joint(partial):
    features = {n: mm.nn.MLP(DIMS[n], 5, ()) for n in ("a", "b")}
    return JointEncoder(features, mm.conditionals.Normal(mm.nn.MLP(10, 2 * LATENT, (8,))), partial)


POSTERIORS = {
    "dependent": lambda: DependentExperts(experts(), 0.4),
    "negatively dependent": lambda: DependentExperts(experts(), -0.4),
    "hoelder": lambda: HoelderPooling(experts()),
    "joint and flows": lambda: joint(flows()),
    "given": lambda: Given("a", joint(None), standard()),
}
POOLS = ["dependent", "negatively dependent", "hoelder"]


def standard():
    return dist.Normal(torch.zeros(LATENT), 1.0).to_event(1)


def data(rows=6):
    values = {n: torch.randn(rows, d) for n, d in DIMS.items()}
    present = {"a": [1, 1, 1, 0, 0, 1], "b": [1, 0, 1, 1, 0, 0], "c": [1, 0, 0, 1, 1, 1]}
    return mm.Batch(values, {n: torch.tensor(p, dtype=torch.bool)[:rows] for n, p in present.items()})


def grid(width=14.0, points=281):
    axis = torch.linspace(-width, width, points)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1), float((axis[1] - axis[0]) ** 2)


@pytest.mark.parametrize("name", POSTERIORS)
def test_every_row_integrates_to_one(name, double):
    d = POSTERIORS[name]()(data())
    z, area = grid()
    total = d.log_prob(z.unsqueeze(-2)).exp().sum((0, 1)) * area
    # smooth in z and zero at the ends, where the rule of equal steps converges faster than any power of them
    torch.testing.assert_close(total, torch.ones(6), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", POSTERIORS)
def test_masking_equals_deleting(name, double):
    """Row by row, what is masked against a batch that has nothing else; and whatever lies under the mask."""
    posterior, batch, z = POSTERIORS[name](), data(), torch.randn(6, LATENT)
    found = posterior(batch).log_prob(z)
    other = mm.Batch({n: torch.where(batch.present[n][:, None], batch[n], 9.0) for n in DIMS}, batch.present)
    other._values = {n: torch.where(batch.present[n][:, None], batch[n], 9.0) for n in DIMS}
    assert torch.equal(posterior(other).log_prob(z), found)
    for row in range(6):
        here = [n for n in DIMS if batch.present[n][row]]
        alone = mm.Batch({n: batch[n][row : row + 1] for n in here})
        if name in POOLS:
            torch.testing.assert_close(posterior(alone).log_prob(z[row]), found[row : row + 1], rtol=1e-11, atol=1e-11)
        only = batch[row : row + 1].only(*here)
        torch.testing.assert_close(posterior(only).log_prob(z[row]), found[row : row + 1], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", POOLS)
def test_the_order_of_modalities_does_not_matter(name, double):
    nets, batch, z = experts(), data(), torch.randn(6, LATENT)
    kind = {"dependent": lambda e: DependentExperts(e, 0.4), "hoelder": HoelderPooling}
    kind |= {"negatively dependent": lambda e: DependentExperts(e, -0.4)}
    found = kind[name](nets)(batch).log_prob(z)
    for order in permutations(nets):
        again = kind[name]({n: nets[n] for n in order})(batch).log_prob(z)
        torch.testing.assert_close(again, found, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", POSTERIORS)
def test_draws_have_the_density(name):
    """E log q(z) by draws against the integral, and the mean of z: five standard errors, the seed fixed."""
    d = POSTERIORS[name]()(data())
    z = d.expand((4000, 6)).rsample() if name != "hoelder" else d.sample((4000,))
    assert z.shape == (4000, 6, LATENT)
    points, area = grid(12.0, 161)
    log_p = d.log_prob(points.unsqueeze(-2))
    weight = log_p.exp() * area
    for value, exact in (
        (d.log_prob(z), (weight * log_p).sum((0, 1))),
        (z.sum(-1), (weight * points.sum(-1, keepdim=True)).sum((0, 1))),
    ):
        # of 12 differences in each of five cases one is beyond five errors with probability 4e-5, were they normal
        assert ((value.mean(0) - exact).abs() < 5 * value.std(0) / 4000**0.5 + 1e-4).all()


def test_dependent_experts_with_no_correlation_are_the_product(double):
    nets, batch, z = experts(), data(), torch.randn(6, LATENT)
    product = mm.posteriors.ProductOfExperts(nets, prior=None)(batch).log_prob(z)
    torch.testing.assert_close(DependentExperts(nets, 0.0)(batch).log_prob(z), product, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match=r"> -0.5 and < 1, got 1"):
        DependentExperts(nets, 1.0)


def test_weights_of_a_pool_are_learned_and_all_their_gradients_are_there(double):
    """The gradient of E_q f = int q f, f a wave, by draws: against the integral's, for every parameter."""
    posterior, rows = HoelderPooling(experts(("a", "b"))), 30_000
    row = data(1)
    wide = mm.Batch({n: row[n].expand(rows, -1) for n in ("a", "b")})
    with torch.no_grad():  # apart from each other, so that the weights are far from equal
        posterior.experts["a"].net.layers[-1].bias[:LATENT] += 1.5
    parameters = list(posterior.parameters())[-2:]
    f = lambda z: (2 * z[..., 0]).sin() + z[..., 1] ** 2  # noqa: E731
    d = posterior(wide)
    assert d.has_rsample and d._log_weights.requires_grad
    parts = [torch.autograd.grad(f(posterior(wide).rsample()).mean(), parameters) for _ in range(8)]
    points, area = grid(10.0, 201)
    integral = (posterior(row).log_prob(points.unsqueeze(-2))[..., 0].exp() * f(points)).sum() * area
    exact = torch.autograd.grad(integral, parameters)
    for i, value in enumerate(exact):
        draws = torch.stack([part[i] for part in parts])
        # 36 differences of means of eight, t-distributed with 7 degrees: one is beyond 12 with probability 2e-4
        assert ((draws.mean(0) - value).abs() < 12 * draws.std(0) / 8**0.5 + 1e-6).all()


@pytest.mark.parametrize("stratified", ["inside", "outside"])
def test_stratified_draws_bound_the_evidence_with_learned_weights(stratified, double):
    """The ELBO of a pool by one draw of each component is that by draws at random; and so is the gradient."""
    model = mm.models.LinearGaussian({"a": torch.randn(3, LATENT), "b": torch.randn(2, LATENT)}, 0.8)
    guide = mm.Guide(z=HoelderPooling(experts(("a", "b"))))
    row = model.sample(1)
    wide = mm.Batch({n: row[n].expand(20_000, -1) for n in ("a", "b")})
    estimators = mm.estimators.AnalyticKL(), mm.estimators.IWAE(1, stratified=stratified)
    losses, slopes = [], []
    for estimator in estimators:
        loss = mm.objectives.elbo(estimator).differentiable_loss(model, guide, wide) / wide.size
        losses.append(loss.item())
        slopes.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(guide.parameters()))]))
    assert -losses[1] <= model.log_prob(row).item()
    if stratified == "inside":
        assert losses[1] < losses[0]
        return
    # a deviation of some 3 nats per row, and of the gradient of some 10: 20,000 rows are within five errors
    assert losses[0] == pytest.approx(losses[1], abs=0.12)
    torch.testing.assert_close(*slopes, rtol=0.05, atol=0.4)


# -- flows --------------------------------------------------------------------------------------------------------


def test_a_flows_density_is_that_of_its_draws_by_the_change_of_variables(double):
    d = flow("a")(torch.randn(5, 3))
    base, transform = d.base_dist, d.transforms[0]
    u = torch.randn(5, LATENT)
    z = transform(u)
    slopes = torch.autograd.functional.jacobian(transform, u).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    expected = base.log_prob(u) - torch.linalg.slogdet(slopes)[1]
    torch.testing.assert_close(d.log_prob(z), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        torch.distributions.TransformedDistribution(base, d.transforms).log_prob(z), expected, rtol=1e-9, atol=1e-9
    )


def test_a_flow_takes_leading_dimensions(double):
    d = flow("a")(torch.randn(5, 3))
    assert d.has_rsample and d.event_shape == (LATENT,) and d.batch_shape == (5,)
    wide = d.expand((4, 2, 5))
    z = wide.rsample()
    assert z.shape == (4, 2, 5, LATENT) and len(z.unique()) == z.numel() and d.batch_shape == (5,)
    torch.testing.assert_close(wide.log_prob(z)[3, 1], d.log_prob(z[3, 1]), rtol=1e-12, atol=1e-12)
    assert d.log_prob(torch.randn(7, 1, 1, LATENT)).shape == (7, 1, 5)
    chosen = Where(torch.tensor([1, 0, 1, 0, 1]).bool(), d, standard())
    z = chosen.expand((3, 5)).rsample()
    expected = torch.stack([(d if n % 2 == 0 else standard().expand((5,))).log_prob(z)[:, n] for n in range(5)], -1)
    torch.testing.assert_close(chosen.log_prob(z), expected, rtol=1e-12, atol=1e-12)
    with pyro.plate("particles", 3, dim=-2), pyro.plate("data", 5, dim=-1), pyro.validation_enabled():
        assert pyro.sample("z", chosen).shape == (3, 5, LATENT)


def test_flows_train_and_draw_as_other_posteriors_do():
    model = mm.models.LinearGaussian({"a": torch.randn(3, LATENT), "b": torch.randn(2, LATENT)}, 0.8)
    guide, batch = mm.Guide(z=joint(flows())), data().without("c")
    for objective in (
        mm.objectives.jmvae_kl(0.5),
        mm.objectives.vaevae(mm.estimators.IWAE(3)),
        mm.objectives.mvae(1, mm.estimators.DReG(3)),
        mm.objectives.masked(mm.estimators.StickTheLanding()),
    ):
        loss = objective.differentiable_loss(model, guide, batch)
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(guide.parameters())))
    for draws in ("independent", "antithetic", "quasi"):
        evidence = mm.log_marginal(model, guide, batch, num_particles=2000, draws=draws, seed=0)
        error = (evidence.log_prob - model.log_prob(batch)).abs()
        # six rows, of which two are empty: five stated errors, and 0.02 for what they are off themselves
        assert (error < 5 * evidence.standard_error + 0.02).all()
    assert mm.generate(model, guide, batch.only("a"), num_samples=3)["b"].shape == (3, 6, 2)


def test_a_flow_that_is_the_identity_is_the_standard_normal(double):
    made = zuko.flows.MAF(LATENT, 4, transforms=1, hidden_features=(8,))
    for p in made.parameters():
        torch.nn.init.zeros_(p)
    d, z = mm.conditionals.Flow(mm.nn.MLP(3, 4, ()), made)(torch.randn(5, 3)), torch.randn(5, LATENT)
    torch.testing.assert_close(d.log_prob(z), standard().log_prob(z), rtol=1e-12, atol=1e-12)


# -- parts --------------------------------------------------------------------------------------------------------


def test_either_has_the_posterior_of_what_is_there(double):
    posterior, batch, z = flows(), data().without("c"), torch.randn(6, LATENT)
    found = posterior(batch).log_prob(z)
    for row in range(6):
        a, b = (bool(batch.present[n][row]) for n in ("a", "b"))
        one = mm.Batch({n: batch[n][row : row + 1] for n in ("a", "b")})
        expected = standard() if not a | b else posterior.experts["a" if a else "b"](one["a" if a else "b"])
        torch.testing.assert_close(expected.log_prob(z[row]).squeeze(), found[row], rtol=1e-12, atol=1e-12)
    assert posterior(batch.only()).log_prob(z).shape == (6,)
    with pytest.raises(ValueError, match=r"one modality or two, got \['a', 'b', 'c'\]"):
        Either({n: flow(n) for n in DIMS})
    with pytest.raises(ValueError, match="holds no values"):
        posterior(mm.Batch({"c": torch.randn(2, 4)}))


def test_given_is_the_prior_without_what_it_needs(double):
    batch, z = data().without("c"), torch.randn(6, LATENT)
    inner, prior = joint(None), dist.Normal(torch.full((LATENT,), 0.3), 2.0).to_event(1)
    posterior = Given(("a",), inner, prior)
    found = posterior(batch).log_prob(z)
    there = batch.present["a"]
    assert torch.equal(found[there], inner(batch).log_prob(z)[there])
    assert torch.equal(found[~there], prior.log_prob(z)[~there])
    nothing = posterior(mm.Batch({"a": None, "b": torch.randn(6, 2)}))
    assert nothing.batch_shape == (6,) and torch.equal(nothing.log_prob(z), prior.log_prob(z))
    whole = mm.Batch({"a": torch.randn(6, 3), "b": torch.randn(6, 2)})
    assert torch.equal(posterior(whole).log_prob(z), inner(whole).log_prob(z))


def test_a_pool_has_the_experts_and_their_pairs_for_components():
    pool = HoelderPooling(experts())(data())
    assert pool.num_components == 6 and pool.log_weights.isneginf().sum(-1).tolist() == [0, 5, 3, 3, 5, 3]
    with pytest.raises(ValueError, match="at least one modality"):
        HoelderPooling({})


class Scalar(torch.nn.Module):
    """Numbers ``(N,)`` as ``(N, 1)``, to a network."""

    def __init__(self):
        super().__init__()
        self.net = mm.nn.MLP(1, 4, (4,))

    def forward(self, x):
        return self.net(x[..., None])


@pytest.mark.parametrize("kind", [mm.posteriors.MixtureOfExperts, mm.posteriors.ProductOfExperts])
def test_an_expert_on_a_drawn_latent_goes_with_its_particles(kind):
    """The draw of an earlier site has dimensions that what is made of data has not."""
    torch.manual_seed(0)
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)

    def model(batch):
        with batch.plate():
            v, z = pyro.sample("v", normal), pyro.sample("z", normal)
            batch.observe("x", lambda v, z: dist.Normal(v.sum(-1) + z.sum(-1), 1.0), v, z)

    head = lambda: mm.conditionals.Normal(Scalar())  # noqa: E731
    net = mm.conditionals.Normal(mm.nn.MLP(2, 4, (4,)))
    rows = mm.Batch({"x": torch.randn(5)})
    guide = mm.Guide(v=mm.posteriors.ProductOfExperts({"x": head()}), z=kind({"x": head(), "v": net}))
    evidence = mm.log_marginal(model, guide, rows, num_particles=20_000, seed=0)
    # x ~ N(0, 5): within 4.5 standard errors on five rows, seed fixed
    truth = torch.distributions.Normal(0.0, 5**0.5).log_prob(rows["x"])
    assert ((evidence.log_prob - truth).abs() < 4.5 * evidence.standard_error).all()


def test_a_posterior_given_a_modality_that_no_batch_has_names_it():
    posterior = Given("imgae", torch.nn.Identity(), dist.Normal(0.0, 1.0))
    with pytest.raises(ValueError, match=r"none of \['imgae'\] among its modalities \['x'\]"):
        posterior(mm.Batch({"x": torch.zeros(3)}))


@pytest.mark.parametrize("family", [mm.conditionals.Normal, mm.conditionals.Laplace])
def test_a_mixture_of_experts_given_nothing_is_standard_and_hears_no_values(family):
    """Nor does it as a term that encodes nothing, which is as one of the prior: within six standard errors."""
    torch.manual_seed(0)
    posterior = mm.posteriors.MixtureOfExperts({n: family(mm.nn.MLP(2, 6, ())) for n in "ab"})
    values, z = {n: torch.randn(4, 2) for n in "ab"}, torch.randn(4, 3)
    standard = family.family(torch.zeros(3), 1.0).to_event(1)
    batch = mm.Batch(values)
    for nothing in (batch.only(), mm.Batch.empty(4, like=batch)):
        torch.testing.assert_close(posterior(nothing).log_prob(z), standard.log_prob(z))
    some = mm.Batch(
        values, {"a": torch.tensor([True, False, True, False]), "b": torch.tensor([False, False, True, True])}
    )
    found = posterior(some).log_prob(z)
    torch.testing.assert_close(found[1], standard.log_prob(z)[1])
    torch.testing.assert_close(found[2], posterior(batch).log_prob(z)[2])
    model = mm.models.SharedLatent(standard, {n: mm.conditionals.Normal(mm.nn.MLP(3, 2, ()), scale=1.0) for n in "ab"})
    guide, rows = mm.Guide(z=posterior), mm.Batch({n: torch.randn(2000, 2) for n in "ab"})
    means, variances = [], []
    for encoded in ((), mm.objectives.PRIOR):
        objective = mm.objectives.Objective([mm.objectives.Term(encoded, mm.objectives.ALL)], mm.estimators.IWAE(1))
        draws = torch.tensor([objective.loss(model, guide, rows) for _ in range(30)])
        means.append(draws.mean())
        variances.append(draws.var() / 30)
    assert abs(means[0] - means[1]) < 6 * sum(variances) ** 0.5


POOLS = {
    "product": lambda nets: mm.posteriors.ProductOfExperts(nets),
    "products": lambda nets: mm.posteriors.MixtureOfProducts(nets),
    "dependent": lambda nets: DependentExperts(nets, 0.2),
    "pool": lambda nets: HoelderPooling(nets),
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("family", ["Laplace", "MultivariateNormal", "Bernoulli"])
def test_pools_of_normals_refuse_other_experts(pool, family):
    """The product of Laplace densities is none, and was that of Normals of their scales."""
    size = LATENT * (LATENT + 3) // 2 if family == "MultivariateNormal" else 2 * LATENT
    nets = {n: getattr(mm.conditionals, family)(mm.nn.MLP(d, size)) for n, d in DIMS.items()}
    with pytest.raises(TypeError, match=f"expert of .*Normal experts, in closed form, and got {family}"):
        POOLS[pool](nets)(data())


@pytest.mark.parametrize("make", [mm.posteriors.ProductOfExperts, mm.posteriors.MixtureOfProducts])
def test_a_prior_expert_is_normal(make):
    prior = torch.distributions.Laplace(torch.zeros(LATENT), 1.0)
    with pytest.raises(TypeError, match="prior to be a diagonal Normal or None, got Laplace"):
        make(experts(), prior)
