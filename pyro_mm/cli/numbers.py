"""Numbers of a trained recipe by name: in the file of a run, and over seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..experiments.estimates import BY_GUIDE
from ..experiments.evaluation import Line
from ..utils.atomic_files import replace_text
from .training import Measurements

LOSSES = {"loss": "training loss, last epoch", "validation": "validation loss, last epoch"}  # column -> quantity


@dataclass(frozen=True)
class Number:
    """A number of a trained recipe.

    Attributes:
        quantity: its name.
        value: in nats per row, or the share of an accuracy.
        standard_error: its error by draws; None if it has none.
        median_ess: the median effective sample size; None without importance weights.
        untrusted: the share of rows with k-hat above 0.7; None without importance weights, or with too few draws.
        particles: draws per row; None without importance weights.
    """

    quantity: str
    value: float
    standard_error: float | None = None
    median_ess: float | None = None
    untrusted: float | None = None
    particles: int | None = None


def collect_numbers(found: Measurements, history: Mapping[str, Sequence[float]]) -> list[Number]:
    """Return the numbers of a trained recipe, its last losses first.

    Args:
        found: its measurements.
        history: columns of the history of its training.
    """
    numbers = [Number(quantity, history[name][-1]) for name, quantity in LOSSES.items() if history.get(name)]
    for line in found.lines:
        numbers.append(_of_line(line, line.quantity.removesuffix(" (see below)")))
        if line.by_guide is not None:
            numbers.append(_of_line(line.by_guide, line.quantity + BY_GUIDE))
    return [*numbers, *(Number(f"{each.target} accuracy", each.accuracy) for each in found.predictions)]


def _of_line(line: Line, quantity: str) -> Number:
    return Number(quantity, line.value, line.error, finite(line.ess), finite(line.untrusted), line.particles)


def write_numbers(path: Path, numbers: Sequence[Number], **notes: Any) -> None:
    """Write numbers and notes to a JSON file; what is not finite becomes null."""
    entries = [{name: finite(value) for name, value in asdict(number).items()} for number in numbers]
    replace_text(path, json.dumps({**notes, "numbers": entries}, indent=2) + "\n")


def read_numbers(path: Path) -> list[Number]:
    """Read the numbers of a file of :func:`write_numbers`.

    Raises:
        ValueError: it is damaged; names the path.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["numbers"]
        numbers = [Number(**{**entry, "value": _number(entry["value"])}) for entry in entries]
        if not numbers or not all(isinstance(each.quantity, str) for each in numbers):
            raise ValueError("no numbers")
        return numbers
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path} is damaged, or was not written by pyro-mm train ({error}): remove it, and the same command "
            "measures the run again from its weights"
        ) from error


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def finite(value: Any) -> Any:
    """Return a value, or None in the place of a float that is NaN or infinite, which JSON lacks."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
