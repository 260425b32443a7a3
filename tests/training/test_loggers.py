"""Loggers: what they are given and when, at every kind of end; and those of Lightning Fabric themselves."""

import csv
import signal

import pytest
import torch
from pyro_mm.callbacks import Log

import pyro_mm as mm
from pyro_mm.training.callbacks import _metric_names
from tests.support.exact_training import linear_pair, log_likelihood, rows
from tests.support.training_pair import data, pair


class Logger:
    """A logger that notes its calls."""

    def __init__(self):
        self.calls = []

    def log_metrics(self, metrics, step):
        self.calls.append(("metrics", step))

    def log_hyperparams(self, options):
        self.calls.append(("options", options))

    def save(self):
        self.calls.append(("save",))

    def finalize(self, status):
        self.calls.append(("finalize", status))


def train(logger, epochs=3, **options):
    options = {"batch_size": 32, "seed": 0, "progress": False, "audit": False} | options
    return mm.fit(*linear_pair(), log_likelihood, rows(), epochs=epochs, logger=logger, **options)


def test_a_logger_is_given_options_first_epochs_and_the_end():
    logger = Logger()
    train(logger, 2, clip_norm=5.0, optimizer=lambda ps: torch.optim.SGD(ps, 0.25))
    (kind, options), *rest = logger.calls
    size = len(rows())
    steps = -(-size // 32)
    assert rest == [("metrics", steps), ("metrics", 2 * steps), ("save",), ("finalize", "success")]
    expected = {
        "rows": size, "epochs": 2, "batch_size": 32, "optimizer": "SGD", "lr": 0.25, "clip_norm": 5.0, "accumulate": 1,
        "seed": 0, "precision": "32-true", "device": "cpu", "processes": 1,
    }  # fmt: skip
    assert kind == "options" and expected.items() <= options.items() and isinstance(options["objective"], str)


@pytest.mark.usefixtures("interruptible")
def test_a_logger_is_closed_after_ctrl_c_and_after_an_error():
    def interrupt(epoch, entry):
        signal.raise_signal(signal.SIGINT)

    def fail(epoch, entry):
        raise KeyError("mine")

    logger = Logger()
    with pytest.warns(UserWarning, match="the training was interrupted"):
        train(logger, callback=interrupt)
    assert logger.calls[-2:] == [("save",), ("finalize", "interrupted")]
    logger = Logger()
    with pytest.raises(KeyError, match="mine"):
        train(logger, callback=fail)
    assert logger.calls[-2:] == [("save",), ("finalize", "failed")]
    logger = Logger()
    train(logger, callback=lambda epoch, entry: True)
    assert logger.calls[-2:] == [("save",), ("finalize", "success")]


def test_an_error_of_a_logger_at_the_end_does_not_hide_that_of_the_training():
    class Broken(Logger):
        def save(self):
            raise OSError("disk full")

    def fail(epoch, entry):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine") as caught:
        train(Broken(), callback=fail)
    assert "OSError: disk full" in caught.value.__notes__[0]


def test_what_is_no_logger_is_refused():
    for wrong in (Logger, "csv", object()):
        with pytest.raises(TypeError, match="expected logger to be an object with log_metrics"):
            train(wrong)


def test_one_process_of_several_logs():
    logger = Logger()
    mm.fit(*pair(), mm.objectives.mvae(), data(64), epochs=2, batch_size=16, logger=logger, devices=2, progress=False)
    assert [call[0] for call in logger.calls] == ["options", "metrics", "metrics", "save", "finalize"]


def test_names_of_terms_are_plain_and_none_takes_the_place_of_another():
    names = ["loss", "(*, *, P)", "(*, -, image)", "(*, *, image)", "validation", "a b", "a_b"]
    found = _metric_names({name: float(place) for place, name in enumerate(names)})
    plain = ["loss", "all_all_P", "all_none_image", "all_all_image", "validation", "a_b", "a_b_2"]
    assert found == {name: float(place) for place, name in enumerate(plain)}


@pytest.fixture
def fabric_loggers(monkeypatch):
    monkeypatch.setattr(torch, "compile", torch.compile)  # which the import replaces
    return pytest.importorskip("lightning_fabric.loggers", reason="lightning-fabric is not installed")


def fit(logger):
    return mm.fit(
        *pair(), mm.objectives.jmvae_kl(0.1), data(64), validation=data(16, 1), epochs=3, batch_size=16, seed=0,
        progress=False, callbacks=[Log(logger, every=2)],
    )  # fmt: skip


def test_the_csv_logger_of_fabric_writes_every_epoch(fabric_loggers, tmp_path):
    logger = fabric_loggers.CSVLogger(tmp_path, name="run")
    history = fit(logger)
    with open(tmp_path / "run" / "version_0" / "metrics.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    epochs = [line for line in lines if line["epoch"]]
    assert [float(line["epoch"]) for line in epochs] == [1.0, 2.0, 3.0]
    columns = history.to_dict()
    for name, plain in zip(columns, _metric_names(dict.fromkeys(columns, 0.0)), strict=True):
        assert [float(line[plain]) for line in epochs] == pytest.approx(columns[name]), name
    assert [line["step"] for line in lines if line["step/loss"]] == ["2", "4", "6", "8", "10", "12"]


def test_the_tensorboard_logger_of_fabric_writes_every_term(fabric_loggers, tmp_path):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    history = fit(fabric_loggers.TensorBoardLogger(tmp_path, name="run"))
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out.tfevents*"))
    for name in _metric_names(dict.fromkeys(history.to_dict(), 0.0)):
        assert name.encode() in content, name
    assert b"jmvae" in content.lower() or b"objective" in content
