"""Errors of a story or a guide say at which site and in which network they arise."""

from __future__ import annotations

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from tests.support.audited_pairs import DOORS, LATENT, fitted, guide_of, guide_of_a, in_minibatches, pair, prior, story


def test_an_index_beyond_a_table_in_a_later_row_is_explained():
    model, guide = _by_function(nn.Embedding(3, 4), mm.conditionals.Categorical(nn.Linear(2, 9)))
    batch = mm.Batch({"x": torch.arange(12) % 3 + 3 * (torch.arange(12) == 11)})
    words = r"in guide.encoder \(Embedding\), given \(N,\).*takes indices from 0 to 2, and gets 0 to 5"
    with pytest.raises(ValueError, match=r"a minibatch of 4 rows \(N = 4\) cannot be run, " + words):
        fitted(model, guide, in_minibatches(batch))
    with pytest.raises(ValueError, match=words):
        fitted(model, guide, batch)
    with pytest.raises(ValueError, match=r"one or more of 12 rows \(N = 12\) cannot be run, " + words):
        mm.log_weights(model, guide, batch)


def broken():
    x = torch.randn(6, 3)
    good = mm.conditionals.Normal(nn.Linear(2, 6))
    return {
        "too narrow a network": (
            pair({"x": good}, {"x": nn.Linear(5, 4)}), x, ["site 'z'", "guide.posteriors.z.experts.x.net", r"\(N, 3\)"]
        ),
        "odd outputs": (
            pair({"x": mm.conditionals.Normal(nn.Linear(2, 5), (3,))}, {"x": nn.Linear(3, 4)}),
            x,
            ["site 'x'", "model.decoders.x", r"\(\.\.\., 6\)", r"\(N, 5\)", "puts out 16"],
        ),
        "no to_event": ((_without_to_event, guide_of(x=nn.Linear(3, 4))), x, ["site 'x'", r"to_event\(1\)"]),
        "other latents": (
            pair({"x": good}, {"x": nn.Linear(3, 6)}), x, ["site 'x'", "model.decoders.x.net", "2 features"]
        ),
        "float64": (pair({"x": good}, {"x": nn.Linear(3, 4)}), x.double(), ["'x'", "float64", "float32"]),
        "no such modality": ((_of_another, guide_of_a), x, ["'a'"]),
    }  # fmt: skip


def _without_to_event(batch):
    with batch.plate():
        z = pyro.sample("z", prior())
        batch.observe("x", lambda z: dist.Normal(z.sum(-1, keepdim=True) * torch.ones(3), 1.0), z)


def _in_two_blocks(batch):
    for name in ("z", "more"):
        with batch.plate():
            pyro.sample(name, dist.Normal(torch.zeros(len(batch)), 1.0))


def _entries_as_rows(batch):
    """Two entries of a latent, and two rows of the first run of ``fit``."""
    with batch.plate():
        z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0))
        batch.observe("x", lambda z: dist.Normal(z.sum(-1, keepdim=True), 1.0).expand([len(batch), 3]).to_event(1), z)


def _of_another(batch):
    with batch.plate():
        z = pyro.sample("z", prior())
        batch.observe("x", lambda z: dist.Normal(z, 1.0).to_event(1), z)


@pytest.mark.parametrize("case", broken())
@pytest.mark.parametrize("audit", [True, False])
@pytest.mark.parametrize("door", ["fit", "log_weights", "generate"])
def test_errors_of_the_first_run_say_where_they_are_from(case, audit, door):
    (model, guide), values, words = broken()[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        DOORS[door](model, guide, mm.Batch({"x": values}), audit=audit)
    text = str(caught.value)
    for word in words:
        assert re.search(word, text), (word, text)


def _by_function(encoder, decoder):
    """A pair of functions, whose networks are given the values as they are."""

    def guide(batch):
        with batch.plate():
            loc, scale = encoder(batch["x"]).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return mm.models.SharedLatent(prior(), {"x": decoder}), guide


def plain():
    real, classes = mm.conditionals.Normal(nn.Linear(2, 6)), mm.conditionals.Categorical(nn.Linear(2, 3))
    x, labels, table = torch.randn(6, 3), torch.arange(6), nn.Embedding(3, 4)
    return {
        "labels from 1": (_by_function(table, classes), labels % 3 + 1, ["0 to 2, and gets 1 to 3"]),
        "-1 for a missing label": (_by_function(table, classes), labels % 4 - 1, ["gets -1 to", "present="]),
        "short labels": (_by_function(table, classes), (labels % 3).char(), [r"int8: give it x\.long"]),
        "one-hot labels": (_by_function(nn.Embedding(6, 4), classes), torch.eye(6), ["float32: give it x.argmax"]),
        "integers": (_by_function(nn.Linear(3, 4), real), (9 * x).long(), [r"int64: give it x\.to\(torch\.float32\)"]),
        "one number to a network of one entry": (
            pair({"x": mm.conditionals.Normal(nn.Linear(2, 2), ())}, {"x": mm.nn.MLP(1, 4)}),
            x[:, 0].double(),
            [r"\. Give one number per row as \(N, 1\), values\[:, None\]$"],
        ),
        "two blocks of rows": ((story, _in_two_blocks), x[:, 0], ["plate 'data'", "Enter the plate once"]),
        "as many latents as rows of a first run": ((_entries_as_rows, guide_of(x=nn.Linear(3, 4))), x, ["to_event"]),
    }  # fmt: skip


@pytest.mark.parametrize("case", plain())
@pytest.mark.parametrize("door", ["fit", "log_weights"])
def test_the_error_of_an_ordinary_mistake_names_its_remedy(case, door):
    (model, guide), values, words = plain()[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        DOORS[door](model, guide, mm.Batch({"x": values}))
    for word in words:
        assert re.search(word, str(caught.value)), (word, str(caught.value))


def test_a_pair_that_runs_in_training_mode_alone_is_trained():
    """A scale behind batch normalisation may underflow in evaluation mode before the training has begun."""

    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            return dist.Normal(x[:, :2] / 255, (-self.norm(x)[:, :2]).exp()).to_event(1)

    encoder = Narrow()

    def guide(batch):
        with batch.plate():
            pyro.sample("z", encoder(batch["x"]))

    model = mm.models.SharedLatent(prior(), {"x": mm.conditionals.Normal(nn.Linear(2, 6), (3,))})
    batch = mm.Batch({"x": torch.tensor([0.0, 1.0] + 6 * [200.0])[:, None] + torch.rand(8, 3)})
    assert len(fitted(model, guide, batch)) == 1


def test_an_error_of_a_program_can_be_caught_as_one_of_values_or_of_a_run():
    """As errors of a training can, so that one type serves the evaluations and the first step of a training."""
    from pyro_mm.scoring.program_errors import ExplainedError, ProgramError

    model, guide = pair({"x": mm.conditionals.Normal(nn.Linear(2, 6))}, {"x": nn.Linear(5, 4)})
    for kind in (ValueError, RuntimeError, ProgramError, ExplainedError):
        with pytest.raises(kind, match=r"guide\.posteriors\.z\.experts\.x\.net"):
            mm.log_weights(model, guide, mm.Batch({"x": torch.randn(6, 3)}))


@pytest.mark.parametrize("audit", [True, False])
@pytest.mark.parametrize("door", ["fit", "log_weights"])
def test_a_program_that_cannot_be_run_raises_one_type_of_error_through_every_door(door, audit):
    from pyro_mm.scoring.program_errors import ProgramError

    model, guide = pair({"x": mm.conditionals.Normal(nn.Linear(2, 6))}, {"x": nn.Linear(5, 4)})
    with pytest.raises(ValueError, match="takes 5 features") as caught:
        DOORS[door](model, guide, mm.Batch({"x": torch.randn(6, 3)}), audit=audit)
    assert type(caught.value) is ProgramError
