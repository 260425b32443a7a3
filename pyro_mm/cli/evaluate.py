"""The command ``pyro-mm evaluate``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..experiments.console import parse_device, report_errors
from ..experiments.runs import CHECKPOINT, CONFIG, WEIGHTS, load_run, read_settings, weights_path
from .options import Data, Device
from .output import print_run
from .rows import load_rows
from .training import build_recipe, measure

Directory = Annotated[Path, typer.Argument(help="Folder that pyro-mm train wrote.")]
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
    """Load the weights of a run and print its table again, with the same numbers."""
    if not (directory / CONFIG).is_file():
        raise typer.BadParameter(f"there is no {directory / CONFIG}: expected a folder that train wrote")
    if weights_path(directory) is None and not (directory / CHECKPOINT).is_file():
        raise typer.BadParameter(f"there is no {directory / WEIGHTS}: expected a folder that train wrote")
    place = parse_device(device)
    with report_errors(lambda: "nothing was changed"):
        settings = read_settings(directory)
        changed: dict[str, Any] = {
            "data": data and str(data), "rows": rows, "evidence_particles": evidence_particles, "fitted": fitted,
        }  # fmt: skip
        settings = replace(settings, **{name: value for name, value in changed.items() if value is not None})
        train, test = load_rows(settings)
        run = build_recipe(settings, train)
        epochs = load_run(directory, run.model, run.guide)
        for module in (run.model, run.guide):
            module.to(place)
        found = measure(run, test.to(place), settings)
    print_run(settings, run.objective, found)
    if epochs is not None:
        typer.echo(f"the run is unfinished: these are its weights after epoch {epochs} of {settings.epochs}")
