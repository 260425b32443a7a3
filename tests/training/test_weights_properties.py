"""Weights of any shape and dtype come back from a file as they were, and those of another pair are refused."""

import os
import tempfile

import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import pyro_mm as mm
from tests.support.properties import for_all, generator, seeds
from tests.support.random_batches import TORCH_DTYPES


def equal(one, other):
    """Return True if two tensors have equal entries, NaN being equal to NaN."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


class Anything(nn.Module):
    """Parameters and buffers of several dtypes and shapes, some of them shared or views."""

    def __init__(self, forms, rng):
        super().__init__()
        for i, (dtype, shape, kind) in enumerate(forms):
            x = torch.tensor(rng.integers(0, 2, shape) if dtype == "bool" else rng.integers(-9, 9, shape))
            x = x.to(TORCH_DTYPES[dtype])
            if x.is_floating_point() and x.numel() and kind == "odd":
                x.view(-1)[0] = float("nan")
            if kind == "transposed" and x.dim() > 1:
                x = x.transpose(0, 1).contiguous().transpose(0, 1)
            if x.is_floating_point() and kind != "buffer":
                self.register_parameter(f"p{i}", nn.Parameter(x))
            else:
                self.register_buffer(f"b{i}", x)


forms = st.lists(
    st.tuples(
        st.sampled_from(sorted(TORCH_DTYPES)),
        st.sampled_from([(), (0,), (1,), (3,), (2, 3), (2, 0, 1)]),
        st.sampled_from(["parameter", "buffer", "transposed", "odd"]),
    ),
    min_size=1,
    max_size=4,
)


@for_all(model=forms, guide=forms, seed=seeds, ending=st.sampled_from(["safetensors", "pt"]))
def test_weights_come_back_as_they_were(model, guide, seed, ending):
    rng = generator(seed)
    pair = Anything(model, rng), Anything(guide, rng)
    fresh = Anything(model, rng), Anything(guide, rng)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, f"weights.{ending}")
        mm.save(path, *pair)
        mm.load(path, *fresh)
    for saved, loaded in zip(pair, fresh, strict=True):
        assert saved.state_dict().keys() == loaded.state_dict().keys()
        for name, x in saved.state_dict().items():
            y = loaded.state_dict()[name]
            assert x.dtype == y.dtype and x.shape == y.shape
            assert equal(x, y)


@for_all(model=forms, other=forms, seed=seeds)
def test_weights_of_another_pair_are_refused(model, other, seed):
    rng = generator(seed)
    first, second = Anything(model, rng), Anything(other, rng)
    same = {n: x.shape for n, x in first.state_dict().items()} == {n: x.shape for n, x in second.state_dict().items()}
    before = {name: x.clone() for name, x in second.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "weights.safetensors")
        mm.save(path, first, first)
        if same:
            return
        with pytest.raises(ValueError, match=r"weights|holds|shape|not"):
            mm.load(path, second, second)
    for name, x in second.state_dict().items():
        assert equal(x, before[name])
