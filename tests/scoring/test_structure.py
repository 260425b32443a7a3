"""The structure of a pair is cached, and found again once what it was read from has changed."""

import gc
import weakref

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
def test_the_structure_of_a_batch_does_not_depend_on_earlier_batches(stratified, double):
    """After one batch, another's value is what it is without the first."""
    values = {n: torch.randn(5, 1) for n in NAMES}
    full = mm.Batch(values)
    batches = [mm.Batch({n: values[n] for n in "ab"}), full, full.only("a", "b"), mm.Batch({"c": values["c"]})]
    batches.append(mm.Batch(values, {"b": torch.arange(5) > 2}))
    fresh = [value(stratified, *pair(), batch) for batch in batches]
    one = pair()
    assert [value(stratified, *one, batch) for batch in [*batches, *batches]] == [*fresh, *fresh]


def test_the_structure_follows_a_posterior_that_is_replaced(double):
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
def test_the_structure_follows_a_parameter_that_is_frozen_and_freed(kind, double):
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


def test_the_structure_follows_a_mode_that_decides_what_is_sampled(double):
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


def test_the_structure_of_a_pair_is_found_once(double):
    """By a run on two rows, which a second batch of the same form does not ask for."""
    model, guide = pair()
    expert = guide.posteriors["z"].experts["a"]
    for rows in (5, 9, 5):
        batch = mm.Batch({n: torch.randn(rows, 1) for n in NAMES})
        found = pair_structure(model, guide, batch)
        del batch
    assert expert.runs == 1
    assert found.strata.components == 3


class Mixed(nn.Module):
    """A mixture of a number of components; it counts its runs, and keeps what it has made."""

    def __init__(self, components):
        super().__init__()
        self.components, self.runs, self.temperature = components, 0, 1.0

    def forward(self, batch):
        self.runs += 1
        shape = len(batch), self.components
        self.last = dist.Normal(torch.zeros(*shape, 1), 1.0 / self.temperature).to_event(1)
        return mm.distributions.Mixture(self.last, torch.zeros(shape))


def mixture_of(networks):
    """A guide as a function, whose network is in a container of its closure."""

    def guide(batch):
        with batch.plate():
            pyro.sample("z", networks["z"](batch))

    return guide


class Wrapped:
    """A guide as an object that is no module, with its network as an attribute."""

    def __init__(self, network):
        self.network = network

    def __call__(self, batch):
        with batch.plate():
            pyro.sample("z", self.network(batch))


def in_a_closure(network):
    def guide(batch):
        with batch.plate():
            pyro.sample("z", network(batch))

    def replace(new):
        nonlocal network
        network = new

    return guide, replace


def in_a_dictionary(network):
    networks = {"z": network}
    return mixture_of(networks), lambda new: networks.update(z=new)


def in_a_global(network):
    globals()["GLOBAL_NETWORK"] = network

    def guide(batch):
        with batch.plate():
            pyro.sample("z", GLOBAL_NETWORK(batch))  # noqa: F821

    return guide, lambda new: globals().update(GLOBAL_NETWORK=new)


def in_an_object(network):
    guide = Wrapped(network)
    return guide, lambda new: setattr(guide, "network", new)


def in_a_method(network):
    owner = Wrapped(network)
    guide = owner.__call__
    return guide, lambda new: setattr(owner, "network", new)


def rows(size=4):
    return mm.Batch({"x": torch.randn(size, 1)})


@pytest.mark.parametrize("place", [in_a_closure, in_a_dictionary, in_a_global, in_an_object, in_a_method])
def test_the_structure_follows_a_replaced_module_while_the_old_one_lives(place):
    old, new = Mixed(2), Mixed(3)
    guide, replace = place(old)
    assert pair_structure(story, guide, rows()).strata.components == 2
    replace(new)
    assert pair_structure(story, guide, rows()).strata.components == 3
    replace(old)
    assert pair_structure(story, guide, rows()).strata.components == 2


def test_the_structure_follows_numbers_of_a_module_that_change(double):
    batch = mm.Batch({n: torch.randn(5, 1) for n in NAMES})
    model, guide = pair()
    posterior = guide.posteriors["z"]
    assert pair_structure(model, guide, batch).strata.components == 3
    posterior.weights = {"a": 1.0, "b": 1.0, "c": 0.0}
    first = value("inside", model, guide, batch)
    fresh_model, fresh_guide = pair(
        lambda experts: mm.posteriors.MixtureOfExperts(experts, {"a": 1.0, "b": 1.0, "c": 0.0})
    )
    assert first == value("inside", fresh_model, fresh_guide, batch)
    mixed = Mixed(2)
    guide = mm.Guide(z=mixed)
    assert pair_structure(story, guide, rows()).strata.components == 2
    mixed.components = 5
    assert pair_structure(story, guide, rows()).strata.components == 5


def test_the_structure_follows_an_infer_dictionary_that_changes_in_place():
    infer = {}

    def guide(batch):
        with batch.plate():
            pyro.sample("c", dist.Categorical(torch.ones(len(batch), 3)), infer=infer)

    def model(batch):
        with batch.plate():
            c = pyro.sample("c", dist.Categorical(torch.ones(len(batch), 3)))
            batch.observe("x", lambda c: dist.Normal(c[..., None], 1.0).to_event(1), c)

    assert pair_structure(model, guide, rows()).latents == {"c": "score"}
    infer["enumerate"] = "parallel"
    assert pair_structure(model, guide, rows()).latents == {"c": "enumerated"}


def test_a_run_that_changes_attributes_of_its_own_is_not_run_again_for_them():
    mixed = Mixed(2)
    guide = mm.Guide(z=mixed)
    pair_structure(story, guide, rows())
    runs = mixed.runs
    for _ in range(3):
        mixed(rows())  # counts, and keeps another distribution
        pair_structure(story, guide, rows())
    assert mixed.runs == runs + 3


def test_a_number_that_changes_in_every_step_without_a_consequence_costs_a_few_runs_only():
    mixed = Mixed(2)
    guide = mm.Guide(z=mixed)
    found = pair_structure(story, guide, rows())
    runs = mixed.runs
    for step in range(50):
        mixed.temperature = 1.0 / (2 + step)
        assert pair_structure(story, guide, rows()) == found
    assert mixed.runs - runs <= 3 * 5  # each finding runs the guide three times at most
    mixed.components = 3  # the others are compared all the same
    assert pair_structure(story, guide, rows()).strata.components == 3


@pytest.mark.parametrize("place", [in_a_closure, in_a_dictionary, in_an_object])
def test_the_cached_structure_keeps_nothing_alive(place):
    network = Mixed(2)
    guide, replace = place(network)
    pair_structure(story, guide, rows())
    alive = [weakref.ref(x) for x in (network, guide)]
    del network, guide, replace
    gc.collect()
    assert [ref() for ref in alive] == [None, None]
