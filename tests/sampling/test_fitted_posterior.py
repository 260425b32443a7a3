"""Normals fitted to posteriors, as distributions of latents, against closed forms."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints, kl_divergence

import pyro_mm as mm


@pytest.fixture
def linear(double):
    torch.manual_seed(0)
    model = mm.models.LinearGaussian({"a": torch.randn(3, 4), "b": torch.randn(5, 4) * 2}, noise=0.5)
    return model, model.sample(9)


def beside(batch):
    return dist.Normal(torch.ones(batch.size, 4), 0.3).to_event(1)


def test_a_normal_posterior_is_found_from_a_bad_guide(linear):
    model, batch = linear
    rows = mm.Batch({n: batch[n] for n in batch.names}, {"a": torch.arange(9) > 1, "b": torch.arange(9) != 4})
    found = mm.encode(mm.Guide(z=beside), rows, model=model, fitted=True, seed=0)
    assert isinstance(found["z"], dist.MultivariateNormal) and found["z"].batch_shape == (9,)
    distance = kl_divergence(found["z"], model.posterior(rows))
    assert distance.max() < 0.02 and distance.median() < 1e-9  # the row that is farthest has just arrived
    assert not found.failed.any()
    draws = found.sample(4000, seed=1)["z"]
    assert draws.shape == (4000, 9, 4)
    assert torch.equal(draws, found.sample(4000, seed=1)["z"])
    assert ((draws.mean(0) - found["z"].mean) / found["z"].stddev).abs().max() < 4.5 / 4000**0.5


def test_more_rows_than_are_fitted_at_once(linear):
    model, _ = linear
    batch = model.sample(300)
    guide = mm.Guide(z=model.posterior)
    found = mm.encode(guide, batch, model=model, fitted=mm.Fitted(rounds=4, draws=16), seed=0)
    assert found["z"].mean.shape == (300, 4)
    assert (found["z"].mean - model.posterior(batch).mean).abs().max() < 0.02


def of_all_kinds(batch):
    """A positive latent in a plate within the row, a simplex, a vector and a number; and a class that is summed out."""
    with batch.plate():
        y = pyro.sample("y", dist.Bernoulli(0.5))
        with pyro.plate("parts", 2, dim=-2):
            s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        p = pyro.sample("p", dist.Dirichlet(torch.ones(3) * 4))
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        v = pyro.sample("v", dist.Normal(0.1 * y, 1.0))
        batch.observe("x", dist.Normal(v + z.sum(-1) + s.log().sum(-2, keepdim=True), 1.0))
        batch.observe("k", dist.Categorical(p))


def guide_of_all_kinds(batch):
    with batch.plate():
        with pyro.plate("parts", 2, dim=-2):
            pyro.sample("s", dist.LogNormal(0.1, 0.6))
        pyro.sample("p", dist.Dirichlet(torch.ones(3) * 3))
        pyro.sample("z", dist.Normal(torch.zeros(2), 1.2).to_event(1))
        pyro.sample("v", dist.Normal(0.0, 1.2))


def test_marginals_have_the_support_of_their_site_and_draws_their_correlation(double):
    batch = mm.Batch({"x": torch.tensor([2.0, -1.0, 0.5]), "k": torch.tensor([0, 1, 2])})
    found = mm.encode(guide_of_all_kinds, batch, model=of_all_kinds, fitted=True, seed=0)
    assert list(found) == ["s", "p", "z", "v"]
    assert [(*d.batch_shape, "|", *d.event_shape) for d in found.values()] == [
        (2, 3, "|"), (3, "|", 3), (3, "|", 2), (3, "|"),
    ]  # fmt: skip
    assert found["s"].support == constraints.positive and isinstance(found["v"], dist.Normal)
    draws = found.sample(20_000, seed=0)
    assert {name: x.shape[1:] for name, x in draws.items()} == {"s": (3, 2), "p": (3, 3), "z": (3, 2), "v": (3,)}
    assert draws["s"].min() > 0 and torch.allclose(draws["p"].sum(-1), torch.ones(20_000, 3))

    # (v, z, log s): prior precision 1 (4 in log s), and the likelihood's 1 in the direction of their sum; all is Normal
    # but for the class, which moves the mean of v by 0.05
    precision = torch.diag(torch.tensor([1.0, 1.0, 1.0, 4.0, 4.0])) + 1.0
    u = torch.cat([draws["v"][..., None], draws["z"], draws["s"].log()], -1)
    covariance = torch.linalg.inv(precision)
    for n in range(3):
        assert (torch.cov(u[:, n].T) - covariance).abs().max() < 0.03
        mean = covariance @ (batch["x"][n] * torch.ones(5) + torch.tensor([0.05, 0, 0, 0, 0]))
        assert (u[:, n].mean(0) - mean).abs().max() < 0.04
    assert (found["v"].stddev - covariance[0, 0].sqrt()).abs().max() < 0.01
    mean = found["s"].base_dist.loc  # of log s, (plates, rows)
    assert (mean.T - u.mean(0)[:, 3:]).abs().max() < 0.02
    # of the Dirichlet posterior's draws the class that was seen has the largest mean
    assert torch.equal(found["p"].sample((2000,)).mean(0).argmax(-1), batch["k"])


def test_several_normals_find_two_modes(double):
    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe("x", dist.Normal(z.square(), 0.2))

    guide = mm.Guide(z=lambda batch: dist.Normal(torch.zeros(batch.size), 1.0))
    batch = mm.Batch({"x": torch.tensor([1.0, 2.0])})
    found = mm.encode(guide, batch, model=story, fitted=mm.Fitted(components=2, rounds=20), seed=0)
    draws = found.sample(4000, seed=0)["z"]
    assert (draws.square().mean(0) - batch["x"]).abs().max() < 0.15
    assert ((draws > 0).double().mean(0) - 0.5).abs().max() < 0.1
    assert found["z"].log_prob(torch.tensor([1.0, 1.4])).isfinite().all()


def test_a_latent_that_all_rows_share_stays_the_guides(double):
    def story(batch):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with batch.plate():
            z = pyro.sample("z", dist.Normal(m, 1.0))
            batch.observe("x", dist.Normal(z, 1.0))

    def guide(batch):
        pyro.sample("m", dist.Normal(0.4, 0.1))
        with batch.plate():
            pyro.sample("z", dist.Normal(batch["x"], 2.0))

    batch = mm.Batch({"x": torch.tensor([1.0, -2.0])})
    found = mm.encode(guide, batch, model=story, fitted=True, seed=0)
    assert found["m"].mean == 0.4 and set(found.sample(2)) == {"z"}
    assert (found["z"].mean - (batch["x"] + 0.4) / 2).abs().max() < 0.03
    assert (found["z"].stddev - 0.5**0.5).abs().max() < 0.01


def test_what_is_not_informed_stays_at_the_guide(double):
    model, guide = private_pair()
    values = {"a": torch.randn(3, 2), "b": torch.randn(3, 2)}
    batch = mm.Batch(values, {"a": [True, False, False], "b": [True, True, False]})
    found, plain = mm.encode(guide, batch, model=model, fitted=True, seed=0), mm.encode(guide, batch)
    assert (found["w_a"].mean - plain["w_a"].mean)[1:].abs().max() < 0.5
    assert (found["z"].mean - plain["z"].mean)[2].abs().max() < 0.5
    assert all(x.isfinite().all() for x in found.sample(5).values())


def private_pair():
    unit = dist.Normal(torch.zeros(1), 1.0).to_event(1)

    class Sum(torch.nn.Module):
        def forward(self, z, w):
            return dist.Normal((z + w).expand(*(z + w).shape[:-1], 2), 1.0).to_event(1)

    model = mm.models.PrivateLatents(unit, {"a": unit, "b": unit}, {"a": Sum(), "b": Sum()})
    site = lambda batch: dist.Normal(torch.full((batch.size, 1), 0.2), 0.8).to_event(1)  # noqa: E731
    return model, mm.Guide(z=site, w_a=site, w_b=site)


def test_what_is_asked_has_to_be_whole(linear):
    model, batch = linear
    guide = mm.Guide(z=beside)
    with pytest.raises(ValueError, match=r"expected a model with fitted, .* pass model="):
        mm.encode(guide, batch, fitted=True)
    with pytest.raises(ValueError, match=r"model is for a fit, .* pass fitted=True too"):
        mm.encode(guide, batch, model=model)
    with pytest.raises(TypeError, match=r"fitted to be True, False or a pyro_mm.Fitted, got 'yes'"):
        mm.encode(guide, batch, model=model, fitted="yes")
    assert isinstance(mm.encode(guide, batch)["z"], dist.Independent)
