"""Runs of one recipe under several seeds, each in a folder of its own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import typer

from ..experiments.console import report_errors
from ..experiments.runs import CONFIG, FILES, TABLE, Settings, check_settings, run_state
from .numbers import Number, read_numbers
from .run import RunOptions, load_and_measure, train_run
from .seed_table import SEEDS_FILES, print_seeds

LARGEST_SEED = 2**63 - 1


def train_seeds(settings: Settings, options: RunOptions, count: int) -> None:
    """Train and measure a recipe under each seed, going on where it was stopped, and print and write one table.

    Args:
        settings: of the first seed; the others follow it.
        options: of the whole; each seed has the folder ``seed-N`` in ``options.out``.
        count: number of seeds.

    Raises:
        typer.BadParameter: a folder holds another run, or there is none to go on with.
        typer.Exit: an error, or Ctrl-C; the message has been printed.
    """
    if settings.seed > LARGEST_SEED - count + 1:
        raise typer.BadParameter(f"--seeds: {count} seeds from {settings.seed} on exceed 2**63 - 1, start lower")
    seeds = range(settings.seed, settings.seed + count)
    each = {seed: replace(settings, seed=seed) for seed in seeds}
    with report_errors(lambda: "before anything was trained"):
        finished = _finished_seeds(options, each)
        for name in SEEDS_FILES if len(finished) < count and options.out.is_dir() else ():
            (options.out / name).unlink(missing_ok=True)  # of fewer seeds, or of others

    numbers: dict[int, Sequence[Number]] = {}
    for seed in seeds:
        folder = seed_folder(options.out, seed)
        if seed in finished:
            with report_errors(lambda: "nothing was changed"):
                numbers[seed] = _read(folder, each[seed], options)
            typer.echo(f"seed {seed}: finished before, in {folder}")
            continue
        done = len(finished.difference(numbers)) + len(numbers)
        own = replace(
            options,
            out=folder,
            log_dir=None if options.log_dir is None else seed_folder(options.log_dir, seed),
            resume=False,
            label=f"seed {seed}, with {done} of {count} seeds finished: ",
            has_finished=done > 0,
        )
        typer.echo(f"seed {seed}, {len(numbers) + 1} of {count}")
        numbers[seed] = train_run(each[seed], own).numbers
    with report_errors(lambda: f"the seeds are trained, and the same command writes their table to {options.out}"):
        print_seeds(settings, numbers, options.out)
    typer.echo(f"written to {options.out}")


def _finished_seeds(options: RunOptions, each: Mapping[int, Settings]) -> set[int]:
    """Return the seeds that are trained and measured, after checking the folders of all.

    Raises:
        typer.BadParameter: a folder holds another run, or there is none to go on with.
    """
    if held := [name for name in FILES if (options.out / name).exists()]:
        raise typer.BadParameter(
            f"{options.out} holds a run of one seed ({held[0]}), and seeds go to folders in it: give another one by "
            "--out"
        )
    states = {seed: run_state(seed_folder(options.out, seed)) for seed in each}
    if options.resume and options.force:
        raise typer.BadParameter("--resume goes on with runs, and --force replaces them: give one of them")
    if options.resume and set(states.values()) == {"none"}:
        raise typer.BadParameter(
            f"--resume: there is no run of these seeds to go on with in {options.out}: leave it out"
        )
    if options.force:
        return set()
    for seed, settings in each.items():
        if states[seed] != "none":
            check_settings(seed_folder(options.out, seed), settings, states[seed])
    return {seed for seed, state in states.items() if state == "finished"}


def _read(folder: Path, settings: Settings, options: RunOptions) -> Sequence[Number]:
    """Return the numbers of a finished run, measured again from its weights if it has no file of them."""
    if not (folder / TABLE).is_file():
        return load_and_measure(folder, settings, options.device).numbers
    return read_numbers(folder / TABLE)


def seed_folder(out: Path, seed: int) -> Path:
    """Return the folder of a seed."""
    return out / f"seed-{seed}"


def seed_folders(out: Path) -> dict[int, Path]:
    """Return seed -> folder of the runs that are in a folder of several seeds, in the order of the seeds."""
    found = {int(path.name[5:]): path for path in out.glob("seed-*") if re.fullmatch(r"seed-\d+", path.name)}
    return {seed: found[seed] for seed in sorted(found) if (found[seed] / CONFIG).is_file()}


def check_no_seeds(out: Path) -> None:
    """Raise a BadParameter if a folder holds runs of several seeds, and is to be that of one."""
    if folders := seed_folders(out):
        raise typer.BadParameter(
            f"{out} holds runs of several seeds (seed-{min(folders)}): go on with them by --seeds, or give another "
            "folder by --out"
        )
