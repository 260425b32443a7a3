"""The report on samples: of a pair that is right, of pairs that are not, with missing rows, sequences and classes."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm import Batch, metrics

ROWS = 240


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Classes(nn.Module):
    """A class z, which the label is, and an image of two pixels around a point of each class."""

    def __init__(self, spread=0.5, wrong=0.0, kinds=3):
        super().__init__()
        self.spread, self.wrong, self.kinds = spread, wrong, kinds
        self.scale = nn.Parameter(torch.ones(()))  # says on which device the story is

    def forward(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Categorical(torch.ones(self.kinds)))
            moved = torch.where(torch.rand(z.shape) < self.wrong, (z + 1) % 3, z)
            batch.observe("image", dist.Normal(self.scale * points(moved), self.spread).to_event(1))
            batch.observe("label", dist.Categorical(logits=30.0 * nn.functional.one_hot(z, 3).float()))


def points(z):
    return torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])[z]


def exact(batch):
    """z is the label where it is seen, and else any class."""
    with batch.plate():
        logits = nn.functional.one_hot(batch["label"], 3).float() * 30.0
        seen = batch.present["label"][..., None]
        pyro.sample("z", dist.Categorical(logits=torch.where(seen, logits, torch.zeros_like(logits))))


def judge(x):
    return -torch.cdist(x, points(torch.arange(3)))


def data(rows=ROWS):
    z = torch.arange(rows) % 3
    return Batch({"image": points(z) + 0.5 * torch.randn(rows, 2), "label": z})


@pytest.mark.parametrize("given", [(), "label"])
def test_a_right_story_has_the_values_of_equal_distributions(given):
    """p-values below 1e-3 would be 1 failure in 1000 seeds, of which one is used."""
    found = metrics.sample_quality(
        Classes(), exact, data(), "image", given, classifier=judge, labels="label", seed=0, audit=False
    )
    assert found.distance.p_value > 1e-3
    for name in ("precision", "recall", "density", "coverage"):
        assert abs(getattr(found.prdc, name) - found.equal[name]) < 5 * found.prdc.errors[name] + 0.02
    assert found.coherence.value > 0.99 and found.judge_accuracy.value > 0.99 and not found.remarks
    assert found.samples.shape == (ROWS, 2)
    assert "equal distributions" in str(found) and "in the space of values; 240 real and 240 fake rows" in repr(found)


def test_faults_of_a_story_stand_in_the_lines_that_are_for_them():
    ask = lambda story, given=(): metrics.sample_quality(  # noqa: E731
        story, exact, data(), "image", given, classifier=judge, labels="label", seed=0, audit=False
    )
    wide, few, confused = ask(Classes(3.0)), ask(Classes(kinds=2)), ask(Classes(wrong=0.3), "label")
    for found in (wide, few):
        assert found.distance.p_value == 0.001 and found.distance.value > 2 * found.distance.standard_error
    assert wide.prdc.precision < 0.7 and wide.prdc.recall > 0.9 and few.prdc.precision > 0.9 > 0.75 > few.prdc.coverage
    assert few.coherence.value > 0.99  # a class that is never generated is coherent
    assert abs(confused.coherence.value - 0.7) < 0.12  # 4 standard errors


def test_errors_of_samples_given_their_rows_are_those_of_pairs():
    """Samples that hardly leave their rows: the free permutation would find p near 1, and a wide error."""

    class Near(nn.Module):
        def forward(self, batch):
            with batch.plate():
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                batch.observe("image", dist.Normal(z, 0.1).to_event(1))
                batch.observe("clue", dist.Normal(z, 1e-3).to_event(1))

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(batch["clue"], 1e-3).to_event(1))

    z = torch.randn(ROWS, 2)
    batch = Batch({"image": z + 0.1 * torch.randn(ROWS, 2), "clue": z})
    found = metrics.sample_quality(Near(), guide, batch, "image", "clue", seed=0)
    samples = found.samples
    free = metrics.kernel_distance(batch["image"], samples, kernel="gaussian", seed=0)
    assert found.distance.p_value > 1e-3 and free.p_value > 0.99
    assert found.distance.standard_error < free.standard_error / 3


def test_rows_without_the_target_or_what_is_given_are_left_out():
    full = data()
    masks = {"image": torch.arange(ROWS) % 4 > 0, "label": torch.arange(ROWS) % 5 > 0}
    batch = Batch({name: full[name] for name in full.names}, masks)
    both = int((masks["image"] & masks["label"]).sum())
    labels = torch.where(masks["label"], full["label"], 9)
    given = {"classifier": judge, "seed": 0, "audit": False}
    found = metrics.sample_quality(Classes(), exact, batch, "image", "label", labels=labels, **given)
    assert found.distance.sizes == (both, both) and found.coherence == metrics.Share(1.0, 0.0, both)
    prior = metrics.sample_quality(Classes(), exact, batch, "image", labels="label", **given)
    assert prior.distance.sizes[0] == int(masks["image"].sum()) and prior.judge_accuracy is None
    with pytest.raises(ValueError, match="no row has all of 'image', 'label'"):
        metrics.sample_quality(Classes(), exact, batch.without("image"), "image", "label", audit=False)


def test_features_are_those_of_the_judge_or_of_a_network_and_means_are_sharper():
    batch = data()
    net, _ = metrics.classifier(batch["image"], batch["label"], batch["image"], batch["label"], epochs=2, hidden=8)
    assert torch.equal(net.layers[-1](net.features(batch["image"])), net(batch["image"]))
    ask = lambda **keywords: metrics.sample_quality(  # noqa: E731
        Classes(), exact, batch, "image", seed=0, audit=False, **keywords
    )
    found = ask(classifier=net)
    assert "polynomial" in found.table() and "gaussian" in ask().table()
    x, y = net.features(batch["image"]), net.features(found.samples)
    assert found.features == "the last hidden layer of the classifier" and found.coherence is None
    assert found.distance.value == pytest.approx(metrics.kernel_distance(x, y, permutations=1).value)
    assert found.frechet[0] == pytest.approx(metrics.frechet_distance(x, y), rel=1e-6)
    prdc = metrics.precision_recall(x, y)
    assert (found.prdc.precision, found.prdc.density) == (prdc.precision, prdc.density)
    assert ask(features=lambda x: x[:, :1]).features == "the features of the caller's network"
    assert ask(mean=True).samples.unique(dim=0).shape == (3, 2)


class Series(nn.Module):
    """Steps around z, and a word."""

    def forward(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe("series", dist.Normal(z[..., None].expand(*z.shape, 5), 0.5).to_event(1))
            batch.observe("word", dist.Categorical(torch.ones(4)))


def prior(batch):
    with batch.plate():
        pyro.sample("z", dist.Normal(torch.zeros(batch.size), 1.0))


def test_features_of_sequences_get_their_lengths_and_classes_need_features():
    lengths = 1 + torch.arange(60) % 5
    z = torch.randn(60, 1)
    batch = Batch({"series": z + 0.5 * torch.randn(60, 5), "word": torch.arange(60) % 4}, lengths={"series": lengths})

    def mean_of_valid_steps(x, lengths):
        valid = torch.arange(5) < lengths[:, None]
        return (torch.where(valid, x, 0.0).sum(1) / lengths)[:, None]

    found = metrics.sample_quality(Series(), prior, batch, "series", features=mean_of_valid_steps, seed=0)
    assert found.distance.p_value > 1e-3
    words = metrics.sample_quality(Series(), prior, batch, "word", features=lambda w: nn.functional.one_hot(w, 4))
    assert words.distance.p_value > 1e-3
    with pytest.raises(ValueError, match="'series' has sequences of unlike lengths: pass features"):
        metrics.sample_quality(Series(), prior, batch, "series")
    with pytest.raises(ValueError, match=r"'word' has whole numbers, such as classes or tokens, .* pass features"):
        metrics.sample_quality(Series(), prior, batch, "word")


def test_what_cannot_be_trusted_is_remarked():
    batch = Batch({"image": torch.randn(20, 30), "label": torch.arange(20) % 3})

    class Collapsed(nn.Module):
        def forward(self, batch):
            with batch.plate():
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                batch.observe("image", dist.Normal(torch.zeros(30).expand(*z.shape, 30), 1e-3).to_event(1))
                batch.observe("label", dist.Categorical(torch.ones(3)))

    blind = lambda x: torch.ones(len(x), 3)  # noqa: E731
    found = metrics.sample_quality(
        Collapsed(), prior, batch, "image", "label", classifier=blind, labels="label", seed=0
    )
    text = repr(found)
    assert "30 features of 20 rows: covariances are singular" in text
    assert "the generator has collapsed" in text and "the classifier has 35.0% of the real rows right" in text


REFUSED = {
    "few rows": ({"batch": data(11)}, "real data of 12 at least, got 11 rows"),
    "given itself": ({"given": ["image"]}, "'image' is both the target and given"),
    "no classifier": ({"labels": "label"}, "labels: to be compared with the verdicts of a classifier"),
    "labels of rows": ({"classifier": judge, "labels": torch.zeros(ROWS).long()}, "from the prior belongs to no row"),
    "few labels": (
        {"classifier": judge, "labels": torch.zeros(9).long(), "given": "label"}, r"labels \(N,\) of all .* got \(9,\)"
    ),
    "the target": ({"classifier": judge, "labels": "image"}, "labels: 'image' is the target itself"),
    "features": ({"features": lambda x: x[:5]}, r"expected features of shape \(240, D\), got \(5, 2\)"),
    "NaN": ({"features": lambda x: x / 0.0 * 0.0}, "features of real data that are not finite, in 240 of 240 rows"),
    "an unknown one": ({"target": "sound"}, "target: unknown modality 'sound', expected one of 'image', 'label'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_reported_on_is_refused(case):
    change, message = REFUSED[case]
    right = {"model": Classes(), "guide": exact, "batch": data(), "target": "image", "audit": False}
    with pytest.raises(ValueError, match=message):
        metrics.sample_quality(**(right | change))


def test_a_latent_that_all_rows_share_is_refused():
    def shared(program):
        def both(batch):
            pyro.sample("theta", dist.Normal(0.0, 1.0))
            program(batch)

        return both

    with pytest.raises(ValueError, match="all rows share the latent 'theta'"):
        metrics.sample_quality(shared(Classes()), shared(exact), data(), "image", audit=False)


def test_the_caller_s_modes_and_generator_are_left_as_they_were():
    story = mm.models.LinearGaussian({"x": torch.ones(3, 2)})
    guide, batch = mm.Guide(z=story.posterior), story.sample(40)
    before = torch.get_rng_state()
    first, second = (metrics.sample_quality(story, guide, batch, "x", seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(first.samples, second.samples)
    assert first.table() == second.table() and story.training
