"""Rows in any container, dtype and pattern of missing values are in a batch what they were; or an error is ours."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import pyro_mm as mm
from tests.support.properties import assert_ours, for_all, generator, number, seeds, shape
from tests.support.random_batches import FLOATS, rows


def assert_holds(batch, data, like=None):
    """Assert that a batch holds these rows and nothing else, and finite filler where they are missing."""
    assert batch.size == len(batch) == data.size and batch.names == tuple(data.names)
    for name, column in data.columns.items():
        assert np.array_equal(batch.present[name].numpy(), ~column.missing), name
        if not batch.holds(name):
            assert column.missing.all()
            continue
        values = batch[name].detach()
        assert values.dtype == data.dtypes[name] and values.shape == column.values.shape, name
        there = torch.tensor(np.broadcast_to(column.valid(), column.values.shape))
        assert torch.equal(values[there], column.tensor(values.dtype)[there]), name
        assert bool(values.isfinite().all()), name
        if column.lengths is not None and not column.missing.all():
            got = batch.lengths[name].numpy()
            assert np.array_equal(got[~column.missing], column.lengths[~column.missing])
    for name, value in data.covariates.items():
        assert np.array_equal(batch.covariates[name].numpy(), value), name


def assert_filled(batch, data, name):
    """Assert that filler is a copy of a row that has the modality, where it has no steps of its own."""
    column = data.columns[name]
    if column.lengths is not None or not batch.holds(name) or column.missing.all():
        return
    known = batch[name][torch.tensor(~column.missing)]
    for row in batch[name][torch.tensor(column.missing)]:
        assert any(torch.equal(row, other) for other in known)


@for_all(data=rows())
def test_a_batch_holds_what_it_was_given(data):
    batch = data.batch()
    assert_holds(batch, data)
    assert_holds(data.batch(), data)  # what was given is as it was
    for name in data.names:
        assert_filled(batch, data, name)
    for same in (batch.to("cpu"), batch.to(torch.device("cpu")), batch.standalone(), batch.read()):
        assert_holds(same, data)
    assert batch.names[0] in repr(batch) and batch.names[0] in batch._repr_html_()
    if not any(x.requires_grad for x in batch.parts()[1]):  # torch copies no results of a computation
        assert_holds(pickle.loads(pickle.dumps(batch)), data)
        assert_holds(copy.deepcopy(batch), data)


@for_all(data=rows(), choice=st.data())
def test_only_and_without_hide_modalities_and_nothing_else(data, choice):
    batch = data.batch()
    names = choice.draw(st.lists(st.sampled_from(data.names), unique=True))
    shown, hidden = batch.only(*names), batch.without(*names)
    for name in data.names:
        there = torch.tensor(data.present(name))
        assert torch.equal(shown.present[name], there & (name in names))
        assert torch.equal(hidden.present[name], there & (name not in names))
        if batch.holds(name):
            assert torch.equal(shown[name], batch[name]) and torch.equal(hidden[name], batch[name])
    any_of_them = np.stack([data.present(n) & (n in names) for n in data.names]).any(0)
    assert np.array_equal(np.broadcast_to(np.asarray(shown.rows), data.size), any_of_them)
    assert np.array_equal(shown.having().numpy(), any_of_them)
    assert_holds(batch, data)


@st.composite
def row_keys(draw, size):
    """A key of rows, and the rows that NumPy selects by it."""
    kind = draw(st.sampled_from(["slice", "mask", "index", "row"]))
    places = np.arange(size)
    if kind == "slice":
        ends = st.none() | st.integers(-size - 2, size + 2)
        key = slice(draw(ends), draw(ends), draw(st.none() | st.integers(1, 3)))
        return key, places[key]
    if kind == "row":
        row = draw(st.integers(-size, size - 1))
        return draw(st.sampled_from([row, np.int64(row), torch.tensor(row)])), places[[row]]
    if kind == "mask":
        key = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    else:
        key = draw(st.lists(st.integers(-size, size - 1), max_size=2 * size))
    array = np.array(key, dtype=bool if kind == "mask" else np.int64)
    form = draw(st.sampled_from([list, tuple, np.array, torch.tensor, "int32"]))
    if form == "int32":
        given = array if kind == "mask" else array.astype(np.int32)
    elif form in (list, tuple):
        given = form(key)
    else:
        given = form(array)
    return given, places[array]


@for_all(data=rows(), choice=st.data())
def test_rows_are_taken_as_numpy_takes_them(data, choice):
    batch = data.batch()
    key, places = choice.draw(row_keys(data.size))
    expected = data.take(places)
    assert len(batch[key]) == len(places)
    if len(places) == 0:
        return
    assert_holds(batch[key], expected)
    assert_holds(batch.block(key), expected)
    part = batch.subsample(key)
    assert_holds(part, expected)
    assert part.total == data.size and part._index.numpy().tolist() == (places % data.size).tolist()
    again, places = choice.draw(row_keys(len(places)))
    if len(places):
        assert_holds(batch[key][again], expected.take(places))


@for_all(data=rows(plain=True, most=2), beyond=st.integers(0, 3), below=st.booleans())
def test_a_row_beyond_the_end_is_an_index_error(data, beyond, below):
    batch = data.batch()
    row = -data.size - 1 - beyond if below else data.size + beyond
    for key in (row, [0, row], torch.tensor([row])):
        for take in (batch.__getitem__, batch.subsample, batch.block):
            with pytest.raises(IndexError):
                take(key)


@for_all(data=rows(plain=True), extra=st.integers(0, 3))
def test_padding_rows_look_like_the_first_one_and_do_not_count(data, extra):
    padded = data.batch().padded(data.size + extra)
    assert_holds(padded, data.take(np.r_[np.arange(data.size), np.zeros(extra, int)]))
    any_of_them = np.stack([data.present(n) for n in data.names]).any(0)
    counted = np.broadcast_to(np.asarray(padded.rows), padded.size)
    assert counted[: data.size].tolist() == any_of_them.tolist() and not counted[data.size :].any()


@for_all(data=rows(plain=True), choice=st.data())
def test_parts_of_a_batch_put_together_are_the_batch(data, choice):
    batch = data.batch()
    cut = choice.draw(st.integers(0, data.size))
    parts = [part for part in (batch[:cut], batch[cut:]) if len(part)]
    held = [name for name in data.names if batch.holds(name)]
    whole = mm.Batch(
        {name: torch.cat([part[name] for part in parts]) for name in held},
        {name: torch.cat([part.present[name] for part in parts]) for name in held},
        {name: torch.cat([part.covariates[name] for part in parts]) for name in data.covariates},
        {name: torch.cat([part.lengths[name] for part in parts]) for name in batch.lengths},
    )
    assert_holds(whole, data)

    new = torch.randn(data.size, 2)
    replaced = whole.replaced({held[0]: new})
    assert torch.equal(replaced[held[0]], new)
    assert torch.equal(replaced.present[held[0]], batch.present[held[0]])
    assert_holds(whole, data)


# -- mistakes -------------------------------------------------------------------------------------------------------


def refused(call, *words):
    try:
        call()
    except Exception as error:
        assert_ours(error, *words)
    else:
        raise AssertionError("no error")


def faults(data, name, rng):
    """Return name of a mistake -> arguments of a batch with it, and what the error has to say."""
    column, size = data.columns[name], data.size
    good, tensor = data.arguments, column.tensor()
    said = rf"{name!r}"

    def values(value):
        return {**good, "values": {**good["values"], name: value}}

    def mask(value):
        return {**good, "present": {**good["present"], name: value}}

    event = column.event
    ragged = [np.zeros(event), *[np.zeros((*event, 2))] * max(1, size - 1)]
    found = {
        "one more row": (values(torch.cat([tensor, tensor[:1]])), ["expected", said, number(size + 1)]),
        "no row": (values(tensor[:0]), [said, "expected at least one row", shape((0, *event))]),
        "no number": (values(torch.zeros(size, 0)), [said, "expected .* one number", shape((size, 0))]),
        "a number": (values(1.5), [said, "expected", "single number"]),
        "a string": (values("ab"), [said, "expected numbers", "'ab'"]),
        "strings": (values(np.array(["a"] * size)), [said, "expected numbers", "U1"]),
        "complex": (values(torch.zeros(size, dtype=torch.complex64)), [said, "expected real", "complex64"]),
        "sparse": (values(torch.ones(size, 2).to_sparse()), [said, "expected a dense", "sparse"]),
        "a mapping": (values({"x": 1}), [said, "expected numbers"]),
        "rows of several shapes": (values(ragged), [said, "expected rows of one shape", shape(event)]),
        "a mask of integers": (mask(torch.ones(size, dtype=torch.long)), [said, "expected torch.bool", "int64"]),
        "a mask of more rows": (mask([True] * (size + 1)), [said, shape((size,)), shape((size + 1,))]),
        "a mask of two dimensions": (mask(torch.ones(size, 2).bool()), [said, shape((size,)), shape((size, 2))]),
        "a mask of nothing": (mask([None] * size), [said, "expected torch.bool", "nothing"]),
        "unknown in present": ({**good, "present": {"other": [True] * size}}, ["'other'", "holds", said]),
        "unknown in lengths": ({**good, "lengths": {"other": [1] * size}}, ["'other'", "holds", said]),
        "the name of a plate": ({**good, "values": {"data": tensor, **good["values"]}}, ["'data'", "plate"]),
        "a number for a name": ({**good, "values": {3: tensor, **good["values"]}}, ["names", "3"]),
        "values in a list": ({**good, "values": [tensor]}, ["expected values", "list"]),
        "a NaN in a covariate": ({**good, "covariates": {"v": [float("nan")] * size}}, ["'v'", "NaN", str(size)]),
        "a covariate of more rows": (
            {**good, "covariates": {"v": torch.zeros(size + 1)}},
            ["'?covariate v", str(size)],
        ),
        "no covariate": ({**good, "covariates": {"v": None}}, ["'v'", "expected", "None"]),
    }
    if len(event) > 0:
        steps = event[0]
        low, high = rng.integers(-3, 0), rng.integers(steps + 1, steps + 9)

        def lengths(*given):
            return {**good, "lengths": {**good["lengths"], name: list(given)}}

        found |= {
            "too long": (lengths(*[high] * size), [said, f"0 to {steps}", number(high)]),
            "negative lengths": (lengths(*[low] * size), [said, f"0 to {steps}", number(low)]),
            "half a step": (lengths(*[0.5] * size), [said, "integers"]),
            "lengths of more rows": (lengths(*[1] * (size + 1)), [said, number(size), number(size + 1)]),
        }
    else:
        found["lengths of numbers"] = ({**good, "lengths": {name: [1] * size}}, [said, "expected seq", shape((size,))])
    return found


@for_all(data=rows(plain=True, least=2), seed=seeds, choice=st.data())
def test_a_mistake_in_a_batch_is_named(data, seed, choice):
    name = choice.draw(st.sampled_from(data.names))
    found = faults(data, name, generator(seed))
    arguments, words = found[choice.draw(st.sampled_from(sorted(found)))]
    refused(lambda: mm.Batch(**arguments), *words)


@for_all(data=rows(plain=True, most=2), choice=st.data())
def test_a_wrong_key_of_rows_is_named(data, choice):
    batch, size = data.batch(), data.size
    found = {
        "a mask of more rows": ([True] * (size + 1), ["expected", number(size), number(size + 1)]),
        "fractions": ([0.5], ["expected", "0.5"]),
        "a fraction": (0.5, ["expected", "0.5"]),
        "True": (True, ["expected", "True"]),
        "nothing": (None, ["expected", "None"]),
        "an ellipsis": (..., ["expected", "llipsis"]),
        "two dimensions": (torch.zeros(1, 1).long(), ["expected", shape((1, 1))]),
        "a set": ({0}, ["expected", r"\{0\}"]),
        "rows of strings": (["0"], ["expected", "'0'"]),
    }
    key, words = found[choice.draw(st.sampled_from(sorted(found)))]
    for call in (lambda: batch[key], lambda: batch.subsample(key), lambda: batch.block(key)):
        refused(call, *words)


@for_all(data=rows(plain=True, dtypes=FLOATS, kinds=["real"], most=2))
def test_a_nan_anywhere_in_a_row_makes_it_missing(data):
    name = data.names[0]
    column = data.columns[name]
    values = column.tensor()
    values.reshape(data.size, -1)[0, -1] = torch.nan
    batch = mm.Batch({name: values})
    assert batch.present[name].tolist() == [False] + [True] * (data.size - 1)
    assert bool(batch[name].isfinite().all())
