"""Observed values of a wrong shape, or outside the support of their distribution, are refused in words."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.distributions.support import describe_values_outside, support_of
from tests.support.audited_pairs import DOORS, LATENT, Column, guide_of, pair, prior

FAMILIES = {
    "Normal": (lambda: mm.conditionals.Normal(nn.Linear(2, 2)), torch.randn(6)),
    "fixed scale": (lambda: mm.conditionals.Normal(nn.Linear(2, 1), scale=1.0), torch.randn(6)),
    "Laplace": (lambda: mm.conditionals.Laplace(nn.Linear(2, 2)), torch.randn(6)),
    "Bernoulli": (lambda: mm.conditionals.Bernoulli(nn.Linear(2, 1)), torch.ones(6)),
    "Poisson": (lambda: mm.conditionals.Poisson(nn.Linear(2, 1)), torch.ones(6)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 6])
def test_one_number_per_row_is_a_column_to_a_decoder_of_one_entry(family, size):
    make, values = FAMILIES[family]
    values = values[:size]
    model, guide = pair({"age": make()}, {"age": Column()})
    column = mm.Batch({"age": values[:, None]})
    for name in ("fit", "log_marginal", "log_weights", "generate"):
        door = DOORS[name]
        with pytest.raises(ValueError, match=r"age: its values are of shape \(N,\).*event shape \(1,\).*\(N, 1\)"):
            door(model, guide, mm.Batch({"age": values}))
        if name in ("log_weights", "generate"):
            door(model, guide, column)


@pytest.mark.parametrize("values, decoder, words", [
    (torch.randint(0, 4, (6, 1)), lambda: mm.conditionals.Categorical(nn.Linear(2, 4)), r"as \(N,\)"),
    (torch.eye(4)[torch.arange(6) % 4], lambda: mm.conditionals.Categorical(nn.Linear(2, 4)), "argmax"),
    (torch.randn(6, 2, 3), lambda: mm.conditionals.Normal(nn.Linear(2, 12), event_shape=(3, 2)), "transposed"),
    (torch.randn(6, 3, 3), lambda: mm.conditionals.Normal(nn.Linear(2, 6), event_shape=(3,)), "event_shape"),
    (torch.randn(6, 1), lambda: mm.conditionals.Normal(nn.Linear(2, 20)), "event_shape"),
    (torch.randn(6, 10), lambda: mm.conditionals.Normal(nn.Linear(2, 2)), "event_shape"),
])  # fmt: skip
@pytest.mark.parametrize("door", ["fit", "log_marginal", "generate"])
def test_observed_values_that_would_be_broadcast_are_refused(values, decoder, words, door):
    with pytest.raises(ValueError, match=f"would be broadcast.*{words}"):
        DOORS[door](*pair({"v": decoder()}, {"v": Column()}), mm.Batch({"v": values}))


def test_sites_in_plates_within_a_row_and_shared_distributions_have_their_shapes():
    """Values (3, N) in a plate of three, a distribution that is one for all rows, and values seen by three raters."""
    batch = mm.Batch({"x": torch.randn(6, 3), "y": torch.randn(6)})

    def nested(batch):
        with batch.plate():
            z = pyro.sample("z", prior())
            batch.observe("y", dist.Normal(0.0, 1.0))
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=batch["x"].T)

    log_weights = mm.log_weights(nested, guide_of(x=nn.Linear(3, 4)), batch)
    assert log_weights.shape == (1, 6) and log_weights.isfinite().all()


def grey(low, high, size=6):
    return torch.linspace(low, high, size * 4).reshape(size, 4)


SUPPORTS = {
    "pixels to 255": (lambda: mm.conditionals.Bernoulli(nn.Linear(2, 4)), grey(0, 255), "divide by 255"),
    "pixels from -1": (lambda: mm.conditionals.Bernoulli(nn.Linear(2, 4)), grey(-1, 1), r"\(x \+ 1\) / 2"),
    "negative counts": (lambda: mm.conditionals.Poisson(nn.Linear(2, 4)), -grey(1, 24).round(), "counts as they are"),
    "fractional counts": (lambda: mm.conditionals.Poisson(nn.Linear(2, 4)), grey(0, 3), "counts as they are"),
    "scaled expression": (
        lambda: mm.conditionals.NegativeBinomial(nn.Linear(2, 4), (4,)), grey(-1, 2), "counts as they are"
    ),
    "infinite": (
        lambda: mm.conditionals.Normal(nn.Linear(2, 8)),
        torch.where(grey(0, 1) > 0.9, torch.inf, 0.0),
        "not finite",
    ),
    "fractional class": (lambda: mm.conditionals.Categorical(nn.Linear(2, 4)), torch.tensor([0.0, 3.8]), "Classes"),
    "class 4 of 4": (lambda: mm.conditionals.Categorical(nn.Linear(2, 4)), torch.tensor([0, 4, 1]), "4 outputs"),
    "class -1": (lambda: mm.conditionals.Categorical(nn.Linear(2, 4)), torch.tensor([0, -1, 1]), "present="),
}  # fmt: skip


@pytest.mark.parametrize("case", SUPPORTS)
@pytest.mark.parametrize("door", ["fit", "log_marginal", "generate"])
def test_values_outside_the_support_are_refused_with_their_range_and_rows(case, door):
    make, values, mend = SUPPORTS[case]
    encoder = nn.Linear(4, 2 * LATENT) if values.dim() == 2 else Column()
    with pytest.raises(ValueError, match=rf"v: .* scores .* of {len(values)} rows \(\d.*{mend}"):
        DOORS[door](*pair({"v": make()}, {"v": encoder}), mm.Batch({"v": values}))


def test_every_row_is_looked_at_and_one_bad_one_named():
    values = torch.zeros(5000, 4)
    values[4321, 2] = 2.0
    model, guide = pair({"v": mm.conditionals.Bernoulli(nn.Linear(2, 4))}, {"v": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=r"1 of 5000 rows \(4321\) have others, their values being from 0 to 2"):
        mm.log_weights(model, guide, mm.Batch({"v": values}))
    values[4321, 2] = torch.nan  # a missing row
    mm.log_weights(model, guide, mm.Batch({"v": values}))


def test_a_change_in_place_is_looked_at_again():
    values = torch.zeros(6, 4)
    model, guide = pair({"v": mm.conditionals.Bernoulli(nn.Linear(2, 4))}, {"v": nn.Linear(4, 4)})
    batch = mm.Batch({"v": values})
    mm.log_weights(model, guide, batch)
    batch["v"][3, 3] = 7.0
    with pytest.raises(ValueError, match=r"1 of 6 rows \(3\)"):
        mm.log_weights(model, guide, batch)


def test_grey_levels_are_allowed_and_said_to_be_no_bits():
    make = lambda: mm.conditionals.Bernoulli(nn.Linear(2, 4))  # noqa: E731
    model, guide = pair({"v": make(), "w": make()}, {"v": nn.Linear(4, 4)})
    batch = mm.Batch({"v": grey(0, 1), "w": grey(0, 1).round()})
    for found in (
        mm.log_marginal(model, guide, batch, num_particles=4),
        mm.log_marginal(model, guide, batch, num_particles=4)[:2],
        mm.log_conditional(model, guide, batch, target="v", given="w", num_particles=4),
    ):
        assert "v has values between 0 and 1: under a Bernoulli this is no likelihood of bits" in repr(found)
        assert "no likelihood of bits" in found.summary() and "w has" not in repr(found)
    assert not mm.log_marginal(model, guide, batch.only("w"), num_particles=4).notes


@pytest.mark.parametrize("d, inside, out", [
    (dist.LogNormal(0.0, 1.0), 2.0, 0.0), (dist.Gamma(1.0, 1.0), 2.0, -1.0), (dist.Beta(1.0, 1.0), 0.5, 1.5),
    (dist.Dirichlet(torch.ones(2)), [0.5, 0.5], [0.5, 1.5]), (dist.VonMises(0.0, 1.0), 1.0, torch.inf),
    (dist.Geometric(torch.tensor(0.5)), 3.0, 0.5), (dist.StudentT(3.0), -9.0, torch.inf),
    (dist.Binomial(torch.tensor(3.0), torch.tensor(0.5)), 3.0, 4.0),
])  # fmt: skip
def test_values_outside_the_support_are_found_for_every_family(d, inside, out):
    """What is inside by torch's own word is, and what has the density zero, or none, is not."""

    support = support_of(d)
    assert describe_values_outside("v", torch.tensor([inside, inside]), True, support) is None
    assert "1 of 2 rows (1)" in describe_values_outside("v", torch.tensor([inside, out]), True, support)
    assert describe_values_outside("v", torch.tensor([inside, out]), torch.tensor([True, False]), support) is None
