"""The table of a recipe over seeds: spread between seeds beside the error within each."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import typer

from ..experiments.console import format_share, markdown, print_table
from ..experiments.runs import Settings
from ..experiments.user_data import is_file
from ..utils.atomic_files import replace_text
from .numbers import Number, finite
from .output import proposals_text

SEEDS_JSON, SEEDS_CSV, SEEDS_TABLE = "seeds.json", "seeds.csv", "seeds.md"
SEEDS_FILES = (SEEDS_JSON, SEEDS_CSV, SEEDS_TABLE)
HEADER = ("", "mean over seeds", "s.d. over seeds", "s.e. of one seed", "k-hat > 0.7")

Numbers = Mapping[int, Sequence[Number]]  # seed -> numbers


class Summary(NamedTuple):
    """A quantity over seeds.

    Attributes:
        quantity: its name.
        seeds: number of seeds that have it.
        mean: over these.
        deviation: standard deviation over these, with divisor ``seeds - 1``; NaN for one.
        error: the root mean square of the standard errors of one seed; None if it has none.
        untrusted: mean share of rows with k-hat above 0.7; NaN for too few draws, None without importance weights.
    """

    quantity: str
    seeds: int
    mean: float
    deviation: float
    error: float | None
    untrusted: float | None


def summarize_seeds(numbers: Numbers) -> list[Summary]:
    """Return mean and standard deviation over seeds of every quantity, in the order in which they appear."""
    quantities = dict.fromkeys(each.quantity for found in numbers.values() for each in found)
    return [_summary(quantity, numbers) for quantity in quantities]


def _summary(quantity: str, numbers: Numbers) -> Summary:
    entries = [each for found in numbers.values() for each in found if each.quantity == quantity]
    entries = [each for each in entries if math.isfinite(each.value)]
    values = [each.value for each in entries]
    errors = [each.standard_error for each in entries if each.standard_error is not None]
    shares = [each.untrusted for each in entries if each.untrusted is not None]
    no_share = math.nan if any(each.particles for each in entries) else None
    return Summary(
        quantity,
        len(values),
        statistics.fmean(values) if values else math.nan,
        statistics.stdev(values) if len(values) > 1 else math.nan,
        math.sqrt(statistics.fmean(error**2 for error in errors)) if errors else None,
        statistics.fmean(shares) if shares else no_share,
    )


def print_seeds(settings: Settings, numbers: Numbers, out: Path | None = None) -> None:
    """Print the table over seeds, and write it with the numbers of each seed.

    Args:
        settings: of any of the seeds.
        numbers: seed -> its numbers.
        out: the folder of the files; None to write none.

    Raises:
        OSError: a file cannot be written.
    """
    summaries = summarize_seeds(numbers)
    count = len(numbers)
    chosen = [f"{what} {name}" for what in ("objective", "estimator") if (name := getattr(settings, what))]
    recipe = ", ".join((settings.recipe, *chosen))
    title = f"{recipe} on {settings.data_name}, {_seeds_text(list(numbers))}, {settings.epochs} epochs each"
    cells = [_cells(summary, count) for summary in summaries]
    notes = _notes(settings, count)
    print_table(title, HEADER, cells)
    for note in notes:
        typer.echo(note)
    if out is None:
        return
    rows = [{"seed": seed, **asdict(each)} for seed, found in numbers.items() for each in found]
    replace_text(out / SEEDS_CSV, _csv(rows))
    replace_text(out / SEEDS_TABLE, "\n".join([title, "", markdown(HEADER, cells), *notes, ""]))
    content = {
        "settings": {name: value for name, value in asdict(settings).items() if name != "seed"},
        "seeds": list(numbers),
        "notes": notes,
        "summary": [_finite(summary._asdict()) for summary in summaries],
        "rows": [_finite(row) for row in rows],
    }
    replace_text(out / SEEDS_JSON, json.dumps(content, indent=2) + "\n")


def _notes(settings: Settings, count: int) -> list[str]:
    """Return the lines below the table, which say what its errors are errors of."""
    if count == 1:
        spread = "s.d. over seeds: unknown for one seed"
    else:
        spread = (
            f"s.d. over seeds: the spread of single seeds (divisor {count - 1}); divided by the root of {count} it is "
            "the standard error of their mean"
        )
    notes = [
        spread,
        "s.e. of one seed: the error of its estimate by draws (root mean square over seeds), which is a part of that "
        "spread and does not measure it",
        f"means over the first {settings.rows} test rows, or all if there are fewer",
        proposals_text(settings),
    ]
    if is_file(settings.dataset) and settings.test is None:
        notes.append("each seed holds out other test rows, which is part of the spread; --test gives all the same ones")
    return notes


def _cells(summary: Summary, count: int) -> list[str]:
    """Format a quantity as cells under :data:`HEADER`."""
    name = summary.quantity if summary.seeds == count else f"{summary.quantity} ({summary.seeds} of {count} seeds)"
    share = "" if summary.untrusted is None else format_share(summary.untrusted)
    return [name, _number(summary.mean), _number(summary.deviation), _number(summary.error), share]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return "–" if math.isnan(value) else f"{value:.3f}"


def _seeds_text(seeds: Sequence[int]) -> str:
    """Name seeds: "seed 3", "5 seeds (0 to 4)", or "3 seeds (0, 2, 5)"."""
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    is_range = list(seeds) == list(range(seeds[0], seeds[-1] + 1))
    return f"{len(seeds)} seeds ({f'{seeds[0]} to {seeds[-1]}' if is_range else ', '.join(map(str, seeds))})"


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as the text of a CSV file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _finite(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {name: finite(value) for name, value in entry.items()}
