"""The study of critics on a linear-Gaussian model: its columns in closed form."""

import math

import pytest
import torch

import pyro_mm as mm
from pyro_mm.experiments.studies import critics as study


def test_the_true_model_has_no_gap():
    """A recipe with the numbers that made the rows."""
    sample = study.sample_data(0)
    run = study.recipe(sample.train, None)
    with torch.no_grad():
        for name, rows in (("x", slice(0, 2)), ("y", slice(2, 3))):
            decoder = run.model.decoders[name]
            decoder.net.weight.copy_(study.WEIGHTS[rows])
            decoder.net.bias.copy_(study.OFFSETS[rows])
            decoder.log_scale.fill_(math.log(study.NOISE))
    found = study.measure(run, sample, 0)
    assert found["gap"] == pytest.approx(0.0, abs=1e-6)


def test_information_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(50_000, 1, generator=generator)
    x = z + 0.5 * torch.randn(50_000, 1, generator=generator)
    assert study.gaussian_information(x, z) == pytest.approx(math.log(1 + 4) / 2, abs=0.02)


@pytest.mark.parametrize("name", study.MEMBERS)
def test_every_member_trains_and_is_measured(name):
    sample = study.sample_data(0)
    torch.manual_seed(0)
    run = study.recipe(sample.train, study.MEMBERS[name])
    mm.fit(*run, sample.train, epochs=1, batch_size=500, seed=0, progress=False)
    found = study.measure(run, sample, 0)
    assert set(found) == {"gap", "I_q(x; z)", "of the truth's"}
    assert found["gap"] > 0
