"""Simulated images, strings and series from known factors."""

import math

import pytest
import torch

from pyro_mm.datasets import simulated

ROWS = 400


@pytest.fixture(scope="module")
def truth():
    return simulated.factors(ROWS, shared=2, private=3, steps=10, noise=0.3)


def z_score(x):
    """The mean of independent variables over its standard error."""
    return float(x.mean() / (x.std() / math.sqrt(x.numel())))


def test_rows_have_their_shapes_lengths_and_padding(truth):
    batch = truth.batch
    assert batch.names == ("image", "text", "series", "label")
    assert {n: tuple(batch[n].shape) for n in batch.names} == {
        "image": (ROWS, 12, 12), "text": (ROWS, 10), "series": (ROWS, 10, 3), "label": (ROWS,)
    }  # fmt: skip
    assert batch["text"].dtype == batch["label"].dtype == torch.int64
    assert batch["image"].unique().tolist() == [0, 1]
    assert truth.shared.shape == (ROWS, 2) and all(x.shape == (ROWS, 3) for x in truth.private.values())

    places = torch.arange(10)
    text, series = (batch.lengths[n][:, None] for n in ("text", "series"))
    assert (text.min(), text.max(), series.min(), series.max()) == (6, 10, 5, 10)
    letters = places < text - 1
    assert ((batch["text"] > 0) == letters).all() and batch["text"].max() == 8
    last = batch["series"].gather(
        1, (series - 1)[..., None].expand(-1, 1, 3)
    )  # padding is a copy of it, as in any batch
    assert ((batch["series"] == last).all(-1) == (places >= series - 1)).all()
    assert torch.bincount(batch["label"]).tolist() == [100] * 4


def test_values_have_the_means_and_the_noise_that_the_factors_give(truth):
    """Six z-scores: one beyond 4.5 with probability 4e-5. Values are independent given the factors."""
    batch, means = truth.batch, truth.means()
    p = means["image"].double()
    variance = p * (1 - p)
    for weight in (torch.ones_like(p), p - 0.5):  # as many pixels as expected, and where they are expected
        score = ((batch["image"] - p) * weight).sum() / (variance * weight.square()).sum().sqrt()
        assert abs(score) < 4.5

    valid = torch.arange(10) < batch.lengths["series"][:, None]
    noise = (batch["series"] - means["series"])[valid] / 0.3
    assert abs(z_score(noise)) < 4.5
    assert abs(z_score(noise.square() - 1)) < 4.5

    letters = batch["text"][:, :-1]
    log_p = means["text"].log()
    chosen = log_p.gather(-1, (letters - 1).clamp(min=0)[..., None])[..., 0]
    surprise = (chosen - (log_p.exp() * log_p).sum(-1))[letters > 0]
    assert abs(z_score(surprise)) < 4.5
    assert log_p.exp().sum(-1).sub(1).abs().max() < 1e-5
    assert abs(z_score(batch.lengths["text"].float() - 8)) < 4.5, "uniform from 6 to 10"


def test_a_private_factor_changes_its_modality_and_no_other(truth):
    before = truth.means()
    for swapped in truth.private:
        after = truth.means(private={swapped: truth.private[swapped].roll(1, 0)})
        assert {name for name in before if not torch.equal(before[name], after[name])} == {swapped}
    after = truth.means(shared=truth.shared.roll(1, 0))
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_either_factor_has_the_same_gain(truth):
    for name, render in truth.renderers.items():
        shared, private = (x.square().sum(-1).mean() for x in (render.loadings[..., :2], render.loadings[..., 2:]))
        torch.testing.assert_close(shared, private, msg=name)


def test_the_shared_factor_tells_the_class_and_private_ones_do_not(truth):
    """By the nearest mean of a class. Chance is .25; 200 test rows above .40 have probability 1e-6."""
    train = slice(0, ROWS // 2)

    def accuracy(x):
        labels = truth.batch["label"]
        centres = torch.stack([x[train][labels[train] == c].mean(0) for c in range(4)])
        nearest = torch.cdist(x[ROWS // 2 :], centres).argmin(1)
        return float((nearest == labels[ROWS // 2 :]).float().mean())

    assert accuracy(truth.shared) > 0.95
    assert all(accuracy(x) < 0.40 for x in truth.private.values())


def test_a_real_label_is_the_sum_of_the_shared_factor_with_noise():
    """Two z-scores: one beyond 4.5 with probability 1.4e-5."""
    truth = simulated.factors(1000, shared=4, label="real", noise=0.5)
    noise = (truth.batch["label"] - truth.shared.mean(1) * 2) / 0.5
    assert truth.batch["label"].dtype == torch.float32
    assert abs(z_score(noise)) < 4.5 and abs(z_score(noise.square() - 1)) < 4.5


def test_a_seed_gives_the_same_rows_and_parts_are_of_one_story(truth):
    again = simulated.factors(ROWS, shared=2, private=3, steps=10, noise=0.3)
    other = simulated.factors(ROWS, shared=2, private=3, steps=10, noise=0.3, part=1)
    unlike = simulated.factors(ROWS, shared=2, private=3, steps=10, noise=0.3, seed=1)
    for name in truth.batch.names:
        assert torch.equal(truth.batch[name], again.batch[name])
        assert not torch.equal(truth.batch[name], other.batch[name])
    for name, render in truth.renderers.items():
        assert torch.equal(render.loadings, other.renderers[name].loadings)
        assert not torch.equal(render.loadings, unlike.renderers[name].loadings)


@pytest.mark.parametrize("size", [1, 3])
def test_factors_have_any_size_and_about_unit_variance(size):
    """Variances of 20,000 draws: within 0.25 of 1 with certainty."""
    truth = simulated.factors(20_000, shared=size, private=size, classes=5, steps=2)
    assert truth.shared.shape == truth.private["text"].shape == (20_000, size)
    for x in (truth.shared, truth.private["image"]):
        assert ((x.var(0) - 1).abs() < 0.25).all()
    assert truth.batch.lengths["text"].unique().tolist() == [2]


def test_an_unknown_modality_is_refused(truth):
    with pytest.raises(ValueError, match="private: unknown modality 'sound', expected one of image, text, series"):
        truth.means(private={"sound": truth.shared})
