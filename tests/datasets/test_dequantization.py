"""Uniform dequantisation: levels and noise, bits per dimension, and values that are refused."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.datasets import dequantize, quantize


def rows(levels=256, dtype=torch.float32):
    values = torch.randint(0, levels, (50, 4, 4)).to(dtype) / (levels - 1)
    return mm.Batch({"image": values, "label": torch.arange(50) % 3}, {"image": torch.arange(50) % 2 > 0})


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_uniform_within_a_level_and_is_taken_off_again(levels, dtype):
    before = rows(levels, dtype)
    after = dequantize(before, "image", levels, seed=0)
    y = after["image"]
    assert y.dtype == dtype and y.min() >= 0 and y.max() <= 1 and torch.equal(after["label"], before["label"])
    torch.testing.assert_close(quantize(y, levels), before["image"])
    noise = y * levels - (before["image"] * (levels - 1)).round()
    # 800 uniforms: mean and mean square within five standard errors, seed fixed
    assert (noise.mean() - 1 / 2).abs() < 5 * (1 / 12 / 800) ** 0.5
    assert (noise.square().mean() - 1 / 3).abs() < 5 * (4 / 45 / 800) ** 0.5
    assert after.present["image"].equal(before.present["image"])


def test_a_seed_gives_the_same_noise_and_none_gives_new():
    one, two = (dequantize(rows(), "image", seed=3)["image"] for _ in range(2))
    assert one.shape == two.shape
    batch = rows()
    assert torch.equal(dequantize(batch, "image", seed=3)["image"], dequantize(batch, "image", seed=3)["image"])
    assert not torch.equal(dequantize(batch, "image")["image"], dequantize(batch, "image")["image"])


def test_bits_of_a_uniform_density_are_those_of_the_levels(double):
    """A Bernoulli of probability 1/2 has one bit per pixel; so has a uniform density of two levels, less the noise."""
    model = mm.models.SharedLatent(
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
        {"image": mm.conditionals.Bernoulli(Zeros(16), (4, 4))},
    )
    guide = mm.Guide(z=lambda batch: model.prior(batch).expand((batch.size,)))
    evidence = mm.log_marginal(model, guide, rows(2).only("image"), num_particles=50, seed=0)
    bits, error = evidence.bits_per_dimension(16)
    assert bits == pytest.approx(1) and error == pytest.approx(0, abs=1e-6)
    assert evidence.bits_per_dimension(16, levels=2)[0] == pytest.approx(2)
    nats, _ = evidence.mean()
    assert nats == pytest.approx(-16 * math.log(2))
    with pytest.raises(ValueError, match="dimensions"):
        evidence.bits_per_dimension(0)


class Zeros(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, z):
        return z.new_zeros(*z.shape[:-1], self.size)


@pytest.mark.parametrize(
    ("batch", "levels", "message"),
    [
        (rows(256), 17, "expected 'image' on 17 levels, .* between the levels"),
        (dequantize(rows(), "image"), 256, "between the levels.* do not add noise twice"),
        (
            mm.Batch({"image": torch.randint(0, 256, (5, 4))}),
            256,
            "divide grey levels by the",
        ),
        (mm.Batch({"image": None, "label": torch.zeros(3).long()}), 256, "holds no values of 'image'"),
    ],
)
def test_values_on_other_levels_are_refused(batch, levels, message):
    with pytest.raises(ValueError, match=message):
        dequantize(batch, "image", levels)


def test_a_training_adds_new_noise_to_each_minibatch():
    seen = []

    def noisy(batch):
        seen.append(dequantize(batch, "image", 4))
        return seen[-1]

    decoder = mm.conditionals.ImageFlow(nn.Linear(2, 4), (4, 4), 4, steps=1, hidden=4)
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    model = mm.models.SharedLatent(prior, {"image": decoder})
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"image": mm.conditionals.Normal(mm.nn.MLP(16, 4, (8,)))}))
    batch = rows(4).only("image")
    mm.fit(model, guide, mm.objectives.elbo(), batch, epochs=2, batch_size=50, transform=noisy, progress=False)
    assert not torch.equal(seen[-1]["image"], seen[-2]["image"])
