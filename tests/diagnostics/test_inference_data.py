"""ArviZ's data: draws, data and likelihoods of a pair."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm.diagnostics.inference_data import to_arviz
from tests.support.linear_gaussian import oracle

tables, E = mm.objectives, mm.estimators


def test_arviz_has_the_draws_and_the_data(double):
    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            batch.observe("x", lambda z: dist.Normal(z, 1e-9).to_event(1), z)
            batch.observe("n", lambda z: dist.Poisson(z[..., 0].exp()), z)

    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"x": mm.conditionals.Normal(mm.nn.MLP(2, 4, (8,)))}))
    there = torch.tensor([True, True, False, True])
    batch = mm.Batch(
        {"x": torch.randn(4, 2), "n": torch.tensor([1, 2, 3, 4])},
        present={"x": there, "n": torch.tensor([True, False, False, True])},
        covariates={"dose": torch.arange(4.0)},
    )
    evidence = mm.log_marginal(story, guide, batch, num_particles=50, seed=0)
    data = to_arviz(story, guide, batch, num_samples=600, evidence=evidence, seed=0, prior=True)
    for group, latent in (("posterior", "z"), ("prior", "z"), ("posterior_predictive", "x"), ("prior_predictive", "x")):
        assert data[group][latent].dims == ("chain", "draw", "row", f"{latent}_dim_0")
        assert data[group][latent].shape == (1, 600, 4, 2)
    # of the same latents, whether the modality is there or not
    for one, other in (("posterior", "posterior_predictive"), ("prior", "prior_predictive")):
        np.testing.assert_allclose(data[one]["z"].values, data[other]["x"].values, atol=1e-7)
    values, constant = data["observed_data"], data["constant_data"]
    np.testing.assert_array_equal(values["x"].values[there], batch["x"][there])
    assert np.isnan(values["x"].values[2]).all() and values["n"].dims == ("row",)
    assert values["n"].dtype.kind == "i" and constant["n_present"].values.tolist() == [True, False, False, True]
    assert constant["x_present"].values.tolist() == there.tolist() and constant["dose"].values.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(data["log_likelihood"]["log p(x, n)"].values[0, 0], evidence.log_prob)
    np.testing.assert_array_equal(data["sample_stats"]["pareto_k"].values[0, 0], evidence.pareto_k)
    assert data["posterior"]["row"].values.tolist() == [0, 1, 2, 3]
    # a row that has nothing is of the prior, as are all of them in the prior: moments within 4.5 standard errors
    for draws in (data["posterior"]["z"].values[0, :, 2], data["prior"]["z"].values[0, :, 0]):
        assert np.abs(draws.mean(0)).max() < 4.5 / 600**0.5 and np.abs(draws.var(0) - 1).max() < 4.5 * (2 / 600) ** 0.5
    with torch.no_grad():
        exact = guide.posteriors["z"](batch).base_dist
    draws = data["posterior"]["z"].values[0, :, there.numpy()]
    apart = (draws.mean(1) - exact.loc[there].numpy()) / exact.scale[there].numpy()
    assert np.abs(apart).max() < 4.5 / 600**0.5
    again = to_arviz(story, guide, batch, num_samples=600, seed=0)
    np.testing.assert_array_equal(again["posterior"]["z"].values, data["posterior"]["z"].values)
    with pytest.raises(ValueError, match="the batch's 4 rows, got one of 2"):
        to_arviz(story, guide, batch, evidence=evidence[:2])


@pytest.mark.parametrize("num_samples", [1, 3])
def test_arviz_with_plates_in_a_row_and_what_is_hidden(num_samples, tmp_path):
    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            with pyro.plate("parts", 5, dim=-2):
                pyro.sample("w", dist.Normal(0.0, 1.0))
            batch.observe("x", lambda z, c: dist.Normal(z.sum(-1) + c, 1.0), z, c)
            batch.observe("y", dist.Normal(torch.zeros(()), 1.0).expand([len(batch)]))

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).expand([len(batch)]))
            with pyro.plate("parts", 5, dim=-2):
                pyro.sample("w", dist.Normal(torch.zeros(5, len(batch)), 1.0))

    batch = mm.Batch({"x": torch.randn(4), "y": torch.randn(4)}).only("x")
    data = to_arviz(story, guide, batch, num_samples=num_samples)
    shapes = {name: x.shape for name, x in data["posterior"].data_vars.items()}
    assert shapes == {"z": (1, num_samples, 4, 2), "c": (1, num_samples, 4), "w": (1, num_samples, 4, 5)}
    assert set(data["observed_data"].data_vars) == {"x"}, "what is hidden is not handed out"
    assert set(data["posterior_predictive"].data_vars) == {"x", "y"}
    data.to_netcdf(str(tmp_path / "data.nc"))


def test_arviz_takes_stories_that_do_not_broadcast():
    """Rows are this story's first dimension. Samples one by one, their modalities with the latents handed out."""

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            batch.observe("x", lambda z: dist.Normal(z[:, 0], 1e-6), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    batch = mm.Batch({"x": torch.randn(4)})
    data = to_arviz(story, guide, batch, num_samples=5, seed=0, prior=True, vectorize=False)
    for group in ("posterior", "prior"):
        z, x = data[group]["z"].values, data[f"{group}_predictive"]["x"].values
        assert z.shape == (1, 5, 4, 2) and len(np.unique(z)) == 40
        np.testing.assert_allclose(x, z[..., 0], atol=1e-4)
    data = to_arviz(story, guide, batch, num_samples=5, resample=True, vectorize=False)
    assert data["posterior"]["z"].shape == (1, 5, 4, 2)


def test_resampled_draws_are_nearer_to_the_posterior(double):
    model = oracle(2, latent=1).requires_grad_(False)
    batch = model.sample(3)
    wide = mm.Guide(z=lambda rows: dist.Normal(torch.zeros(rows.size, 1), 2.0).to_event(1))
    data = to_arviz(model, wide, batch, num_samples=400, resample=True, seed=0)
    draws, exact = data["posterior"]["z"].values[0, :, :, 0], model.posterior(batch)
    # 400 of 1000 draws by weight, with some hundred effective ones: 5 standard errors of 100
    apart = (draws.mean(0) - exact.loc[:, 0].numpy()) / exact.stddev[:, 0].numpy()
    assert np.abs(apart).max() < 0.5
