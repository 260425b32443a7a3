"""A snapshot of programs notices that they refer to other objects, or hold other values."""

import gc
import types
import weakref

import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from pyro_mm.utils.snapshot import MOST_ENTRIES, Snapshot


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Settings:
    def __init__(self):
        self.net = nn.Linear(2, 2)
        self.rate = 0.5


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.Linear(2, 2)])
        self.dropout = nn.Dropout(0.5)
        self.infer = {"z": {"enumerate": "parallel"}}
        self.functions = [torch.tanh, double]
        self.prior = dist.Normal(0.0, 1.0)
        self.scale = 1.0
        self.flag = False
        self.shape = (2, 3)
        self.settings = Settings()

    def forward(self, batch):
        return self.layers[1](batch)


def double(x):
    return 2 * x


def triple(x):
    return 3 * x


OF_STRUCTURE = {
    "a module in a list": lambda net: net.layers.__setitem__(1, nn.Linear(2, 2)),
    "a module deep inside": lambda net: net.layers[0].__setitem__(1, nn.Identity()),
    "a module that is added": lambda net: net.layers[0].append(nn.ReLU()),
    "a parameter": lambda net: setattr(net.layers[1], "bias", nn.Parameter(torch.zeros(2))),
    "a parameter that is taken away": lambda net: setattr(net.layers[1], "bias", None),
    "a parameter that is frozen": lambda net: net.layers[1].bias.requires_grad_(False),
    "another forward": lambda net: setattr(net.layers[1], "forward", double),
    "a parametrisation": lambda net: register_parametrization(net.layers[1], "weight", Doubled()),
    "another class": lambda net: setattr(net.layers[1], "__class__", type("Other", (nn.Linear,), {})),
}
OF_VALUES = {
    "a mode": lambda net: net.layers[1].eval(),
    "a rate that becomes 0": lambda net: setattr(net.dropout, "p", 0.0),
    "a flag": lambda net: setattr(net, "flag", True),
    "a number": lambda net: setattr(net, "scale", 2.0),
    "a shape": lambda net: setattr(net, "shape", (2, 4)),
    "a dictionary, in place": lambda net: net.infer["z"].update(enumerate="sequential"),
    "a dictionary that is another": lambda net: setattr(net, "infer", {}),
    "a function in a list": lambda net: net.functions.__setitem__(1, triple),
    "a distribution": lambda net: setattr(net, "prior", dist.Normal(0.0, 1.0)),
    "an attribute that is added": lambda net: setattr(net, "more", 1),
    "an attribute that is taken away": lambda net: delattr(net, "scale"),
    "an array in the place of a number": lambda net: setattr(net, "scale", torch.ones(3).numpy()),
    "a module of an object": lambda net: setattr(net.settings, "net", nn.Linear(2, 2)),
    "a number of an object": lambda net: setattr(net.settings, "rate", 0.1),
}
IGNORED = {
    "a hook": lambda net: net.layers[1].register_forward_hook(lambda *_: None),
    "a hook of a parameter": lambda net: net.layers[1].bias.register_hook(lambda g: 3 * g),
    "a buffer": lambda net: setattr(net.layers[0][1], "running_mean", torch.ones(2)),
    "a type": lambda net: net.double(),
    "values of a parameter": lambda net: net.layers[1].bias.data.fill_(3.0),
    "a rate that stays above 0": lambda net: setattr(net.dropout, "p", 0.25),
    "a run": lambda net: net(torch.ones(2, 2)),
}


@pytest.mark.parametrize("change", {**OF_STRUCTURE, **OF_VALUES, **IGNORED})
def test_a_snapshot_notices_changes_of_a_module(change):
    net = Net()
    keep = list(net.modules()), list(net.parameters()), list(net.buffers()), dict(vars(net)), dict(vars(net.settings))
    snapshot = Snapshot({"model": net})
    assert not snapshot.changed()
    {**OF_STRUCTURE, **OF_VALUES, **IGNORED}[change](net)
    assert snapshot.changed() == (change not in IGNORED)
    assert Snapshot({"model": net}).changed() is False
    del keep


def closure(value):
    def program(batch):
        return value

    def replace(new):
        nonlocal value
        value = new

    return program, replace


@pytest.mark.parametrize(
    "old, new",
    [
        (nn.Linear(1, 1), nn.Linear(1, 1)),
        (double, triple),
        (torch.ones(2), torch.ones(3)),
        (torch.ones(2), torch.ones(2, requires_grad=True)),
        ({"net": nn.Linear(1, 1)}, {"net": nn.Linear(1, 1)}),
        ([1, 2], [1, 3]),
        ("one", "two"),
        (types.SimpleNamespace(), "two"),
    ],
)
def test_a_snapshot_notices_changes_of_a_free_variable(old, new):
    program, replace = closure(old)
    snapshot = Snapshot({"model": program})
    assert not snapshot.changed()
    replace(new)
    assert snapshot.changed()
    replace(old)
    assert not snapshot.changed()


def test_a_container_of_many_entries_is_compared_by_its_size():
    many = dict.fromkeys(range(MOST_ENTRIES + 1), 0)
    program, _ = closure(many)
    snapshot = Snapshot({"model": program})
    many[0] = 1
    assert not snapshot.changed()
    many["another"] = 1
    assert snapshot.changed()


def test_changed_slots_are_named_and_can_be_left_out_of_the_next_snapshot():
    net = Net()
    before = Snapshot({"model": net})
    net.scale, net.more = 2.0, "more"
    assert {name for owner, name in before.changed_slots() if owner == id(net)} == {"scale", "number of attributes"}
    after = Snapshot({"model": net}, since=before)
    net.scale, net.more = 3.0, "less"
    assert not after.changed()
    net.flag = True
    assert after.changed() and {name for _, name in after.changed_slots()} == {"flag"}
    assert not Snapshot({"model": net}, ignored=after.changed_slots()).changed_slots()


@pytest.mark.parametrize("what", ["modules", "tensors"])
def test_the_end_of_an_object_in_a_snapshot_is_a_change(what):
    hidden = nn.Linear(2, 2)
    snapshot = Snapshot({"model": double}, **{what: [hidden] if what == "modules" else [hidden.bias]})
    assert not snapshot.changed()
    del hidden
    gc.collect()
    assert snapshot.changed() and not snapshot.changed_slots()


def test_a_snapshot_keeps_nothing_alive():
    net = Net()
    net.itself = [net]
    program, _ = closure({"net": net, "settings": Settings()})
    snapshot = Snapshot({"model": net, "guide": program})
    alive = [weakref.ref(x) for x in (net, program, net.settings, net.prior, net.layers[1].weight)]
    del net, program, _
    gc.collect()
    assert [ref() for ref in alive] == [None] * 5 and snapshot.changed()


def test_a_snapshot_is_extended_by_what_a_run_has_used_unless_it_holds_no_more():
    net, loose, hidden = Net(), torch.zeros(2, requires_grad=True), nn.Linear(2, 2)
    snapshot = Snapshot({"model": net})
    assert not snapshot.extend([net, hidden], [])
    assert snapshot.extend([net, net.layers[1]], [loose]) and not snapshot.changed()
    loose.requires_grad_(False)
    assert snapshot.changed() and not snapshot.extend([], [])


@pytest.mark.filterwarnings("ignore")  # of torch.jit, whose time is over
def test_a_forward_that_cannot_be_referred_to_weakly_and_a_scripted_module_are_compared_too():
    net = torch.nn.Sequential(nn.Linear(2, 2))
    net.forward = torch.ones(2).__add__
    net.append(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.Tanh())))
    snapshot = Snapshot({"model": net})
    assert not snapshot.changed()
    net.forward = double
    assert snapshot.changed()
