"""Further players of a training: a loop by hand, optimisers, columns, checkpoints, and mistakes that are named."""

import math

import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.training.epoch_values import values_per_row
from tests.support.adversarial_game import Classification, game, rows

OPTIONS = {"batch_size": 64, "seed": 3, "progress": False, "audit": False}


def main_optimizer(parameters):
    return torch.optim.Adam(parameters, 0.05)


def critic_optimizer(parameters):
    return torch.optim.Adam(parameters, 0.02)


def weights(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


class Recorder:
    """A transform that notes the minibatches, and makes the draws of each step repeatable."""

    def __init__(self):
        self.batches = []

    def __call__(self, batch):
        self.batches.append(batch)
        torch.manual_seed(len(self.batches))
        return batch


def by_hand(batches):
    """Losses of both players per step, and the weights at the end, of a loop on minibatches of a Recorder."""
    model, guide, objective = game()
    own = [*model.parameters(), *guide.parameters()]
    theirs = list(objective.critic.parameters())
    players = {
        "critic": (Classification(objective.critic), theirs, critic_optimizer(theirs)),
        "loss": (objective, own, main_optimizer(own)),
    }
    losses = []
    for step, batch in enumerate(batches[1:]):  # the first one was for the run that finds the parameters
        torch.manual_seed(step + 2)
        losses.append({})
        for name, (loss, parameters, optimizer) in players.items():
            if name == "critic" and step % 2:
                continue
            for p in parameters:
                p.grad = None
            total = loss.evaluate(model, guide, batch, step=step).total
            (total / 64).backward(inputs=parameters)
            optimizer.step()
            losses[-1][name] = float(total.detach() / 64)
    return losses, weights(model, guide, objective.critic)


@pytest.mark.parametrize("compile", [False, True])
def test_a_training_of_two_players_is_a_loop_by_hand(compile, monkeypatch):
    """The critic first, at every second step, by an optimiser of its own; then the others."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    model, guide, objective = game(optimizer=critic_optimizer)
    recorder = Recorder()
    history = mm.fit(
        model,
        guide,
        objective,
        rows(),
        epochs=3,
        optimizer=main_optimizer,
        compile=compile,
        transform=recorder,
        **OPTIONS | {"batch_size": 32},
    )
    losses, ends = by_hand(recorder.batches)
    pairs = list(zip(losses[::2], losses[1::2], strict=True))  # of an epoch; only the first step moves the critic
    assert history.columns["loss"] == pytest.approx([(a["loss"] + b["loss"]) / 2 for a, b in pairs], rel=1e-6)
    assert history.columns["critic"] == pytest.approx([a["critic"] for a, _ in pairs], rel=1e-6)
    assert list(history.columns) == ["loss", "doubt", "critic", "critic real"]
    for end, found in zip(ends, weights(model, guide, objective.critic), strict=True):
        torch.testing.assert_close(found, end, rtol=1e-5, atol=1e-6)


def test_a_player_without_an_optimizer_of_its_own_has_the_trainings():
    seen = []

    def optimizer(parameters):
        seen.append(len(list(parameters)))
        return torch.optim.Adam(parameters, 0.01)

    model, guide, objective = game()
    mm.fit(model, guide, objective, rows(), epochs=1, optimizer=optimizer, **OPTIONS)
    assert seen == [4, len(weights(model, guide))]


def test_a_schedule_moves_every_players_rate():
    made = []

    def scheduler(optimizer):
        made.append(optimizer)
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)

    model, guide, objective = game(optimizer=critic_optimizer)
    mm.fit(model, guide, objective, rows(), epochs=2, optimizer=main_optimizer, scheduler=scheduler, **OPTIONS)
    assert [o.param_groups[0]["lr"] for o in made] == pytest.approx([0.02 / 4, 0.05 / 4])


def test_a_training_of_two_players_goes_on_from_its_checkpoint(tmp_path):
    """Weights, history, moments and the count of steps, by which the critic is due."""
    model, guide, objective = game(optimizer=critic_optimizer)
    whole = mm.fit(model, guide, objective, rows(), epochs=3, **OPTIONS)
    expected = weights(model, guide, objective.critic)

    path = tmp_path / "training"
    first = game(optimizer=critic_optimizer)
    mm.fit(*first, rows(), epochs=1, checkpoint=path, **OPTIONS)
    model, guide, objective = game(optimizer=critic_optimizer)
    resumed = mm.fit(model, guide, objective, rows(), epochs=3, checkpoint=path, **OPTIONS)
    assert resumed.columns["loss"] == whole.columns["loss"]
    assert resumed.columns["critic"] == pytest.approx(whole.columns["critic"], nan_ok=True, rel=0, abs=0)
    assert all(map(torch.equal, expected, weights(model, guide, objective.critic)))


def test_a_checkpoint_of_other_players_is_refused(tmp_path):
    path = tmp_path / "training"
    mm.fit(*game(), rows(), epochs=1, checkpoint=path, **OPTIONS)
    model, guide, objective = game()
    objective.players = lambda *_: []
    with pytest.raises(ValueError, match="its further players are critic, and not none"):
        mm.fit(model, guide, objective, rows(), epochs=2, checkpoint=path, **OPTIONS)
    model, guide, objective = game(optimizer=lambda ps: torch.optim.SGD(ps, 0.1))
    with pytest.raises(ValueError, match="kind of the optimizer of critic is Adam, and not SGD"):
        mm.fit(model, guide, objective, rows(), epochs=2, checkpoint=path, **OPTIONS)


def test_players_train_in_bfloat16():
    model, guide, objective = game(optimizer=critic_optimizer)
    before = weights(objective.critic)
    history = mm.fit(model, guide, objective, rows(), epochs=2, precision="bf16-mixed", **OPTIONS)
    assert all(math.isfinite(value) for value in history.columns["loss"])
    assert not any(map(torch.equal, before, weights(objective.critic)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": []}, "the player 'critic' has nothing to train: none of its 0 parameters"),
        ({"every": 0}, "expected every of the player 'critic' >= 1, got 0"),
        ({"optimizer": torch.optim.Adam([torch.zeros(1)])}, "expected optimizer to be a function"),
        (
            {"optimizer": lambda ps: torch.optim.Adam(list(ps)[1:])},
            "of the player 'critic' leaves out 1 of 4",
        ),
        (
            {"parameters": [nn.Parameter(torch.zeros(2))]},
            "of the player 'critic' reaches a tensor of shape",
        ),
    ],
)
def test_mistakes_of_a_player_are_refused(changes, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mm.fit(*game(**changes), rows(), epochs=1, **OPTIONS)


def test_two_players_do_not_move_one_parameter():
    model, guide, objective = game()
    (player,) = objective.players(None, None, None)
    objective.players = lambda *_: [player, mm.Player("other", player.loss, player.parameters)]
    with pytest.raises(ValueError, match=r"'critic' and 'other' both move a tensor of shape \(8, 2\)"):
        mm.fit(model, guide, objective, rows(), epochs=1, **OPTIONS)
    objective.players = lambda *_: [player, player]
    with pytest.raises(ValueError, match="a name of its own, and not 'critic'"):
        mm.fit(model, guide, objective, rows(), epochs=1, **OPTIONS)


def test_the_trainings_optimizer_does_not_move_what_a_player_moves():
    model, guide, objective = game()
    everything = [*model.parameters(), *guide.parameters(), *objective.critic.parameters()]
    (player,) = objective.players(None, None, None)
    objective.changes["optimizer"] = critic_optimizer
    with pytest.raises(ValueError, match=r"a further player moves: objective\.critic\.0\.weight"):
        mm.fit(model, guide, objective, rows(), epochs=1, optimizer=lambda _: torch.optim.Adam(everything), **OPTIONS)
    assert player.name == "critic"


class Diverging(nn.Module):
    """The critic's loss, NaN from a step on."""

    def __init__(self, loss, step):
        super().__init__()
        self.loss = loss
        self.step = step

    def evaluate(self, model, guide, batch, *, step):
        found = self.loss.evaluate(model, guide, batch, step=step)
        return mm.Loss(found.total * (math.nan if step >= self.step else 1.0))


def test_nan_in_a_player_is_named_and_all_players_are_put_back():
    model, guide, objective = game(optimizer=critic_optimizer)
    mm.fit(model, guide, objective, rows(), epochs=2, optimizer=main_optimizer, **OPTIONS)
    expected = weights(model, guide, objective.critic)

    model, guide, objective = game(optimizer=critic_optimizer)
    objective.changes["loss"] = Diverging(Classification(objective.critic), 2)
    with pytest.raises(ValueError, match="the loss of the player 'critic' is nan at step 1 of epoch 3"):
        mm.fit(model, guide, objective, rows(), epochs=6, optimizer=main_optimizer, **OPTIONS)
    for end, found in zip(expected, weights(model, guide, objective.critic), strict=True):
        assert torch.equal(found, end)


def test_a_player_may_warn_once():
    texts = iter(["the critic has won", "and again", "and again"])
    model, guide, objective = game(diagnose=lambda entry: next(texts) if entry["critic"] < math.inf else None)
    with pytest.warns(UserWarning, match="the critic has won") as found:
        mm.fit(model, guide, objective, rows(), epochs=3, **OPTIONS)
    assert len([each for each in found if "and again" in str(each.message)]) == 0


def test_players_do_not_go_with_accumulated_gradients_of_some_steps():
    with pytest.raises(ValueError, match="'critic' is due at every 2 steps, and accumulate=2"):
        mm.fit(*game(), rows(), epochs=1, accumulate=2, **OPTIONS)
    history = mm.fit(*game(every=1), rows(), epochs=2, accumulate=2, clip_norm=1.0, **OPTIONS | {"batch_size": 16})
    assert len(history.columns["critic"]) == 2


def test_a_stage_of_several_players_is_refused():
    model, guide, objective = game()
    with pytest.raises(ValueError, match="the objective brings further players, 'critic'"):
        mm.stage(objective, model, guide, rows())


def test_values_per_row_are_those_of_the_steps_at_which_a_player_moved():
    """Two steps of 10 rows; the player moved at the first one."""
    sums = {
        ("loss", "a", "critic", "critic b", "rows of critic"): torch.tensor([20.0, -10, 30, 5, 10]),
        ("loss", "a"): torch.tensor([40.0, -30]),
    }
    assert values_per_row(sums, 20) == {"loss": 3.0, "a": -2.0, "critic": 3.0, "critic b": 0.5}
