"""Studies of image decoders: every member trains, and its columns and pictures are what they say."""

import pytest
import torch

import pyro_mm as mm
from pyro_mm.experiments.studies import generated_images, image_decoders, jmvae_gan
from pyro_mm.experiments.studies.generated_images import kernel_widths
from pyro_mm.experiments.studies.study import Sample

OF_EACH = {"coherence", "agreement", "distance × 1000", "p-value", "coverage"}
IMPLICIT = {"critic, posterior", "critic, prior"}


@pytest.fixture(scope="module")
def sample():
    train, test = mm.datasets.digits(grey=True)
    return Sample(train, test, generated_images.train_judge(train, test, epochs=20))


@pytest.mark.parametrize("name", image_decoders.MEMBERS)
def test_every_member_trains_is_measured_and_shown(sample, name, monkeypatch):
    monkeypatch.setattr(generated_images, "PARTICLES", 4)
    torch.manual_seed(0)
    run = image_decoders.MEMBERS[name](sample.train)
    mm.fit(*run, sample.train[:256], epochs=1, batch_size=128, seed=0, progress=False, audit=False)
    few = sample._replace(test=sample.test[:120])
    found = generated_images.measure(run, few, 0)

    means = set() if name in {*IMPLICIT, "flow"} else {f"{column}, means" for column in OF_EACH}
    density = set() if name in IMPLICIT else {"log P(levels)" if name == "flow" else "log p"}
    assert set(found) == OF_EACH | {"label from image"} | means | density
    assert all(0 <= found[column][0] <= 1 for column in ("coherence", "agreement", "coverage", "label from image"))

    shown = generated_images.draw_images(run, few, 0)
    given, prior = shown["given the label"], shown["from the prior"]
    assert given.values.shape == given.truth.shape == prior.values.shape == (20, 8, 8)
    truth = sample.truth(given.truth).argmax(-1)
    assert (truth == torch.tensor([int(label) for label in given.labels])).float().mean() > 0.8


def test_the_judge_and_the_distance_know_the_test_images(sample):
    rows = sample.test
    assert (sample.truth(rows["image"]).argmax(-1) == rows["label"]).float().mean() > 0.9
    widths = kernel_widths(rows)
    options = {"kernel": "gaussian", "bandwidth": widths, "permutations": 1}
    near = mm.metrics.kernel_distance(sample.train["image"][:400].flatten(1), rows["image"].flatten(1), **options)
    far = mm.metrics.kernel_distance(torch.rand(400, 64), rows["image"].flatten(1), **options)
    assert abs(near.value) < 0.005 and far.value > 0.05


@pytest.mark.parametrize("size", [jmvae_gan.MNIST, jmvae_gan.MNIST.full])
def test_a_discriminator_is_all_that_jmvae_gan_adds(size):
    rows = mm.Batch({"image": torch.rand(4, 28, 28), "label": torch.arange(4)})
    pairs = {}
    for name, make in size.members.items():
        torch.manual_seed(0)
        pairs[name] = make(rows)
    table = pairs["JMVAE-kl"].objective
    for name, (model, guide, objective) in pairs.items():
        torch.testing.assert_close(model.state_dict(), pairs["JMVAE-kl"].model.state_dict())
        torch.testing.assert_close(guide.state_dict(), pairs["JMVAE-kl"].guide.state_dict())
        if name != "JMVAE-kl":
            assert repr(objective.table) == repr(table)
            assert objective.discriminators["image"].weight == float(name.split()[-1])
