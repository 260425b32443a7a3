"""Estimators against Pyro's, against their formulas, and at the optimum, where good gradients vanish."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyro_mm as mm
from tests.support.linear_gaussian import encoders, every_pattern, oracle

E = mm.estimators


def one_modality(latent=2):
    """A linear-Gaussian model whose exact posterior is a diagonal normal of one encoder."""
    w = torch.linalg.qr(torch.randn(4, latent))[0] * torch.tensor([1.5, 0.7][:latent])
    model = mm.models.LinearGaussian({"x": w}, 0.6)
    precision = 1 + (w.T @ w).diagonal() / 0.36
    net = torch.nn.Linear(4, 2 * latent)
    with torch.no_grad():
        net.weight.zero_()
        net.weight[:latent] = (w / 0.36 / precision).T
        net.bias.zero_()

    class Exact(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.log_scale = net, torch.nn.Parameter(-0.5 * precision.log())

        def forward(self, batch):
            return dist.Normal(self.net(batch["x"])[..., :latent], self.log_scale.exp()).to_event(1)

    return model, mm.Guide(z=Exact())


def gradients(estimator, model, guide, batch):
    loss = estimator.differentiable_loss(model, guide, batch)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(guide.parameters()))])


def test_at_the_exact_posterior_good_gradients_vanish(double):
    model, guide = one_modality()
    batch = model.sample(8)
    assert gradients(E.DReG(5), model, guide, batch).abs().max() < 1e-10
    assert gradients(E.StickTheLanding(5), model, guide, batch).abs().max() < 1e-10
    assert gradients(E.IWAE(5), model, guide, batch).abs().max() > 1e-2
    assert E.IWAE(5).loss(model, guide, batch) == pytest.approx(-model.log_prob(batch).sum().item(), rel=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0, -1.0])
def test_value_and_gradient_of_our_estimators_are_pyros(alpha, double):
    """At one seed; a batch that is no subsample, where RenyiELBO is right."""
    model = oracle(2)
    guide, batch = mm.Guide(z=mm.posteriors.ProductOfExperts(encoders(model))), every_pattern(model)
    ours = E.IWAE(4) if alpha == 0 else E.Renyi(alpha, 4)
    theirs = RenyiELBO(alpha=alpha, num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    torch.manual_seed(1)
    value = ours.differentiable_loss(model, guide, batch)
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(guide.parameters()))])
    torch.manual_seed(1)
    assert theirs.loss(model, guide, batch) == pytest.approx(value.item(), rel=1e-11)
    torch.manual_seed(1)
    with pyro.poutine.trace(param_only=True) as capture:
        theirs.loss_and_grads(model, guide, batch)
    assert capture.trace.nodes
    found = torch.cat([p.grad.flatten() for p in guide.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_subsampled_plate_scales_the_bound_from_outside(double):
    model, batch = oracle(2), None
    guide, batch = mm.Guide(z=mm.posteriors.ProductOfExperts(encoders(model))), model.sample(12)
    index = torch.tensor([1, 5, 7])
    for estimator in (E.IWAE(3), E.AnalyticKL(3), E.DReG(3), E.Renyi(0.5, 3), E.StickTheLanding(3)):
        torch.manual_seed(0)
        whole = estimator.loss(model, guide, batch.subsample(index))
        torch.manual_seed(0)
        assert whole == pytest.approx(4 * estimator.loss(model, guide, batch[index]), rel=1e-12)


class Hierarchical(torch.nn.Module):
    """q(z) q(w | z): the second latent's location and scale depend on the first."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 2), torch.nn.Linear(4, 2)

    def forward(self, batch):
        with batch.plate():
            h = self.a(batch["x"])
            z = pyro.sample("z", dist.Normal(h[..., :1], 0.5 + h[..., 1:].sigmoid()).to_event(1))
            h = self.b(torch.cat([z, batch["x"].expand(*z.shape[:-1], 3)], -1))
            pyro.sample("w", dist.Normal(h[..., :1] + z, 0.5 + (h[..., 1:] * z).sigmoid()).to_event(1))


def hierarchical_story(batch):
    with batch.plate():
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        w = pyro.sample("w", dist.Normal(0.8 * z, 0.7).to_event(1))
        batch.observe("x", dist.Normal(torch.cat([z, w, z * w], -1), 0.8).to_event(1))


@pytest.mark.parametrize("estimator", [E.DReG(3), E.StickTheLanding(1)], ids=repr)
@pytest.mark.parametrize("kind", ["one latent", "a latent given another", "a mixture"])
def test_path_gradients_are_unbiased(estimator, kind, double):
    """Mean over draws equals that of the full reparameterised gradient of the same bound."""
    if kind == "a latent given another":
        model, guide, batch = hierarchical_story, Hierarchical(), mm.Batch({"x": torch.randn(1, 3)})
    else:
        model = oracle(2, latent=2)
        posterior = mm.posteriors.ProductOfExperts if kind == "one latent" else mm.posteriors.MixtureOfExperts
        guide, batch = mm.Guide(z=posterior(encoders(model, hidden=()))), model.sample(1)
    same_mean_gradient(estimator, E.IWAE(estimator.num_particles), model, guide, batch, list(guide.parameters()))


def same_mean_gradient(one, other, model, guide, batch, parameters, rows=20_000):
    """Two losses' gradients agree in the mean over many draws of one row."""
    wide = mm.Batch({n: batch[n].expand(rows, -1) for n in batch.names})
    difference, blocks = [], 20
    for block in range(blocks):
        torch.manual_seed(block)
        a = torch.autograd.grad(one.differentiable_loss(model, guide, wide), parameters)
        torch.manual_seed(block)
        b = torch.autograd.grad(other.differentiable_loss(model, guide, wide), parameters)
        difference.append(torch.cat([(x - y).flatten() for x, y in zip(a, b, strict=True)]) / wide.size)
    difference = torch.stack(difference)
    error = difference.std(0) / blocks**0.5
    # 20 block means: |t| < 5.5 with 19 degrees of freedom fails with probability 3e-5 for each of some 30 parameters
    assert (difference.mean(0).abs() < 5.5 * error + 1e-12).all()
    assert error.max() < 0.05, "the test could tell no difference"


@pytest.mark.parametrize("stratified", [None, "inside", "outside"])
def test_one_particle_by_its_weight_stands_for_all_in_the_mean(stratified, double):
    model = oracle(2, latent=2)
    posterior = mm.posteriors.MixtureOfExperts if stratified else mm.posteriors.ProductOfExperts
    guide, batch = mm.Guide(z=posterior(encoders(model, hidden=()))), model.sample(1)
    one, full = (E.IWAE(3, stratified=stratified, resample=r) for r in (True, False))
    parameters = [*guide.parameters(), *model.loadings.values()]
    same_mean_gradient(one, full, model, guide, batch, parameters, rows=5000)


def test_one_particle_by_its_weight_stands_for_all_where_the_prior_is_encoded(double):
    """A hierarchical prior, whose density of w is that given the u of the particle chosen."""
    loading = torch.nn.Parameter(torch.tensor([[0.7]]))

    def model(batch):
        with batch.plate():
            u = pyro.sample("u", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            w = pyro.sample("w", dist.Normal(u @ loading, 0.7).to_event(1))
            batch.observe("x", dist.Normal(w, 0.8).to_event(1))

    net = torch.nn.Linear(1, 1)

    def guide(batch):
        with batch.plate():
            u = pyro.sample("u", dist.Normal(net(batch["x"]), 1.0).to_event(1))
            pyro.sample("w", dist.Normal(u, 1.0).to_event(1))

    term = mm.objectives.Term(mm.objectives.PRIOR, mm.objectives.ALL)
    one, full = (mm.objectives.Objective([term], E.IWAE(3, resample=r)) for r in (True, False))
    same_mean_gradient(one, full, model, guide, mm.Batch({"x": torch.ones(1, 1)}), [loading], rows=4000)


@pytest.mark.parametrize("name", ["mvae", "telbo", "jmvae_kl", "masked"])
def test_one_particle_by_its_weight_stands_for_all_in_every_kind_of_table(name, double):
    """Several terms, frozen decoders, penalties, rows in which a term decodes nothing."""
    model = oracle(2, latent=2)
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts(encoders(model, hidden=())))
    one, full = (getattr(mm.objectives, name)(estimator=E.IWAE(3, resample=r)) for r in (True, False))
    parameters = [*guide.parameters(), *model.loadings.values()]
    same_mean_gradient(one, full, model, guide, model.sample(1), parameters, rows=4000)


@pytest.mark.parametrize("stratified", [None, "inside", "outside"])
def test_resampling_changes_no_value_and_differs_in_the_gradient(stratified, double):
    """Rows that lack modalities, private latents and two networks a modality included."""
    model, guide = mm.recipes.mmvae(digits(), latent=3, hidden=(8,))[:2]
    batch = digits()
    values, gradients = [], []
    for resample in (False, True):
        torch.manual_seed(0)
        loss = E.IWAE(4, stratified=stratified, resample=resample).differentiable_loss(model, guide, batch)
        values.append(loss.item())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(guide.parameters()))]))
    assert values[0] == pytest.approx(values[1], rel=1e-6)
    assert gradients[1].isfinite().all() and not torch.allclose(*gradients)
    with torch.no_grad():
        torch.manual_seed(0)
        assert E.IWAE(4, stratified=stratified, resample=True).loss(model, guide, batch) == pytest.approx(values[0])


def digits():
    image = torch.bernoulli(torch.full((12, 4, 4), 0.5, dtype=torch.float32))
    return mm.Batch({"image": image, "label": torch.arange(12) % 3}, {"label": torch.arange(12) % 4 > 0})


def test_resampling_without_draws_is_refused():
    with pytest.raises(ValueError, match="made in one pass"):
        E.IWAE(2, resample=True, vectorize_particles=False)
    assert repr(E.IWAE(2, resample=True)) == "IWAE(num_particles=2, resample=True)"


@pytest.mark.parametrize("stratified", ["inside", "outside"])
def test_stratified_bound_is_its_formula(stratified, double):
    model = oracle(3)
    posterior = mm.posteriors.MixtureOfExperts(encoders(model), {"x0": 1.0, "x1": 2.0, "x2": 3.0})
    guide, batch = mm.Guide(z=posterior), every_pattern(model, empty=False)
    estimator = E.IWAE(4, stratified=stratified)
    drawn = {}
    original = mm.distributions.Mixture.component_rsample

    def recording(self, index):
        drawn["z"] = original(self, index)
        return drawn["z"]

    mm.distributions.Mixture.component_rsample = recording
    try:
        found = -estimator.loss(model, guide, batch)
    finally:
        mm.distributions.Mixture.component_rsample = original
    z = drawn["z"]  # (3 * 4, N, D), component-major
    log_joint = dist.Normal(torch.zeros(3), 1.0).to_event(1).log_prob(z)
    for n in batch.names:
        log_joint = log_joint + torch.where(batch.present[n], model.likelihood(n, z).log_prob(batch[n]), 0.0)
    total = 0.0
    for row in range(batch.size):
        experts = {n: posterior.experts[n](batch[n][row]) for n in batch.names if batch.present[n][row]}
        share = {n: posterior.weights[n] / sum(posterior.weights[m] for m in experts) for n in experts}
        density = torch.stack([math.log(share[n]) + q.log_prob(z[:, row]) for n, q in experts.items()]).logsumexp(0)
        log_w = log_joint[:, row] - density
        each = {
            n: log_w[4 * i : 4 * i + 4].logsumexp(0) - math.log(4) for i, n in enumerate(batch.names) if n in experts
        }
        if stratified == "inside":
            total += torch.stack([each[n] + math.log(share[n]) for n in experts]).logsumexp(0).item()
        else:
            total += sum(share[n] * each[n].item() for n in experts)
    assert found == pytest.approx(total, rel=1e-11)
    loss = estimator.differentiable_loss(model, guide, batch)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(guide.parameters())))


def test_bounds_are_ordered(double):
    """ELBO <= IWAE_2 <= IWAE_16 <= log p, and looser <= tight, each difference five of its standard errors clear."""
    model = oracle(2)
    mixture = mm.Guide(z=mm.posteriors.MixtureOfExperts(encoders(model)))
    product = mm.Guide(z=mm.posteriors.ProductOfExperts(encoders(model)))
    row = model.sample(1)
    wide = mm.Batch({n: row[n].expand(20_000, -1) for n in row.names})
    truth = model.log_prob(row).item()

    def bound(estimator, guide):
        info = mm.scoring.structure.pair_structure(model, guide, wide)
        with torch.no_grad():
            rows = estimator.bound(estimator.scores(model, guide, mm.scoring.views.TermViews.of(wide, info), info))[0]
        return rows.mean().item(), (rows.std() / len(rows) ** 0.5).item()

    ladders = [
        [bound(e, product) for e in (E.IWAE(1), E.IWAE(2), E.IWAE(16))],
        [bound(e, mixture) for e in (E.IWAE(4, stratified="outside"), E.IWAE(4, stratified="inside"))],
    ]
    for ladder in ladders:
        for (low, a), (high, b) in zip(ladder, [*ladder[1:], (truth, 0.0)], strict=True):
            assert low < high - 5 * math.hypot(a, b)
    analytic, by_samples = bound(E.AnalyticKL(), product), ladders[0][0]
    # one quantity, two estimates: within four standard errors, one seed in 15,000 fails
    assert abs(analytic[0] - by_samples[0]) < 4 * math.hypot(analytic[1], by_samples[1])


def test_particles_one_by_one_are_as_good(double):
    """vectorize_particles=False: equal in distribution; compared at a guide under which every draw weighs the same."""
    model, guide = one_modality()
    batch = model.sample(5)
    for make in (E.IWAE, E.DReG, E.StickTheLanding):
        estimator = make(3, vectorize_particles=False)
        assert estimator.loss(model, guide, batch) == pytest.approx(-model.log_prob(batch).sum().item(), rel=1e-12)
    for make in (E.DReG, E.StickTheLanding):
        assert gradients(make(3, vectorize_particles=False), model, guide, batch).abs().max() < 1e-10


def discrete_guide(batch):
    with batch.plate():
        pyro.sample("z", dist.Poisson(torch.tensor(2.0)))


def discrete_story(batch):
    with batch.plate():
        z = pyro.sample("z", dist.Poisson(torch.tensor(2.0)))
        batch.observe("x", dist.Normal(z, 1.0))


def with_hidden_class(batch):
    with batch.plate():
        y = pyro.sample("y", dist.Categorical(torch.ones(3)))
        batch.observe("x", dist.Normal(y.to(batch["x"].dtype), 1.0))


def empty_guide(batch):
    pass


def test_an_estimator_refuses_a_pair_that_it_cannot_estimate():
    batch = mm.Batch({"x": torch.randn(4)})
    for estimator in (E.IWAE(2), E.AnalyticKL(), E.DReG(2), E.StickTheLanding(), E.Renyi(0.5)):
        with pytest.raises(ValueError, match="guide site 'z' has neither rsample nor enumeration"):
            estimator.loss(discrete_story, discrete_guide, batch)
    for estimator in (Trace_ELBO(), TraceGraph_ELBO(), TraceMeanField_ELBO(), RenyiELBO()):
        with pytest.raises(ValueError, match="'y' is in the model only"):
            mm.objectives.elbo(estimator).loss(with_hidden_class, empty_guide, batch)
    for estimator in (RenyiELBO(), TraceMeanField_ELBO()):
        with pytest.raises(ValueError, match="'z' has no rsample"):
            mm.objectives.elbo(estimator).loss(discrete_story, discrete_guide, batch)
    model = oracle(2)
    product = mm.Guide(z=mm.posteriors.ProductOfExperts(encoders(model)))
    with pytest.raises(ValueError, match="needs a mixture posterior"):
        mm.objectives.mmvae(3).loss(model, product, model.sample(2))
    with pytest.raises(ValueError, match="subsampled plate"):
        data = model.sample(4)
        mm.objectives.elbo(RenyiELBO(num_particles=2)).loss(model, product, data.subsample(torch.arange(2)))
    with pytest.raises(ValueError, match="alpha = 1"):
        E.Renyi(1.0)
    with pytest.raises(ValueError, match="num_particles >= 1"):
        E.IWAE(0)
    with pytest.raises(ValueError, match="expected stratified"):
        E.IWAE(2, stratified="sideways")
    for estimator in (E.DReG(2), E.StickTheLanding()):
        with pytest.raises(ValueError, match="guide site 'y' is enumerated"):
            estimator.loss(with_hidden_class, enumerated_guide, batch)


def enumerated_guide(batch):
    with batch.plate():
        pyro.sample("y", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})


@pytest.mark.parametrize("estimator", [Trace_ELBO(), TraceGraph_ELBO(), TraceMeanField_ELBO(), RenyiELBO()])
def test_pyros_estimators_refuse_a_continuous_latent_that_only_the_model_has(estimator, double):
    """They count its log p, which exceeds the evidence here by some nats; ours draw it, and it cancels."""
    model = oracle(2)
    guide, batch = mm.Guide(z=model.posterior), model.sample(4)
    with pytest.raises(ValueError, match="latent site 'extra' is in the model only"):
        mm.objectives.elbo(estimator).loss(_joined(model), guide, batch)
    with pytest.warns(UserWarning, match="'extra' is in the model and not in the guide"):
        loss = mm.objectives.elbo(mm.estimators.IWAE(2)).loss(_joined(model), guide, batch)
    assert loss == pytest.approx(-model.log_prob(batch).sum().item(), abs=1e-9)


def _joined(model):
    """The model with a latent more, in one data plate."""

    def story(batch):
        with batch.plate():
            pyro.sample("extra", dist.Normal(0.0, 0.01))
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            for name in batch.names:
                batch.observe(name, lambda z, name=name: model.likelihood(name, z), z)

    return story
