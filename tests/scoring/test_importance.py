"""Log importance weights: exact at the exact posterior, and summed over what is discrete."""

from functools import reduce

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm.scoring.reduction import sum_out
from tests.support.linear_gaussian import encoders, every_pattern, oracle


@pytest.mark.parametrize("modalities", [1, 2, 5])
def test_every_weight_of_the_exact_posterior_is_the_evidence(modalities, double):
    model = oracle(modalities)
    batch = every_pattern(model, rows=1)
    log_w = mm.log_weights(model, mm.Guide(z=model.posterior), batch, 7)
    assert log_w.shape == (7, batch.size)
    torch.testing.assert_close(log_w, model.log_prob(batch).expand(7, -1), rtol=1e-12, atol=1e-12)
    assert (log_w[:, 0] == 0).all(), "a row with nothing present"


def test_linear_gaussian_agrees_with_a_dense_normal(double):
    model = oracle(3)
    batch = every_pattern(model, rows=1)
    for row in range(1, batch.size):
        names = [n for n in batch.names if batch.present[n][row]]
        w = torch.cat([model.loadings[n] for n in names])
        noise = torch.cat([(2 * model.log_noise[n]).exp().expand(len(model.loadings[n])) for n in names])
        joint = dist.MultivariateNormal(torch.cat([model.offsets[n] for n in names]), w @ w.T + noise.diag())
        expected = joint.log_prob(torch.cat([batch[n][row] for n in names]))
        torch.testing.assert_close(model.log_prob(batch)[row], expected, rtol=1e-11, atol=0)
    given = model.log_conditional(batch, ["x0"], ["x1"])
    torch.testing.assert_close(given, model.log_prob(batch.only("x0", "x1")) - model.log_prob(batch.only("x1")))


def test_rows_do_not_mix(double):
    """A row's weights depend on its own values only: changing the others changes nothing."""
    model = oracle(2)
    for posterior in (mm.posteriors.ProductOfExperts, mm.posteriors.MixtureOfExperts, mm.posteriors.MixtureOfProducts):
        guide = mm.Guide(z=posterior(encoders(model)))
        a, b = model.sample(4), model.sample(4)
        mixed = mm.Batch({n: torch.cat([a[n][:2], b[n][2:]]) for n in a.names})
        torch.manual_seed(0)
        first = mm.log_weights(model, guide, a, 6)
        torch.manual_seed(0)
        second = mm.log_weights(model, guide, mixed, 6)
        torch.testing.assert_close(first[:, :2], second[:, :2], rtol=1e-12, atol=0)
        assert (first[:, 2:] != second[:, 2:]).all()


def test_sum_out_is_a_brute_force_sum(double):
    shapes = [(4,), (2, 1, 4), (3, 1, 1, 4), (3, 2, 5, 4), (2, 5, 1), (5, 4)]
    factors = [torch.randn(s) for s in shapes]
    expected = reduce(torch.add, factors).exp().sum((0, 1, 2)).log()
    torch.testing.assert_close(sum_out(factors, -2), expected, rtol=1e-12, atol=0)


def test_private_latents_of_modalities_not_decoded_do_not_count(double):
    names, wide = ["a", "b"], {"a": 3, "b": 2}
    model = mm.models.PrivateLatents(
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        {n: dist.Normal(torch.zeros(2), 1.0).to_event(1) for n in names},
        {n: mm.conditionals.Normal(mm.nn.MLP(4, d, (8,)), scale=0.5) for n, d in wide.items()},
    )
    encoder = lambda d: mm.conditionals.Normal(mm.nn.MLP(d, 4, (8,)))  # noqa: E731
    guide = mm.Guide(
        z=mm.posteriors.ProductOfExperts({n: encoder(d) for n, d in wide.items()}),
        w_a=mm.posteriors.Private("a", encoder(3)),
        w_b=mm.posteriors.Private("b", encoder(2), missing=dist.Normal(torch.full((2,), 3.0), 0.1).to_event(1)),
    )
    batch = mm.Batch({n: torch.randn(5, d) for n, d in wide.items()})
    torch.manual_seed(0)
    with_b_missing = mm.log_weights(model, guide, batch.only("a"), 4)
    # whatever stands in for w_b: it is in no density when b is not decoded
    guide.posteriors["w_b"].missing = mm.conditionals.unconditional.Unconditional(
        dist.Normal(torch.full((2,), -9.0), 5.0).to_event(1)
    )
    torch.manual_seed(0)
    torch.testing.assert_close(mm.log_weights(model, guide, batch.only("a"), 4), with_b_missing, rtol=1e-12, atol=0)


def test_a_modality_left_out_of_a_batch_is_one_that_is_missing(double):
    """With private latents too, whose stand-in is not the prior: neither counts where nothing decodes it."""
    prior, odd = (dist.Normal(torch.full((2,), loc), 1.0).to_event(1) for loc in (0.0, 5.0))
    model = mm.models.PrivateLatents(
        prior,
        {"a": prior, "b": prior},
        {n: mm.conditionals.Normal(mm.nn.MLP(4, d, (8,)), scale=0.5) for n, d in {"a": 3, "b": 2}.items()},
    )
    encoder = lambda d: mm.conditionals.Normal(mm.nn.MLP(d, 4, (8,)))  # noqa: E731
    private = {f"w_{n}": mm.posteriors.Private(n, encoder(d), missing=odd) for n, d in {"a": 3, "b": 2}.items()}
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"a": encoder(3), "b": encoder(2)}), **private)
    a, results = torch.randn(4, 3), []
    for batch in (
        mm.Batch({"a": a}),
        mm.Batch({"a": a, "b": None}),
        mm.Batch({"a": a, "b": torch.ones(4, 2)}).only("a"),
    ):
        torch.manual_seed(0)
        results.append(mm.log_weights(model, guide, batch, 3))
        torch.manual_seed(0)
        results.append(-mm.objectives.elbo(mm.estimators.IWAE(3)).differentiable_loss(model, guide, batch).expand(3, 4))
    for first, other in zip(results[:2] * 2, results[2:], strict=True):
        torch.testing.assert_close(first, other, rtol=1e-12, atol=0)


def test_sites_drawn_in_another_order_have_no_analytic_kl(double):
    """KL(q(z) || p(z | w)) with w drawn given z is no part of the bound: the KL comes from the draws instead."""

    def story(batch):
        with batch.plate():
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(2 * w, 0.5))
            batch.observe("x", dist.Normal(z, 1.0))

    def guide(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.5 * batch["x"], 0.7))
            pyro.sample("w", dist.Normal(0.4 * z, 0.6))

    batch = mm.Batch({"x": torch.randn(5)})
    losses = []
    for estimator in (mm.estimators.AnalyticKL(), mm.estimators.IWAE(1)):
        torch.manual_seed(0)
        losses.append(estimator.loss(story, guide, batch))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_an_observed_site_outside_the_data_plate_is_refused():
    def story(batch):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        pyro.sample("constraint", dist.Normal(scale, 1.0), obs=torch.tensor(1.0))
        with batch.plate():
            batch.observe("x", dist.Normal(0.0, scale))

    def guide(batch):
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))

    batch = mm.Batch({"x": torch.randn(3)})
    with pytest.raises(ValueError, match=r"'constraint' lies outside the plate 'data', .* observe it in"):
        mm.log_weights(story, guide, batch)


def test_a_continuous_latent_of_the_model_alone_comes_from_its_prior(double):
    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe("x", dist.Normal(z, 1.0))

    batch = mm.Batch({"x": torch.tensor([0.3, -1.0])})
    with pytest.warns(UserWarning, match="'z' is in the model and not in the guide"):
        log_w = mm.log_weights(story, lambda batch: None, batch, 200_000)
    expected = dist.Normal(0.0, 2.0**0.5).log_prob(batch["x"])
    # the weights lie between 0 and 0.4, so the standard error of the log is under 1e-3: five of them
    assert (log_w.logsumexp(0) - torch.tensor(200_000.0).log() - expected).abs().max() < 5e-3
