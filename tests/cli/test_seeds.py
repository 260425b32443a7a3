"""``pyro-mm train --seeds``: a run for each seed, going on after a stop, and one table over them."""

import csv
import json
import math
import re
import shlex
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pyro_mm import cli
from pyro_mm.cli import seed_table
from pyro_mm.cli.numbers import Number
from pyro_mm.cli.run import MeasuredRun
from pyro_mm.experiments.runs import Settings
from tests.support.command_line import run, text_of

ROWS = 20
OPTIONS = ["--epochs", 2, "--rows", ROWS, "--evidence-particles", 20, "--no-fitted", "--latent", 2]
TABLES = {"seeds.json", "seeds.csv", "seeds.md"}


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """Drawing them takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.run, "draw_figures", lambda *_: {})
        yield


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """The folder of seeds 4 to 6, and what was printed."""
    out = tmp_path_factory.mktemp("seeds") / "a"
    result = run("train", "digits", *OPTIONS, "--seed", 4, "--seeds", 3, "--out", out)
    assert result.exit_code == 0, result.output
    return out, result.output


@pytest.fixture
def copied(three, tmp_path):
    return shutil.copytree(three[0], tmp_path / "seeds")


@pytest.fixture
def untrained(monkeypatch):
    monkeypatch.setattr(cli.training, "fit", lambda *_, **__: pytest.fail("it was trained"))


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_means_and_deviations_are_those_of_the_files_of_each_seed(three):
    out, output = three
    assert {path.name for path in out.iterdir()} == TABLES | {"seed-4", "seed-5", "seed-6"}
    folders = [out / f"seed-{seed}" for seed in (4, 5, 6)]
    evidence = [[line for line in read(f / "evidence.csv") if line["quantity"] == "log p(image)"] for f in folders]
    likelihoods = [np.mean([float(line["log_prob"]) for line in lines]) for lines in evidence]
    errors = [np.sqrt(np.sum([float(line["standard_error"]) ** 2 for line in lines])) / ROWS for lines in evidence]
    losses = [float(read(folder / "history.csv")[-1]["loss"]) for folder in folders]
    validation = [float(read(folder / "history.csv")[-1]["validation"]) for folder in folders]

    content = json.loads((out / "seeds.json").read_text())
    assert content["seeds"] == [4, 5, 6] and content["settings"]["latent"] == 2
    summary = {entry["quantity"]: entry for entry in content["summary"]}
    for quantity, values in (
        ("log p(image)", likelihoods),
        ("training loss, last epoch", losses),
        ("validation loss, last epoch", validation),
    ):
        found = summary[quantity]
        assert (found["mean"], found["deviation"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)), rel=1e-5)
        line = next(line for line in output.splitlines() if line.strip().startswith(f"{quantity} "))
        assert re.split(r"\s{2,}", line.strip())[1:3] == [f"{np.mean(values):.3f}", f"{np.std(values, ddof=1):.3f}"]
    assert summary["log p(image)"]["error"] == pytest.approx(np.sqrt(np.mean(np.square(errors))), rel=1e-4)
    assert summary["training loss, last epoch"]["error"] is None
    rows = {(line["seed"], line["quantity"]): float(line["value"]) for line in read(out / "seeds.csv")}
    assert [rows[seed, "log p(image)"] for seed in "456"] == pytest.approx(likelihoods, rel=1e-5)
    for text in (text_of_lines(output), text_of_lines((out / "seeds.md").read_text())):
        assert "s.d. over seeds: the spread of single seeds (divisor 2)" in text
        assert "s.e. of one seed: the error of its estimate by draws" in text


def text_of_lines(text):
    return " ".join(text.split())


def test_a_seed_is_the_run_of_that_seed_alone(three, tmp_path):
    result = run("train", "digits", *OPTIONS, "--seed", 5, "--out", tmp_path / "alone")
    assert result.exit_code == 0, result.output
    alone, one = tmp_path / "alone", three[0] / "seed-5"
    for name in ("table.json", "history.csv", "config.json"):
        assert (alone / name).read_bytes() == (one / name).read_bytes()
    weights, others = (load_file(folder / "weights.safetensors") for folder in (alone, one))
    assert weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


@pytest.mark.usefixtures("interruptible")
def test_a_stopped_sequence_goes_on_with_what_is_not_finished(three, tmp_path, monkeypatch):
    """The second seed is stopped in its first epoch; the tables are those of a sequence without a stop."""
    out, fit = tmp_path / "my seeds", cli.training.fit
    command = ["train", "digits", *OPTIONS, "--seed", 4, "--seeds", 3, "--out", out]

    def stopped(*arguments, **options):
        def interrupt(epoch, entry):
            if options["seed"] == 5:
                signal.raise_signal(signal.SIGINT)

        return fit(*arguments, **options, callback=interrupt)

    with monkeypatch.context() as patch:
        patch.setattr(cli.training, "fit", stopped)
        result = run(*command)
    assert result.exit_code == 130, result.output
    assert "seed 5, with 1 of 3 seeds finished: after epoch 1 of 2" in text_of(result)
    assert {path.name for path in out.iterdir()} == {"seed-4", "seed-5"}

    seeds = []
    monkeypatch.setattr(cli.training, "fit", lambda *a, **options: seeds.append(options["seed"]) or fit(*a, **options))
    words = shlex.split(re.search(r"go on by: pyro-mm (.*)", result.output)[1])
    assert words[-1] == "--resume" and words[words.index("--seeds") + 1] == "3"
    again = run(*words)
    assert again.exit_code == 0, again.output
    assert seeds == [5, 6] and "seed 4: finished before" in text_of(again)
    assert f"going on with the run in {out}/seed-5" in text_of(again)
    for name in ("seeds.csv", "seeds.md"):
        assert (out / name).read_bytes() == (three[0] / name).read_bytes()


@pytest.mark.usefixtures("untrained")
def test_finished_seeds_are_read_and_measured_again_from_weights_if_their_numbers_are_gone(three, copied):
    (copied / "seed-5" / "table.json").unlink()
    for name in TABLES:
        (copied / name).unlink()
    result = run("train", "digits", *OPTIONS, "--seed", 4, "--seeds", 3, "--out", copied, "--resume")
    assert result.exit_code == 0, result.output
    for old, new in zip(read(three[0] / "seeds.csv"), read(copied / "seeds.csv"), strict=True):
        assert float(new.pop("value")) == pytest.approx(float(old.pop("value")), rel=1e-6)
        assert new == old
    fewer = run("train", "digits", *OPTIONS, "--seed", 5, "--seeds", 1, "--out", copied)
    assert fewer.exit_code == 0 and "s.d. over seeds: unknown for one seed" in text_of(fewer)


@pytest.mark.usefixtures("untrained")
def test_what_does_not_fit_to_the_folders_is_refused(three, copied, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    command = ["train", "digits", *OPTIONS, "--seed", 4, "--seeds", 3]
    (copied / "seed-5" / "table.json").write_text("{}")
    for arguments, words in (
        ([*command, "--lr", 0.5, "--out", copied], "seed-4 holds a run of other settings (lr 0.003, not 0.5)"),
        ([*command, "--resume", "--force", "--out", copied], "give one of them"),
        ([*command, "--resume", "--out", tmp_path / "none"], "there is no run of these seeds to go on with"),
        ([*command, "--out", copied / "seed-4"], "holds a run of one seed (config.json)"),
        (["train", "digits", *OPTIONS, "--out", copied], "holds runs of several seeds (seed-4)"),
        (["train", "digits", "--seed", 2**63 - 2, "--seeds", 3], "3 seeds from 9223372036854775806 on exceed"),
        (["train", "digits", "--seeds", 0], "--seeds"),
    ):
        result = run(*arguments)
        assert result.exit_code == 2 and words in text_of(result), result.output
        assert "Traceback" not in result.output
    result = run(*command, "--out", copied)
    assert result.exit_code == 1 and "seed-5/table.json is damaged" in text_of(result)
    assert {path for path in copied.rglob("*")} == before.keys() and not (tmp_path / "none").exists()


def test_force_trains_all_seeds_anew(copied, monkeypatch):
    calls = []

    def record(settings, options):
        calls.append((settings.seed, options.force, options.out.name))
        return MeasuredRun(None, None, [Number("a", float(settings.seed))])

    monkeypatch.setattr(cli.seeds, "train_run", record)
    result = run("train", "digits", *OPTIONS, "--lr", 0.5, "--seed", 4, "--seeds", 2, "--force", "--out", copied)
    assert result.exit_code == 0, result.output
    assert calls == [(4, True, "seed-4"), (5, True, "seed-5")]
    assert {line["value"] for line in read(copied / "seeds.csv")} == {"4.0", "5.0"}


def test_an_error_ends_the_sequence_and_keeps_what_is_finished(copied, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli.training, "fit", full)
    result = run("train", "digits", *OPTIONS, "--seed", 4, "--seeds", 5, "--out", copied)
    assert result.exit_code == 1 and "No space left" in text_of(result) and "go on by: pyro-mm train" in text_of(result)
    assert {path.name for path in copied.iterdir()} >= {"seed-4", "seed-5", "seed-6"}
    assert not any((copied / name).exists() for name in TABLES)  # of three seeds, where five were asked for


def test_evaluate_prints_the_table_over_the_finished_seeds(three, copied):
    """With the numbers that training printed, and others on request; nothing is written."""
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*")}
    lines = [line for line in three[1].splitlines() if re.search(r"\d\.\d\d\d", line)]
    result = run("evaluate", copied)
    assert result.exit_code == 0, result.output
    assert len(lines) > 8 and set(lines) <= set(result.output.splitlines())
    (copied / "seed-6" / "checkpoint.pt").touch()
    fewer = run("evaluate", copied, "--rows", 10)
    assert fewer.exit_code == 0, fewer.output
    assert "seed 6 is unfinished, and left out" in fewer.output and "2 seeds (4 to 5)" in fewer.output
    assert "the first 10 test rows" in fewer.output
    (copied / "seed-6" / "checkpoint.pt").unlink()
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*") if path.is_file()} == {
        path: time for path, time in before.items() if path.is_file()
    }
    config = copied / "seed-5" / "config.json"
    config.write_text(config.read_text().replace('"lr": 0.003', '"lr": 0.5'))
    result = run("evaluate", copied)
    assert result.exit_code == 1 and "are of different settings (lr 0.5, not 0.003)" in text_of(result)


def settings(**changes):
    values = dict(
        dataset="digits", recipe="mvae", objective=None, estimator=None, num_particles=None, epochs=3, batch_size=8,
        lr=0.1, seed=0, latent=2, data=None, rows=5, evidence_particles=10,
    )  # fmt: skip
    return Settings(**{**values, **changes})


def test_a_number_that_a_seed_lacks_is_left_out_and_counted(capsys, tmp_path):
    numbers = {
        0: [Number("a", 1.0, 0.3), Number("b", 2.0)],
        2: [Number("a", math.nan, math.nan)],
        3: [Number("a", 2.0, 0.4)],
    }
    first, second = seed_table.summarize_seeds(numbers)
    assert first[:4] == ("a", 2, 1.5, pytest.approx(math.sqrt(0.5)))
    assert first.error == pytest.approx(math.sqrt(0.125))
    assert second[:3] == ("b", 1, 2.0) and math.isnan(second.deviation) and second.error is None
    seed_table.print_seeds(settings(dataset="a/cells.npz", objective="elbo"), numbers, tmp_path)
    text = text_of_lines(capsys.readouterr().out)
    assert "mvae, objective elbo on cells, 3 seeds (0, 2, 3), 3 epochs each" in text
    assert "a (2 of 3 seeds)" in text and "b (1 of 3 seeds) 2.000 –" in text
    assert "each seed holds out other test rows" in text
    assert json.loads((tmp_path / "seeds.json").read_text())["rows"][2]["value"] is None
