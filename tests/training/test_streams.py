"""Trainings on streams: the numbers of the same rows in memory, whoever reads them."""

import itertools
import math
import os
import random

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Sampler

import pyro_mm as mm
from pyro_mm.training.stream_loader import StreamLoader
from pyro_mm.utils.global_state import override_validation
from tests.support.exact_training import linear_pair, log_likelihood, parameters, rows, without_inductor
from tests.support.training_pair import pair

CPU = torch.device("cpu")
N = 23
MAIN = os.getpid()
ROWS = rows(N)
SGD = lambda ps: torch.optim.SGD(ps, 0.01, momentum=0.5)  # noqa: E731


def single_rows(batch=ROWS):
    """A source of rows one by one, as mappings."""

    def source():
        for i in range(batch.size):
            yield {name: batch[name][i] if batch.present[name][i] else None for name in batch.names}

    return source


def chunks(batch=ROWS, size=4):
    """A source of rows in batches."""
    return lambda: (batch[first : first + size] for first in range(0, batch.size, size))


def chain(parts):
    """Parts one after the other."""
    return [x for part in parts for x in part]


def epoch_of(loader, *arguments):
    """The places of the rows of an epoch, minibatch by minibatch; none of one that does not count."""
    loader.order = torch.Generator().manual_seed(5)
    found = []
    for batch in loader.epoch(*arguments):
        there = batch.present["a"]
        assert batch.total == N and torch.equal(batch["a"][there], ROWS["a"][batch._index][there])
        found.append(batch._index.tolist() if loader.count(batch) else [])
    return found


# -- the loader -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [single_rows, chunks])
@pytest.mark.parametrize("buffer", [1, 6, 1000])
def test_rows_are_shared_out_among_processes_and_none_is_lost_or_given_twice(source, buffer):
    """The union over processes of a minibatch is that of one process with as many rows."""
    stream = mm.Stream(source(), size=N, buffer=buffer)
    stream.head(N)  # as a training does, to know the form of a modality that a minibatch lacks
    for batch_size, world, drop_last in itertools.product((1, 4, 8, 30), (1, 2, 3), (False, True)):
        if drop_last and batch_size * world > N:
            continue
        shares = [StreamLoader(stream, batch_size, CPU, 0, drop_last, (rank, world)) for rank in range(world)]
        found = [epoch_of(loader) for loader in shares]
        assert all(len(each) == len(loader) for each, loader in zip(found, shares, strict=True))
        together = [sorted(chain(parts)) for parts in zip(*found, strict=True)]
        whole = epoch_of(StreamLoader(stream, min(N, batch_size) * world, CPU, 0, drop_last))
        assert together == list(map(sorted, whole))
        if not drop_last:
            assert sorted(chain(together)) == list(range(N))
        for each, loader in zip(found, shares, strict=True):
            assert loader.smallest == min((len(part) for part in each if part), default=1)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("workers", "world"), [(1, 1), (2, 2), (3, 1)])
def test_the_order_does_not_depend_on_the_workers(workers, world):
    stream = mm.Stream(chunks(), size=N, buffer=6)
    for rank in range(world):
        alone, shared = (StreamLoader(stream, 4, CPU, n, None, (rank, world)) for n in (0, workers))
        assert epoch_of(alone) == epoch_of(shared)
        assert epoch_of(alone)[1:] == epoch_of(shared, 0, 1)


def test_the_order_differs_from_epoch_to_epoch_and_goes_on_within_one():
    loader = StreamLoader(mm.Stream(single_rows(), buffer=6), 4, CPU)
    torch.manual_seed(0)
    first, second = ([batch._index.tolist() for batch in loader.epoch(number)] for number in range(2))
    assert first != second and sorted(chain(first)) == sorted(chain(second))
    for skip in range(len(loader) + 1):
        torch.manual_seed(0)
        assert [batch._index.tolist() for batch in loader.epoch(0, skip)] == first[skip:]


def test_rows_are_collated_only_where_their_minibatch_is_made():
    made = []

    def collate(numbers):
        made.append(numbers)
        return ROWS[torch.tensor(numbers)]

    stream = mm.Stream(range(N), buffer=6, collate=collate)
    for rank in range(2):
        made.clear()
        found = epoch_of(StreamLoader(stream, 4, CPU, 0, None, (rank, 2)))
        assert made == found and len(chain(made)) == len(range(rank, N, 2))


def test_rows_for_validation_keep_the_order_of_the_source():
    loader = StreamLoader(mm.Stream(single_rows()), 4, CPU, shuffles=False)
    assert chain(batch._index.tolist() for batch in loader) == list(range(N))


# -- trainings --------------------------------------------------------------------------------------------------------


def train(train, *, devices=1, make=linear_pair, objective=log_likelihood, **options):
    model, guide = make()
    settings = {"seed": 0, "progress": False, "optimizer": SGD, "epochs": 3, "batch_size": 5} | options
    history = mm.fit(model, guide, objective, train, devices=devices, **settings)
    return history.to_dict(), parameters(model, guide)


def assert_equal(one, other, atol=1e-12):
    assert one[0].keys() == other[0].keys()
    for name, column in one[0].items():
        assert other[0][name] == pytest.approx(column, abs=atol)
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=atol)


def double_pair():
    torch.manual_seed(0)
    model, guide = pair()
    return model.double(), guide.double()


class Listed(Sampler):
    """The rows of every epoch in a given order."""

    def __init__(self, epochs):
        self.epochs = [chain(minibatches) for minibatches in epochs]
        self.order = self.epochs[0]
        self.number = -1

    def set_epoch(self, number):
        self.order = self.epochs[number]
        if number > self.number:
            torch.randint(2**62, ())  # of which a stream makes its order
        self.number = number

    def __iter__(self):
        return iter(self.order)

    def __len__(self):
        return len(self.order)


@pytest.mark.parametrize("source", [single_rows, chunks])
@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "clip_norm": 1.0}, {"drop_last": True}], ids=str)
def test_a_training_has_the_numbers_of_the_same_rows_in_memory(source, options):
    """With the same draws, missing modalities, and a smaller last minibatch."""
    orders = []

    def recorded(batch):
        orders.append(batch._index.tolist())
        return batch

    common = {"make": double_pair, "objective": mm.objectives.mvae()}
    streamed = train(mm.Stream(source(), buffer=6), transform=recorded, **common, **options)
    steps = orders[1:]  # the first call is that of the first run
    listed = Listed(steps[first : first + len(steps) // 3] for first in range(0, len(steps), len(steps) // 3))
    options.pop("drop_last", None)
    loader = DataLoader(
        range(N), 5, sampler=listed, collate_fn=lambda index: ROWS[torch.tensor(index)], generator=torch.Generator()
    )
    assert_equal(streamed, train(loader, **common, **options))


@pytest.mark.parametrize("compile", [False, True])
def test_workers_and_compiled_steps_leave_the_numbers_as_they_are(compile, monkeypatch):
    without_inductor(monkeypatch)
    stream = mm.Stream(chunks(), size=N, buffer=6)
    options = {"validation": mm.Stream(single_rows(rows(7, 1))), "epochs": 1 if compile else 2}
    if not compile:  # where the rows that fill the last minibatch draw too
        options |= {"make": double_pair, "objective": mm.objectives.mvae()}
    with override_validation(True):
        expected = train(stream, **options)
        assert_equal(expected, train(stream, compile=compile, workers=1 + compile, **options), 1e-10 if compile else 0)
    options["validation"] = rows(7, 1)
    assert_equal(expected, train(stream, **options))  # rows for validation in memory


def test_two_processes_take_the_steps_of_one():
    """23 rows in minibatches of 8: the last one has 7, of which the processes have 4 and 3; or 1 and none."""
    for size in (N, 17):
        stream = mm.Stream(single_rows(rows(size)), buffer=6)
        assert_equal(train(stream, batch_size=8), train(stream, batch_size=4, devices=2), 1e-10)


def test_a_global_latent_weighs_all_rows():
    """The scale of the data plate is that of the rows in memory, with per-row parameters at the rows' own places."""

    def story(batch):
        mu = pyro.sample("mu", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
        offset = pyro.param("offset", torch.zeros(N, dtype=torch.float64))
        with batch.plate() as places:
            batch.observe("b", dist.Normal((mu + offset[places])[..., None], 1.0).to_event(1))

    def guide(batch):
        pyro.sample("mu", dist.Delta(pyro.param("loc", torch.ones((), dtype=torch.float64))))

    found = []
    only = mm.Batch({"b": ROWS["b"]})
    for given in (only, mm.Stream(single_rows(only), buffer=1000)):
        pyro.clear_param_store()
        mm.fit(
            story, guide, pyro.infer.Trace_ELBO(), given, epochs=2, batch_size=N, seed=0, progress=False,
            optimizer=lambda ps: torch.optim.SGD(ps, 0.1),
        )  # fmt: skip
        found.append({name: pyro.param(name).detach().clone() for name in ("loc", "offset")})
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_a_minibatch_that_is_not_finite_is_skipped():
    batch = ROWS.replaced({"a": torch.where(torch.arange(N)[:, None] == 7, math.inf, ROWS["a"])})
    with pytest.warns(UserWarning, match=r"a minibatch is skipped.* in row 7 of the data"):
        history, _ = train(mm.Stream(chunks(batch), buffer=6), nonfinite="skip", audit=False)
    assert history["skipped"] == [1.0, 1.0, 1.0] and all(map(math.isfinite, history["loss"]))


def test_other_rows_are_noticed_when_a_training_goes_on(tmp_path):
    path = tmp_path / "run.pt"
    straight = train(mm.Stream(single_rows(), buffer=6), epochs=4)
    train(mm.Stream(single_rows(), buffer=6), checkpoint=path, epochs=2)
    with pytest.raises(ValueError, match="some rows have other values"):
        train(mm.Stream(single_rows(rows(N, 1)), buffer=6), checkpoint=path)
    with pytest.raises(ValueError, match="shuffle buffer: 6, and not 7"):
        train(mm.Stream(single_rows(), buffer=7), checkpoint=path)
    assert_equal(straight, train(mm.Stream(single_rows(), buffer=6), checkpoint=path, epochs=4), 0)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "source", "words"),
    [
        (30, single_rows(), "gave 23 in this epoch, and not the 30 rows that the data plate is sized to"),
        (20, single_rows(), "gave more than the 20 rows"),
        (22, single_rows(), "gave 23 in this epoch, and not the 22 rows"),
        (15, lambda: itertools.cycle(single_rows()()), "gave more than the 15 rows.*cut an endless source"),
    ],
)
def test_another_number_of_rows_than_the_plate_counts_is_refused(size, source, words):
    with pytest.raises(ValueError, match=words):
        train(mm.Stream(source, size=size))


def random_order():
    return iter(random.sample(list(single_rows()()), N))


def test_readers_that_meet_other_rows_are_refused():
    """One order of all rows is shared out, so that rows would be lost and others given twice."""
    stream = mm.Stream(random_order, size=N)
    train(stream, workers=1, epochs=1)
    with pytest.raises(ValueError, match=r"gives other rows to each of 2 workers.*set_epoch"):
        train(stream, workers=2)


def test_processes_that_meet_other_rows_are_refused():
    """A source that shares rows out by itself."""

    def source():
        return itertools.islice(single_rows()(), os.getpid() != MAIN, N, 2)

    with pytest.raises(ValueError, match="gives other rows to each of 2 processes"):
        train(mm.Stream(source, size=10), devices=2)


def test_options_that_a_stream_does_not_have_are_refused():
    with pytest.raises(ValueError, match="resident=True keeps all rows on the device"):
        train(mm.Stream(single_rows()), resident=True)
    for given in (single_rows(), chunks(), single_rows()()):
        with pytest.raises(TypeError, match=r"make a pyro_mm.Stream of"):
            train(given)
