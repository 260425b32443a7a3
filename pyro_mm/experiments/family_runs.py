"""The run of a family of recipes: each member trained and measured, and their tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import typer

from ..batch.batch import Batch
from ..datasets import paired
from ..recipes import Recipe
from ..utils.atomic_files import replace_text
from .console import markdown, print_table
from .families import Family, Member
from .family_measurements import Judge, measure_member
from .family_tables import family_tables
from .trainings import Progress, RunOptions, seconds_per_epoch, train_recipe

DEFAULT_ROWS = 1000  # test rows


def reproduce_family(family: Family, options: RunOptions, only: Sequence[str]) -> None:
    """Train and measure the members of a family, print their tables and write table.md.

    A member that has been measured before, at the same epochs, rows, particles, seed and proposals, is read from its
    file.

    Args:
        family: the members.
        options: the options of the run.
        only: names of members; empty for all.

    Raises:
        typer.BadParameter: no member has one of these names.
    """
    members = {name: member for name, member in family.members.items() if not only or name in only}
    if unknown := [name for name in only if name not in members]:
        raise typer.BadParameter(f"--only: no member {unknown[0]!r}, expected one of {', '.join(family.members)}")
    train, test = options.load(family)
    test = test[: options.rows or DEFAULT_ROWS]
    epochs = options.epochs or family.epochs
    num_particles = options.particles or family.num_particles
    judge: Judge | None = None
    lines: dict[int, dict[str, dict[str, Any]]] = {part: {} for part in family.fractions}
    for name, member in members.items():
        for part in family.fractions:
            folder = options.out / name if part == 1 else options.out / name / f"one-in-{part}"
            done = folder / _file_name(epochs, test.size, options)
            if not done.is_file():
                label = name if part == 1 else f"{name}, one in {part}"
                run, seconds = _train(family, member, label, train, part, options, folder, epochs)
                judge = judge or Judge.train(family, options.data, options.device)
                found = measure_member(member, run, train, test, judge, num_particles, options.seed, options.fitted)
                replace_text(done, json.dumps(found | {"seconds": seconds}, indent=2) + "\n")
            lines[part][name] = json.loads(done.read_text())

    title = f"{family.title}: {epochs} epochs, seed {options.seed}; {test.size} test rows, K = {num_particles}"
    tables = family_tables(lines)
    for quantity, (header, cells) in tables.items():
        print_table(f"{title}; {family.pixels}{quantity and f'; {quantity}'}", header, cells)
    texts = [
        f"{quantity}\n\n{markdown(*table)}" if quantity else markdown(*table) for quantity, table in tables.items()
    ]
    replace_text(options.out / "table.md", "\n".join(texts))


def _file_name(epochs: int, rows: int, options: RunOptions) -> str:
    """Return the name of the file of a member's measurements."""
    particles = "" if options.particles is None else f"-{options.particles}"
    return f"measured-{'fitted-' * options.fitted}{epochs}-{rows}-{options.seed}{particles}.json"


def _train(
    family: Family, member: Member, label: str, train: Batch, part: int, options: RunOptions, folder: Path, epochs: int
) -> tuple[Recipe, float]:
    """Train a member, and its second stage if it has one, with one row in ``part`` paired.

    Returns:
        The trained recipe, and the seconds per epoch, summed over the stages.
    """
    torch.manual_seed(options.seed)
    run = member.recipe(train)
    rows = paired(train, 1 / part, options.seed)
    train_recipe(family, run, rows, options, Progress(f"{label}, ", options, folder, epochs))
    seconds = seconds_per_epoch(folder, options.seed)
    if member.second is not None:
        run = member.second(run)
        progress = Progress(f"{label}, second stage, ", options, folder / "second", epochs)
        train_recipe(family, run, rows, options, progress)
        seconds += seconds_per_epoch(progress.out, options.seed)
    return run, seconds
