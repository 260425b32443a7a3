"""Rows arrive once an epoch each, wherever they live."""

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import pyro_mm as mm
from pyro_mm.feeding import Feed

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
def test_every_row_comes_once(resident):
    feed = Feed(data(), 5, CPU, resident)
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
        feed = Feed(data(), 4, CPU, resident, 0 if resident else workers)
        orders.append([rows_of(feed), rows_of(feed)])
    assert orders[0] == orders[1] and orders[0][0] != orders[0][1]


def test_a_loader_is_a_data_set():
    loader = DataLoader(Stored(), batch_size=6, shuffle=True, collate_fn=collated)
    feed = Feed(loader, 1, CPU)
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


def test_what_is_no_loader_of_batches_is_told():
    with pytest.raises(TypeError, match="collate_fn"):
        list(Feed(DataLoader(Stored(), batch_size=4), 4, CPU))


def test_a_loader_that_drops_rows_has_the_loss_of_those_it_gave():
    rows = mm.Batch({"a": torch.randn(23, 1)})
    model = mm.models.LinearGaussian({"a": torch.randn(1, 2)}, noise=0.5)
    loader = DataLoader(Stored(), batch_size=20, drop_last=True, collate_fn=lambda r: rows[torch.tensor(r)])
    still = lambda ps: torch.optim.SGD(ps, 0.0)  # noqa: E731
    history = mm.fit(model, mm.Guide(z=model.posterior), mm.estimators.IWAE(2), loader, epochs=1, optimizer=still,
                     progress=False)  # fmt: skip
    with torch.no_grad():
        assert history.columns["loss"][0] == pytest.approx(-model.log_prob(rows[:20]).mean().item(), rel=1e-4)


def test_rows_are_not_padded_away():
    with pytest.raises(ValueError, match="at least 23 rows"):
        data().padded(3)
