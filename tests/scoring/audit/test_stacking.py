"""Networks that take particles for rows are refused, and no others."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import pyro_mm as mm
from tests.support.audited_pairs import DOORS, guide_of, pair, tables


def classes(net):
    """A pair of numbers and a label, with a network for the label's logits."""
    model, guide = pair(
        {"x": mm.conditionals.Normal(nn.Linear(2, 6)), "y": mm.conditionals.Categorical(net)},
        {"x": nn.Linear(3, 4), "y": nn.Embedding(4, 4)},
    )
    generator = torch.Generator().manual_seed(2)
    return model, guide, mm.Batch({"x": torch.randn(32, 3, generator=generator), "y": torch.arange(32) % 4})


MIXING = {
    "LogSoftmax(dim=1)": lambda: nn.Sequential(nn.Linear(2, 4), nn.LogSoftmax(dim=1)),
    "BatchNorm1d": lambda: nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)),
    "mean of rows": lambda: _Centred(),
}


ROWWISE = {
    "LogSoftmax(dim=-1)": lambda: nn.Sequential(nn.Linear(2, 4), nn.LogSoftmax(dim=-1)),
    "dropout": lambda: nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 4)),
    "LayerNorm": lambda: nn.Sequential(nn.Linear(2, 8), nn.LayerNorm(8), nn.Linear(8, 4)),
    "functional dropout": lambda: _Noisy(),
    "numpy's noise": lambda: _Noisy(by_numpy=True),
}


class _Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 4)

    def forward(self, z):
        return self.net(z - z.mean(0, keepdim=True))


class _Noisy(nn.Module):
    """Draws whatever its mode."""

    def __init__(self, by_numpy=False):
        super().__init__()
        self.net, self.by_numpy = nn.Linear(2, 4), by_numpy

    def forward(self, z):
        if self.by_numpy:
            import numpy as np

            return self.net(z) + float(np.random.normal())
        return self.net(nn.functional.dropout(z, 0.5, training=True))


@pytest.mark.parametrize("net", MIXING)
@pytest.mark.parametrize("rows", [31, 32])
def test_networks_that_take_particles_for_rows_are_refused(net, rows):
    """Two particles and more are refused, one is right, and so is vectorize=False."""
    torch.manual_seed(0)
    model, guide, batch = classes(MIXING[net]())
    batch = batch[:rows]
    for door in ("log_marginal", "log_weights", "generate", "posterior_draws", "compare"):
        with pytest.raises(ValueError, match="vectorize=False"):
            DOORS[door](model, guide, batch)
    with pytest.raises(ValueError, match="vectorize=False"):
        mm.fit(model, guide, tables.mvae(), batch, epochs=1, progress=False)
    with pytest.raises(ValueError, match="vectorize=False"):
        mm.fit(model, guide, tables.elbo(mm.estimators.IWAE(3)), batch, epochs=1, progress=False)
    mm.log_weights(model, guide, batch)
    mm.generate(model, guide, batch)
    mm.log_marginal(model, guide, batch, num_particles=3, vectorize=False)
    mm.fit(model, guide, tables.elbo(), batch, epochs=1, progress=False)
    mm.fit(model, guide, tables.mvae(vectorize=False), batch, epochs=1, progress=False)


def test_a_hidden_modality_that_is_drawn_is_looked_at_and_a_guide_may_insist_that_it_is_hidden():
    torch.manual_seed(0)
    model, _, batch = classes(MIXING["LogSoftmax(dim=1)"]())
    right = classes(ROWWISE["LogSoftmax(dim=-1)"]())[0]
    inner = guide_of(x=nn.Linear(3, 4))

    def guide(batch):
        assert batch.presence("y") is False
        inner(batch)

    with pytest.raises(ValueError, match=r"y: .* among particles"):
        mm.generate(model, inner, batch.only("x"), 3)
    mm.generate(right, guide, batch.only("x"), 3)


@pytest.mark.parametrize("net", ROWWISE)
@pytest.mark.parametrize("training", [True, False])
def test_networks_that_work_row_by_row_pass_the_audit_random_ones_included(net, training):
    model, guide, batch = classes(ROWWISE[net]())
    model.train(training)
    guide.train(training)
    for door in ("log_marginal", "log_weights", "generate", "posterior_draws"):
        assert DOORS[door](model, guide, batch) is not None
    history = mm.fit(model, guide, tables.mvae(), batch, epochs=1, progress=False)
    assert math.isfinite(history.to_dict()["loss"][0])


def test_the_report_of_check_has_the_audit():
    torch.manual_seed(0)
    model, guide, batch = classes(MIXING["LogSoftmax(dim=1)"]())
    found = mm.check(model, guide, tables.elbo(), batch, num_particles=20, repeats=2)
    assert found.findings[0].startswith("y: p(y | ..) of a particle is another one among particles")
    broken = mm.Batch({"x": batch["x"], "y": torch.full((32,), 4)}, {"y": torch.arange(32) % 2 == 0})
    guide = guide_of(x=nn.Linear(3, 4))
    found = mm.check(model, guide, tables.elbo(), broken, num_particles=20, repeats=2)
    assert any("y: Categorical scores whole numbers from 0 to 3, and 16 of 32 rows" in text for text in found.findings)
