"""Ctrl-C ends the step at hand, writes the checkpoint, and returns; the training goes on from that step exactly."""

import signal

import pytest
import torch
from torch.utils.data import DataLoader

import pyro_mm as mm
from pyro_mm.utils.global_state import override_validation
from tests.support.exact_training import without_inductor
from tests.support.training_pair import data, pair

ROWS = data()
pytestmark = pytest.mark.usefixtures("interruptible")


class CtrlC:
    """Ctrl-C at a step."""

    def __init__(self, step, times=1):
        self.step = step
        self.times = times

    def on_step(self, training):
        if training.step == self.step:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


def train(epochs=3, rows=ROWS, **options):
    torch.manual_seed(0)
    model, guide = pair()
    settings = {"batch_size": 32, "seed": 0, "progress": False, "validation": data(20, 1)} | options
    history = mm.fit(model, guide, mm.objectives.mvae(1), rows, epochs=epochs, **settings)
    weights = {f"{i}.{name}": t for i, m in enumerate((model, guide)) for name, t in m.state_dict().items()}
    return history, {name: t.clone() for name, t in weights.items()}


def loader(**options):
    """Batches of a dataset that draws from torch's generator, as augmentation does."""

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 100

        def __getitem__(self, i):
            return i, 0.01 * torch.randn(())

    def collate(items):
        i, noise = zip(*items, strict=True)
        batch = ROWS[torch.tensor(i)]
        return batch.replaced({"b": batch["b"] + torch.stack(noise)[:, None]})

    return DataLoader(Rows(), batch_size=32, collate_fn=collate, **options)


def stream():
    """Rows of batches of 15, mixed by a buffer."""
    return mm.Stream(lambda: (ROWS[first : first + 15] for first in range(0, 100, 15)), size=100, buffer=40)


def noisy(batch):
    return batch.replaced({"a": batch["a"] + 0.1 * torch.randn_like(batch["a"])})


CASES = {
    "rows": lambda: {},
    "rows elsewhere": lambda: {"resident": False, "transform": noisy},
    "gradients of three minibatches": lambda: {"accumulate": 3},
    "compiled": lambda: {"compile": True},
    "a loader": lambda: {"rows": loader(shuffle=True), "batch_size": 128},
    "its own generator": lambda: {"rows": loader(shuffle=True, generator=torch.Generator().manual_seed(5))},
    "its processes": lambda: {"rows": loader(shuffle=True, num_workers=1)},
    "a stream": lambda: {"rows": stream()},
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_that_was_interrupted_goes_on_from_its_step(tmp_path, monkeypatch, case):
    """Four steps an epoch, interrupted in the first epoch, in the second, and at the end of the second."""
    without_inductor(monkeypatch)
    path = tmp_path / "run.pt"
    with override_validation(True):
        straight, expected = train(**CASES[case]())
        for step, place in ((2, "step 2 of epoch 1"), (5, "step 1 of epoch 2"), (8, "step 4 of epoch 2")):
            with pytest.warns(UserWarning, match=f"interrupted after {place} of 3 epochs: its state is in .*run.pt"):
                history, _ = train(**CASES[case](), checkpoint=path, callbacks=[CtrlC(step)])
            assert history.interrupted and not history.stopped
        history, weights = train(**CASES[case](), checkpoint=path)
    assert not history.interrupted and history.to_dict() == straight.to_dict()
    torch.testing.assert_close(weights, expected, rtol=0, atol=0)


def test_an_interruption_between_epochs_leaves_a_whole_epoch(tmp_path):
    def ctrl_c(epoch, entry):
        if epoch == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.warns(UserWarning, match=r"after epoch 2 of 3 epochs: fit\(.., checkpoint=..\) would have kept"):
        history, _ = train(callback=ctrl_c)
    assert len(history) == 2 and history.interrupted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not train(2, callback=ctrl_c)[0].interrupted  # there was nothing left to do


def test_a_second_ctrl_c_raises():
    with pytest.raises(KeyboardInterrupt):
        train(callbacks=[CtrlC(2, times=2)])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_users_own_is_left_alone():
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        assert not train(callbacks=[CtrlC(2)])[0].interrupted and seen == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_checkpoint_in_an_epoch_that_is_not_asked_for_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    with pytest.warns(UserWarning, match="interrupted"):
        train(checkpoint=path, callbacks=[CtrlC(6)])
    with pytest.raises(ValueError, match="is of 1 epochs and a part of the next, more than the 1 asked for"):
        train(1, checkpoint=path)
    state = torch.load(path, weights_only=True)
    for change in ({"number": 0}, {"labels": []}, {"generators": []}, {"rows": None}):
        torch.save(state | {"position": state["position"] | change}, path)
        with pytest.raises(ValueError, match=r"is damaged, .*its place within an epoch is not one"):
            train(checkpoint=path)


def test_gradients_that_were_accumulated_are_not_dropped(tmp_path):
    path = tmp_path / "run.pt"
    with pytest.warns(UserWarning, match="interrupted"):
        train(checkpoint=path, accumulate=3, callbacks=[CtrlC(2)])
    with pytest.raises(ValueError, match=r"between two steps of an optimiser .* pass accumulate as before"):
        train(checkpoint=path)
