"""Noise and missing modalities at test time: against closed forms of the linear Gaussian model, and by hand."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm

LOADINGS = {"x": [[1.0, 0.0], [0.5, 1.0], [0.0, -1.0]], "y": [[1.0, 1.0], [2.0, 0.0]]}
S = 8


@pytest.fixture
def case(double):
    torch.manual_seed(0)
    model = mm.models.LinearGaussian({n: torch.tensor(a) for n, a in LOADINGS.items()}, {"x": 0.3, "y": 0.6})
    return model, mm.Guide(z=model.posterior), model.sample(1500)


def shift(values, level):
    return values + level


def expected_error(model, batch, noisy, target):
    """Mean and deviation, by the draws, of the error |x - A mu|^2 + tr(C) / S, C = A Sigma A', over the variance."""
    posterior = model.posterior(noisy)
    loading = torch.tensor(LOADINGS[target])
    covariance = (loading @ posterior.covariance_matrix @ loading.T / S).expand(len(batch), -1, -1)
    residual = batch[target] - posterior.mean @ loading.T
    mean = residual.square().sum(1) + covariance.diagonal(dim1=-2, dim2=-1).sum(-1)
    variance = 4 * torch.einsum("ni,nij,nj->n", residual, covariance, residual) + 2 * covariance.square().sum((-2, -1))
    scale = (batch[target] - batch[target].mean(0)).square().sum(1).mean()
    return mean.mean() / scale, variance.sum().sqrt() / len(batch) / scale


def test_reconstruction_errors_are_those_of_the_exact_posterior(case):
    """18 means over draws, 14 of them different, within 4.5 of their deviations: fails with probability 1e-4."""
    model, guide, batch = case
    found = mm.metrics.robustness(
        model, guide, batch, noise=(0, 2), corrupt={"x": shift, "y": shift}, num_samples=S, seed=0
    )
    assert found.levels == (0.0, 2.0) and found.corrupted == ("x", "y", "all")
    assert found.measures == {"x": "unexplained", "y": "unexplained"}
    for target in "xy":
        for i, members in enumerate(("x", "y", "xy")):
            noisy = batch.replaced({n: batch[n] + 2 for n in members})
            for got, rows in (
                (found.values[target][i, 0], batch),
                (found.values[target][i, 1], noisy),
                (found.missing[target][i], batch.without(*members)),
            ):
                mean, deviation = expected_error(model, batch, rows, target)
                assert abs(got - mean) < 4.5 * deviation < 0.15 * mean
    assert (found.errors["x"] > 0).all() and (found.errors["x"] < 0.05 * found.values["x"]).all()
    assert "all, missing" in repr(found) and "x unexplained" in repr(found)


def test_usual_noise_has_the_standard_deviation_of_each_entry(double):
    """Of 256 draws a deviation is known to 4.4 %, and is within 20 %: three of them fail with probability 2e-5."""
    torch.manual_seed(0)
    scales = torch.tensor([0.1, 1.0, 10.0])
    seen = []

    class Recorder(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.zeros(*x.shape[:-1], 2)

    decoder = mm.conditionals.Normal(nn.Linear(1, 3), scale=1.0)
    model = mm.models.SharedLatent(dist.Normal(torch.zeros(1), 1.0).to_event(1), {"x": decoder})
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"x": mm.conditionals.Normal(Recorder())}))
    x = torch.randn(256, 3) * scales
    mm.metrics.robustness(model, guide, mm.Batch({"x": x}), noise=(0.5,), num_samples=1, seed=0, audit=False)
    noise = max((encoded - x for encoded in seen if encoded.shape == x.shape), key=lambda d: d.abs().sum())
    torch.testing.assert_close(noise.std(0) / x.std(0), torch.full((3,), 0.5), rtol=0.2, atol=0)


def labelled():
    """A class, a real series with lengths, letters and tokens: networks at random."""
    torch.manual_seed(0)
    decoders = {
        "series": mm.conditionals.Normal(nn.Linear(2, 8), scale=1.0, event_shape=(4, 2)),
        "letters": mm.conditionals.Categorical(nn.Linear(2, 3 * 5), event_shape=(3,)),
        "text": mm.conditionals.Tokens(mm.nn.RecurrentTokens(2, 5, 8), 4, end=0),
    }
    label = {"label": mm.conditionals.Categorical(nn.Linear(2, 3))}
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    model = mm.models.Factorized(prior, {}, decoders, label)
    experts = {
        "series": mm.nn.Recurrent(2, 4, 8),
        "letters": nn.Sequential(nn.Embedding(5, 4), nn.Flatten(-2), nn.Linear(12, 4)),
        "text": mm.nn.Recurrent(4, 4, 8, vocabulary=5),
    }  # fmt: skip
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({n: mm.conditionals.Normal(e) for n, e in experts.items()}))
    n = 30
    lengths = {"series": torch.arange(n) % 4 + 1, "text": torch.arange(n) % 3 + 2}
    tokens = torch.randint(1, 5, (n, 4))
    tokens[torch.arange(4) >= (lengths["text"] - 1)[:, None]] = 0
    values = {
        "series": torch.randn(n, 4, 2),
        "letters": torch.randint(5, (n, 3)),
        "text": tokens,
        "label": torch.arange(n) % 3,
    }
    present = {"series": torch.arange(n) % 5 > 0, "label": torch.arange(n) % 4 > 0}
    return model, guide, mm.Batch(values, present, lengths=lengths)


def test_accuracies_are_those_of_the_class_probabilities(double):
    model, guide, batch = labelled()
    found = mm.metrics.robustness(model, guide, batch, "label", noise=(), num_samples=200, seed=0)
    assert found.measures == {
        "series": "unexplained", "letters": "accuracy", "text": "accuracy", "label": "accuracy"
    }  # fmt: skip
    assert found.corrupted == ("series", "letters", "text", "all") and found.levels == (0.0,)
    seen = ("series", "letters", "text")
    torch.manual_seed(1)
    for i, given in enumerate((seen[1:], ("series", "text"), ("series", "letters"), ())):
        probabilities = mm.metrics.class_probabilities(model, guide, batch, "label", given, 200)
        margin = probabilities.topk(2, -1).values
        clear = ((margin[:, 0] - margin[:, 1]) > 0.06) & batch.present["label"]  # more than four errors
        right = (probabilities.argmax(-1) == batch["label"])[batch.present["label"]].double().mean()
        doubtful = 1 - clear.sum() / batch.present["label"].sum()
        assert abs(found.missing["label"][i] - right) <= doubtful + 1e-9


def test_labels_are_never_given_to_the_guide(double):
    """Other labels change their own accuracy, and nothing else."""
    model, guide, batch = labelled()
    other = batch.replaced({"label": (batch["label"] + 1) % 3})
    found = [mm.metrics.robustness(model, guide, b, "label", noise=(1,), num_samples=3, seed=0) for b in (batch, other)]
    for name in ("series", "letters", "text"):
        assert torch.equal(found[0].values[name], found[1].values[name])
        assert torch.equal(found[0].missing[name], found[1].missing[name])


def test_noise_leaves_padding_and_the_callers_rows_as_they_are(double):
    model, guide, batch = labelled()
    before = {name: batch[name].clone() for name in batch}
    seen = []

    def spy(values, level):
        seen.append(level)
        return torch.full_like(values, math.inf) if level > 1 else values

    found = mm.metrics.robustness(
        model, guide, batch, "label", noise=(0.5, 1), corrupt={"series": spy}, num_samples=2, seed=0
    )
    assert seen == [0.5, 1.0, 0.5, 1.0]  # alone, and with all others
    assert torch.equal(found.values["series"][0, 0], found.values["series"][0, 1])
    assert all(torch.equal(before[name], batch[name]) for name in batch)
    again = mm.metrics.robustness(
        model, guide, batch, "label", noise=(0.5, 1), corrupt={"series": spy}, num_samples=2, seed=0
    )
    assert all(torch.equal(found.values[name], again.values[name]) for name in found.values)


def test_steps_behind_the_end_have_no_part_in_the_measures(double):
    model, guide, batch = labelled()
    found = []
    for filler in (0.0, 50.0):
        padding = torch.arange(4) >= batch.lengths["series"][:, None]
        series = torch.where(padding[..., None], filler, batch["series"])
        filled = mm.Batch(
            {name: series if name == "series" else batch[name] for name in batch}, batch.present, lengths=batch.lengths
        )
        found.append(mm.metrics.robustness(model, guide, filled, "label", noise=(1,), num_samples=2, seed=0))
    for name in found[0].values:
        torch.testing.assert_close(found[0].values[name], found[1].values[name], rtol=1e-9, atol=1e-12)


REFUSED = {
    "labels alone": (lambda m, g, b: mm.metrics.robustness(m, g, b, tuple(b)), ValueError, "no label, which"),
    "a level": (lambda m, g, b: mm.metrics.robustness(m, g, b, noise=(-1,)), ValueError, "noise"),
    "no levels": (lambda m, g, b: mm.metrics.robustness(m, g, b, noise=1.0), TypeError, "expected noise to be levels"),
    "another shape": (
        lambda m, g, b: mm.metrics.robustness(m, g, b, corrupt={"x": lambda v, s: v[:1]}),
        ValueError, r"corrupt\['x'\]: expected noisy values of shape \(1500, 3\)",
    ),
    "a label that is corrupted": (
        lambda m, g, b: mm.metrics.robustness(m, g, b, "x", corrupt={"x": shift}), ValueError, "unknown modality 'x'"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_answer_is_refused(case, name):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call(*case)
