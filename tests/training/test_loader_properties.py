"""Loaders give every row once per epoch, from memory and from files."""

import os
import tempfile

import numpy as np
import torch
from hypothesis import strategies as st

import pyro_mm as mm
from pyro_mm.training.loader import MinibatchLoader
from tests.support.properties import for_all, generator, seeds
from tests.support.random_batches import FLOATS, TORCH_DTYPES, rows


def minibatches(batch, size, resident, drop_last, shard=None):
    torch.manual_seed(3)
    return list(MinibatchLoader(batch, size, torch.device("cpu"), resident, 0, drop_last, shard))


def holds_rows(part, batch):
    """Return True if a minibatch holds the rows of a batch that its places say."""
    places = part._index
    whole = batch.read()[places]
    held = [name for name in batch.names if whole.holds(name)]
    there = {name: whole.present[name] for name in batch.names}
    return all(torch.equal(part.present[name], mask) for name, mask in there.items()) and all(
        torch.equal(part[name][there[name]], whole[name][there[name]]) for name in held
    )


@for_all(
    data=rows(plain=True, most=2),
    size=st.integers(1, 50),
    resident=st.sampled_from([None, True, False]),
    drop_last=st.booleans(),
    world=st.integers(1, 3),
)
def test_an_epoch_has_every_row_once(data, size, resident, drop_last, world):
    batch = data.batch()
    size_used = min(size, data.size)
    found = minibatches(batch, size, resident, drop_last)
    places = torch.cat([part._index for part in found])
    expected = data.size // size_used * size_used if drop_last else data.size
    assert len(places) == expected == len(places.unique())
    assert [len(part) for part in found[:-1]] == [size_used] * (len(found) - 1)
    assert all(part.total == data.size and holds_rows(part, batch) for part in found)

    if data.size >= world and not drop_last:
        shards = [minibatches(batch, size, resident, False, (rank, world)) for rank in range(world)]
        assert len({len(shard) for shard in shards}) == 1
        counted = [MinibatchLoader(batch, size, batch.device, resident, 0, False, (r, world)) for r in range(world)]
        taken = []
        for loader in counted:
            torch.manual_seed(3)
            taken += [part._index for part in loader if loader.count(part)]
        assert torch.cat(taken).sort().values.tolist() == list(range(data.size))


def store(data, folder):
    """Return a batch of the same rows whose values are in files."""
    values = {}
    for name, column in data.columns.items():
        array = column.values.astype(column.dtype)
        if column.dtype in FLOATS:
            array[~column.valid()] = np.nan  # which is not to be read
        path = os.path.join(folder, f"{len(values)}.npy")
        np.save(path, array)
        values[name] = np.load(path, mmap_mode="r")
    return mm.Batch(values, {n: data.present(n) for n in data.names}, lengths=data.arguments["lengths"])


NUMPY_DTYPES = sorted(set(TORCH_DTYPES) - {"bfloat16"})


@for_all(data=rows(plain=True, most=3, dtypes=NUMPY_DTYPES, covariates=False), size=st.integers(1, 50), seed=seeds)
def test_rows_of_files_are_those_in_memory(data, size, seed):
    with tempfile.TemporaryDirectory() as folder:
        batch, stored = data.batch(), store(data, folder)
        keys = generator(seed).integers(-data.size, data.size, 4).tolist()
        for part, whole in ((stored[keys], batch[keys]), (stored.read(), batch), (stored[: data.size // 2], None)):
            whole = batch[: data.size // 2] if whole is None else whole
            for name, column in data.columns.items():
                assert torch.equal(part.present[name], whole.present[name])
                assert len(part) == 0 or bool(part[name].isfinite().all())
                there = whole.present[name]
                if column.lengths is not None:
                    assert torch.equal(part.lengths[name][there], whole.lengths[name][there])
                assert torch.equal(part[name][there], whole[name][there]), name
        for one, other in zip(
            minibatches(stored, size, None, False), minibatches(batch, size, False, False), strict=True
        ):
            assert torch.equal(one._index, other._index) and holds_rows(one, batch)
