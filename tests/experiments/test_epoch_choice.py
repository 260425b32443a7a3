"""The best epoch of a training by validation rows: its weights are restored, also after a stop."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import pyro_mm as mm
import pyro_mm.experiments.reproduce as command
from pyro_mm.cli import app
from pyro_mm.experiments.epoch_choice import BestEpoch
from pyro_mm.experiments.studies.study import Sample, Study
from pyro_mm.recipes import mfm_variational


def rows():
    generator = torch.Generator().manual_seed(0)
    return mm.Batch({"a": torch.randn(20, 3, generator=generator), "b": torch.randn(20, 2, generator=generator)})


def small_pair(batch):
    return mfm_variational(batch, latent=2, hidden=(4,), private=1, labels=())


def train(tmp_path, scores, epochs=None):
    """Train a small pair whose epochs have given scores; return it, the choice, and the weights after each epoch."""
    torch.manual_seed(0)
    run = small_pair(rows())
    weights = []

    def score():
        weights.append({n: p.detach().clone() for n, p in run.model.named_parameters()})
        return scores[len(weights) - 1]

    best = BestEpoch(run, score, tmp_path, 0, lambda epoch, entry: None)
    mm.fit(*run, rows(), epochs=epochs or len(scores), batch_size=10, seed=0, progress=False, callback=best)
    return run, best, weights


@pytest.mark.parametrize(
    ("scores", "expected"), [((0.1, 0.7, 0.3, 0.7, 0.2), 4), ((3.0, 2.0, 1.0), 1), ((0.0, 0.0), 2)]
)
def test_the_last_of_the_best_epochs_is_restored(tmp_path, scores, expected):
    run, best, weights = train(tmp_path, scores)
    assert best.restore() == expected
    assert all(torch.equal(p, weights[expected - 1][n]) for n, p in run.model.named_parameters())
    assert not run.model.training and not run.guide.training
    lines = (tmp_path / "validation-0.csv").read_text().splitlines()
    assert lines[0] == "epoch,score" and [float(line.split(",")[1]) for line in lines[1:]] == [*scores]


def test_a_training_from_its_start_forgets_an_earlier_one(tmp_path):
    train(tmp_path, (9.0, 0.0))
    _, best, _ = train(tmp_path, (1.0, 2.0, 0.0))
    assert best.restore() == 2


def test_a_training_that_ended_without_scores_is_refused(tmp_path):
    best = BestEpoch(small_pair(rows()), lambda: 0.0, tmp_path, 0, lambda epoch, entry: None)
    with pytest.raises(ValueError, match="remove its checkpoint"):
        best.restore()


def test_a_study_that_is_stopped_after_every_epoch_has_the_same_numbers(monkeypatch, tmp_path):
    """The score falls with the loss here, so that a later epoch is best, and the measurement is of its weights."""

    def loss(run):
        with torch.no_grad(), mm.utils.seeding.temporary_seed(0, torch.device("cpu")):
            return float(run.objective.loss(run.model, run.guide, rows()))

    study = Study(
        title="small",
        groups={"few": lambda seed, directory: Sample(rows(), rows())},
        members={"pair": small_pair},
        measure=lambda run, sample, seed, fitted: {"loss": loss(run)},
        epochs=4,
        batch_size=10,
        optimizer=lambda run, parameters: torch.optim.Adam(parameters, 0.3),
        validate=lambda run, sample, seed: -loss(run),
    )
    monkeypatch.setattr(command, "STUDIES", {"small": study, "last": replace(study, validate=None)})

    def measured(folder, *options, name="small"):
        out = tmp_path / folder
        command_line = ["reproduce", name, "--seeds", "1", "--device", "cpu", "--out", str(out), *options]
        for _ in range(6):
            result = CliRunner().invoke(app, command_line)
            assert result.exit_code == 0, result.output
            if found := [*out.glob("few/pair/measured-*.json")]:
                numbers = json.loads(found[0].read_text())
                return {key: value for key, value in numbers.items() if key != "s/epoch"}
        raise AssertionError("never finished")

    whole = measured("whole")
    assert whole == measured("stopped", "--minutes", "0")
    lines = (tmp_path / "whole/few/pair/validation-0.csv").read_text().splitlines()[1:]
    scores = [float(line.split(",")[1]) for line in lines]
    assert whole["epoch"] == 1 + scores.index(max(scores)) and whole["loss"] == -max(scores)
    assert set(measured("last", name="last")) == {"loss"}
