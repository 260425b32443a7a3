"""Data sets: shapes, splits, binarisation, the idx format, and what is said of a wrong or missing file."""

import hashlib
import os

import numpy as np
import pooch
import pytest
import torch
from sklearn.datasets import load_digits

from pyro_mm import datasets
from pyro_mm.datasets.images import MIRRORS, _binarize
from tests.support.idx_files import idx, write


@pytest.fixture
def no_download(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(pooch, "retrieve", refuse)
    monkeypatch.delenv("PYRO_MM_DATA", raising=False)


@pytest.fixture
def tiny(monkeypatch, no_download):
    """Six images and four, with the hashes that the module is to expect; file name -> payload."""
    draw = np.random.default_rng(3).integers
    arrays = [draw(0, 256, (6, 3, 2)), draw(0, 10, 6), draw(0, 256, (4, 3, 2)), draw(0, 10, 4)]
    payloads = {file: idx(a.astype(np.uint8)) for file, a in zip(datasets.FILES, arrays, strict=True)}
    hashes = tuple(hashlib.sha256(p).hexdigest() for p in payloads.values())
    monkeypatch.setitem(datasets.SHA256, "mnist", hashes)
    return payloads


def test_digits_has_images_and_labels():
    train, test = datasets.digits()
    for batch, size in ((train, 1437), (test, 360)):
        assert batch.names == ("image", "label")
        assert batch["image"].shape == (size, 8, 8)
        assert batch["image"].dtype == torch.float32
        assert set(batch["image"].unique().tolist()) == {0.0, 1.0}
        assert batch["label"].shape == (size,)
        assert batch["label"].dtype == torch.int64
        assert bool(batch.rows)
    for first, again in zip((train, test), datasets.load("digits"), strict=True):
        assert torch.equal(first["image"], again["image"])
        assert torch.equal(first["label"], again["label"])


def test_digits_are_split_into_disjoint_parts_with_equal_shares_of_each_label():
    train, test = datasets.digits()
    data = load_digits()
    rows = lambda image, label: sorted(map(tuple, np.column_stack([image.reshape(len(label), -1), label])))  # noqa: E731
    both = [torch.cat([train[name], test[name]]).numpy() for name in ("image", "label")]
    assert rows(*both) == rows((data.images > 7).astype(np.float32), data.target)
    grey = datasets.digits(grey=True)
    levels = torch.cat([part["image"] for part in grey]).numpy() * 16
    assert rows(levels, both[1]) == rows(data.images, data.target)
    counts = torch.bincount(torch.as_tensor(data.target)) * 360 / 1797
    assert (torch.bincount(test["label"]) - counts).abs().max() < 1


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'cifar', expected one of 'digits', 'mnist', 'fashion'"):
        datasets.load("cifar")
    with pytest.raises(TypeError, match="directory"):
        datasets.load("digits", directory=".")


@pytest.mark.parametrize("shape", [(5,), (3, 2), (2, 3, 4), (0, 3)])
def test_an_idx_file_is_parsed_to_the_array_written(shape):
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    parsed = datasets.parse_idx(idx(array))
    assert parsed.dtype == np.uint8
    np.testing.assert_array_equal(parsed, array)


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "idx file of unsigned bytes"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01\x00\x00\x00\x00", "got 00 00 0d 01"),
        (idx(np.zeros((2, 3), np.uint8))[:-1], r"shape \(2, 3\) needs 6 bytes, got 5"),
        (idx(np.zeros((2, 3), np.uint8)) + b"0", "needs 6 bytes, got 7"),
        (b"\x00\x00\x08\x03\x00\x00\x00\x02", "got"),
    ],
)
def test_a_file_that_is_not_idx_is_refused(payload, message):
    with pytest.raises(ValueError, match=message):
        datasets.parse_idx(payload)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("where", ["argument", "variable", "folder itself"])
def test_mnist_files_are_found_in_each_folder_compressed_or_not(tiny, tmp_path, monkeypatch, compress, where):
    write(tiny, tmp_path if where == "folder itself" else tmp_path / "mnist", compress)
    if where == "variable":
        monkeypatch.setenv("PYRO_MM_DATA", str(tmp_path))
    train, test = datasets.load("mnist", directory=None if where == "variable" else tmp_path, binarize=None)
    for batch, images, labels in ((train, *datasets.FILES[:2]), (test, *datasets.FILES[2:])):
        np.testing.assert_array_equal((batch["image"] * 255).round(), datasets.parse_idx(tiny[images]))
        np.testing.assert_array_equal(batch["label"], datasets.parse_idx(tiny[labels]))


def test_files_are_downloaded_where_they_are_not_there(tiny, tmp_path, monkeypatch):
    write(tiny, tmp_path / "cache", compress=True)
    asked = []

    def retrieve(url, known_hash, fname, path):
        asked.append(url)
        return str(tmp_path / "cache" / url.rsplit("/", 1)[1])

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    train, test = datasets.mnist(tmp_path)
    assert (len(train), len(test)) == (6, 4)
    assert all(url.startswith("https://") for mirrors in MIRRORS.values() for url in mirrors)
    assert asked == [f"https://ossci-datasets.s3.amazonaws.com/mnist/{file}.gz" for file in datasets.FILES]


def test_the_second_mirror_is_asked_where_the_first_fails(tiny, tmp_path, monkeypatch):
    write(tiny, tmp_path / "cache", compress=True)

    def retrieve(url, known_hash, fname, path):
        if "ossci" in url:
            raise ConnectionError("no route to host")
        return str(tmp_path / "cache" / url.rsplit("/", 1)[1])

    monkeypatch.setattr(pooch, "retrieve", retrieve)
    assert len(datasets.mnist(tmp_path)[0]) == 6


def test_absent_and_offline_says_where_to_put_which_files(no_download, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no directory was given") as caught:
        datasets.fashion()
    assert isinstance(caught.value.__cause__, ConnectionError)
    for words in (
        *datasets.FILES,
        "DIRECTORY/fashion",
        "directory=DIRECTORY",
        "PYRO_MM_DATA",
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/train-images",
        "https://raw.githubusercontent.com/zalandoresearch",
    ):
        assert words in str(caught.value)
    monkeypatch.setenv("PYRO_MM_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        datasets.mnist()
    assert f"neither in {tmp_path / 'mnist'} nor in {tmp_path}" in str(caught.value)


@pytest.mark.parametrize("compress", [True, False])
def test_a_file_with_another_checksum_is_refused(tiny, tmp_path, compress):
    wrong = tiny | {datasets.FILES[3]: tiny[datasets.FILES[3]][:-1] + b"\x0b"}
    write(wrong, tmp_path / "mnist", compress)
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte of mnist: uncompressed, its SHA-256 is"):
        datasets.mnist(tmp_path)


def test_a_damaged_file_raises(tiny, tmp_path):
    write(tiny, tmp_path, compress=True)
    path = tmp_path / f"{datasets.FILES[0]}.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{datasets.FILES[0]}.gz is damaged"):
        datasets.mnist(tmp_path)


def test_binarisation(tiny, tmp_path):
    write(tiny, tmp_path)
    grey, threshold, static = (datasets.mnist(tmp_path, binarize=b)[0] for b in (None, "threshold", "static"))
    assert torch.equal(threshold["image"], (grey["image"] > 0.5).float())
    assert torch.equal(static["image"], datasets.mnist(tmp_path)[0]["image"])
    assert set(static["image"].unique().tolist()) <= {0.0, 1.0}
    with pytest.raises(ValueError, match="'stochastic'"):
        datasets.mnist(tmp_path, binarize="stochastic")


def test_static_binarisation_is_a_bernoulli_of_the_grey_value():
    # Exact where u runs over all its values: pixel of the 255 are below a pixel. 0 and 255 are certain.
    pixels = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 2000, 1)
    drawn = _binarize(pixels, "static", seed=0)
    assert drawn[0].sum() == 0
    assert drawn[255].sum() == 2000
    p = torch.arange(256) / 255
    error = (p * (1 - p) / 2000).sqrt()  # of each mean of 2000 independent draws; the seed is fixed
    assert ((drawn.mean(1) - p).abs() <= 4.5 * error).all()
    assert not torch.equal(drawn, _binarize(pixels, "static", seed=1))


def test_the_stream_of_static_binarisation_has_not_changed():
    drawn = _binarize(np.full((4, 4), 128, np.uint8), "static", seed=0)
    assert drawn.int().flatten().tolist() == [1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1]


@pytest.mark.skipif("PYRO_MM_DATA" not in os.environ, reason="PYRO_MM_DATA is not set: no idx files to read")
@pytest.mark.parametrize(("name", "mean"), [("mnist", 0.1306604762738429), ("fashion", 0.2860405969887955)])
def test_published_mnist_and_fashion_have_their_sizes_means_and_labels(name, mean):
    train, test = datasets.load(name, binarize=None)
    assert (train["image"].shape, test["image"].shape) == ((60000, 28, 28), (10000, 28, 28))
    # The well-known means of the training images.
    torch.testing.assert_close(train["image"].double().mean().item(), mean, rtol=1e-6, atol=0)
    assert train["image"].max() == 1
    assert torch.bincount(test["label"]).tolist() == ([1000] * 10 if name == "fashion" else MNIST_TEST_LABELS)
    static = datasets.load(name)[1]["image"]
    p = test["image"].double()
    error = (p * (1 - p)).sum().sqrt() / p.numel()  # of the mean of independent Bernoullis; the seed is fixed
    assert (static.double().mean() - p.mean()).abs() < 4 * error


MNIST_TEST_LABELS = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
