"""The losses of a training, epoch by epoch."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from ..utils.global_state import preserve_process_settings
from .html import history_html


class History:
    """The losses of a training, in columns of equal length with one entry per epoch.

    ``loss`` is minus the objective, in nats per row, averaged over the epoch's own steps. A column for each term of the
    objective follows (its value per row, higher is better), and ``validation`` if there are rows for it.

    Attributes:
        columns: name -> values, one per epoch.
        stopped: True if a callback stopped the training.
        interrupted: True if Ctrl-C ended the training before its last epoch.
    """

    def __init__(self) -> None:
        self.columns: dict[str, list[float]] = {}
        self.stopped = False
        self.interrupted = False

    def append(self, entry: dict[str, float]) -> None:
        """Add the entry of an epoch: name -> value. A column that it lacks, or that is new, has NaN in its place."""
        length = len(next(iter(self.columns.values()), []))
        for name in [*self.columns, *(n for n in entry if n not in self.columns)]:
            self.columns.setdefault(name, [math.nan] * length).append(entry.get(name, math.nan))

    def to_dict(self) -> dict[str, list[float]]:
        """Return a copy of the columns: name -> values, one per epoch."""
        return {name: list(values) for name, values in self.columns.items()}

    def to_dataframe(self) -> Any:
        """Return the columns as a pandas data frame, indexed by the epoch, counted from 1.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            with preserve_process_settings():
                import pandas
        except ImportError as error:
            raise ImportError(
                "History.to_dataframe needs pandas, which is not installed: pip install pandas, or use to_dict()"
            ) from error
        return pandas.DataFrame(self.to_dict(), index=pandas.RangeIndex(1, len(self) + 1, name="epoch"))

    def to_csv(self, path: str | Path) -> None:
        """Write the columns to a CSV file, with a row per epoch."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            writer.writerows(zip(*self.columns.values(), strict=True))

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def _repr_html_(self) -> str:
        return history_html(self)

    def __repr__(self) -> str:
        last = ", ".join(f"{name} {values[-1]:.4g}" for name, values in self.columns.items()) if len(self) else "empty"
        return f"History({len(self)} epochs: {last})"


def raise_if_interrupted(history: History) -> None:
    """Raise a KeyboardInterrupt if Ctrl-C ended a training, for callers that are to end by it as a whole."""
    if history.interrupted:
        raise KeyboardInterrupt
