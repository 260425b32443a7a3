"""Likelihoods of random rows equal those by SciPy, row by row, whatever the rows are beside; or an error is ours."""

import numpy as np
import torch
from hypothesis import strategies as st
from scipy import stats

import pyro_mm as mm
from tests.support.properties import for_all, generator, seeds
from tests.support.random_batches import rows
from tests.support.random_stories import no_guide, story_of, subsets


def close(found, expected, tolerance=1e-4):
    found = found.detach().double().numpy()
    return np.allclose(found, expected, rtol=tolerance, atol=tolerance)


dtypes = st.sampled_from([torch.float32, torch.float64])


@for_all(data=rows(), seed=seeds, dtype=dtypes, choice=st.data())
def test_likelihoods_of_classes_are_those_by_scipy(data, seed, dtype, choice):
    story, batch = story_of(data, generator(seed), dtype), data.batch()
    evidence = mm.log_marginal(story, no_guide, batch, num_particles=2, seed=0)
    assert close(evidence.log_prob, story.log_marginal(data, data.names))
    assert close(evidence.standard_error, 0.0, 1e-6)
    weights = mm.log_weights(story, no_guide, batch, num_particles=2)
    assert close(weights, [story.log_marginal(data, data.names)] * 2)

    shown = choice.draw(st.sampled_from(subsets(data.names)))
    rest = [name for name in data.names if name not in shown]
    assert close(mm.log_marginal(story, no_guide, batch.only(*shown)).log_prob, story.log_marginal(data, shown))
    if rest:
        found = mm.log_conditional(story, no_guide, batch, target=rest, given=shown, num_particles=2)
        expected = story.log_marginal(data, data.names) - story.log_marginal(data, shown)
        nothing = ~np.stack([data.present(n) for n in rest]).any(0)
        assert close(found.log_prob, expected)
        assert close(found.log_prob[torch.tensor(nothing)], 0.0, 1e-6)


@for_all(
    data=rows(kinds=["real"], most=3, covariates=False), seed=seeds, choice=st.data(), chunk=st.sampled_from([None, 7])
)
def test_likelihoods_of_a_linear_story_are_those_of_normals(data, seed, choice, chunk):
    """An exact posterior makes every weight the evidence; rows may be permuted, and stand beside any others."""
    rng = generator(seed)
    latent = int(rng.integers(1, 3))
    sizes = {name: int(np.prod(column.event)) for name, column in data.columns.items()}
    loadings = {name: rng.normal(size=(d, latent)) for name, d in sizes.items()}
    model = mm.models.LinearGaussian({n: torch.tensor(w) for n, w in loadings.items()}, noise=0.8)
    batch = data.batch()
    flat = {n: batch[n].reshape(data.size, -1) for n in data.names if batch.holds(n)}
    batch = mm.Batch(flat, {n: batch.present[n] for n in flat})
    keys = choice.draw(st.lists(st.integers(0, data.size - 1), min_size=1, max_size=data.size + 2))
    found = mm.log_marginal(model, mm.Guide(z=model.posterior), batch[keys], num_particles=3, seed=0, chunk=chunk)

    expected = np.zeros(len(keys))
    for i, row in enumerate(keys):
        names = [n for n in flat if data.present(n)[row]]
        if names:
            w = np.concatenate([loadings[n] for n in names])
            x = np.concatenate([data.columns[n].values[row].reshape(-1) for n in names])
            expected[i] = stats.multivariate_normal(np.zeros(len(x)), w @ w.T + 0.64 * np.eye(len(x))).logpdf(x)
    assert close(found.log_prob, expected)
    assert close(model.log_prob(batch[keys]), expected)
