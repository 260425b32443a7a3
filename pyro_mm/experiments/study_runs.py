"""The run of a study: its rows trained and measured under each seed, and its tables."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import typer

from ..utils.atomic_files import replace_text
from .console import markdown, print_table
from .epoch_choice import BestEpoch
from .studies.study import Images, Measurements, Sample, Study, build_table, with_gain
from .study_pictures import Draw, save_images, write_pictures
from .trainings import Progress, RunOptions, seconds_per_epoch, train_recipe


def reproduce_study(
    study: Study,
    options: RunOptions,
    num_seeds: int | None,
    full: bool,
    only: Sequence[str],
    finished: bool = False,
) -> None:
    """Train and measure the rows of a study under each seed, print its tables and write table.md and its pictures.

    A row that has been measured before, under the same epochs, seed and proposals, is read from its file. Processes
    that train different rows or seeds may share a folder. The table that is printed has the chosen rows and seeds; that
    of table.md and the pictures have all rows of the folder that are finished.

    Args:
        study: the study.
        options: the options of the run.
        num_seeds: the number of seeds; None for that of the study.
        full: take the study at its published size.
        only: parts of "group, name" that choose rows; empty for all.
        finished: train nothing, and take the rows and seeds that are finished.

    Raises:
        typer.BadParameter: the study has no other published size, or no row is chosen, or none is finished.
    """
    if full:
        if study.full is None:
            raise typer.BadParameter("--full: this one is as published already")
        study = study.full
        options = replace(options, out=options.out / "full")
    epochs = options.epochs or study.epochs
    seeds = range(options.seed, options.seed + (num_seeds or study.seeds))
    chosen = _choose_rows(study, only)
    files = _Files(study, options, epochs)

    if not finished:
        _run(study, options, epochs, seeds, chosen, files)
    runs = _read(files, chosen, seeds)
    if not any(runs.values()):
        raise typer.BadParameter(f"--finished: {options.out} holds no finished run of these rows, epochs and seeds")
    for title, header, cells in _tables(study, runs, epochs, len(seeds)):
        print_table(f"{study.title}; {title}", header, cells)

    everything = _read(files, _choose_rows(study, ()), range(max(seeds.stop, study.seeds)))
    tables = _tables(study, everything, epochs, max(map(len, _each_row(everything))))
    texts = [f"{title}\n\n{markdown(header, cells)}" for title, header, cells in tables]
    replace_text(options.out / "table.md", "\n".join(texts))
    if options.draw is not None:
        _write_pictures(everything, files, options.draw)


def _run(
    study: Study, options: RunOptions, epochs: int, seeds: range, chosen: Mapping[str, Sequence[str]], files: _Files
) -> None:
    """Train and measure the chosen rows under each seed, but for those that are finished."""
    for seed in seeds:  # outermost: a stopped run has something of every row
        for group, names in chosen.items():
            sample: Sample | None = None
            for name in names:
                done = files.measured(group, name, seed)
                if done.is_file():
                    continue
                sample = sample or _load(study, group, seed, options)
                found, images = _train_and_measure(study, group, name, sample, replace(options, seed=seed), epochs)
                done.parent.mkdir(parents=True, exist_ok=True)
                if images:
                    save_images(files.images(group, name, seed), images)
                replace_text(done, json.dumps(found, indent=2) + "\n")


@dataclass(frozen=True)
class _Files:
    """The files of a study's rows."""

    study: Study
    options: RunOptions
    epochs: int

    def measured(self, group: str, name: str, seed: int) -> Path:
        """Return the file of the measurements of a row under a seed."""
        file = _file_name(self.study, name, self.epochs, seed, self.options.fitted)
        return self.options.out / group / name / file

    def images(self, group: str, name: str, seed: int) -> Path:
        """Return the file of the images of a row under a seed."""
        return self.options.out / group / name / f"images-{self.epochs}-{seed}.pt"


Found = Mapping[str, Mapping[str, Mapping[int, Measurements]]]  # group -> name -> seed -> measurements


def _read(files: _Files, chosen: Mapping[str, Sequence[str]], seeds: range) -> Found:
    """Read the measurements of rows that are finished; rows and groups without any are left out."""
    runs: dict[str, dict[str, dict[int, Measurements]]] = {}
    for group, names in chosen.items():
        for name in names:
            paths = {seed: files.measured(group, name, seed) for seed in seeds}
            found = {seed: json.loads(path.read_text()) for seed, path in paths.items() if path.is_file()}
            if found:
                runs.setdefault(group, {})[name] = found
    return runs


def _each_row(runs: Found) -> list[Mapping[int, Measurements]]:
    return [found for rows in runs.values() for found in rows.values()]


def _tables(study: Study, runs: Found, epochs: int, num_seeds: int) -> list[tuple[str, Sequence[str], list[list[str]]]]:
    """Return title, header and cells of each group's table; rows with fewer seeds than asked for say so."""
    tables = []
    state = f"{epochs} epochs" if study.validate is None else f"best of {epochs} epochs on validation rows"
    for group, rows in runs.items():
        published = {name: text for (of_group, name), text in study.published.items() if of_group == group}
        if study.gain is not None:
            rows = with_gain(rows, *study.gain)
        header, cells = build_table({name: list(found.values()) for name, found in rows.items()}, published)
        for line, (name, found) in zip(cells, rows.items(), strict=True):
            if len(found) < num_seeds:
                line[0] = f"{name} ({len(found)} of {num_seeds} seeds)"
        tables.append((f"{group}: {state}, {num_seeds} seeds", header, cells))
    return tables


def _write_pictures(runs: Found, files: _Files, draw: Draw) -> None:
    """Write the pictures of each group, each member under its first seed."""
    for group, rows in runs.items():
        lines = {name: files.images(group, name, min(found)) for name, found in rows.items()}
        write_pictures(files.options.out / group, lines, draw)


def _file_name(study: Study, name: str, epochs: int, seed: int, fitted: bool) -> str:
    """Return the name of the file of a row's measurements; what is known without training depends on the seed alone."""
    if name in study.known:
        return f"measured-{seed}.json"
    return f"measured-{'fitted-' * fitted}{'best-of-' * (study.validate is not None)}{epochs}-{seed}.json"


def _choose_rows(study: Study, only: Sequence[str]) -> dict[str, list[str]]:
    """Return group -> names, of the rows whose "group, name" has one of the texts in it.

    Raises:
        typer.BadParameter: there is no such row.
    """
    chosen: dict[str, list[str]] = {}
    for group in study.groups:
        for name in (*study.known, *study.members):
            if not only or any(part in f"{group}, {name}" for part in only):
                chosen.setdefault(group, []).append(name)
    if not chosen:
        every = "; ".join(f"{group}, {name}" for group in study.groups for name in study.members)
        raise typer.BadParameter(f"--only: no row has {' or '.join(only)} in its name: {every}")
    return chosen


def _load(study: Study, group: str, seed: int, options: RunOptions) -> Sample:
    """Load the data of a seed onto the device."""
    return Sample(*(_to_device(part, options.device) for part in study.groups[group](seed, options.data)))


def _to_device(part: Any, device: torch.device) -> Any:
    return part.to(device) if hasattr(part, "to") else part


def _train_and_measure(
    study: Study, group: str, name: str, sample: Sample, options: RunOptions, epochs: int
) -> tuple[Measurements, Mapping[str, Images]]:
    """Return measurements and images of one row under one seed, after training it unless it is known without."""
    if name in study.known:
        return study.known[name](sample, options.seed), {}
    torch.manual_seed(options.seed)
    run = study.members[name](sample.train)
    folder = options.out / group / name
    progress = Progress(f"{group}, {name}, seed {options.seed}, ", options, folder, epochs, every=options.course)
    validate = study.validate
    if validate is None:
        train_recipe(study, run, sample.train, options, progress)
        chosen: dict[str, float] = {}
    else:
        best = BestEpoch(run, lambda: validate(run, sample, options.seed), folder, options.seed, progress)
        train_recipe(study, run, sample.train, options, progress, best)
        chosen = {"epoch": float(best.restore())}
    found = study.measure(run, sample, options.seed, options.fitted)
    images = {} if study.images is None else study.images(run, sample, options.seed)
    return {**found, **chosen, "s/epoch": seconds_per_epoch(folder, options.seed)}, images
