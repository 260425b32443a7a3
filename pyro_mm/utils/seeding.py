"""torch's generators under a seed, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .arguments import check_seed


def normalize_seed(seed: int | None) -> int:
    """The seed, any integer, as one that every generator takes; of None, one from torch's generator."""
    seed = check_seed(seed)
    return int(torch.randint(2**62, ())) if seed is None else seed % 2**62


def part_seed(seed: int, part: int) -> int:
    """The seed of one part of what a seed is of, unlike those of other parts and of near-by seeds.

    A sum would not do: of a seed, torch's generator of the CPU sees the last 32 bits alone.
    """
    state = np.random.SeedSequence((seed, part)).generate_state(1, np.uint64)
    return int(state[0]) >> 1  # an int first: numpy 1 shifts no unsigned number by a signed one


@contextmanager
def temporary_seed(seed: int | None, device: torch.device) -> Iterator[None]:
    """torch's generators of the CPU and a device under a seed, and afterwards as before; untouched for None."""
    if seed is None:
        yield
        return
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # not torch.manual_seed, which seeds the generators of all devices, and those are not put back
        torch.default_generator.manual_seed(normalize_seed(seed))
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(normalize_seed(seed))
        yield


def generator_state(device: torch.device) -> Tensor:
    """The state of torch's generator of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(device: torch.device, state: Tensor) -> None:
    """Puts torch's generator of a device back into a state."""
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
