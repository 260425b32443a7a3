"""Settings of how often a training checks its numbers and writes its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pace:
    """Bounds on the time and the memory that checks and checkpoints of a training take.

    Attributes:
        check_every: steps between two checks for NaN and infinity, each of which waits for the device.
        max_held_bytes: bytes of minibatches, held to take their steps again, after which a check comes earlier.
        write_share: minimum seconds between two writes of a checkpoint, in units of the last write's duration.
    """

    check_every: int = 100
    max_held_bytes: int = 2**28
    write_share: float = 20.0


PACE = Pace()
