"""One process at a time holds a path."""

import errno
import os
import subprocess
import sys

import pytest

from pyro_mm.utils import atomic_files, locks
from tests.support.processes import kill, run_in_a_killed_process


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_lock_ends_with_its_process(tmp_path):
    path = tmp_path / "deep" / "run.pt"

    def act():
        with locks.lock_path(path):
            kill()

    run_in_a_killed_process(act)
    assert [p.name for p in path.parent.iterdir()] == [".run.pt.lock"]
    with locks.lock_path(path):
        pass
    assert not list(path.parent.iterdir())


def test_a_path_is_held_by_one_training(tmp_path):
    """Within a process and between two; another path of the folder is free."""
    path = tmp_path / "run.pt"
    with locks.lock_path(path), locks.lock_path(tmp_path / "other.pt"):
        with (
            pytest.raises(ValueError, match=r"run.pt is in use: another training writes to it"),
            locks.lock_path(path),
        ):
            pass
        code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        lock = str(tmp_path / ".run.pt.lock")
        assert subprocess.run([sys.executable, "-c", code, lock], stderr=subprocess.DEVNULL).returncode
    with locks.lock_path(path), pytest.raises(RuntimeError, match="mine"), locks.lock_path(tmp_path / "other.pt"):
        raise RuntimeError("mine")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="is a folder: expected the name of a file"), locks.lock_path(tmp_path):
        pass


def test_the_longest_name_that_a_file_can_have(tmp_path):
    path = tmp_path / ("n" * 255)
    with locks.lock_path(path):
        atomic_files.replace_text(path, "text")
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_can_only_be_read_is_read(tmp_path, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EROFS, "Read-only file system")

    path = tmp_path / "run.pt"
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(OSError, match="Read-only"), locks.lock_path(path):
        pass
    path.write_text("there")
    with locks.lock_path(path):
        pass
