"""A training step of several updates does what a loop by hand does, bit by bit, eager and compiled."""

import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_mm as mm
from pyro_mm.scoring.prepare_objective import prepare_objective
from pyro_mm.training.loader import MinibatchLoader
from pyro_mm.training.problem import problem_from_run
from pyro_mm.training.step import Update
from pyro_mm.training.updates import UpdateSequence
from tests.support.training_pair import data, pair


class Player(nn.Module):
    """One of two losses of a generator and a critic, which holds the critic."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic


class Generator(Player):
    """Reconstruction, and latents that the critic takes for draws from the prior."""

    def evaluate(self, model, guide, batch, *, step):
        guided = poutine.trace(guide).get_trace(batch)
        modelled = poutine.trace(poutine.replay(model, trace=guided)).get_trace(batch)
        modelled.compute_log_prob(lambda name, site: name in batch.names)
        fit = sum(modelled.nodes[name]["log_prob_sum"] for name in batch.names)
        doubt = nn.functional.softplus(-self.critic(guided.nodes["z"]["value"])).mean() * (batch.total or batch.size)
        return mm.Loss(doubt * (1 + step / 10) - fit, {"doubt": -doubt.detach()})


class Critic(Player):
    """Classification of latents and of draws from the prior."""

    def evaluate(self, model, guide, batch, *, step):
        z = poutine.trace(guide).get_trace(batch).nodes["z"]["value"].detach()
        real = nn.functional.softplus(-self.critic(torch.randn_like(z))).mean()
        return (real + nn.functional.softplus(self.critic(z)).mean()) * (batch.total or batch.size)


def game():
    """Two objectives, the parameters of each player, and their pair."""
    torch.manual_seed(0)
    model, guide = pair()
    critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    return (
        model,
        guide,
        (Generator(critic), Critic(critic)),
        ([*model.parameters(), *guide.parameters()], [*critic.parameters()]),
    )


EVERY = 1, 2
RATES = 0.05, 0.02
STEPS = 6


def optimizers(players):
    return [torch.optim.Adam(parameters, rate) for parameters, rate in zip(players, RATES, strict=True)]


def rows():
    return mm.Batch({name: data(64)[name] for name in "ab"})


def minibatches():
    loader = MinibatchLoader(rows(), 16, torch.device("cpu"))
    torch.manual_seed(3)
    return [*loader, *loader][:STEPS], loader


def by_hand():
    model, guide, objectives, players = game()
    made, losses = optimizers(players), []
    for step, batch in enumerate(minibatches()[0]):
        for every, objective, parameters, optimizer in zip(EVERY, objectives, players, made, strict=True):
            if step % every:
                continue
            torch.manual_seed(10 * step + every)
            for p in parameters:
                p.grad = None
            found = objective.evaluate(model, guide, batch, step=step)
            total = found.total if isinstance(found, mm.Loss) else found
            (total * (1 / 64)).backward(inputs=parameters)
            optimizer.step()
            losses.append(float(total.detach() * (16 / 64)))
    return losses, [p.detach() for parameters in players for p in parameters]


@pytest.mark.parametrize("compile", [False, True])
def test_two_updates_train_as_a_loop_by_hand(compile, monkeypatch):
    """With other objectives, parameters, optimisers and intervals, on the same draws."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    model, guide, objectives, players = game()
    batches, loader = minibatches()
    updates = []
    for every, objective, parameters, optimizer in zip(EVERY, objectives, players, optimizers(players), strict=True):
        problem = problem_from_run(prepare_objective(objective), model, guide, batches[0][:2])
        updates.append(Update(problem, parameters, optimizer, every))
    sequence = UpdateSequence(updates, loader, compile=compile)
    for every, player in zip(EVERY, sequence._players, strict=True):

        def seeded(batch, step, take=player.take, every=every):
            torch.manual_seed(10 * step + every)
            return take(batch, step)

        monkeypatch.setattr(player, "take", seeded)
    losses = []
    for step, batch in enumerate(batches):
        found = sequence(batch)
        assert [values is None for values in found] == [step % every != 0 for every in EVERY]
        losses += [float(values.values[0]) for values in found if values is not None]
    assert sequence.steps == STEPS
    if compile:
        assert all(player.compiled is not None and not player.compiled.reasons for player in sequence._players)
    expected, ends = by_hand()
    assert losses == expected
    assert all(map(torch.equal, ends, [p.detach() for parameters in players for p in parameters]))


def quadratic(optimizer, reduce_gradients=None):
    """An update of one number by a loss of slope 3 per row, and the number."""
    number = nn.Parameter(torch.zeros(()))

    def objective(model, guide, batch, *, step):
        return 3 * number * batch.size

    batch = rows()
    problem = problem_from_run(prepare_objective(objective), *pair(), batch[:2])
    return Update(problem, [number], optimizer([number]), reduce_gradients=reduce_gradients), number, batch


@pytest.mark.parametrize("compile", [False, True])
def test_gradients_are_reduced_before_the_optimisers_step(compile, monkeypatch):
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    seen = []

    def halve(gradients):
        seen.append([float(g) for g in gradients])
        for g in gradients:
            g.mul_(0.5)

    update, number, batch = quadratic(lambda ps: torch.optim.SGD(ps, 0.1), halve)
    update.loss.scales_to_data = False
    sequence = UpdateSequence([update], MinibatchLoader(batch, 64, torch.device("cpu")), compile=compile)
    for _ in range(4):
        sequence(batch)
    assert seen == [[pytest.approx(3.0)]] * 4
    assert number.item() == pytest.approx(-0.1 * 1.5 * 4)


def test_an_interval_of_no_steps_is_refused():
    with pytest.raises(ValueError, match="expected every to be a number of steps, 1 or more, got 0"):
        Update(None, [], None, 0)
