"""The command ``pyro-mm reproduce``: trains and measures what a paper reports, and goes on where it was stopped."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .batch import Batch
from .recipes import Recipe
from .recipes.published import REPRODUCTIONS, Figure, Reproduction
from .report import share, show
from .train import fit

HEADER = ("quantity", "proposal", "K", "rows", "published", "here", "s.e.", "k-hat > 0.7")
COURSE_ROWS, COURSE_PARTICLES = 500, 100


class Stopped(Exception):
    """The time that a run was given is over."""


def reproduce(
    name: Annotated[str | None, typer.Argument(help="One of --list.", show_default=False)] = None,
    list_: Annotated[bool, typer.Option("--list", help="Names what can be reproduced, and leaves it at that.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="In place of the paper's.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Stops at the end of the epoch in which they are over.")] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Test rows of the table, the first ones; by default all.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    course: Annotated[int, typer.Option(min=1, help="Epochs between two points of course.csv.")] = 10,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Trace and compile the step first.")] = True,
    data: Annotated[Path | None, typer.Option(help="Folder of the data files.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, .. By default CUDA where there is one.")] = None,
    out: Annotated[Path | None, typer.Option(help="By default runs/reproduce/<name>.")] = None,
) -> None:
    """Trains and measures what a paper reports. The same command goes on from where a run was stopped."""
    if list_ or name is None:
        show("pyro-mm reproduce NAME", ("name", "what", "epochs"), [
            (key, r.title, str(r.epochs)) for key, r in REPRODUCTIONS.items()
        ])  # fmt: skip
        return
    if name not in REPRODUCTIONS:
        raise typer.BadParameter(f"unknown reproduction {name!r}: expected one of {', '.join(REPRODUCTIONS)}")
    what, out = REPRODUCTIONS[name], out or Path("runs") / "reproduce" / name
    out.mkdir(parents=True, exist_ok=True)
    train, test = what.data(**({"directory": data} if data else {}))
    torch.manual_seed(seed)
    run, wanted = what.recipe(train), epochs or what.epochs
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    test = test.to(where)
    watch = _Watch(what, run, test, out, wanted, course, minutes)
    try:
        fit(
            *run,
            train,
            epochs=wanted,
            batch_size=what.batch_size,
            optimizer=what.optimizer,
            transform=what.transform,
            checkpoint=out / "checkpoint.pt",
            compile=compile,
            seed=seed,
            device=where,
            progress=False,
            callback=watch,
        )
    except Stopped:
        typer.echo(f"stopped after epoch {watch.epoch} of {wanted}; the same command goes on from there")
        return
    table = [_measured(figure, what, run, test[: rows or test.size], seed) for figure in what.figures]
    (out / "table.json").write_text(json.dumps({"epochs": wanted, "seed": seed, "rows": table}, indent=2) + "\n")
    show(
        f"{what.title}: {wanted} of {what.epochs} epochs, seed {seed}; {what.pixels}",
        HEADER,
        [_cells(r) for r in table],
    )
    typer.echo(f"written to {out}")


class _Watch:
    """Called after every epoch: says how it goes, records the course of the first figure, and minds the time."""

    def __init__(
        self, what: Reproduction, run: Recipe, test: Batch, out: Path, epochs: int, course: int, minutes: float | None
    ):
        self.what, self.run, self.test, self.out = what, run, test[:COURSE_ROWS], out
        self.epochs, self.course, self.minutes = epochs, course, minutes
        self.start, self.last, self.epoch = time.perf_counter(), time.perf_counter(), 0

    def __call__(self, epoch: int, entry: dict[str, float]) -> None:
        now = time.perf_counter()
        text = f"epoch {epoch}/{self.epochs}: loss {entry['loss']:.3f}, {now - self.last:.1f} s"
        _append(self.out / "history.csv", {"epoch": epoch, "seconds": now - self.last, **entry})
        self.epoch = epoch
        if epoch % self.course == 0 or epoch == self.epochs:
            figure = self.what.figures[0]
            evidence = figure.estimate(
                self.run.model, self.run.guide, self.test, num_particles=COURSE_PARTICLES, seed=0
            )
            value, error = evidence.mean()
            _append(self.out / "course.csv", {"epoch": epoch, "value": value, "standard_error": error})
            text += f"; {evidence.quantity} {value:.2f} ({self.test.size} rows, K = {COURSE_PARTICLES})"
        typer.echo(text)
        if self.minutes is not None and now - self.start > 60 * self.minutes and epoch < self.epochs:
            raise Stopped
        self.last = time.perf_counter()


def _append(path: Path, entry: dict[str, float]) -> None:
    """Adds a line to a table; one of the same epoch or a later one is from a run that went back, and goes."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        with open(path, newline="") as file:
            lines = [line for line in csv.DictReader(file) if int(line["epoch"]) < entry["epoch"]]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(entry))
        writer.writeheader()
        writer.writerows([*lines, entry])


def _measured(figure: Figure, what: Reproduction, run: Recipe, test: Batch, seed: int) -> dict[str, Any]:
    evidence = figure.estimate(run.model, run.guide, test, num_particles=what.num_particles, seed=seed)
    value, error = evidence.mean()
    return {
        "quantity": evidence.quantity, "proposal": figure.proposal, "num_particles": what.num_particles,
        "rows": test.size, "value": value, "standard_error": error, "untrusted": evidence.untrusted(),
        "published": dict(figure.published),
    }  # fmt: skip


def _cells(row: dict[str, Any]) -> list[str]:
    published = ", ".join(f"{value:.2f} ({source})" for source, value in row["published"].items()) or "–"
    return [
        row["quantity"], row["proposal"], str(row["num_particles"]), str(row["rows"]), published,
        f"{row['value']:.3f}", f"{row['standard_error']:.3f}", share(row["untrusted"]),
    ]  # fmt: skip
