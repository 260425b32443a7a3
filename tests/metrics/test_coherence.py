"""Coherence of stories whose draws are of known classes."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm import Batch, metrics
from pyro_mm.metrics import coherence

ROWS = 300  # more than one chunk
NOISE = 0.5  # of the modalities around their means


class Story(nn.Module):
    """a and b are both around z, b around ``sign`` times z if z is shared, else around another latent."""

    def __init__(self, sign=1.0, shared=True):
        super().__init__()
        self.sign, self.shared = sign, shared
        self.dropout = nn.Dropout(0.5)  # in training mode; never called

    def forward(self, batch):
        around = lambda z: dist.Normal(z[..., None].expand(*z.shape, 2), NOISE).to_event(1)  # noqa: E731
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            other = self.sign * z if self.shared else pyro.sample("other", dist.Normal(0.0, 1.0))
            batch.observe("a", around, z)
            batch.observe("b", around, other)


class Sees(nn.Module):
    """z is what a's first number is, give or take a scale."""

    def __init__(self, scale=1e-3):
        super().__init__()
        self.scale = scale

    def forward(self, batch):
        assert batch.presence("b") is False  # the target
        with batch.plate():
            pyro.sample("z", dist.Normal(batch["a"][:, 0], self.scale))


def sign(x):
    """Class 1 where the mean is positive, of event shape (2,)."""
    assert x.dim() == 2 and len(x) <= coherence.SAMPLES_PER_PASS
    return torch.stack([torch.zeros(len(x)), x.mean(-1)], -1)


def data(rows=ROWS):
    a = torch.linspace(-2, 2, rows)[:, None].expand(-1, 2).clone()
    return Batch({"a": a, "b": torch.randn(rows, 2)})


def test_the_share_of_the_right_class_and_its_error():
    batch, wrong = data(), torch.arange(ROWS) % 4 == 0
    labels = ((batch["a"][:, 0] > 0) ^ wrong).long()
    share = metrics.cross_modal_coherence(Story(), Sees(), batch, "b", "a", sign, labels, num_samples=3)
    # rows near 0 are as wide as a hundredth of the distance between two: none is on the wrong side
    assert share.value == pytest.approx(0.75) and share.size == ROWS
    assert share.standard_error == pytest.approx(math.sqrt(0.75 * 0.25 / (ROWS - 1)))
    assert str(share) == "75.0% ± 2.5% of 300"
    flipped = metrics.cross_modal_coherence(Story(-1.0), Sees(), batch, "b", "a", sign, labels)
    assert flipped.value == pytest.approx(0.25)


@pytest.mark.parametrize("mean", [True, False])
def test_draws_of_a_row_share_its_label(mean):
    """P(x_b > 0) is Phi(a / s), s the scale of z, or of the mean of two numbers around it.

    With S draws of each row, S a multiple of no chunk, the error of the estimate is sqrt(sum p (1 - p) / S) / N, about
    0.0019: 4 of them, 1 failure in 16,000 seeds, of which one is used. The two expectations are 6 of them apart.
    """
    labels, draws = torch.ones(60), 600
    batch = Batch({"a": torch.linspace(0.2, 2, 60)[:, None].expand(-1, 2), "b": torch.zeros(60, 2)})
    share = metrics.cross_modal_coherence(
        Story(), Sees(1.0), batch, "b", ["a"], sign, labels, num_samples=draws, mean=mean, seed=1
    )
    p = dist.Normal(0.0, 1.0).cdf(batch["a"][:, 0] / (1 if mean else math.sqrt(1 + NOISE**2 / 2)))
    error = (p * (1 - p) / draws).sum().sqrt() / 60
    assert abs(share.value - p.mean()) < 4 * error
    # of rows, not of draws: about the spread of p over rows
    assert share.standard_error == pytest.approx(p.std().item() / 60**0.5, rel=0.05) and share.size == 60


def test_rows_without_what_is_given_are_left_out():
    full = data(8)
    batch = Batch({"a": full["a"], "b": full["b"]}, {"a": torch.arange(8) % 2 == 0, "b": torch.arange(8) < 2})
    labels = torch.where(torch.arange(8) % 2 == 0, (full["a"][:, 0] > 0).long(), 7)
    share = metrics.cross_modal_coherence(Story(), Sees(), batch, "b", "a", sign, labels)
    assert (share.value, share.size) == (1.0, 4)
    with pytest.raises(ValueError, match="no row has all given modalities: a"):
        metrics.cross_modal_coherence(Story(), Sees(), batch.without("a"), "b", "a", sign, labels)


def test_coherence_repeats_by_its_seed_and_restores_modes():
    batch, labels = data(20), torch.ones(20)
    model, guide = Story(), Sees(1.0)
    before = torch.get_rng_state()
    ask = lambda seed: metrics.cross_modal_coherence(  # noqa: E731
        model, guide, batch, "b", "a", sign, labels, num_samples=7, seed=seed
    )
    joint = lambda seed: metrics.joint_coherence(  # noqa: E731
        Story(shared=False), batch, {"a": sign, "b": sign}, 150, seed=seed
    )
    for of in (ask, joint):
        shares = [of(seed).value for seed in (0, 0, 1)]
        assert shares[0] == shares[1] != shares[2]
    assert torch.equal(before, torch.get_rng_state())
    assert joint(None).value != joint(None).value and not torch.equal(before, torch.get_rng_state())
    assert model.training and guide.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"given": ["a", "b"]}, "both the target and given"),
        ({"labels": torch.ones(3)}, r"expected labels of shape \(20,\), got \(3,\)"),
        ({"num_samples": 0}, "num_samples >= 1"),
        ({"classifier": lambda x: x[:, 0]}, r"expected logits \(20, C\) from the classifier of 'b', got \(20,\)"),
    ],
)
def test_coherence_refuses_targets_and_labels_that_do_not_fit(change, message):
    right = {"target": "b", "given": "a", "classifier": sign, "labels": torch.ones(20)}
    with pytest.raises(ValueError, match=message):
        metrics.cross_modal_coherence(Story(), Sees(), data(20), **(right | change))


def test_joint_draws_agree_or_do_not():
    like, classifiers = data(3), {"a": sign, "b": sign}
    together = metrics.joint_coherence(Story(), like, classifiers, ROWS)
    apart = metrics.joint_coherence(Story(-1.0), like, classifiers, ROWS)
    assert together == metrics.Share(1.0, 0.0, ROWS) and apart == metrics.Share(0.0, 0.0, ROWS)


def test_independent_draws_agree_by_chance():
    """One half: n = 2000, error 0.011, 4 of them; 1 failure in 16,000 seeds, of which one is used."""
    share = metrics.joint_coherence(Story(shared=False), data(3), {"a": sign, "b": sign}, 2000, seed=0)
    assert abs(share.value - 0.5) < 4 * 0.5 / 2000**0.5
    assert share.standard_error == pytest.approx(0.5 / 2000**0.5, rel=0.02)


@pytest.mark.parametrize("mean", [True, False])
def test_classes_of_noisy_draws(mean):
    """Given z, both signs of draws are independent: they agree with probability p^2 + (1 - p)^2, p = Phi(z / s).

    n = 4000, so that its error is below 0.008; 4 of them. The expectation by quadrature.
    """
    share = metrics.joint_coherence(Story(), data(3), {"a": sign, "b": sign}, 4000, mean=mean, seed=2)
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    normal = dist.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    p = normal.cdf(z / (NOISE / 2**0.5))
    weight = normal.log_prob(z).exp()
    expected = 1.0 if mean else ((p**2 + (1 - p) ** 2) * weight).sum() / weight.sum()
    assert abs(share.value - expected) < 4 * 0.5 / 4000**0.5
    assert mean or share.value < 0.95


def test_a_story_with_a_discrete_latent_and_a_modality_made_of_another():
    def story(batch):
        with batch.plate():
            kind = pyro.sample("kind", dist.Categorical(torch.ones(3)))
            a = batch.observe("a", dist.Normal(torch.stack([kind, kind], -1).float(), 1e-3).to_event(1))
            batch.observe("label", lambda a: dist.Categorical(logits=-9 * (a[..., :1] - torch.arange(3.0)) ** 2), a)

    like = Batch({"a": torch.zeros(2, 2), "label": torch.zeros(2).long()})
    nearest = lambda x: -((x[:, :1] - torch.arange(3.0)) ** 2)  # noqa: E731
    seen = []

    def label(probabilities):
        seen.append(probabilities.argmax(-1))
        return probabilities

    share = metrics.joint_coherence(story, like, {"a": nearest, "label": label}, 300, seed=0)
    assert (share.value, share.size) == (1.0, 300) and set(torch.cat(seen).tolist()) == {0, 1, 2}


def test_words_and_pictures_of_a_shipped_story():
    """A categorical of letters is judged by its likeliest letters: the story spells the class that z is nearest to."""
    tokens, _ = mm.datasets.words(torch.arange(10))
    spelled = 50.0 * torch.nn.functional.one_hot(tokens, 27)

    class Spell(nn.Module):
        def forward(self, z):
            return spelled[(z[..., 0] * 3 + 5).round().clamp(0, 9).long()]

    class Draw(nn.Module):
        def forward(self, z):
            return (z[..., :1] * 3 + 5).round().clamp(0, 9)

    decoders = {
        "word": mm.conditionals.Categorical(Spell(), event_shape=(6,)),
        "number": mm.conditionals.Normal(Draw(), scale=0.1),
    }
    model = mm.models.SharedLatent(dist.Normal(torch.zeros(2), 1.0).to_event(1), decoders)
    like = Batch({"word": tokens, "number": torch.zeros(10, 1)})
    digit = lambda x: -((x - torch.arange(11.0)) ** 2)  # noqa: E731
    for mean in (True, False):
        classifiers = {"word": mm.datasets.word_logits, "number": digit}
        assert metrics.joint_coherence(model, like, classifiers, 50, mean=mean, seed=0).value == 1.0


def test_joint_coherence_refuses_one_classifier():
    with pytest.raises(ValueError, match=r"two modalities or more, got \['a'\]"):
        metrics.joint_coherence(Story(), data(3), {"a": sign})
    with pytest.raises(ValueError, match="n >= 1"):
        metrics.joint_coherence(Story(), data(3), {"a": sign, "b": sign}, 0)
