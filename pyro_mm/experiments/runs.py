"""The folder of a run of ``pyro-mm train``: its name, its files, and a run that is in it already."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import typer
from torch import nn

from ..training.checkpoint import load_weights
from ..training.history import History
from ..training.weights import load, save
from ..utils.atomic_files import replace_text
from .user_data import is_file

CONFIG = "config.json"
WEIGHTS = "weights.safetensors"
OLD_WEIGHTS = "weights.pt"  # of version 0.2 and earlier
CHECKPOINT = "checkpoint.pt"
HISTORY = "history.csv"
EVIDENCE = "evidence.csv"
INFERENCE_DATA = "evidence.nc"
TABLE = "table.json"
PICTURES = ("training", "generated", "confusion", "latent")
FILES = (
    CONFIG, WEIGHTS, OLD_WEIGHTS, CHECKPOINT, HISTORY, EVIDENCE, INFERENCE_DATA, TABLE,
    *(f"{name}.png" for name in PICTURES),
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """The settings from which a run and its numbers can be rebuilt: the content of config.json.

    Attributes:
        dataset: the name of the data set, or the path of a file of arrays.
        recipe: the name of the recipe.
        objective: the name of the objective; None for that of the recipe.
        estimator: the name of the estimator; None for that of the objective.
        num_particles: draws per row of the estimator; None for its default.
        epochs: epochs of training.
        batch_size: rows per minibatch.
        lr: the step size of Adam.
        seed: the seed of weights, minibatches and draws.
        latent: the dimension of z.
        data: the folder of the data files; None for the default.
        rows: test rows of the table, the first ones.
        evidence_particles: draws per row of the likelihoods.
        compile: compile the training step; None where it pays.
        fitted: estimate likelihoods by proposals fitted to each row; missing in folders of version 0.2 and earlier.
        test: the file of the test rows; None for those of the data set, or rows that are held out of its file.
        kinds: kinds of modalities of a file, as they were given; None for those that their values say.
        digest: of the bytes of the files; None for a data set.
    """

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
    compile: bool | None = None
    fitted: bool = True
    test: str | None = None
    kinds: str | None = None
    digest: str | None = None

    @property
    def data_name(self) -> str:
        """The name of the data set, or of the file without its folder and suffix."""
        return Path(self.dataset).stem if is_file(self.dataset) else self.dataset

    @property
    def name(self) -> str:
        """The name of the run's folder: data set and recipe, then objective and estimator if they were chosen."""
        return "-".join(part for part in (self.data_name, self.recipe, self.objective, self.estimator) if part)

    def write(self, out: Path) -> None:
        """Write config.json into a folder."""
        replace_text(out / CONFIG, json.dumps(asdict(self), indent=2) + "\n")


def read_settings(out: Path) -> Settings:
    """Read the config.json of a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is damaged, or was not written by ``pyro-mm train``; names the path.
    """
    path = out / CONFIG
    try:
        settings = Settings(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or was not written by pyro-mm train: {error}") from error
    for field in fields(settings):
        value, kinds = getattr(settings, field.name), str(field.type).split(" | ")
        fits = type(value).__name__ in kinds or (value is None and "None" in kinds)
        if not fits and not (kinds == ["float"] and type(value) is int):
            raise ValueError(f"{path} is damaged: expected {field.name} of type {field.type}, got {value!r}")
    return settings


def resume_command(settings: Settings, **options: Any) -> str:
    """Return the command that goes on with a run, to be pasted into a shell.

    Args:
        settings: the settings of the run.
        options: further options of the command as they were given; None for those that were not.
    """
    words = ["pyro-mm", "train", settings.dataset]
    for name, value in {**asdict(settings), **options}.items():
        option = name.replace("_", "-")
        if name in ("dataset", "digest") or value is None:
            continue
        if isinstance(value, bool):
            words += [] if (name, value) == ("fitted", True) else [f"--{option}" if value else f"--no-{option}"]
        else:
            words += [f"--{option}", str(value)]
    return shlex.join([*words, "--resume"])


State = Literal["none", "unfinished", "finished"]


def run_state(out: Path) -> State:
    """Return the state of the run in a folder; config.json alone, left by a kill in the first epoch, is none."""
    held = {name for name in FILES if (out / name).exists()}
    if {CHECKPOINT, CONFIG} <= held:
        return "unfinished"
    return "finished" if held - {CONFIG} else "none"


def check_settings(out: Path, settings: Settings, state: State) -> None:
    """Raise a BadParameter if the run in a folder has other settings, or a ValueError if they cannot be read."""
    differences = settings_difference(settings, read_settings(out))
    if not differences:
        return
    to_go_on = "Give the same ones to go on, --force to start anew in its place, or another folder by --out"
    if state == "unfinished":
        raise typer.BadParameter(f"{out} holds an unfinished run of other settings ({differences}). {to_go_on}")
    raise typer.BadParameter(f"{out} holds a run of other settings ({differences}). {to_go_on}")


def prepare_folder(out: Path, settings: Settings, force: bool, resume: bool = False) -> bool:
    """Prepare the folder of a run: write its settings, and remove the files of an earlier run if ``force`` says so.

    Args:
        out: the folder, which exists and is locked by this process.
        settings: the settings of the run.
        force: remove a run that is in the folder already.
        resume: go on with an unfinished run, which has to be there.

    Returns:
        True if the folder holds an unfinished run of the same settings, to go on from.

    Raises:
        typer.BadParameter: the folder holds another run, or none to go on with.
    """
    if resume and force:
        raise typer.BadParameter("--resume goes on with a run, and --force replaces it: give one of them")
    state = run_state(out)
    if resume and state != "unfinished":
        found = "holds a finished one" if state == "finished" else "is without a checkpoint"
        raise typer.BadParameter(f"--resume: there is no unfinished run to go on with, {out} {found}: leave it out")
    held = [name for name in FILES if (out / name).exists()]
    if state == "unfinished" and not force:
        check_settings(out, settings, state)
    elif state == "finished" and not force:
        raise typer.BadParameter(
            f"{out} holds a run already ({', '.join(held)}). Give --force to replace it, or another folder by --out"
        )

    goes_on = state == "unfinished" and not force
    if not goes_on:  # else the weights of the interruption stay until the run is finished
        for name in held:
            (out / name).unlink()
    settings.write(out)
    return goes_on


def save_interrupted(out: Path, model: nn.Module, guide: nn.Module, settings: Settings) -> str:
    """Write the weights and the history of an interrupted run, as of its latest checkpoint.

    Args:
        out: the folder of the run.
        model, guide: the pair; the weights of the checkpoint are loaded into it.
        settings: the settings of the run.

    Returns:
        A text for the user: what was saved, and how to go on.
    """
    if not (out / CHECKPOINT).exists():
        remove_settings(out)
        return "before the first checkpoint was written: there is nothing to go on from"
    columns, epochs, steps = load_weights(out / CHECKPOINT, [model, guide])
    save(out / WEIGHTS, model, guide, notes={**asdict(settings), "epochs so far": epochs})
    history = History()
    history.columns.update(columns)
    history.to_csv(out / HISTORY)
    more = f" and {steps} steps of the next" if steps else ""
    return (
        f"after epoch {epochs} of {settings.epochs}{more}, whose weights are in {out / WEIGHTS}. The same command goes "
        f"on from there; pyro-mm evaluate {out} measures them as they are"
    )


def remove_settings(out: Path) -> None:
    """Remove config.json of a run that has neither a checkpoint nor weights."""
    if not (out / CHECKPOINT).exists() and weights_path(out) is None:
        (out / CONFIG).unlink(missing_ok=True)


def weights_path(out: Path) -> Path | None:
    """Return the file of weights in the folder of a run; None if there is none."""
    return next((out / name for name in (WEIGHTS, OLD_WEIGHTS) if (out / name).is_file()), None)


def load_run(out: Path, model: nn.Module, guide: nn.Module) -> int | None:
    """Load the weights of a run into a pair that was built alike.

    Args:
        out: the folder of the run.
        model, guide: the pair.

    Returns:
        None for a finished run. For an unfinished one, whose latest weights are those of its checkpoint, its epochs.

    Raises:
        ValueError: the file is damaged, or does not fit the pair.
    """
    if not (out / CHECKPOINT).exists():
        load(weights_path(out) or out / WEIGHTS, model, guide)
        return None
    return load_weights(out / CHECKPOINT, [model, guide])[1]


def settings_difference(here: Settings, there: Settings) -> str:
    """Describe the settings in which two runs differ; ``compile`` left to its default fits any."""
    one = asdict(here)
    other = asdict(there)
    if here.compile is None:
        other["compile"] = None

    def text(name: str) -> str:
        if name == "digest":
            return "other content of the files"
        here_text, there_text = ("none" if value[name] is None else value[name] for value in (one, other))
        return f"{name} {there_text}, not {here_text}"

    return ", ".join(text(name) for name in one if one[name] != other[name])
