"""The command ``pyro-mm evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ..experiments.console import parse_device, report_errors
from ..experiments.runs import (
    CHECKPOINT,
    CONFIG,
    WEIGHTS,
    read_settings,
    run_state,
    settings_difference,
    weights_path,
)
from .options import Data, Device
from .output import print_run
from .run import load_and_measure
from .seed_table import print_seeds
from .seeds import seed_folders

Directory = Annotated[Path, typer.Argument(help="Folder that pyro-mm train wrote, of one seed or of several.")]
Rows = Annotated[int | None, typer.Option(min=1, help="Number of test rows to evaluate; by default that of the run.")]
EvidenceParticles = Annotated[
    int | None, typer.Option(min=2, help="Draws per row, K, of the likelihoods; by default those of the run.")
]
Fitted = Annotated[
    bool | None,
    typer.Option(
        "--fitted/--no-fitted",
        help="Estimate likelihoods by proposals fitted to each row, with the guide's beside them, or by the guide "
        "alone; by default as the run did, and fitted for a run of version 0.2 or earlier.",
        show_default=False,
    ),
]


def evaluate(
    directory: Directory,
    data: Data = None,
    device: Device = None,
    rows: Rows = None,
    evidence_particles: EvidenceParticles = None,
    fitted: Fitted = None,
) -> None:
    """Load the weights of a run and print its table again, with the same numbers; of seeds, the table over them."""
    folders = seed_folders(directory)
    if not (directory / CONFIG).is_file() and not folders:
        raise typer.BadParameter(f"there is no {directory / CONFIG}: expected a folder that train wrote")
    if not folders and weights_path(directory) is None and not (directory / CHECKPOINT).is_file():
        raise typer.BadParameter(f"there is no {directory / WEIGHTS}: expected a folder that train wrote")
    place = parse_device(device)
    changed: dict[str, Any] = {
        "data": data and str(data), "rows": rows, "evidence_particles": evidence_particles, "fitted": fitted,
    }  # fmt: skip
    changed = {name: value for name, value in changed.items() if value is not None}
    with report_errors(lambda: "nothing was changed"):
        if folders:
            _evaluate_seeds(folders, changed, place)
            return
        settings = replace(read_settings(directory), **changed)
        run = load_and_measure(directory, settings, place)
    print_run(settings, run.objective, run.found)
    if run.epochs is not None:
        typer.echo(f"the run is unfinished: these are its weights after epoch {run.epochs} of {settings.epochs}")


def _evaluate_seeds(folders: Mapping[int, Path], changed: Mapping[str, Any], device: torch.device) -> None:
    """Measure the finished runs of several seeds, and print the table over them.

    Raises:
        ValueError: a file is damaged, none is finished, or they are of different settings.
    """
    finished = {seed: folder for seed, folder in folders.items() if run_state(folder) == "finished"}
    for seed in folders.keys() - finished.keys():
        typer.echo(f"seed {seed} is unfinished, and left out")
    if not finished:
        raise ValueError(f"no run of {', '.join(map(str, folders.values()))} is finished: go on with their training")
    settings = {seed: replace(read_settings(folder), **changed) for seed, folder in finished.items()}
    first = min(finished)
    for seed, own in settings.items():
        if difference := settings_difference(replace(settings[first], seed=seed), own):
            raise ValueError(
                f"{finished[first]} and {finished[seed]} are of different settings ({difference}): expected one recipe "
                "under several seeds. Evaluate each by itself"
            )
    numbers = {seed: load_and_measure(finished[seed], settings[seed], device).numbers for seed in finished}
    print_seeds(settings[first], numbers)
