"""Several processes that do one thing together, by ``torch.distributed``."""

from __future__ import annotations

import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as distributed
from torch import Tensor

Result = TypeVar("Result")


class Processes:
    """The processes of a group, of which this is one; a single process needs no group.

    Attributes:
        rank: the number of this process, from 0.
        world: the number of processes.
    """

    rank = 0
    world = 1

    @property
    def is_main(self) -> bool:
        """True for the process that prints and writes files."""
        return self.rank == 0

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over all processes, and return it."""
        return tensor

    def any(self, flag: bool) -> bool:
        """Return True if the flag of some process is."""
        return flag

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all processes, by rank."""
        return [value]

    def gather_results(self, act: Callable[[], Result]) -> list[Result]:
        """Call a function in each process, and return the results of all, by rank.

        Raises:
            Exception: the error of the first process whose function failed, in all of them.
        """
        return [act()]

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0."""
        return value

    def broadcast_(self, tensor: Tensor) -> None:
        """Replace a tensor by that of rank 0."""


class ProcessGroup(Processes):
    """The processes of torch's default group."""

    def __init__(self) -> None:
        self.rank = distributed.get_rank()
        self.world = distributed.get_world_size()

    def sum_(self, tensor: Tensor) -> Tensor:
        distributed.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        return any(self.gather(bool(flag)))

    def gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world
        distributed.all_gather_object(values, value)
        return values

    def gather_results(self, act: Callable[[], Result]) -> list[Result]:
        error: Exception | None = None
        result: Any = None
        try:
            result = act()
        except Exception as found:
            error = found
        reports = self.gather((result, b"" if error is None else pickle_error(error)))
        for rank, (_, report) in enumerate(reports):
            if report:
                raise error if rank == self.rank and error is not None else unpickle_error(report, rank)
        return [found for found, _ in reports]

    def broadcast(self, value: Any) -> Any:
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def broadcast_(self, tensor: Tensor) -> None:
        distributed.broadcast(tensor, src=0)


def has_group() -> bool:
    """Return True if this process is in a group already."""
    return distributed.is_available() and distributed.is_initialized()


def current_processes() -> Processes:
    """Return the group that this process belongs to, which torchrun names in the environment; else a single process.

    Under torchrun the group is made at the first call: of NCCL for tensors on a GPU, and of gloo.
    """
    if not distributed.is_available():
        return Processes()
    if not distributed.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) < 2 or "RANK" not in os.environ:
            return Processes()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
            distributed.init_process_group("cpu:gloo,cuda:nccl")
        else:
            distributed.init_process_group("gloo")
    return ProcessGroup() if distributed.get_world_size() > 1 else Processes()


def pickle_error(error: BaseException) -> bytes:
    """Return an error with its traceback as bytes, for another process."""
    text = "".join(traceback.format_exception(error))
    try:
        whole = pickle.dumps((error, text))
        pickle.loads(whole)
    except Exception:
        return pickle.dumps((None, text))
    return whole


def unpickle_error(
    report: bytes, rank: int, what: str = "evaluation", error: type[Exception] = RuntimeError
) -> BaseException:
    """Return the error that :func:`pickle_error` described.

    Args:
        report: the bytes.
        rank: the process that it was raised in.
        what: the work of the process in a word, for the message.
        error: the type of error in the place of one that cannot be handed over.
    """
    found: BaseException | None
    found, text = pickle.loads(report)
    if found is None or isinstance(found, SystemExit):
        return error(f"process {rank} of the {what} failed:\n{text}")
    found.add_note(f"in process {rank} of the {what}:\n{text}")
    return found
