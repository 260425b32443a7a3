"""Several processes that do one thing together, by ``torch.distributed``."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor


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

    def broadcast(self, value: Any) -> Any:
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def broadcast_(self, tensor: Tensor) -> None:
        distributed.broadcast(tensor, src=0)


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
