"""Seeds, and torch's generators under a seed for the time of a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .arguments import check_seed


def normalize_seed(seed: int | None) -> int:
    """Return a seed that every generator accepts, in ``[0, 2**62)``.

    Args:
        seed: any integer; None draws a seed from torch's generator.

    Raises:
        TypeError: ``seed`` is neither an integer nor None.
    """
    seed = check_seed(seed)
    return int(torch.randint(2**62, ())) if seed is None else seed % 2**62


def part_seed(seed: int, part: int) -> int:
    """Derive the seed of one part (a block of draws, a split of the data) from a seed.

    Seeds of different parts, and of neighbouring seeds, are unrelated. A sum would not do: torch's CPU generator uses
    only the lowest 32 bits of a seed.

    Args:
        seed: a non-negative integer.
        part: the number of the part, non-negative.
    """
    state = np.random.SeedSequence((seed, part)).generate_state(1, np.uint64)
    return int(state[0]) >> 1  # an int first: numpy 1 shifts no unsigned number by a signed one


@contextmanager
def temporary_seed(seed: int | None, device: torch.device) -> Iterator[None]:
    """Seed torch's generators of the CPU and a device, and restore their states afterwards.

    Args:
        seed: any integer; None leaves the generators untouched.
        device: the device beside the CPU whose generator is seeded.
    """
    if seed is None:
        yield
        return

    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # not torch.manual_seed, which seeds the generators of all devices, and those are not restored
        torch.default_generator.manual_seed(normalize_seed(seed))
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(normalize_seed(seed))
        yield


def generator_state(device: torch.device) -> Tensor:
    """Return the state of torch's generator of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_generator_state(device: torch.device, state: Tensor) -> None:
    """Set torch's generator of a device to a state that :func:`generator_state` returned."""
    torch.cuda.set_rng_state(state, device) if device.type == "cuda" else torch.set_rng_state(state)
