"""A flow as the prior of a latent: density, draws, objectives, and evidence against quadrature."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.utils.global_state import import_zuko

zuko = import_zuko()  # a plain import would switch off the checks of all distributions, in all tests
LATENT = 2
FLOWS = {
    "autoregressive": lambda: zuko.flows.MAF(LATENT, transforms=2, hidden_features=(8,), activation=nn.Tanh),
    "spline": lambda: zuko.flows.NSF(LATENT, transforms=2, hidden_features=(8,), bins=4),
    "coupling": lambda: zuko.flows.NICE(LATENT, transforms=2, hidden_features=(8,), activation=nn.Tanh),
}


def prior(name):
    made = mm.priors.Flow(FLOWS[name]())
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))  # away from the flow's own start, which may be almost Gaussian
    return made


def pair(name):
    decoders = {
        "x": mm.conditionals.Normal(mm.nn.MLP(LATENT, 4, (8,))),
        "y": mm.conditionals.Categorical(mm.nn.MLP(LATENT, 3, (8,))),
    }
    experts = {
        "x": mm.conditionals.Normal(mm.nn.MLP(2, 2 * LATENT, (8,))),
        "y": mm.conditionals.Normal(nn.Embedding(3, 2 * LATENT)),
    }
    return mm.models.SharedLatent(prior(name), decoders), mm.Guide(z=mm.posteriors.ProductOfExperts(experts))


def data(rows=6):
    present = {"x": torch.tensor([1, 1, 0, 1, 0, 1]).bool(), "y": torch.tensor([1, 0, 1, 1, 0, 1]).bool()}
    return mm.Batch({"x": torch.randn(rows, 2), "y": torch.arange(rows) % 3}, present)


def grid(width, points):
    axis = torch.linspace(-width, width, points)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1), float((axis[1] - axis[0]) ** 2)


@pytest.mark.parametrize("name", FLOWS)
def test_the_prior_integrates_to_one_and_draws_from_its_density(name, double):
    p = prior(name)(None)
    z, area = grid(14.0, 281)
    weights = p.log_prob(z).exp() * area
    assert weights.sum().item() == pytest.approx(1, abs=2e-3)
    draws = p.sample((20_000,))
    # the mean of 20,000 draws within five standard errors of the mean by quadrature, seed fixed
    assert ((draws.mean(0) - (weights[..., None] * z).sum((0, 1))).abs() < 5 * draws.std(0) / 20_000**0.5 + 0.01).all()


@pytest.mark.parametrize("name", FLOWS)
def test_evidence_under_a_flow_prior_is_that_by_quadrature(name, double):
    model, guide = pair(name)
    batch = data()
    z, area = grid(9.0, 121)
    z = z.reshape(-1, 1, LATENT)
    p_x, p_y = (model.decoders[n](z) for n in ("x", "y"))
    joint = model.prior(batch).log_prob(z)
    joint = joint + torch.where(batch.present["x"], p_x.log_prob(batch["x"]), 0.0)
    joint = joint + torch.where(batch.present["y"], p_y.log_prob(batch["y"]), 0.0)
    exact = torch.where(batch.rows, joint.logsumexp(0) + torch.tensor(area).log(), 0.0)
    scheme = mm.Proposal(prior_share=0.3)
    evidence = mm.log_marginal(model, guide, batch, num_particles=5000, proposal=scheme, seed=0)
    # six rows; five stated errors, and 2e-3 for the grid
    assert ((evidence.log_prob - exact).abs() < 5 * evidence.standard_error + 2e-3).all()
    annealed = mm.annealed_importance(
        model, guide, batch[:2], num_chains=32, temperatures=8, start="prior", seed=0, pilot_chains=8
    )
    assert ((annealed.log_prob - exact[:2]).abs() < 5 * annealed.standard_error + 0.05).all()


def test_every_table_trains_under_a_flow_prior():
    """Its KL has no closed form: AnalyticKL estimates it by its draws, and so do the tables that encode the prior."""
    model, guide = pair("autoregressive")
    batch = data()
    parameters = [*model.parameters(), *guide.parameters()]
    tables, estimators = mm.objectives, mm.estimators
    for objective in (
        tables.elbo(),
        tables.jmvae_kl(0.5, estimators.IWAE(3)),
        tables.mmjsd(None),
        tables.mvtcae(0.8, 1.0),
        tables.vaevae(estimators.DReG(3)),
        tables.masked(estimators.StickTheLanding()),
    ):
        gradients = torch.autograd.grad(objective.differentiable_loss(model, guide, batch), parameters)
        assert all(g.isfinite().all() for g in gradients)
    for name in model.prior.state_dict():
        assert f"prior.{name}" in model.state_dict()


def test_the_kl_by_draws_is_the_closed_one_in_the_mean(double):
    """An affine flow of one dimension is a Normal, whose KL is known; 4,000 draws, five standard errors, seed fixed."""
    flow = zuko.flows.MAF(1, transforms=1)
    p = mm.priors.Flow(flow)
    loc = p(None).transforms[0](torch.zeros(1)).detach()
    scale = (p(None).transforms[0](torch.ones(1)).detach() - loc).abs()
    q = dist.Normal(torch.tensor([0.3]), torch.tensor([0.7])).to_event(1)
    exact = torch.distributions.kl_divergence(q, dist.Normal(loc, scale).to_event(1)).item()
    decoder = mm.conditionals.Normal(nn.Linear(1, 1), scale=1.0)
    model, guide = mm.models.SharedLatent(p, {"x": decoder}), mm.Guide(z=lambda batch: q.expand((batch.size,)))
    batch = mm.Batch({"x": torch.zeros(4000, 1)})
    term = mm.objectives.Objective([mm.objectives.Term(mm.objectives.ALL, ())])
    draws = q.sample((4000,))
    error = (q.log_prob(draws) - p(None).log_prob(draws)).std().item() / 4000**0.5
    with torch.no_grad():
        assert term.loss(model, guide, batch) / 4000 == pytest.approx(exact, abs=5 * error)


def test_rows_are_drawn_and_simulated_from_a_flow_prior():
    model, guide = pair("spline")
    batch = data()
    assert mm.generate(model, guide, mm.Batch.empty(4, batch), num_samples=3)["x"].shape == (3, 4, 2)
    assert mm.simulate(model, batch)[1]["z"].shape == (6, LATENT)
    assert mm.generate(model, guide, batch.only("y"), num_samples=3, resample=True)["x"].shape == (3, 6, 2)


def test_what_is_no_flow_without_a_context_is_refused():
    for flow in (zuko.flows.MAF(2, 3), nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=r"a flow of zuko without a context, got (MAF|Linear)\. One that depends"):
            mm.priors.Flow(flow)
    with pytest.raises(TypeError, match=r"expected flow to be a flow of zuko, .* got None"):
        mm.priors.Flow(None)
