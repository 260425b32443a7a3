"""The study of flows of MNIST: bits per dimension, and members that train on noise of their own."""

import math

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.experiments.studies import flow_images
from pyro_mm.experiments.studies.study import Sample


def test_bits_per_dimension_of_uniform_pixels_are_those_of_the_levels():
    """A uniform density on [0, 1) has log2 L bits; one on [0, 1/2) has one less."""
    rows = mm.Batch({"image": torch.rand(5, 28, 28) / 2})

    def guide(batch):
        with batch.plate():
            pass

    for high, bits in ((1.0, 8.0), (0.5, 7.0)):

        def model(batch, high=high):
            with batch.plate():
                batch.observe("image", lambda: dist.Uniform(torch.zeros(batch.size, 28, 28), high).to_event(2))

        evidence = mm.log_marginal(model, guide, rows, num_particles=2)
        found, error = flow_images.bits_per_dimension(evidence)
        assert found == pytest.approx(bits, abs=1e-5) and error < 1e-6
    assert math.prod(flow_images.SHAPE) == flow_images.PIXELS


@pytest.mark.parametrize("kind", flow_images.MEMBERS)
def test_every_member_trains_is_measured_and_shown(kind, monkeypatch):
    small = {"PARTICLES": 2, "EVIDENCE_ROWS": 2, "HIDDEN": (8,), "STEPS": 1, "CHANNELS": 2, "CONTEXT": 4}
    for name, value in {**small, "PERMUTATIONS": 2, "LATENT": 2, "SHOWN": 3}.items():
        monkeypatch.setattr(flow_images, name, value)
    torch.manual_seed(0)
    levels = mm.Batch({"image": torch.randint(0, 256, (16, 28, 28)) / 255, "label": torch.arange(16) % 10})
    judge = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    judge.features = lambda images: images.flatten(1)[:, :5]
    sample = Sample(levels, flow_images.dequantize(levels), judge)

    run = flow_images.MEMBERS[kind](levels)
    mm.fit(*run, levels, epochs=1, batch_size=8, seed=0, progress=False, transform=flow_images.dequantize)
    found = flow_images.measure(run, sample, 0)
    bits = found["bits per dimension"][0]
    assert bits == pytest.approx(8 - found["log p(image)"][0] / (784 * math.log(2)), abs=1e-5)
    assert {"bits per dimension, by the guide", "distance × 1000", "of features × 1000", "agreement"} <= set(found)
    (shown,) = flow_images.draw_images(run, sample, 0).values()
    assert shown.values.shape == shown.truth.shape == (3, 28, 28)
