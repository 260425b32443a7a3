"""NaN and infinity in a training: found at their step, explained, and undone."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_mm as mm
from pyro_mm.training import nonfinite
from pyro_mm.training.nonfinite import NotFinite
from pyro_mm.training.pace import PACE, Pace
from tests.support.paced import fit_at

ADAM = lambda ps: torch.optim.Adam(ps, 0.01)  # noqa: E731
QUIET = {"progress": False, "batch_size": 8, "seed": 0, "optimizer": ADAM}


class Story(nn.Module):
    """Data a of three numbers, with a term of its own in the mean, and a scale."""

    def __init__(self, extra=None, log_scale=0.0):
        super().__init__()
        self.net = nn.Linear(2, 3)
        self.log_scale = nn.Parameter(torch.tensor(log_scale))
        self.extra = extra

    def forward(self, batch):
        def decoder(z):
            loc = self.net(z)
            loc = loc if self.extra is None else loc + self.extra(loc, batch["a"])
            return dist.Normal(loc, self.log_scale.exp()).to_event(1)

        with batch.plate():
            z = pyro.sample("z", dist.Normal(self.log_scale.new_zeros(2), 1.0).to_event(1))
            batch.observe("a", decoder, z)


def encoder():
    return mm.Guide(z=mm.posteriors.ProductOfExperts({"a": mm.conditionals.Normal(nn.Linear(3, 4))}))


def rows(n=64, seed=0):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(seed)).abs() + 0.1


def held(*modules):
    return [t.clone() for m in modules for t in m.state_dict().values()]


@pytest.fixture
def traced_only(monkeypatch):
    """Without inductor, whose compilation takes seconds."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)


# -- the state is that before the step ---------------------------------------------------------------

OPTIMISERS = {
    "Adam": lambda ps: torch.optim.Adam(ps, 0.01),
    "momentum": lambda ps: torch.optim.SGD(ps, 0.001, momentum=0.9),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, 0.01),
}


@pytest.mark.parametrize(("optimizer", "functions"), [*((name, False) for name in OPTIMISERS), ("Adam", True)])
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("poisoned", [1, 2, 13, 70])
def test_after_a_loss_that_is_not_finite_parameters_are_those_before_the_step(
    optimizer, compile, functions, poisoned, traced_only
):
    """The ``poisoned``-th minibatch has a row of infinity; the state is compared with what the transform saw."""
    story, guide = Story(), encoder()
    programs = ((lambda b: story(b)), (lambda b: guide(b))) if functions else (story, guide)
    count, before, made, draws = 0, [], [], []

    def transform(batch):
        nonlocal count
        torch.randn(2)  # draws of its own are not to move those of the steps
        if batch.total != 64 or batch.size < 8:
            return batch
        count += 1
        if count == poisoned:
            before.extend(held(story, guide))
            draws.extend(copy.deepcopy(list(made[-1].state.values())))
            values = batch["a"].clone()
            values[3] = torch.inf
            return batch.replaced({"a": values})
        return batch

    def kept(parameters):
        made.append(OPTIMISERS[optimizer](parameters))
        return made[-1]

    with pytest.raises(NotFinite, match=rf"at step {(poisoned - 1) % 8 + 1} of epoch {(poisoned - 1) // 8 + 1}\."):
        mm.fit(*programs, mm.objectives.elbo(), mm.Batch({"a": rows()}), epochs=12, transform=transform,
               compile=compile, **QUIET | {"optimizer": kept})  # fmt: skip
    assert count >= poisoned
    for now, then in zip(held(story, guide), before, strict=True):
        assert torch.equal(now, then)
    for now, then in zip(made[-1].state.values(), draws, strict=True):
        assert all(torch.equal(torch.as_tensor(now[k]), torch.as_tensor(then[k])) for k in then)


def test_a_non_finite_value_found_late_is_traced_to_its_row(monkeypatch):
    """Looks are rare: 40 steps lie between the infinite row and the look that finds it."""
    looks = []
    look = nonfinite.NonFiniteMonitor.check
    monkeypatch.setattr(
        nonfinite.NonFiniteMonitor, "check", lambda self, values: (looks.append(len(self._window)), look(self, values))
    )
    values = rows(400).index_fill(0, torch.tensor([77]), torch.inf)
    with pytest.raises(NotFinite) as error:
        mm.fit(Story(), encoder(), mm.objectives.elbo(), mm.Batch({"a": values}), epochs=1, audit=False, **QUIET)
    assert "row 77 of the data" in str(error.value)
    assert looks[0] == 1 and all(length in (PACE.check_every, 49) for length in looks[1:])


class Reads(TorchDispatchMode):
    """Counts the numbers that Python reads off tensors, each of which waits for a device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_checks_for_non_finite_values_read_the_device_once_in_many_steps():
    """Of 400 steps more, 4 looks."""
    counts = []
    for steps in (100, 500):
        with Reads() as reads:
            mm.fit(Story(), encoder(), mm.objectives.elbo(), mm.Batch({"a": rows(steps * 8)}), epochs=1,
                   **QUIET | {"optimizer": lambda ps: torch.optim.SGD(ps, 1e-3)})  # fmt: skip
        counts.append(reads.count)
    assert counts[1] - counts[0] == 400 // PACE.check_every


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("poisoned", [1, 2, 13, 70])
def test_parameters_are_those_before_the_step_on_a_gpu(compile, poisoned):
    """As above, of steps that are replayed as a CUDA graph; sums of a GPU have no fixed order, hence the tolerance."""
    story, guide = Story().cuda(), encoder().cuda()
    count, before = 0, []

    def transform(batch):
        nonlocal count
        count += batch.size == 8
        if count == poisoned:
            before.extend(held(story, guide))
            return batch.replaced({"a": batch["a"] * torch.inf})
        return batch

    with pytest.raises(NotFinite, match=rf"at step {(poisoned - 1) % 8 + 1} of epoch {(poisoned - 1) // 8 + 1}\."):
        mm.fit(story, guide, mm.objectives.elbo(), mm.Batch({"a": rows()}), epochs=12, transform=transform,
               compile=compile, **QUIET)  # fmt: skip
    torch.testing.assert_close(held(story, guide), before)


def test_a_training_that_is_finite_is_what_it_was_without_looking():
    losses = []
    for every in (1, 7, 10**9):
        torch.manual_seed(0)
        story, guide = Story(), encoder()
        pace, data = Pace(check_every=every), mm.Batch({"a": rows()})
        history = fit_at(pace, story, guide, mm.objectives.elbo(), data, epochs=3, **QUIET)
        losses.append((history.to_dict(), held(story, guide)))
    for history, state in losses[1:]:
        assert history == losses[0][0] and all(map(torch.equal, state, losses[0][1]))


def test_the_checkpoint_is_of_the_last_epoch_that_was_finite(tmp_path):
    file, count = tmp_path / "checkpoint.pt", 0

    def poison(batch):
        nonlocal count
        count += 1
        return batch.replaced({"a": batch["a"] * torch.inf}) if count == 23 else batch

    story, guide = Story(), encoder()
    with pytest.raises(NotFinite, match="of epoch 3"):
        mm.fit(story, guide, mm.objectives.elbo(), mm.Batch({"a": rows()}), epochs=9, transform=poison, checkpoint=file,
               **QUIET)  # fmt: skip
    state = torch.load(file, weights_only=True)
    assert 1 <= state["epochs"] <= 2
    assert all(torch.isfinite(x).all() for module in state["modules"] for x in module.values())
    history = mm.fit(story, guide, mm.objectives.elbo(), mm.Batch({"a": rows()}), epochs=4, checkpoint=file, **QUIET)
    assert len(history) == 4


def test_an_interruption_leaves_no_infinity_behind():
    """It comes three steps after an infinite one, before anybody has looked."""
    count = 0

    def transform(batch):
        nonlocal count
        count += 1
        if count == 14:
            raise KeyboardInterrupt
        return batch.replaced({"a": batch["a"] * torch.inf}) if count == 11 else batch

    story, guide = Story(), encoder()
    with pytest.raises(KeyboardInterrupt):
        mm.fit(story, guide, mm.objectives.elbo(), mm.Batch({"a": rows(512)}), epochs=1, transform=transform, **QUIET)
    assert all(p.isfinite().all() for m in (story, guide) for p in m.parameters())


def test_infinite_entries_that_were_there_from_the_start_are_no_fault():
    """A mask of minus infinity among the buffers."""
    story, guide = Story(), encoder()
    story.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    history = mm.fit(story, guide, mm.objectives.elbo(), mm.Batch({"a": rows()}), epochs=1, **QUIET)
    assert math.isfinite(history.to_dict()["loss"][0]) and story.mask.tolist() == [0.0, -math.inf]


def test_entries_whose_square_overflows_are_no_fault():
    story, guide = Story(), encoder()
    story.register_buffer("large", torch.tensor([1e30]))
    history = mm.fit(story, guide, mm.objectives.elbo(), mm.Batch({"a": rows()}), epochs=1, **QUIET)
    assert math.isfinite(history.to_dict()["loss"][0]) and story.large.item() == pytest.approx(1e30)


# -- the advice fits the cause -----------------------------------------------------------------------


def log_of(loc, a):
    return (a - 0.1).clamp(min=0.0).log()


def root_of(loc, a):
    return (loc * (a > 0.1)).square().sum(-1, keepdim=True).sqrt()


def steep(loc, a):
    return loc.sum(-1, keepdim=True) * (2 * a.amax(-1, keepdim=True)).exp()


def with_row(value, row=45):
    return rows().index_fill(0, torch.tensor([row]), value)


def wild(loc, a):
    """Bounded, with a derivative that overflows where a is 0."""
    return 1000 * (1e37 * loc * (a < 0.05)).sin()


CAUSES = {
    "a log of 0": (
        lambda: Story(log_of), with_row(0.0), ADAM,
        r"the loss is \w+ at step .*term \(\*, \*, P\).*site 'a'.*row 45 of the data.*a log of 0.*in log_of.*from 0",
    ),
    "a scale that underflows": (
        lambda: Story(log_scale=-90.0), rows(), ADAM,
        r"site 'a' the distribution's scale underflows to.*Bound it from below",
    ),
    "an exploding gradient": (
        lambda: Story(steep), with_row(20.0), lambda ps: torch.optim.SGD(ps, 1e-3),
        r"The gradient explodes: its norm was .*Clip it.*smaller than 0.001",
    ),
    "infinite data": (
        lambda: Story(), with_row(torch.inf), ADAM, r"The data hold infinite values: modality 'a', in row 45",
    ),
    "too large a step": (
        lambda: Story(), rows(), lambda ps: torch.optim.SGD(ps, 1e5),
        r"The steps are too large.*Take a step size smaller than",
    ),
    "a gradient that overflows": (
        lambda: Story(wild), with_row(0.0), ADAM, r"a gradient is NaN or infinite.*The gradient overflows",
    ),
    "a gradient that is NaN": (
        lambda: Story(root_of), with_row(0.0), ADAM,
        r"a gradient is NaN.*gradient of model.net.weight.*while the loss is \d.*square root",
    ),
}  # fmt: skip


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", CAUSES)
def test_the_error_of_a_non_finite_loss_advises_by_its_cause(kind, compile, traced_only):
    story, values, optimizer, expected = CAUSES[kind]
    model, guide = story(), encoder()
    with pytest.raises(NotFinite, match=f"(?s){expected}"):
        mm.fit(model, guide, mm.objectives.elbo(), mm.Batch({"a": values}), epochs=30, compile=compile,
               audit=kind != "infinite data", **QUIET | {"optimizer": optimizer})  # fmt: skip
    assert all(p.isfinite().all() for m in (model, guide) for p in m.parameters())
    assert not model.training and not guide.training


OBJECTIVES = {
    "Trace": lambda: Trace_ELBO(),
    "TraceGraph": lambda: TraceGraph_ELBO(),
    "TraceEnum": lambda: mm.objectives.elbo(TraceEnum_ELBO(max_plate_nesting=1)),
    "IWAE": lambda: mm.estimators.IWAE(3),
    "resampled": lambda: mm.objectives.elbo(mm.estimators.IWAE(3, resample=True)),
    "masked": lambda: mm.objectives.masked(),
    "TELBO": lambda: mm.objectives.telbo(),
    "subsampled": lambda: mm.objectives.elbo().subsampled(1),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_non_finite_row_is_named_under_every_estimator(name):
    with pytest.raises(NotFinite, match=r"row 45 of the data.*a log of 0.*in log_of"):
        mm.fit(Story(log_of), encoder(), OBJECTIVES[name](), mm.Batch({"a": with_row(0.0)}), epochs=1, **QUIET)


@pytest.mark.parametrize("validate", [None, True])
def test_a_non_finite_row_is_named_under_pyros_validation(validate):
    """It raises an error of its own, at the first step or at every one."""
    model = Story()
    with torch.no_grad():
        model.net.bias[0] = torch.nan
    with pytest.raises(NotFinite, match=r"model.net.bias"):
        mm.fit(model, encoder(), mm.objectives.elbo(), mm.Batch({"a": rows()}), epochs=1, validate=validate, **QUIET)
    batch = mm.Batch({"a": with_row(0.0)})
    with pytest.raises(NotFinite, match=r"row 45 of the data.*a log of 0"):
        mm.fit(Story(log_of), encoder(), mm.objectives.elbo(), batch, epochs=1, validate=validate, **QUIET)


def test_a_non_finite_validation_loss_names_its_row():
    model, guide = Story(log_of), encoder()
    entries, wrong = [], mm.Batch({"a": with_row(0.0)})
    with pytest.raises(NotFinite, match=r"validation rows is \w+ after epoch 1.*row 45 of the data.*a log of 0"):
        mm.fit(model, guide, mm.objectives.elbo(), mm.Batch({"a": rows() + 0.1}), epochs=3, validation=wrong,
               callback=lambda *entry: entries.append(entry), **QUIET)  # fmt: skip
    assert not entries and not model.training and not guide.training


def test_a_non_finite_loss_that_does_not_recur_is_reported_as_such():
    """A story that counts its own runs: the infinity of one of them is not met when the steps are taken again."""
    runs = []

    def once(loc, a):
        runs.append(len(a))
        return loc * torch.inf if runs.count(8) == 6 and len(a) == 8 else 0.0 * loc

    model, guide = Story(once), encoder()
    with pytest.raises(NotFinite, match="did not when the steps were taken again"):
        mm.fit(model, guide, mm.objectives.elbo(), mm.Batch({"a": rows()}), epochs=2, **QUIET)
    assert all(p.isfinite().all() for m in (model, guide) for p in m.parameters())


def test_an_error_that_has_another_cause_is_left_as_it_is():
    def broken(loc, a):
        if len(a) == 8:
            raise RuntimeError("something else")
        return 0.0 * loc

    model, guide = Story(broken), encoder()
    with pytest.raises(RuntimeError, match="something else") as error:
        mm.fit(model, guide, mm.objectives.elbo(), mm.Batch({"a": rows()}), epochs=1, **QUIET)
    assert not isinstance(error.value, NotFinite) and not model.training
