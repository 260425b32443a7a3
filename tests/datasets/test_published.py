"""Loaders of public formats, on tiny files of the same format that each test writes."""

import hashlib

import numpy as np
import pyro.distributions as dist
import pytest
import scipy.io
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm import datasets
from pyro_mm.training.loader import MinibatchLoader
from tests.support.idx_files import idx, write
from tests.support.published_files import write_celeba, write_polymnist, write_svhn


@pytest.fixture(autouse=True)
def no_shared_data(monkeypatch):
    monkeypatch.delenv("PYRO_MM_DATA", raising=False)


# -- SVHN -----------------------------------------------------------------------------------------------------------


def test_svhn_is_read_from_its_matlab_files(tmp_path):
    held = write_svhn(tmp_path / "svhn")
    train, test = datasets.load("svhn", directory=tmp_path)
    assert train["label"].tolist() == [1, 0, 3, 3, 2] and test["label"].tolist() == [0, 9, 1]
    assert (train["image"].dtype, train["label"].dtype) == (torch.float32, torch.int64)
    for batch, x in zip((train, test), held, strict=True):
        assert batch["image"].shape == (x.shape[3], 3, 32, 32)
        for n, row, column, colour in ((0, 3, 17, 2), (2, 31, 0, 1)):
            assert batch["image"][n, colour, row, column] == np.float32(x[row, column, colour, n]) / np.float32(255)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "z": 1}, "expected the arrays X and y, found .'X'."),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((3, 1))}, r"shape \(32, 32, 3, 3\), got uint8"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1))}, "expected X of bytes"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.array([[0], [1]])}, "labels from 1 to 10, got 0 to 1"),
    ],
)
def test_svhn_files_of_another_format_are_refused(tmp_path, arrays, message):
    write_svhn(tmp_path)
    scipy.io.savemat(tmp_path / "test_32x32.mat", arrays)
    with pytest.raises(ValueError, match=message):
        datasets.svhn(tmp_path)


def test_mnist_and_svhn_are_paired_by_label(tmp_path, monkeypatch):
    held = write_svhn(tmp_path / "svhn")
    labels = [np.array([3, 1, 0, 3, 9], np.uint8), np.array([0, 0, 9], np.uint8)]
    images = [np.full((len(y), 28, 28), np.arange(len(y))[:, None, None]).astype(np.uint8) for y in labels]
    payloads = dict(zip(datasets.FILES, map(idx, (images[0], labels[0], images[1], labels[1])), strict=True))
    hashes = tuple(hashlib.sha256(p).hexdigest() for p in payloads.values())
    monkeypatch.setitem(datasets.SHA256, "mnist", hashes)
    write(payloads, tmp_path / "mnist")
    train, test = datasets.load("mnist-svhn", directory=tmp_path, word=True)
    assert sorted(train.covariates["label"].tolist()) == [0, 1, 3, 3]
    assert sorted(test.covariates["label"].tolist()) == [0, 9]
    for part, batch in enumerate((train, test)):
        label = batch.covariates["label"]
        written = (batch["mnist"][:, 5, 5] * 255).round().long().numpy()
        np.testing.assert_array_equal(labels[part][written], label)
        houses = np.moveaxis(held[part], -1, 0).transpose(0, 3, 1, 2)
        found = [int(np.flatnonzero((houses == h).all((1, 2, 3)))[0]) for h in (batch["svhn"] * 255).round().numpy()]
        original = ((1, 0, 3, 3, 2), (0, 9, 1))[part]
        assert [original[f] for f in found] == label.tolist() and len(set(found)) == batch.size
    assert datasets.mnist_svhn(tmp_path)[0].names == ("mnist", "svhn") and train.names[2] == "word"


# -- CelebA ---------------------------------------------------------------------------------------------------------


def test_celeba_is_read_with_its_attributes_and_parts(tmp_path):
    colours, has = write_celeba(tmp_path / "celeba")
    train, test = datasets.load("celeba", directory=tmp_path)
    assert train.names == ("image", "attributes") and (train.size, test.size) == (5, 2)
    assert train["image"].shape == (5, 3, 64, 64) and train["image"].dtype == torch.float32
    for batch, rows in ((train, [0, 1, 3, 5, 6]), (test, [4, 7])):
        np.testing.assert_array_equal(batch["attributes"], (has[rows] + 1) / 2)
        # away from the border of the square, where JPEG blurs, a face has its colour to within rounding
        middle = batch["image"][:, :, 6:-6, 6:-6]
        np.testing.assert_allclose(middle.mean((2, 3)), colours[rows], atol=3 / 255)
        assert middle.flatten(2).std(-1).max() < 2 / 255
    assert (train["image"][:, 2] < 0.9).all()  # nothing of the border is left


def test_celeba_takes_size_and_attributes_and_refuses_unknown_ones(tmp_path):
    _, has = write_celeba(tmp_path)
    options = {"size": 8, "crop": None, "attributes": ["Wearing_Hat", "Bald"], "held_out": "validation"}
    train, validation = datasets.celeba(tmp_path, rows=(3, None), **options)
    assert train["image"].shape == (3, 3, 8, 8) and validation.size == 1
    np.testing.assert_array_equal(validation["attributes"], (has[[2]][:, [2, 0]] + 1) / 2)
    assert (train["image"][:, 2, 0] > 0.9).all()  # without a crop the border is there
    with pytest.raises(ValueError, match=r"unknown attributes Tall: .* has Bald, Smiling, Wearing_Hat"):
        datasets.celeba(tmp_path, attributes=["Tall"])
    with pytest.raises(ValueError, match="178 x 218 pixels: no square of side 179"):
        datasets.celeba(tmp_path, crop=179)
    with pytest.raises(ValueError, match="held_out to be one of 'test', 'validation', got 'train'"):
        datasets.celeba(tmp_path, held_out="train")


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (0, "9", "expected 9 rows, as its first line says, got 8"),
        (3, "000002.jpg 1 0 -1", "3 times -1 or 1, got '000002.jpg 1 0 -1'"),
        (3, "000002.jpg 1 -1", "3 times -1 or 1"),
        (0, "000001.jpg 1", "expected the number of rows"),
    ],
)
def test_celeba_files_of_another_format_are_refused(tmp_path, line, text, message):
    write_celeba(tmp_path)
    path = tmp_path / "list_attr_celeba.txt"
    lines = path.read_text().splitlines()
    lines[line] = text
    path.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        datasets.celeba(tmp_path)


def test_faces_come_from_disk(tmp_path):
    write_celeba(tmp_path)
    train, _ = datasets.celeba_pictures(tmp_path, size=4)
    whole = train.batch()
    assert len(train) == 5 and torch.equal(train[-1]["image"], whole["image"][[4]])
    with pytest.raises(IndexError):
        train[5]
    for workers in (0, 1):
        feed = MinibatchLoader(train.loader(2, workers=workers, seed=1), 2, torch.device("cpu"))
        assert (feed.size, len(feed)) == (5, 3)
        batches = list(feed)
        assert [b.size for b in batches] == [2, 2, 1] and {b.total for b in batches} == {5}
        seen = torch.cat([b["image"] for b in batches]).flatten(1)
        order = (seen[:, None] == whole["image"].flatten(1)).all(-1).nonzero()[:, 1]
        assert order.sort().values.tolist() == list(range(5)) and order.tolist() != list(range(5))
        assert torch.equal(torch.cat([b["attributes"] for b in batches]), whole["attributes"][order])
    assert torch.equal(next(iter(train.loader(5, shuffle=False)))["image"], whole["image"])


def test_a_pair_trains_on_faces_read_from_disk(tmp_path):
    write_celeba(tmp_path)
    train, _ = datasets.celeba_pictures(tmp_path, size=2)
    torch.manual_seed(0)
    decoders = {
        "image": mm.conditionals.Normal(mm.nn.MLP(2, 12), event_shape=(3, 2, 2), scale=0.1),
        "attributes": mm.conditionals.Bernoulli(mm.nn.MLP(2, 3)),
    }
    model = mm.models.SharedLatent(dist.Normal(torch.zeros(2), 1.0).to_event(1), decoders)
    experts = {"attributes": mm.conditionals.Normal(nn.Linear(3, 4))}
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts(experts))
    history = mm.fit(model, guide, mm.objectives.elbo(), train.loader(2, seed=0), epochs=2)
    assert len(history) == 2


def test_absent_files_of_celeba_are_named(tmp_path):
    write_celeba(tmp_path)
    (tmp_path / "img_align_celeba" / "000001.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"names 000001\.jpg, which is not in"):
        datasets.celeba(tmp_path)


# -- PolyMNIST ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["MMNIST", "."])
def test_polymnist_is_read_from_its_folders_of_views(tmp_path, folder):
    held = write_polymnist(tmp_path / folder)
    train, test = datasets.load("polymnist", directory=tmp_path)
    assert (train.size, test.size) == (6, 2) and train.names == ("m0", "m1", "m2")
    assert test.covariates["label"].tolist() == [1, 1]
    for batch, part in ((train, "train"), (test, "test")):
        names = sorted({name for p, _, name in held if p == part})
        found = []
        for m in range(3):
            stack = np.stack([held[part, m, name] for name in names]).transpose(0, 3, 1, 2)
            view = (batch[f"m{m}"] * 255).round().numpy()
            found.append([int(np.flatnonzero((stack == x).all((1, 2, 3)))[0]) for x in view])
        assert found[0] == found[1] == found[2] and sorted(found[0]) == list(range(len(names)))
        assert part == "test" or found[0] != sorted(found[0])
        assert [int(names[i].split(".")[1]) for i in found[0]] == batch.covariates["label"].tolist()
    few, _ = datasets.polymnist(tmp_path, views=2, rows=(4, 1))
    assert few.names == ("m0", "m1") and torch.equal(few["m1"], train["m1"][:4])
    assert datasets.polymnist_pictures(tmp_path)[0][0]["m0"].shape == (1, 3, 28, 28)


def test_polymnist_views_with_unlike_files_are_refused(tmp_path):
    write_polymnist(tmp_path / "MMNIST")
    with pytest.raises(FileNotFoundError, match=r"there is no .*m3 with files like 0.7.png"):
        datasets.polymnist(tmp_path, views=4)
    (tmp_path / "MMNIST" / "train" / "m2" / "1.7.png").unlink()
    with pytest.raises(ValueError, match=r"m2 and m0 do not have the same files; 1.7.png"):
        datasets.polymnist(tmp_path)
    (tmp_path / "MMNIST" / "test" / "m0" / "odd.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected files named NUMBER.CLASS.png, found odd.png"):
        datasets.polymnist(tmp_path, views=1)


# -- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "folder", "files"),
    [
        ("svhn", "svhn", ["train_32x32.mat", "test_32x32.mat"]),
        ("celeba", "celeba", ["img_align_celeba", "list_attr_celeba.txt", "list_eval_partition.txt"]),
        ("polymnist", "MMNIST", ["train", "test"]),
        ("mfeat", "multiview", ["mfeat.npz"]),
        ("nutrimouse", "multiview", ["nutrimouse.npz"]),
        ("mosi", "mosi", ["mosi_utterance.npz"]),
        ("pom", "mosi", ["pom_mfn.npz"]),
        ("mosei", "mosei", ["mosei_senti_data.pkl"]),
        ("iemocap", "iemocap", ["iemocap_data.pkl"]),
    ],
)
def test_absent_files_of_published_sets_are_named(tmp_path, monkeypatch, name, folder, files):
    with pytest.raises(FileNotFoundError, match="no directory was given"):
        datasets.load(name)
    monkeypatch.setenv("PYRO_MM_DATA", str(tmp_path))
    (tmp_path / folder).mkdir()
    if len(files) > 1:
        (tmp_path / folder / files[0]).mkdir()  # one alone is not enough, and what lacks is said
    with pytest.raises(FileNotFoundError) as caught:
        datasets.load(name)
    lacking = ", ".join(files[1:] if len(files) > 1 else files)
    assert f"which lacks {lacking})" in str(caught.value) and str(tmp_path / folder) in str(caught.value)
    assert f"put {', '.join(files)} into DIRECTORY/{folder}" in str(caught.value)
    assert "PYRO_MM_DATA" in str(caught.value)
