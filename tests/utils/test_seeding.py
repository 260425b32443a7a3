"""Seeds: any integer, the same draws for it, and generators left as they were."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm.utils.seeding import normalize_seed, temporary_seed

CPU = torch.device("cpu")


def pair():
    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe("x", lambda z: dist.Normal(z, 1.0), z)
            batch.observe("y", lambda z: dist.Normal(z, 1.0), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(batch.size), 1.0))

    return story, guide, mm.Batch({"x": torch.zeros(3), "y": torch.ones(3)})


def test_a_seed_gives_the_same_draws_and_leaves_the_generator_alone():
    state = torch.get_rng_state()
    with temporary_seed(7, CPU):
        one = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), one), "they are torch's own under that seed"
    torch.set_rng_state(state)
    with temporary_seed(None, CPU):
        drawn = torch.rand(3)
    torch.set_rng_state(state)
    assert torch.equal(torch.rand(3), drawn)


def test_rows_on_the_cpu_do_not_reseed_a_gpu(monkeypatch):
    """``torch.manual_seed`` does, of all of them, and nobody puts those back."""
    seeds = []
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, seeds.append)
    with temporary_seed(1, CPU):
        torch.rand(1)
    mm.log_marginal(*pair(), num_particles=10, seed=1)
    assert seeds == []


@pytest.mark.cuda
def test_each_device_has_its_seed_and_gets_its_state_back():
    state = torch.cuda.get_rng_state()
    with temporary_seed(1, CPU):
        assert torch.equal(torch.cuda.get_rng_state(), state)
    device = torch.device("cuda")
    with temporary_seed(1, device):
        one = torch.rand(3, device=device)
    assert torch.equal(torch.cuda.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3, device=device), one)


SEEDED = {
    "log_marginal": lambda *pair, seed: mm.log_marginal(*pair, num_particles=30, seed=seed).log_prob,
    "quasi": lambda *pair, seed: mm.log_marginal(*pair, num_particles=30, seed=seed, draws="quasi").log_prob,
    "log_conditional": lambda *pair, seed: (
        mm.log_conditional(*pair, target="x", given="y", num_particles=30, seed=seed, prior_share=0.5).log_prob
    ),
    "annealed": lambda *pair, seed: mm.annealed_importance(*pair, num_chains=2, temperatures=2, seed=seed).log_prob,
    "calibration": lambda *pair, seed: mm.calibration(*pair, num_draws=5, seed=seed).ranks["z"],
    "generate": lambda *pair, seed: mm.generate(*pair, seed=seed)["x"],
    "posterior_draws": lambda *pair, seed: mm.posterior_draws(*pair, seed=seed, resample=True)["z"],
}


@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_is_any_integer(name):
    run = lambda seed: SEEDED[name](*pair(), seed=seed)  # noqa: E731
    for seed in (-1, 2**64, 2**80 + 3):
        assert torch.equal(run(seed), run(seed))
    for same in (np.int64(3), np.array(3), torch.tensor(3)):
        assert torch.equal(run(same), run(3))
    for wrong in (3.0, torch.tensor(3.0), "3"):
        with pytest.raises(TypeError, match="integer"):
            run(wrong)


def test_seeds_are_kept_as_they_are_where_every_generator_takes_them():
    assert [normalize_seed(seed) for seed in (0, 5, 2**62 - 1, -1)] == [0, 5, 2**62 - 1, 2**62 - 1]
    assert len({normalize_seed(None) for _ in range(100)}) == 100 and math.log2(normalize_seed(None)) < 62
