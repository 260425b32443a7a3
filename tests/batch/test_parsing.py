"""Data of any container and with any mark of what is missing: the same numbers, or words on what cannot be used."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

import pyro_mm as mm

NAN = math.nan


# -- what is missing ---------------------------------------------------------------------------------------------


def masked(values, mask):
    return np.ma.array(values, mask=mask)


MISSING = {
    "masked floats": (masked([1.0, 2.0, 3.0], [0, 1, 0]), [1.0, 3.0]),
    "masked integers": (masked([1, 2, 3], [0, 1, 0]), [1, 3]),
    "masked matrix": (masked([[1.0, 2], [3, 4], [5, 6]], [[0, 0], [1, 1], [0, 0]]), [[1.0, 2], [5, 6]]),
    "list of masked": ([masked([1.0, 2], [0, 0]), masked([3.0, 4], [1, 1]), np.array([5.0, 6])], [[1.0, 2], [5, 6]]),
    "masked constants": ([1.0, np.ma.masked, 3.0], [1.0, 3.0]),
    "Series": (pd.Series([1.0, NAN, 3.0], index=[7, 8, 9]), [1.0, 3.0]),
    "nullable integers": (pd.Series([1, pd.NA, 3], dtype="Int64", index=[7, 8, 9]), [1, 3]),
    "nullable floats": (pd.Series([1.5, pd.NA, 3], dtype="Float64"), [1.5, 3]),
    "nullable booleans": (pd.Series([True, pd.NA, False], dtype="boolean"), [True, False]),
    "nullable frame": (
        pd.DataFrame({"a": [1, pd.NA, 3], "b": [2, pd.NA, 6]}, dtype="Int64", index=list("xyz")), [[1, 2], [3, 6]]
    ),
    "list of NA": ([1, pd.NA, 3], [1, 3]),
    "a row of None": ([[1.0, 2], [None, None], [5.0, 6]], [[1.0, 2], [5, 6]]),
    "objects": (np.array([1, None, 3], dtype=object), [1, 3]),
    "NaN labels": (np.array([0.0, NAN, 2.0]), [0.0, 2.0]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISSING)
def test_marks_of_missing_values_make_a_row_missing(kind):
    value, expected = MISSING[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = mm.Batch({"a": value})
    assert batch.present["a"].tolist() == [True, False, True]
    assert batch["a"][[0, 2]].tolist() == expected
    filler = batch["a"][1].tolist()
    assert filler == expected[0], "filler is a present row, and nothing that a mask hides"
    if "integers" in kind or "frame" in kind:
        assert batch["a"].dtype == torch.int64


def test_masked_entries_of_a_presence_are_absent():
    batch = mm.Batch({"a": [1.0, 2.0, 3.0]}, present={"a": masked([True, True, False], [0, 1, 0])})
    assert batch.present["a"].tolist() == [True, False, False]
    batch = mm.Batch({"a": [1.0, 2.0, 3.0]}, present={"a": pd.Series([True, pd.NA, False], dtype="boolean")})
    assert batch.present["a"].tolist() == [True, False, False]


def test_numbers_that_are_dropped_beside_a_missing_one_are_counted():
    """Two of four rows hold a NaN beside 3 numbers, together 6 of 14."""
    rows = torch.arange(16.0).reshape(4, 4)
    rows[0, 1] = rows[2, 3] = NAN
    with pytest.warns(UserWarning, match=r"'a': 2 of 4 rows .* drops 42.9% of the numbers"):
        mm.Batch({"a": rows})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mm.Batch({"a": rows}, present={"a": [False, True, False, True]})  # those rows are out anyway


@pytest.mark.parametrize("value", [[1.0, NAN], masked([1, 2], [0, 1]), pd.Series([1, pd.NA], dtype="Int64"), [1, None]])
def test_a_covariate_is_known_for_every_row(value):
    with pytest.raises(ValueError, match="covariate 'u': missing or NaN in 1 of 2 rows"):
        mm.Batch({"a": [1.0, 2.0]}, covariates={"u": value})


# -- containers ----------------------------------------------------------------------------------------------------

CONTAINERS = {
    "Series": (pd.Series([1.0, 2.0], index=[3, 9]), [1.0, 2.0]),
    "frame": (pd.DataFrame({"a": [1.0, 2.0], "b": [3, 4]}), [[1.0, 3.0], [2.0, 4.0]]),
    "reversed": (np.arange(3.0)[::-1], [2.0, 1.0, 0.0]),
    "flipped": (np.arange(4.0).reshape(2, 2)[:, ::-1], [[1.0, 0.0], [3.0, 2.0]]),
    "field": (np.array([(1, 2.5), (3, 4.5)], dtype=[("i", "i1"), ("x", "<f4")])["x"], [2.5, 4.5]),
    "big-endian": (np.array([1.0, 2.0], ">f8"), [1.0, 2.0]),
    "uint16": (np.array([1, 65535], np.uint16), [1, 65535]),
    "uint32": (np.array([1, 2**32 - 1], np.uint32), [1, 2**32 - 1]),
    "longdouble": (np.array([1.0, 2.5], np.longdouble), [1.0, 2.5]),
    "torch.uint16": (torch.tensor([1, 65535], dtype=torch.uint16), [1, 65535]),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_that_torch_does_not_read_simply_work(kind):
    value, expected = CONTAINERS[kind]
    batch = mm.Batch({"a": value})
    assert batch["a"].tolist() == expected and batch.presence("a") is True
    assert (batch["a"] + 1).tolist() == (np.array(expected) + 1).tolist(), "a type that torch computes with"


def test_the_columns_of_a_frame_are_modalities():
    batch = mm.Batch(pd.DataFrame({"a": [1.5, 2.5], "b": pd.array([1, None], dtype="Int64")}))
    assert batch["a"].tolist() == [1.5, 2.5] and batch.present["b"].tolist() == [True, False]


REFUSED = {
    "sparse": (scipy.sparse.eye(3).tocsr(), "dense array, got a sparse csr_matrix of shape \\(3, 3\\)"),
    "nested": (
        torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
        "dense tensor, got a nested one",
    ),
    "sparse tensor": (torch.eye(3).to_sparse(), "dense tensor, got one of layout torch.sparse_coo"),
    "complex": (torch.zeros(3, dtype=torch.complex64), "real numbers, got torch.complex64"),
    "complex array": (np.zeros(3, complex), "real numbers, got torch.complex128"),
    "strings": (["cat", "dog"], "numbers"),
    "string array": (np.array(["cat", "dog"]), "numbers, got <U3: encode categories"),
    "categories": (pd.Series(["a", "b"], dtype="category"), "numbers, got .*encode categories"),
    "dates": (np.array(["2020-01-01"], "datetime64[D]"), "numbers, got datetime64"),
    "a string": ("text", "numbers, got 'text'"),
    "a dictionary": ({"a": 1}, "numbers, got an object of type dict"),
    "ragged": ([torch.zeros(2), torch.zeros(3)], r"rows of one shape, got rows of \(2,\), \(3,\)"),
    "a set": ({1, 2}, "numbers, got the set"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_values_that_no_batch_can_hold_are_refused_with_their_modality(kind):
    value, message = REFUSED[kind]
    with pytest.raises(TypeError, match=f"modality 'a'.*{message}"):
        mm.Batch({"a": value})
    if kind != "ragged":
        with pytest.raises(TypeError, match="covariate 'u'"):
            mm.Batch({"a": [1.0, 2.0, 3.0]}, covariates={"u": value})


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_values_without_numbers_are_refused(shape):
    with pytest.raises(ValueError, match="at least one row, of at least one number"):
        mm.Batch({"a": torch.zeros(shape)})


# -- lengths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[NAN, 1.0], [1.5, 2.0], [5, 1], [-1, 1], masked([1, 2], [0, 1])])
def test_lengths_are_integers_up_to_the_steps_that_there_are(lengths):
    with pytest.raises(ValueError, match="lengths of 'a'"):
        mm.Batch({"a": torch.zeros(2, 4, 3)}, lengths={"a": lengths})
