"""The study of critics on digits: every member trains, and its columns are what they say."""

import pytest
import torch

import pyro_mm as mm
from pyro_mm.experiments.studies import digits_critics as study


@pytest.fixture(scope="module")
def sample():
    return study.sample_data(0)


@pytest.mark.parametrize("name", study.MEMBERS)
def test_every_member_trains_and_is_measured(sample, name):
    torch.manual_seed(0)
    run = study.recipe(sample.train, study.MEMBERS[name])
    mm.fit(*run, sample.train[:256], epochs=1, batch_size=128, seed=0, progress=False, audit=False)
    found = study.measure(run, sample, 0)
    columns = {"label from image", "coherence", "agreement", "1000 MMD^2"}
    means = {f"{column}, means" for column in ("coherence", "agreement", "1000 MMD^2")}
    assert set(found) == columns | (means if name == "explicit" else set())
    assert all(0 <= found[column] <= 1 for column in columns - {"1000 MMD^2"})


def test_a_generator_of_the_test_images_is_coherent_and_near(sample):
    """Images of the wanted class, chosen by a one-hot latent: coherent up to the classifier's error."""
    by_class = [sample.test["image"][sample.test["label"] == c] for c in range(10)]
    wanted = torch.arange(10).repeat(20)
    images = torch.stack([by_class[c][i // 10 % len(by_class[c])] for i, c in enumerate(wanted.tolist())])
    assert (study._classes(sample.truth, images) == wanted).float().mean() > 0.93
    assert abs(1000 * study._discrepancy(sample.train["image"][:400], sample.test["image"])) < 5
    assert 1000 * study._discrepancy(torch.rand(400, 8, 8), sample.test["image"]) > 50
