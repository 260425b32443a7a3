"""Flows as decoders of vectors: densities by quadrature, particles, stacked terms, compiled steps, and two moons."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.distributions.scatter import Scatter
from pyro_mm.utils.global_state import import_zuko, override_validation
from tests.support.compiled import agree

zuko = import_zuko()  # a plain import would switch off the checks of all distributions, in all tests
LATENT = 2
FLOWS = {
    "autoregressive": lambda: zuko.flows.MAF(2, 6, transforms=2, hidden_features=(8,), activation=nn.Tanh),
    "spline": lambda: zuko.flows.NSF(2, 6, transforms=2, hidden_features=(8,), bins=4),
    "coupling": lambda: zuko.flows.NICE(2, 6, transforms=2, hidden_features=(8,), activation=nn.Tanh),
    "coupling spline": lambda: zuko.flows.NSF(2, 6, transforms=2, hidden_features=(8,), bins=4, passes=2),
}


def decoder(name):
    return mm.conditionals.Flow(mm.nn.MLP(LATENT, 6, (8,)), FLOWS[name]())


def pair(name):
    decoders = {"x": decoder(name), "y": mm.conditionals.Categorical(mm.nn.MLP(LATENT, 2, (8,)))}
    experts = {
        "x": mm.conditionals.Normal(mm.nn.MLP(2, 2 * LATENT, (16,))),
        "y": mm.conditionals.Normal(nn.Embedding(2, 2 * LATENT)),
    }
    prior = dist.Normal(torch.zeros(LATENT), 1.0).to_event(1)
    return mm.models.SharedLatent(prior, decoders), mm.Guide(z=mm.posteriors.ProductOfExperts(experts))


def two_moons(rows, noise=0.1):
    """Return standardised points ``(rows, 2)`` of two interlaced half circles, and the half that each is of."""
    label = torch.arange(rows) % 2
    angle = torch.rand(rows) * torch.pi
    upper = torch.stack([angle.cos(), angle.sin()], -1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
    points = torch.where(label[:, None] == 0, upper, lower) + noise * torch.randn(rows, 2)
    return mm.Batch({"x": (points - points.mean(0)) / points.std(0), "y": label})


def grid(low, high, points):
    axis = torch.linspace(low, high, points)
    return torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2), float((axis[1] - axis[0]) ** 2)


def log_evidence(model, batch):
    """Return log p(x_S) per row by quadrature over z."""
    z, area = grid(-5.0, 5.0, 161)
    log_joint = model.prior(batch).log_prob(z)[:, None]
    for name, decode in model.decoders.items():
        log_p = torch.cat([decode(part[:, None]).log_prob(batch[name]) for part in z.split(2000)])
        log_joint = log_joint + torch.where(batch.present[name], log_p, 0.0)
    return log_joint.logsumexp(0) + torch.tensor(area).log()


def test_two_moons_and_a_label_have_their_evidence_by_quadrature(double):
    """Trained: p(x | z) integrates to one, and log p agrees with quadrature: to 1e-2 in the mean of the rows.

    Each row agrees to five stated errors and 2e-3 for the grid; the seed is fixed.
    """
    torch.manual_seed(0)
    model, guide = pair("coupling spline")
    train, test = two_moons(600), two_moons(6)
    mm.fit(
        model, guide, mm.objectives.elbo(), train, epochs=20, batch_size=100, progress=False,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 5e-3),
    )  # fmt: skip
    with torch.no_grad():
        x, area = grid(-8.0, 8.0, 481)
        for z in torch.randn(2, LATENT):
            assert model.decoders["x"](z).log_prob(x).exp().sum().item() * area == pytest.approx(1, abs=5e-3)
        both, image, label = (log_evidence(model, rows) for rows in (test, test.only("x"), test.only("y")))
    for rows, exact in ((test, both), (test.only("x"), image), (test.only("y"), label)):
        scheme = mm.Proposal("quasi", prior_share=0.3)
        evidence = mm.log_marginal(model, guide, rows, num_particles=5000, proposal=scheme, seed=0)
        assert (evidence.log_prob - exact).mean().abs() < 1e-2
        assert ((evidence.log_prob - exact).abs() < 5 * evidence.standard_error + 2e-3).all()
    given = mm.log_conditional(
        model, guide, test, target="y", given="x", num_particles=5000, prior_share=0.3, draws="quasi", seed=0
    )
    assert ((given.log_prob - (both - image)).abs() < 5 * given.standard_error + 4e-3).all()


@pytest.mark.parametrize("name", FLOWS)
def test_draws_agree_with_the_density(name, double):
    torch.manual_seed(1)
    d = decoder(name)(torch.randn(LATENT))
    x, area = grid(-10.0, 10.0, 251)
    weights = d.log_prob(x).exp() * area
    assert weights.sum().item() == pytest.approx(1, abs=5e-3)
    draws = d.sample((20_000,))
    for statistic in (lambda v: v, torch.sin):
        found, exact = statistic(draws), (weights[:, None] * statistic(x)).sum(0)
        # 20,000 draws, five standard errors, seed fixed
        assert ((found.mean(0) - exact).abs() < 5 * found.std(0) / 20_000**0.5 + 0.01).all()


@pytest.mark.parametrize("name", FLOWS)
def test_particles_and_terms_stand_to_the_left_of_the_rows(name, double):
    decode, z, x = decoder(name), torch.randn(3, 4, 5, LATENT), torch.randn(5, 2)
    whole = decode(z).log_prob(x)
    assert whole.shape == (3, 4, 5)
    torch.testing.assert_close(whole[2, 1], decode(z[2, 1]).log_prob(x), rtol=1e-9, atol=1e-9)
    assert decode(z).rsample().shape == (3, 4, 5, 2)
    some = Scatter(decode(z[:, [0, 2]]), (0, 2), 4, -2).log_prob(x)
    torch.testing.assert_close(some[:, [0, 2]], whole[:, [0, 2]], rtol=1e-9, atol=1e-9)
    assert not some[:, [1, 3]].any()


def test_tables_of_terms_are_alike_stacked_and_one_by_one(double):
    model, guide = pair("autoregressive")
    batch = two_moons(12)
    batch = mm.Batch({n: batch[n] for n in batch}, {"x": torch.arange(12) % 3 > 0, "y": torch.arange(12) % 4 > 0})
    for table in (mm.objectives.vaevae, mm.objectives.mmjsd, mm.objectives.mvtcae):
        torch.manual_seed(0)
        guide.posteriors.z.prior = None if table is mm.objectives.mvtcae else guide.posteriors.z.prior
        losses = []
        for vectorize in (True, False):
            with torch.no_grad():
                each = [table(vectorize=vectorize).loss(model, guide, batch) for _ in range(25)]
            losses.append(torch.tensor(each))
        # means of 25 losses with draws of their own, five standard errors, seed fixed
        error = (losses[0].var() / 25 + losses[1].var() / 25).sqrt()
        assert (losses[0].mean() - losses[1].mean()).abs() < 5 * error


@pytest.mark.parametrize("name", ["autoregressive", "spline"])
def test_a_traced_step_of_a_flow_decoder_is_the_plain_one(name):
    torch.manual_seed(0)
    model, guide = pair(name)
    batch = two_moons(12)
    some = mm.Batch({n: batch[n] for n in batch}, {"x": torch.arange(12) % 3 > 0, "y": torch.arange(12) % 4 > 0})
    with override_validation(True):
        agree(mm.objectives.elbo(mm.estimators.IWAE(2)), model, guide, [some, some[torch.arange(12).flip(0)]])


def test_a_masked_coupling_says_that_its_step_is_not_compiled():
    model, guide = pair("coupling")
    with override_validation(True), pytest.warns(UserWarning, match="the step is not compiled"):
        mm.stage(mm.objectives.elbo(), model, guide, two_moons(6), backend=None)(two_moons(6))
