"""Trainings that are killed at random moments end as those that are not; a disk that fills up leaves the checkpoint."""

import os
import random
import resource
import signal
import time

import pytest
import torch
from torch.utils.data import DataLoader

import pyro_mm as mm
from pyro_mm.training.pace import Pace
from pyro_mm.utils.global_state import override_validation
from pyro_mm.utils.tensor_files import load_tensors
from tests.support.adversarial_game import game
from tests.support.exact_training import without_inductor
from tests.support.nested_values import differing
from tests.support.paced import fit_at
from tests.support.training_pair import data, pair

LONG = os.environ.get("PYRO_MM_LONG") == "1"
KILLS = 20 if LONG else 3
EPOCHS = 30 if LONG else 12
ROWS = data(60)
EVERY_EPOCH = Pace(write_share=0.0)


def one_player():
    """Model, guide and objective of a usual training; fresh weights each time."""
    torch.manual_seed(0)
    return *pair(), mm.objectives.elbo()


def two_players():
    """Those of a training with a critic of latents, which has an optimiser of its own and moves at every second step.

    A dropout before the critic makes its state that of its draws as well.
    """
    model, guide, objective = game(optimizer=lambda ps: torch.optim.AdamW(ps, 0.02))
    objective.critic.insert(0, torch.nn.Dropout(0.1))
    return model, guide, objective


def train(path, make=one_player, rows=ROWS, **options):
    """Train, with the checkpoint at a path; return history, weights, and the checkpoint as it is at the end."""
    model, guide, objective = make()
    settings = {"epochs": EPOCHS, "batch_size": 16, "seed": 0, "progress": False, "audit": False} | options
    callbacks = [mm.callbacks.BestWeights("loss"), mm.callbacks.WeightAverage(0.9)]
    history = fit_at(EVERY_EPOCH, model, guide, objective, rows, checkpoint=path, callbacks=callbacks, **settings)
    modules = [module for module in (model, guide, objective) if isinstance(module, torch.nn.Module)]
    weights = [p.detach().clone() for module in modules for p in module.parameters()]
    return {"history": history.to_dict(), "weights": weights, "state": load_tensors(path, "a checkpoint")}


def loader():
    generator = torch.Generator().manual_seed(3)
    return DataLoader(
        range(60), 16, shuffle=True, generator=generator, collate_fn=lambda i: ROWS[torch.tensor(i)]
    )  # fmt: skip


def in_a_fork(act):
    """Run a function in a forked process, and return its number."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            act()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def killed_after(child, seconds):
    """Kill a process after some time, unless it ends before; return its status, and the time that it ran."""
    start = time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status, passed
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1], passed


CASES = {
    "eager": lambda: {"validation": data(20, 1)},
    "compiled": lambda: {"compile": True, "accumulate": 2},
    "a loader": lambda: {"rows": loader(), "validation": data(20, 1)},
    "two players": lambda: {"make": two_players, "clip_norm": 1.0, "rows": loader()},
    "two players, compiled": lambda: {"make": two_players, "compile": True, "clip_norm": 1.0},
}
CHOICE = list(CASES) if LONG else ["a loader", "two players, compiled"]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("case", CHOICE)
def test_a_training_that_is_killed_at_random_ends_as_one_that_is_not(tmp_path, monkeypatch, case):
    """Killed at moments spread over the time of the whole training, and run again until it ends.

    One that has ended before its kill is compared, and another one is begun. A compiled case has its traced graph.
    """
    without_inductor(monkeypatch)
    path = tmp_path / "run.pt"
    moments = random.Random(7)
    with override_validation(True):
        start = time.perf_counter()
        expected = train(tmp_path / "straight.pt", **CASES[case]())
        duration = time.perf_counter() - start
        kills = 0
        while kills < KILLS:
            child = in_a_fork(lambda: train(path, **CASES[case]()))
            status, seconds = killed_after(child, duration * moments.random())
            assert status in (signal.SIGKILL, 0)
            kills += status == signal.SIGKILL
            duration = duration if status else min(duration, seconds)
            if path.exists():
                state = load_tensors(path, "a checkpoint")
                assert 1 <= state["epochs"] <= EPOCHS
                if status == 0:
                    assert differing(state, expected["state"]) == []
                    path.unlink()
        assert differing(train(path, **CASES[case]()), expected) == []
    assert {p.name for p in tmp_path.iterdir()} == {"run.pt", "straight.pt"}  # neither locks nor half-written files


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("make", [one_player, two_players])
def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(tmp_path, make):
    """No file may grow beyond half of the checkpoint: writing fails in words, and the training goes on later."""
    path = tmp_path / "run.pt"
    expected = train(tmp_path / "straight.pt", make, epochs=3)
    train(path, make, epochs=2)
    before = path.read_bytes()

    def fail():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r"run\.pt"):
            train(path, make, epochs=3)

    assert os.waitpid(in_a_fork(fail), 0)[1] == 0
    assert path.read_bytes() == before
    assert differing(train(path, make, epochs=3), expected) == []
