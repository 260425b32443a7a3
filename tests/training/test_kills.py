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
from tests.support.exact_training import without_inductor
from tests.support.paced import fit_at
from tests.support.training_pair import data, pair

KILLS = 20 if os.environ.get("PYRO_MM_LONG") == "1" else 3
EPOCHS = 30
ROWS = data(60)
EVERY_EPOCH = Pace(write_share=0.0)


def train(path, rows=ROWS, **options):
    torch.manual_seed(0)
    model, guide = pair()
    settings = {"epochs": EPOCHS, "batch_size": 16, "seed": 0, "progress": False, "audit": False} | options
    callbacks = [mm.callbacks.BestWeights("loss"), mm.callbacks.WeightAverage(0.9)]
    history = fit_at(
        EVERY_EPOCH, model, guide, mm.objectives.elbo(), rows, checkpoint=path, callbacks=callbacks, **settings
    )
    return history.to_dict(), [p.detach().clone() for m in (model, guide) for p in m.parameters()]


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


CASES = {
    "eager": lambda: {"validation": data(20, 1)},
    "compiled": lambda: {"compile": True, "accumulate": 2},
    "a loader": lambda: {"rows": loader()},
}


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_training_that_is_killed_at_random_ends_as_one_that_is_not(tmp_path, monkeypatch, case):
    """Killed at moments spread over the time of the whole training, and run again until it ends."""
    without_inductor(monkeypatch)
    path = tmp_path / "run.pt"
    moments = random.Random(7)
    with override_validation(True):
        start = time.perf_counter()
        straight, expected = train(tmp_path / "straight.pt", **CASES[case]())
        duration = time.perf_counter() - start
        for _ in range(KILLS):
            child = in_a_fork(lambda: train(path, **CASES[case]()))
            time.sleep(duration * moments.random())
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] in (signal.SIGKILL, 0)
            if path.exists():
                assert 1 <= load_tensors(path, "a checkpoint")["epochs"] <= EPOCHS
        history, weights = train(path, **CASES[case]())
    assert history == straight
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
    assert {p.name for p in tmp_path.iterdir()} == {"run.pt", "straight.pt"}  # neither locks nor half-written files


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(tmp_path):
    """No file may grow beyond half of the checkpoint: writing fails in words, and the training goes on later."""
    path = tmp_path / "run.pt"
    straight, expected = train(tmp_path / "straight.pt", epochs=4)
    train(path, epochs=2)
    before = path.read_bytes()

    def fail():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match=r"run\.pt"):
            train(path, epochs=4)

    assert os.waitpid(in_a_fork(fail), 0)[1] == 0
    assert path.read_bytes() == before
    history, weights = train(path, epochs=4)
    assert history == straight
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)
