"""Families against torch's and SciPy's, and the reading of a network's output."""

import math

import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_mm import conditionals
from pyro_mm.nn import MLP, Deconvolutional

F64 = {"dtype": torch.float64}
EXACT = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("family", ["Normal", "Laplace"])
def test_location_and_scale_families(family):
    x, out = torch.randn(5, 3, **F64), torch.randn(5, 6, **F64)
    oracle = getattr(torch.distributions, family)
    d = getattr(conditionals, family)(nn.Identity())(out)
    # softplus(r + log(e - 1)) is 1 at r = 0, up to the floor that is part of the 1.
    scale = 1e-4 + (1 + (torch.tensor(1 - 1e-4, **F64).expm1()) * out[:, 3:].exp()).log()
    torch.testing.assert_close(d.log_prob(x), oracle(out[:, :3], scale).log_prob(x).sum(-1), **EXACT)
    assert isinstance(d.base_dist, getattr(dist, family))

    fixed = getattr(conditionals, family)(nn.Identity(), scale=0.75)(x)
    torch.testing.assert_close(fixed.log_prob(x + 1), oracle(x, 0.75).log_prob(x + 1).sum(-1), **EXACT)

    log_scale = nn.Parameter(torch.randn(3, **F64))
    learned = getattr(conditionals, family)(nn.Identity(), scale=log_scale)
    assert [p is log_scale for p in learned.parameters()] == [True]
    torch.testing.assert_close(learned(x).log_prob(x + 1), oracle(x, log_scale.exp()).log_prob(x + 1).sum(-1), **EXACT)
    learned(x).log_prob(x).sum().backward()
    assert log_scale.grad.shape == (3,)


def test_the_scale_is_one_at_zero_and_never_below_the_floor():
    d = conditionals.Normal(nn.Identity())(torch.tensor([[0.0, 0.0], [0.0, -100.0]], **F64))
    torch.testing.assert_close(d.base_dist.scale[:, 0], torch.tensor([1.0, 1e-4], **F64), **EXACT)


@pytest.mark.parametrize("lead", [(), (5,), (4, 1, 5)])
def test_flat_and_event_shaped_outputs_are_read_alike(lead):
    flat = torch.randn(*lead, 2 * 3 * 4, **F64)
    normal = conditionals.Normal(nn.Identity(), event_shape=(3, 4))
    a, b = normal(flat), normal(flat.unflatten(-1, (6, 4)))
    assert a.batch_shape == b.batch_shape == lead and a.event_shape == b.event_shape == (3, 4)
    assert torch.equal(a.mean, b.mean) and torch.equal(a.variance, b.variance)
    assert torch.equal(a.mean, flat[..., :12].unflatten(-1, (3, 4)))


def test_an_image_decoder_with_two_halves():
    decoder = conditionals.Normal(Deconvolutional(2, (6, 8, 8)), event_shape=(3, 8, 8))
    d = decoder(torch.randn(4, 5, 2))
    assert d.batch_shape == (4, 5) and d.event_shape == (3, 8, 8)
    assert conditionals.Bernoulli(Deconvolutional(2, (8, 8)), (8, 8))(torch.randn(5, 2)).event_shape == (8, 8)


def test_a_conditional_with_an_empty_event_shape_has_no_event_dimension():
    d = conditionals.Normal(nn.Identity(), event_shape=())(torch.randn(5, 2))
    assert d.batch_shape == (5,) and d.event_shape == ()
    assert conditionals.Poisson(nn.Identity(), event_shape=())(torch.randn(5, 1)).batch_shape == (5,)


def test_encoders_of_images_and_labels():
    for net, x in ((MLP(64, 32), torch.randn(5, 8, 8)), (nn.Embedding(10, 32), torch.arange(5))):
        d = conditionals.Normal(net)(x)
        assert d.batch_shape == (5,) and d.event_shape == (16,)


def test_several_parents_broadcast_and_are_concatenated():
    net = MLP(5, 2)
    z, u = torch.randn(4, 1, 3), torch.randint(2, (6, 2))
    logits = net(torch.cat([z.expand(4, 6, 3), u.expand(4, 6, 2).float()], -1))
    d = conditionals.Bernoulli(net)(z, u)
    assert d.batch_shape == (4, 6)
    torch.testing.assert_close(d.base_dist.logits, logits)


def test_bernoulli_is_scored_at_its_logits():
    logits, x = torch.randn(5, 3, **F64), torch.rand(5, 3, **F64).round()
    d = conditionals.Bernoulli(nn.Identity())(logits)
    torch.testing.assert_close(d.log_prob(x), (x * logits - torch.nn.functional.softplus(logits)).sum(-1), **EXACT)


@pytest.mark.parametrize("event", [(), (7,), (2, 7)])
def test_categorical_is_scored_by_the_softmax_of_its_logits(event):
    logits, x = torch.randn(5, *event, 4, **F64), torch.randint(4, (5, *event))
    d = conditionals.Categorical(nn.Identity(), event_shape=event)(logits)
    assert d.batch_shape == (5,) and d.event_shape == event
    picked = logits.log_softmax(-1).gather(-1, x[..., None]).reshape(5, -1).sum(-1)
    torch.testing.assert_close(d.log_prob(x), picked, **EXACT)


def test_poisson_reads_the_logarithm_of_its_rate():
    log_rate, x = torch.randn(5, 3, **F64), torch.randint(9, (5, 3)).double()
    d = conditionals.Poisson(nn.Identity())(log_rate)
    oracle = scipy.stats.poisson.logpmf(x.numpy(), log_rate.exp().numpy()).sum(-1)
    torch.testing.assert_close(d.log_prob(x), torch.from_numpy(oracle), **EXACT)


def test_negative_binomial_shared_and_by_row():
    log_mean, log_r = torch.randn(5, 3, **F64), torch.randn(5, 3, **F64)
    x = torch.randint(9, (5, 3)).double()

    def oracle(log_mean, log_r):
        mean, r = log_mean.exp().numpy(), log_r.exp().numpy()
        return torch.from_numpy(scipy.stats.nbinom.logpmf(x.numpy(), r, r / (r + mean)).sum(-1))

    rows = conditionals.NegativeBinomial(nn.Identity(), shared_dispersion=False)
    d = rows(torch.cat([log_mean, log_r], -1))
    torch.testing.assert_close(d.log_prob(x), oracle(log_mean, log_r), **EXACT)
    torch.testing.assert_close(d.mean, log_mean.exp(), **EXACT)
    torch.testing.assert_close(d.variance, log_mean.exp() + (2 * log_mean - log_r).exp(), **EXACT)

    shared = conditionals.NegativeBinomial(nn.Identity(), (3,)).double()
    with torch.no_grad():
        shared.log_inverse_dispersion.copy_(log_r[0])
    d = shared(log_mean)
    assert d.batch_shape == (5,) and d.event_shape == (3,)
    torch.testing.assert_close(d.log_prob(x), oracle(log_mean, log_r[0]), **EXACT)
    d.log_prob(x).sum().backward()
    assert shared.log_inverse_dispersion.grad.isfinite().all()
    assert d.expand((2, 5)).sample().shape == (2, 5, 3)


def test_sizes_that_do_not_fit_are_named():
    out = torch.zeros(5, 7)
    with pytest.raises(ValueError, match=r"\(\.\.\., 6\) from the network, got \(5, 7\)"):
        conditionals.Normal(nn.Identity(), (3,))(out)
    with pytest.raises(
        ValueError, match=r"\(\.\.\., 24\) or \(\.\.\., 6, 4\) or \(\.\.\., 3, 8\) from the network, got \(5, 7\)"
    ):
        conditionals.Normal(nn.Identity(), (3, 4))(out)
    with pytest.raises(ValueError, match=r"\(\.\.\., 6\) from the network, got \(5, 7\)"):
        conditionals.Laplace(nn.Identity())(out)
    with pytest.raises(ValueError, match=r"\(\.\.\., 3, C\) or \(\.\.\., 3 \* C\) from the network, got \(5, 7\)"):
        conditionals.Categorical(nn.Identity(), (3,))(out)
    with pytest.raises(ValueError, match=r"D \(D \+ 3\) / 2 outputs of the network for some D, got 7"):
        conditionals.MultivariateNormal(nn.Identity())(out)
    with pytest.raises(ValueError, match="needs event_shape"):
        conditionals.NegativeBinomial(nn.Identity())


@pytest.mark.parametrize("rows", [2, 3, 5])
@pytest.mark.parametrize("event", [(2,), (3,), (5,), (2, 3)])
@pytest.mark.parametrize("classes", [2, 3, 4, 6])
def test_labels_of_a_flat_output_are_those_of_a_shaped_one(rows, event, classes):
    """Also where there are as many rows, or classes, as labels, and whichever number of rows comes first."""
    torch.manual_seed(0)
    size = math.prod(event)
    net = nn.Linear(2, size * classes)
    flat = conditionals.Categorical(net, event)
    shaped = conditionals.Categorical(nn.Sequential(net, nn.Unflatten(-1, (*event, classes))), event)
    for n in (rows, 7):
        for lead in ((n,), (3, n)):
            z = torch.randn(*lead, 2)
            expected = net(z).reshape(*lead, *event, classes).log_softmax(-1)
            value = torch.randint(classes, event)
            index = value.expand(*lead, *event)[..., None]
            log_p = expected.gather(-1, index)[..., 0].flatten(len(lead)).sum(-1)
            for conditional in (flat, shaped):
                assert conditional(z).batch_shape == lead and conditional(z).event_shape == event
                torch.testing.assert_close(conditional(z).log_prob(value), log_p)


FAMILIES = {
    "Normal": lambda net: conditionals.Normal(net),
    "Normal, fixed": lambda net: conditionals.Normal(net, scale=0.5),
    "Normal, learned": lambda net: conditionals.Normal(net, scale=nn.Parameter(torch.zeros(6))),
    "Laplace": lambda net: conditionals.Laplace(net),
    "MultivariateNormal": lambda net: conditionals.MultivariateNormal(nn.Sequential(net, nn.Linear(6, 5))),
    "Bernoulli": lambda net: conditionals.Bernoulli(net),
    "Categorical": lambda net: conditionals.Categorical(net),
    "Poisson": lambda net: conditionals.Poisson(net),
    "NegativeBinomial": lambda net: conditionals.NegativeBinomial(net, (6,)),
}


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())
def test_families_trace_keep_their_device_and_are_float32_under_autocast(make):
    module = make(MLP(3, 6, hidden=(4,)))
    x = module(torch.randn(5, 3)).sample()
    loss = make_fx(lambda z: module(z).log_prob(x))(torch.zeros(5, 3))
    z = torch.randn(5, 3)
    expected = module(z).log_prob(x)
    torch.testing.assert_close(loss(z), expected)
    with torch.device("meta"):  # a tensor made without a device would not mix with those of the CPU
        assert torch.equal(module(z).log_prob(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(z).log_prob(x)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, expected, rtol=0.1, atol=0.1)
    double = module.double()(z.double())
    assert double.log_prob(x.double()).dtype == torch.float64 and double.batch_shape == (5,)


@pytest.mark.parametrize("make", FAMILIES.values(), ids=FAMILIES.keys())
def test_every_parameter_gets_a_finite_gradient_and_is_in_the_state_dict(make):
    module = make(MLP(3, 6, hidden=(4,)))
    d = module(torch.randn(5, 3))
    d.log_prob(d.sample()).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())
    other = make(MLP(3, 6, hidden=(4,)))
    other.load_state_dict(module.state_dict())
    z = torch.randn(2, 3)
    x = module(z).sample()
    assert torch.equal(other(z).log_prob(x), module(z).log_prob(x))


@pytest.mark.parametrize("event", [(1,), (7,), (64,), (28, 28), (3, 2, 5)])
def test_bits_are_scored_alike_with_a_gradient_and_without(event):
    """The two ways of a Bernoulli likelihood, in both precisions, with logits up to 80 and grey levels for values."""
    size = math.prod(event)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        logits = (30 * torch.randn(5, 3, size, dtype=dtype)).clamp(-80, 80)
        bits = conditionals.Bernoulli(torch.nn.Identity(), event)
        for value in (torch.rand(3, *event, dtype=dtype), torch.rand(3, *event, dtype=dtype).round()):
            expected = dist.Bernoulli(logits=logits.reshape(5, 3, *event)).to_event(len(event))
            slow = (
                -torch.nn.functional.binary_cross_entropy_with_logits(
                    expected.base_dist.logits.double(), value.double().expand(5, 3, *event), reduction="none"
                )
                .flatten(2)
                .sum(-1)
            )
            size_of_terms = slow.abs() + logits.double().abs().sum(-1)
            with torch.no_grad():
                fast = bits(logits).log_prob(value)
            assert fast.dtype == dtype and ((fast - slow).abs() < tolerance * size_of_terms).all()
            leaf = logits.clone().requires_grad_()
            bits(leaf).log_prob(value).sum().backward()
            torch.testing.assert_close(leaf.grad.reshape(5, 3, *event), value - leaf.reshape(5, 3, *event).sigmoid())
            mixed = bits(logits.float()).log_prob(value.double())
            assert mixed.dtype == torch.float64, "the value's type is the result's"
    assert bits(logits).expand([2, 5, 3]).log_prob(value).shape == (2, 5, 3)
    assert bits(logits).mean.shape == (5, 3, *event) and bits(logits).sample().shape == (5, 3, *event)


@pytest.mark.parametrize("family", ["Normal", "Laplace"])
@pytest.mark.parametrize("event", [(5,), (2, 3, 4)])
def test_a_fixed_scale_is_that_of_the_family(family, event):
    """Against the family's own density, expanded and masked as plates do it."""
    loc, x = torch.randn(2, 1, *event), torch.randn(3, *event)
    d = getattr(conditionals, family)(nn.Identity(), event, scale=0.3)(loc)
    plain = getattr(torch.distributions, family)(loc, 0.3)
    expected = torch.distributions.Independent(plain, len(event)).log_prob(x)
    torch.testing.assert_close(d.expand((2, 3)).log_prob(x), expected)
    torch.testing.assert_close(d.mask(False).expand((2, 3)).log_prob(x), torch.zeros_like(expected))
    torch.testing.assert_close(d.expand((2, 3)).variance, plain.variance.expand(2, 3, *event))


def test_a_mixture_head_is_the_mixture_of_its_parts():
    """Density, shapes with leading dimensions, and a gradient to every output of the network, weights included."""
    torch.manual_seed(0)
    net = nn.Linear(3, 2 + 2 * 2 * 4).double()
    head, x = conditionals.NormalMixture(net, 2), torch.randn(5, 1, 6, 3, dtype=torch.float64)
    d, z = head(x), torch.randn(5, 7, 6, 4, dtype=torch.float64)
    assert d.batch_shape == (5, 1, 6) and d.event_shape == (4,) and d.has_rsample
    out = net(x)
    loc, raw = out[..., 2:10].unflatten(-1, (2, 4)), out[..., 10:].unflatten(-1, (2, 4))
    scale = 1e-4 + nn.functional.softplus(raw + math.log(math.expm1(1 - 1e-4)))
    oracle = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(logits=out[..., :2]),
        torch.distributions.Independent(torch.distributions.Normal(loc, scale), 1),
    )
    torch.testing.assert_close(d.log_prob(z), oracle.log_prob(z))
    d.rsample((20,)).pow(3).sum().backward()
    assert (net.bias.grad != 0).all()
    with pytest.raises(ValueError, match=r"expected 3 \+ 2 \* 3 \* D outputs of the network, got 18"):
        conditionals.NormalMixture(net, 3)(x)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_a_normal_with_covariances_has_the_triangle_that_its_network_gives(size):
    out = torch.randn(5, size * (size + 3) // 2, **F64)
    d = conditionals.MultivariateNormal(nn.Identity())(out)
    unit = torch.eye(size, **F64).expand(5, -1, -1).clone()
    rows, columns = torch.tril_indices(size, size, -1)
    unit[:, rows, columns] = out[:, 2 * size :]
    triangle = conditionals.Normal(nn.Identity())(out[:, : 2 * size]).base_dist.scale[..., None] * unit
    x = torch.randn(5, size, **F64)
    oracle = torch.distributions.MultivariateNormal(out[:, :size], triangle @ triangle.mT)
    torch.testing.assert_close(d.log_prob(x), oracle.log_prob(x), **EXACT)
    assert d.batch_shape == (5,) and torch.equal(d.mean, out[:, :size])
    standard = conditionals.MultivariateNormal(nn.Identity())(torch.zeros_like(out))
    torch.testing.assert_close(standard.log_prob(x), dist.Normal(0.0, 1.0).log_prob(x).sum(-1), **EXACT)
