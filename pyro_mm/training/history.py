"""What happened in training, an entry an epoch."""

from __future__ import annotations

import csv
import math
from pathlib import Path


class History:
    """What happened in training, an entry an epoch: columns of equal length.

    ``loss`` is minus the objective in nats a row, over the epoch's own steps; one column for each term of the
    objective (its value a row, higher is better) follows, and ``validation`` where there is any.
    """

    def __init__(self) -> None:
        self.columns: dict[str, list[float]] = {}

    def append(self, entry: dict[str, float]) -> None:
        length = len(next(iter(self.columns.values()), []))
        for name in [*self.columns, *(n for n in entry if n not in self.columns)]:
            self.columns.setdefault(name, [math.nan] * length).append(entry.get(name, math.nan))

    def to_dict(self) -> dict[str, list[float]]:
        """Column -> values, an entry an epoch."""
        return {name: list(values) for name, values in self.columns.items()}

    def to_csv(self, path: str | Path) -> None:
        """Writes the columns as a table."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(zip(*self.columns.values(), strict=True))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def __repr__(self) -> str:
        last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in self.columns.items()) if len(self) else "empty"
        return f"History({len(self)} epochs: {last})"
