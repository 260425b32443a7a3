"""The run of a study: its rows trained and measured under each seed, and its tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import typer

from ..utils.atomic_files import replace_text
from .console import markdown, print_table
from .epoch_choice import BestEpoch
from .studies.study import Measurements, Sample, Study, build_table
from .trainings import Progress, RunOptions, seconds_per_epoch, train_recipe


def reproduce_study(study: Study, options: RunOptions, num_seeds: int | None, full: bool, only: Sequence[str]) -> None:
    """Train and measure the rows of a study under each seed, print its tables and write table.md.

    A row that has been measured before, under the same epochs, seed and proposals, is read from its file.

    Args:
        study: the study.
        options: the options of the run.
        num_seeds: the number of seeds; None for that of the study.
        full: take the study at its published size.
        only: parts of "group, name" that choose rows; empty for all.

    Raises:
        typer.BadParameter: the study has no other published size, or no row is chosen.
    """
    if full:
        if study.full is None:
            raise typer.BadParameter("--full: this one is as published already")
        study = study.full
        options = replace(options, out=options.out / "full")
    epochs = options.epochs or study.epochs
    num_seeds = num_seeds or study.seeds
    runs = _choose_rows(study, only)

    for seed in range(options.seed, options.seed + num_seeds):  # outermost: a stopped run has something of every row
        for group in runs:
            sample: Sample | None = None
            for name in runs[group]:
                done = options.out / group / name / _file_name(study, name, epochs, seed, options.fitted)
                if not done.is_file():
                    sample = sample or _load(study, group, seed, options)
                    found = _train_and_measure(study, group, name, sample, replace(options, seed=seed), epochs)
                    done.parent.mkdir(parents=True, exist_ok=True)
                    replace_text(done, json.dumps(found, indent=2) + "\n")
                runs[group][name].append(json.loads(done.read_text()))

    texts = []
    for group, rows in runs.items():
        published = {name: text for (of_group, name), text in study.published.items() if of_group == group}
        header, cells = build_table(rows, published)
        state = f"{epochs} epochs" if study.validate is None else f"best of {epochs} epochs on validation rows"
        print_table(f"{study.title}; {group}: {state}, {num_seeds} seeds", header, cells)
        texts.append(f"{group}: {state}, {num_seeds} seeds\n\n{markdown(header, cells)}")
    replace_text(options.out / "table.md", "\n".join(texts))


def _file_name(study: Study, name: str, epochs: int, seed: int, fitted: bool) -> str:
    """Return the name of the file of a row's measurements; what is known without training depends on the seed alone."""
    if name in study.known:
        return f"measured-{seed}.json"
    return f"measured-{'fitted-' * fitted}{'best-of-' * (study.validate is not None)}{epochs}-{seed}.json"


def _choose_rows(study: Study, only: Sequence[str]) -> dict[str, dict[str, list[Measurements]]]:
    """Return group -> name -> an empty list, for the rows whose "group, name" has one of the texts in it.

    Raises:
        typer.BadParameter: there is no such row.
    """
    chosen: dict[str, dict[str, list[Measurements]]] = {}
    for group in study.groups:
        for name in (*study.known, *study.members):
            if not only or any(part in f"{group}, {name}" for part in only):
                chosen.setdefault(group, {})[name] = []
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
) -> Measurements:
    """Measure one row of a table under one seed, after training it unless it is known without."""
    if name in study.known:
        return study.known[name](sample, options.seed)
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
    return {**found, **chosen, "s/epoch": seconds_per_epoch(folder, options.seed)}
