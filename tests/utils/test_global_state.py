"""Neither the import nor any call leaves a setting of the process changed, nor does a result depend on calls before."""

import json
import multiprocessing
import os
import random
import subprocess
import sys
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Distribution

import pyro_mm as mm
from pyro_mm.utils.global_state import VALIDATION, import_zuko, preserve_process_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fresh_process():
    """The report of a process that imports the package and makes a call of each kind."""
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}  # its stories lie on the CPU
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/support/calls_in_a_fresh_process.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_import_and_calls_change_no_global_state(fresh_process):
    assert fresh_process["changes"] == {}


def test_a_result_does_not_depend_on_the_calls_before(fresh_process):
    assert fresh_process["before"] == fresh_process["after"]


@pytest.fixture
def validation():
    """Sets the four switches of Pyro and torch, which are put back after the test."""
    before = pyro.settings.get()
    yield lambda **switches: pyro.settings.set(**switches)
    pyro.settings.set(**before)


def pair():
    net = torch.nn.Linear(1, 2)

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            batch.observe("x", dist.Normal(z, 1.0).to_event(1))

    def guide(batch):
        with batch.plate():
            loc, scale = net(batch["x"]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return story, guide, mm.Batch({"x": torch.linspace(-1, 1, 6)[:, None]})


CALLS = {
    "fit": lambda story, guide, batch: mm.fit(
        story, guide, mm.objectives.elbo(), batch, epochs=2, batch_size=3, progress=False
    ),
    "fit, checked throughout": lambda story, guide, batch: mm.fit(
        story, guide, mm.objectives.elbo(), batch, epochs=1, validate=True, progress=False
    ),
    "stage": lambda story, guide, batch: mm.stage(mm.objectives.elbo(), story, guide, batch, backend=None)(batch),
    "annealed": lambda story, guide, batch: mm.annealed_importance(
        story, guide, batch, num_chains=2, temperatures=2, pilot_chains=2
    ),
    "zuko": lambda *_: import_zuko(),
}


@pytest.mark.parametrize("of_torch", [True, False])
@pytest.mark.parametrize("of_pyro", [True, False])
@pytest.mark.parametrize("call", list(CALLS))
def test_switches_of_validation_are_put_back_one_by_one(call, of_pyro, of_torch, validation):
    """Pyro puts torch's switch back to the value of its own: so one that only torch's was set to was lost."""
    switches = dict.fromkeys(VALIDATION, of_pyro) | {"validate_distributions_torch": of_torch}
    validation(**switches)
    CALLS[call](*pair())
    assert {name: pyro.settings.get(name) for name in VALIDATION} == switches


def test_a_flow_of_zuko_does_not_check_its_arguments_and_others_go_on_doing_so():
    zuko = import_zuko()
    assert Distribution._validate_args and not zuko.distributions.NormalizingFlow._validate_args
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a distribution without arg_constraints warns where it is checked
        flow = zuko.flows.MAF(2, 1, transforms=1, hidden_features=(4,))(torch.zeros(3, 1))
        assert flow.log_prob(flow.sample()).shape == (3,)
    with pytest.raises(ValueError, match="scale"):
        torch.distributions.Normal(0.0, -1.0)


def test_process_settings_that_an_import_changes_are_restored():
    filters, state = list(warnings.filters), random.getstate()
    start_method = multiprocessing.get_start_method(allow_none=True)
    with preserve_process_settings():
        warnings.simplefilter("error")
        random.random()
        multiprocessing.set_start_method("spawn", force=True)
    assert warnings.filters == filters and random.getstate() == state
    assert multiprocessing.get_start_method(allow_none=True) == start_method
