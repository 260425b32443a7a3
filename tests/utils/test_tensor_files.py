"""Files on disk: a kill leaves the old one, and nothing is read of one that is not as it was written."""

import errno
import os
import pickle
import signal
import stat
import subprocess
import sys
import threading
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.utils import tensor_files as storage

# -- writing --------------------------------------------------------------------------------------------------------

OLD, NEW = {"x": torch.zeros(1000)}, {"x": torch.ones(1000)}


def killed(act):
    """Run a function in a forked process that is expected to be killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def half(state, file):
    file.write(b"half of it")
    file.flush()
    kill()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    ("module", "name", "instead", "which"),
    [
        (torch, "save", kill, "old"),
        (torch, "save", half, "old"),
        (os, "fsync", kill, "old"),
        (os, "chmod", kill, "old"),
        (os, "replace", kill, "old"),
        (storage, "_synchronise_folder", kill, "new"),
    ],
    ids=["before", "halfway", "before fsync", "before chmod", "before the rename", "after the rename"],
)
def test_a_kill_leaves_a_whole_file(tmp_path, module, name, instead, which):
    """Whatever moment it comes at; the next training on that path removes what was left, and nothing else."""
    path, other = tmp_path / "run.pt", tmp_path / ".run.pt.old.12-0123abcd.tmp"
    other.touch()
    storage.save_tensors(path, OLD)

    def act():
        setattr(module, name, instead)
        storage.save_tensors(path, NEW)

    killed(act)
    assert torch.equal(storage.load_tensors(path, "it")["x"], (OLD if which == "old" else NEW)["x"])
    left = set(tmp_path.iterdir()) - {path, other}
    assert len(left) == (which == "old")
    with storage.lock_path(path):
        assert not any(file.exists() for file in left) and other.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "deep" / "run.pt"

    def act():
        with storage.lock_path(path):
            kill()

    killed(act)
    assert [p.name for p in path.parent.iterdir()] == [".run.pt.lock"]
    with storage.lock_path(path):
        pass
    assert not list(path.parent.iterdir())


def test_a_path_is_held_by_one_training(tmp_path):
    """Within a process and between two; another path of the folder is free."""
    path = tmp_path / "run.pt"
    with storage.lock_path(path), storage.lock_path(tmp_path / "other.pt"):
        with (
            pytest.raises(ValueError, match=r"run.pt is in use: another training writes to it"),
            storage.lock_path(path),
        ):
            pass
        code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        lock = str(tmp_path / ".run.pt.lock")
        assert subprocess.run([sys.executable, "-c", code, lock], stderr=subprocess.DEVNULL).returncode
    with storage.lock_path(path), pytest.raises(RuntimeError, match="mine"), storage.lock_path(tmp_path / "other.pt"):
        raise RuntimeError("mine")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="is a folder: expected the name of a file"), storage.lock_path(tmp_path):
        pass


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    storage.save_tensors(path, OLD)

    for error, expected in ((OSError(errno.ENOSPC, "No space left on device"), OSError), (KeyboardInterrupt(), None)):

        def fails(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails)
            with pytest.raises(expected or KeyboardInterrupt, match=expected and "run.pt cannot be written: No space"):
                storage.save_tensors(path, NEW)
        assert list(tmp_path.iterdir()) == [path]
        assert torch.equal(torch.load(path, weights_only=True)["x"], OLD["x"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_error_of_the_system_with_the_path(tmp_path, monkeypatch):
    """torch's own writer fails in its own way."""
    monkeypatch.setattr("builtins.open", lambda *_, opened=open: opened("/dev/full", "wb", buffering=0))
    with pytest.raises(OSError, match=r"run.pt cannot be written"):
        storage.save_tensors(tmp_path / "run.pt", NEW)


def test_links_are_followed_and_permissions_kept(tmp_path):
    target, link = tmp_path / "there" / "run.pt", tmp_path / "link.pt"
    target.parent.mkdir()
    storage.replace_text(target, "old")
    fresh = stat.S_IMODE(target.stat().st_mode)
    (tmp_path / "plain").write_text("")
    assert fresh == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    target.chmod(0o640)
    link.symlink_to(target)
    storage.replace_text(link, "neu – new\r\n")
    assert link.is_symlink() and target.read_bytes() == "neu – new\r\n".encode()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_the_longest_name_that_a_file_can_have(tmp_path):
    path = tmp_path / ("n" * 255)
    with storage.lock_path(path):
        storage.save_tensors(path, OLD)
    assert list(tmp_path.iterdir()) == [path]


def test_of_two_writers_the_last_one_wins(tmp_path):
    """Sixteen threads write files of one number each; every one that is read is whole."""
    path = tmp_path / "run.pt"
    storage.save_tensors(path, OLD)

    def act(number):
        for _ in range(5):
            storage.save_tensors(path, {"x": torch.full((1000,), float(number))})

    writers = [threading.Thread(target=act, args=(n,)) for n in range(16)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert len(storage.load_tensors(path, "it")["x"].unique()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_damaged_file(tmp_path):
    with pytest.raises(IsADirectoryError):
        mm.load(tmp_path, *pair())
    with pytest.raises(OSError, match="cannot be written"):
        mm.save(tmp_path, *pair())


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    pipe, seen = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: seen.append(pipe.read_bytes()))
    reader.start()
    storage.replace_text(pipe, "text")
    reader.join(10)
    assert seen == [b"text"] and pipe.is_fifo()


def test_a_file_system_that_cannot_synchronise_is_written_to(tmp_path, monkeypatch):
    def unable(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unable)
    monkeypatch.setattr(os, "chmod", unable)
    storage.save_tensors(tmp_path / "run.pt", OLD)
    storage.save_tensors(tmp_path / "run.pt", NEW)
    assert torch.equal(storage.load_tensors(tmp_path / "run.pt", "it")["x"], NEW["x"])


def test_a_place_that_can_only_be_read_is_read(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EROFS, "Read-only file system")

    path = tmp_path / "run.pt"
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(OSError, match="Read-only"), storage.lock_path(path):
        pass
    path.write_text("there")
    with storage.lock_path(path):
        pass


def test_an_entry_that_could_not_be_read_again_is_refused_before_the_file_is_touched(tmp_path):
    path = tmp_path / "run.pt"
    storage.save_tensors(path, OLD)
    with pytest.raises(TypeError, match=r"\['a'\]\[1\] is of type Code, which could not be read again"):
        storage.save_tensors(path, {"a": [1.0, Code()]})
    assert torch.equal(storage.load_tensors(path, "it")["x"], OLD["x"])
    plain = {
        "a": (1, 2.5, "x", None, True, b"y"),
        "b": torch.Size([2]),
        "c": torch.float32,
        "d": {"e": [nn.Parameter(NEW["x"])]},
    }
    storage.save_tensors(path, plain)
    assert storage.load_tensors(path, "it").keys() == plain.keys()


# -- reading --------------------------------------------------------------------------------------------------------


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
