"""Implicit modalities: their draws, and everything that asks for a density refuses them by name."""

import pytest
import torch
from torch import nn

import pyro_mm as mm
from tests.support.implicit_pair import OFFSET, SCALE, WEIGHT, pair, rows


def test_draws_are_the_generators():
    """x = W z + b + s u: moments of 20,000 draws, each within five standard errors."""
    model, _ = pair()
    z = torch.tensor([0.7, -1.2]).expand(20_000, 2)
    torch.manual_seed(0)
    draws = model.decoders["x"](z).sample()
    mean = WEIGHT @ z[0] + OFFSET
    assert ((draws.mean(0) - mean).abs() < 5 * SCALE / 20_000**0.5).all()
    assert (draws.var(0) - SCALE**2).abs().max() < 5 * SCALE**2 * (2 / 20_000) ** 0.5


def test_shapes():
    images = mm.conditionals.Implicit(mm.nn.MLP(3 + 4, 6, (5,)), noise=4, event_shape=(2, 3))
    d = images(torch.zeros(7, 2), torch.ones(1, 1))
    assert (d.batch_shape, d.event_shape, d.rsample().shape) == ((7,), (2, 3), (7, 2, 3))
    assert d.expand([4, 7]).sample((2,)).shape == (2, 4, 7, 2, 3)
    vector = mm.conditionals.Implicit(nn.Linear(2 + 4, 6), noise=4)(torch.zeros(7, 2))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert (vector.event_dim, vector.event_shape) == (1, (6,))
    assert torch.equal(before, torch.get_rng_state())
    assert vector.rsample().requires_grad
    assert not vector.sample().requires_grad


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        (mm.conditionals.Implicit(nn.Linear(6, 5), 4, (2, 3)), r"expected draws of shape \(.., 2, 3\)"),
        (mm.conditionals.Implicit(nn.Flatten(0), 4), r"expected draws of shape \(.., D\)"),
    ],
)
def test_a_generator_of_another_shape_is_refused(decoder, message):
    with pytest.raises(ValueError, match=message):
        decoder(torch.zeros(7, 2)).sample()


def test_an_implicit_modality_needs_a_parent():
    with pytest.raises(ValueError, match="expected a parent"):
        mm.conditionals.Implicit(nn.Linear(4, 2), 4)()


def test_particles_stand_to_the_left_and_generate_draws():
    model, guide = pair()
    drawn = mm.generate(model, guide, rows(5).without("x"), num_samples=3, seed=0)
    assert drawn["x"].shape == (3, 5, 2)
    simulated, _ = mm.simulate(model, rows(5))
    assert simulated["x"].shape == (5, 2)
    with pytest.raises(ValueError, match="take draws, mean=False"):
        mm.generate(model, guide, rows(5).without("x"), mean=True)


CALLS = {
    "log_marginal": lambda m, g, b: mm.log_marginal(m, g, b, num_particles=10),
    "log_weights": lambda m, g, b: mm.log_weights(m, g, b, 3),
    "log_conditional": lambda m, g, b: mm.log_conditional(m, g, b, target=["y"], given=["x"], num_particles=10),
    "annealed_importance": lambda m, g, b: mm.annealed_importance(m, g, b, num_chains=2, temperatures=2),
    "bidirectional": lambda m, g, b: mm.bidirectional(m, g, b, num_chains=2, temperatures=2),
    "fitted": lambda m, g, b: mm.log_marginal(m, g, b, num_particles=10, proposal="fitted"),
    "encode, fitted": lambda m, g, b: mm.encode(g, b, model=m, fitted=True),
    "resample": lambda m, g, b: mm.generate(m, g, b, resample=True, num_particles=5),
    "compare": lambda m, g, b: mm.compare({"a": (m, g), "b": (m, g)}, b, num_particles=10),
    "calibration": lambda m, g, b: mm.calibration(m, g, b),
    "amortization_gap": lambda m, g, b: mm.metrics.amortization_gap(m, g, b),
    "an objective": lambda m, g, b: mm.objectives.elbo().evaluate(m, g, b, step=0),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_asks_for_its_density_refuses_it_by_name(call):
    model, guide = pair()
    with pytest.raises(ValueError, match=r"modality 'x' is implicit .*batch\.without\('x'\)"):
        CALLS[call](model, guide, rows(6))


def test_a_modality_that_some_rows_have_is_refused_too():
    model, guide = pair()
    some = mm.Batch({"x": rows(6)["x"], "y": rows(6)["y"]}, {"x": torch.arange(6) < 2})
    with pytest.raises(ValueError, match="modality 'x' is implicit"):
        mm.log_marginal(model, guide, some, num_particles=10)


def test_without_it_the_others_have_a_marginal():
    """log p(y) of a linear Normal, in closed form."""
    model, guide = pair()
    found = mm.log_marginal(model, guide, rows(6).without("x"), num_particles=4000, seed=0)
    decoder = model.decoders["y"].net
    variance = decoder.weight.square().sum() + 0.25
    exact = torch.distributions.Normal(decoder.bias, variance.sqrt()).log_prob(rows(6)["y"])[:, 0]
    assert ((found.log_prob - exact.detach()).abs() < 5 * found.standard_error + 1e-3).all()
