"""Columns in files: rows are read as they are taken, and the numbers are those of the same rows in memory."""

import copy
import pickle

import h5py
import numpy as np
import pytest
import torch

import pyro_mm as mm
from pyro_mm.batch.stored import StoredColumn, is_stored
from tests.support.stored_arrays import RowsOnly


@pytest.fixture(params=["memmap", "h5py", "rows only"])
def store(request, tmp_path):
    """Return a function that stores an array by one of the libraries."""

    def write(values, name="x"):
        values = np.asarray(values)
        if request.param == "rows only":
            return RowsOnly(values)
        if request.param == "h5py":
            file = h5py.File(tmp_path / f"{name}.h5", "w")
            file[name] = values
            file.close()
            return h5py.File(tmp_path / f"{name}.h5", "r")[name]
        array = np.memmap(tmp_path / name, values.dtype, "w+", shape=values.shape)
        array[:] = values
        return array

    return write


def equal(one, other):
    assert one.parts()[0] == other.parts()[0]
    assert all(map(torch.equal, one.parts()[1], other.parts()[1]))


def test_rows_are_those_in_memory(store):
    """Values, filler, padding, covariates; by slices, masks, and row numbers in any order, more than once."""
    rng = np.random.default_rng(0)
    x, t, c = rng.normal(size=(20, 3)), rng.integers(1, 9, (20, 5, 2), dtype=np.uint16), rng.normal(size=(20, 2))
    present = {"x": np.arange(20) % 4 != 0, "t": np.arange(20) % 3 != 1}
    lengths = {"t": np.arange(20) % 6}
    known = mm.Batch({"x": x, "t": t}, present, {"c": c}, lengths)
    batch = mm.Batch({"x": store(x), "t": store(t, "t")}, present, {"c": store(c, "c")}, lengths)
    assert batch.is_stored and not known.is_stored and repr(batch) == repr(known)
    assert (batch["t"].shape, batch["t"].dtype, len(batch["x"])) == (known["t"].shape, torch.int32, 20)
    for rows in (
        slice(3, 9),
        slice(None, None, 3),
        [4, -1, 4, 0],
        torch.arange(20) % 2 == 0,
        torch.arange(7, 3, -1),
        5,
    ):
        equal(batch[rows], known[rows])
    equal(batch.read(), known)
    equal(batch.subsample(torch.tensor([7, 2])), known.subsample(torch.tensor([7, 2])))
    equal(batch.only("x").block(slice(2, 5)), known.only("x").block(slice(2, 5)))
    assert "in a file" in batch._repr_html_() and known.read() is known
    blocks = list(batch["x"].blocks())
    assert torch.equal(torch.cat([x for _, x in blocks]), known["x"])


def test_a_row_that_is_not_there_has_words(store):
    x = np.ones((6, 2), "float32")
    x[4, 1] = np.nan
    batch = mm.Batch({"x": store(x)})
    assert batch[:4]["x"].sum() == 8
    with pytest.raises(ValueError, match=r"modality 'x' has a NaN in row 4 of its file, .*datasets.complete_rows"):
        batch[torch.tensor([2, 4])]
    with pytest.raises(IndexError):
        batch["x"][[6]]
    present = mm.datasets.complete_rows(store(x, "again"), rows_at_once=2)
    assert present.tolist() == [True] * 4 + [False, True]
    assert mm.Batch({"x": store(x, "third")}, {"x": present})[[4]]["x"].tolist() == [[1, 1]]


def test_a_column_is_no_tensor(store):
    batch = mm.Batch({"x": store(np.ones((6, 2)))})
    for act in (
        lambda x: torch.exp(x),
        lambda x: x.mean(),
        lambda x: np.asarray(x),
        lambda x: torch.mul(torch.ones(2), x),
    ):
        with pytest.raises(TypeError, match=r"modality 'x' is in a file, and only its rows .* batch\[:100\], or read"):
            act(batch["x"])
    assert not hasattr(batch["x"], "isna")


def test_other_processes_open_the_file_again(store, tmp_path):
    values = np.arange(12.0).reshape(6, 2)
    array = store(values)
    if isinstance(array, np.memmap):
        array = array[2:]  # another offset than that of the file
    column = StoredColumn("x", array)
    restored = pickle.loads(pickle.dumps(column))
    assert torch.equal(restored[:], column[:]) and torch.equal(copy.deepcopy(mm.Batch({"x": array}))["x"][:], column[:])
    if not isinstance(array, RowsOnly):
        assert len(pickle.dumps(column)) < 1000


def test_arrays_that_are_stored_and_others():
    class Chunked(RowsOnly):
        chunks = (2,)

        def __array__(self):
            raise AssertionError("read whole")

    assert is_stored(Chunked(np.ones(3))) and is_stored(RowsOnly(np.ones(3)))
    for value in (np.ones(3), torch.ones(3), [1, 2], np.float64(2), "abc", None, np.ma.ones(3)):
        assert not is_stored(value)
    with pytest.raises(TypeError, match="modality 'x': expected numbers, got <U1"):
        mm.Batch({"x": RowsOnly(np.array(["a", "b"]))})
    with pytest.raises(ValueError, match="at least one row, of at least one number, got shape"):
        mm.Batch({"x": RowsOnly(np.ones((0, 2)))})
    with pytest.raises(ValueError, match="expected as many rows in every modality"):
        mm.Batch({"x": RowsOnly(np.ones((3, 2))), "y": torch.ones(4)})
    wrong = RowsOnly(np.ones((4, 2)))
    wrong.shape = (4, 3)
    with pytest.raises(ValueError, match=r"expected rows of shape \(3,\), .* got 2 rows as \(2, 2\) from it"):
        mm.Batch({"x": wrong})[:2]
    with pytest.raises(TypeError, match="expected an array with shape, dtype and rows by slices, got"):
        mm.datasets.complete_rows([1.0])
