"""Printed tables of a run, and the files in its folder."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from ..experiments.console import print_table
from ..experiments.estimates import FITTED_TEXT
from ..experiments.evaluation import format_lines
from ..experiments.runs import CHECKPOINT, EVIDENCE, HISTORY, INFERENCE_DATA, TABLE, WEIGHTS, Settings
from ..objectives.objective import Objective
from ..recipes import Recipe
from ..training.history import History
from ..training.weights import save
from .numbers import Number, write_numbers
from .training import Measurements

COLUMNS = ("log_prob", "standard_error", "ess", "pareto_k")


def print_run(settings: Settings, objective: Objective, found: Measurements) -> None:
    """Print the table of a run and the lines below it."""
    title = f"{settings.recipe} on {settings.data_name}, mean over {found.size} test rows"
    print_table(title, *format_lines(found.lines))
    typer.echo(proposals_text(settings))
    typer.echo(f"training objective: {objective.estimator_text}; {objective.target}")
    for each in found.predictions:
        typer.echo(f"{each.target} accuracy given the {' and the '.join(each.given)}: {each.accuracy:.1%}")


def proposals_text(settings: Settings) -> str:
    """Say what the importance-sampled likelihoods of a table were drawn from."""
    if settings.fitted:
        return f'likelihoods: draws of a proposal {FITTED_TEXT}; "by the guide": draws of the guide, as many'
    return "likelihoods: draws of the guide"


def write_run(
    out: Path,
    settings: Settings,
    run: Recipe,
    history: History,
    found: Measurements,
    numbers: Sequence[Number],
    figures: Mapping[str, Any],
) -> None:
    """Write the files of a run, and remove its checkpoint last: a run without one is finished.

    The columns of evidence.csv whose names begin with "guide_" are estimates by draws of the guide, beside others.
    """
    settings.write(out)
    history.to_csv(out / HISTORY)
    save(out / WEIGHTS, run.model, run.guide, notes=asdict(settings))
    write_numbers(out / TABLE, numbers, rows=found.size)
    likelihoods = found.likelihoods
    with open(out / EVIDENCE, "w", newline="") as file:
        writer = csv.writer(file)
        proposals = {"": [each.evidence for each in likelihoods]}
        if settings.fitted:
            proposals["guide_"] = [each.guide for each in likelihoods]
        writer.writerow(("quantity", "row", *(f"{prefix}{name}" for prefix in proposals for name in COLUMNS)))
        for evidence in zip(*proposals.values(), strict=True):
            columns = [getattr(each, name).tolist() for each in evidence for name in COLUMNS]
            for row, values in enumerate(zip(*columns, strict=True)):
                writer.writerow((evidence[0].quantity, row, *values))
    likelihoods[0].evidence.to_arviz().to_netcdf(str(out / INFERENCE_DATA))
    for name, figure in figures.items():
        figure.savefig(out / f"{name}.png", dpi=120)
    (out / CHECKPOINT).unlink(missing_ok=True)
