"""Files are replaced as a whole: a kill or a full disk leaves the old one."""

import errno
import os
import stat
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.utils import atomic_files, locks, tensor_files
from tests.support.processes import kill, run_in_a_killed_process

OLD, NEW = {"x": torch.zeros(1000)}, {"x": torch.ones(1000)}


def write_half(state, file):
    file.write(b"half of it")
    file.flush()
    kill()


def pair():
    return nn.Linear(1, 3), nn.Linear(200, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    ("module", "name", "instead", "which"),
    [
        (torch, "save", kill, "old"),
        (torch, "save", write_half, "old"),
        (os, "fsync", kill, "old"),
        (os, "chmod", kill, "old"),
        (os, "replace", kill, "old"),
        (atomic_files, "_synchronise_folder", kill, "new"),
    ],
    ids=["before", "halfway", "before fsync", "before chmod", "before the rename", "after the rename"],
)
def test_a_kill_leaves_a_whole_file(tmp_path, module, name, instead, which):
    """Whatever moment it comes at; the next training on that path removes what was left, and nothing else."""
    path, other = tmp_path / "run.pt", tmp_path / ".run.pt.old.12-0123abcd.tmp"
    other.touch()
    tensor_files.save_tensors(path, OLD)

    def act():
        setattr(module, name, instead)
        tensor_files.save_tensors(path, NEW)

    run_in_a_killed_process(act)
    assert torch.equal(tensor_files.load_tensors(path, "it")["x"], (OLD if which == "old" else NEW)["x"])
    left = set(tmp_path.iterdir()) - {path, other}
    assert len(left) == (which == "old")
    with locks.lock_path(path):
        assert not any(file.exists() for file in left) and other.exists()


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    tensor_files.save_tensors(path, OLD)

    for error, expected in ((OSError(errno.ENOSPC, "No space left on device"), OSError), (KeyboardInterrupt(), None)):

        def fails(*_, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fails)
            with pytest.raises(expected or KeyboardInterrupt, match=expected and "run.pt cannot be written: No space"):
                tensor_files.save_tensors(path, NEW)
        assert list(tmp_path.iterdir()) == [path]
        assert torch.equal(torch.load(path, weights_only=True)["x"], OLD["x"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_an_error_of_the_system_with_the_path(tmp_path, monkeypatch):
    """In its own words, where torch's own writer has others."""
    monkeypatch.setattr("builtins.open", lambda *_, opened=open: opened("/dev/full", "wb", buffering=0))
    with pytest.raises(OSError, match=r"run.pt cannot be written: No space left"):
        tensor_files.save_tensors(tmp_path / "run.pt", NEW)


def test_links_are_followed_and_permissions_kept(tmp_path):
    target, link = tmp_path / "there" / "run.pt", tmp_path / "link.pt"
    target.parent.mkdir()
    atomic_files.replace_text(target, "old")
    fresh = stat.S_IMODE(target.stat().st_mode)
    (tmp_path / "plain").write_text("")
    assert fresh == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    target.chmod(0o640)
    link.symlink_to(target)
    atomic_files.replace_text(link, "neu – new\r\n")
    assert link.is_symlink() and target.read_bytes() == "neu – new\r\n".encode()
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_files_of_concurrent_writers_are_whole_and_the_last_one_stays(tmp_path):
    """Sixteen threads write files of one number each; every one that is read is whole."""
    path = tmp_path / "run.pt"
    tensor_files.save_tensors(path, OLD)

    def act(number):
        for _ in range(5):
            tensor_files.save_tensors(path, {"x": torch.full((1000,), float(number))})

    writers = [threading.Thread(target=act, args=(n,)) for n in range(16)]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert len(tensor_files.load_tensors(path, "it")["x"].unique()) == 1
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
    atomic_files.replace_text(pipe, "text")
    reader.join(10)
    assert seen == [b"text"] and pipe.is_fifo()


def test_a_file_system_that_cannot_synchronise_is_written_to(tmp_path, monkeypatch):
    def unable(*_):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unable)
    monkeypatch.setattr(os, "chmod", unable)
    tensor_files.save_tensors(tmp_path / "run.pt", OLD)
    tensor_files.save_tensors(tmp_path / "run.pt", NEW)
    assert torch.equal(tensor_files.load_tensors(tmp_path / "run.pt", "it")["x"], NEW["x"])
