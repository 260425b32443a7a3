"""A conditional is ``distribution(output(parents))``; subclasses and modules of a user's own serve in its place."""

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm import conditionals, posteriors
from pyro_mm.nn import MLP
from pyro_mm.utils.global_state import import_zuko
from pyro_mm.utils.network_calls import ROWS, is_composition

D = 3


def families():
    torch.manual_seed(0)
    zuko = import_zuko()  # a plain import would switch off the checks of all distributions, in all tests
    return {
        "Normal": conditionals.Normal(MLP(2, 2 * D, (4,))),
        "fixed": conditionals.Normal(MLP(2, D, (4,)), scale=0.5),
        "learned": conditionals.Laplace(MLP(2, D, (4,)), scale=nn.Parameter(torch.zeros(D))),
        "MultivariateNormal": conditionals.MultivariateNormal(MLP(2, D * (D + 3) // 2, (4,))),
        "NormalMixture": conditionals.NormalMixture(MLP(2, 2 + 4 * D, (4,)), 2),
        "Bernoulli": conditionals.Bernoulli(MLP(2, D, (4,))),
        "Categorical": conditionals.Categorical(MLP(2, D, (4,))),
        "Categoricals, flat": conditionals.Categorical(MLP(2, D * 3, (4,)), (D,)),
        "Poisson": conditionals.Poisson(MLP(2, D, (4,))),
        "NegativeBinomial": conditionals.NegativeBinomial(MLP(2, D, (4,)), (D,)),
        "Flow": conditionals.Flow(MLP(2, 4, (4,)), zuko.flows.NICE(features=D, context=4, transforms=1)),
    }


@pytest.mark.parametrize("name", families())
def test_a_family_is_a_pure_function_of_its_networks_output(name):
    module, z = families()[name], torch.randn(5, 2)
    calls = []
    module.net.register_forward_hook(lambda *_: calls.append(1))
    whole = module(z)
    output = module.output(z)
    calls.clear()
    d = module.distribution(output)
    assert not calls, "no network runs for a distribution"
    value = whole.sample()
    assert torch.equal(d.log_prob(value), whole.log_prob(value)) and d.batch_shape == (5,)
    assert is_composition(module)


def test_logits_that_can_be_read_both_ways_are_shaped_in_the_output():
    """As many rows as labels: (2, 2 * 2) may be one row of shape (2, 4) of logits, or two flat ones."""
    torch.manual_seed(0)
    net, z = nn.Linear(2, 4), torch.randn(2, 2)
    module = conditionals.Categorical(net, (2,))
    assert module.output(z).shape == (2, 2, 2)
    torch.testing.assert_close(module(z).base_dist.probs, net(z).reshape(2, 2, 2).softmax(-1))


class OwnFamily(conditionals.Conditional):
    """As version 0.2 has it."""

    def distribution(self, output):
        loc, raw = output.chunk(2, -1)
        return dist.StudentT(5.0, loc, raw.exp(), validate_args=False).to_event(1)


class OwnForward(conditionals.Conditional):
    """As version 0.1 had it: an overridden forward that reads the output of a tuple of parents."""

    def forward(self, *parents):
        loc, raw = self.output(parents).chunk(2, -1)
        return dist.StudentT(5.0, loc, raw.exp(), validate_args=False).to_event(1)


class Wider(conditionals.Normal):
    """A family whose distribution is changed on its way out."""

    def forward(self, *parents):
        d = super().forward(*parents)
        return dist.Normal(d.base_dist.loc, 2 * d.base_dist.scale).to_event(1)


class OwnModule(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        loc, raw = self.net(x).chunk(2, -1)
        return dist.StudentT(5.0, loc, raw.exp(), validate_args=False).to_event(1)


OWN = [OwnFamily, OwnForward, Wider, OwnModule]


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize("place", ["expert", "head of all", "head of a set"])
@pytest.mark.parametrize("rows", [6, ROWS + 7])
def test_modules_of_a_users_own_take_the_place_of_a_conditional(kind, place, rows):
    torch.manual_seed(0)
    batch = mm.Batch({"a": torch.randn(rows, 2), "b": torch.randn(rows, 2)})
    net = nn.Linear(2, 4)
    own = kind(net)
    if place == "expert":
        posterior = lambda b: b.encode("a", own)  # noqa: E731
        features = batch["a"]
    elif place == "head of all":
        nets = {"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)}
        posterior = posteriors.JointEncoder(nets, own)
        features = torch.cat([nets["a"](batch["a"]), nets["b"](batch["b"])], -1)
    else:
        nets = {"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}
        posterior = posteriors.SumPooling(nets, own, 2)
        features = nets["a"](batch["a"]) + nets["b"](batch["b"])
    with torch.no_grad():
        guide = mm.Guide(z=posterior).eval()
        own.eval()
        d = mm.encode(guide, batch)["z"]
        loc, raw = net(features).chunk(2, -1)
        expected = dist.StudentT(5.0, loc, raw.exp()).to_event(1)
        if kind is Wider:
            expected = dist.Normal(loc, 2 * conditionals.Normal(net)(features).base_dist.scale).to_event(1)
        torch.testing.assert_close(d.log_prob(loc + 1), expected.log_prob(loc + 1))


@pytest.mark.parametrize("objective", [mm.objectives.mopoe, mm.objectives.masked])
@pytest.mark.parametrize("kind", OWN)
def test_a_head_of_a_users_own_trains_as_the_family_does(kind, objective):
    """Two networks of the same weights: a subclass or module, against the family with the same density."""
    model = mm.models.SharedLatent(
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        {n: conditionals.Normal(nn.Linear(2, 2), scale=1.0) for n in "ab"},
    )
    batch = mm.Batch({"a": torch.randn(8, 2), "b": torch.randn(8, 2)}, {"a": torch.arange(8) % 3 > 0})
    found = []
    for make in (kind, OwnModule if kind is not Wider else Wider):
        torch.manual_seed(1)
        pool = posteriors.SumPooling({n: nn.Linear(2, 2) for n in "ab"}, make(nn.Linear(2, 4)), 2)
        torch.manual_seed(2)
        loss = objective(mm.estimators.IWAE(3)).differentiable_loss(model, mm.Guide(z=pool), batch)
        loss.backward()
        found.append([loss, *(p.grad for p in pool.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_hooks_of_a_conditional_run_wherever_it_is_a_head():
    torch.manual_seed(0)
    head, calls = conditionals.Normal(nn.Linear(2, 4)), []
    head.register_forward_hook(lambda *_: calls.append(1))
    pool = posteriors.SumPooling({"a": nn.Linear(2, 2)}, head, 2)
    mm.encode(mm.Guide(z=pool), mm.Batch({"a": torch.randn(3, 2)}), audit=False)
    assert calls and not is_composition(head)


def test_a_family_without_a_distribution_says_so():
    with pytest.raises(NotImplementedError, match="Conditional has neither a distribution nor a forward of its own"):
        conditionals.Conditional(nn.Linear(2, 2))(torch.zeros(3, 2))
