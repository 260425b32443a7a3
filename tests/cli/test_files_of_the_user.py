"""The command line on files of the user: arrays by modality, masks, kinds, and what is refused."""

import json
import re

import numpy as np
import pytest
import torch

from pyro_mm.experiments import runs, user_data
from tests.support.command_line import run, text_of

HELD_OUT = int(torch.randperm(60, generator=torch.Generator().manual_seed(0))[0])
"""A row of a file of 60 that is a test row under the seed 0."""
FAST = ["--epochs", "1", "--evidence-particles", "20"]


def arrays(rows=60, seed=0):
    """Counts that some rows lack, real numbers, and classes, of a common latent."""
    generator = np.random.default_rng(seed)
    z = generator.normal(size=(rows, 2))
    return {
        "rna": generator.poisson(np.exp(z @ np.ones((2, 6)) * 0.3 + 1)),
        "rna.present": generator.random(rows) > 0.2,
        "clinical": z @ np.ones((2, 4)) + generator.normal(size=(rows, 4)),
        "stage": (z[:, 0] > 0).astype(int) + (z[:, 1] > 0),
    }


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "cells.npz"
    np.savez(path, **arrays())
    return path


@pytest.fixture(scope="module")
def trained(cells, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    result = run("train", cells, "--recipe", "mvae", "--kinds", "rna=counts", *FAST, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


def test_a_file_is_trained_evaluated_and_drawn(trained, cells):
    out, output = trained
    assert {runs.WEIGHTS, "latent.png", "confusion.png", "training.png"} <= {path.name for path in out.iterdir()}
    assert not (out / "generated.png").exists()  # nothing in it is an image
    settings = json.loads((out / "config.json").read_text())
    assert (settings["dataset"], settings["kinds"], settings["test"]) == (str(cells), "rna=counts", None)
    assert "mvae on cells, mean over 12 test rows" in output
    assert "log p(rna | clinical, stage), " in output and "of 12 rows" in output  # the mask of the file counts
    assert "stage accuracy given the rna and the clinical: " in output

    again = run("evaluate", out)
    assert again.exit_code == 0, again.output
    lines = [line for line in output.splitlines() if re.search(r"-\d+\.\d\d\d|accuracy", line)]
    assert len(lines) > 8 and set(lines) <= set(again.output.splitlines())


def test_rows_are_held_out_by_the_seed_and_all_rows_are_used(cells):
    kinds = user_data.parse_kinds("rna=counts")
    train, test = user_data.load_arrays(str(cells), None, 0, kinds)
    other, _ = user_data.load_arrays(str(cells), None, 1, kinds)
    assert (train.size, test.size) == (48, 12)
    whole = torch.as_tensor(arrays()["clinical"], dtype=torch.float32)
    both = torch.cat([train["clinical"], test["clinical"]])
    assert torch.equal(both.sort(0).values, whole.sort(0).values)
    assert not torch.equal(train["clinical"], other["clinical"])


def test_a_file_of_test_rows_is_taken_as_it_is(cells, tmp_path):
    np.savez(tmp_path / "test.npz", **arrays(rows=7, seed=1))
    train, test = user_data.load_arrays(str(cells), str(tmp_path / "test.npz"), 0, {})
    assert (train.size, test.size) == (60, 7)
    np.savez(tmp_path / "fewer.npz", stage=np.zeros(7, int))
    with pytest.raises(ValueError, match=r"expected the modalities of .*, rna, clinical, stage, got stage"):
        user_data.load_arrays(str(cells), str(tmp_path / "fewer.npz"), 0, {})


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({}, (), "On the command line a kind is given by --kinds MODALITY=KIND"),
        ({}, ("--kinds", "rna"), "--kinds: expected MODALITY=KIND"),
        ({}, ("--kinds", "rna=count"), "kinds are class, number, bits"),
        ({}, ("--kinds", "dna=counts"), "has no modality 'dna', its modalities are rna, clinical, stage"),
        ({}, ("--data", "."), "--data: cells needs no files"),
        ({}, ("--recipe", "vae"), "it has one modality"),
        ({"protein.present": np.ones(60, bool)}, (), "got protein.present without values of it"),
        ({"stage": np.eye(60, dtype=int)[HELD_OUT]}, ("--kinds", "rna=counts"), "no training row has it"),
    ],
)
def test_mistakes_in_files_and_their_options_are_refused(tmp_path, change, options, words):
    path = tmp_path / "cells.npz"
    np.savez(path, **(arrays() | change))
    result = run("train", path, "--recipe", "mvae", *FAST, *options, "--out", tmp_path / "run")
    assert result.exit_code in (1, 2)
    assert words in text_of(result) and "Traceback" not in result.output
    assert not (tmp_path / "run" / "config.json").exists()


def test_images_are_drawn_given_a_class_and_recipes_are_compared(tmp_path):
    generator = np.random.default_rng(0)
    image = (generator.random((40, 8, 8)) > 0.5).astype(float)
    np.savez(tmp_path / "images.npz", photo=image, kind=np.arange(40) % 2)
    assert run("train", tmp_path / "images.npz", "--no-fitted", *FAST, "--out", tmp_path / "run").exit_code == 0
    assert (tmp_path / "run" / "generated.png").stat().st_size > 500
    options = ["--recipes", "mvae,mopoe", "--no-fitted", *FAST, "--out", tmp_path / "compared"]
    result = run("compare", tmp_path / "images.npz", *options)
    assert result.exit_code == 0, result.output
    assert "kind accuracy" in result.output and "images: 8 test rows" in result.output
