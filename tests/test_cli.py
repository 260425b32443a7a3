"""The command line: what it prints, what it writes, and how it refuses."""

import csv
import json
import re

import pytest
from typer.testing import CliRunner

from pyro_mm.cli import ESTIMATORS, OBJECTIVES, TRAINED, app

FAST = ["--epochs", "1", "--rows", "40", "--evidence-particles", "50"]
FILES = {
    "config.json", "history.csv", "evidence.csv", "evidence.nc", "weights.pt",
    "training.png", "generated.png", "confusion.png", "latent.png",
}  # fmt: skip


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "120", "TERM": "dumb"})


def numbers(output):
    """The lines of the table, and what follows it up to the time taken."""
    lines = [line.strip() for line in output.splitlines()]
    return [line for line in lines if re.search(r"-\d+\.\d\d\d", line) or "accuracy" in line or "bound" in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
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
    assert len(rows) == 5 * 40
    assert rows[0]["quantity"] == "log p(image, label)"
    for quantity in ("log p(image)", "log p(label | image)", "log p(image | label)", "ELBO", "what it bounds"):
        assert quantity in output


def test_the_table_is_the_mean_of_the_rows(trained):
    out, output = trained
    with open(out / "evidence.csv") as file:
        values = [float(row["log_prob"]) for row in csv.DictReader(file) if row["quantity"] == "log p(image)"]
    line = next(line for line in numbers(output) if line.startswith("log p(image) "))
    assert f"{sum(values) / len(values):.3f}" in line


def test_evaluate_prints_the_same_numbers(trained):
    out, output = trained
    result = run("evaluate", out)
    assert result.exit_code == 0, result.output
    assert numbers(result.output) == numbers(output)
    assert len(numbers(output)) > 8


def test_another_objective_and_estimator(tmp_path):
    options = ["--recipe", "mopoe", "--objective", "elbo", "--estimator", "iwae", "--num-particles", 3]
    result = run("train", "digits", *FAST, *options, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert "IWAE(num_particles=3); lower bound on log p(image, label)" in result.output


def test_compare_prints_side_by_side():
    result = run("compare", "digits", *FAST)
    assert result.exit_code == 0, result.output
    for word in ("mvae", "jmvae-kl", "mmvae", "mopoe", "log p(image | label)", "label accuracy", "seconds"):
        assert word in result.output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["train", "digit"], "unknown data set 'digit': expected one of digits, mnist, fashion"),
        (["train", "digits", "--recipe", "vae"], "unknown recipe 'vae'"),
        (["train", "digits", "--objective", "elb"], "unknown objective 'elb'"),
        (["train", "digits", "--estimator", "iw"], "unknown estimator 'iw'"),
        (["train", "digits", "--device", "abacus"], "no device 'abacus'"),
        (["train", "digits", "--epochs", "1", "--estimator", "iwae-stratified"], "needs a mixture posterior"),
        (["evaluate", "nowhere"], "expected a folder that train wrote"),
    ],
)
def test_errors_are_short(arguments, words):
    result = run(*arguments)
    text = re.sub(r"[\s│]+", " ", result.output)
    assert result.exit_code == 2
    assert words in text
    assert "Traceback" not in text
    assert len(result.output.splitlines()) < 15


def test_help_names_every_choice():
    text = re.sub(r"[\s│]+", " ", run("train", "--help").output)
    for name in [*TRAINED, *OBJECTIVES, *ESTIMATORS]:
        assert name in text
