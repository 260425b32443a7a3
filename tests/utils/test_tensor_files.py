"""Nothing is read from a file that is not as it was written."""

import os
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.utils import tensor_files

OLD, NEW = {"x": torch.zeros(1000)}, {"x": torch.ones(1000)}


def test_an_entry_that_could_not_be_read_again_is_refused_before_the_file_is_touched(tmp_path):
    path = tmp_path / "run.pt"
    tensor_files.save_tensors(path, OLD)
    with pytest.raises(TypeError, match=r"\['a'\]\[1\] is of type Code, which could not be read again"):
        tensor_files.save_tensors(path, {"a": [1.0, Code()]})
    assert torch.equal(tensor_files.load_tensors(path, "it")["x"], OLD["x"])
    plain = {
        "a": (1, 2.5, "x", None, True, b"y"),
        "b": torch.Size([2]),
        "c": torch.float32,
        "d": {"e": [nn.Parameter(NEW["x"])]},
    }
    tensor_files.save_tensors(path, plain)
    assert tensor_files.load_tensors(path, "it").keys() == plain.keys()


class Code:
    def __reduce__(self):
        return (os.system, ("exit 3",))


def foreign(path):
    """Name -> bytes of files that are none of ours."""
    yield "empty", b""
    yield "text", b"hello world"
    yield "json", b'{"a": 1}'
    yield "null", bytes(10240)  # torch takes it for its oldest format
    yield "pickle", pickle.dumps({"model": {}, "guide": {}})
    np.savez(path.with_suffix(".npz"), a=np.zeros(3))
    yield "npz", path.with_suffix(".npz").read_bytes()
    for name, thing in (
        ("code", {"model": Code(), "guide": {}}),
        ("module", nn.Linear(2, 2)),
        ("tensor", torch.ones(2)),
    ):
        torch.save(thing, path)
        yield name, path.read_bytes()
    torch.save(OLD, path, _use_new_zipfile_serialization=False)
    yield "of old", path.read_bytes()
    torch.save({"model": torch.zeros(10**5), "guide": {}}, path)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(path.with_suffix(".z"), "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.namelist():
            new.writestr(member, old.read(member))
    yield "compressed", path.with_suffix(".z").read_bytes()


def damaged(whole):
    """Bytes of a file that was cut off anywhere, and of one of which a byte was changed."""
    for length in (1, 10, len(whole) // 2, len(whole) - 300, len(whole) - 1):
        yield f"{length} bytes", whole[:length]
    at = whole.index(np.float32(0.125).tobytes() * 100) + 201
    yield "one byte", whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]


def pair():
    return nn.Linear(1, 3), nn.Linear(200, 1)


def test_a_file_that_is_not_as_it_was_written_is_one_error(tmp_path):
    """A ValueError with the path, without advice to unpickle, whatever torch makes of it; nothing is loaded."""
    path, (model, guide) = tmp_path / "some.pt", pair()
    with torch.no_grad():
        guide.weight.fill_(0.125)
    mm.save(path, model, guide)
    whole = path.read_bytes()
    before = [p.clone() for m in (model, guide) for p in m.parameters()]
    for name, content in [*foreign(tmp_path / "x"), *damaged(whole)]:
        path.write_bytes(content)
        with warnings.catch_warnings(), pytest.raises(ValueError) as caught:
            warnings.simplefilter("error")
            mm.load(path, model, guide)
        text = str(caught.value)
        assert "some.pt" in text and "a file of mm.save" in text, (name, text)
        assert not any(word in text for word in ("weights_only", "unpickl", "trust", "arbitrary code")), (name, text)
        assert all(map(torch.equal, before, [p for m in (model, guide) for p in m.parameters()]))
    path.write_bytes(whole)
    mm.load(path, model, guide)


@pytest.mark.parametrize("state", [{}, {"model": {}}, {"model": {}, "guide": {}, "more": 1}, {"epochs": 1}])
def test_entries_of_something_else_are_named(tmp_path, state):
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=rf"x.pt is not a file of mm.save: it holds {', '.join(state) or 'nothing'}"):
        mm.load(tmp_path / "x.pt", *pair())
