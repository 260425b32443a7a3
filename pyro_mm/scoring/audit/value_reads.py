"""Record which values a program asks a batch for."""

from __future__ import annotations

from typing import Any

from ...batch.batch import Batch


class ValueReads:
    """Modalities whose values a program asks a batch for.

    Attributes:
        asked: modalities of the batch that the program asked for, be it only to test if the batch has them.
        read: modalities whose values it read.
        unknown: names that the batch lacks, in the order in which they were asked for.
    """

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.read: set[str] = set()
        self.unknown: dict[str, None] = {}

    def recording_batch(self, batch: Batch) -> Batch:
        """Return a copy of a batch that records here which values it is asked for."""
        return batch._copy(_values=_RecordingDict(batch._values, self))


class _RecordingDict(dict[str, Any]):
    """A dictionary that records the keys that it is asked for."""

    def __init__(self, entries: dict[str, Any], reads: ValueReads):
        super().__init__(entries)
        self.reads = reads

    def __getitem__(self, key: str) -> Any:
        if key in self:
            self.reads.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        known = super().__contains__(key)
        if isinstance(key, str):
            if known:
                self.reads.asked.add(key)
            else:
                self.reads.unknown.setdefault(key)
        return known

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401  # which is this very method

    def __or__(self, other: Any) -> Any:
        return _RecordingDict(super().__or__(other), self.reads)
