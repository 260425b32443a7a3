"""The papers' estimators against closed forms: what they estimate, under which proposal, and with which draws."""

import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm.evidence import protocols

NAMES = {"target": ("x",), "given": ("w",)}


@pytest.fixture(scope="module")
def exact():
    """A linear-Gaussian story, its exact posterior, and rows of it."""
    torch.manual_seed(0)
    loadings = {"x": torch.randn(3, 2), "w": 0.5 * torch.randn(1, 2), "other": torch.randn(2, 2)}
    model = mm.models.LinearGaussian(loadings, noise=0.8).double()
    return model, mm.Guide(z=model.posterior), model.sample(40)


def within(evidence, truth, errors=4.5):
    """Every row within so many standard errors: by chance one run in 3,000 of 40 rows would fail; the seed is fixed."""
    assert ((evidence.log_prob - truth).abs() <= errors * evidence.standard_error + 1e-9).all()


def test_joint_and_single_are_exact_under_the_exact_posterior(exact):
    model, guide, rows = exact
    for estimate, names in ((protocols.joint, ("x", "w")), (protocols.single, ("x",))):
        evidence = estimate(model, guide, rows, **NAMES, num_particles=3, seed=0)
        torch.testing.assert_close(evidence.log_prob, model.log_prob(rows.only(*names)), rtol=0, atol=1e-10)
        assert set(evidence.quantity[len("log p(") : -1].split(", ")) == set(names)


def test_multiple_is_the_marginal_under_the_joint_posterior(exact):
    model, guide, rows = exact
    evidence = protocols.multiple(model, guide, rows, **NAMES, num_particles=2000, seed=0)
    within(evidence, model.log_prob(rows.only("x")))
    assert (evidence.standard_error > 1e-4).all() and evidence.quantity == "log p(x)"
    # the weights of draws from p(z | x, w): p(x) p(w | x) / p(w | z)
    torch.manual_seed(0)
    z = model.posterior(rows.only("x", "w")).sample((20_000,))
    ratio = (model.log_conditional(rows, ["w"], ["x"]) - model.likelihood("w", z).log_prob(rows["w"])).exp()
    # a mean of 2,000 weights, here measured ten times over: the errors agree within a fifth, the seed is fixed
    expected = ratio.std(0) / ratio.mean(0) / 2000**0.5
    torch.testing.assert_close(evidence.standard_error.median(), expected.median(), rtol=0.2, atol=0)


def test_conditional_takes_the_given_ones_from_the_prior(exact):
    model, guide, rows = exact
    truth = model.log_conditional(rows, ["x"], ["w"])
    evidence = protocols.conditional(model, guide, rows, **NAMES, num_particles=5, seed=0)
    within(evidence, truth)
    # the joint part is exact, so all the error is that of the draws of the prior
    prior = mm.log_marginal(model, guide, rows.only("w"), num_particles=protocols.PRIOR_DRAWS, prior_share=1.0, seed=7)
    ratio = evidence.standard_error / prior.standard_error
    assert 0.9 < ratio.median() < 1.1  # of 5,000 draws each; the seed is fixed
    few = protocols.conditional(model, guide, rows, **NAMES, num_particles=5, prior_draws=50, seed=0)
    assert (few.standard_error > 3 * evidence.standard_error).all()
    assert evidence.quantity == "log p(x | w)"


def test_the_bidirectional_score_is_minus_the_variation_of_information(exact):
    model, guide, rows = exact
    truth = model.log_conditional(rows, ["x"], ["w"]) + model.log_conditional(rows, ["w"], ["x"])
    evidence = protocols.both_ways(model, guide, rows, **NAMES, num_particles=3, seed=0)
    torch.testing.assert_close(evidence.log_prob, truth, rtol=0, atol=1e-9)
    assert evidence.quantity == "log p(x | w) + log p(w | x)"


def test_the_two_parts_of_a_bidirectional_score_are_independent_under_one_seed(exact):
    """Of two estimates of the joint evidence from equal draws the errors would add up; the reported ones are in
    quadrature."""
    model, _, rows = exact
    vague = mm.Guide(z=lambda b: dist.Normal(torch.zeros(b.size, 2, dtype=torch.float64), 1.2).to_event(1))
    truth = model.log_conditional(rows, ["x"], ["w"]) + model.log_conditional(rows, ["w"], ["x"])
    found = [protocols.both_ways(model, vague, rows, **NAMES, num_particles=2000, seed=s) for s in range(10)]
    pulls = torch.cat([(e.log_prob - truth) / e.standard_error for e in found])
    # 400 standard normal numbers: their root mean square is 1 within 0.035, so 0.8 to 1.2 holds for all seeds
    assert 0.8 < pulls.square().mean().sqrt() < 1.2


def test_a_row_without_its_target_has_a_conditional_of_zero(exact):
    model, guide, rows = exact
    some = mm.Batch({n: rows[n] for n in rows}, {"x": torch.arange(40) % 4 != 0})
    evidence = protocols.conditional(model, guide, some, **NAMES, num_particles=5, seed=0)
    assert not evidence.log_prob[::4].any() and not evidence.standard_error[::4].any()
    assert evidence.log_prob[1::4].all()


@pytest.mark.parametrize("names", [{"target": "x", "given": ("w",)}, {"target": ("x",), "given": ("x",)}])
def test_the_conditional_protocol_refuses_names_that_are_no_disjoint_sequences(exact, names):
    with pytest.raises(ValueError, match="sequences of names without one in common"):
        protocols.conditional(*exact, **names)
