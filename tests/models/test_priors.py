"""Learned and conditional priors: densities, gradients, and evidence under them against closed forms."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.models.priors import Component, GivenCovariate, MixturePrior

LATENT, CLASSES = 2, 3


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def story(prior, noise=0.5):
    """A linear likelihood of three numbers, so that the evidence under a Gaussian component is a Gaussian's."""
    net = nn.Linear(LATENT, 3)
    model = mm.models.SharedLatent(prior, {"x": mm.conditionals.Normal(net, scale=noise)})

    def evidence(x, loc, scale):
        covariance = net.weight * scale.square()[..., None, :] @ net.weight.T + noise**2 * torch.eye(3)
        return torch.distributions.MultivariateNormal(net(loc), covariance).log_prob(x)

    return model, evidence


def test_a_mixture_prior_is_a_mixture():
    prior = MixturePrior(4, LATENT)
    with torch.no_grad():
        prior.logits.normal_()
        prior.log_scale.normal_()
    z = torch.randn(7, LATENT)
    each = dist.Normal(prior.loc, prior.log_scale.exp()).to_event(1).log_prob(z[:, None])
    torch.testing.assert_close(prior(None).log_prob(z), (each + prior.logits.log_softmax(0)).logsumexp(-1))


def mixed():
    """A prior of no symmetry, and the components of z that it stands for."""
    prior = MixturePrior(CLASSES, LATENT, mixing=True)
    with torch.no_grad():
        prior.logits.normal_()
        prior.log_scale.normal_(std=0.5)
        prior.mixing.copy_(torch.tensor([[1.0, 0.5], [-0.7, 1.5]]))
        triangle = prior.mixing * prior.log_scale.exp()[:, None]
        parts = torch.distributions.MultivariateNormal(prior.loc @ prior.mixing.T, triangle @ triangle.mT)
    return prior, parts


def test_a_mixing_prior_is_a_mixture_along_other_axes():
    prior, parts = mixed()
    z = torch.randn(4, 7, LATENT)
    each = parts.log_prob(z[..., None, :]) + prior.logits.log_softmax(0)
    torch.testing.assert_close(prior(None).log_prob(z), each.logsumexp(-1))
    torch.testing.assert_close(prior.sources(z) @ prior.mixing.T, z)
    torch.testing.assert_close(prior(None).mean, (parts.mean * prior.logits.softmax(0)[:, None]).sum(0))
    # 100,000 draws: means within five standard errors, seed fixed
    drawn = prior(None).sample((100_000,))
    assert ((drawn.mean(0) - prior(None).mean).abs() < 5 * drawn.std(0) / 100_000**0.5).all()


def test_prior_and_label_likelihood_multiply_to_their_joint():
    """p(z) p(u | z) = p(u) p(z | u), exactly; and so the evidence of a row with its label, and of a label alone."""
    prior, parts = mixed()
    z, u = torch.randn(4, 7, LATENT), torch.randint(CLASSES, (7,))
    joint = prior(None).log_prob(z) + Component(prior)(z).log_prob(u)
    given = parts.log_prob(z[..., None, :])[..., torch.arange(7), u]
    torch.testing.assert_close(joint, prior.logits.log_softmax(0)[u] + given)

    net = nn.Linear(LATENT, 3)
    model = mm.models.SharedLatent(prior, {"x": mm.conditionals.Normal(net, scale=0.5), "u": Component(prior)})
    assert len(list(model.parameters())) == len(list(prior.parameters())) + 2  # not once more for the label
    rows = mm.Batch({"x": torch.randn(7, 3), "u": u})
    with torch.no_grad():
        covariance = net.weight @ parts.covariance_matrix @ net.weight.T + 0.25 * torch.eye(3)
        of_x = torch.distributions.MultivariateNormal(net(parts.mean), covariance).log_prob(rows["x"][:, None])
        truth = prior.logits.log_softmax(0)[u] + of_x[torch.arange(7), u]
    guide = mm.Guide(z=lambda b: dist.Normal(torch.zeros(b.size, LATENT), 3.0).to_event(1))
    found = mm.log_marginal(model, guide, rows, num_particles=20_000, seed=0)
    # within 4.5 standard errors on all of seven rows, seed fixed
    assert ((found.log_prob - truth).abs() < 4.5 * found.standard_error).all() and found.standard_error.max() < 0.1
    alone = mm.log_marginal(model, guide, rows.only("u"), num_particles=20_000, seed=0)
    assert ((alone.log_prob - prior.logits.log_softmax(0)[u]).abs() < 4.5 * alone.standard_error).all()


def test_the_evidence_under_a_mixture_prior_is_that_of_its_parts():
    """Draws of a wide guide at 20,000 particles: within 4.5 standard errors on all of ten rows, seed fixed."""
    prior = MixturePrior(3, LATENT)
    model, evidence = story(prior)
    rows = mm.Batch({"x": torch.randn(10, 3)})
    guide = mm.Guide(z=lambda b: dist.Normal(torch.zeros(b.size, LATENT), 2.0).to_event(1))
    with torch.no_grad():
        parts = [evidence(rows["x"], m, s.exp()) for m, s in zip(prior.loc, prior.log_scale, strict=True)]
        truth = (torch.stack(parts) + prior.logits.log_softmax(0)[:, None]).logsumexp(0)
    found = mm.log_marginal(model, guide, rows, num_particles=20_000, seed=0)
    assert ((found.log_prob - truth).abs() < 4.5 * found.standard_error).all() and found.standard_error.max() < 0.1


def test_a_prior_given_a_covariate_follows_the_rows():
    """Each row has the prior of its own label, in any order, on its own, and however many particles."""
    conditional = mm.conditionals.Normal(nn.Embedding(CLASSES, 2 * LATENT))
    model, evidence = story(GivenCovariate("u", conditional))
    u = torch.arange(9) % CLASSES
    rows = mm.Batch({"x": torch.randn(9, 3)}, covariates={"u": u})
    p = conditional(u).base_dist
    with torch.no_grad():
        truth = torch.stack([evidence(rows["x"][i], p.loc[i], p.scale[i]) for i in range(9)])
    guide = mm.Guide(z=lambda b: dist.Normal(torch.zeros(b.size, LATENT), 2.0).to_event(1))
    for some in (slice(None), slice(4, 5), torch.tensor([8, 1, 3])):
        found = mm.log_marginal(model, guide, rows[some], num_particles=20_000, seed=0)
        assert ((found.log_prob - truth[some]).abs() < 4.5 * found.standard_error).all()
    drawn = mm.generate(model, guide, rows.only(), num_samples=20_000)
    # of 20,000 draws: a mean within five of its standard errors, on 27 numbers; seed fixed
    spread = (model.decoders["x"].net.weight.square() @ p.scale.T.square() + 0.25).T.sqrt()
    off = (drawn["x"].mean(0) - model.decoders["x"].net(p.loc)).abs()
    assert (off < 5 * spread / 20_000**0.5).all()


@pytest.mark.parametrize("objective", [mm.objectives.elbo, mm.objectives.masked, mm.objectives.mopoe])
@pytest.mark.parametrize("kind", ["mixture", "mixing", "covariate"])
def test_every_number_of_a_prior_learns(kind, objective):
    conditional = mm.conditionals.Normal(nn.Embedding(CLASSES, 2 * LATENT))
    prior = GivenCovariate("u", conditional) if kind == "covariate" else MixturePrior(2, LATENT, kind == "mixing")
    model, _ = story(prior)
    rows = mm.Batch({"x": torch.randn(30, 3)}, covariates={"u": torch.arange(30) % CLASSES})
    guide = mm.Guide(z=mm.posteriors.SumPooling({"x": nn.Linear(3, 4)}, mm.conditionals.Normal(nn.Linear(4, 4)), 4))
    objective().differentiable_loss(model, guide, rows).backward()
    assert all((p.grad != 0).all() for p in prior.parameters())


def test_a_prior_names_the_covariate_that_is_missing():
    model, _ = story(GivenCovariate("u", mm.conditionals.Normal(nn.Embedding(CLASSES, 2 * LATENT))))
    with pytest.raises(ValueError, match=r"given the covariate 'u'; this batch has \['v'\]"):
        model(mm.Batch({"x": torch.randn(2, 3)}, covariates={"v": torch.zeros(2)}))
