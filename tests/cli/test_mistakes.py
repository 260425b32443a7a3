"""Mistakes of users: a code that is not 0, one sentence that says what to do, no traceback, nothing half-written."""

import errno
import json
import pickle
import signal

import numpy as np
import pytest

from pyro_mm import cli
from pyro_mm.experiments import console, user_data
from tests.support.command_line import run, text_of

ROWS = 20
FAST = ["--epochs", 2, "--rows", 5, "--evidence-particles", 10, "--no-fitted", "--latent", 2]
PAIR = {"a": np.random.default_rng(0).normal(size=(ROWS, 3)), "b": np.arange(ROWS) % 3}


def changed(index, value):
    """The values of "a" with another one at an index."""
    values = PAIR["a"].copy()
    values[index] = value
    return values


FILES = {
    "objects": ({"b": np.array([None] * ROWS)}, "the array 'b' holds Python objects and not numbers: give it a type"),
    "strings": (
        {"b": np.array(["x"] * ROWS)},
        "modality 'b': expected numbers, got <U1: encode categories as integers",
    ),
    "dates": ({"b": np.zeros(ROWS, "datetime64[D]")}, "modality 'b': expected numbers, got datetime64[D]"),
    "complex": ({"a": PAIR["a"] + 1j}, "modality 'a': expected real numbers, got torch.complex128"),
    "records": ({"b": np.zeros(ROWS, [("x", int)])}, "modality 'b': expected numbers, got"),
    "unsigned": ({"b": np.full(ROWS, 2**63, "uint64")}, "modality 'b': expected integers below 2**63"),
    "negative": ({"b": PAIR["b"] - 1}, "numbered from 0, and -1 is among them"),
    "only NaN": ({"a": np.full((ROWS, 3), np.nan)}, "modality 'a' has no values in any training row: leave it out"),
    "masked": ({"a.present": np.zeros(ROWS, bool)}, "modality 'a' has no values in any training row: leave it out"),
    "infinite": (
        {"a": changed((3, 1), np.inf)},
        "modality 'a': 1 of 20 rows have infinite values (the first is row 3)",
    ),
    "rows": ({"b": np.arange(ROWS - 1) % 3}, "expected as many rows in every modality, got {'a': 20, 'b': 19}"),
    "scalar": ({"b": np.array(3)}, "modality 'b': expected shape (N, ...), got a single number"),
    "no rows": ({"a": np.zeros((0, 3)), "b": np.zeros(0, int)}, "modality 'a': expected at least one row"),
    "few rows": ({"a": np.zeros((2, 3)), "b": np.zeros(2, int)}, "expected five rows at least"),
    "no columns": ({"a": np.zeros((ROWS, 0))}, "modality 'a': expected at least one row, of at least one number"),
    "mask type": ({"a.present": np.ones(ROWS)}, "present['a']: expected torch.bool of shape (20,), got torch.float64"),
    "mask rows": ({"a.present": np.ones(9, bool)}, "present['a']: expected torch.bool of shape (20,)"),
    "mask name": (
        {"a.presence": np.ones(ROWS, bool)},
        "has no dot and no slash in it; NAME.present is the mask of NAME",
    ),
    "misspelt": ({"a.presnt": np.ones(ROWS, bool)}, "do you mean a.present?"),
    "slash": ({"x/y": PAIR["a"]}, "the array 'x/y' has no name of a modality"),
    "lengths": ({"a.lengths": np.full(ROWS, 9)}, "lengths of 'a': expected integers from 0 to 3"),
    "site": ({"z": PAIR["a"]}, "modality 'z': the story has a site or a plate of that name, choose another one"),
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(arguments, words, code=None):
    """Run a command, hold it to be refused in these words, and return its text."""
    result = run(*arguments)
    text = text_of(result)
    assert result.exit_code in ((1, 2) if code is None else (code,)), result.output
    assert isinstance(result.exception, SystemExit) and "Traceback" not in result.output
    assert words in text, text
    return text


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_arrays_that_are_no_modalities_is_refused(name, here):
    arrays, words = FILES[name]
    np.savez(here / "cells.npz", **{**PAIR, **arrays})
    text = refused(["train", "cells.npz", *FAST, "--out", "out"], words)
    assert "cells" in text or name == "site"
    assert not (here / "out").exists()


def contents():
    """File -> bytes, of files that are no npz files of arrays."""
    with open("good.npz", "wb") as file:
        np.savez(file, **PAIR)
    with open("good.npz", "rb") as file:
        good = file.read()
    damaged = bytearray(good)
    damaged[200:260] = bytes(60)
    return {
        "empty.npz": (b"", "empty.npz: the file is empty. Write one by np.savez"),
        "text.npz": (b"a,b", "text.npz: not a file of arrays as np.savez writes it, or a part of one. Write one by"),
        "pickle.npz": (pickle.dumps(PAIR), "not a file of arrays as np.savez writes it"),
        "cut.npz": (good[: len(good) // 2], "not a file of arrays as np.savez writes it, or a part of one"),
        "damaged.npz": (bytes(damaged), "damaged.npz: the file is damaged"),
        "table.csv": (b"a,b", "table.csv is no npz file: read it in Python, and write its columns by np.savez"),
        "array.npy": (b"", "array.npy is no npz file"),
    }


def test_a_file_of_another_form_is_refused(here):
    for name, (content, words) in contents().items():
        (here / name).write_bytes(content)
        for command in ("train", "compare"):
            refused([command, name, "--out", "out"], words)
        if name.endswith(".npz"):
            refused(["train", "good.npz", "--test", name, "--out", "out"], words)
    np.savez(here / "none.npz")
    np.savez(here / "one.npz", a=PAIR["a"])
    (here / "folder.npz").mkdir()
    refused(["train", "none.npz"], "expected an array for each modality, named by it, got none")
    refused(["train", "one.npz"], "expected two modalities at least, as each is evaluated given the others, got 'a'")
    refused(["train", "good.npz", "--test", "one.npz"], "expected the modalities of", 1)
    np.savez(here / "wide.npz", **{**PAIR, "a": np.zeros((ROWS, 4))})
    words = (
        "wide.npz: modality 'a': expected floats of shape (3,) per row, as in the training rows, got floats of shape (4"
    )
    refused(["train", "good.npz", "--test", "wide.npz"], words, 1)
    refused(["train", "folder.npz"], "there is no file folder.npz", 2)
    refused(["train", "nothing.npz"], "there is no file nothing.npz", 2)
    refused(["train", "good.npz", "--test", "nothing.npz"], "'nothing.npz' does not exist", 2)
    assert not (here / "out").exists() and not (here / "runs").exists()


def test_a_file_that_may_not_be_read_is_refused(here, monkeypatch):
    """By its error, as the tests may run for a user who may read all."""
    np.savez(here / "cells.npz", **PAIR)

    def deny(paths):
        raise PermissionError(errno.EACCES, "Permission denied", "cells.npz")

    monkeypatch.setattr(cli.rows, "digest_files", deny)
    refused(["train", "cells.npz"], "cells.npz cannot be read: Permission denied", 2)


ARGUMENTS = [
    (["train"], "Missing argument"),
    (["train", "digit"], "unknown data set 'digit' (do you mean 'digits'?): expected one of digits, mnist, fashion"),
    (["train", ""], "unknown data set ''"),
    (["train", "digits", "--recipe", "jmvae"], "unknown recipe 'jmvae' (do you mean 'jmvae-kl'?)"),
    (["train", "digits", "--recipe", "vae"], "recipe 'vae': it has one modality"),
    (["train", "digits", "--recipe", "mfm"], "deterministic autoencoder without likelihoods"),
    (["train", "digits", "--objective", "Mixture_Mean."], "(do you mean 'mixture-mean'?)"),
    (["train", "digits", "--estimator", "dregs"], "unknown estimator 'dregs' (do you mean 'dreg'?)"),
    (["train", "digits", "--estimator", "iwae-stratified"], "needs a mixture posterior"),
    (["train", "digits", "--logger", "tensorbord"], "unknown logger 'tensorbord' (do you mean 'tensorboard'?)"),
    (["train", "digits", "--log-dir", "a"], "give one by --logger"),
    (["train", "digits", "--kinds", "image=grey"], "--kinds: is for a file of arrays, and digits has kinds"),
    (["train", "mnist", "--data", "nowhere"], "'nowhere' does not exist"),
    (["train", "digits", "--data", "."], "digits needs no files, leave it out"),
    (["train", "digits", "--device", "abacus"], "--device: there is no 'abacus' here"),
    (["train", "digits", "--device", ""], "--device: there is no '' here"),
    (["train", "digits", "--device", "meta"], "--device: meta holds no numbers"),
    (["train", "digits", "--lr", "0"], "--lr: expected a step size above 0, got 0"),
    (["train", "digits", "--lr", "inf"], "'--lr'"),
    (["train", "digits", "--lr", "nan"], "'--lr'"),
    (["train", "digits", "--seed", str(2**70)], "'--seed'"),
    (["train", "digits", "--seed", "-1"], "'--seed'"),
    (["train", "digits", "--seeds", "0"], "'--seeds'"),
    (["train", "digits", "--epochs", "0"], "'--epochs'"),
    (["train", "digits", "--epochs", "1.5"], "'--epochs'"),
    (["train", "digits", "--batch-size", "0"], "'--batch-size'"),
    (["train", "digits", "--latent", "x"], "'--latent'"),
    (["train", "digits", "--num-particles", "0"], "'--num-particles'"),
    (["train", "digits", "--rows", "0"], "'--rows'"),
    (["train", "digits", "--evidence-particles", "1"], "'--evidence-particles'"),
    (["train", "digits", "--epoch", "1"], "--epochs"),
    (["train", "digits", "mnist"], "unexpected extra argument"),
    (["trian", "digits"], "No such command 'trian'"),
    (["train", "digits", "--out", "file"], "'file' is a file"),
    (["evaluate", "nowhere"], "expected a folder that train wrote"),
    (["evaluate", "file"], "expected a folder that train wrote"),
    (["evaluate", "."], "there is no config.json: expected a folder that train wrote"),
    (["compare", "digits", "--recipes", "mvae"], "expected two different recipes at least, got mvae"),
    (["compare", "digits", "--recipes", "mvae,mvae"], "expected two different recipes at least"),
    (["compare", "digits", "--recipes", "mvae,jnf"], "recipe 'jnf': it is trained in two stages"),
    (["compare", "digits", "--recipes", "mvae,"], "unknown recipe ''"),
    (["compare", "digits", "--device", "abacus"], "--device: there is no 'abacus' here"),
    (["reproduce", "jmvae-mist"], "unknown reproduction 'jmvae-mist' (do you mean 'jmvae-mnist'?)"),
    (["reproduce", "jmvae-mnist", "--data", "nowhere"], "does not exist"),
    (["reproduce", "jmvae-mnist", "--minutes", "-1"], "'--minutes'"),
    (["reproduce", "jmvae-mnist", "--seeds", "2"], "--seeds: this one is no study of several seeds, leave it out"),
    (["reproduce", "hirt-linear", "--rows", "5"], "--rows: this one is measured on test rows of its own"),
    (["reproduce", "hirt-linear", "--only", "nothing"], "--only: no row has nothing in its name"),
    (["reproduce", "hirt-linear", "--finished", "--out", "a"], "--finished: a holds no finished run"),
]


@pytest.mark.parametrize(("arguments", "words"), ARGUMENTS, ids=[" ".join(arguments) for arguments, _ in ARGUMENTS])
def test_an_argument_that_is_wrong_is_refused(arguments, words, here, monkeypatch):
    monkeypatch.setattr(cli.training, "fit", lambda *_, **__: pytest.fail("it was trained"))
    (here / "file").touch()
    refused(arguments, words, 2)
    left = {path.relative_to(here).as_posix() for path in here.rglob("*")}
    assert left in ({"file"}, {"file", "runs", "runs/reproduce", "runs/reproduce/hirt-linear"})


def test_a_folder_that_cannot_be_written_is_refused_before_training(here, monkeypatch):
    monkeypatch.setattr(cli.training, "fit", lambda *_, **__: pytest.fail("it was trained"))
    (here / "file").touch()
    words = "not a directory. It lies in a file where a folder is needed: give another path"
    for command in (["train", "digits"], ["train", "digits", "--seeds", 2], ["compare", "digits"]):
        refused([*command, "--out", "file/a"], words, 1)
    refused(["reproduce", "hirt-linear", "--out", "file/a"], words, 1)
    refused(["train", "digits", "--logger", "csv", "--log-dir", "file/a", "--out", "out"], words, 1)
    assert [path.name for path in here.iterdir()] == ["file"]


def test_a_full_disk_says_so_and_how_to_go_on(here, monkeypatch):
    """At the end of a run, whose checkpoint is there: the same command goes on from it."""
    monkeypatch.setattr(cli.run, "draw_figures", lambda *_: {})

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", "out/history.csv")

    with monkeypatch.context() as patch:
        patch.setattr(cli.output, "save", full)
        command = ["train", "digits", *FAST, "--out", "out"]
        text = refused(command, "out/history.csv: no space left on device. Free some space, or give another folder", 1)
    assert "go on by: pyro-mm train digits" in text
    result = run(*command)
    assert result.exit_code == 0 and "going on with the run in out" in result.output
    assert not (here / "out" / "checkpoint.pt").exists()


# -- what is in a folder already ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """File -> bytes, of a run on a file that was stopped after an epoch, and of its file."""
    folder = tmp_path_factory.mktemp("unfinished")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    fit = cli.training.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        np.savez("cells.npz", **PAIR)
        stop = lambda *_: signal.raise_signal(signal.SIGINT)  # noqa: E731
        patch.setattr(cli.training, "fit", lambda *args, **options: fit(*args, **options, callback=stop))
        assert run("train", "cells.npz", *FAST, "--out", "out").exit_code == 130
    signal.signal(signal.SIGINT, before)
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def stopped(unfinished, here):
    (here / "out").mkdir()
    for name, content in unfinished.items():
        (here / name).write_bytes(content)
    config = here / "out" / "config.json"
    held = json.loads(config.read_text()) | {"dataset": str((here / "cells.npz").resolve())}
    config.write_text(json.dumps(held, indent=2) + "\n")
    return here / "out"


RESUME = ["train", "cells.npz", *FAST, "--out", "out"]


def test_other_data_and_options_do_not_go_on(stopped, here):
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    for options, words in (
        (["--lr", 0.5], "lr 0.003, not 0.5"),
        (["--recipe", "mvae"], "recipe jmvae-kl, not mvae"),
        (["--latent", 3], "latent 2, not 3"),
        (["--compile", "--seed", 4], "seed 0, not 4, compile none, not True"),
    ):
        for resume in ([], ["--resume"]):
            text = refused([*RESUME, *options, *resume], f"out holds an unfinished run of other settings ({words})", 2)
            assert "Give the same ones to go on, --force to start anew in its place, or another folder" in text
    np.savez(here / "cells.npz", **{**PAIR, "a": PAIR["a"] + 1})
    refused([*RESUME, "--resume"], "other settings (other content of the files)", 2)
    refused(["evaluate", "out"], "cells.npz has changed since the run was trained", 1)
    assert {path: path.read_bytes() for path in stopped.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("checkpoint.pt", b"", "checkpoint.pt is damaged"),
        ("checkpoint.pt", b"no checkpoint", "checkpoint.pt is damaged"),
        ("config.json", b"{", "config.json is damaged, or was not written by pyro-mm train"),
        ("config.json", b"[]", "config.json is damaged, or was not written by pyro-mm train"),
        ("config.json", b"\xff", "config.json is damaged, or was not written by pyro-mm train"),
        ("config.json", b'{"recipe": "mvae"}', "config.json is damaged, or was not written by pyro-mm train"),
    ],
)
def test_a_damaged_file_of_a_run_is_named_and_the_others_stay(stopped, name, content, words):
    (stopped / name).write_bytes(content)
    before = {path: path.read_bytes() for path in stopped.iterdir()}
    for command in ([*RESUME, "--resume"], RESUME, ["evaluate", "out"]):
        text = refused(command, words, 1)
        assert name == "config.json" or command[0] == "evaluate" or "Give --force to start anew in its place" in text
    assert {path: path.read_bytes() for path in stopped.iterdir()} == before


def test_a_folder_without_an_unfinished_run_is_not_gone_on_with(here):
    np.savez(here / "cells.npz", **PAIR)
    refused([*RESUME, "--resume"], "--resume: there is no unfinished run to go on with, out is without a checkpoint", 2)
    refused([*RESUME, "--resume", "--force"], "give one of them", 2)
    assert not (here / "out").exists()


def test_warnings_are_a_line_of_text(here):
    """Some cells of a row are NaN: the row is missing, which is said without the line of code that says it."""
    np.savez(here / "cells.npz", **{**PAIR, "a": changed((3, 1), np.nan)})
    with console.plain_warnings(), pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(console.typer, "echo", lambda text, err: said.append((text, err)))
        user_data.read_batch(here / "cells.npz")
    ((text, err),) = said
    assert err and text.startswith("warning: ") and "Impute them" in text and "\n" not in text.strip()
