"""The modules that programs refer to are found however they are held."""

from __future__ import annotations

import functools

import pytest
import torch

import pyro_mm as mm
from pyro_mm.utils.reachable import ReachableObjects

DECODER = torch.nn.Linear(2, 3)
NETS = {"encoder": torch.nn.Linear(3, 4)}


def of_globals(batch):
    return DECODER(batch), NETS["encoder"](batch)


class Holder:
    """An object that is no module, holds one, and has a story for a method."""

    def __init__(self, net):
        self.inner = [net]

    def story(self, batch):
        return self.inner[0](batch)

    def __call__(self, batch):
        return self.inner[0](batch)


def reaching(net):
    """The same network, reached in every way that a function may."""

    def closure(batch):
        return net(batch)

    def through_another(batch):
        return closure(batch)

    class Module(torch.nn.Module):
        def forward(self, batch):
            return closure(batch)

    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.nets = {"net": net}

    holder = Holder(net)
    return {
        "itself": net,
        "closure": closure,
        "through another function": through_another,
        "nested": lambda batch: [net(row) for row in batch],
        "default": lambda batch, f=net: f(batch),
        "keyword default": lambda batch, *, f=(net,): f[0](batch),
        "partial": functools.partial(lambda f, batch: f(batch), net),
        "partial keyword": functools.partial(lambda batch, f: f(batch), f=net),
        "bound method of a module": net.forward,
        "bound method": holder.story,
        "callable object": holder,
        "module with a function": Module(),
        "module with a dictionary": Hidden(),
        "posterior that is a function": mm.Guide(z=closure),
    }


@pytest.mark.parametrize("how", reaching(torch.nn.Identity()))
def test_a_network_is_reached_however_it_is_held(how):
    net = torch.nn.Sequential(torch.nn.Dropout())
    assert net[0] in list(ReachableObjects({"model": reaching(net)[how]}).all_modules())


def test_globals_are_reached_and_no_others():
    found = ReachableObjects({"model": of_globals}).modules
    assert found == {"model.DECODER": DECODER, "model.NETS.encoder": NETS["encoder"]}
    assert not ReachableObjects({"model": lambda batch: torch.tanh(batch)}).modules


def test_an_assert_in_a_test_leads_to_nothing_of_pytest():
    """pytest rewrites it to a call of its own module, which refers to whatever the whole session holds."""

    def story(batch):
        assert DECODER(batch) is not None
        with pytest.warns(UserWarning):
            return DECODER(batch)

    found = ReachableObjects({"model": story})
    assert found.modules == {"model.DECODER": DECODER} and found.functions == [story] and found.objects == []


def test_a_fingerprint_tells_programs_that_changed():
    nets = {"x": torch.nn.Linear(2, 2)}
    wide = False

    def story(batch):
        return nets["x"](batch) if wide else batch

    def fingerprint():
        return ReachableObjects({"model": story}).fingerprint()

    first = fingerprint()
    assert first == fingerprint()
    with torch.no_grad():
        nets["x"].weight.add_(1)
    assert first == fingerprint()  # values of parameters do not count
    wide = True
    assert first != fingerprint()
    wide = False
    assert first == fingerprint()
    nets["x"] = torch.nn.Linear(2, 2)
    assert first != fingerprint()
    second = fingerprint()
    nets["x"].weight = torch.nn.Parameter(torch.zeros(3, 2))
    assert second != fingerprint()


def test_a_parameter_in_no_module_tells_the_device_where_no_module_does():
    loose = torch.nn.Parameter(torch.zeros(2, device="meta"))
    constant = torch.zeros(2)
    assert ReachableObjects({"model": lambda batch: constant + loose}).device() == torch.device("meta")
    assert ReachableObjects({"model": lambda batch: constant}).device() is None
    inside = torch.nn.Linear(1, 1)
    assert ReachableObjects({"model": lambda batch: inside(loose)}).device() == torch.device("cpu")
