"""Trainings by several processes: their start in one state, what they refuse, and the sums over their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..batch.stream import Stream
from ..handlers.internals import BatchNorm
from ..utils.processes import Processes
from ..utils.seeding import generator_state, part_seed
from .fingerprint import rows_hash
from .loader import MinibatchLoader
from .problem import TrainingProblem
from .step import Update


def check_parallel(updates: Iterable[Update], names: tuple[str, ...], processes: Processes) -> None:
    """Raise a ValueError for a training whose gradient is not the mean of those of parts of the minibatch.

    Args:
        updates: those of a step.
        names: the modalities.
        processes: the processes.
    """
    if processes.world == 1:
        return
    for update in updates:
        whose = f"the player {update.name!r}" if update.name else "the objective"
        objective = update.loss.objective
        if objective.least_rows(names) > 1 and not objective.gathers_rows(names):
            raise ValueError(
                f"{whose} compares the rows of a minibatch with each other, which {processes.world} processes share "
                "out: train in one process, with a larger batch_size"
            )
        if any(isinstance(m, BatchNorm) and not isinstance(m, nn.SyncBatchNorm) for m in _modules_of(update.loss)):
            raise ValueError(
                f"batch normalisation{f' in {whose}' if update.name else ''} would take its mean and variance of the "
                f"rows of one process of {processes.world}: train in one process, or use torch.nn.SyncBatchNorm (on "
                "GPUs), GroupNorm or LayerNorm"
            )


def _modules_of(problem: TrainingProblem) -> list[nn.Module]:
    """Return all modules that a loss depends on."""
    return [m for root in problem.networks for m in root.modules()]


def check_same_rows(head: Batch, processes: Processes) -> None:
    """Raise a ValueError unless the source of a stream gives all processes the same first rows."""
    if len(set(processes.gather(rows_hash(head)))) > 1:
        raise ValueError(
            f"the source of the stream gives other rows to each of {processes.world} processes, which share out one "
            "order of all rows: seed a source that draws random numbers by the epoch that its set_epoch is given, and "
            "let it not share out rows by rank itself"
        )


@torch.no_grad()
def synchronise(processes: Processes, tensors: Iterable[Tensor], loader: MinibatchLoader) -> None:
    """Start all processes with the tensors of rank 0, one permutation of the rows, and draws of their own.

    The permutations are those of a single process with the state of rank 0's generator, if nothing else draws from it.

    Args:
        processes: the processes.
        tensors: parameters and buffers.
        loader: the source of the minibatches.
    """
    if processes.world == 1:
        return
    for tensor in tensors:
        processes.broadcast_(tensor)
    if isinstance(loader.data, Batch | Stream):
        device = loader.data.device if isinstance(loader.data, Batch) else torch.device("cpu")
        loader.order = torch.Generator(device)
        loader.order.set_state(processes.broadcast(generator_state(device)))
    seed = processes.broadcast(int(torch.randint(2**62, ())))
    own = part_seed(seed, processes.rank)
    torch.default_generator.manual_seed(own)
    if loader.device.type == "cuda":
        with torch.cuda.device(loader.device):
            torch.cuda.manual_seed(own)


def merge_sums(
    processes: Processes, sums: Mapping[tuple[str, ...], Tensor], rows: int
) -> tuple[dict[tuple[str, ...], Tensor], int]:
    """Return labels -> sums over the rows of all processes, and the number of these rows.

    Args:
        processes: the processes.
        sums: labels -> sums over the rows of this process.
        rows: their number.
    """
    if processes.world == 1:
        return dict(sums), rows
    merged: dict[tuple[str, ...], Tensor] = {}
    every = processes.gather(({labels: values.cpu() for labels, values in sums.items()}, rows))
    for own, _ in every:
        for labels, values in own.items():
            merged[labels] = merged[labels] + values if labels in merged else values
    return merged, sum(count for _, count in every)
