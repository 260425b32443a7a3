"""Bijections from standard Normal numbers: the distribution functions and densities of torch, and both tails."""

import math

import pytest
import torch
from torch.distributions import Exponential, HalfNormal, Independent, Laplace, LogNormal, Normal, Uniform

from pyro_mm.distributions.normal_scores import normal_scores

DISTRIBUTIONS = {
    "Laplace": Laplace(torch.tensor(2.0), torch.tensor(3.0)),
    "Exponential": Exponential(torch.tensor(2.0)),
    "HalfNormal": HalfNormal(torch.tensor(3.0)),
    "Uniform": Uniform(torch.tensor(-1.0), torch.tensor(4.0)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_draw_and_its_number_have_one_probability(name, double):
    d = DISTRIBUTIONS[name]
    transform = normal_scores(d.expand([13]))
    u = torch.linspace(-4, 4, 14)[1:].requires_grad_()
    z = transform(u)
    torch.testing.assert_close(d.cdf(z), Normal(0.0, 1.0).cdf(u))
    torch.testing.assert_close(transform.inv(z), u, rtol=0, atol=1e-7)
    (slope,) = torch.autograd.grad(z.sum(), u)
    torch.testing.assert_close(transform.log_abs_det_jacobian(u, z), slope.log())
    torch.testing.assert_close(d.log_prob(z) + slope.log(), Normal(0.0, 1.0).log_prob(u))


@pytest.mark.parametrize("name", ["Laplace", "Exponential", "HalfNormal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tails_are_exact(name, dtype):
    """At 12 standard deviations a distribution function of 32 bits is 1, and its inverse infinite."""
    family = type(DISTRIBUTIONS[name])
    transform = normal_scores(family(*[torch.ones((), dtype=dtype)] * (2 if name == "Laplace" else 1)))
    u = torch.tensor([-12.0, -7.0, 7.0, 12.0], dtype=dtype)
    torch.testing.assert_close(transform.inv(transform(u)), u)


def test_other_families_have_none():
    assert normal_scores(Normal(0.0, 1.0)) is None and normal_scores(LogNormal(0.0, 1.0)) is None
    inside = Independent(Laplace(torch.zeros(3), torch.ones(3)), 1)
    assert normal_scores(inside) is not None and math.isclose(float(normal_scores(inside)(torch.zeros(3)).sum()), 0.0)
