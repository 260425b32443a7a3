"""The folder of a run: what it is called, what is in it, and whether there is one already."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import typer
from torch import nn

from ..training.checkpoint import load_weights
from ..training.history import History
from ..training.weights import load, save
from ..utils.atomic_files import replace_text

CONFIG, WEIGHTS, CHECKPOINT, HISTORY = "config.json", "weights.pt", "checkpoint.pt", "history.csv"
PICTURES = ("training", "generated", "confusion", "latent")
FILES = (
    CONFIG, WEIGHTS, CHECKPOINT, HISTORY, "evidence.csv", "evidence.nc", *(f"{name}.png" for name in PICTURES)
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Everything that rebuilds a run and its numbers: config.json."""

    dataset: str
    recipe: str
    objective: str | None
    estimator: str | None
    num_particles: int | None
    epochs: int
    batch_size: int
    lr: float
    seed: int
    latent: int
    data: str | None
    rows: int
    evidence_particles: int
    compile: bool = False

    @property
    def name(self) -> str:
        """The name of its folder: data set and recipe, and objective and estimator where they are not the recipe's."""
        return "-".join(part for part in (self.dataset, self.recipe, self.objective, self.estimator) if part)

    def write(self, out: Path) -> None:
        """Write config.json."""
        replace_text(out / CONFIG, json.dumps(asdict(self), indent=2) + "\n")


def read_settings(out: Path) -> Settings:
    """Read config.json.

    Raises:
        ValueError: it is damaged, or not one that ``train`` wrote, with its path.
    """
    path = out / CONFIG
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        settings = Settings(**held)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or was not written by pyro-mm train: {error}") from error
    for field in fields(settings):
        value, kinds = getattr(settings, field.name), str(field.type).split(" | ")
        fits = type(value).__name__ in kinds or (value is None and "None" in kinds)
        if not fits and not (kinds == ["float"] and type(value) is int):
            raise ValueError(f"{path} is damaged: expected {field.name} of type {field.type}, got {value!r}")
    return settings


def begin(out: Path, settings: Settings, force: bool) -> bool:
    """Prepare the folder of a run, which exists and is this process's alone.

    Args:
        out: the folder.
        settings: those of the run.
        force: whether a run that is there already is removed.

    Returns:
        Whether an unfinished run of the same settings is there, to go on from.

    Raises:
        typer.BadParameter: another run is there.
    """
    held = [name for name in FILES if (out / name).exists()]
    unfinished = CHECKPOINT in held and CONFIG in held
    if not force and unfinished:
        differences = _differences(settings, read_settings(out))
        if differences:
            raise typer.BadParameter(
                f"{out} holds an unfinished run of other settings ({differences}). Give the same ones to go on, "
                "--force to start anew in its place, or another folder by --out"
            )
    elif not force and set(held) - {CONFIG}:  # which alone is of a run that was killed in its first epoch
        raise typer.BadParameter(
            f"{out} holds a run already ({', '.join(held)}). Give --force to replace it, or another folder by --out"
        )
    kept = {CONFIG, CHECKPOINT} if unfinished and not force else set()
    for name in {*held} - kept:
        (out / name).unlink()
    settings.write(out)
    return bool(kept)


def leave(out: Path, model: nn.Module, guide: nn.Module, settings: Settings) -> str:
    """Keep the weights of a run that is interrupted, those of its latest checkpoint; returns what to tell."""
    if not (out / CHECKPOINT).exists():
        abandon(out)
        return "before the end of the first epoch that was kept: there is nothing to go on from"
    columns, epochs = load_weights(out / CHECKPOINT, [model, guide])
    save(out / WEIGHTS, model, guide)
    history = History()
    history.columns.update(columns)
    history.to_csv(out / HISTORY)
    return (
        f"after epoch {epochs} of {settings.epochs}, whose weights are in {out / WEIGHTS}. The same command goes on "
        f"from there; pyro-mm evaluate {out} measures them as they are"
    )


def abandon(out: Path) -> None:
    """Remove the settings of a run that has no epoch to go on from."""
    if not (out / CHECKPOINT).exists() and not (out / WEIGHTS).exists():
        (out / CONFIG).unlink(missing_ok=True)


def load_run(out: Path, model: nn.Module, guide: nn.Module) -> int | None:
    """Load the weights of a run into a pair built alike.

    Returns:
        The epochs of an unfinished run, whose latest weights are those of its checkpoint; None of a whole one.
    """
    if not (out / CHECKPOINT).exists():
        load(out / WEIGHTS, model, guide)
        return None
    return load_weights(out / CHECKPOINT, [model, guide])[1]


def _differences(here: Settings, there: Settings) -> str:
    one, other = asdict(here), asdict(there)

    def text(value: Any) -> str:
        return "none" if value is None else str(value)

    return ", ".join(f"{k} {text(other[k])}, not {text(v)}" for k, v in one.items() if v != other[k])
