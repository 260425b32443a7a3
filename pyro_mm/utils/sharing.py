"""Work that is shared out among several processes, each of which gets the whole result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from hashlib import blake2b
from typing import Any, TypeVar

import torch
from torch import Tensor

from .arguments import check_integer
from .launch import run_on_devices
from .processes import Processes, current_processes, has_group

Result = TypeVar("Result")
Unit = TypeVar("Unit")

DIGEST_NUMBERS = 64  # of each tensor that are compared between processes

_sharing: ContextVar[Processes | None] = ContextVar("processes that share the work at hand", default=None)


def sharing() -> Processes:
    """Return the processes that share the work at hand; a single one outside of :func:`share_out`."""
    return _sharing.get() or Processes()


@contextmanager
def _shared_by(processes: Processes) -> Iterator[None]:
    token = _sharing.set(processes)
    try:
        yield
    finally:
        _sharing.reset(token)


def alone() -> Any:
    """Return a context in which each process does by itself what it would share with others."""
    return _shared_by(Processes())


def share_out(
    what: str, devices: int | None, act: Callable[[], Result], alike: Callable[[], Mapping[str, Any]]
) -> Result:
    """Run a function on several processes that share out its work by :func:`sharing`.

    Args:
        what: name of the function that the user calls.
        devices: None for the processes that there are, of torchrun say; 1 for this one alone; more to fork them.
        act: the function.
        alike: called where there are several processes; name -> what they have to be given alike, in words or as bytes.

    Raises:
        TypeError: ``devices`` is no integer.
        ValueError: it is below 1; processes inside of processes; or processes that were given different things.
    """
    if devices is not None:
        check_integer("devices", devices, least=1)
    forks = devices is not None and devices > 1
    inside = _sharing.get()
    if inside is not None:
        if forks and has_group():
            raise ValueError(
                f"devices={devices} in {what}, which is called within a training or an evaluation that has processes "
                "of its own: leave devices out here"
            )
        if not forks:
            return act()
    if devices is not None and forks:

        def act_in_group(processes: Processes) -> Result:
            with _shared_by(processes):
                return act()

        return run_on_devices(devices, act_in_group, "evaluation")

    processes = Processes() if devices == 1 else current_processes()
    if processes.world > 1:
        check_alike(processes, what, alike())
    with _shared_by(processes):
        return act()


def check_alike(processes: Processes, what: str, given: Mapping[str, Any]) -> None:
    """Raise a ValueError in all processes unless they call one function, and were given the same.

    Args:
        processes: the processes.
        what: name of the function.
        given: name -> what they have to be given alike, in words or as bytes.
    """
    calls = processes.gather((what, dict(given)))
    for rank, (other, theirs) in enumerate(calls):
        if other != calls[0][0]:
            raise ValueError(
                f"process 0 calls {calls[0][0]} and process {rank} calls {other}: processes of one group share out an "
                "evaluation, so that all of them have to call it. Pass devices=1 for one that a process does by itself"
            )
        for name, value in theirs.items():
            if value != calls[0][1].get(name):
                texts = "" if isinstance(value, bytes) else f", {calls[0][1].get(name)} and {value}"
                raise ValueError(
                    f"{what} is shared out among {processes.world} processes, and {name} differ{texts} in process 0 "
                    f"and process {rank}: give all of them the same, or pass devices=1 for an evaluation that each "
                    "does by itself"
                )


def digest(tensors: Iterable[Tensor]) -> bytes:
    """Return a hash of the shapes of tensors and of some of their numbers."""
    hashed = blake2b(digest_size=16)
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // DIGEST_NUMBERS)][:DIGEST_NUMBERS].cpu()
        some = some.float() if some.dtype == torch.bfloat16 else some
        hashed.update(repr((tuple(tensor.shape), tensor.dtype)).encode() + some.contiguous().numpy().tobytes())
    return hashed.digest()


def share_units(units: Sequence[Unit], compute: Callable[[Unit], Result]) -> list[Result]:
    """Return the results of a function for some units, each of which one process computes.

    Args:
        units: the units, the same ones in all processes.
        compute: the function; its results can be pickled, and their tensors lie on the CPU.

    Returns:
        The results of all units, in their order, in every process.

    Raises:
        Exception: the first error of a process, in all of them.
    """
    processes = sharing()

    def compute_own() -> list[Result]:
        with alone():
            return [compute(unit) for unit in units[processes.rank :: processes.world]]

    if processes.world == 1:
        return compute_own()
    shares = [iter(results) for results in processes.gather_results(compute_own)]
    return [next(shares[place % processes.world]) for place in range(len(units))]
