"""The structure of a pair is cached, and found again once what it was read from has changed."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.scoring.structure import pair_structure

E = mm.estimators
NAMES = ("a", "b", "c")


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.runs = nn.Linear(1, 2), 0

    def forward(self, x):
        self.runs += 1
        loc, scale = self.net(x).chunk(2, -1)
        return dist.Normal(loc, scale.exp()).to_event(1)


def pair(posterior=mm.posteriors.MixtureOfExperts):
    torch.manual_seed(1)
    model = mm.models.LinearGaussian({n: torch.randn(1, 1) for n in NAMES}, 1.0)
    return model, mm.Guide(z=posterior({n: Expert() for n in NAMES}))


def value(stratified, model, guide, batch):
    torch.manual_seed(2)
    return mm.objectives.elbo(E.IWAE(3, stratified=stratified)).loss(model, guide, batch)


@pytest.mark.parametrize("stratified", ["inside", "outside"])
def test_batches_that_hold_other_modalities(stratified, double):
    """After one batch, another's value is what it is without the first."""
    values = {n: torch.randn(5, 1) for n in NAMES}
    full = mm.Batch(values)
    batches = [mm.Batch({n: values[n] for n in "ab"}), full, full.only("a", "b"), mm.Batch({"c": values["c"]})]
    batches.append(mm.Batch(values, {"b": torch.arange(5) > 2}))
    fresh = [value(stratified, *pair(), batch) for batch in batches]
    one = pair()
    assert [value(stratified, *one, batch) for batch in [*batches, *batches]] == [*fresh, *fresh]


def test_a_posterior_that_is_replaced(double):
    batch = mm.Batch({n: torch.randn(5, 1) for n in NAMES})
    model, guide = pair()
    value("inside", model, guide, batch)
    guide.posteriors["z"] = mm.posteriors.MixtureOfProducts({n: Expert() for n in NAMES})
    assert pair_structure(model, guide, batch).strata.components == 7
    assert value("inside", model, guide, batch) == value("inside", model, mm.Guide(z=guide.posteriors["z"]), batch)


def laplace_mixture(logits):
    components = dist.Laplace(torch.tensor([[-1.0], [1.0]]), 1.0).to_event(1)
    return mm.distributions.Mixture(components, logits)


def story(batch):
    with batch.plate():
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        batch.observe("x", lambda z: dist.Normal(z, 1.0).to_event(1), z)


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(2))

    def forward(self, batch):
        return laplace_mixture(self.logits).expand([len(batch)])


@pytest.mark.parametrize("kind", ["a module", "a function"])
def test_a_parameter_that_is_frozen_and_freed(kind, double):
    """Without weights to learn a draw of it is pathwise, and with them it is not."""
    module, logits = Learned(), torch.zeros(2, requires_grad=True)

    def function(batch):
        with batch.plate():
            pyro.sample("z", laplace_mixture(logits).expand([len(batch)]))

    guide = mm.Guide(z=module) if kind == "a module" else function
    leaf = module.logits if kind == "a module" else logits
    batch = mm.Batch({"x": torch.randn(4, 1)})
    estimator = E.IWAE(2)
    for _ in range(2):
        with pytest.raises(ValueError, match="'z' has neither rsample nor enumeration"):
            estimator.differentiable_loss(story, guide, batch)
        leaf.requires_grad_(False)
        assert pair_structure(story, guide, batch).latents == {"z": "pathwise"}
        estimator.differentiable_loss(story, guide, batch)
        leaf.requires_grad_(True)


def test_a_mode_that_decides_what_is_sampled(double):
    class Guide(nn.Module):
        def forward(self, batch):
            with batch.plate():
                fn = dist.Normal(torch.zeros(1), 1.0).to_event(1)
                pyro.sample("z", fn if self.training else mm.distributions.Mixture(fn.expand([2]), torch.zeros(2)))

    guide, batch = Guide(), mm.Batch({"x": torch.randn(4, 1)})
    assert pair_structure(story, guide, batch).strata is None
    guide.eval()
    assert pair_structure(story, guide, batch).strata.components == 2


def test_tensors_that_a_run_makes_do_not_count_as_used(double):
    """Not those either that torch's functions know nothing of, as of ``torch.Tensor``."""
    runs = 0

    def story(batch):
        nonlocal runs
        runs += 1
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.Tensor([0.0]), torch.DoubleTensor([1.0])).to_event(1))
            batch.observe("x", lambda z: dist.Normal(z, 1.0).to_event(1), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(len(batch), 1), 1.0).to_event(1))

    for rows in (4, 6):
        pair_structure(story, guide, mm.Batch({"x": torch.randn(rows, 1)}))
    assert runs == 1


def test_it_is_found_once(double):
    """By a run on two rows, which a second batch of the same form does not ask for."""
    model, guide = pair()
    expert = guide.posteriors["z"].experts["a"]
    for rows in (5, 9, 5):
        batch = mm.Batch({n: torch.randn(rows, 1) for n in NAMES})
        found = pair_structure(model, guide, batch)
        del batch
    assert expert.runs == 1
    assert found.strata.components == 3
