"""One function on several processes of this machine, forked from the one that asks for it."""

from __future__ import annotations

import os
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as distributed

from .processes import Processes, ProcessGroup, pickle_error, unpickle_error

Result = TypeVar("Result")
OTHERS_FAILED = 1  # exit code of a child whose own error has been reported
POLLS = 0.002  # seconds between two looks at whether all processes are there


class ProcessError(ValueError, RuntimeError):
    """A process that was killed, or whose error could not be handed over."""


class _ProcessMissingError(RuntimeError):
    """A process ended before all of them had come together."""


def run_on_devices(
    devices: int, act: Callable[[Processes], Result], what: str = "training", error: type[Exception] = ProcessError
) -> Result:
    """Run a function on several processes, and return the result of this one, which is rank 0 of them.

    The others are forked from it, so that they have its objects, closures included; they end with the function, and
    what they change is lost.

    Args:
        devices: number of processes.
        act: the function, of the group of processes.
        what: the work in a word, for messages.
        error: the type of error for a process that was lost.

    Raises:
        ValueError: processes cannot be forked here.
        error: a process was killed, or its error could not be handed over.
        Exception: the error of the first process that failed.
    """
    if devices == 1:
        return act(Processes())
    _check_fork(devices)
    found: BaseException | None = None
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        children = [_fork(rank, devices, store, act) for rank in range(1, devices)]
        try:
            _join(store, 0, devices, lambda: any(child.has_ended for child in children))
            result = act(ProcessGroup())
        except BaseException as raised:
            found = raised
            if _is_of_communication(found):
                # or its frames would keep the group alive, whose threads a process that is forked later would wait for
                traceback.clear_frames(found.__traceback__)
        if distributed.is_initialized():
            distributed.destroy_process_group()
        _end(children, found, what, error)
    return result


def _check_fork(devices: int) -> None:
    """Raise a ValueError unless processes can be forked, and are not there already."""
    if not distributed.is_available() or not hasattr(os, "fork"):
        raise ValueError(f"devices={devices} forks processes, which this system or this build of torch cannot")
    if distributed.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"devices={devices} forks processes, and this is one of several already, of torchrun say: leave devices out"
        )
    if torch.cuda.is_available():
        raise ValueError(
            f"devices={devices} forks processes, which CUDA does not allow: run the script by "
            f"torchrun --nproc-per-node={devices} and leave devices out, or hide the GPUs by CUDA_VISIBLE_DEVICES="
        )


def _join(store: str, rank: int, world: int, is_hopeless: Callable[[], bool]) -> None:
    """Make the group of processes, once all of them are there.

    Args:
        store: path of a file that they share.
        rank: the number of this process.
        world: the number of processes.
        is_hopeless: called while others are missing; True if one will never come.

    Raises:
        _ProcessMissingError: one will never come.
    """
    open(f"{store}.{rank}", "x").close()
    while not all(os.path.exists(f"{store}.{other}") for other in range(world)):
        if is_hopeless():
            raise _ProcessMissingError("a process ended before all of them were there")
        time.sleep(POLLS)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


class _Child:
    """A forked process, and the end of a pipe that its error comes from."""

    def __init__(self, rank: int, pid: int, pipe: int):
        self.rank = rank
        self.pid = pid
        self.pipe = pipe
        self._status: int | None = None

    @property
    def has_ended(self) -> bool:
        """True if the process is no more."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._status = status if pid else None
        return self._status is not None

    def wait(self, what: str, error: type[Exception]) -> BaseException | None:
        """Return the error of the process after its end; None if it had none."""
        with os.fdopen(self.pipe, "rb") as file:
            report = file.read()
        status = os.waitpid(self.pid, 0)[1] if self._status is None else self._status
        if report:
            return unpickle_error(report, self.rank, what, error)
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return error(f"process {self.rank} of the {what} was killed by {name}")
        if os.WEXITSTATUS(status):
            return error(f"process {self.rank} of the {what} ended by itself, with exit code {os.WEXITSTATUS(status)}")
        return None


def _fork(rank: int, world: int, store: str, act: Callable[[Processes], Any]) -> _Child:
    read, write = os.pipe()
    parent = os.getpid()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which the child does not use
        pid = os.fork()
    if pid:
        os.close(write)
        return _Child(rank, pid, read)

    code = 0
    try:
        os.close(read)
        warnings.simplefilter("ignore")  # rank 0 gives them
        torch.set_num_threads(1)  # the threads of the parent are not here
        _join(store, rank, world, lambda: os.getppid() != parent)
        act(ProcessGroup())
        distributed.destroy_process_group()
    except BaseException as error:
        code = OTHERS_FAILED
        with suppress(OSError):
            os.write(write, pickle_error(error))
    finally:
        os._exit(code)


def _end(children: list[_Child], own: BaseException | None, what: str, error: type[Exception]) -> None:
    """Wait for the children, and raise the error that came first.

    Args:
        children: the processes.
        own: the error of this process. One of communication tells that another process failed first.
        what: the work in a word, for messages.
        error: the type of error for a process that was lost.
    """
    lost = own is not None and _is_of_communication(own)
    ended_by_themselves = children
    if own is not None and (not lost or isinstance(own, _ProcessMissingError)):
        ended_by_themselves = [child for child in children if child.has_ended]
        for child in children:
            if not child.has_ended:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
    errors = {child.rank: child.wait(what, error) for child in children}
    if own is not None and not lost:
        raise own
    found = [e for child in ended_by_themselves if (e := errors[child.rank]) is not None]
    first = [e for e in found if not _is_of_communication(e)]
    if first:
        raise first[0] from None
    if found or own is not None:
        raise error(f"the processes of the {what} lost touch with each other: {[*found, own][0]}") from None


def _is_of_communication(error: BaseException) -> bool:
    """Return True for an error of communication, for lack of an answer from another process."""
    if isinstance(error, _ProcessMissingError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Connection", "peer"))
