"""The command ``pyro-mm reproduce``: trains and measures what a paper reports, and goes on where it was stopped."""

from __future__ import annotations

import csv
import io
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

from ..batch.batch import Batch
from ..datasets import paired
from ..evidence.evidence import Evidence
from ..recipes import Recipe
from ..training.loop import fit
from ..utils.atomic_files import replace_text
from .console import command, show, torch_device
from .evaluation import share
from .families import FAMILIES, Family, Judge, by_fraction, markdown, measured, side_by_side
from .published import REPRODUCTIONS, Figure, Reproduction
from .studies import STUDIES
from .studies.study import Measured, Sample, Study, tabled

HEADER = ("quantity", "proposal", "K", "rows", "published", "here", "s.e.", "k-hat > 0.7")
COURSE_ROWS, COURSE_PARTICLES, FAMILY_ROWS = 500, 100, 1000


class Stopped(Exception):
    """The time that a run was given is over."""


def reproduce(
    name: Annotated[str | None, typer.Argument(help="One of --list.", show_default=False)] = None,
    list_: Annotated[bool, typer.Option("--list", help="Names what can be reproduced, and leaves it at that.")] = False,
    epochs: Annotated[int | None, typer.Option(min=1, help="In place of those of --list.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.0, max=1e6, help="Stops at the end of the epoch in which they are over.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=2, help="Test rows of the table, the first ones; all, or 1000 of a family.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="The first one, of a study.")] = 0,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many, of a study.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help='Of a study the rows whose "group, name" has this in it; may be given again.'),
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="As published, of a study.")] = False,
    course: Annotated[int, typer.Option(min=1, help="Epochs between two points of course-<seed>.csv.")] = 10,
    compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Trace and compile the step first.")] = True,
    data: Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="Folder of the data files.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, .. By default CUDA where there is one.")] = None,
    out: Annotated[Path | None, typer.Option(file_okay=False, help="By default runs/reproduce/<name>.")] = None,
) -> None:
    """Trains and measures what a paper reports. The same command goes on from where a run was stopped."""
    if list_ or name is None:
        every: dict[str, Reproduction | Family | Study] = {**REPRODUCTIONS, **FAMILIES, **STUDIES}
        table = [(key, what.title, str(what.epochs)) for key, what in every.items()]
        show("pyro-mm reproduce NAME", ("name", "what", "epochs"), table)
        return
    if name not in {*REPRODUCTIONS, *FAMILIES, *STUDIES}:
        known = ", ".join([*REPRODUCTIONS, *FAMILIES, *STUDIES])
        raise typer.BadParameter(f"unknown reproduction {name!r}: expected one of {known}")
    out = out or Path("runs") / "reproduce" / name
    how = _How(out, seed, epochs, minutes, rows, course, compile, torch_device(device), str(data) if data else None)
    with command(lambda: f"the same command goes on from the latest checkpoint in {out}"):
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # or a folder that cannot be written would show after hours
            pass
        try:
            if name in STUDIES:
                _study(STUDIES[name], how, seeds, full, only or [])
            elif name in FAMILIES:
                _family(FAMILIES[name], how)
            else:
                _single(REPRODUCTIONS[name], how)
        except Stopped as stopped:
            typer.echo(f"{stopped}; the same command goes on from there")
            return
        typer.echo(f"written to {out}")


@dataclass(frozen=True)
class _How:
    """What the command line says of a run."""

    out: Path
    seed: int
    epochs: int | None
    minutes: float | None
    rows: int | None
    course: int
    compile: bool
    device: torch.device
    data: str | None
    start: float = field(default_factory=time.perf_counter)

    def load(self, what: Reproduction | Family) -> tuple[Batch, Batch]:
        train, test = what.data(**({"directory": self.data} if self.data else {}))
        return train, test.to(self.device)


def _trained(what: Reproduction | Family | Study, run: Recipe, train: Batch, how: _How, watch: _Watch) -> None:
    steps: dict[str, Any] = {"optimizer": what.optimizer}
    if isinstance(what, Study):
        steps = {"optimizer": partial(what.optimizer, run)}
        if what.scheduler is not None:
            scheduler = what.scheduler
            steps["scheduler"] = lambda optimizer: scheduler(optimizer, watch.epochs)
    fit(
        *run,
        train,
        epochs=watch.epochs,
        batch_size=what.batch_size,
        **steps,
        transform=what.transform,
        checkpoint=watch.out / f"checkpoint-{how.seed}.pt",
        compile=how.compile and what.compile,
        seed=how.seed,
        device=how.device,
        progress=False,
        callback=watch,
    )


def _single(what: Reproduction, how: _How) -> None:
    train, test = how.load(what)
    torch.manual_seed(how.seed)
    run, epochs = what.recipe(train), how.epochs or what.epochs
    first, particles = what.figures[0], {"num_particles": COURSE_PARTICLES, "seed": 0}
    point = partial(first.estimate, run.model, run.guide, test[:COURSE_ROWS], **particles)
    _trained(what, run, train, how, _Watch("", how, how.out, epochs, point))
    test = test[: how.rows or test.size]
    lines = [_measured(figure, what, run, test, how.seed) for figure in what.figures]
    table = {"epochs": epochs, "seed": how.seed, "rows": lines}
    replace_text(how.out / f"table-{how.seed}.json", json.dumps(table, indent=2) + "\n")
    title = f"{what.title}: {epochs} of {what.epochs} epochs, seed {how.seed}; {what.pixels}"
    show(title, HEADER, [_cells(line) for line in lines])


def _family(what: Family, how: _How) -> None:
    train, test = how.load(what)
    test, epochs = test[: how.rows or FAMILY_ROWS], how.epochs or what.epochs
    judge: Judge | None = None
    lines: dict[int, dict[str, dict[str, Any]]] = {part: {} for part in what.fractions}
    for name, member in what.members.items():
        for part in what.fractions:
            folder = how.out / name if part == 1 else how.out / name / f"one-in-{part}"
            done = folder / f"measured-{epochs}-{test.size}-{how.seed}.json"
            if not done.is_file():
                torch.manual_seed(how.seed)
                run, some = member.recipe(train), paired(train, 1 / part, how.seed)
                what_of = name if part == 1 else f"{name}, one in {part}"
                _trained(what, run, some, how, _Watch(f"{what_of}, ", how, folder, epochs))
                stages = [folder]
                if member.second is not None:
                    run, stages = member.second(run), [folder, folder / "second"]
                    _trained(what, run, some, how, _Watch(f"{what_of}, second stage, ", how, stages[1], epochs))
                judge = judge or Judge.trained(what, how.data, how.device)
                found = measured(member, run, train, test, judge, what.num_particles, how.seed)
                seconds = sum(_seconds(stage, how.seed) for stage in stages)
                replace_text(done, json.dumps(found | {"seconds": seconds}, indent=2) + "\n")
            lines[part][name] = json.loads(done.read_text())
    title = f"{what.title}: {epochs} epochs, seed {how.seed}; {test.size} test rows, K = {what.num_particles}"
    tables = {"": side_by_side(lines[1])} if len(lines) == 1 else by_fraction(lines)
    for quantity, (header, cells) in tables.items():
        show(f"{title}; {what.pixels}{quantity and f'; {quantity}'}", header, cells)
    texts = [
        f"{quantity}\n\n{markdown(*table)}" if quantity else markdown(*table) for quantity, table in tables.items()
    ]
    replace_text(how.out / "table.md", "\n".join(texts))


def _study(what: Study, how: _How, seeds: int | None, full: bool, only: list[str]) -> None:
    if full:
        if what.full is None:
            raise typer.BadParameter("--full: this one is as published already")
        what, how = what.full, replace(how, out=how.out / "full")
    epochs, seeds = how.epochs or what.epochs, seeds or what.seeds
    names = {group: [n for n in (*what.known, *what.members) if _wanted(only, group, n)] for group in what.groups}
    runs: dict[str, dict[str, list[Measured]]] = {g: {n: [] for n in each} for g, each in names.items() if each}
    if not runs:
        every = "; ".join(f"{group}, {name}" for group in what.groups for name in what.members)
        raise typer.BadParameter(f"--only: no row has {' or '.join(only)} in its name: {every}")
    for seed in range(how.seed, how.seed + seeds):  # outermost: a run that was stopped has something of every row
        for group in runs:
            sample: Sample | None = None
            for name in runs[group]:
                of_it = "" if name in what.known else f"{epochs}-"
                done = how.out / group / name / f"measured-{of_it}{seed}.json"
                if not done.is_file():
                    sample = sample or Sample(*(_on(part, how.device) for part in what.groups[group](seed, how.data)))
                    found = _of_study(what, group, name, sample, replace(how, seed=seed), epochs)
                    done.parent.mkdir(parents=True, exist_ok=True)
                    replace_text(done, json.dumps(found, indent=2) + "\n")
                runs[group][name].append(json.loads(done.read_text()))
    texts = []
    for group, rows in runs.items():
        published = {name: text for (of_group, name), text in what.published.items() if of_group == group}
        header, cells = tabled(rows, published)
        show(f"{what.title}; {group}: {epochs} epochs, {seeds} seeds", header, cells)
        texts.append(f"{group}\n\n{markdown(header, cells)}")
    replace_text(how.out / "table.md", "\n".join(texts))


def _wanted(only: list[str], group: str, name: str) -> bool:
    return not only or any(part in f"{group}, {name}" for part in only)


def _of_study(what: Study, group: str, name: str, sample: Sample, how: _How, epochs: int) -> Measured:
    if name in what.known:
        return what.known[name](sample, how.seed)
    torch.manual_seed(how.seed)
    run, folder = what.members[name](sample.train), how.out / group / name
    label = f"{group}, {name}, seed {how.seed}, "
    _trained(what, run, sample.train, how, _Watch(label, how, folder, epochs, every=how.course))
    found = what.measure(run, sample, how.seed)
    return {**found, "s/epoch": _seconds(folder, how.seed)}


def _on(part: Any, device: torch.device) -> Any:
    return part.to(device) if hasattr(part, "to") else part


class _Watch:
    """Called after every epoch: says how it goes, records the course of a figure, and minds the time."""

    def __init__(
        self,
        name: str,
        how: _How,
        out: Path,
        epochs: int,
        point: Callable[[], Evidence] | None = None,
        every: int = 1,
    ) -> None:
        self.name, self.how, self.out, self.epochs, self.point, self.every = name, how, out, epochs, point, every
        self.last = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)

    def __call__(self, epoch: int, entry: dict[str, float]) -> None:
        now = time.perf_counter()
        text = f"{self.name}epoch {epoch}/{self.epochs}: loss {entry['loss']:.3f}, {now - self.last:.1f} s"
        _append(self.out / f"history-{self.how.seed}.csv", {"epoch": epoch, "seconds": now - self.last, **entry})
        if self.point is not None and (epoch % self.how.course == 0 or epoch == self.epochs):
            evidence = self.point()
            value, error = evidence.mean()
            _append(self.out / f"course-{self.how.seed}.csv", {"epoch": epoch, "value": value, "standard_error": error})
            text += f"; {evidence.quantity} {value:.2f} ({evidence.rows_text}, K = {COURSE_PARTICLES})"
        if epoch % self.every == 0 or epoch == self.epochs:
            typer.echo(text)
        if self.how.minutes is not None and now - self.how.start > 60 * self.how.minutes and epoch < self.epochs:
            raise Stopped(f"stopped after {self.name}epoch {epoch} of {self.epochs}")
        self.last = time.perf_counter()


def _seconds(folder: Path, seed: int) -> float:
    """The median of the epochs' seconds, but for the first, in which the step is compiled."""
    with open(folder / f"history-{seed}.csv", newline="") as file:
        seconds = [float(line["seconds"]) for line in csv.DictReader(file)]
    return median(seconds[1:] or seconds or [math.nan])


def _append(path: Path, entry: dict[str, float]) -> None:
    """Adds a line, whose first value is the epoch, to a table; one of the same epoch or a later one is from a run that
    went back, and goes."""
    lines = path.read_text().splitlines()[1:] if path.is_file() else []
    kept = [line for line in lines if int(line.split(",", 1)[0]) < entry["epoch"]]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(entry), lineterminator="\n")
    writer.writeheader()
    text.writelines(f"{line}\n" for line in kept)
    writer.writerow(entry)
    replace_text(path, text.getvalue())


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
