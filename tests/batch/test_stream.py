"""Rows of a source that is gone through one after the other."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import pyro_mm as mm
from pyro_mm.batch.joining import join_batches, join_rows
from pyro_mm.batch.shuffle_buffer import Row, ShuffleBuffer

WHOLE = mm.Batch(
    {"a": torch.arange(46.0).reshape(23, 2).double(), "b": torch.arange(23) % 3, "c": torch.ones(23, 3)},
    {"b": torch.arange(23) % 4 > 0},
    covariates={"u": torch.arange(23)},
    lengths={"c": torch.arange(23) % 3 + 1},
)  # fmt: skip


def chunks(sizes=(5, 1, 9, 8)):
    """Yield the rows in batches."""
    first = 0
    for size in sizes:
        yield WHOLE[first : first + size]
        first += size


def assert_same(one, other):
    assert one.names == other.names and one.size == other.size
    for name in one.names:
        there = one.present[name]
        assert torch.equal(there, other.present[name])
        assert one[name].dtype == other[name].dtype and torch.equal(one[name][there], other[name][there])
    assert all(torch.equal(one.covariates[name], other.covariates[name]) for name in one.covariates | other.covariates)
    assert all(torch.equal(one.lengths[name], other.lengths[name]) for name in one.lengths | other.lengths)


# -- joined rows ------------------------------------------------------------------------------------------------------


def test_batches_are_joined_row_by_row():
    assert_same(join_batches(list(chunks())), WHOLE)
    rows = [(batch, place) for batch in chunks() for place in range(batch.size)]
    order = torch.randperm(23)
    assert_same(join_rows([rows[i] for i in order]), WHOLE[order])


def test_a_modality_that_a_part_has_no_values_of_is_missing_there():
    parts = [mm.Batch({"a": [1.0, 2.0], "b": None}), mm.Batch({"a": [3.0], "b": [[4.0, 5.0]]})]
    joined = join_batches(parts)
    assert joined.present["b"].tolist() == [False, False, True] and joined["b"][2].tolist() == [4.0, 5.0]
    assert not join_batches(parts[:1] * 2).present["b"].any()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            mm.Batch({"a": [[1.0, 2.0]]}),
            r"'a': expected rows of one shape and type, got float32 \(\) and float",
        ),
        (mm.Batch({"a": [1]}), "float32 .* and int64"),
        (mm.Batch({"b": [1.0]}), "the same modalities, got a in one and b in another"),
        (mm.Batch({"a": [1.0]}, covariates={"u": [1]}), "the same covariates, got none in one and u in another"),
    ],
)
def test_batches_that_do_not_fit_each_other_are_refused(other, words):
    with pytest.raises(ValueError, match=words):
        join_batches([mm.Batch({"a": [1.0]}), other])


# -- the shuffle buffer -----------------------------------------------------------------------------------------------


def shuffled(rows, size, seed=0):
    return [row.number for row in ShuffleBuffer(size, seed).shuffle(iter(rows))]


@pytest.mark.parametrize("size", [2, 5, 23, 100])
def test_every_row_comes_once_in_an_order_of_the_seed(size):
    rows = [Row(number, None) for number in range(23)]
    order = shuffled(rows, size)
    assert sorted(order) == list(range(23)) and order != list(range(23))
    assert order == shuffled(rows, size) != shuffled(rows, size, seed=1)
    assert all(row - place < size for place, row in enumerate(order))  # none comes before it could have been read


def test_a_buffer_of_all_rows_gives_every_order_equally_often():
    """600 times each of 6 orders of 3 rows: chi-square of 5 degrees of freedom, exceeding 20.5 in one seed of 1,000."""
    rows = [Row(number, None) for number in range(3)]
    counts = Counter(tuple(shuffled(rows, 3, seed)) for seed in range(3600))
    assert len(counts) == 6 and sum((n - 600) ** 2 / 600 for n in counts.values()) < 20.5


def test_a_small_buffer_holds_a_row_for_a_geometric_time():
    """With 4 places a row leaves at each step with probability 1/4: 3 of 4 stay at first, with error 0.004."""
    order = shuffled([Row(number, None) for number in range(10_000)], 4)
    places = {row: place for place, row in enumerate(order)}
    waits = [places[row] - (row - 3) for row in range(4, 9_900)]  # from the first step at which it may leave
    share = sum(wait > 0 for wait in waits) / len(waits)
    assert share == pytest.approx(0.75, abs=4 * 0.0044)


def test_rows_that_have_left_the_buffer_take_no_memory():
    """Of batches of 100 rows a buffer of 10 holds a copy of its own rows, and at most two batches beside it."""
    buffer = ShuffleBuffer(10, 0)
    seen = []

    def rows():
        for first in range(0, 2000, 100):
            batch = mm.Batch({"x": torch.arange(first, first + 100)})
            for place in range(100):
                yield Row(first + place, batch, place)

    for row in buffer.shuffle(rows()):
        assert row.item["x"][row.place] == row.number
        held = {id(each.item): each.item for each in buffer._held}
        if len(seen) < 1990:  # later the last rows leave, which are not counted
            assert buffer._batches == held and sum(buffer._live.values()) == 10
        assert sum(batch.size for batch in held.values()) <= 220
        seen.append(row.number)
    assert sorted(seen) == list(range(2000))


# -- streams ----------------------------------------------------------------------------------------------------------


class Streamed(IterableDataset):
    """Rows of a stream, with a length."""

    def __iter__(self):
        return ({"a": WHOLE["a"][i], "b": None if i % 4 == 0 else int(WHOLE["b"][i])} for i in range(23))

    def __len__(self):
        return 23


SOURCES = {
    "a generator function of rows": lambda: iter(Streamed()),
    "a dataset": Streamed(),
    "a list of rows": list(Streamed()),
    "numpy": lambda: ({"a": row["a"].numpy(), "b": row["b"]} for row in Streamed()),
    "batches": chunks,
    "a list of batches": list(chunks()),
    "a loader": DataLoader(list(chunks()), batch_size=None),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_batches_of_a_stream_are_its_rows_in_order(kind):
    stream = mm.Stream(SOURCES[kind])
    found = list(stream.batches(4))
    assert [batch.size for batch in found] == [4] * 5 + [3] and len(stream) == stream.size == 23
    expected = WHOLE if found[0].covariates else mm.Batch({"a": WHOLE["a"], "b": WHOLE["b"]}, {"b": WHOLE.present["b"]})
    assert_same(join_batches(found), expected)
    assert_same(stream.head(6), expected[:6])
    assert list(map(len, (stream.head(40), stream.head(1)))) == [23, 1]


def test_other_rows_are_collated():
    """Sequences of unequal length, padded by the user's function."""

    def collate(rows):
        padded = torch.nn.utils.rnn.pad_sequence([torch.ones(n, 2) for n in rows], batch_first=True)
        return mm.Batch({"x": padded}, lengths={"x": torch.tensor(rows)})

    stream = mm.Stream([3, 1, 2], collate=collate)
    assert stream.size == 3
    assert [batch.lengths["x"].tolist() for batch in stream.batches(2)] == [[3, 1], [2]]
    with pytest.raises(TypeError, match=r"expected collate to return a pyro_mm.Batch of the rows, got None"):
        mm.Stream([3, 1], collate=lambda rows: None).head(1)
    with pytest.raises(ValueError, match="collate made a batch of 1 rows out of 2"):
        mm.Stream([3, 1], collate=lambda rows: collate(rows[:1])).head(2)


def test_a_modality_that_no_row_of_a_batch_has_keeps_its_form():
    rows = [{"a": 1.0, "b": np.ones(2, dtype=np.float32)}, {"a": 2.0, "b": None}]
    first, second = mm.Stream(rows).batches(1)
    assert second.holds("b") and second.presence("b") is False and second["b"].shape == first["b"].shape


def test_rows_are_counted_once_and_torch_goes_on_as_before():
    passes = []

    def source():
        passes.append(torch.rand(()))
        yield from chunks()

    stream = mm.Stream(source)
    torch.manual_seed(3)
    assert stream.size == 23 and len(stream) == 23
    stream.head(2)
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert torch.rand(()) == drawn
    assert len(passes) == 3  # the kind of rows, their number, the head
    assert mm.Stream(source, size=23).size == 23 and len(passes) == 3


def test_the_number_of_the_epoch_reaches_the_source():
    class Source:
        def set_epoch(self, number):
            self.number = number

        def __iter__(self):
            yield {"x": float(self.number)}

    stream = mm.Stream(Source())
    assert [next(stream.rows(epoch)).item["x"] for epoch in range(3)] == [0.0, 1.0, 2.0]


class Map(Dataset):
    """A map-style dataset."""

    def __getitem__(self, i):
        return {"x": 0.0}

    def __len__(self):
        return 3


REFUSED = {
    "a generator": (lambda: iter([1]), "over after one epoch: give the function that makes it"),
    "a dictionary": (lambda: {"x": [1.0]}, "make a pyro_mm.Batch of it"),
    "a batch": (lambda: WHOLE, "fit takes the batch itself"),
    "a dataset with places": (Map, "a map-style dataset goes into a DataLoader"),
    "a class": (lambda: Streamed, "got the class Streamed: make an object of it"),
    "a file": (lambda: "rows.csv", "got 'rows.csv'"),
    "a function of a file": (lambda: open, "a function without arguments"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_gone_through_again_is_refused(case):
    made, words = REFUSED[case]
    with pytest.raises(TypeError, match=words):
        mm.Stream(made())


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ([1.0], TypeError, "got 1.0, a float as row 0: make it one, or pass collate="),
        (
            [{"x": 1.0}, {"y": 1.0}],
            ValueError,
            "row 1 of the source has the modalities y, and the first one x: give",
        ),
        ([{"x": 1.0}, WHOLE], TypeError, "got both: row 1 comes as"),
        ([{"x": np.ones(2)}, {"x": np.ones(3)}], TypeError, "modality 'x': expected rows of one shape"),
        (lambda: None, TypeError, r"source\(\) to give rows one by one, got None from it: yield each row"),
        (lambda: {"x": 1.0}, TypeError, "yield each row"),
        ([], ValueError, "a source of one row at least"),
    ],
)
def test_rows_that_make_no_batch_are_refused(source, error, words):
    with pytest.raises(error, match=words):
        list(mm.Stream(source).batches(2)) or mm.Stream(source).head(1)


def test_an_evaluation_says_how_it_takes_a_stream():
    """By batches; the mean of all rows is that of the whole."""
    torch.manual_seed(0)
    model = mm.models.LinearGaussian({"a": torch.randn(2, 1)}, noise=0.5).double()
    pair = model, mm.Guide(z=model.posterior)
    rows = mm.Batch({"a": WHOLE["a"] / 20})
    stream = mm.Stream(lambda: ({"a": row} for row in rows["a"]))
    for evaluate in (mm.log_marginal, mm.generate, mm.check):
        with pytest.raises(TypeError, match=r"of type Stream: take its first rows, stream.head\(1000\), or call"):
            evaluate(*pair, stream) if evaluate is not mm.check else evaluate(*pair, mm.objectives.elbo(), stream)
    parts = [mm.log_marginal(*pair, batch, num_particles=2, seed=0) for batch in stream.batches(5)]
    found = torch.cat([part.log_prob for part in parts])
    torch.testing.assert_close(found, model.log_prob(rows))


def test_an_endless_source_can_be_looked_at():
    stream = mm.Stream(lambda: ({"x": float(i)} for i in itertools.count()), size=5)
    assert stream.head(3)["x"].tolist() == [0.0, 1.0, 2.0] and stream.size == 5
    assert math.isclose(sum(batch["x"].sum() for batch in itertools.islice(stream.batches(2), 2)), 6.0)
