"""Experts of unlike sizes, which torch would broadcast against each other, are refused by name and shape."""

import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm import posteriors

POOLS = {
    "ProductOfExperts": posteriors.ProductOfExperts,
    "MixtureOfExperts": posteriors.MixtureOfExperts,
    "MixtureOfProducts": posteriors.MixtureOfProducts,
    "HoelderPooling": posteriors.HoelderPooling,
    "DependentExperts": lambda experts: posteriors.DependentExperts(experts, 0.3),
}
WITH_PRIOR = [posteriors.ProductOfExperts, posteriors.MixtureOfProducts]


def normals(**sizes):
    return {name: mm.conditionals.Normal(torch.nn.Linear(2, 2 * size)) for name, size in sizes.items()}


def data(present=None):
    return mm.Batch({name: torch.randn(4, 2) for name in ("a", "b", "c")}, present)


@pytest.mark.parametrize("present", [None, {"b": torch.tensor([True, False, True, False])}, {"b": torch.zeros(4) > 0}])
@pytest.mark.parametrize("name", POOLS)
def test_experts_of_one_and_of_three_dimensions_are_refused(name, present):
    posterior = POOLS[name](normals(a=3, b=1, c=3))
    with pytest.raises(ValueError, match=rf"{name}: .*one event shape, got 'a' \(3,\), 'b' \(1,\), 'c' \(3,\)"):
        posterior(data(present))


@pytest.mark.parametrize("name", POOLS)
def test_experts_without_event_dimensions_and_of_unlike_sizes_are_refused(name):
    class Bare(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.size = size

        def forward(self, x):
            return dist.Normal(torch.zeros(len(x), self.size), 1.0)

    with pytest.raises(ValueError, match=rf"{name}: .*'a' \(4, 3\) of the batch, 'b' \(4, 1\) of the batch"):
        POOLS[name]({"a": Bare(3), "b": Bare(1)})(data())
    with pytest.raises(ValueError, match=r"'a' \(\), 'b' \(3,\)"):
        POOLS[name]({"a": Bare(3), "b": normals(b=3)["b"]})(data())
    assert POOLS[name]({"a": Bare(3), "b": Bare(3)})(data()).event_shape == (3,)


def test_fit_refuses_experts_of_unlike_event_shapes():
    decoders = {"a": mm.conditionals.Normal(torch.nn.Linear(3, 4)), "b": mm.conditionals.Normal(torch.nn.Linear(3, 4))}
    model = mm.models.SharedLatent(dist.Normal(torch.zeros(3), 1.0).to_event(1), decoders)
    guide = mm.Guide(z=posteriors.ProductOfExperts(normals(a=3, b=1)))
    with pytest.raises(ValueError, match=r"one event shape, got 'a' \(3,\), 'b' \(1,\)"):
        mm.fit(model, guide, mm.objectives.elbo(), data().only("a", "b"), epochs=1, progress=False)


def test_experts_on_unlike_numbers_of_classes_are_refused():
    categorical = {name: mm.conditionals.Categorical(torch.nn.Linear(2, size)) for name, size in (("a", 3), ("b", 1))}
    with pytest.raises(ValueError, match=r"ProductOfCategoricals: expected .*one number of classes, got 'a' 3, 'b' 1"):
        posteriors.ProductOfCategoricals(categorical)(data())
    del categorical["a"]
    prior = dist.Categorical(torch.ones(3) / 3)
    with pytest.raises(ValueError, match="a prior expert on the experts' 1 classes, got 3"):
        posteriors.ProductOfCategoricals(categorical, prior)(data())


@pytest.mark.parametrize("kind", WITH_PRIOR)
def test_a_prior_expert_of_another_size_is_refused(kind):
    prior = dist.Normal(torch.zeros(3), 1.0).to_event(1)
    with pytest.raises(ValueError, match=r"prior expert of the experts' event shape \(1,\), got \(3,\)"):
        kind(normals(a=1, b=1), prior)(data())
    scalar, vector = kind(normals(a=3), dist.Normal(0.0, 2.0)), kind(normals(a=3), dist.Normal(torch.zeros(3), 2.0))
    scalar.load_state_dict(vector.state_dict())
    rows, z = data(), torch.randn(3)
    assert torch.equal(scalar(rows).log_prob(z), vector(rows).log_prob(z))
