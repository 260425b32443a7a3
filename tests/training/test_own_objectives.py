"""Objectives written by a user train, compile, resume and are checked as ours are."""

import copy
import os
import shutil
import warnings

import pyro
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_mm as mm
from tests.support.compiled import assert_same, gradients
from tests.support.training_pair import data, pair

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), reason="inductor needs a C++ compiler"
)
BACKENDS = [None, pytest.param("inductor", marks=needs_compiler)]
QUIET = {"progress": False, "batch_size": 32, "seed": 0, "optimizer": lambda ps: torch.optim.Adam(ps, 0.02)}


def rows(n=100):
    return mm.Batch({name: data(n)[name] for name in "ab"})


def kernel(x, y, width):
    return (-(x[:, None] - y).square().sum(-1) / width).exp().mean()


class MMD(nn.Module):
    """Reconstruction, and the kernel distance of the encoded rows from the prior, whose weight warms up.

    The kernel's width is learned, if only to have a parameter of the objective.
    """

    def __init__(self):
        super().__init__()
        self.log_width = nn.Parameter(torch.zeros(()))

    def evaluate(self, model, guide, batch, *, step):
        guided = poutine.trace(guide).get_trace(batch)
        modelled = poutine.trace(poutine.replay(model, trace=guided)).get_trace(batch)
        modelled.compute_log_prob(lambda name, site: name in batch.names)
        fit = sum(modelled.nodes[name]["log_prob_sum"] for name in batch.names)
        z = guided.nodes["z"]["value"]
        prior, width = torch.randn_like(z), self.log_width.exp()
        distance = kernel(z, z, width) + kernel(prior, prior, width) - 2 * kernel(z, prior, width)
        weight = torch.as_tensor(step / 8.0).clamp(max=1.0) * (batch.total or batch.size)
        return mm.Loss(-fit + weight * distance, {"fit": fit.detach(), "distance": -distance.detach()})


def symmetric_info_nce(guide, batch, temperature):
    """Minus the log-probability of a row's own partner among all rows, by the guide's means of either modality."""
    a, b = (poutine.trace(guide).get_trace(batch.only(name)).nodes["z"]["fn"].mean for name in "ab")
    similarity = nn.functional.normalize(a, dim=-1) @ nn.functional.normalize(b, dim=-1).T / temperature
    own = torch.arange(batch.size)
    loss = nn.functional.cross_entropy(similarity, own) + nn.functional.cross_entropy(similarity.T, own)
    return loss / 2 * (batch.total or batch.size)


def contrastive(model, guide, batch, *, step):
    return symmetric_info_nce(guide, batch, 0.1)


class Contrastive(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.3))

    def forward(self, model, guide, batch, *, step):
        loss = symmetric_info_nce(guide, batch, self.temperature)
        return mm.Loss(loss, {"agreement": -loss.detach()})


OWN = {"MMD": MMD, "contrastive": lambda: contrastive, "contrastive module": Contrastive}


def setting(name):
    """Pair and objective; no contrastive loss depends on the model."""
    torch.manual_seed(1)
    model, guide = pair()
    return model.requires_grad_(name == "MMD"), guide, OWN[name]()


def parameters(*programs):
    modules = [m for m in programs if isinstance(m, nn.Module)]
    return [p for m in modules for p in m.parameters() if p.requires_grad]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_a_users_objective_trains_with_its_own_parameters(name, compile, traced_only):
    model, guide, objective = setting(name)
    before = [p.detach().clone() for p in parameters(model, guide, objective)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        columns = mm.fit(
            model, guide, objective, rows(), epochs=6, validation=rows(40), compile=compile, **QUIET
        ).columns
    assert columns["loss"][-1] < columns["loss"][0] - 0.1
    assert not any(map(torch.equal, before, parameters(model, guide, objective)))
    terms = {"MMD": {"fit", "distance"}, "contrastive": set(), "contrastive module": {"agreement"}}[name]
    assert set(columns) == {"loss", "validation"} | terms


@pytest.fixture
def traced_only(monkeypatch):
    """Without inductor, whose compilation takes seconds."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OWN)
def test_the_compiled_step_of_a_users_objective_has_the_numbers_of_its_evaluation(name, backend):
    """Against ``evaluate`` and ``backward`` by hand, at steps of a warm-up."""
    model, guide, objective = setting(name)
    batch, ps = rows(16), parameters(model, guide, objective)
    evaluate = objective.evaluate if isinstance(objective, MMD) else objective
    step = mm.stage(objective, model, guide, batch, backend=backend)
    for count in range(3):
        torch.manual_seed(count)
        staged = step(batch).clone(), gradients(ps)
        for p in ps:
            p.grad = None
        torch.manual_seed(count)
        loss = evaluate(model, guide, batch, step=count)
        total = loss.total if isinstance(loss, mm.Loss) else loss
        total.backward()
        assert step.reasons == []
        assert_same(staged, (total.detach(), gradients(ps)))


def test_the_graph_of_a_users_objective_takes_the_step_as_input():
    """The loss is the step itself, times a parameter: an input of one graph, not a constant of many."""
    weight = nn.Parameter(torch.ones(()))

    def objective(model, guide, batch, *, step):
        return weight * step

    step = mm.stage(objective, *pair(), rows(8), backend=None)
    assert [float(step(rows(8))) for _ in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(step._graphs) == 1 and step.reasons == [] and float(weight.grad) == 4.0


def test_an_objective_that_branches_on_the_step_runs_uncompiled_and_says_so():
    weight = nn.Parameter(torch.ones(()))

    def objective(model, guide, batch, *, step):
        return weight * (3.0 if step > 1 else 1.0)

    step = mm.stage(objective, *pair(), rows(8), backend=None)
    with pytest.warns(UserWarning, match="is not compiled.*reads a tensor's value in Python"):
        losses = [float(step(rows(8))) for _ in range(4)]
    assert losses == [1.0, 1.0, 3.0, 3.0]


def test_an_objective_that_counts_by_itself_runs_uncompiled_and_says_so():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.count = nn.Parameter(torch.ones(())), 0

        def evaluate(self, model, guide, batch, *, step):
            self.count += 1
            return self.weight * self.count

    objective = Counts()
    step = mm.stage(objective, *pair(), rows(8), backend=None)
    with pytest.warns(UserWarning, match="changes a number that"):
        first = float(step(rows(8)))
    assert float(step(rows(8))) > first


def test_a_number_of_the_objective_that_changes_is_traced_anew():
    objective = Contrastive()
    objective.scale = 1.0
    plain = objective.forward
    objective.forward = lambda *args, **kwargs: plain(*args, **kwargs).total * objective.scale
    model, guide, _ = setting("contrastive")
    step = mm.stage(objective, model, guide, rows(8), backend=None)
    first = float(step(rows(8)))
    objective.scale = 2.0
    assert float(step(rows(8))) == pytest.approx(2 * first, rel=1e-6)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("name", OWN)
def test_a_stopped_training_by_a_users_objective_goes_on_with_the_same_numbers(name, compile, tmp_path, traced_only):
    def train(checkpoint, stop=None):
        def at(epoch, entry):
            if epoch == stop:
                raise Stopped

        model, guide, objective = setting(name)
        history = mm.fit(model, guide, objective, rows(), epochs=4, checkpoint=checkpoint, callback=at, compile=compile,
                         **QUIET)  # fmt: skip
        return history.to_dict(), [p.detach().clone() for p in parameters(model, guide, objective)]

    straight, there = train(None)
    with pytest.raises(Stopped):
        train(tmp_path / "run.pt", stop=2)
    resumed, here = train(tmp_path / "run.pt")
    assert resumed == straight and all(map(torch.equal, here, there))


@pytest.mark.parametrize("name", OWN)
def test_check_takes_a_users_objective_and_leaves_its_parameters(name):
    model, guide, objective = setting(name)
    before = copy.deepcopy([p.detach() for p in parameters(model, guide, objective)])
    found = mm.check(model, guide, objective, rows(20), num_particles=20, repeats=3)
    assert not found.errors and found.gap is None and str(found)
    assert all(map(torch.equal, before, parameters(model, guide, objective)))


def test_parameters_of_a_users_objective_are_named_in_messages():
    model, guide, objective = setting("contrastive module")
    objective.spare = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"no gradient reaches objective\.spare in an epoch"):
        mm.fit(model, guide, objective, rows(), epochs=1, **QUIET)
    frozen = QUIET | {"optimizer": lambda ps: torch.optim.SGD([p for p in ps if p.dim()], 0.1)}
    with pytest.raises(ValueError, match=r"leaves out 1 of .*objective\.temperature"):
        mm.fit(*setting("contrastive module"), rows(), epochs=1, **frozen)


def test_a_users_objective_has_the_modes_of_model_and_guide():
    modes = []

    class Watched(Contrastive):
        def forward(self, model, guide, batch, *, step):
            modes.append((self.training, guide.training, torch.is_grad_enabled()))
            return super().forward(model, guide, batch, step=step)

    model, guide, _ = setting("contrastive")
    objective = Watched()
    mm.fit(model, guide, objective, rows(), epochs=1, validation=rows(40), **QUIET)
    assert (True, True, True) in modes and modes[-1] == (False, False, False)
    assert all(own == of_guide for own, of_guide, _ in modes) and not objective.training


# -- the count of steps -----------------------------------------------------------------------------------------------


def warm():
    return mm.objectives.elbo(kl=mm.objectives.warm_up(9))


@pytest.mark.parametrize("make", [warm, MMD], ids=["ours", "own"])
def test_two_staged_trainings_that_alternate_have_a_warm_up_each(make):
    """Losses of a first and a second pair under one objective, step by step in turn, are those of each alone."""
    batch, alone, shared = rows(16), [], make()

    def staged(objective, seed):
        torch.manual_seed(seed)
        model, guide = pair()
        ps = parameters(model, guide)
        step = mm.stage(objective, model, guide, batch, torch.optim.SGD(ps, 1e-3), backend=None)

        def take(count):
            torch.manual_seed(100 * seed + count)
            return float(step(batch))

        return take

    for seed in (0, 1):
        take = staged(copy.deepcopy(shared), seed)
        alone.append([take(count) for count in range(4)])
    first, second = staged(shared, 0), staged(shared, 1)
    together = [(first(count), second(count)) for count in range(4)]
    assert [list(losses) for losses in zip(*together, strict=True)] == alone


def test_two_fits_that_alternate_have_a_warm_up_each():
    """A second training by the same objective runs after every epoch of the first."""

    def train(objective, callback=None):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return mm.fit(*pair(), objective, rows(), epochs=3, callback=callback, **QUIET).to_dict()

    alone, shared, others = train(warm()), warm(), []
    both = train(shared, lambda epoch, entry: others.append(train(shared)))
    assert both == alone and others == [alone] * 3
    assert shared.steps == 0 and not shared.by_term


def test_a_loop_by_hand_and_a_training_count_apart():
    objective, batch = warm(), rows(16)
    model, guide = pair()
    for _ in range(5):
        objective.differentiable_loss(model, guide, batch)
    mm.fit(*pair(), objective, rows(), epochs=1, **QUIET)
    assert objective.steps == 5
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), objective)
    svi.step(batch)
    assert objective.steps == 6 and list(objective.by_term)
