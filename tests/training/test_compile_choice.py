"""Compilation that is left to the training: its rule, what it says, and a story that cannot be compiled."""

import warnings
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import pyro_mm as mm
from pyro_mm.training import preparation
from pyro_mm.training.compile import MAX_GRAPHS_UNASKED
from pyro_mm.training.compile_choice import LEAST_STEPS, compilation_pays
from tests.support.training_pair import data, pair

GPU = torch.device("cuda", 0)


class Problem:
    """A training problem with these networks."""

    def __init__(self, *networks):
        self.networks = networks


@pytest.mark.parametrize(
    ("device", "steps", "options", "pays"),
    [
        (GPU, LEAST_STEPS, {}, True),
        (GPU, LEAST_STEPS - 1, {}, False),
        (GPU, 0, {}, False),
        (GPU, 10**6, {"by_step": True}, False),
        (GPU, 10**6, {"validate": True}, False),
        (GPU, 10**6, {"validate": False}, True),
        (torch.device("cpu"), 10**9, {}, False),
        (torch.device("mps"), 10**9, {}, False),
    ],
)
def test_steps_are_compiled_on_a_gpu_from_some_thousand_of_them_on(device, steps, options, pays):
    assert compilation_pays(Problem(nn.Linear(2, 2)), device, steps, **options) is pays


def test_recurrent_networks_stay_eager():
    problem = Problem(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.GRU(2, 2)))
    assert not compilation_pays(problem, GPU, 10**6)


def fit(**options):
    torch.manual_seed(0)
    model, guide = pair()
    options = {"epochs": 3, "batch_size": 32, "seed": 1, "progress": False} | options
    history = mm.fit(model, guide, mm.objectives.mvae(), options.pop("train", data(100)), **options)
    return history, [p.detach() for p in [*model.parameters(), *guide.parameters()]]


@pytest.fixture
def chosen(monkeypatch):
    """Trainings that compile by themselves, as on a GPU, up to inductor; and what the rule was asked."""
    asked = []

    def pays(problem, device, steps, **options):
        asked.append((steps, options))
        return True

    monkeypatch.setattr(preparation, "compilation_pays", pays)
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    return asked


def refuse(*arguments, **options):
    raise AssertionError("nothing is to be compiled here")


@pytest.mark.parametrize("option", [{}, {"compile": None}, {"compile": False}])
def test_on_a_cpu_nothing_is_compiled_unless_asked(option, monkeypatch):
    monkeypatch.setattr("pyro_mm.training.updates.CompiledStep", refuse)
    monkeypatch.setattr("pyro_mm.training.compile_choice.LEAST_STEPS", 1)
    fit(**option)
    with pytest.raises(AssertionError):
        fit(compile=True)


@pytest.mark.parametrize(
    ("options", "steps", "others"),
    [
        ({}, 12, {"by_step": False, "validate": None}),
        ({"epochs": 5, "batch_size": 100, "validate": True}, 5, {"by_step": False, "validate": True}),
        ({"scheduler_interval": "step"}, 12, {"by_step": False, "validate": None}),
        (
            {"scheduler_interval": "step", "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 3)},
            12,
            {"by_step": True, "validate": None},
        ),
    ],
)
def test_the_rule_is_asked_for_all_steps(chosen, options, steps, others):
    fit(**options)
    assert chosen == [(steps, others)]


def test_a_training_that_goes_on_counts_the_steps_before_the_stop(chosen, tmp_path):
    """Or its end would be eager, where that of a training without a stop is compiled."""
    fit(epochs=2, checkpoint=tmp_path / "run.pt")
    fit(epochs=3, checkpoint=tmp_path / "run.pt")
    assert [steps for steps, _ in chosen] == [8, 12]


def test_an_explicit_choice_asks_no_rule(chosen):
    fit(compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(compile=True)
    assert chosen == []


def test_it_says_so_once_and_the_numbers_are_those_of_eager_steps(chosen, capsys):
    history, weights = fit(train=data(96), progress=True)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("the step is compiled, for 9 of them on cpu") == 1 and "compile=False leaves it out" in said
    eager, expected = fit(train=data(96), compile=False)
    for one, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(one, other)
    assert history.columns["loss"] == pytest.approx(eager.columns["loss"])
    fit()
    assert capsys.readouterr() == ("", "")


class Reads(nn.Module):
    """A story of one number that reads a value in Python."""

    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(self.loc, 1.0))
            batch.observe("x", lambda z: dist.Normal(z if float(z.detach().sum()) < 1e9 else -z, 1.0), z)


class Guess(nn.Module):
    def __init__(self):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(self.loc, 1.0))


@pytest.mark.parametrize("compile", [None, True])
def test_a_story_that_cannot_be_compiled_trains_and_one_sentence_says_why(chosen, capsys, compile):
    train = mm.Batch({"x": torch.randn(40)})
    context = pytest.warns(UserWarning, match="the step is not compiled") if compile else nullcontext()
    with warnings.catch_warnings():
        if not compile:
            warnings.simplefilter("error")
        with context:
            history = mm.fit(Reads(), Guess(), mm.objectives.elbo(), train, epochs=3, batch_size=16, compile=compile)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("the step is not compiled, and runs as it is: it reads a tensor's value") == (compile is None)
    assert len(history) == 3


def test_shapes_of_a_loader_are_compiled_to_a_small_number(chosen, capsys):
    batches = [data(n) for n in range(8, 8 + MAX_GRAPHS_UNASKED + 3)]
    loader = DataLoader(batches, batch_size=None, sampler=range(len(batches)))
    fit(train=loader, progress=True)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count(f"batches of more than {MAX_GRAPHS_UNASKED} shapes came") == 1
