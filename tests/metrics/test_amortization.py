"""The gap of a guide and its two parts against closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import kl_divergence

import pyro_mm as mm

gap_of = mm.metrics.amortization_gap


@pytest.fixture
def linear(double):
    """A linear-Gaussian story, 12 rows, and the cost of the best diagonal Normal: the mean-field gap."""
    torch.manual_seed(0)
    model = mm.models.LinearGaussian({"a": torch.randn(3, 4), "b": torch.randn(5, 4)}, noise=0.7)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, model.sample(12)


def mean_field_gap(model, batch):
    precision = model.posterior(batch).precision_matrix
    return 0.5 * (precision.diagonal(dim1=-2, dim2=-1).log().sum(-1) - torch.logdet(precision))


def off_optimum(model, shift, widen):
    """Return a guide with the best diagonal Normal's deviations times a factor, and its mean shifted."""

    def posterior(batch):
        q = model.posterior(batch)
        deviation = q.precision_matrix.diagonal(dim1=-2, dim2=-1).rsqrt()
        return dist.Normal(q.mean + shift * deviation, widen * deviation).to_event(1)

    return posterior


def elbo_of(posterior, model, batch):
    q, p = posterior(batch), model.posterior(batch)
    full = dist.MultivariateNormal(q.mean, torch.diag_embed(q.variance.expand_as(q.mean)))
    return model.log_prob(batch) - kl_divergence(full, p)


def test_both_parts_of_a_diagonal_guide_in_closed_form(linear):
    model, batch = linear
    posterior = off_optimum(model, 0.4, 1.2)
    found = gap_of(model, mm.Guide(z=posterior), batch, seed=0)
    assert found.family == "diagonal" and found.of_guide and len(found) == 12
    exact = {"approximation": mean_field_gap(model, batch), "total": model.log_prob(batch)}
    exact["total"] = exact["total"] - elbo_of(posterior, model, batch)
    exact["amortization"] = exact["total"] - exact["approximation"]
    for name, value in exact.items():
        error = getattr(found, f"{name}_error")
        # the fit's own excess over the optimum, 0.01 nats here, comes on top of the errors by the draws
        assert ((getattr(found, name) - value).abs() < 4.5 * error + 0.01).all(), name
        mean, mean_error = found.mean()[name]
        assert abs(mean - value.mean()) < 4 * mean_error + 0.01, name
        assert mean_error < error.mean() / 2


def test_the_encoder_costs_nothing_at_the_optimum(linear):
    """Paired draws: the difference has a far smaller error than either term."""
    model, batch = linear
    found = gap_of(model, mm.Guide(z=off_optimum(model, 0.0, 1.0)), batch, seed=1)
    assert found.amortization.abs().max() < 0.02
    assert found.amortization_error.max() < 0.1 * found.elbo_error.min()
    exact = gap_of(model, mm.Guide(z=model.posterior), batch, seed=1)
    assert exact.family == "full" and exact.of_guide
    assert exact.elbo_error.max() < 1e-6
    assert (exact.approximation.abs() < 4.5 * exact.approximation_error + 1e-9).all()


def test_missing_modalities_have_posteriors_of_their_own(linear):
    model, batch = linear
    present = {"a": torch.arange(12) % 3 > 0, "b": torch.arange(12) % 3 != 1}
    present["b"][3] = False
    rows = mm.Batch({n: batch[n] for n in batch.names}, present)
    found = gap_of(model, mm.Guide(z=off_optimum(model, 0.3, 1.0)), rows, seed=0)
    empty = ~rows.having()
    assert empty.sum() == 1 and found.total[empty].abs().max() == 0 and found.amortization[empty].abs().max() == 0
    exact = mean_field_gap(model, rows)
    assert ((found.approximation - exact).abs() < 4.5 * found.approximation_error + 0.01)[~empty].all()
    assert found.evidence.rows_text == "11 of 12 rows"
    mean = found.mean()["approximation"]
    assert mean[0] == pytest.approx(found.approximation[~empty].mean().item())


def test_a_guide_of_another_family_is_compared_with_full_covariance(linear):
    model, batch = linear

    def mixture(batch):
        q = off_optimum(model, 0.0, 1.0)(batch)
        parts = dist.Normal(q.mean[:, None] + torch.tensor([[-0.2], [0.2]]), q.stddev[:, None]).to_event(1)
        return mm.distributions.Mixture(parts, torch.zeros(2))

    found = gap_of(model, mm.Guide(z=mixture), batch, num_particles=300, seed=0)
    assert found.family == "full" and not found.of_guide and "not the guide's family" in repr(found)
    assert found.approximation.abs().max() < 0.02 + 4.5 * found.approximation_error.max()
    wide = gap_of(model, mm.Guide(z=off_optimum(model, 0.2, 1.0)), batch, family="full", num_particles=300, seed=0)
    assert wide.of_guide and wide.family == "full" and wide.amortization.min() > 0
    narrow = gap_of(model, mm.Guide(z=model.posterior), batch, family="diagonal", num_particles=300, seed=0)
    assert not narrow.of_guide and narrow.mean()["amortization"][0] == pytest.approx(
        -mean_field_gap(model, batch).mean().item(), abs=0.05
    )


def test_a_latent_given_another_one_is_no_diagonal_normal(double):
    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            batch.observe("x", dist.Normal(w, 1.0))

    def chained(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(batch["x"] / 3, math.sqrt(2 / 3)))
            pyro.sample("w", dist.Normal((batch["x"] + z) / 2, math.sqrt(0.5)))

    batch = mm.Batch({"x": torch.tensor([0.5, -1.0])})
    found = gap_of(story, chained, batch, seed=0)
    assert not found.of_guide and found.amortization.abs().max() < 0.01
    assert (found.total.abs() < 4.5 * found.total_error + 1e-9).all()


def test_a_positive_latent_and_a_plate_within_a_row(double):
    """LogNormal is a diagonal Normal in unconstrained coordinates: log s has a Normal prior and likelihood."""

    def story(batch):
        with batch.plate():
            with pyro.plate("parts", 3, dim=-2):
                s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            total = s.log().sum(-2, keepdim=True)
            batch.observe("x", dist.Normal(total, 0.5))

    # precision I + 4 11', so that the best diagonal Normal has precision 5 in each coordinate
    precision = torch.eye(3) + 4.0
    x = torch.tensor([1.0, -0.4])
    mean = torch.linalg.solve(precision, 4 * x[None].expand(3, 2))

    def guide(batch):
        with batch.plate(), pyro.plate("parts", 3, dim=-2):
            pyro.sample("s", dist.LogNormal(mean + 0.1, 5**-0.5))

    found = gap_of(story, guide, mm.Batch({"x": x}), num_particles=2000, seed=0)
    assert found.family == "diagonal" and found.of_guide
    approximation = 0.5 * (3 * math.log(5) - torch.logdet(precision))
    amortization = 0.5 * 0.01 * precision.sum()
    assert ((found.approximation - approximation).abs() < 4.5 * found.approximation_error + 0.01).all()
    assert ((found.amortization - amortization).abs() < 4.5 * found.amortization_error + 0.01).all()


def test_classes_are_summed_out_and_global_latents_given(double):
    def story(batch):
        shift = pyro.sample("shift", dist.Normal(0.0, 1.0))
        with batch.plate():
            y = pyro.sample("y", dist.Bernoulli(0.5))
            z = pyro.sample("z", dist.Normal(0.2 * y, 1.0))
            batch.observe("x", dist.Normal(z + shift, 1.0))

    def guide(batch):
        pyro.sample("shift", dist.Normal(0.5, 0.05))
        with batch.plate():
            pyro.sample("z", dist.Normal(batch["x"] / 2, 0.6))

    found = gap_of(story, guide, mm.Batch({"x": torch.tensor([0.5, 2.0])}), seed=0)
    # given the shift at 0.5 the posterior is all but the Normal N((x - 0.4) / 2, 1/2): the class moves it by 0.05
    exact = kl_divergence(dist.Normal(torch.tensor([0.25, 1.0]), 0.6), dist.Normal(torch.tensor([0.05, 0.8]), 0.5**0.5))
    assert ((found.total - exact).abs() < 4.5 * found.total_error + 0.02).all()
    assert ((found.amortization - exact).abs() < 4.5 * found.amortization_error + 0.02).all()
    assert "'shift'" in repr(found)


def test_single_runs_single_precision_and_refusals(linear):
    model, batch = linear
    guide = mm.Guide(z=off_optimum(model, 0.2, 1.0))
    least = {"num_particles": 20, "rounds": 2, "seed": 0, "proposal": None}
    one = gap_of(model, guide, batch[:2], vectorize=False, **least)
    assert one.total.isfinite().all()
    with pytest.raises(ValueError, match="num_particles >= 2"):
        gap_of(model, guide, batch, num_particles=1)
    with pytest.raises(ValueError, match="family to be one of 'diagonal', 'full'"):
        gap_of(model, guide, batch, family="flow")

    def discrete(batch):
        with batch.plate():
            pyro.sample("z", dist.Poisson(1.0))

    def counts(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Poisson(1.0))
            batch.observe("a", dist.Normal(z[..., None].expand(*z.shape, 3), 1.0).to_event(1))

    with pytest.raises(ValueError, match="'z' is discrete"):
        gap_of(counts, discrete, batch.only("a"), proposal=None)


def test_a_fit_that_has_settled_does_not_move_on_by_its_noise(double):
    """A decoder that is not linear, whose gradients differ from point to point: 8 rounds and 60 find one optimum."""
    torch.manual_seed(3)
    decoder = mm.conditionals.Normal(mm.nn.MLP(8, 30, (40,)), scale=0.3)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(3.0)
    model = mm.models.SharedLatent(dist.Normal(torch.zeros(8), 1.0).to_event(1), {"x": decoder})
    rows, latents = mm.simulate(model, mm.Batch({"x": torch.zeros(20, 30)}))
    batch = mm.Batch({"x": rows["x"]}, covariates={"truth": latents["z"]})
    guide = mm.Guide(z=lambda batch: dist.Normal(batch.covariates["truth"], 0.3).to_event(1))
    found = [gap_of(model, guide, batch, rounds=r, num_particles=400, seed=0).mean() for r in (8, 60)]
    assert abs(found[0]["approximation"][0] - found[1]["approximation"][0]) < 0.02
    assert found[1]["amortization"][0] > found[0]["amortization"][0] - 0.02
