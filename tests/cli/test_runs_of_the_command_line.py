"""The command line: what it prints, what it writes, and how it refuses."""

import csv
import json
import os
import re
import shlex
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import typer
from safetensors.torch import load_file

import pyro_mm as mm
from pyro_mm import cli
from pyro_mm.cli import ESTIMATORS, OBJECTIVES, TRAINED, app
from pyro_mm.experiments import runs
from pyro_mm.utils import locks
from tests.support.command_line import run, text_of

ROWS = 24
FAST = ["--epochs", "1", "--rows", str(ROWS), "--evidence-particles", "50"]
FILES = {
    "config.json", "history.csv", "evidence.csv", "evidence.nc", "weights.safetensors", "table.json",
    "training.png", "generated.png", "confusion.png", "latent.png",
}  # fmt: skip


def numbers(output):
    """The lines of the table, and what follows it up to the time taken."""
    lines = [line.strip() for line in output.splitlines()]
    return [line for line in lines if re.search(r"-\d+\.\d\d\d", line) or "accuracy" in line or "bound" in line]


@pytest.fixture(scope="module", autouse=True)
def few_images():
    """Draw one image per class, as matplotlib takes its time for each; list the options of each drawing."""
    options = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.figures, "SAMPLES_PER_CLASS", 1)
        patch.setattr(cli.figures, "generate", lambda *_, **each: options.append(each) or mm.generate(*_, **each))
        yield options


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing them takes longer than all the rest."""
    monkeypatch.setattr(cli.run, "draw_figures", lambda *_: {})
    return FILES - {name for name in FILES if name.endswith(".png")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, few_images):
    out = tmp_path_factory.mktemp("run") / "a"
    result = run("train", "digits", *FAST, "--latent", 4, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_train_writes_its_files(trained):
    out, output = trained
    assert {path.name for path in out.iterdir()} == FILES
    assert json.loads((out / "config.json").read_text())["recipe"] == "jmvae-kl"
    with open(out / "evidence.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5 * ROWS
    assert rows[0]["quantity"] == "log p(image, label)"
    for quantity in ("log p(image)", "log p(label | image)", "log p(image | label)", "ELBO", "what it bounds"):
        assert quantity in output


def test_the_printed_table_is_the_mean_of_the_rows_of_evidence_csv(trained):
    out, output = trained
    with open(out / "evidence.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["quantity"] == "log p(image)"]
    line = next(line for line in numbers(output) if line.startswith("log p(image) "))
    cells = re.split(r"\s{2,}", line)
    for place, column in ((1, "log_prob"), (6, "guide_log_prob")):
        values = [float(row[column]) for row in rows]
        assert cells[place] == f"{sum(values) / len(values):.3f}"
    assert cells[1] != cells[6] and "by the guide" in output


def test_a_table_without_fitted_proposals_has_the_numbers_of_the_guide(trained):
    """From the weights, with the same numbers that stood beside the others."""
    out, output = trained
    assert json.loads((out / "config.json").read_text())["fitted"] is True
    result = run("evaluate", out, "--no-fitted")
    assert result.exit_code == 0, result.output
    assert "by the guide" not in result.output and "likelihoods: draws of the guide" in result.output
    tables = [[re.split(r"\s{2,}", line) for line in numbers(text)] for text in (output, result.output)]
    beside = {cells[0]: cells[6:] for cells in tables[0] if len(cells) > 6}  # value, error, k-hat
    alone = {cells[0]: [*cells[1:3], cells[4]] for cells in tables[1] if len(cells) == 6}
    assert len(beside) == 5 and alone == beside


def test_evaluate_prints_the_same_numbers_and_writes_nothing(trained):
    out, output = trained
    before = {path.name: os.stat(path).st_mtime_ns for path in out.iterdir()}
    result = run("evaluate", out)
    assert result.exit_code == 0, result.output
    assert {path.name: os.stat(path).st_mtime_ns for path in out.iterdir()} == before
    assert numbers(result.output) == numbers(output)
    assert len(numbers(output)) > 8


def test_train_takes_another_objective_and_estimator(tmp_path, no_pictures):
    options = ["--recipe", "mopoe", "--objective", "elbo", "--estimator", "iwae", "--num-particles", 3, "--no-fitted"]
    result = run("train", "digits", *FAST, *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "IWAE(num_particles=3); lower bound on log p(image, label)" in result.output


def test_images_of_a_class_are_drawn_by_weight_if_the_guide_does_not_encode_labels(trained, few_images, tmp_path):
    """The guide of the run of the fixture, of jmvae-kl, does."""
    assert not any(each["resample"] for each in few_images)
    options = ["--recipe", "mfm-variational", "--latent", 2, "--no-fitted", "--out", tmp_path]
    result = run("train", "digits", *FAST, *options)
    assert result.exit_code == 0, result.output
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert "label accuracy given the image" in result.output
    assert few_images[-1]["resample"] is True


def test_compare_prints_side_by_side_and_writes_its_table_and_plot(tmp_path):
    options = ["--recipes", "mvae, mfm-variational", "--out", tmp_path]
    result = run("compare", "digits", *FAST, *options)
    assert result.exit_code == 0, result.output
    words = ("mvae", "mfm-variational", "log p(image | label)", "label accuracy", "seconds")
    for word in (*words, "by the guide", "by the guide, rows with k-hat > 0.7", "a proposal fitted to each row"):
        assert word in result.output
    assert {path.name for path in tmp_path.iterdir()} == {"table.csv", "comparison.txt", "forest.png"}
    with open(tmp_path / "table.csv", encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["", "mvae", "mfm-variational"]
    joint = next(line for line in lines if line[0] == "log p(image, label)")
    means = [float(cell.split()[0]) for cell in joint[1:]]
    text = (tmp_path / "comparison.txt").read_text(encoding="utf-8")
    best = max(zip(means, header[1:], strict=True))
    assert re.search(rf"{best[1]} +{best[0]:.3f} ± [\d.]+ +reference", text)
    assert (tmp_path / "forest.png").stat().st_size > 2000

    again = run("compare", "digits", *FAST, *options)
    assert again.exit_code == 2
    assert "holds a comparison already (table.csv, comparison.txt, forest.png). Give --force" in text_of(again)


def test_help_names_every_choice():
    text = re.sub(r"[\s│]+", " ", run("train", "--help").output)
    for name in [*TRAINED, *OBJECTIVES, *ESTIMATORS]:
        assert name in text


# -- folders --------------------------------------------------------------------------------------------------------


def test_a_run_of_any_compilation_goes_on_by_default():
    """Steps have the same numbers, so that a run of an earlier version, which wrote False, goes on."""
    saved = runs.Settings("digits", "mvae", None, None, None, 1, 128, 1e-3, 0, 4, None, 40, 50, compile=False)
    assert not runs.settings_difference(replace(saved, compile=None), saved)
    assert runs.settings_difference(replace(saved, compile=True), saved) == "compile False, not True"


def test_folders_are_named_by_what_is_in_them():
    """Two runs that differ in recipe, objective or estimator do not go to one folder."""
    settings = runs.Settings("digits", "mvae", None, None, None, 1, 128, 1e-3, 0, 4, None, 40, 50)
    assert settings.name == "digits-mvae"
    names = {
        runs.Settings("digits", recipe, objective, estimator, *(None, 1, 128, 1e-3, 0, 4, None, 40, 50)).name
        for recipe in TRAINED
        for objective in (None, *OBJECTIVES)
        for estimator in (None, *ESTIMATORS)
    }
    assert len(names) == len(TRAINED) * (1 + len(OBJECTIVES)) * (1 + len(ESTIMATORS))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_is_replaced_only_by_force(trained, tmp_path, monkeypatch, no_pictures):
    """Nothing of it is touched otherwise, and nothing is trained."""
    out = tmp_path / "a"
    out.mkdir()
    for name, content in contents(trained[0]).items():
        (out / name).write_bytes(content)
    (out / "notes.txt").write_text("mine")
    before = contents(out)
    with monkeypatch.context() as patch:
        patch.setattr(cli.training, "fit", lambda *_, **__: pytest.fail("it was trained"))
        result = run("train", "digits", *FAST, "--latent", 4, "--out", out)
        assert result.exit_code == 2 and "holds a run already" in text_of(result) and "--force" in text_of(result)
        for name in ("weights.safetensors", "evidence.csv", "latent.png"):
            alone = tmp_path / name
            alone.mkdir()
            (alone / name).write_text("mine")
            assert run("train", "digits", *FAST, "--out", alone).exit_code == 2
    assert contents(out) == before
    result = run("train", "digits", *FAST, "--latent", 3, "--out", out, "--force")
    assert result.exit_code == 0, result.output
    after = contents(out)
    assert after.keys() == no_pictures | {"notes.txt"} and after["weights.safetensors"] != before["weights.safetensors"]
    assert after["notes.txt"] == b"mine" and json.loads(after["config.json"])["latent"] == 3


def test_a_folder_is_of_one_training_at_a_time(tmp_path):
    out = tmp_path / "a"
    with locks.lock_path(out / "config.json"):
        result = run("train", "digits", *FAST, "--out", out)
    assert result.exit_code == 1 and "is in use" in text_of(result)


# -- interruption ---------------------------------------------------------------------------------------------------


def interrupting(monkeypatch, at):
    """Ctrl-C after that epoch, or before the first."""
    fit = cli.training.fit

    def interrupted(*arguments, **options):
        def callback(epoch, entry):
            if epoch == at:
                signal.raise_signal(signal.SIGINT)

        if at == 0:
            signal.raise_signal(signal.SIGINT)
        return fit(*arguments, **options, callback=callback)

    monkeypatch.setattr(cli.training, "fit", interrupted)


SLOW = ["--epochs", "4", "--rows", "20", "--evidence-particles", "20", "--no-fitted", "--latent", 4]


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_run_keeps_its_weights_and_goes_on(tmp_path, monkeypatch, no_pictures):
    """The table is that of a run without a stop, to the last digit."""
    straight = run("train", "digits", *SLOW, "--out", tmp_path / "straight")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        interrupting(patch, 2)
        result = run("train", "digits", *SLOW, "--out", out)
    text = text_of(result)
    assert result.exit_code == 130, result.output
    assert "Interrupted" in text and "after epoch 2 of 4" in text and "The same command goes on from there" in text
    assert contents(out).keys() == {"config.json", "checkpoint.pt", "weights.safetensors", "history.csv"}
    assert len((out / "history.csv").read_text().splitlines()) == 3
    state = load_file(out / "weights.safetensors")
    saved = torch.load(out / "checkpoint.pt", weights_only=True)["modules"]
    assert all(torch.equal(state[f"model.{name}"], x) for name, x in saved[0].items())

    result = run("evaluate", out)
    assert result.exit_code == 0 and "the run is unfinished: these are its weights after epoch 2 of 4" in result.output
    result = run("train", "digits", *SLOW, "--seed", 1, "--out", out)
    assert result.exit_code == 2 and "unfinished run of other settings (seed 0, not 1)" in text_of(result)
    with monkeypatch.context() as patch:  # Ctrl-C while it is evaluated
        patch.setattr(cli.training, "evaluate_recipe", lambda *_: signal.raise_signal(signal.SIGINT))
        result = run("train", "digits", *SLOW, "--out", out)
        assert result.exit_code == 130 and "after epoch 4 of 4" in text_of(result)
    command = shlex.split(re.search(r"go on by: pyro-mm (.*)", result.output)[1])
    assert command[0] == "train" and command[-1] == "--resume"
    result = run(*command)
    assert result.exit_code == 0 and "going on with the run" in result.output
    assert numbers(result.output) == numbers(straight.output) and contents(out).keys() == no_pictures
    assert len((out / "history.csv").read_text().splitlines()) == 5


@pytest.mark.usefixtures("interruptible")
def test_a_run_that_is_interrupted_within_an_epoch_says_so(tmp_path, monkeypatch, recwarn):
    class CtrlC:
        def on_step(self, training):
            if training.step == 3:
                signal.raise_signal(signal.SIGINT)

    fit = cli.training.fit
    monkeypatch.setattr(
        cli.training, "fit", lambda *arguments, **options: fit(*arguments, **options, callbacks=[CtrlC()])
    )
    result = run("train", "digits", *SLOW, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "after epoch 0 of 4 and 3 steps of the next" in text_of(result)
    assert not [w for w in recwarn if "the training was interrupted" in str(w.message)]


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_in_the_first_epoch_leaves_nothing(tmp_path, monkeypatch):
    interrupting(monkeypatch, 0)
    result = run("train", "digits", *SLOW, "--out", tmp_path / "out")
    assert result.exit_code == 130 and "there is nothing to go on from" in text_of(result)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("what", ["compare", "evaluate"])
def test_an_interrupted_evaluate_or_compare_ends_without_a_traceback(trained, monkeypatch, what):
    module = cli.compare if what == "compare" else cli.run
    monkeypatch.setattr(module, "load_rows", lambda *_: signal.raise_signal(signal.SIGINT))
    result = run(what, "digits" if what == "compare" else trained[0])
    assert result.exit_code == 130 and "Interrupted" in result.output and "Traceback" not in result.output


# -- mistakes -------------------------------------------------------------------------------------------------------


def damaged(trained, folder, name, content):
    folder.mkdir()
    for other, old in contents(trained[0]).items():
        (folder / other).write_bytes(content if other == name else old)
    return folder


def test_damaged_weights_are_a_failure_with_the_path(trained, tmp_path):
    result = run("evaluate", damaged(trained, tmp_path / "a", "weights.safetensors", b"x"))
    assert result.exit_code == 1 and "weights.safetensors is damaged, or not a file of mm.save" in text_of(result)


def test_settings_of_other_types_are_a_failure(trained, tmp_path):
    held = json.loads((trained[0] / "config.json").read_text()) | {"epochs": "2"}
    result = run("evaluate", damaged(trained, tmp_path / "a", "config.json", json.dumps(held).encode()))
    assert result.exit_code == 1 and "expected epochs of type int, got '2'" in text_of(result)


def test_a_training_that_diverges_is_a_failure(tmp_path):
    result = run("train", "digits", *FAST[2:], "--epochs", 1, "--lr", "1e5", "--out", tmp_path / "out")
    assert result.exit_code == 1 and "the loss is" in text_of(result) and "Traceback" not in result.output
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_failure_of_reproduce_has_no_traceback(tmp_path, monkeypatch):
    monkeypatch.delenv("PYRO_MM_DATA", raising=False)
    (tmp_path / "file").touch()
    result = run("reproduce", "hirt-mnist", "--data", tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 1 and "usps" in text_of(result) and "Traceback" not in result.output


def test_a_defect_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli.compare, "load_rows", lambda *_: {}["a defect"])
    result = run("compare", "digits")
    assert isinstance(result.exception, KeyError)


@pytest.mark.parametrize("name", ["train", "evaluate", "compare", "reproduce"])
def test_every_option_says_what_it_does(name):
    command = typer.main.get_command(app).commands[name]
    texts = {parameter.name: getattr(parameter, "help", None) for parameter in command.params}
    assert all(text and text[0].isalpha() and text.rstrip().endswith(".") for text in texts.values()), texts
    assert command.help and not command.help.startswith(("Trains", "Prints", "What"))


def test_resume_needs_an_unfinished_run(trained, tmp_path):
    for folder, words in ((trained[0], "holds a finished one"), (tmp_path / "none", "is without a checkpoint")):
        result = run("train", "digits", *FAST, "--latent", 4, "--out", folder, "--resume")
        assert result.exit_code == 2 and words in text_of(result) and "Traceback" not in result.output
    assert not (tmp_path / "none").exists()
    result = run("train", "digits", *FAST, "--out", tmp_path / "none", "--resume", "--force")
    assert result.exit_code == 2 and "give one of them" in text_of(result)


def test_the_command_that_goes_on_has_every_setting():
    settings = runs.Settings(
        "digits", "mvae", "elbo", "iwae", 3, 5, 64, 0.01, 7, 4, None, 40, 50, True, False, None, "a=counts"
    )
    words = shlex.split(runs.resume_command(settings, device="cpu", out=Path("my runs/a"), logger="csv", log_dir=None))
    assert words == [
        "pyro-mm", "train", "digits", "--recipe", "mvae", "--objective", "elbo", "--estimator", "iwae",
        "--num-particles", "3", "--epochs", "5", "--batch-size", "64", "--lr", "0.01", "--seed", "7", "--latent", "4",
        "--rows", "40", "--evidence-particles", "50", "--compile", "--no-fitted", "--kinds", "a=counts",
        "--device", "cpu", "--out", "my runs/a", "--logger", "csv", "--resume",
    ]  # fmt: skip


def test_a_training_is_logged(tmp_path, no_pictures):
    pytest.importorskip("lightning_fabric", reason="lightning-fabric is not installed")
    compile = torch.compile
    result = run("train", "digits", *FAST, "--no-fitted", "--latent", 2, "--out", tmp_path, "--logger", "csv")
    assert result.exit_code == 0, result.output
    (log,) = (tmp_path / "logs").rglob("metrics.csv")
    with open(log) as file, open(tmp_path / "history.csv") as history:
        assert next(csv.DictReader(file))["loss"] == next(csv.DictReader(history))["loss"]
    assert torch.compile is compile
    for options, words in ((["--logger", "wax"], "unknown logger 'wax'"), (["--log-dir", "a"], "give one by --logger")):
        result = run("train", "digits", *FAST, "--out", tmp_path / "b", *options)
        assert result.exit_code == 2 and words in text_of(result)
