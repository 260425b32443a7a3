"""A minibatch that several processes share out, whose rows are gathered for what compares rows with each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .processes import Processes

END = "the end of the loss"


class SharedRows:
    """The rows of a minibatch that each of several processes has.

    Before rows are gathered, all processes say for what, and they say when their loss is done: processes whose losses
    compare different things end with an error, where they would wait for each other without end.

    Args:
        processes: the processes.
        count: rows of this process in the minibatch; rows behind them, of padding say, are not gathered.
        gathers: True if some loss of the training is known to gather rows.

    Attributes:
        counts: rows of each process, once it is known.
        is_traced: True while a graph is traced, in which nothing can be gathered.
    """

    is_traced = False

    def __init__(self, processes: Processes, count: int, gathers: bool):
        self.processes = processes
        self.count = count
        self.gathers = gathers
        self.counts: list[int] = []

    def gather(self, x: Tensor, what: str) -> Tensor:
        """Return the rows of all processes, ``(N, ..)``; see :func:`gather_rows`.

        Raises:
            ValueError: a graph is traced, no loss of the training is known to gather rows, or another process gathers
                something else.
        """
        if self.is_traced:
            raise ValueError(f"{what} compares rows of several processes, which no graph gathers")
        if not self.gathers:
            raise ValueError(
                f"{what} compares the rows of a minibatch, which {self.processes.world} processes share out, within an "
                "objective that does not say so: give fit the objective of pyro_mm itself, or train in one process"
            )
        self._announce(what, tuple(x.shape[1:]), str(x.dtype), x.requires_grad)
        own = x[: self.count]
        summable = own.float() if x.dtype in (torch.bool, torch.float16, torch.bfloat16) else own
        rows: Tensor = _Gathering.apply(summable, self)
        return rows.to(x.dtype)

    def finish(self) -> None:
        """Wait for the losses of all processes to be evaluated."""
        if self.gathers:
            self._announce(END)

    def places(self, rank: int) -> Tensor:
        """Return the places in the minibatch of the rows of a process, as a single process would have them.

        The rows of one permutation are dealt out to the processes one by one.
        """
        world = len(self.counts)
        turns = torch.cat([torch.arange(count) * world + of for of, count in enumerate(self.counts)])
        places: Tensor = turns.argsort().argsort().split(self.counts)[rank]
        return places

    def _announce(self, what: str, *details: Any) -> None:
        """Tell all processes what comes next, after which they know the numbers of each other's rows.

        Raises:
            ValueError: in all processes, if something else comes next in one of them.
        """
        calls = self.processes.gather(((what, *details), self.count))
        self.counts = [count for _, count in calls]
        first = calls[0][0]
        for rank, (call, _) in enumerate(calls):
            if call != first:
                both = (call[0], first[0]) if call[0] != first[0] else (f"{call}", f"{first}")
                raise ValueError(
                    f"process {rank} has come to {both[0]}, and process 0 to {both[1]}: processes that share a "
                    "minibatch out compare its rows in the same way. Let no term be left out by chance, or for what "
                    "the rows of one process lack, or train in one process"
                )


class _Gathering(torch.autograd.Function):
    r"""Rows of all processes, in the order of one process's minibatch.

    With :math:`b_s` rows in process s and a loss :math:`L_s` there, the gradient of :math:`\sum_s b_s L_s / \sum_s b_s`
    is the mean of the processes' gradients, weighted by rows, if the rows of process r get
    :math:`\sum_s b_s \nabla_r L_s / b_r`.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, shared: SharedRows) -> Tensor:
        ctx.shared = shared
        ctx.places = shared.places(shared.processes.rank).to(own.device)
        rows = own.new_zeros((sum(shared.counts), *own.shape[1:]))
        rows[ctx.places] = own
        return shared.processes.sum_(rows)  # each row comes from one process, and zeros from the others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        shared = ctx.shared
        weighted = shared.processes.sum_((gradient * shared.count).contiguous())
        return weighted[ctx.places] / max(shared.count, 1), None


_current: ContextVar[SharedRows | None] = ContextVar("rows of the minibatch that processes share out", default=None)


@contextmanager
def share_rows(processes: Processes, count: int, gathers: bool) -> Iterator[None]:
    """Let the losses of a step gather the rows of all processes; arguments as for :class:`SharedRows`."""
    if processes.world == 1:
        yield
        return
    token = _current.set(SharedRows(processes, count, gathers))
    try:
        yield
    finally:
        _current.reset(token)


def rows_are_shared() -> bool:
    """Return True in a step of a training whose minibatch several processes share out."""
    return _current.get() is not None


def gather_rows(x: Tensor, what: str, dim: int = 0) -> Tensor:
    """Return the rows of the whole minibatch, those of other processes included, with their gradient.

    All processes have to gather the same things in the same order. In a single process it is x itself.

    Args:
        x: rows of this process in one dimension.
        what: what they are gathered for, in words.
        dim: the dimension of rows.
    """
    shared = _current.get()
    if shared is None:
        return x
    return shared.gather(x.movedim(dim, 0), what).movedim(0, dim)


def own_rows(x: Tensor, size: int) -> Tensor:
    """Return the rows of this process out of those of the whole minibatch, which were gathered before.

    Args:
        x: rows of the whole minibatch, ``(N, ..)``.
        size: rows of this process, with those of padding, for which others stand.
    """
    shared = _current.get()
    if shared is None:
        return x
    places = shared.places(shared.processes.rank).to(x.device)
    return x[torch.cat([places, places.new_zeros(size - len(places))])]


@contextmanager
def refuse_gathering() -> Iterator[None]:
    """Let rows of other processes be refused, while a graph is traced."""
    shared = _current.get()
    if shared is not None:
        shared.is_traced = True
    try:
        yield
    finally:
        if shared is not None:
            shared.is_traced = False


def finish_loss() -> None:
    """Say that the loss of a step is evaluated, and wait for the other processes to say so."""
    if (shared := _current.get()) is not None:
        shared.finish()
