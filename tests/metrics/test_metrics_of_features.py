"""The Fréchet distance against closed forms, classifiers of real digits, and probes of known latents."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.linalg
import torch
from torch import nn

from pyro_mm import Batch, datasets, metrics
from pyro_mm.metrics import classifiers, feature_rows, probe_features

F64 = {"dtype": torch.float64}
EXACT = {"rel": 1e-9, "abs": 1e-9}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def covariance(d, rank=None):
    x = torch.randn(d, rank or 2 * d, **F64)
    return x @ x.T


# -- the distance of two normal distributions -------------------------------------------------------------------------


def test_frechet_distance_of_independent_features_is_its_formula():
    m, n, a, b = torch.randn(4, 6, **F64).unbind()
    a, b = a.exp(), b.exp()
    expected = ((m - n) ** 2).sum() + ((a - b) ** 2).sum()
    assert metrics.gaussian_frechet(m, (a**2).diag(), n, (b**2).diag()) == pytest.approx(expected.item(), **EXACT)


def test_frechet_distance_of_proportional_covariances_is_its_formula():
    c, zero = covariance(5), torch.zeros(5, **F64)
    assert metrics.gaussian_frechet(zero, c, zero, 9 * c) == pytest.approx(4 * c.trace().item(), **EXACT)
    assert metrics.gaussian_frechet(zero, c, zero, c) == pytest.approx(0, abs=1e-12 * c.trace().item())


def test_frechet_distance_takes_singular_covariances():
    """Of u u' and v v' the last trace is |u' v|."""
    u, v, zero = torch.randn(7, **F64), torch.randn(7, **F64), torch.zeros(7, **F64)
    expected = u @ u + v @ v - 2 * (u @ v).abs()
    got = metrics.gaussian_frechet(zero, torch.outer(u, u), zero, torch.outer(v, v))
    assert got == pytest.approx(expected.item(), **EXACT)


@pytest.mark.parametrize("rank", [None, 3])
def test_frechet_distance_agrees_with_scipys_square_root(rank):
    """SciPy's root of the product, which is not symmetric, with its rounding made real."""
    a, b, zero = covariance(8), covariance(8, rank), torch.zeros(8, **F64)
    root = np.real(scipy.linalg.sqrtm((a @ b).numpy() + 1e-12 * np.eye(8)))
    expected = a.trace() + b.trace() - 2 * np.trace(root)
    assert metrics.gaussian_frechet(zero, a, zero, b) == pytest.approx(expected.item(), rel=1e-4)


def test_frechet_distance_is_symmetric_and_invariant():
    a, b, m, n = covariance(4), covariance(4), torch.randn(4, **F64), torch.randn(4, **F64)
    q = torch.linalg.qr(torch.randn(4, 4, **F64))[0]
    there = metrics.gaussian_frechet(m, a, n, b)
    assert metrics.gaussian_frechet(n, b, m, a) == pytest.approx(there, **EXACT)
    rotated = metrics.gaussian_frechet(q @ m, q @ a @ q.T, q @ n, q @ b @ q.T)
    assert rotated == pytest.approx(there, **EXACT)
    with pytest.raises(ValueError, match=r"means \(D,\) and covariances"):
        metrics.gaussian_frechet(m, a, n[:3], b)


# -- and of two sets ------------------------------------------------------------------------------------------------


def test_frechet_distance_of_data_is_that_of_their_moments():
    x, y = torch.randn(700, 3, 2, **F64), torch.randn(300, 3, 2, **F64) ** 2
    moments = [(z.flatten(1).mean(0), torch.from_numpy(np.cov(z.flatten(1).T))) for z in (x, y)]
    expected = metrics.gaussian_frechet(*moments[0], *moments[1])
    assert metrics.frechet_distance(x, y) == pytest.approx(expected, **EXACT)
    assert metrics.frechet_distance(x.split(9), iter(y.split(300))) == pytest.approx(expected, **EXACT)
    assert metrics.frechet_distance(x + 1e7, y + 1e7) == pytest.approx(expected, rel=1e-6)
    assert metrics.frechet_distance(x, x) == pytest.approx(0, abs=1e-12)
    assert metrics.frechet_distance(x, x + 2) == pytest.approx(6 * 4, **EXACT)


def test_features_are_asked_for_in_chunks():
    seen = []

    def features(x):
        assert len(x) <= feature_rows.ROWS_PER_PASS and not torch.is_grad_enabled()
        seen.append(len(x))
        return 3 * x[..., None, None]

    x, y = torch.randn(600, **F64), torch.randn(500, **F64) + 1
    expected = 9 * ((x.mean() - y.mean()) ** 2 + (x.std() - y.std()) ** 2)
    assert metrics.frechet_distance(x, y, features) == pytest.approx(expected.item(), **EXACT)
    assert sum(seen) == 1100


@pytest.mark.parametrize(
    ("real", "message"),
    [
        (torch.zeros(1, 2), "at least two rows of real data, got 1"),
        ([], "got 0"),
        (torch.full((3, 2), math.nan), "real data that are not finite"),
    ],
)
def test_frechet_distance_refuses_too_few_rows(real, message):
    with pytest.raises(ValueError, match=message):
        metrics.frechet_distance(real, torch.randn(3, 2))


# -- classifiers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [True, False])
def test_a_classifier_of_real_digits(pictures):
    """Of 360 test digits 93% were right, error 1.4% (a support vector machine: 96%); the seed is fixed."""
    train, test = datasets.digits()
    x, y = (batch["image"] if pictures else batch["image"].flatten(1) for batch in (train, test))
    state = torch.get_rng_state()
    net, share = metrics.classifier(x, train["label"], y, test["label"], epochs=6, batch_size=32, lr=3e-3)
    assert torch.equal(state, torch.get_rng_state())
    assert share.value > 0.9 and share.size == 360
    logits = net(y)
    assert logits.shape == (360, 10)
    assert share.value == pytest.approx((logits.argmax(-1) == test["label"]).double().mean().item())
    assert not net.training and not any(p.requires_grad for p in net.parameters())
    assert net.pictures == pictures
    with pytest.raises(ValueError, match=r"expected values of shape \(B, "):
        net(y[:, :5])


def test_a_classifier_is_that_of_its_seed():
    x, y = torch.randn(40, 3, 9, 8), torch.arange(40) % 3
    nets = [metrics.classifier(x, y, x, y, epochs=1, seed=s)[0] for s in (0, 0, 1)]
    logits = [net(x) for net in nets]
    assert logits[0].shape == (40, 3) and torch.equal(logits[0], logits[1]) and not torch.equal(logits[0], logits[2])
    for wrong in ((y[:9], x, y), (y, x[:, :2], y), (y, x[:0], y[:0])):
        with pytest.raises(ValueError, match="alike values"):
            metrics.classifier(x, *wrong)


def test_values_are_standardised_by_the_training_rows():
    """The same network, whatever the unit: large numbers alone would not be learned at this step size."""
    x, y = torch.randn(60, 4), torch.arange(60) % 2
    x[:, 0] += 4 * y
    one, _ = metrics.classifier(x, y, x, y, epochs=2)
    other, _ = metrics.classifier(1024 * x + 4096, y, x, y, epochs=2)
    torch.testing.assert_close(one(x), other(1024 * x + 4096), rtol=1e-2, atol=1e-3)
    whole, _ = metrics.classifier(torch.arange(12).reshape(6, 2), torch.arange(6) % 2, x[:, :2], y, epochs=1)
    assert whole.mean == 5.5 and isinstance(whole, nn.Module)


def test_test_rows_are_classified_in_several_passes():
    x, y = torch.randn(50, 4), torch.arange(50) % 2
    net, accuracy = metrics.classifier(x, y, x, y, epochs=1)
    sizes = []
    net.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    predicted = classifiers._predict(net, x, x.device, rows_per_pass=7)
    assert sizes == [7] * 7 + [1] and torch.equal(predicted, net(x).argmax(-1))
    assert accuracy == metrics.Share.of(predicted == y)


# -- probes ---------------------------------------------------------------------------------------------------------


def guide(batch):
    """z is a's value, or zero without it; w is b's."""
    with batch.plate():
        loc = batch["a"] if batch.presence("a") is not False else torch.zeros_like(batch["a"])
        assert batch.presence("label") is False
        pyro.sample("z", dist.Normal(loc, 5.0).to_event(1))
        pyro.sample("w", dist.Normal(batch["b"], 5.0).to_event(1))
        with pyro.plate("inner", 3, dim=-2):
            pyro.sample("steps", dist.Normal(torch.zeros(3, 1), 1.0))


def labelled(rows, told=True):
    """Three classes in the corners of a triangle, and b, which knows nothing."""
    label = torch.randint(3, (rows,))
    corners = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 900.0]])
    a = corners[label] + torch.rand(rows, 2) if told else torch.randn(rows, 2)
    values = {"a": a, "b": torch.randn(rows, 2), "label": label}
    return Batch(values, {"label": torch.arange(rows) % 5 > 0}, covariates={"class": label})


def test_a_linear_probe_finds_what_is_linear():
    train, test = labelled(200), labelled(2 * probe_features.ROWS_PER_PASS)
    share = metrics.linear_probe(guide, train, test, "label")
    present = int(test.present["label"].sum())
    assert share == metrics.Share(1.0, 0.0, present)
    # a covariate is known of every row, but then the label must be kept from the guide by hand
    share = metrics.linear_probe(guide, train, test, "class", ["a", "b"], sites=["w", "z"])
    assert share == metrics.Share(1.0, 0.0, test.size)


def test_a_linear_probe_of_a_flow_takes_the_mean_of_draws():
    """A log-normal as a transformed distribution, which says nothing of its mean."""

    def flow(batch):
        with batch.plate():
            base = dist.Normal(batch["a"] / torch.tensor([9.0, 900.0]), 0.5)
            pyro.sample("z", dist.TransformedDistribution(base, [dist.transforms.ExpTransform()]).to_event(1))

    d = dist.TransformedDistribution(dist.Normal(torch.zeros(5), 0.5), [dist.transforms.ExpTransform()])
    # the error of a mean of 100 draws is 0.06; 5 of them, 1 failure in 350,000 seeds
    torch.testing.assert_close(probe_features._mean(d), torch.full((5,), math.exp(1 / 8)), rtol=0, atol=0.3)
    assert metrics.linear_probe(flow, labelled(200), labelled(100), "label", "a").value > 0.95


def test_the_unit_of_a_latent_does_not_matter():
    """Small numbers that tell, beside large ones that do not: not standardised, the penalty would hide them."""

    def scaled(batch):
        label = batch.covariates["class"] % 2
        return batch.replaced({"a": torch.stack([1e-4 * (label + 0.1 * torch.rand(batch.size)), batch["a"][:, 0]], 1)})

    train, test = (Batch({n: b[n] for n in "ab"}, covariates={"class": b.covariates["class"] % 2}) for b in (
        scaled(labelled(200, told=False)), scaled(labelled(100, told=False))
    ))  # fmt: skip
    assert metrics.linear_probe(_without_label, train, test, "class") == metrics.Share(1.0, 0.0, 100)


@pytest.mark.parametrize("options", [{"sites": "w"}, {"given": "b"}])
def test_a_linear_probe_is_at_chance_where_nothing_is_known(options):
    """At chance: 900 rows of three classes, error 0.016, 4 of them; 1 failure in 16,000 seeds, of which one is used."""
    share = metrics.linear_probe(guide, labelled(300), labelled(900), "class", **({"given": ["a", "b"]} | options))
    assert abs(share.value - 1 / 3) < 4 * math.sqrt(2 / 9 / 900)
    assert share.standard_error == pytest.approx(math.sqrt(share.value * (1 - share.value) / 899))


def test_rows_without_what_is_given_are_left_out_of_both_parts():
    train, test = labelled(200), labelled(100)
    a = torch.where(torch.arange(200)[:, None] % 2 == 0, train["a"], torch.randn(200, 2))
    weak = Batch({"a": a, "b": train["b"]}, {"a": torch.arange(200) % 2 == 0}, covariates=train.covariates)
    small = Batch({n: test[n] for n in "ab"}, {"a": torch.arange(100) % 4 > 0}, covariates=test.covariates)
    assert metrics.linear_probe(_without_label, weak, small, "class", "a") == metrics.Share(1.0, 0.0, 75)


def _without_label(batch):
    with batch.plate():
        pyro.sample("z", dist.Normal(batch["a"], 5.0).to_event(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": ["a", "label"]}, "cannot be given"),
        ({"label": "kind"}, "label: unknown modality or covariate 'kind', expected one of 'class', 'a', 'b', 'label'"),
        ({"sites": "y"}, "no site y: it has z, w, steps"),
        ({"label": "b", "given": "a", "audit": False}, "one class per row"),
        ({"sites": ["z", "steps"]}, r"one draw per row of steps, got batch shape \(3, 16\)"),
    ],
)
def test_a_linear_probe_refuses_what_it_cannot_probe(options, message):
    with pytest.raises(ValueError, match=message):
        metrics.linear_probe(guide, labelled(20), labelled(20), **({"label": "label"} | options))
