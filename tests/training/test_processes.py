"""Trainings by several processes: the numbers are those of one process with the whole batch."""

import os
import signal
import socket

import pytest
import torch
from pyro_mm.callbacks import BestWeights, EarlyStopping, WeightAverage
from torch import nn
from torch.utils.data import DataLoader

import pyro_mm as mm
from pyro_mm.objectives import ALL, EACH, PRIOR, Objective, Term
from pyro_mm.utils.global_state import override_validation
from tests.support.adversarial_game import game
from tests.support.constant_noise import without_noise
from tests.support.exact_training import linear_pair, log_likelihood, parameters, rows, without_inductor
from tests.support.training_pair import data, pair

SGD = lambda ps: torch.optim.SGD(ps, 0.01, momentum=0.5)  # noqa: E731
MAIN = os.getpid()


def train(model, guide, objective, batch, *, devices=1, **options):
    settings = {"seed": 0, "progress": False, "optimizer": SGD, "audit": False} | options
    history = mm.fit(model, guide, objective, batch, devices=devices, **settings)
    return history, parameters(model, guide)


def assert_close(one, other, atol=1e-10):
    torch.testing.assert_close(one, other, rtol=0, atol=atol)


# -- exactness ------------------------------------------------------------------------------------------------------


def encoded_pair(deterministic):
    torch.manual_seed(0)
    model, _ = linear_pair()
    head = mm.conditionals.Delta(nn.Linear(4, 2)) if deterministic else mm.conditionals.Normal(nn.Linear(4, 4))
    if not deterministic:
        model.requires_grad_(False)  # divergences of the guide do not depend on it
    encoder = mm.posteriors.SumPooling({"a": nn.Linear(3, 4), "b": nn.Linear(1, 4)}, head, 4)
    return model, mm.Guide(z=encoder).double()


OBJECTIVES = {
    "log p": (linear_pair, log_likelihood),
    "reconstructions": (lambda: encoded_pair(True), mm.objectives.elbo(kl=0.0) + mm.objectives.mvae(kl=0.0)),
    "divergences": (
        lambda: encoded_pair(False), Objective([Term(ALL, (), EACH), Term(EACH, (), PRIOR, kl=0.5)])
    ),
}  # fmt: skip


@pytest.mark.parametrize(("objective", "size", "devices"), [*((name, 41, 2) for name in OBJECTIVES), ("log p", 40, 3)])
def test_fifty_steps_are_those_of_one_process_with_the_whole_batch(objective, size, devices):
    """Objectives without noise, missing modalities, shards of 21 and 20 rows, or of 14, 13 and 13; SGD and Adam."""
    make, loss = OBJECTIVES[objective]
    batch = rows(size)
    optimizer = (lambda ps: torch.optim.Adam(ps, 0.01)) if devices == 3 else SGD
    common = {"epochs": 50, "optimizer": optimizer}
    straight, expected = train(*make(), loss, batch, batch_size=size, **common)
    history, found = train(*make(), loss, batch, batch_size=21, devices=devices, **common)
    assert_close(found, expected)
    for name, column in straight.to_dict().items():
        assert history.to_dict()[name] == pytest.approx(column, rel=1e-10)


@pytest.mark.parametrize("compile", [False, True])
def test_minibatches_are_those_of_one_permutation(monkeypatch, compile):
    """97 rows: at the last step of an epoch one process has a row, and the other has none."""
    without_inductor(monkeypatch)
    common = {"epochs": 4, "accumulate": 3, "clip_norm": 2.0, "validation": rows(20, 1)}
    with override_validation(True):
        straight, expected = train(*linear_pair(), log_likelihood, rows(97), batch_size=32, **common)
        history, found = train(
            *linear_pair(), log_likelihood, rows(97), batch_size=16, devices=2, compile=compile, **common
        )
    assert_close(found, expected)
    assert history.to_dict()["validation"] == pytest.approx(straight.to_dict()["validation"], rel=1e-10)


def test_every_process_has_noise_of_its_own():
    """The gradient is the mean of two standard normal draws, of variance 1/2, where shared noise has 1.

    Over 400 steps its standard error is 0.035; five of them are allowed.
    """
    weight = nn.Parameter(torch.zeros(()))
    moves = []

    class Record:
        def on_step(self, training):
            moves.append(float(weight))

    def objective(model, guide, batch, *, step):
        return mm.Loss(weight * torch.randn(()) * batch.size)

    mm.fit(
        lambda batch: weight + 0, lambda batch: None, objective, mm.Batch({"x": torch.zeros(8, 1)}), devices=2,
        epochs=100, batch_size=1, seed=0, audit=False, progress=False, callbacks=[Record()],
        optimizer=lambda ps: torch.optim.SGD(ps, 1.0),
    )  # fmt: skip
    steps = torch.tensor([0.0, *moves]).diff()
    assert len(steps) == 400 and steps.var().item() == pytest.approx(0.5, abs=5 * 0.035)


def test_a_loader_is_shared_out():
    batch = rows(40)
    loader = DataLoader(range(40), 20, collate_fn=lambda i: batch[torch.tensor(i)])
    _, expected = train(*linear_pair(), log_likelihood, loader, epochs=5)
    half = DataLoader(range(40), 10, collate_fn=lambda i: batch[torch.tensor(i)])
    _, found = train(*linear_pair(), log_likelihood, half, epochs=5, devices=2)
    assert_close(found, expected)


def test_rows_for_validation_are_shared_out():
    """Draws and all: 20 rows in three minibatches, of a batch and of a loader."""
    other, calls = data(20, 1), []

    def counted(model, guide, batch, *, step):
        calls.append(batch.size)
        return mm.objectives.elbo().evaluate(model, guide, batch, step=step)

    def run(devices, validation):
        torch.manual_seed(0)
        frozen = lambda ps: torch.optim.SGD(ps, 0.0)  # noqa: E731
        history, _ = train(*pair(), counted, data(16), epochs=1, batch_size=8 // devices, devices=devices,
                           optimizer=frozen, validation=validation, validation_batch_size=7)  # fmt: skip
        return history.to_dict()["validation"]

    loader = DataLoader(range(20), 7, collate_fn=lambda i: other[torch.tensor(i)])
    for validation in (other, loader):
        calls.clear()
        expected = run(1, validation)
        alone = len([size for size in calls if size in (6, 7)])
        calls.clear()
        assert run(2, validation) == expected
        assert len([size for size in calls if size in (6, 7)]) == alone - 1  # this process leaves one of three out


# -- one call -------------------------------------------------------------------------------------------------------


def test_what_comes_after_runs_once_and_the_callers_modules_are_trained(tmp_path):
    """Networks in closures, lambdas, callbacks with a state; the checkpoint and the history are those of the caller."""
    model, guide = linear_pair()
    before = parameters(model)
    seen = []
    history = mm.fit(
        lambda batch: model(batch), lambda batch: guide(batch), lambda m, g, b, *, step: log_likelihood(
            model, guide, b, step=step
        ), rows(40), devices=2, epochs=30, batch_size=10, optimizer=SGD, progress=False, seed=0,
        callback=lambda epoch, entry: seen.append(epoch), checkpoint=tmp_path / "run.pt", validation=rows(10, 1),
        callbacks=[EarlyStopping(30), BestWeights(), WeightAverage(0.9)],
    )  # fmt: skip
    (tmp_path / f"after-{os.getpid()}").touch()
    assert os.getpid() == MAIN and len(list(tmp_path.glob("after-*"))) == 1
    assert len(history) == 30 and seen == list(range(1, 31)) and (tmp_path / "run.pt").exists()
    assert not any(map(torch.equal, before, parameters(model)))
    assert not torch.distributed.is_initialized()


def test_a_training_goes_on_with_the_draws_of_every_process(tmp_path):
    def run(epochs, path=None, **options):
        torch.manual_seed(0)
        return train(*pair(), mm.objectives.mvae(1), data(45), epochs=epochs, batch_size=8, devices=2, checkpoint=path,
                     accumulate=2, **options)  # fmt: skip

    straight, expected = run(4)
    run(2, tmp_path / "run.pt")
    history, found = run(4, tmp_path / "run.pt")
    assert_close(found, expected, atol=0)
    assert history.to_dict() == straight.to_dict()
    with pytest.raises(ValueError, match="processes: 2, and not 1"):
        train(*pair(), mm.objectives.mvae(1), data(45), epochs=5, batch_size=8, checkpoint=tmp_path / "run.pt")


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_of_one_process_ends_all_at_one_step(tmp_path):
    class CtrlC:
        def on_step(self, training):
            if training.step == 4 and training.is_main:
                signal.raise_signal(signal.SIGINT)

    def run(path=None, callbacks=()):
        torch.manual_seed(0)
        return train(*pair(), mm.objectives.elbo(), data(48), epochs=3, batch_size=8, devices=2, checkpoint=path,
                     callbacks=callbacks)  # fmt: skip

    straight, expected = run()
    with pytest.warns(UserWarning, match="interrupted after step 2 of epoch 2"):
        assert run(tmp_path / "run.pt", [CtrlC()])[0].interrupted
    history, found = run(tmp_path / "run.pt")
    assert_close(found, expected, atol=0)
    assert history.to_dict() == straight.to_dict()


def test_a_callback_of_one_process_stops_all():
    class OfRankOne:
        def on_step(self, training):
            return training.step == 3 and not training.is_main

    history, _ = train(*linear_pair(), log_likelihood, rows(40), epochs=3, batch_size=5, devices=2,
                       callbacks=[OfRankOne()])  # fmt: skip
    assert history.stopped and len(history) == 0  # they know at the fourth step, before the end of the epoch


# -- what goes wrong ------------------------------------------------------------------------------------------------


def test_an_error_of_another_process_is_raised_here():
    def broken(model, guide, batch, *, step):
        if os.getpid() != MAIN and step == 2:
            raise KeyError("of rank 1")
        return log_likelihood(model, guide, batch, step=step)

    with pytest.raises(KeyError, match="of rank 1"):
        train(*linear_pair(), broken, rows(40), batch_size=5, devices=2)
    assert not torch.distributed.is_initialized()


def test_a_process_that_is_killed_ends_the_training():
    def killed(model, guide, batch, *, step):
        if os.getpid() != MAIN and step == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return log_likelihood(model, guide, batch, step=step)

    with pytest.raises(ValueError, match="process 1 of the training was killed by SIGKILL"):
        train(*linear_pair(), killed, rows(40), batch_size=5, devices=2)


def test_a_row_that_is_not_finite_is_named_whichever_process_has_it():
    batch = rows(40, missing=False)
    wrong = batch["a"].clone()
    wrong[17, 0] = float("inf")
    before = parameters(linear_pair()[0])
    model, guide = linear_pair()
    with pytest.raises(FloatingPointError, match="row 17"):
        train(model, guide, log_likelihood, mm.Batch({"a": wrong, "b": batch["b"]}), batch_size=20, devices=2)
    assert_close(parameters(model), before, atol=0)


def test_batch_normalisation_is_refused():
    model, _ = pair()
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    experts = {"a": mm.conditionals.Normal(net), "b": mm.conditionals.Normal(nn.Linear(1, 4))}
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts(experts))
    with pytest.raises(ValueError, match=r"batch normalisation would take its mean .* of one process of 2"):
        train(model, guide, mm.objectives.elbo(), data(40), batch_size=8, devices=2)


def test_processes_are_not_forked_where_there_are_some(monkeypatch):
    with pytest.raises(ValueError, match="devices >= 1, got 0"):
        train(*pair(), mm.objectives.elbo(), data(40), devices=0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="this is one of several already, of torchrun say: leave devices out"):
        train(*pair(), mm.objectives.elbo(), data(40), devices=2)


# -- processes of torchrun ------------------------------------------------------------------------------------------


def two_players(rank=0):
    """Model, guide and objective of a training with a critic, of weights that differ from rank to rank."""
    model, guide, objective = game(optimizer=lambda ps: torch.optim.SGD(ps, 0.01))
    with torch.no_grad():
        for module in (model, guide, objective):
            for p in module.double().parameters():
                p.add_(rank)
    return model, guide, objective


def test_processes_that_torchrun_started_train_together(tmp_path, monkeypatch):
    """Each has the environment that torchrun, or ``fabric run`` by it, gives it, and runs the same program."""
    without_noise(monkeypatch)
    common = {"epochs": 5, "optimizer": lambda ps: torch.optim.SGD(ps, 0.002)}
    _, expected = train(*two_players(), rows(41), batch_size=42, **common)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = []
    for rank in range(2):
        if child := os.fork():
            children.append(child)
            continue
        try:
            torch.set_num_threads(1)
            os.environ |= {
                "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0", "LT_CLI_USED": "1",
                "LT_ACCELERATOR": "cpu", "LT_DEVICES": "2", "LT_NUM_NODES": "1",
            }  # fmt: skip
            torch.manual_seed(rank)
            players = two_players(rank)  # weights of their own, of which those of rank 0 count
            _, found = train(*players, rows(41), batch_size=21, checkpoint=tmp_path / "run.pt", **common)
            torch.save(found, tmp_path / f"weights-{rank}.pt")
        finally:
            os._exit(0)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"weights-{rank}.pt"), expected)
    assert (tmp_path / "run.pt").exists()
