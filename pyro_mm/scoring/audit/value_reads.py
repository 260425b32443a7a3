"""Record the modalities whose values a program asks a batch for."""

from __future__ import annotations

from typing import Any

from ...batch.batch import Batch


class ValueReads:
    """Whose values a program asks a batch for: ``asked``, of them ``read``, and ``unknown`` to the batch."""

    def __init__(self) -> None:
        self.asked: set[str] = set()
        self.read: set[str] = set()
        self.unknown: dict[str, None] = {}

    def listening(self, batch: Batch) -> Batch:
        """Return the same rows, which note whose values they are asked for."""
        return batch._copy(_values=_RecordingDict(batch._values, self))


class _RecordingDict(dict[str, Any]):
    """A dictionary that notes the keys that it is asked for."""

    def __init__(self, entries: dict[str, Any], heard: ValueReads):
        super().__init__(entries)
        self.heard = heard

    def __getitem__(self, key: str) -> Any:
        if key in self:
            self.heard.read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        known = super().__contains__(key)
        if isinstance(key, str):
            self.heard.asked.add(key) if known else self.heard.unknown.setdefault(key)
        return known

    def get(self, key: str, default: Any = None) -> Any:  # type: ignore[override]
        return self[key] if key in self else default  # noqa: SIM401  # which is this very method

    def __or__(self, other: Any) -> Any:
        return _RecordingDict(super().__or__(other), self.heard)
