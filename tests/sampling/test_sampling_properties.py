"""A row's encoding, draws and weights depend on what it has, not on other rows, on its place, or on what it lacks."""

import numpy as np
import torch
from hypothesis import strategies as st

import pyro_mm as mm
from tests.support.properties import for_all, generator, seeds
from tests.support.random_batches import rows, values_of
from tests.support.random_stories import POSTERIORS, latent_pair

RECTANGULAR = ["real", "bits", "classes"]  # counts are drawn by rejection, with as many numbers as it takes


def change_rows(data, batch, kept, seed):
    """Return a batch with other values in all rows but one, and with other ones where it lacks a modality."""
    values = {}
    rng = generator(seed)
    for name, column in data.columns.items():
        if not batch.holds(name):  # a mixture has fewer components then, and other draws of one distribution
            values[name] = None
            continue
        new = values_of(column.kind, column.event, data.size, rng)
        if not column.missing[kept]:
            new[kept] = column.values[kept]
        values[name] = torch.tensor(new).to(data.dtypes[name])
    return mm.Batch(values, batch.present)


def close(one, other):
    return torch.allclose(one.double(), other.double(), rtol=1e-4, atol=1e-5)


@for_all(
    data=rows(kinds=RECTANGULAR, most=2, size=st.integers(1, 5), covariates=False),
    posterior=st.sampled_from(sorted(POSTERIORS)),
    seed=seeds,
    choice=st.data(),
)
def test_a_row_does_not_depend_on_others(data, posterior, seed, choice):
    batch, row = data.batch(), choice.draw(st.integers(0, data.size - 1))
    other = change_rows(data, batch, row, seed)
    model, guide = latent_pair(data, posterior)

    def answers(rows):
        q = mm.encode(guide, rows)["z"]
        samples = mm.generate(model, guide, rows, 2, seed=1)
        resampled = mm.posterior_draws(model, guide, rows, 2, resample=True, num_particles=4, seed=1)["z"]
        return {
            "mean": q.mean,
            "deviation": q.stddev,
            "resampled": resampled.movedim(1, 0),
            "log p": mm.log_marginal(model, guide, rows, num_particles=3, seed=1).log_prob,
            **{f"sample of {name}": x.movedim(1, 0) for name, x in samples.items()},
        }

    found, expected = answers(other), answers(batch)
    for what, value in expected.items():
        assert bool(value.isfinite().all()) and len(value) == data.size, what
        assert close(found[what][row], value[row]), what
    if not any(data.present(name)[row] for name in data.names):
        assert abs(float(expected["log p"][row])) < 1e-12
    for name, column in data.columns.items():
        drawn = expected[f"sample of {name}"]
        assert drawn.shape == (data.size, 2, *column.event)
        assert column.kind == "real" or bool((drawn >= 0).all())


@for_all(
    data=rows(kinds=RECTANGULAR, most=3, covariates=False),
    posterior=st.sampled_from(sorted(POSTERIORS)),
    choice=st.data(),
)
def test_encodings_are_permuted_with_the_rows(data, posterior, choice):
    batch = data.batch()
    _, guide = latent_pair(data, posterior)
    keys = choice.draw(st.lists(st.integers(0, data.size - 1), min_size=1, max_size=data.size + 2))
    whole, part = mm.encode(guide, batch)["z"], mm.encode(guide, batch[keys])["z"]
    point = torch.randn(2)
    for found, expected in (
        (part.mean, whole.mean),
        (part.stddev, whole.stddev),
        (part.log_prob(point), whole.log_prob(point)),
    ):
        assert bool(expected.isfinite().all()) and close(found, expected[keys])
    nothing = np.stack([~data.present(n) for n in data.names]).all(0)
    if "without" not in posterior and "product" in posterior:
        assert close(whole.mean[torch.tensor(nothing)], torch.zeros(int(nothing.sum()), 2))
