"""Networks and likelihoods on values of any dtype, and on a bounded number of rows at once."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm import conditionals, posteriors
from pyro_mm.utils.network_calls import ROWS, in_scoring_type

# -- likelihoods do not depend on the type that a number comes in ----------------------------------------------------

BITS = [[0, 1, 1], [1, 1, 0]]
FAMILIES = {
    "Bernoulli": (dist.Bernoulli(logits=torch.tensor([0.3, -1.0, 2.0])).to_event(1), BITS),
    "Normal": (dist.Normal(torch.tensor([0.3, -1.0, 2.0]), 1.5).to_event(1), BITS),
    "Laplace": (dist.Laplace(torch.tensor([0.3, -1.0, 2.0]), 1.5).to_event(1), BITS),
    "OneHot": (dist.OneHotCategorical(logits=torch.tensor([0.3, -1.0, 2.0])), [[0, 1, 0], [1, 0, 0]]),
    "Categorical": (dist.Categorical(logits=torch.tensor([0.3, -1.0])), [1, 0]),
    "Categoricals": (dist.Categorical(logits=torch.tensor([[0.3, -1.0]] * 3)).to_event(1), BITS),
    "Poisson": (dist.Poisson(torch.tensor([0.3, 100.0, 3.0])).to_event(1), [[0, 120, 1], [2, 127, 3]]),
    "NegativeBinomial": (
        dist.NegativeBinomial(torch.tensor([2.0, 3.0, 9.0]), logits=torch.zeros(3)).to_event(1),
        [[0, 120, 1], [2, 127, 3]],
    ),
    "Binomial": (dist.Binomial(127, logits=torch.zeros(3)).to_event(1), [[0, 120, 1], [2, 127, 3]]),
}
TYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64,
]  # fmt: skip


def log_likelihood(d, value):
    batch = mm.Batch({"x": value})
    with pyro.poutine.trace() as trace, batch.plate():
        seen = batch.observe("x", lambda: d)
    assert seen.dtype == batch["x"].dtype, "descendants see the values as they were given"
    trace.trace.compute_log_prob()
    return trace.trace.nodes["x"]["log_prob"]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_likelihood_is_of_the_number_and_not_of_its_type(family, dtype):
    d, value = FAMILIES[family]
    value = torch.tensor(value)
    if dtype == torch.bool and value.max() > 1:
        pytest.skip("no booleans")
    expected = d.log_prob(value.float())
    found = log_likelihood(d, value.to(dtype))
    assert found.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-6)


def test_counts_of_255_do_not_overflow():
    """255 + 1 is 0 in uint8, and the logarithm of its factorial infinite."""
    d = dist.Poisson(torch.tensor(250.0))
    found = log_likelihood(d, torch.tensor([255, 3], dtype=torch.uint8))
    torch.testing.assert_close(found, d.log_prob(torch.tensor([255.0, 3.0])))


def test_a_density_of_ones_own_gets_the_values_as_they_are():
    class Table(dist.TorchDistribution):
        arg_constraints = {}

        def log_prob(self, value):
            return torch.tensor([0.5, 0.25]).log()[value]

    value = torch.tensor([0, 1])
    assert in_scoring_type(Table(), value) is value


LABELS = [torch.uint8, torch.int32, torch.int64, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", LABELS, ids=str)
def test_a_label_of_any_type_goes_into_a_table_and_a_likelihood(dtype):
    torch.manual_seed(0)
    label = torch.tensor([0, 2, 1, 1])
    model = mm.models.SharedLatent(
        dist.Normal(torch.zeros(2), 1.0).to_event(1), {"label": conditionals.Categorical(mm.nn.MLP(2, 3))}
    )
    guide = mm.Guide(z=posteriors.ProductOfExperts({"label": conditionals.Normal(nn.Embedding(3, 4))}))
    expected = mm.log_marginal(model, guide, mm.Batch({"label": label}), num_particles=5, seed=0)
    found = mm.log_marginal(model, guide, mm.Batch({"label": label.to(dtype)}), num_particles=5, seed=0)
    torch.testing.assert_close(found.log_prob, expected.log_prob)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16], ids=str)
def test_a_plain_layer_takes_numbers_of_other_types(dtype):
    torch.manual_seed(0)
    value, net = torch.tensor([[0, 1], [1, 1]]), nn.Linear(2, 3)
    torch.testing.assert_close(mm.Batch({"x": value.to(dtype)}).encode("x", net), net(value.float()))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float64], ids=str)
def test_covariates_and_conditions_go_into_tables_in_any_type(dtype):
    torch.manual_seed(0)
    index = torch.tensor([0, 2, 1])
    prior = mm.priors.GivenCovariate("u", conditionals.Normal(nn.Embedding(3, 4)))
    batch = lambda x: mm.Batch({"x": torch.zeros(3, 2), "y": x}, covariates={"u": x})  # noqa: E731
    torch.testing.assert_close(prior(batch(index.to(dtype))).mean, prior(batch(index)).mean)
    decoders = {"x": conditionals.Normal(mm.nn.MLP(4, 2, ()), scale=1.0)}
    standard = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    model = mm.models.ConditionalLatent(standard, ("y", dist.Categorical(torch.ones(3))), nn.Embedding(3, 2), decoders)
    guide = mm.Guide(z=lambda batch: dist.Normal(torch.zeros(batch.size, 2), 1.0).to_event(1))
    one, two = (mm.log_marginal(model, guide, batch(x), num_particles=3, seed=0) for x in (index, index.to(dtype)))
    torch.testing.assert_close(one.log_prob, two.log_prob)


def test_a_covariate_of_another_type_than_its_network_says_what_to_do():
    prior = mm.priors.GivenCovariate("u", conditionals.Normal(nn.Linear(1, 4)))
    batch = mm.Batch({"x": torch.zeros(3)}, covariates={"u": np.full((3, 1), 0.5)})
    with pytest.raises(TypeError, match=r"covariate 'u' is torch.float64, and its network, Normal, has"):
        prior(batch)


def test_float64_values_of_a_float32_network_say_what_to_do():
    batch = mm.Batch({"x": np.zeros((2, 3))})
    with pytest.raises(TypeError, match=r"'x' is torch.float64, and its network, Linear, has parameters of "
                       r"torch.float32.*astype\('float32'\)"):  # fmt: skip
        batch.encode("x", nn.Linear(3, 1))


def test_an_error_that_is_not_of_the_type_stays_as_it_is():
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        mm.Batch({"x": torch.zeros(2, 3)}).encode("x", nn.Linear(4, 1))


def test_a_label_that_is_no_class_is_named():
    with pytest.raises(
        ValueError, match="'y': its network has a table of classes, and the values are no whole numbers"
    ):
        mm.Batch({"y": [0.0, 3.8]}).encode("y", nn.Embedding(4, 2))


def test_a_label_of_minus_one_in_a_table_names_the_mend():
    batch = mm.Batch({"y": [-1, 2, 0]})
    with pytest.raises(ValueError, match=r"'y': values from -1 to 2 do not index .* present="):
        batch.encode("y", nn.Embedding(3, 2))


# -- rows at once ----------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A network that remembers the largest number of rows it saw."""

    def __init__(self, out):
        super().__init__()
        self.net, self.most = mm.nn.MLP(2, out, (8,)), 0

    def see(self, rows):
        self.most = max(self.most, rows)

    def forward(self, x):
        self.see(x.shape[:-1].numel())
        return self.net(x)


class OwnNormal(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return dist.Normal(self.net(x), 1.0).to_event(1)


def counted(posterior):
    torch.manual_seed(0)
    nets = [Counting(4), Counting(4)]
    if posterior == "joint":
        nets.append(Counting(4))
        head = conditionals.Normal(nn.Sequential(nn.Linear(8, 2), nets[2]))
        guide = mm.Guide(z=posteriors.JointEncoder({"x": nets[0], "y": nets[1]}, head))
    elif posterior == "set":
        nets.append(Counting(4))
        head = conditionals.Normal(nn.Sequential(nn.Linear(4, 2), nets[2]))
        pool = posteriors.SelfAttention({"x": nets[0], "y": nets[1]}, head, 4, heads=2)
        pool.attention[0].register_forward_pre_hook(lambda _, args: nets[2].see(len(args[0])))
        guide = mm.Guide(z=pool)
    else:
        nets = nets if posterior == "product" else [Counting(2), Counting(2)]
        family = conditionals.Normal if posterior == "product" else OwnNormal
        guide = mm.Guide(z=posteriors.ProductOfExperts({"x": family(nets[0]), "y": family(nets[1])}))
    decoders = {name: conditionals.Normal(mm.nn.MLP(2, 2, ()), scale=1.0) for name in ("x", "y")}
    model = mm.models.SharedLatent(dist.Normal(torch.zeros(2), 1.0).to_event(1), decoders)
    return model.eval(), guide.eval(), nets


ROUTES = {
    "generate": lambda m, g, b: mm.generate(m, g, b, seed=0)["x"],
    "encode": lambda m, g, b: mm.encode(g, b)["z"].mean,
    "posterior_draws": lambda m, g, b: mm.posterior_draws(m, g, b, seed=0)["z"],
    "resampled": lambda m, g, b: mm.posterior_draws(m, g, b, resample=True, num_particles=2, seed=0)["z"],
    "log_marginal": lambda m, g, b: mm.log_marginal(m, g, b, num_particles=2, seed=0).log_prob,
    "log_conditional": lambda m, g, b: (
        mm.log_conditional(m, g, b, target="x", given="y", num_particles=2, seed=0).log_prob
    ),
}


@pytest.mark.parametrize("posterior", ["product", "own", "joint", "set"])
@pytest.mark.parametrize("route", ROUTES)
def test_encoders_see_so_many_rows_at_once_and_give_the_same_numbers(route, posterior, monkeypatch):
    model, guide, nets = counted(posterior)
    batch = mm.Batch({"x": torch.randn(ROWS + 300, 2), "y": torch.randn(ROWS + 300, 2)})
    with torch.no_grad():
        found = ROUTES[route](model, guide, batch)
    assert max(net.most for net in nets) <= ROWS
    if route in ("generate", "encode", "posterior_draws"):
        monkeypatch.setattr("pyro_mm.utils.network_calls.ROWS", 10**9)  # where all of them ask whether to cut
        with torch.no_grad():
            torch.testing.assert_close(found, ROUTES[route](model, guide, batch))
        if route == "encode":  # the others draw for blocks of fewer rows, whatever a network may see
            assert max(net.most for net in nets) > ROWS


def test_with_gradients_and_in_training_mode_nothing_is_cut():
    _, guide, nets = counted("product")
    batch = mm.Batch({"x": torch.randn(ROWS + 1, 2), "y": torch.randn(ROWS + 1, 2)})
    mm.encode(guide, batch)["z"].mean.sum().backward()
    assert nets[0].most == ROWS + 1 and nets[0].net.layers[0].weight.grad is not None
    nets[0].most = 0
    with torch.no_grad():
        batch.encode("x", nets[0].train())
    assert nets[0].most == ROWS + 1, "batch norm would see other rows"
