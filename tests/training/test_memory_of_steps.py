"""Many small steps of two players take no more memory than few, eager and compiled."""

import gc
import os
import traceback
from pathlib import Path

import pytest
import torch

import pyro_mm as mm
from pyro_mm.utils.global_state import override_validation
from tests.support.adversarial_game import game
from tests.support.exact_training import without_inductor
from tests.support.training_pair import data

LONG = os.environ.get("PYRO_MM_LONG") == "1"
STEPS_PER_EPOCH = 100 if LONG else 20
EPOCHS = 200 if LONG else 8
GROWTH = 10.0  # bytes per step; a tensor that is left behind takes some hundreds
FEW = 10  # objects that come and go


def resident_bytes():
    """Return the resident memory of this process without pages of files, in bytes."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Watch:
    """Counts of Python's objects and of tensors, and the resident memory, after every epoch."""

    def __init__(self):
        self.objects = []
        self.tensors = []
        self.bytes = []

    def __call__(self, epoch, entry):
        gc.collect()
        found = gc.get_objects()
        self.objects.append(len(found))
        self.tensors.append(sum(issubclass(type(x), torch.Tensor) for x in found))
        del found
        self.bytes.append(resident_bytes())


def in_a_child(act):
    """Run a function in a process of its own, whose memory no earlier test has filled."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            act()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not say what memory is in use")
@pytest.mark.parametrize("compile", [False, True])
def test_steps_of_two_players_leave_nothing_behind(monkeypatch, compile):
    """160 steps, and 20,000 in the long mode.

    From a quarter of them on the objects of Python and the tensors are as many. In the long mode the slope of the
    resident memory over the last three quarters is below 10 bytes per step.
    """
    without_inductor(monkeypatch)

    def watch_a_training():
        gc.freeze()  # objects of earlier tests are not counted
        model, guide, objective = game()
        watch = Watch()
        with override_validation(True):
            mm.fit(
                model, guide, objective, data(4 * STEPS_PER_EPOCH), epochs=EPOCHS, batch_size=4, seed=0, audit=False,
                progress=False, callback=watch, compile=compile, clip_norm=10.0,
                callbacks=[mm.callbacks.WeightAverage(0.99)],
            )  # fmt: skip
        settled = slice(EPOCHS // 4, None)
        objects, tensors, memory = watch.objects[settled], watch.tensors[settled], watch.bytes[settled]
        steps = torch.arange(len(memory), dtype=torch.float64) * STEPS_PER_EPOCH
        centred = steps - steps.mean()
        slope = float((centred * torch.tensor(memory, dtype=torch.float64)).sum() / centred.square().sum())
        print(f"{tensors[0]} to {tensors[-1]} tensors, {objects[0]} to {objects[-1]} objects, {slope:.2f} bytes a step")
        assert tensors[-1] <= tensors[0]
        assert objects[-1] <= objects[0] + FEW
        if LONG:
            assert slope < GROWTH, memory

    in_a_child(watch_a_training)
