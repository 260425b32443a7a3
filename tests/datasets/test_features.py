"""Feature sets: splits, standardisation by training rows, and the real files where they are."""

import os

import numpy as np
import pytest
import torch

from pyro_mm import datasets
from pyro_mm.datasets import features

needs_data = pytest.mark.skipif("PYRO_MM_DATA" not in os.environ, reason="PYRO_MM_DATA is not set: no files to read")


@pytest.fixture
def folder(tmp_path):
    """Small files of each set; the first feature of each view tells the row, the last one never varies."""
    rng = np.random.default_rng(0)

    def view(n, *shape):
        x = rng.normal(3, 5, (n, *shape)).astype(np.float32)
        x[..., 0], x[..., -1] = np.arange(n).reshape(-1, *[1] * (len(shape) - 1)), 0.1
        return x

    (tmp_path / "multiview").mkdir()
    digits = {name: view(30, 4) for name in features.MFEAT} | {"y": np.repeat(np.arange(3), 10).astype(np.uint8)}
    mice = {"gene": view(16, 5), "lipid": view(16, 3), "genotype": np.tile(["wt", "ppar"], 8)}
    mice["diet"] = np.repeat(["sun", "fish"], 8)
    np.savez(tmp_path / "multiview" / "mfeat.npz", **digits)
    np.savez(tmp_path / "multiview" / "nutrimouse.npz", **mice)
    return tmp_path, digits, mice


def test_mfeat_has_six_views_split_by_label(folder):
    path, digits, _ = folder
    train, test = datasets.load("mfeat", directory=path, standardise=False)
    assert (train.size, test.size, train.names) == (24, 6, features.MFEAT)
    rows = [batch["fac"][:, 0].long().numpy() for batch in (train, test)]
    assert sorted(np.concatenate(rows)) == list(range(30))
    assert np.bincount(digits["y"][rows[1]]).tolist() == [2, 2, 2]
    for batch, part in zip((train, test), rows, strict=True):
        np.testing.assert_array_equal(batch.covariates["label"], digits["y"][part])
        for name in features.MFEAT:
            np.testing.assert_array_equal(batch[name], digits[name][part])
    assert rows[0].tolist() != sorted(rows[0])
    other = datasets.mfeat(path, standardise=False, seed=1)[1]["fac"][:, 0]
    assert sorted(other.tolist()) != sorted(rows[1].tolist())


def test_features_are_standardised_by_the_training_rows(folder):
    path = folder[0]
    for name in ("mfeat", "nutrimouse"):
        raw, scaled = (datasets.load(name, directory=path, standardise=s) for s in (False, True))
        for view in raw[0].names:
            x, y = (torch.as_tensor(batch[view]).double() for batch in raw)
            mean, deviation = x.mean(0), x.var(0, correction=0).sqrt()
            deviation[-1] = 1  # does not vary: centred alone
            for batch, values in zip(scaled, (x, y), strict=True):
                assert batch[view].dtype == torch.float32 and batch.presence(view) is True
                torch.testing.assert_close(batch[view].double(), (values - mean) / deviation, rtol=1e-5, atol=1e-5)
            assert scaled[0][view][..., -1].abs().max() < 1e-6


def test_nutrimouse_keeps_every_genotype_and_diet_in_both_parts(folder):
    path, _, mice = folder
    train, test = datasets.load("nutrimouse", directory=path, standardise=False)
    assert (train.size, test.size) == (12, 4)
    for batch in (train, test):
        rows = batch["gene"][:, 0].long().numpy()
        np.testing.assert_array_equal(mice["genotype"][rows] == "wt", batch.covariates["genotype"])
        np.testing.assert_array_equal(mice["diet"][rows] == "sun", batch.covariates["diet"])
        cells = 2 * batch.covariates["genotype"] + batch.covariates["diet"]
        assert torch.bincount(cells).tolist() == [batch.size // 4] * 4


@needs_data
@pytest.mark.parametrize(
    ("name", "sizes", "shapes"),
    [
        ("mfeat", (1600, 400), {"fac": (216,), "fou": (76,), "kar": (64,), "mor": (6,), "pix": (240,), "zer": (47,)}),
        ("nutrimouse", (30, 10), {"gene": (120,), "lipid": (21,)}),
    ],
)
def test_the_published_features_have_their_sizes_and_shapes(name, sizes, shapes):
    train, test = datasets.load(name)
    assert (train.size, test.size) == sizes
    for batch in (train, test):
        assert {view: tuple(batch[view].shape[1:]) for view in batch.names} == shapes
        assert all(bool(batch[view].isfinite().all()) and batch.presence(view) is True for view in shapes)
    if name == "mfeat":
        assert torch.bincount(test.covariates["label"]).tolist() == [40] * 10
    if name == "nutrimouse":
        assert test.covariates["diet"].max() == 4 and test.covariates["genotype"].max() == 1
