"""Steps that are not finite: left out and counted, or the end; and run again from the file that holds them."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import pyro_mm as mm
from pyro_mm.training.nonfinite import MAX_CONSECUTIVE_SKIPS
from pyro_mm.training.replay import replay
from pyro_mm.utils.global_state import override_validation
from tests.support.adversarial_game import game
from tests.support.exact_training import without_inductor
from tests.support.training_pair import data, pair

QUIET = {"batch_size": 10, "seed": 0, "progress": False, "audit": False}


def warns():
    return pytest.warns(UserWarning, match="a minibatch is skipped: .* at step")


def rows(bad=(7, 33), n=60):
    """Complete rows, of which some hold infinity."""
    batch = mm.Batch({name: data(n)[name] for name in "ab"})
    values = batch["a"].clone()
    values[list(bad)] = math.inf
    return batch.replaced({"a": values})


def parameters(*modules):
    return [p.detach().clone() for m in modules if isinstance(m, nn.Module) for p in m.parameters()]


def fresh():
    torch.manual_seed(0)
    return (*pair(), mm.objectives.elbo())


def train(run, batch, **options):
    history = mm.fit(*run, batch, **(QUIET | options))
    return history, parameters(*run)


@pytest.mark.parametrize("kind", ["eager", "compiled", "game", "compiled game"])
def test_steps_that_are_not_finite_are_left_out_and_counted(kind, monkeypatch):
    """As in a plain loop that passes such minibatches over; moments and draws are those of the others."""
    without_inductor(monkeypatch)
    make = game if "game" in kind else fresh
    seen = []

    class Watch(mm.callbacks.Callback):
        def on_step(self, training):
            seen.append((training.moved, float(training.step_values["loss"])))

    options = {"nonfinite": "skip", "compile": "compiled" in kind, "callbacks": [Watch()]}
    run = make()
    with override_validation(True), warns():
        history, found = train(run, rows(), epochs=3, **options)
    assert history.columns["skipped"] == [2, 2, 2] or history.columns["skipped"] == [2, 1, 2]
    assert all(map(math.isfinite, history.columns["loss"])) and all(p.isfinite().all() for p in found)
    assert len(seen) == 18 - sum(history.columns["skipped"]) and all(map(math.isfinite, dict(seen).values()))
    start = parameters(*make())
    assert all(not torch.equal(p, q) for p, q in zip(found, start, strict=True))


def test_a_training_that_skips_is_the_plain_loop_over_the_other_minibatches():
    """Without noise and in order: the steps are those of an optimiser that never saw the minibatches with infinity."""

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.zeros(3))

        def evaluate(self, model, guide, batch, *, step):
            return mm.Loss((batch["a"] - self.at).square().sum() * (batch.total / batch.size), {})

    batch = rows()
    loader = DataLoader(range(60), 10, collate_fn=lambda i: batch[torch.tensor(i)])
    model, guide, _ = fresh()
    objective = Square()
    for p in (*model.parameters(), *guide.parameters()):
        p.requires_grad_(False)
    sgd = lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9)  # noqa: E731
    with warns():
        history = mm.fit(model, guide, objective, loader, epochs=2, optimizer=sgd, nonfinite="skip", **QUIET)
    at = nn.Parameter(torch.zeros(3))
    optimizer = sgd([at])
    for epoch in range(2):
        losses = []
        for part in torch.arange(60).split(10):
            loss = (batch["a"][part] - at).square().sum()
            if loss.isfinite():
                optimizer.zero_grad()
                (loss / 10).backward()
                optimizer.step()
                losses.append(float(loss.detach()) / 10)
        assert history.columns["skipped"][epoch] == 6 - len(losses)
        assert history.columns["loss"][epoch] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    torch.testing.assert_close(objective.at.detach(), at.detach())


def test_a_training_that_skips_goes_on_from_its_checkpoint(tmp_path):
    def run(path, **options):
        one = fresh()
        history = mm.fit(*one, rows(), nonfinite="skip", checkpoint=path, **QUIET, **options)
        return history.to_dict(), parameters(*one)

    with warns():
        straight = run(tmp_path / "a.pt", epochs=3)
    with warns():
        run(tmp_path / "b.pt", epochs=1)
    with warns():
        history, found = run(tmp_path / "b.pt", epochs=3)
    assert history == straight[0]
    torch.testing.assert_close(found, straight[1], rtol=0, atol=0)


def test_too_many_in_a_row_are_an_error_that_says_why():
    with (
        warns(),
        pytest.raises(FloatingPointError, match=r"10 minibatches in a row are not finite\. The last one: "),
    ):
        train(fresh(), rows(range(2, 60)), epochs=3, nonfinite="skip")
    assert MAX_CONSECUTIVE_SKIPS == 10
    with pytest.raises(ValueError, match="expected nonfinite to be one of 'stop', 'skip', got 'ignore'"):
        train(fresh(), rows(), nonfinite="ignore")


def test_an_error_behind_which_is_infinity_is_skipped_too():
    """Pyro's checks at every step make an error of it."""
    with warns():
        history, found = train(fresh(), rows([5]), epochs=2, nonfinite="skip", validate=True)
    assert history.columns["skipped"] == [1, 1] and all(p.isfinite().all() for p in found)


@pytest.mark.parametrize("choice", ["stop", "skip"])
@pytest.mark.parametrize("make", [fresh, game], ids=["one", "game"])
def test_the_step_is_written_and_replayed(tmp_path, make, choice):
    """In another pair of the same networks: the same value, and gradients that are not finite."""
    path = tmp_path / "run.pt"
    if choice == "stop":
        with pytest.raises(FloatingPointError, match=r"pyro_mm\.replay\('.*run-nonfinite-\d+\.pt', model, guide, obj"):
            train(make(), rows([7]), epochs=2, checkpoint=path)
    else:
        with warns():
            train(make(), rows([7]), epochs=2, checkpoint=path, nonfinite="skip")
    files = sorted(tmp_path.glob("run-nonfinite-*.pt"))
    assert len(files) == (1 if choice == "stop" else 2)
    run = make()
    with torch.no_grad():
        for p in (p for module in run if isinstance(module, nn.Module) for p in module.parameters()):
            p.fill_(3.0)
    state = torch.get_rng_state()
    loss = replay(files[0], *run)
    again = replay(files[0], *run)
    assert torch.equal(state, torch.get_rng_state())
    assert not loss.total.isfinite() and repr(loss) == repr(again)
    assert any(p.grad is not None and not p.grad.isfinite().all() for p in run[0].parameters())
    assert run[0].training and all(p.isfinite().all() for p in parameters(*run))


def test_a_replay_has_the_draws_weights_and_count_of_its_step(tmp_path):
    """A loss that is a number of the draw, the weights and the step, and infinite at the fourth step."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.at = nn.Parameter(torch.zeros(()))
            self.seen = []

        def evaluate(self, model, guide, batch, *, step):
            value = self.at + torch.randn(()) + step
            self.seen.append(float(value.detach()))
            total = value * batch["a"].clamp(max=1.0).sum()
            return mm.Loss(total / (step != 3) if step == 3 else total, {"value": value.detach()})

    model, guide, _ = fresh()
    objective = Odd()
    with pytest.raises(FloatingPointError):
        mm.fit(model, guide, objective, rows(()), epochs=1, checkpoint=tmp_path / "run.pt", **QUIET)
    found = replay(tmp_path / "run-nonfinite-3.pt", model, guide, Odd())
    assert float(found.by_term["value"]) in objective.seen and not found.total.isfinite()


def test_a_replay_refuses_other_files_and_other_networks(tmp_path):
    with pytest.raises(FloatingPointError):
        train(fresh(), rows([7]), checkpoint=tmp_path / "run.pt", epochs=1)
    (file,) = tmp_path.glob("run-nonfinite-*.pt")
    other = mm.recipes.mvae(rows([]), latent=3, hidden=(4,))
    with pytest.raises(ValueError, match=r"run-nonfinite-\d+.pt does not fit|is of other programs"):
        replay(file, *other)
    with pytest.raises(FileNotFoundError, match="there is no"):
        replay(tmp_path / "nothing.pt", *fresh())
    mm.save(tmp_path / "weights.pt", *fresh()[:2])
    with pytest.raises(ValueError, match=r"is not|expected"):
        replay(tmp_path / "weights.pt", *fresh())


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_several_processes_skip_together():
    """One process alone has the bad row; all leave the step out, and end with the same weights."""
    run = fresh()
    with warns():
        history, found = train(run, rows([7]), epochs=3, devices=2, nonfinite="skip", batch_size=5)
    assert history.columns["skipped"] == [1, 1, 1] and all(p.isfinite().all() for p in found)


def test_accumulated_gradients_survive_a_minibatch_that_is_skipped():
    run = fresh()
    with warns():
        history, found = train(run, rows([7]), epochs=3, accumulate=2, clip_norm=1.0, nonfinite="skip")
    assert history.columns["skipped"] == [1, 1, 1] and all(p.isfinite().all() for p in found)
