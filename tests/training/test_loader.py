"""Rows arrive once per epoch each, wherever they live."""

import math
import warnings
from itertools import zip_longest

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

import pyro_mm as mm
from pyro_mm.training.loader import MinibatchLoader

CPU = torch.device("cpu")


def data(n=23):
    values = {"a": torch.arange(n).float()[:, None], "b": torch.arange(n) % 3}
    return mm.Batch(values, {"b": torch.arange(n) % 4 > 0}, covariates={"u": torch.arange(n)})


class Stored(Dataset):
    """Rows that are made when they are asked for, as those of a file would be."""

    def __len__(self):
        return 23

    def __getitem__(self, row):
        return row


def collated(rows):
    return data()[torch.tensor(rows)]


def rows_of(feed):
    return [batch.covariates["u"].tolist() for batch in feed]


@pytest.mark.parametrize("resident", [True, False])
def test_every_row_comes_once_per_epoch(resident):
    feed = MinibatchLoader(data(), 5, CPU, resident)
    assert (feed.size, len(feed), feed.batch_size, feed.ragged) == (23, 5, 5, True)
    seen = []
    for batch in feed:
        rows = batch.covariates["u"]
        assert torch.equal(batch["a"][:, 0], rows.float()) and torch.equal(batch.present["b"], rows % 4 > 0)
        assert batch.total == 23 and torch.equal(batch._index, rows)
        seen += rows.tolist()
    assert sorted(seen) == list(range(23)) and seen != list(range(23))


@pytest.mark.parametrize("workers", [0, 2])
def test_fetched_rows_come_in_the_order_of_resident_ones(workers):
    orders = []
    for resident in (True, False):
        torch.manual_seed(3)
        feed = MinibatchLoader(data(), 4, CPU, resident, 0 if resident else workers)
        orders.append([rows_of(feed), rows_of(feed)])
    assert orders[0] == orders[1] and orders[0][0] != orders[0][1]


def test_a_loader_is_a_data_set():
    loader = DataLoader(Stored(), batch_size=6, shuffle=True, collate_fn=collated)
    feed = MinibatchLoader(loader, 1, CPU)
    assert (feed.size, len(feed), feed.batch_size) == (23, 4, 6)
    assert sorted(row for rows in rows_of(feed) for row in rows) == list(range(23))
    assert all(batch.total == 23 and len(batch._index) == batch.size for batch in feed)
    assert feed.head().size == 2


def test_fit_takes_a_loader():
    """With the exact posterior every weight is p(x), so the first loss of both is minus log p of the rows."""
    model = mm.models.LinearGaussian({"a": torch.randn(1, 2)}, noise=0.5)
    start = {n: p.clone() for n, p in model.state_dict().items()}
    rows = mm.Batch({"a": torch.randn(23, 1)})
    with torch.no_grad():
        exact = -model.log_prob(rows).mean().item()
    loader = DataLoader(Stored(), batch_size=23, collate_fn=lambda r: rows[torch.tensor(r)])
    for train in (rows, loader):
        model.load_state_dict(start)
        history = mm.fit(
            model, mm.Guide(z=model.posterior), mm.estimators.IWAE(2), train, epochs=3, batch_size=23, seed=0,
            progress=False, optimizer=lambda ps: torch.optim.SGD(ps, 0.1),
        )  # fmt: skip
        losses = history.columns["loss"]
        assert losses[0] == pytest.approx(exact, rel=1e-5) and losses[-1] < losses[0]


def test_a_loader_that_does_not_collate_batches_is_refused():
    with pytest.raises(TypeError, match="collate_fn"):
        list(MinibatchLoader(DataLoader(Stored(), batch_size=4), 4, CPU))


def test_a_loader_that_drops_rows_has_the_loss_of_those_it_gave():
    rows = mm.Batch({"a": torch.randn(23, 1)})
    model = mm.models.LinearGaussian({"a": torch.randn(1, 2)}, noise=0.5)
    loader = DataLoader(Stored(), batch_size=20, drop_last=True, collate_fn=lambda r: rows[torch.tensor(r)])
    still = lambda ps: torch.optim.SGD(ps, 0.0)  # noqa: E731
    history = mm.fit(model, mm.Guide(z=model.posterior), mm.estimators.IWAE(2), loader, epochs=1, optimizer=still,
                     progress=False)  # fmt: skip
    with torch.no_grad():
        assert history.columns["loss"][0] == pytest.approx(-model.log_prob(rows[:20]).mean().item(), rel=1e-4)


def test_padding_to_fewer_rows_is_refused():
    with pytest.raises(ValueError, match="size >= 23"):
        data().padded(3)


# -- the size of the data plate --------------------------------------------------------------------


class Streamed(IterableDataset):
    """A stream of rows that says how many they are, rightly or not."""

    def __init__(self, rows, length):
        self.rows, self.length = rows, length

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter(range(self.rows))


def loader(dataset=None, **options):
    return DataLoader(Stored() if dataset is None else dataset, collate_fn=collated, **options)


SAMPLERS = {
    "fewer": (lambda: loader(batch_size=4, sampler=SubsetRandomSampler(range(9))), 9),
    "more": (lambda: loader(batch_size=4, sampler=WeightedRandomSampler(torch.ones(23), 60)), 60),
    "batches of fewer": (lambda: loader(batch_sampler=BatchSampler(SubsetRandomSampler(range(9)), 4, False)), 9),
    "listed batches": (lambda: loader(batch_sampler=[[0, 1], [5, 7, 9]]), 5),
    "batches as items": (lambda: DataLoader([data()[:7], data()[7:12]], batch_size=None), 12),
    "a stream": (lambda: loader(Streamed(10, 10), batch_size=4), 10),
    "all": (lambda: loader(batch_size=6), 23),
}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_the_plate_has_the_size_of_the_rows_that_a_loader_gives(kind):
    made, size = SAMPLERS[kind]
    feed = MinibatchLoader(made(), 1, CPU)
    batches = list(feed)
    assert feed.size == size == sum(batch.size for batch in batches)
    assert all(batch.total == size for batch in batches)


def global_mean_loss(train):
    """The loss a row and its gradient by log s, of mu ~ N(0, 1), x_n ~ N(mu, 1) and q(mu) = N(0, s), s = 1 / e."""
    log_scale = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))
    loc = torch.zeros((), dtype=torch.float64)

    def story(batch):
        mu = pyro.sample("mu", dist.Normal(loc, 1.0))
        with batch.plate():
            batch.observe("a", dist.Normal(mu, 1.0))

    def guide(batch):
        pyro.sample("mu", dist.Normal(loc, log_scale.exp()))

    history = mm.fit(
        story, guide, pyro.infer.TraceMeanField_ELBO(4000, vectorize_particles=True, max_plate_nesting=1), train,
        epochs=1, seed=0, progress=False, optimizer=lambda ps: torch.optim.SGD(ps, 0.0),
    )  # fmt: skip
    return history.columns["loss"][0], log_scale.grad.item()


def test_a_global_latent_weighs_as_many_rows_as_the_sampler_yields():
    """With x = 0 the gradient of the loss a row by log s is s^2 + (s^2 - 1) / N, N the rows of the sampler: 4 of 1,000.

    The draws give the first term a standard error of s^2 sqrt(2 / 4000) = 0.003; three are allowed. With N = 1,000 the
    second term would be 0.2 nearer to zero.
    """
    x = torch.zeros(1000, dtype=torch.float64)
    made = lambda rows: mm.Batch({"a": x[torch.as_tensor(rows)]})  # noqa: E731
    some = DataLoader(range(1000), batch_size=4, sampler=SubsetRandomSampler(range(4)), collate_fn=made)
    square = math.exp(-2)
    _, gradient = global_mean_loss(some)
    assert gradient == pytest.approx(square + (square - 1) / 4, abs=3 * square * (2 / 4000) ** 0.5)


def test_a_loader_that_miscounts_its_rows_is_refused_where_it_matters():
    x = torch.zeros(10, dtype=torch.float64)
    made = lambda rows: mm.Batch({"a": x[torch.as_tensor(rows)]})  # noqa: E731
    wrong = DataLoader(Streamed(10, 40), batch_size=5, collate_fn=made)
    with pytest.raises(ValueError, match=r"gave 10 rows.* length of 40"):
        global_mean_loss(wrong)


def test_a_loader_of_nothing_is_refused():
    for empty in (loader([], batch_size=4), loader(Streamed(0, 4), batch_size=4)):
        with pytest.raises(ValueError, match="at least"):
            feed = MinibatchLoader(empty, 4, CPU)
            feed.head()
    with pytest.raises(ValueError, match="one row at least"):
        MinibatchLoader(data()[torch.zeros(0, dtype=torch.long)], 4, CPU)


# -- the last minibatch ----------------------------------------------------------------------------


@pytest.mark.parametrize("resident", [True, False])
def test_the_last_smaller_minibatch_can_be_left_out(resident):
    feed = MinibatchLoader(data(), 5, CPU, resident, drop_last=True)
    batches = rows_of(feed)
    assert [len(rows) for rows in batches] == [5] * 4 and len(feed) == 4
    assert (feed.ragged, feed.smallest, feed.size) == (False, 5, 23)
    assert len({row for rows in batches for row in rows}) == 20
    few = MinibatchLoader(data()[:3], 5, CPU, resident, drop_last=True)
    assert [len(rows) for rows in rows_of(few)] == [3]


def test_drop_last_is_refused_for_a_loader_that_has_its_own():
    with pytest.raises(ValueError, match=r"drop_last=None for a loader"):
        MinibatchLoader(loader(batch_size=4), 4, CPU, drop_last=True)


def normalised(functions):
    """A pair with batch normalisation in its encoder, as modules or as functions."""
    encoder = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model = mm.models.SharedLatent(
        dist.Normal(torch.zeros(1), 1.0).to_event(1), {"a": mm.conditionals.Normal(nn.Linear(1, 2))}
    )
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"a": mm.conditionals.Normal(encoder)}))
    return ((lambda batch: model(batch)), (lambda batch: guide(batch))) if functions else (model, guide)


@pytest.mark.parametrize("train", ["rows", "loader"])
def test_a_last_minibatch_of_one_row_is_foreseen_where_there_is_batch_normalisation(train):
    rows = mm.Batch({"a": torch.randn(21, 1)})
    stopped = lambda *_: pytest.fail("an epoch has run")  # noqa: E731
    options = {"epochs": 1, "progress": False, "callback": stopped}
    made = lambda index: rows[torch.as_tensor(index)]  # noqa: E731
    given = rows if train == "rows" else DataLoader(range(21), batch_size=5, collate_fn=made)
    model, guide = normalised(False)
    before = [p.clone() for p in guide.state_dict().values()]
    with pytest.raises(
        ValueError, match=r"21 rows in minibatches of 5 leave a minibatch of a single row.*drop_last=True"
    ):
        mm.fit(model, guide, mm.objectives.elbo(), given, batch_size=5, **options)
    listed = DataLoader(range(21), batch_sampler=[[0, 1], [2]], collate_fn=made)
    with pytest.raises(ValueError, match="leave a minibatch of a single row"):
        mm.fit(model, guide, mm.objectives.elbo(), listed, **options)
    assert all(map(torch.equal, before, guide.state_dict().values()))
    mm.fit(model, guide, mm.objectives.elbo(), rows, batch_size=5, drop_last=True, epochs=1, progress=False)
    mm.fit(model, guide, mm.objectives.elbo(), rows, batch_size=7, epochs=1, progress=False)


# -- a rare modality -------------------------------------------------------------------------------


def three_pair():
    normal = lambda i, o: mm.conditionals.Normal(nn.Linear(i, 2 * o))  # noqa: E731
    names = {"a": 2, "b": 1}
    decoders = {name: normal(2, size) for name, size in names.items()}
    model = mm.models.SharedLatent(dist.Normal(torch.zeros(2), 1.0).to_event(1), decoders)
    experts = {name: normal(size, 2) for name, size in names.items()}
    return model, mm.Guide(z=mm.posteriors.ProductOfExperts(experts))


@pytest.mark.parametrize(
    ("train", "functions", "compile"),
    [
        ("rows", False, False),
        ("rows", True, False),
        ("loader", False, False),
        ("loader", False, True),
        ("loader", True, False),
        ("loader", True, True),
    ],
)
def test_a_minibatch_without_a_rare_modality_trains(train, functions, compile, monkeypatch):
    """Masks that a loader's collation makes from whole minibatches say False of all rows of some of them."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    whole = mm.Batch({"a": torch.randn(24, 2), "b": torch.randn(24, 1)}, {"b": torch.arange(24) == 22})

    def collate(index):
        rows = torch.as_tensor(index)
        return mm.Batch({n: whole[n][rows] for n in "ab"}, {"b": whole.present["b"][rows]})

    model, guide = three_pair()
    programs = ((lambda b: model(b)), (lambda b: guide(b))) if functions else (model, guide)
    given = whole if train == "rows" else DataLoader(range(24), batch_size=6, collate_fn=collate)
    before = [p.clone() for m in (model, guide) for p in m.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        mm.fit(*programs, mm.objectives.elbo(), given, batch_size=6, epochs=1, seed=0, progress=False, compile=compile)
    assert not any(map(torch.equal, before, [p for m in (model, guide) for p in m.parameters()]))


@pytest.mark.parametrize("how", ["pyro.param", "closure"])
@pytest.mark.parametrize("compile", [False, True])
def test_loose_parameters_that_the_first_minibatch_does_not_use_train(how, compile, monkeypatch):
    """Bernoulli data, whose draws carry no gradient, absent from the first minibatch."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    loose = nn.Parameter(torch.tensor([0.5, -0.5]))

    def weight():
        return pyro.param("weight", loose.detach().clone()) if how == "pyro.param" else loose

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            batch.observe("a", lambda z: dist.Normal(z, 1.0).to_event(1), z)
            batch.observe("b", lambda z: dist.Bernoulli(logits=z @ weight()), z)

    def collate(index):
        values = {"a": torch.randn(len(index), 2), "b": torch.ones(len(index))}
        return mm.Batch(values, {"b": torch.full((len(index),), 5 in index)})

    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"a": mm.conditionals.Normal(nn.Linear(2, 4))}))
    train = DataLoader(range(9), batch_size=3, collate_fn=collate)
    mm.fit(story, guide, mm.objectives.elbo(), train, epochs=1, seed=0, progress=False, compile=compile)
    trained = pyro.param("weight") if how == "pyro.param" else loose
    assert not (trained == torch.tensor([0.5, -0.5])).any()


def test_a_modality_that_no_row_of_an_epoch_has_is_named():
    whole = mm.Batch({"a": torch.randn(24, 2), "b": torch.randn(24, 1)}, {"b": torch.zeros(24, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"no gradient reaches model.decoders.b.*No row of the epoch has 'b'"):
        mm.fit(*three_pair(), mm.objectives.elbo(), whole, epochs=1, progress=False)


# -- shards -----------------------------------------------------------------------------------------------------------

SHARDS = [(64, 8, 2), (65, 8, 2), (63, 16, 4), (33, 16, 2), (20, 3, 3), (7, 2, 3), (5, 5, 5)]


def drawn_rows(loader):
    """The rows of an epoch under one seed, minibatch by minibatch."""
    torch.manual_seed(2)
    return [batch["row"][:, 0].long().tolist() for batch in loader if batch is not loader.idle]


def numbered(size):
    return mm.Batch({"row": torch.arange(size).float()[:, None]})


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize(("size", "batch_size", "world"), SHARDS)
def test_shards_are_a_partition_of_the_one_permutation(size, batch_size, world, resident):
    data, device = numbered(size), torch.device("cpu")
    whole = [row for rows in drawn_rows(MinibatchLoader(data, batch_size, device, resident)) for row in rows]
    loaders = [MinibatchLoader(data, batch_size, device, resident, shard=(rank, world)) for rank in range(world)]
    shards = [drawn_rows(loader) for loader in loaders]
    for rank, shard in enumerate(shards):
        assert [row for rows in shard for row in rows] == whole[rank::world]
        assert all(1 <= len(rows) <= batch_size for rows in shard)
        assert min(map(len, shard)) == loaders[rank].smallest
    number = math.ceil(math.ceil(size / world) / batch_size)
    assert {len(loader) for loader in loaders} == {len(list(loader)) for loader in loaders} == {number}
    for together in zip_longest(*shards, fillvalue=[]):  # the minibatch of one process
        size_of_one = min(world * batch_size, len(whole))
        assert sorted(row for rows in together for row in rows) == sorted(whole.pop(0) for _ in range(size_of_one))
    assert sorted(row for shard in shards for rows in shard for row in rows) == list(range(size))


@pytest.mark.parametrize(("size", "batch_size", "world"), [(64, 8, 2), (65, 8, 2), (33, 16, 2), (20, 3, 3)])
def test_shards_without_smaller_minibatches_are_of_full_ones(size, batch_size, world):
    data, device = numbered(size), torch.device("cpu")
    loaders = [MinibatchLoader(data, batch_size, device, drop_last=True, shard=(rank, world)) for rank in range(world)]
    shards = [drawn_rows(loader) for loader in loaders]
    assert {len(rows) for shard in shards for rows in shard} == {batch_size}
    assert {len(shard) for shard in shards} == {size // world // batch_size}


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_that_cannot_be_shared_out_are_refused_in_every_process(rank):
    with pytest.raises(ValueError, match=r"cannot be shared out among 2 processes.*drop_last=False"):
        MinibatchLoader(numbered(5), 4, torch.device("cpu"), drop_last=True, shard=(rank, 2))


def test_a_shard_of_a_loader_has_a_distributed_sampler():
    with pytest.raises(ValueError, match=r"expected shard to be a rank and the number of processes, got \(2, 2\)"):
        MinibatchLoader(numbered(8), 2, torch.device("cpu"), shard=(2, 2))
    rows = numbered(10)
    loader = torch.utils.data.DataLoader(range(10), 2, shuffle=True, collate_fn=lambda i: rows[torch.tensor(i)])
    shards = [MinibatchLoader(loader, 2, torch.device("cpu"), shard=(rank, 2)) for rank in range(2)]
    epochs = [[batch for shard in shards for batch in shard.epoch(number)] for number in range(2)]
    found = [[row for batch in epoch for row in batch["row"][:, 0].tolist()] for epoch in epochs]
    assert found[0] != found[1] and sorted(found[0]) == sorted(found[1]) == list(range(10))
    assert {batch.total for batch in epochs[0]} == {10}
    again = MinibatchLoader(shards[0].data, 2, torch.device("cpu"), shard=(0, 2))
    assert again.data is shards[0].data
    for other in (torch.utils.data.DataLoader([numbered(4)], batch_size=None), loader_of_a_stream()):
        with pytest.raises(ValueError, match=r"cannot be shared out among 2 processes.*DistributedSampler"):
            MinibatchLoader(other, 2, torch.device("cpu"), shard=(0, 2))


def loader_of_a_stream():
    class Stream(torch.utils.data.IterableDataset):
        def __len__(self):
            return 4

        def __iter__(self):
            return iter(range(4))

    return torch.utils.data.DataLoader(Stream(), 2)
