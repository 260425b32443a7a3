"""Sets put together by label, out of small files that this test writes, and out of the real ones where they are."""

import functools
import os

import numpy as np
import pytest
import torch

from pyro_mm import datasets
from pyro_mm.datasets import composites
from tests.support.small_files import PHOTOGRAPH, TEST, TRAIN

needs_data = pytest.mark.skipif("PYRO_MM_DATA" not in os.environ, reason="PYRO_MM_DATA is not set: no files to read")


def test_mnist_usps_word_pairs_digits_of_one_label_with_its_word(small):
    folder, digits, usps, *_ = small
    for part, batch in enumerate(datasets.load("mnist-usps-word", directory=folder)):
        label = batch.covariates["label"]
        written = (batch["mnist"][:, 0, 0] * 255).round().long().numpy()
        posted = (batch["usps"][:, 0, 0] * 2000).round().long().numpy() - 1000 * part
        assert len(set(written)) == len(set(posted)) == batch.size
        images, labels = digits[part]
        np.testing.assert_array_equal(labels[written], label)
        np.testing.assert_array_equal((batch["mnist"] * 255).round(), images[written])
        x, y = (usps[f"{name}_{('train', 'test')[part]}"] for name in "xy")
        np.testing.assert_array_equal(y[posted], label)
        np.testing.assert_allclose(batch["usps"], x[posted] / 2000, rtol=1e-6)
        assert batch.size == np.minimum(np.bincount(y, minlength=3), np.bincount(labels, minlength=3)).sum()
        assert datasets.spell(batch["word"]) == [("zero", "one", "two")[c] for c in label]
        assert batch.lengths["word"].tolist() == [(5, 4, 4)[c] for c in label]
        assert (batch["mnist"].dtype, batch["usps"].dtype, batch["word"].dtype) == (*[torch.float32] * 2, torch.int64)


def test_mnist_usps_has_the_same_pairs_with_the_digit_as_a_modality(small):
    spelled, labelled = (datasets.load(name, directory=small[0]) for name in ("mnist-usps-word", "mnist-usps"))
    for word, label in zip(spelled, labelled, strict=True):
        assert label.names == ("mnist", "usps", "label") and not label.covariates
        assert torch.equal(label["label"], word.covariates["label"])
        assert all(torch.equal(label[name], word[name]) for name in ("mnist", "usps"))


def test_mnist_usps_word_repeats_binarises_and_pairs_by_seed(small):
    folder = small[0]
    train, test = datasets.mnist_usps_word(folder, repeat=True, binarize="threshold")
    assert (train.size, test.size) == (TRAIN, TEST) and set(train["mnist"].unique().tolist()) == {0.0, 1.0}
    again, other = (datasets.mnist_usps_word(folder, seed=seed)[0]["usps"] for seed in (0, 1))
    assert torch.equal(again, datasets.mnist_usps_word(folder)[0]["usps"]) and not torch.equal(again, other)


def test_mnist_speech_pairs_digits_with_recordings_of_one_label(small):
    folder, _, _, sounds, _ = small
    train, test = datasets.load("mnist-speech", directory=folder)
    assert (train.size, test.size) == (14, 10) and train["sound"].shape == (14, 32, 32)
    # every training recording is in the training pairs here, so their bands have mean 0 and deviation 1
    torch.testing.assert_close(train["sound"].mean((0, 2)), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(train["sound"].std((0, 2), correction=0), torch.ones(32), atol=1e-5, rtol=0)
    assert (test["sound"].mean((0, 2)).abs() > 1e-4).any()
    # each is the one of its digit and speaker, unscaled: an affine map of the recording's own picture
    raw = datasets.log_mel(composites.clip_recordings(sounds["audio"], sounds["offsets"]))
    for batch, chosen in ((train, sounds["index"] >= 5), (test, sounds["index"] < 5)):
        rows = np.flatnonzero(chosen)
        deviation, mean = torch.std_mean(raw[sounds["index"] >= 5], (0, 2), correction=0)
        back = batch["sound"] * deviation[:, None] + mean[:, None]
        nearest = rows[torch.cdist(back.flatten(1), raw[rows].flatten(1)).argmin(1)]
        torch.testing.assert_close(back, raw[nearest], atol=1e-4, rtol=1e-4)
        assert len(set(nearest)) == batch.size
        np.testing.assert_array_equal(sounds["digit"][nearest], batch.covariates["label"])
        np.testing.assert_array_equal(sounds["speaker"][nearest] == "theo", batch.covariates["speaker"])


def test_digits_on_photographs(small):
    folder, digits, _, _, photographs = small
    batches = datasets.mnist_photographs(folder, views=3, rows=(40, 9))
    assert [batch.size for batch in batches] == [40, 9] and batches[0].names == ("m0", "m1", "m2")
    span = PHOTOGRAPH - 28 + 1
    for (images, labels), batch in zip(digits, batches, strict=True):
        used = []
        for m, name in enumerate(composites.PHOTOGRAPHS[:3]):
            view = (batch[f"m{m}"] * 255).round().numpy().astype(np.uint8)
            crops = np.stack([
                photographs[name][y : y + 28, x : x + 28] for y in range(span) for x in range(span)
            ]).transpose(0, 3, 1, 2)  # fmt: skip
            rows = []
            for row in range(batch.size):
                # where the view is a crop or the inverse of it, the mask of the inverse is the digit
                same, inverse = crops == view[row], 255 - crops == view[row]
                (place,) = np.flatnonzero((same | inverse).all((1, 2, 3)))
                mask = inverse[place, 0]
                (digit,) = np.flatnonzero(((images > 127) == mask).all((1, 2)))
                assert labels[digit] == batch.covariates["label"][row]
                rows.append(digit)
            assert len(set(rows)) == batch.size
            used.append(rows)
        assert all(len(set(row)) == 3 for row in zip(*used, strict=True))
    assert batches[0]["m0"].dtype == torch.float32 and 0 <= batches[0]["m0"].min() <= batches[0]["m0"].max() <= 1


def test_photographs_by_seed(small):
    first, other = (datasets.mnist_photographs(small[0], seed=seed) for seed in (0, 1))
    assert first[0].size == TRAIN and first[0].names == ("m0", "m1", "m2", "m3", "m4")
    again = datasets.load("mnist-photographs", directory=small[0])
    assert torch.equal(first[1]["m4"], again[1]["m4"]) and not torch.equal(first[1]["m4"], other[1]["m4"])


@pytest.mark.parametrize("rows_at_once", [1, 7, 20])
def test_views_of_photographs_are_the_same_in_chunks(rows_at_once):
    rng = np.random.default_rng(0)
    digits, photograph = rng.random((9, 28, 28)) > 0.5, rng.integers(0, 256, (40, 50, 3)).astype(np.uint8)
    rows = rng.integers(0, 9, 20)
    whole, parts = (
        composites.compose_view(digits, rows, photograph, np.random.default_rng(1), rows_at_once=size)
        for size in (1000, rows_at_once)
    )
    assert whole.shape == (20, 3, 28, 28) and torch.equal(whole, parts)


@pytest.mark.parametrize(
    ("options", "message"), [({"views": 9}, ">= 2 and <= 8"), ({"rows": (TRAIN + 1, 1)}, "1 to 70 rows")]
)
def test_impossible_options_of_photographs_are_refused(small, options, message):
    with pytest.raises(ValueError, match=message):
        datasets.mnist_photographs(small[0], **options)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist-usps-word", "usps/usps.npz"),
        ("mnist-usps", "usps/usps.npz"),
        ("mnist-speech", "fsdd/fsdd.npz"),
        ("mnist-photographs", "backgrounds/backgrounds160.npz"),
    ],
)
def test_absent_files_of_a_composite_are_named(small, monkeypatch, name, file):
    folder, part = small[0], file.split("/")
    (folder / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"put {part[1]} into DIRECTORY/{part[0]}") as caught:
        datasets.load(name, directory=folder)
    assert str(folder / part[0]) in str(caught.value)
    monkeypatch.delenv("PYRO_MM_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="no directory was given"):
        datasets.load(name)


def test_nothing_is_unpickled_and_absent_arrays_are_named(small):
    folder, _, usps, *_ = small
    np.savez(folder / "usps" / "usps.npz", **{n: a for n, a in usps.items() if n != "y_test"})
    with pytest.raises(ValueError, match="lacks y_test: it holds x_train, y_train, x_test"):
        datasets.mnist_usps_word(folder)
    np.savez(folder / "usps" / "usps.npz", **usps | {"x_train": np.array([{}, {}], object)})
    with pytest.raises(ValueError, match=r"usps.npz: expected x_train to hold numbers, found Python objects"):
        datasets.mnist_usps_word(folder)


@pytest.fixture(scope="module")
def mnist_once():
    return functools.cache(lambda directory, binarize: datasets.mnist(directory, binarize=binarize))


@needs_data
def test_the_published_composites_have_their_sizes_and_labels(mnist_once, monkeypatch):
    monkeypatch.setattr(composites, "mnist", mnist_once)
    train, test = datasets.load("mnist-usps-word")
    assert (train.size, test.size) == (7291, 2007)
    assert train["usps"].min() == 0 and train["usps"].max() == 1
    # the class frequencies of USPS as published
    assert torch.bincount(train.covariates["label"]).tolist() == USPS
    train, test = datasets.load("mnist-speech")
    assert (train.size, test.size) == (2700, 300) and train.covariates["speaker"].unique().tolist() == list(range(6))
    assert torch.bincount(test.covariates["label"]).tolist() == [30] * 10
    train, test = datasets.load("mnist-photographs", rows=(500, 50))
    assert (train.size, test.size) == (500, 50) and train["m4"].shape == (500, 3, 28, 28)


USPS = [1194, 1005, 731, 658, 652, 556, 664, 645, 542, 644]
