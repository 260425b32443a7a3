"""Settings of the loop two at a time: each training has the numbers of another one that should be the same.

Losses have no noise, in float64. A training with two settings is compared, with some rows missing and 33 rows in
minibatches of 16, 16 and 1, with

* itself by compiled steps (the traced graph),
* itself by two processes with minibatches of half the size, the last of which only one has a row for,
* itself interrupted at a step within an epoch and resumed,
* itself with ``accumulate=2`` and minibatches of half the size.
"""

import itertools
import os
import signal
import warnings

import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.utils.global_state import override_validation
from tests.support.exact_training import linear_pair, rows, without_inductor
from tests.support.nested_values import differing

LONG = os.environ.get("PYRO_MM_LONG") == "1"
SIZE = 33
EPOCHS = 4
BAD_STEP = 4  # counted from 0: the second one of the second epoch
INTERRUPTED_AFTER = 4  # steps: within a group of two minibatches whose gradients are accumulated

OPTIONS = (
    "callbacks", "clip", "averages", "players", "skip", "early stopping", "schedule", "accumulate", "validation"
)  # fmt: skip
CHANGES = ("compile", "processes", "resume", "accumulate")


class Likelihood(nn.Module):
    """Minus log p of the rows; with a player also its verdict on the posterior means of the rows.

    Args:
        every: the player moves at every so many steps; 0 for none.
        bad_step: the step at which the loss is NaN; -1 for none.
    """

    def __init__(self, every, bad_step):
        super().__init__()
        torch.manual_seed(1)
        self.critic = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double() if every else None
        self.every = every
        self.bad_step = bad_step

    def evaluate(self, model, guide, batch, *, step):
        log_p = model.log_prob(batch).sum()
        total = -log_p
        if self.critic is not None:
            total = total + nn.functional.softplus(-self.critic(model.posterior(batch).mean)).sum()
        scale = (batch.total or batch.size) / batch.size
        is_bad = (torch.as_tensor(step) == self.bad_step) & torch.is_grad_enabled()  # and not of rows for validation
        bad = torch.where(is_bad, torch.nan, 1.0).double()
        return mm.Loss(total * scale * bad, {"log p": log_p.detach() * scale})

    def players(self, model, guide, batch):
        if self.critic is None:
            return []
        make = lambda ps: torch.optim.Adam(ps, 0.02)  # noqa: E731
        return [mm.Player("critic", Verdict(self.critic), list(self.critic.parameters()), make, self.every)]


class Verdict(nn.Module):
    """A critic's loss, of posterior means of the rows against the sines of their places in a."""

    def __init__(self, critic):
        super().__init__()
        self.critic = critic

    def evaluate(self, model, guide, batch, *, step):
        fake = self.critic(model.posterior(batch).mean.detach())
        a = batch["a"]
        present = batch.present["a"][:, None] & torch.ones_like(fake, dtype=torch.bool)
        real = self.critic(torch.where(present, a.sin(), torch.zeros_like(a))[:, :2])
        loss = nn.functional.softplus(fake) + torch.where(present, nn.functional.softplus(-real), 0.0)
        return mm.Loss(loss.sum() * ((batch.total or batch.size) / batch.size))


class Journal:
    """Losses after steps of the optimisers and epochs, which are part of the checkpoint."""

    def __init__(self):
        self.entries = []

    def on_step(self, training):
        if training.moved:
            self.entries.append(float(training.epoch))

    def on_epoch(self, training):
        self.entries.append(training.entry["loss"])

    def state_dict(self):
        return {"entries": list(self.entries)}

    def load_state_dict(self, state):
        self.entries = list(state["entries"])


class CtrlC:
    """An interruption after a step."""

    def on_step(self, training):
        if training.step == INTERRUPTED_AFTER and training.is_main:
            signal.raise_signal(signal.SIGINT)


def descend(parameters):
    return torch.optim.SGD(parameters, 0.02)


def decay(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)


SETTINGS = {
    "clip": {"clip_norm": 1.5},
    "skip": {"nonfinite": "skip"},
    "schedule": {"scheduler": decay, "scheduler_interval": "step"},
    "accumulate": {"accumulate": 2},
    "validation": {"validation": rows(10, 1), "validation_batch_size": 4},
    "compile": {"compile": True},
    "processes": {"devices": 2},
}


def callbacks_of(options):
    found = [mm.callbacks.WeightAverage(0.8)] if "averages" in options else []
    if "early stopping" in options:
        found += [mm.callbacks.EarlyStopping(1, "loss", min_delta=1e3), mm.callbacks.BestWeights("loss")]
    return found + [Journal()] * ("callbacks" in options)


def train(options, changes=(), every=2, path=None):
    """Train with some options, and with changes that leave the numbers as they are; return these numbers."""
    chosen = {*options, *changes}
    halved = len({"processes", "accumulate"} & {*changes})
    settings = {"epochs": EPOCHS, "seed": 0, "progress": False, "audit": False, "optimizer": descend}
    settings |= {"batch_size": 16 // 2**halved, "checkpoint": path}
    for name in chosen:
        settings |= SETTINGS.get(name, {})

    def run(*more):
        """Train with modules and callbacks of its own; return the history, the weights, and what callbacks noted."""
        model, guide = linear_pair()
        objective = Likelihood(every if "players" in chosen else 0, BAD_STEP if "skip" in chosen else -1)
        callbacks = callbacks_of(chosen)
        history = mm.fit(model, guide, objective, rows(SIZE), callbacks=[*callbacks, *more], **settings)
        weights = [p.detach().clone() for module in (model, objective) for p in module.parameters()]
        notes = [note for callback in callbacks if isinstance(callback, Journal) for note in callback.entries]
        return history, {"history": history.to_dict(), "weights": weights, "stopped": history.stopped, "notes": notes}

    with override_validation(True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "a minibatch is skipped|the training was interrupted")
        if "resume" in changes:
            assert run(CtrlC())[0].interrupted
        return run()[1]


def cases():
    """Return pairs of options with changes, and pairs of changes; a choice of them in the short mode."""
    pairs = [*itertools.combinations(OPTIONS, 2), *((option,) for option in OPTIONS), ()]
    whole = [(pair, (change,)) for pair in pairs for change in CHANGES if has_identity(pair, (change,))]
    whole += [((), changes) for changes in itertools.combinations(CHANGES, 2)]
    if LONG:
        return whole
    around = [(a, OPTIONS[(place + 1) % len(OPTIONS)]) for place, a in enumerate(OPTIONS)]
    chosen = [(pair, (CHANGES[(place + turn) % 4],)) for place, pair in enumerate(around) for turn in (0, 2)]
    return [case for case in chosen if has_identity(*case)] + whole[-3:]


def has_identity(options, changes):
    """Return False where a change is no other way to the same numbers.

    Minibatches of half the size have other numbers of steps, of which one is skipped; they are accumulated once; and of
    two players the second one has seen the step of the first one in the second half only.
    """
    return "accumulate" not in changes or not {"skip", "accumulate", "players"} & {*options}


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("options", "changes"), [pytest.param(*case, id=" ".join([*case[0], "=", *case[1]])) for case in cases()]
)
def test_settings_meet_with_the_same_numbers(tmp_path, monkeypatch, options, changes):
    without_inductor(monkeypatch)
    every = 1 if "accumulate" in options else 2  # players that take turns are refused beside accumulate
    expected = reference(options, every)
    path = tmp_path / "run.pt" if "resume" in changes else None
    found = train(options, changes, every, path)
    exact = {*changes} == {"resume"}
    assert differing(found, expected, atol=0 if exact else 1e-10) == []


REFERENCES = {}


def reference(options, every):
    """Return the numbers of a training with some options alone."""
    key = (options, every)
    if key not in REFERENCES:
        REFERENCES[key] = found = train(options, every=every)
        assert len(found["history"]["loss"]) == (2 if "early stopping" in options else EPOCHS)
        assert sum(found["history"].get("skipped", [])) == ("skip" in options)
    return REFERENCES[key]


@pytest.mark.parametrize("option", OPTIONS)
def test_each_option_changes_the_numbers(option):
    """Else a comparison with it would say nothing of it."""
    assert differing(reference((option,), 1), reference((), 1)) != []
