"""Annealed importance sampling against closed forms and quadrature, where importance sampling is off and says so."""

import math
import os

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm.evidence.annealing import AnnealingSettings, bound_both_ways, estimate_by_annealing
from pyro_mm.evidence.annealing_schedule import equal_variance_temperatures
from pyro_mm.evidence.annealing_target import TemperedDensity
from pyro_mm.evidence.hamiltonian import draw_momenta
from tests.support.chain import chain
from tests.support.linear_gaussian import every_pattern, oracle

LONG = bool(os.environ.get("PYRO_MM_LONG"))


@pytest.fixture
def linear(double):
    model = oracle(3, latent=2)
    for p in model.parameters():
        p.requires_grad_(False)
    torch.manual_seed(1)
    return model


def off(model, shift=1.5, scale=0.3):
    """A guide that is too narrow and beside the posterior."""

    def guide(batch):
        with batch.plate():
            loc = model.posterior(batch).mean + shift
            pyro.sample("z", dist.Normal(loc, scale).to_event(1).expand([len(batch)]))

    return guide


@pytest.mark.parametrize("start", ["guide", "prior"] if LONG else ["guide"])
def test_within_a_hundredth_of_a_nat_where_importance_sampling_is_off(start, linear):
    guide, batch = off(linear, 1.0), every_pattern(linear, rows=1)
    truth, some = linear.log_prob(batch), batch.rows
    plain = mm.log_marginal(linear, guide, batch, num_particles=10_000, seed=0)
    assert (plain.log_prob - truth)[some].abs().median() > 1
    assert (plain.pareto_k > 0.7)[some].all(), "and it says so"
    chains, largest = (30_000, 0.006) if LONG else (4000, 0.015)
    options = {"temperatures": 100} if LONG else {"temperatures": 60, "leapfrog_steps": 2}
    found = mm.annealed_importance(linear, guide, batch, num_chains=chains, start=start, seed=0, **options)
    error = (found.log_prob - truth).abs()
    # Of 7 rows none is off by four standard errors, but with probability 4e-4.
    assert found.standard_error.max() < largest and (error < 4 * found.standard_error + 1e-12).all()
    assert (error.max() if LONG else error.mean()) < 0.01
    assert (found.pareto_k < 0.7).all() and found.quantity == "log p(x0, x1, x2)"
    assert error[~some].eq(0).all() and found.standard_error[~some].max() < 1e-7, "rows with nothing present"


def test_a_fitted_start_needs_few_temperatures(linear):
    batch = every_pattern(linear, rows=3)
    guide, options = off(linear), {"num_chains": 64, "temperatures": 3, "seed": 0}
    found = mm.annealed_importance(linear, guide, batch, start="fitted", **options)
    error = (found.log_prob - linear.log_prob(batch)).abs()
    assert found.standard_error.max() < 0.1 and (error < 4.5 * found.standard_error + 1e-9).all()
    assert found.proposal == "annealing from a fitted Normal at 3 temperatures"
    # the fit, 20 pilot moves to warm up and 19 on, and 3 moves of 64 chains, of 5 steps from a point each
    assert found.gradients == 384 + 16 * (1 + 5 * 39) + 64 * (1 + 5 * 3)
    plain = mm.annealed_importance(linear, guide, batch, **options)
    assert plain.standard_error.max() > 0.3


def test_the_exact_posterior_needs_no_annealing(linear):
    batch = every_pattern(linear)
    found = mm.annealed_importance(linear, mm.Guide(z=linear.posterior), batch, num_chains=3, temperatures=5, seed=0)
    torch.testing.assert_close(found.log_prob, linear.log_prob(batch), rtol=0, atol=1e-10)


def test_the_sandwich_holds_the_truth(linear):
    """Rows drawn from the model: their evidence is known here, and lies between the two bounds."""
    batch = every_pattern(linear, rows=15 if LONG else 10, empty=False)
    guide = off(linear)
    for temperatures, widest in ((8, math.inf), (100, 0.1) if LONG else (60, 0.2)):
        options = {"num_chains": 24, "temperatures": temperatures, "leapfrog_steps": 5 if LONG else 2, "seed": 5}
        lower, upper = mm.bidirectional(linear, guide, batch, **options)
        with mm.utils.seeding.temporary_seed(5, batch.device):
            simulated, _ = mm.sampling.ancestral.simulate(linear, batch)
        truth = linear.log_prob(simulated)
        for below, above in ((lower.log_prob, truth), (truth, upper.log_prob)):
            gap = above - below
            assert gap.mean() > -3 * gap.std() / len(gap) ** 0.5, "fails with probability 1e-3 at a gap of zero"
        assert (upper.log_prob - lower.log_prob).mean() < widest
        if temperatures == 8:  # so few that both bounds are far off, and the sandwich shows it
            assert (truth - lower.log_prob).mean() > 0.1 and (upper.log_prob - truth).mean() > 0.1
    assert len(lower) == len(upper) == batch.size


def test_weights_are_unbiased_however_few_the_temperatures(linear):
    """E[w] = p(x), upwards, and E[w] = 1 / p(x) downwards from exact draws: at any number of temperatures."""
    batch = linear.sample(400)
    guide = off(linear, 0.7, 0.8)
    found = mm.annealed_importance(linear, guide, batch, num_chains=20, temperatures=6, leapfrog_steps=2, seed=3)
    ratio = (found.log_prob - linear.log_prob(batch)).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 20, "fails with probability 6e-5"
    _, upper = mm.bidirectional(linear, guide, batch, num_chains=20, temperatures=6, leapfrog_steps=2, seed=3)
    with mm.utils.seeding.temporary_seed(3, batch.device):
        simulated, _ = mm.sampling.ancestral.simulate(linear, batch)
    ratio = (linear.log_prob(simulated) - upper.log_prob).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / 20


def test_annealing_takes_constrained_latents_and_sums_out_a_label_of_the_model(double):
    """A Gamma rate and a simplex, with a label that is summed out, against quadrature."""

    def model(batch):
        with batch.plate():
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            share = pyro.sample("share", dist.Dirichlet(torch.tensor([2.0, 1.5])))
            kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])))
            batch.observe("count", lambda rate, kind: dist.Poisson(rate * (1.0 + kind)), rate, kind)
            batch.observe("flag", lambda share, kind: dist.Bernoulli((share[..., 0] + kind) / 2), share, kind)

    def guide(batch):
        with batch.plate():
            pyro.sample("rate", dist.LogNormal(0.2, 0.7).expand([len(batch)]))
            pyro.sample("share", dist.Dirichlet(torch.tensor([1.2, 1.2])).expand([len(batch)]))

    counts, flags = torch.tensor([0.0, 3.0, 9.0]), torch.tensor([1.0, 0.0, 1.0])
    batch = mm.Batch({"count": counts, "flag": flags}, present={"flag": torch.tensor([True, True, False])})
    rate = torch.linspace(1e-4, 40, 40_001)
    p = (torch.arange(2000) + 0.5) / 2000
    share = dist.Beta(2.0, 1.5)
    truth = []
    for row in range(3):
        total = torch.zeros(())
        for kind, weight in enumerate((0.3, 0.7)):
            likelihood = dist.Poisson(rate * (1 + kind)).log_prob(counts[row])
            part = torch.trapezoid((dist.Gamma(2.0, 1.0).log_prob(rate) + likelihood).exp(), rate)
            if batch.present["flag"][row]:
                flag = dist.Bernoulli((p + kind) / 2).log_prob(flags[row])
                part = part * (share.log_prob(p) + flag).exp().mean()
            total = total + weight * part
        truth.append(total.log())
    for start in ("guide", "prior"):
        options = {"num_chains": 1500, "temperatures": 25, "leapfrog_steps": 2, "start": start, "seed": 0}
        found = mm.annealed_importance(model, guide, batch, **options)
        assert found.standard_error.max() < 0.02
        assert ((found.log_prob - torch.stack(truth)).abs() < 4 * found.standard_error + 1e-3).all()


@pytest.mark.parametrize("vectorize", [True, False])
def test_annealing_moves_latents_in_plates_within_a_row(vectorize, double):
    batch = mm.Batch({"x": torch.tensor([0.3, -2.0, 4.0])})
    truth = dist.Normal(0.0, math.sqrt(9 + 3 * 0.25 + 1)).log_prob(batch["x"])
    options = {"num_chains": 400, "temperatures": 60} if vectorize else {"num_chains": 12, "temperatures": 25}
    options["leapfrog_steps"] = 2
    model, guide = chain(vectorize)
    found = mm.annealed_importance(model, guide, batch, seed=0, vectorize=vectorize, pilot_chains=4, **options)
    assert ((found.log_prob - truth).abs() < 4 * found.standard_error).all()
    assert found.standard_error.max() < (0.05 if vectorize else 0.6)


def test_private_latents_of_missing_modalities_do_not_wander(double):
    """Masked in both densities, they would drift away without a force: their momentum is zero."""
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    decode = lambda n: mm.conditionals.Normal(mm.nn.MLP(n, 6, (8,)))  # noqa: E731
    encode = lambda: mm.conditionals.Normal(mm.nn.MLP(3, 4, (8,)))  # noqa: E731
    model = mm.models.PrivateLatents(normal, {"a": normal, "b": normal}, {"a": decode(4), "b": decode(4)})
    guide = mm.Guide(
        z=mm.posteriors.ProductOfExperts({"a": encode(), "b": encode()}),
        w_a=mm.posteriors.Private("a", encode()),
        w_b=mm.posteriors.Private("b", encode()),
    )
    present = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, False, True, False])}
    batch = mm.Batch({"a": torch.randn(4, 3), "b": torch.randn(4, 3)}, present=present)
    density = TemperedDensity(model, guide, batch, "guide")
    z, w_a, w_b = density.active.split(2, -1)
    assert z[:, 0].tolist() == [True, True, True, False]
    assert w_a[:, 0].tolist() == [True, True, False, False] and w_b[:, 0].tolist() == [True, False, True, False]
    momenta = draw_momenta(density, density.initial_draws(5))
    assert momenta[:, ~density.active].eq(0).all() and momenta[:, density.active].ne(0).all()
    found = mm.annealed_importance(model, guide, batch, num_chains=200, temperatures=20, seed=0)
    plain = mm.log_marginal(model, guide, batch, num_particles=20_000, seed=0)
    both = (found.standard_error.square() + plain.standard_error.square()).sqrt()
    assert ((found.log_prob - plain.log_prob).abs() < 4.5 * both + 1e-9).all() and found.log_prob[3] == 0


def test_constrained_private_latents_of_missing_modalities_do_not_wander_either(double):
    """A LogNormal one has a Jacobian, which alone would send it to infinity and the whole row's moves to rejection."""

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w_a", dist.LogNormal(0.0, 0.5))
            batch.observe("a", lambda z, w: dist.Normal(z + w.log(), 1.0), z, w)
            batch.observe("b", lambda z: dist.Normal(3 * z, 0.3), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(0.0, 2.0).expand([len(batch)]))
            pyro.sample("w_a", dist.LogNormal(0.0, 1.0).expand([len(batch)]))

    batch = mm.Batch({"a": torch.zeros(30), "b": 3 * torch.randn(30)}).without("a")
    active = TemperedDensity(model, guide, batch, "guide").active
    assert active[:, 0].all() and not active[:, 1].any(), "z and w_a"
    found = mm.annealed_importance(model, guide, batch, num_chains=64, temperatures=50, seed=0)
    error = (found.log_prob - dist.Normal(0.0, 9.09**0.5).log_prob(batch["b"])).abs()
    assert found.standard_error.max() < 0.6 and (error < 4.5 * found.standard_error).all()


def test_annealing_gradients_are_those_of_the_densities(linear):
    batch = linear.sample(3)
    density = TemperedDensity(linear, off(linear), batch, "guide")
    at = density.state_at(density.initial_draws(2))
    z = at.u

    def log_p(z):
        likelihood = sum(linear.likelihood(n, z).log_prob(batch[n]) for n in batch)
        return dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + likelihood

    torch.testing.assert_close(at.log_p, log_p(z))
    torch.testing.assert_close(at.gradient_p, torch.func.grad(lambda z: log_p(z).sum())(z))
    torch.testing.assert_close(at.gradient_q, -(z - linear.posterior(batch).mean - 1.5) / 0.09)


def test_a_schedule_is_as_long_where_the_weights_vary_more(double):
    grid = torch.linspace(0, 1, 101)
    speeds = torch.stack([torch.ones(101), torch.where(grid < 0.5, 0.0, 1.0), torch.zeros(101)], 1)
    betas, place = equal_variance_temperatures(grid, speeds, 50)
    assert betas.shape == (51, 3) and place.shape == (50, 3)
    assert betas[0].eq(0).all() and betas[-1].eq(1).all() and (betas.diff(dim=0) > 0).all()
    for flat in (0, 2):  # nothing to choose
        torch.testing.assert_close(betas[:, flat], torch.linspace(0, 1, 51))
    assert 45 <= (betas[1:, 1] > 0.45).sum() <= 49, "all but the share that is kept uniform"


def test_annealing_repeats_by_its_seed_and_leaves_generator_and_batch_alone(linear):
    batch, guide = every_pattern(linear), off(linear)
    before = {n: batch[n].clone() for n in batch}
    state = torch.get_rng_state()
    options = {"num_chains": 3, "temperatures": 4, "leapfrog_steps": 1, "seed": 1}
    one, again = (mm.annealed_importance(linear, guide, batch, **options) for _ in range(2))
    assert torch.equal(one.log_prob, again.log_prob) and torch.equal(state, torch.get_rng_state())
    mm.bidirectional(linear, guide, batch, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(batch[n], before[n]) for n in batch)
    assert all(p.grad is None for p in linear.parameters())


def test_annealing_in_blocks_of_rows_estimates_the_same(linear):
    """More rows than move together: each block has draws of its own, and estimates the same."""
    batch = linear.sample(10)
    settings = AnnealingSettings(num_chains=64, temperatures=20, leapfrog_steps=2, pairs_at_once=64 * 5)
    assert settings.rows_at_once == 5
    found = estimate_by_annealing(linear, off(linear, 0.5, 0.8), batch, settings, seed=0)
    assert len(found) == 10 and set(found.running) == {1, 2, 4, 8, 16, 32, 64}
    assert ((found.log_prob - linear.log_prob(batch)).abs() < 4.5 * found.standard_error).all()
    settings = AnnealingSettings(num_chains=64, temperatures=5, leapfrog_steps=2, pairs_at_once=64 * 5)
    lower, upper = bound_both_ways(linear, off(linear), batch, settings, seed=0)
    assert len(lower) == len(upper) == 10


def test_annealing_refuses_pairs_that_it_cannot_move(linear):
    batch = linear.sample(2)

    def discrete(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("k", dist.Categorical(torch.ones(3)))

    def lonely(batch):
        with batch.plate():
            extra = pyro.sample("extra", dist.Normal(0.0, 1.0))
            batch.observe("x0", dist.Normal(extra[..., None], torch.ones(2)).to_event(1))

    def chained(batch):
        with batch.plate():
            x = batch.observe("x0", dist.Normal(torch.zeros(2), 1.0).to_event(1).expand([len(batch)]))
            z = pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
            batch.observe("x1", lambda z: dist.Normal(z.sum(-1, keepdim=True), torch.ones(3)).to_event(1), z)

    guide = off(linear)
    with pytest.raises(ValueError, match="'k' is discrete: sum it out instead"):
        mm.annealed_importance(linear, discrete, batch, audit=False)
    with pytest.raises(ValueError, match="the guide lacks 'extra', a latent of the model"):
        mm.annealed_importance(lonely, guide, batch, audit=False)
    with pytest.raises(ValueError, match="this one draws while it is scored"):
        mm.annealed_importance(chained, guide, batch.only("x1"))
    with pytest.raises(ValueError, match="start to be one of 'guide', 'prior', 'fitted', got 'posterior'"):
        mm.annealed_importance(linear, guide, batch, start="posterior")
    with pytest.raises(ValueError, match="one row at least, got none"):
        mm.log_marginal(linear, guide, batch[torch.zeros(2, dtype=torch.bool)])
    for name in ("num_chains", "temperatures", "leapfrog_steps"):
        with pytest.raises(ValueError, match=f"expected {name} >= 1, got 0"):
            mm.annealed_importance(linear, guide, batch, **{name: 0})
