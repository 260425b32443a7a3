"""``pyro-mm reproduce``: what it prints is what it measured, and a run that was stopped goes on."""

import csv
import json
import re
import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

import pyro_mm as mm
from pyro_mm.cli import app
from pyro_mm.experiments import families, paper_runs, proposal_runs, proposals, published, trainings
from pyro_mm.experiments import reproduce as command

SMALL = {"latent": 3, "hidden": (8,)}


def digits(**options):
    """Some rows; dynamic pixels are those of an image that is nowhere sure."""
    train, test = mm.datasets.digits()
    train, test = train[:200], test[:16]
    if options.get("binarize") == "dynamic":
        train = train.replaced({"image": 0.1 + 0.8 * train["image"]})
    return train, test


@pytest.fixture
def small(monkeypatch):
    """The reproductions, of few digits by small networks."""
    one = published.REPRODUCTIONS["jmvae-mnist"]
    one = replace(
        one, data=partial(digits, binarize="dynamic"), recipe=partial(mm.recipes.jmvae_kl, **SMALL), num_particles=20
    )
    family = families.FAMILIES["family-mnist"]
    members = {
        name: replace(family.members[name], recipe=partial(family.members[name].recipe, **SMALL))
        for name in ("VAE", "CVAE", "JMVAE-kl", "JNF")
    }
    family = replace(family, data=digits, members=members, num_particles=20)
    monkeypatch.setattr(command, "REPRODUCTIONS", {"one": one})
    weak = replace(family, members={"JMVAE-kl": members["JMVAE-kl"]}, fractions=(1, 8), compile=False)
    monkeypatch.setattr(command, "FAMILIES", {"family": family, "weak": weak})


def run(*arguments, code=0):
    result = CliRunner().invoke(app, ["reproduce", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_reproduce_list_names_every_reproduction_and_family():
    text = run("--list")
    assert all(name in text for name in (*published.REPRODUCTIONS, *families.FAMILIES))
    assert "expected one of jmvae-mnist" in " ".join(run("nothing", code=2).replace("│", "").split())


def test_a_run_that_was_stopped_goes_on_with_the_same_numbers(small, tmp_path):
    options = ("--epochs", 3, "--course", 2, "--no-compile", "--rows", 6)
    text = run("one", *options, "--out", tmp_path / "a")
    stopped = run("one", *options, "--out", tmp_path / "b", "--minutes", 0)
    assert "stopped after epoch 1 of 3" in stopped and not (tmp_path / "b" / "table-0.json").exists()
    again = run("one", *options, "--out", tmp_path / "b")
    assert "epoch 1/3" not in again and "epoch 2/3" in again
    tables = [json.loads((tmp_path / x / "table-0.json").read_text()) for x in "ab"]
    assert tables[0] == tables[1]
    for name, columns in (("course-0.csv", ("epoch", "value")), ("history-0.csv", ("epoch", "loss"))):
        here, there = ([[line[c] for c in columns] for line in read(tmp_path / x / name)] for x in "ab")
        assert here == there
    assert [line["epoch"] for line in read(tmp_path / "a" / "course-0.csv")] == ["2", "3"]
    assert "-86.86 (Suzuki" in text and "q(z | image, label)" in text


def test_the_reproduced_table_is_of_the_trained_pair(small, tmp_path):
    run("one", "--epochs", 1, "--no-compile", "--out", tmp_path, "--rows", 7)
    lines = json.loads((tmp_path / "table-0.json").read_text())["rows"]
    rows = {(line["quantity"], line["guide"]["proposal"]): line for line in lines}
    model, guide, _ = mm.recipes.jmvae_kl(digits()[0], **SMALL)
    mm.load(tmp_path / "weights-0.pt", model, guide)
    test = digits()[1][:7]
    for seen in ("image", "image, label"):
        proposal = test.only(*seen.split(", "))
        evidence = mm.log_marginal(model, guide, test.only("image"), proposal=proposal, num_particles=20, seed=0)
        row = rows["log p(image)", f"q(z | {seen})"]
        assert (row["guide"]["value"], row["guide"]["standard_error"]) == pytest.approx(evidence.mean(), rel=1e-5)
        assert row["rows"] == 7 and row["num_particles"] == 20
    fitted = mm.log_marginal(model, guide, test.only("image"), proposal="fitted", num_particles=20, seed=0)
    row = rows["log p(image)", "q(z | image)"]["fitted"]
    assert row["proposal"] == "fitted to each row"
    assert (row["value"], row["standard_error"]) == pytest.approx(fitted.mean(), rel=1e-4)


def test_saved_weights_are_evaluated_without_a_training(small, tmp_path, monkeypatch):
    run("one", "--epochs", 1, "--no-compile", "--out", tmp_path / "a", "--rows", 7)
    monkeypatch.setattr(paper_runs, "train_recipe", lambda *_: pytest.fail("it was trained"))
    weights = ("--weights", tmp_path / "a" / "weights-0.pt", "--rows", 7)
    run("one", *weights, "--out", tmp_path / "b")
    text = run("one", *weights, "--out", tmp_path / "c", "--no-fitted", "--particles", 30)
    both, again, guide = (json.loads((tmp_path / x / "table-0.json").read_text()) for x in "abc")
    assert both["rows"] == again["rows"] and both["training"] == "1 of 500 epochs, seed 0"
    assert again["training"] == guide["training"] == "weights of weights-0.pt" and "weights of weights-0.pt" in text
    assert all("fitted" in line for line in both["rows"]) and not any("fitted" in line for line in guide["rows"])
    assert [line["num_particles"] for line in guide["rows"]] == 6 * [30]
    header = (tmp_path / "b" / "table-0.md").read_text().splitlines()[0]
    assert "by the guide" in header and "fitted" in header and "median ESS" in header
    assert "median ESS" not in (tmp_path / "c" / "table-0.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["hirt-linear", "--particles", 10], "--particles: this one is measured with the published number of draws"),
        (["family-mnist", "--weights", "."], "--weights: this one trains many recipes"),
        (["jmvae-mnist", "--weights", "."], "--weights: expected a file of mm.save, got ."),
        (["fitted-proposals", "--weights", __file__], "--weights: expected a folder of such files"),
        (["fitted-proposals", "--no-fitted"], "--no-fitted: a comparison of proposals needs both"),
        (["jmvae-mnist", "--only", "nothing"], "--only: this one is a single recipe, leave it out"),
        (["family-mnist", "--only", "VAE", "--only", "VVAE"], "--only: no member 'VVAE', expected one of VAE, CVAE,"),
        (["fitted-proposals", "--only", "nothing"], "--only: no pair has nothing in its name: mnist, jmvae-kl, 20;"),
    ],
)
def test_options_that_an_experiment_lacks_are_refused(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = " ".join(run(*arguments, code=2).replace("│", "").split())
    assert words in text and "Traceback" not in text


def test_a_family_is_measured_member_by_member(small, tmp_path):
    options = ("--epochs", 1, "--no-compile", "--out", tmp_path)
    text = run("family", *options)
    first, second = (tmp_path / "table.md").read_text().split("likelihoods by the guide")
    assert second.count("\n|") == 6  # header, rule and four members
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in first.strip().splitlines()]
    (_, *header), _, *body = [[cell.strip().replace("\\", "") for cell in line] for line in lines]
    table = {name: row for name, *row in body}
    has = {name: {c for c, cell in zip(header, row, strict=True) if cell != "–"} for name, row in table.items()}
    assert has["VAE"] == {"log p(image)", "probe", "k-hat > 0.7", "s/epoch"}
    assert has["CVAE"] >= {"log p(image, label)", "log p(image | label)"}
    assert not has["CVAE"] & {"log p(image)", "label from image", "probe"}
    assert has["JMVAE-kl"] == set(header) == has["JNF"]
    first, second = read(tmp_path / "JNF" / "history-0.csv"), read(tmp_path / "JNF" / "second" / "history-0.csv")
    assert len(first) == len(second) == 1 and first[0].keys() != second[0].keys() and "second stage, epoch 1/1" in text
    (tmp_path / "VAE" / "checkpoint-0.pt").unlink()  # what has been measured is not trained again
    assert "epoch" not in run("family", *options).replace("s/epoch", "").replace("1 epochs", "")
    assert "judge" in text
    alone = run("family", *options, "--only", "CVAE")
    assert "CVAE" in alone and "JMVAE-kl" not in alone


def test_fractions_of_paired_rows_are_columns(small, tmp_path):
    """Each cell is of a training of its own, which saw as many pairs as its column says."""
    text = run("weak", "--epochs", 2, "--out", tmp_path)
    assert "JMVAE-kl, one in 8, epoch 2/2" in text
    for folder, part in (("JMVAE-kl", 1), ("JMVAE-kl/one-in-8", 8)):
        found = json.loads(next((tmp_path / folder).glob("measured-*.json")).read_text())
        torch.manual_seed(0)
        pair = mm.recipes.jmvae_kl(digits()[0], **SMALL)
        adam = partial(torch.optim.Adam, lr=1e-3, fused=True)
        mm.fit(*pair, mm.datasets.paired(digits()[0], 1 / part), epochs=2, optimizer=adam, seed=0, progress=False)
        for proposal, measured in (("fitted", found), (None, found["by the guide"])):
            evidence = mm.log_marginal(*pair[:2], digits()[1], num_particles=20, seed=0, proposal=proposal)
            assert measured["log p(image, label)"] == pytest.approx(list(evidence.mean()), rel=1e-4)
            assert f"{measured['log p(image, label)'][0]:.2f} ±" in (tmp_path / "table.md").read_text()
    assert "log p(image, label), by the guide" in (tmp_path / "table.md").read_text()


def test_proposals_are_compared_on_trained_pairs(tmp_path, monkeypatch):
    """Numbers are those of the public functions; weights are trained once; what has been measured is read again."""
    pair = proposals.TrainedPair("digits", "mvae", 2, (8,), proposals.Limits(0.0, {proposals.JOINT: 2000}))
    small = replace(
        proposals.COMPARISONS["fitted-proposals"], pairs=(pair,), data={"digits": digits}, rows=9, num_particles=40,
        annealed_rows=4, annealing={"num_chains": 4, "temperatures": 3, "pilot_chains": 2},
    )  # fmt: skip
    monkeypatch.setattr(command, "COMPARISONS", {"both": small})
    text = run("both", "--epochs", 1, "--out", tmp_path)
    lines = json.loads((tmp_path / "table-0.json").read_text())["lines"]
    quantities = ["log p(image, label)", "log p(image)", "log p(label)", "log p(image | label)", "log p(label | image)"]
    assert [line["quantity"] for line in lines] == quantities
    model, guide, _ = pair.build(digits()[0])
    mm.load(tmp_path / "weights" / "digits_mvae_2_1_0.pt", model, guide)
    test = digits()[1][:9]
    options = {"num_particles": 40, "seed": 0}
    by_fitted = mm.log_marginal(model, guide, test, proposal="fitted", **options)
    for proposal, evidence in (("guide", mm.log_marginal(model, guide, test, **options)), ("fitted", by_fitted)):
        assert lines[0][proposal]["value"] == pytest.approx(evidence.mean()[0], rel=1e-5)
        assert lines[0][proposal]["untrusted"] == evidence.untrusted()
    annealed = mm.annealed_importance(model, guide, test[:4], seed=0, **small.annealing)
    difference = by_fitted[:4] - annealed
    assert lines[0]["annealed"]["difference"] == pytest.approx(difference.mean()[0], abs=1e-4)
    z = difference.log_prob / difference.standard_error
    assert lines[0]["annealed"]["rms_z"] == pytest.approx(z.square().mean().sqrt().item(), rel=1e-3)
    assert "the median ESS is" in text and "where 80 is asked for" in text  # 2000 at K = 1,000, so 80 at K = 40
    assert text.count("is asked for") == 1 and "every limit holds" not in text
    monkeypatch.setattr(proposal_runs, "measure_proposals", lambda *_: pytest.fail("it was measured again"))
    run("both", "--epochs", 1, "--out", tmp_path, "--only", "digits, mvae")
    assert json.loads((tmp_path / "table-0.json").read_text())["lines"] == lines


def test_an_epoch_run_again_overwrites_later_lines_of_the_history(tmp_path):
    for epoch in (1, 2, 3, 2):
        trainings.append_epoch(tmp_path / "x.csv", {"epoch": epoch, "loss": epoch + 0.5})
    assert [line["epoch"] for line in read(tmp_path / "x.csv")] == ["1", "2"]


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_says_how_to_go_on(small, tmp_path, monkeypatch):
    monkeypatch.setattr(paper_runs, "train_recipe", lambda *_: signal.raise_signal(signal.SIGINT))
    text = " ".join(run("one", "--out", tmp_path / "a", code=130).replace("│", "").split())
    assert "Interrupted" in text and "the same command goes on from the latest checkpoint" in text
    assert "Traceback" not in text


def test_a_folder_that_cannot_be_written_shows_before_training(small, tmp_path, monkeypatch):
    monkeypatch.setattr(paper_runs, "train_recipe", lambda *_: pytest.fail("it was trained"))
    (tmp_path / "file").touch()
    assert "Traceback" not in run("one", "--out", tmp_path / "file" / "a", code=1)
