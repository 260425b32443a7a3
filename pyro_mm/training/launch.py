"""A training on several processes of this machine, forked from the one that asks for it."""

from __future__ import annotations

import os
import pickle
import signal
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import torch
import torch.distributed as distributed

from ..utils.processes import Processes, ProcessGroup, current_processes
from .problem import TrainingError

Result = TypeVar("Result")
OTHERS_FAILED = 1  # exit code of a child whose own error has been reported


def run_on_devices(devices: int, act: Callable[[Processes], Result]) -> Result:
    """Run a function on several processes, and return the result of this one, which is rank 0 of them.

    The others are forked from it, so that they have its objects, closures included; they end with the function, and
    what they change is lost. Under torchrun, the processes that there are run it.

    Args:
        devices: number of processes.
        act: the function, of the group of processes.

    Raises:
        ValueError: processes cannot be forked here.
        TrainingError: a process was killed, or its error could not be handed over.
        Exception: the error of the first process that failed.
    """
    if devices == 1:
        return act(current_processes())
    _check_fork(devices)
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        children = [_fork(rank, devices, store, act) for rank in range(1, devices)]
        error: BaseException | None = None
        try:
            _join(store, 0, devices)
            result = act(ProcessGroup())
        except BaseException as found:
            error = found
            if _is_of_communication(error):
                # or its frames would keep the group alive, whose threads a process that is forked later would wait for
                traceback.clear_frames(error.__traceback__)
        if distributed.is_initialized():
            distributed.destroy_process_group()
        _end(children, error)
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


def _join(store: str, rank: int, world: int) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


class _Child:
    """A forked process, and the end of a pipe that its error comes from."""

    def __init__(self, rank: int, pid: int, pipe: int):
        self.rank = rank
        self.pid = pid
        self.pipe = pipe

    def wait(self) -> BaseException | None:
        """Return the error of the process after its end; None if it had none."""
        with os.fdopen(self.pipe, "rb") as file:
            report = file.read()
        _, status = os.waitpid(self.pid, 0)
        if report:
            return _unpickle(report, self.rank)
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return TrainingError(f"process {self.rank} of the training was killed by {name}")
        return None


def _fork(rank: int, world: int, store: str, act: Callable[[Processes], Any]) -> _Child:
    read, write = os.pipe()
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
        _join(store, rank, world)
        act(ProcessGroup())
        distributed.destroy_process_group()
    except BaseException as error:
        code = OTHERS_FAILED
        with suppress(OSError):
            os.write(write, _pickle(error))
    finally:
        os._exit(code)


def _end(children: list[_Child], error: BaseException | None) -> None:
    """Wait for the children, and raise the error that came first.

    Args:
        children: the processes.
        error: the error of this process. One of torch's communication tells that another process failed first.
    """
    lost = error is not None and _is_of_communication(error)
    if error is not None and not lost:
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
    errors = [found for child in children if (found := child.wait()) is not None]
    if error is not None and not lost:
        raise error
    first = [found for found in errors if not _is_of_communication(found)]
    if first or errors or error is not None:
        raise [*first, *errors, *([] if error is None else [error])][0] from None


def _is_of_communication(error: BaseException) -> bool:
    """Return True for an error of torch's communication, for lack of an answer from another process."""
    return isinstance(error, RuntimeError) and any(word in str(error) for word in ("gloo", "Connection", "peer"))


def _pickle(error: BaseException) -> bytes:
    text = "".join(traceback.format_exception(error))
    try:
        whole = pickle.dumps((error, text))
        pickle.loads(whole)
    except Exception:
        return pickle.dumps((None, text))
    return whole


def _unpickle(report: bytes, rank: int) -> BaseException:
    error: BaseException | None
    error, text = pickle.loads(report)
    if error is None:
        return TrainingError(f"process {rank} of the training failed:\n{text}")
    error.add_note(f"in process {rank} of the training:\n{text}")
    return error
