"""Objectives of a user's own in ``check`` and ``gradient_noise``: all that needs no table of terms is reported."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence

import pyro_mm as mm
from pyro_mm.diagnostics.gradient_noise import gradient_noise
from tests.support.linear_gaussian import oracle
from tests.support.own_objectives import MMD, Contrastive, likelihood_alone
from tests.support.training_pair import data, pair

FEW = {"num_particles": 30, "repeats": 3}


def exact_pair():
    """A linear-Gaussian story, with its posterior as the guide, and rows of it."""
    model = oracle(2).requires_grad_(False)
    return model, mm.Guide(z=model.posterior), model.sample(50)


def words(found):
    """The report in one line, however it is wrapped."""
    return " ".join(repr(found).split())


@pytest.mark.parametrize(
    "objective", [MMD(), Contrastive("a", "b", 2), likelihood_alone], ids=["mmd", "nce", "function"]
)
def test_a_check_of_a_users_objective_reports_all_but_bound_and_gap(objective):
    model, guide = pair()
    batch = data(40)
    found = mm.check(model, guide, objective, batch, **FEW)
    assert not found.errors
    assert found.sites.model == ("z",) and found.sites.observed == ("a", "b")
    assert set(found.evidence) == {"log p(a, b)", "log p(a)", "log p(b)"} and found.elbo is not None
    assert found.gap is None and "without a table of terms, so that no bound and no gap are known" in words(found)
    assert found.value is not None and {g.name for g in found.gradients.groups} >= {"guide.posteriors.z.experts.a"}
    name = objective.__name__ if objective is likelihood_alone else type(objective).__name__
    assert f"training objective: {name}," in words(found)
    assert not any("Pyro's estimators" in text for text in found.findings)


def test_a_check_estimates_each_term_of_a_users_objective(double):
    """E_q log p(x | z) is log p(x) + KL(q(z | x) || p(z)) at the exact posterior."""
    model, guide, batch = exact_pair()
    found = mm.check(model, guide, MMD(), batch, **FEW)
    prior = dist.MultivariateNormal(torch.zeros(3), torch.eye(3))
    exact = (model.log_prob(batch) + kl_divergence(model.posterior(batch), prior)).mean().item()
    mean, error = found.value.by_term["reconstruction"]
    assert 0 < error < 0.2 and abs(mean - exact) < 4 * error
    total, discrepancy = found.value.total[0], found.value.by_term["-MMD"][0]
    assert total == pytest.approx(mean + discrepancy)
    assert f"reconstruction {mean:.3f} ± {error:.3f}" in words(found)


def test_a_check_estimates_the_value_of_a_users_objective_exactly_where_it_is_known(double):
    """Log-weights of the exact posterior are log p(x) in every draw."""
    model, guide, batch = exact_pair()

    def bound(model, guide, batch, *, step):
        return -mm.log_weights(model, guide, batch).sum()

    found = mm.check(model, guide, bound, batch, **FEW)
    exact = model.log_prob(batch).mean().item()
    assert found.value.total == pytest.approx((exact, 0.0), abs=1e-9)
    assert f"training objective {exact:.3f} ± 0.000" in words(found)


def test_a_check_evaluates_a_users_objective_at_the_step_given():
    model, guide = pair()
    batch, steps = data(20), []

    def weight(step):
        steps.append(step)
        return float(step)

    found = [mm.check(model, guide, MMD(weight), batch, step=step, **FEW) for step in (1, 3)]
    assert set(steps) == {1, 3}
    one, three = (f.value.by_term["-MMD"][0] for f in found)
    assert three == pytest.approx(3 * one, rel=1e-5)
    assert "Gradient at step 3, 3 draws" in repr(found[1])
    steps.clear()
    mm.check(model, guide, MMD(weight), batch, **FEW)
    assert set(steps) == {0}


def test_a_check_evaluates_a_warm_up_at_the_step_given():
    model, guide = pair()
    objective, batch = mm.objectives.elbo(kl=mm.objectives.warm_up(100)), data(20)
    settled = gradient_noise(model, guide, mm.objectives.elbo(), batch, repeats=3)
    assert gradient_noise(model, guide, objective, batch, repeats=3, step=100).groups == settled.groups
    assert gradient_noise(model, guide, objective, batch, repeats=3).groups != settled.groups
    objective.steps = 100  # its own count, of a loop by hand
    assert gradient_noise(model, guide, objective, batch, repeats=3).groups == settled.groups
    assert settled.step is None and objective.steps == 100


def test_a_check_measures_gradient_noise_of_a_function_as_objective():
    """The gradient per row is 1 + e in each of four entries, e normal with deviation 1/2."""
    location = nn.Parameter(torch.zeros(4))

    def model(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(location, 1.0).to_event(1))

    def loss(model, guide, batch, *, step):
        return len(batch) * (location * (1 + 0.5 * torch.randn(4))).sum()

    found = gradient_noise(model, model, loss, mm.Batch({"x": torch.zeros(5)}), repeats=400)
    (group,) = found.groups
    # of 400 draws the noise has a standard error of 1 / sqrt(2 * 1600), the signal one of 1/2 / sqrt(400): 5 of them
    assert group.noise == pytest.approx(1.0, abs=5 / 3200**0.5)
    assert group.signal == pytest.approx(2.0, abs=5 * 0.5 / 20)


def test_parameters_of_the_objective_are_a_part_of_the_gradient():
    model, guide = pair()
    objective = Contrastive("a", "b", 2)
    before = {name: p.clone() for name, p in objective.named_parameters()}
    found = mm.check(model, guide, objective, data(40), **FEW)
    assert found.gradients["objective"].size == 12 and found.gradients["objective"].signal > 0
    assert all(name.startswith("model.") for name in found.gradients.unused) and found.gradients.unused
    assert any(text.startswith("No gradient reaches model.") for text in found.findings)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in objective.named_parameters())


def test_an_objective_that_fails_is_reported():
    model, guide = pair()

    def broken(model, guide, batch, *, step):
        raise ArithmeticError("mine")

    found = mm.check(model, guide, broken, data(20), **FEW)
    assert isinstance(found.errors["the objective"], ArithmeticError) and found.value is None
    assert found.findings[0] == "Not evaluated: the objective, the gradient. ArithmeticError: mine"
    assert found.elbo is not None and len(found.evidence) == 3


def test_a_check_refuses_what_is_no_objective():
    model, guide = pair()
    for wrong in (3, "elbo", mm.objectives.elbo, MMD):
        with pytest.raises(TypeError, match="expected objective to be an objective"):
            mm.check(model, guide, wrong, data(20))


def test_stories_that_do_not_broadcast_are_checked_draw_by_draw():
    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z.reshape(len(batch), 2)
            batch.observe(
                "a", lambda z: dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], 3), 1.0).to_event(1), z
            )

    _, guide = pair()
    batch = data(20).without("b")
    assert "vectorize=False" in mm.check(story, guide, MMD(), batch, **FEW).findings[0]
    found = mm.check(story, guide, MMD(), batch, vectorize=False, **FEW)
    assert not found.errors and found.elbo is not None
