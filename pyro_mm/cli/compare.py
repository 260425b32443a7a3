"""The command ``pyro-mm compare``."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..diagnostics.comparison import Comparison
from ..diagnostics.comparison import compare as compare_models
from ..evidence.evidence import Evidence
from ..experiments.console import check_writable, format_share, parse_device, print_table, report_errors
from ..experiments.evaluation import Line
from ..experiments.runs import Settings
from .choices import TRAINED, check_choices, join_names
from .options import (
    BatchSize,
    Compile,
    Data,
    Dataset,
    Device,
    Epochs,
    EvidenceParticles,
    Fitted,
    Kinds,
    Rate,
    Rows,
    Seed,
    TestFile,
)
from .output import proposals_text
from .rows import find_source, load_rows
from .training import Measurements, build_recipe, measure, train_rows

COMPARED = "mvae,jmvae-kl,mmvae,mopoe"
FILES = ("table.csv", "comparison.txt", "forest.png")
LATENT = 16

Recipes = Annotated[
    str, typer.Option(help=f"Recipes to compare, two at least, separated by commas. Any of {join_names(TRAINED)}.")
]
Out = Annotated[
    Path | None, typer.Option(file_okay=False, help="Folder of the results. By default runs/DATASET-compare.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a comparison that is in the folder already.")]


def compare(
    dataset: Dataset,
    recipes: Recipes = COMPARED,
    epochs: Epochs = None,
    batch_size: BatchSize = 128,
    lr: Rate = 3e-3,
    seed: Seed = 0,
    data: Data = None,
    device: Device = None,
    out: Out = None,
    rows: Rows = 1000,
    evidence_particles: EvidenceParticles = 1000,
    fitted: Fitted = True,
    compile: Compile = None,
    force: Force = False,
    test: TestFile = None,
    kinds: Kinds = None,
) -> None:
    """Train several recipes with the same settings, print a table of them, and write it with a plot to a folder.

    The folder gets the table (table.csv), the differences of the joint log-likelihood with their errors
    (comparison.txt), and a plot of these (forest.png).
    """
    place = parse_device(device)
    names = [name.strip() for name in recipes.split(",")]
    source = find_source(dataset, test, kinds)
    each = [
        Settings(
            source.dataset, name, None, None, None, epochs or source.epochs, batch_size, lr, seed, LATENT,
            str(data) if data else None, rows, evidence_particles, compile, fitted, *source.file,
        )
        for name in names
    ]  # fmt: skip
    for settings in each:
        check_choices(settings)
    if len(set(names)) < max(2, len(names)):
        raise typer.BadParameter(f"--recipes: expected two different recipes at least, got {recipes}")
    where = out or Path("runs") / f"{each[0].data_name}-compare"
    _check_folder(where, force)
    with report_errors(lambda: "before anything was trained"):
        check_writable(where)

    columns: dict[str, dict[tuple[str, str], str]] = {}
    evidence: dict[str, Evidence] = {}
    for settings in each:
        with report_errors(lambda: f"{len(columns)} of {len(names)} recipes were trained, and nothing was written"):
            batches = load_rows(settings)
            run = build_recipe(settings, batches[0])
            _, held_out, seconds = train_rows(settings, place, run, batches)
            found = measure(run, held_out, settings)
        columns[settings.recipe] = _column(found, seconds)
        evidence[settings.recipe] = found.likelihoods[0].evidence
    title = (
        f"{settings.data_name}: {held_out.size} test rows, {settings.epochs} epochs each; nats per row ± standard error"
    )
    keys = dict.fromkeys(key for column in columns.values() for key in column)
    table = [(key[1], *(column.get(key, "") for column in columns.values())) for key in keys]
    print_table(title, ("", *columns), table)
    typer.echo(proposals_text(settings))
    with report_errors(lambda: f"the recipes were trained, and {where} could not be written"):
        _write(where, ("", *columns), table, compare_models(evidence), title)
    typer.echo(f"written to {where}")


def _check_folder(where: Path, force: bool) -> None:
    """Raise a BadParameter if a folder holds a comparison that is not to be replaced."""
    held = [name for name in FILES if (where / name).exists()]
    if held and not force:
        raise typer.BadParameter(
            f"{where} holds a comparison already ({join_names(held)}). Give --force to replace it, or another folder "
            "by --out"
        )


def _column(found: Measurements, seconds: float) -> dict[tuple[str, str], str]:
    """Return the column of a recipe: (quantity, name of the line) -> cell."""
    comparable = [line for line in found.lines if line.comparable]
    column = {(line.title, name): cell for line in comparable for name, cell in _cells(line)}
    column |= {("", f"{each.target} accuracy"): f"{each.accuracy:.1%}" for each in found.predictions}
    return column | {("", "training, seconds"): f"{seconds:.0f}"}


def _cells(line: Line) -> list[tuple[str, str]]:
    """Return a line of the table as pairs (name, cell): its value, its k-hat, and those by the guide."""
    cells = [(line.title, f"{line.value:.3f} ± {line.error:.3f}")]
    if line.ess is not None:
        cells.append(("  rows with k-hat > 0.7", format_share(line.untrusted)))
    if line.by_guide is not None:
        cells.append(("  by the guide", f"{line.by_guide.value:.3f} ± {line.by_guide.error:.3f}"))
        cells.append(("  by the guide, rows with k-hat > 0.7", format_share(line.by_guide.untrusted)))
    return cells


def _write(out: Path, header: Sequence[str], rows: Sequence[Sequence[str]], comparison: Comparison, title: str) -> None:
    """Write the files of a comparison: its table, the differences with their errors, and a plot of these.

    Args:
        out: the folder.
        header, rows: the table as it was printed.
        comparison: of the joint log-likelihoods.
        title: of the table.
    """
    from .. import plots

    out.mkdir(parents=True, exist_ok=True)
    with open(out / FILES[0], "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *([cell.strip() for cell in row] for row in rows)])
    (out / FILES[1]).write_text(f"{title}\n\n{comparison!r}\n", encoding="utf-8")
    figure: Any = plots.forest(comparison).figure
    figure.savefig(out / FILES[2], dpi=120)
