"""Weights and run folders saved by version 0.1.0 load, and give the numbers that they gave then."""

import json
import re
import shutil

import pytest
import torch
from typer.testing import CliRunner

import pyro_mm as mm
from pyro_mm.cli import app
from pyro_mm.experiments.runs import load_run
from tests.support.saved_pairs import FOLDER, SAVED, TRAINING, bound, modules, recipe, rows, shapes

HELD = json.loads((FOLDER / "saved.json").read_text())


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(FOLDER, tmp_path / "saved")


def test_the_saved_recipes_are_those_of_today():
    assert set(HELD["recipes"]) - {"jnf-second"} <= set(mm.recipes.RECIPES)


@pytest.mark.parametrize("name", HELD["recipes"])
def test_a_recipe_has_the_keys_and_shapes_that_it_had(name):
    run = recipe(name)
    assert {"model": shapes(run.model), "guide": shapes(run.guide)} == HELD["recipes"][name]


def test_a_module_has_the_keys_and_shapes_that_it_had():
    assert {name: shapes(module) for name, module in modules().items()} == HELD["modules"]


@pytest.mark.parametrize("name", SAVED)
def test_saved_weights_give_the_bound_that_they_gave(name, folder):
    run = recipe(name, seed=1)  # other weights than those of the file
    mm.load(folder / f"{name}.pt", run.model, run.guide)
    assert bound(run, rows()) == pytest.approx(HELD["bounds"][name], rel=1e-6)


def test_weights_of_an_unfinished_run_are_read_from_its_checkpoint(folder):
    run = recipe("mvae", seed=1)
    assert load_run(folder, run.model, run.guide) == TRAINING["epochs"]
    assert bound(run, rows()) == pytest.approx(HELD["bounds"]["checkpoint"], rel=1e-6)


@pytest.mark.parametrize("resume", ["strict", "force"])
def test_a_training_goes_on_from_a_saved_checkpoint_as_if_it_had_not_stopped(folder, resume):
    more = TRAINING | {"epochs": TRAINING["epochs"] + 2}
    straight = mm.fit(*recipe("mvae"), rows(), **more).to_dict()
    run, epochs = recipe("mvae", seed=1), []
    history = mm.fit(
        *run, rows(), **more, checkpoint=folder / "checkpoint.pt", resume=resume,
        callback=lambda epoch, entry: epochs.append(epoch),
    )  # fmt: skip
    assert epochs == [3, 4] and len(history) == 4
    assert history.to_dict()["loss"][:2] == HELD["losses"]
    assert history.to_dict().keys() == straight.keys()
    for name, column in history.to_dict().items():
        assert column == pytest.approx(straight[name], rel=1e-5), name
    assert torch.load(folder / "checkpoint.pt", weights_only=True)["epochs"] == 4


def test_other_weights_give_another_bound():
    assert bound(recipe("mvae", seed=1), rows()) != pytest.approx(HELD["bounds"]["checkpoint"], rel=1e-3)


def table(lines):
    """Quantity -> the numbers behind it, of the lines of a printed table, and the label accuracy."""
    found = {}
    for line in lines:
        if line.startswith("label accuracy"):
            found["label accuracy"] = [float(number) for number in re.findall(r"[\d.]+", line)]
        elif row := re.match(r"\s*(\S.*?\S)\s{2,}(-?[\d.]+\s.*)$", line):
            found[row[1]] = [float(number) for number in re.findall(r"-?[\d.]+", row[2])]
    return found


@pytest.mark.parametrize("options", [["--no-fitted"], []])
def test_a_saved_run_folder_is_evaluated_to_the_table_that_was_printed(folder, options):
    """Alone, and in the columns of the guide's draws beside fitted proposals."""
    threads = torch.get_num_threads()
    arguments = ["evaluate", str(folder / "run"), *options]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "120", "TERM": "dumb"})
    torch.set_num_threads(threads)
    assert result.exit_code == 0, result.output
    found, expected = table(result.output.splitlines()), table(HELD["printed"])
    assert len(expected) == 9 and found.keys() == expected.keys()
    assert not any(len(numbers) > 5 for numbers in expected.values())
    for quantity, numbers in expected.items():
        if not options and len(numbers) == 5:  # a likelihood: value, error, ESS, k-hat, K; then those of the guide
            assert len(found[quantity]) == 8 and found[quantity][:2] != found[quantity][5:7]
            found[quantity] = found[quantity][5:]
        elif not options and quantity == "what it bounds, estimated":  # of fitted proposals
            continue
        # mean and standard error: another machine's rounding may move one of 40 rows over a threshold behind them
        assert found[quantity][:2] == pytest.approx(numbers[:2], abs=2e-3), quantity
