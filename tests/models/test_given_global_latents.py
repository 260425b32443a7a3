"""Likelihoods and samples given draws of a guide's global latents, against quadrature over these and closed forms."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroSample
from pyro.ops.indexing import Vindex

import pyro_mm as mm

MEAN, DEVIATION = -0.3, 0.4  # of the guide's log s
GRID = torch.linspace(-7, 7, 2001, dtype=torch.float64)


def model(batch):
    """Two modalities of one latent, whose scale s all rows share."""
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with batch.plate():
        z = pyro.sample("z", dist.Normal(0.0, s))
        batch.observe("x", dist.Normal(z, 0.5))
        batch.observe("y", dist.Normal(-2 * z, s))


def guide(batch):
    pyro.sample("s", dist.LogNormal(MEAN, DEVIATION))
    with batch.plate():
        x = torch.where(batch.present["x"], batch["x"], 0.0)
        pyro.sample("z", dist.Normal(0.7 * x, 0.8))


def predictive(x, y=None):
    """Return log of the mean over s, by quadrature, of N(x; 0, s^2 + 0.25), or of the joint density of x and y."""
    s = (MEAN + DEVIATION * GRID).exp()[:, None]
    log_q = dist.Normal(0.0, 1.0).log_prob(GRID)[:, None] + (GRID[1] - GRID[0]).log()
    if y is None:
        log_p = dist.Normal(0.0, (s**2 + 0.25).sqrt()).log_prob(x)
    else:
        covariance = torch.stack([s**2 + 0.25, -2 * s**2, -2 * s**2, 5 * s**2], -1).reshape(-1, 1, 2, 2)
        log_p = dist.MultivariateNormal(torch.zeros(2), covariance).log_prob(torch.stack([x, y], -1))
    return (log_q + log_p).logsumexp(0)


@pytest.fixture
def batch(double):
    x = torch.linspace(-2, 2, 60)
    return mm.Batch({"x": x, "y": 0.5 - x})


PROPOSALS = [
    mm.Proposal(), mm.Proposal("antithetic"), mm.Proposal("quasi"), mm.Proposal(prior_share=0.3),
    mm.Proposal(prior_share=1.0),
]  # fmt: skip


@pytest.mark.parametrize("proposal", PROPOSALS, ids=repr)
def test_a_likelihood_is_the_mean_over_the_global_latent(batch, proposal):
    """Quasi-random draws have an error from 20 groups: Student's t with 19 degrees exceeds 5.5 once in 30,000."""
    found = mm.log_marginal(model, guide, batch.only("x"), proposal=proposal, seed=0)
    z = (found.log_prob - predictive(batch["x"])) / found.standard_error
    assert z.abs().max() < 5.5
    parts = mm.log_marginal(model, guide, batch.only("x"), proposal=proposal, seed=0, chunk=777)
    assert torch.allclose(parts.log_prob, found.log_prob, atol=1e-12)
    assert "p of a row is its mean over draws of 's', which all rows share, from the guide" in found.summary()


def test_the_error_of_a_mean_has_the_covariances_of_rows(batch):
    """60 seeds: the rms of z has a standard error of 0.09. Without covariances it is about 1.5."""
    rows, z, plain = batch.only("x"), [], []
    exact = predictive(batch["x"]).mean().item()
    for seed in range(60):
        found = mm.log_marginal(model, guide, rows, num_particles=200, seed=seed, audit=False)
        mean, error = found.mean()
        z.append((mean - exact) / error)
        plain.append((mean - exact) / (found.standard_error.square().sum().sqrt().item() / 60))
    assert 0.7 < torch.tensor(z).square().mean().sqrt() < 1.35
    assert torch.tensor(plain).square().mean().sqrt() > 1.2


def test_the_covariances_go_with_rows_and_differences(batch):
    joint = mm.log_marginal(model, guide, batch, seed=0, num_particles=200)
    marginal = mm.log_marginal(model, guide, batch.only("x"), seed=1, num_particles=100)
    assert joint.shared[0].shape == (50, 60) and joint[7].shared[0].shape == (50, 1)
    assert joint[7].mean()[1] == pytest.approx(joint.standard_error[7].item(), rel=0.5)
    difference = joint - marginal
    assert len(difference.shared) == 2
    assert difference.mean()[1] == pytest.approx(math.hypot(joint.mean()[1], marginal.mean()[1]), rel=0.05)
    whole = mm.evidence.evidence.concatenate([joint[:20], joint[20:]])
    assert whole.mean() == pytest.approx(joint.mean())
    alone = mm.log_marginal(model, guide, batch[:1], num_particles=200, seed=0)
    assert alone.mean()[1] == pytest.approx(alone.standard_error.item(), rel=0.5)


def test_a_conditional_is_that_of_the_predictive_densities(batch):
    found = mm.log_conditional(model, guide, batch, target="y", given="x", num_particles=4000, seed=0)
    exact = predictive(batch["x"], batch["y"]) - predictive(batch["x"])
    assert ((found.log_prob - exact) / found.standard_error).abs().max() < 4.5
    assert len(found.shared) == 2 and found.notes


def test_missing_modalities_and_single_runs(batch):
    present = {"y": torch.arange(60) % 2 == 0, "x": torch.arange(60) != 6}
    rows = mm.Batch({"x": batch["x"], "y": batch["y"]}, present)[:12]
    exact = torch.where(rows.present["y"], predictive(rows["x"], rows["y"]), predictive(rows["x"]))
    for options in ({"num_particles": 3000}, {"num_particles": 150, "vectorize": False}):
        found = mm.log_marginal(model, guide, rows, seed=0, **options)
        z = (found.log_prob - exact) / found.standard_error
        assert z[torch.arange(12) != 6].abs().max() < 4.5


def test_log_weights_leave_the_global_latent_out(batch):
    torch.manual_seed(0)
    found = mm.log_weights(model, guide, batch.only("x"), 5)
    torch.manual_seed(0)
    with poutine.trace() as traced, pyro.plate("particles", 5, dim=-2):
        guide(batch.only("x"))
    s, z = (traced.trace.nodes[name]["value"] for name in ("s", "z"))
    x = batch["x"]
    exact = dist.Normal(0.0, s).log_prob(z) + dist.Normal(z, 0.5).log_prob(x) - dist.Normal(0.7 * x, 0.8).log_prob(z)
    assert torch.allclose(found, exact)


def test_a_comparison_with_a_story_at_a_fixed_value(batch):
    """At the guide's point mass the predictive density is that of the story without the global latent."""
    alone = poutine.condition(model, data={"s": torch.tensor(0.8)})

    def story(batch):
        with poutine.block(hide=["s"]):
            alone(batch)

    def fixed(batch):
        with poutine.block(hide=["s"]):
            guide(batch)

    def point(batch):
        pyro.sample("s", dist.Delta(torch.tensor(0.8)))
        fixed(batch)

    rows = batch.only("x")
    found = mm.compare({"given": (model, point), "fixed": (story, fixed)}, rows, num_particles=500, seed=0)
    assert abs(found.table()[1]["difference"]) < 1e-12
    assert "p of a row is its mean over draws of 's'" in repr(found)


def test_samples_have_one_global_draw_each(batch):
    """Given s, z | x is Normal: draws by weight have its mean and deviation, averaged over s."""
    rows = batch.only("x")[:3]
    drawn = mm.posterior_draws(model, guide, rows, 100, resample=True, num_particles=50, seed=0)
    assert drawn["s"].shape == (100,) and drawn["z"].shape == (100, 3)
    s = drawn["s"]
    assert abs(s.log().mean() - MEAN) < 4 * DEVIATION / 100**0.5
    shrinkage = (s**2 / (s**2 + 0.25))[:, None]
    z = (drawn["z"] - shrinkage * rows["x"]) / (shrinkage * 0.25).sqrt()
    assert z.mean().abs() < 4 / 300**0.5 and abs(z.square().mean() - 1) < 4 * (2 / 300) ** 0.5
    by_guide = mm.posterior_draws(model, guide, rows, 400, seed=0)
    assert by_guide["s"].shape == (400,) and by_guide["z"].shape == (400, 3)
    for options in ({}, {"resample": True, "num_particles": 30}, {"vectorize": False}, {"mean": True}):
        samples = mm.generate(model, guide, rows, 5, seed=0, **options)
        assert samples["x"].shape == samples["y"].shape == (5, 3)


def test_draws_for_arviz_tell_prior_from_posterior(batch):
    data = mm.to_arviz(model, guide, batch.only("x")[:4], num_samples=150, prior=True, seed=0)
    assert data.posterior["s"].dims == ("chain", "draw") and data.posterior["z"].dims == ("chain", "draw", "row")
    for group, mean, deviation in ((data.posterior, MEAN, DEVIATION), (data.prior, 0.0, 1.0)):
        logs = torch.tensor(group["s"].values).log()
        assert abs(logs.mean() - mean) < 4 * deviation / 150**0.5
        assert abs(logs.std() / deviation - 1) < 4 / 300**0.5


def test_a_guide_is_calibrated_given_a_global_draw(batch):
    def exact(batch):
        s = pyro.sample("s", dist.LogNormal(MEAN, DEVIATION))
        shrinkage = s**2 / (s**2 + 0.25)
        with batch.plate():
            pyro.sample("z", dist.Normal(shrinkage * batch["x"], 0.5 * shrinkage.sqrt()))

    rows = mm.Batch({"x": torch.zeros(400), "y": torch.zeros(400)}).only("x")
    found = mm.calibration(model, exact, rows, num_draws=50, seed=0)
    assert set(found.ranks) == {"z", "log_likelihood"} and not found.off
    assert "z" in mm.calibration(model, guide, rows, num_draws=50, seed=0).off


def test_a_check_says_that_the_objective_is_of_all_rows_together(batch):
    found = mm.check(model, guide, Trace_ELBO(), batch.only("x")[:20], num_particles=50, repeats=2)
    assert found.gap is None and "it bounds log p of all rows together" in found.remark
    assert set(found.evidence) == {"log p(x)"} and found.elbo is not None and not found.errors


def test_classes_of_clusters_with_uncertain_centres(double):
    """p(y | x) is the ratio of predictive densities, each N(m_y, tau^2 + 1)."""
    centres, tau = torch.tensor([-1.5, 0.0, 2.0]), 0.3

    def clusters(batch):
        m = pyro.sample("m", dist.Normal(0.0, 3.0).expand([3]).to_event(1))
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            z = pyro.sample("z", dist.Normal(0.0, 0.6))
            batch.observe("x", dist.Normal(Vindex(m)[..., y] + z, 0.8))

    def posterior(batch):
        pyro.sample("m", dist.Normal(centres, tau).to_event(1))
        with batch.plate():
            pyro.sample("z", dist.Normal(0.0, 0.7))

    batch = mm.Batch({"x": torch.linspace(-3, 3, 40)})
    exact = dist.Normal(centres, math.sqrt(1 + tau**2)).log_prob(batch["x"][:, None]).softmax(-1)
    found = mm.class_probabilities(clusters, posterior, batch, "y", num_particles=4000, seed=0)
    assert ((found.probabilities - exact) / found.standard_error).abs().max() < 4.5
    assert found.evidence.shared and "'m'" in repr(found)
    with pytest.raises(ValueError, match="'m' lies outside the plate 'data'"):
        mm.class_probabilities(clusters, posterior, batch, "m")


def test_a_plate_of_global_latents_as_large_as_the_batch(double):
    """Rows and components are three each: neither is taken for the other, in parts of one row either."""

    def story(batch):
        with pyro.plate("components", 3):
            m = pyro.sample("m", dist.Normal(0.0, 3.0))
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(torch.ones(3)))
            batch.observe("x", dist.Normal(m[y], 1.0))

    centres = torch.tensor([-1.5, 0.0, 2.0])

    def posterior(batch):
        with pyro.plate("components", 3):
            pyro.sample("m", dist.Normal(centres, 0.3))

    batch = mm.Batch({"x": torch.tensor([-1.0, 0.5, 3.0])})
    exact = dist.Normal(centres, math.sqrt(1.09)).log_prob(batch["x"][:, None]).logsumexp(-1) - math.log(3)
    options = {"num_particles": 100, "vectorize": False, "seed": 0}
    found = mm.log_marginal(story, posterior, batch, **options)
    assert ((found.log_prob - exact) / found.standard_error).abs().max() < 4.5
    parts = mm.log_marginal(story, posterior, batch, chunk=1, **options)
    assert torch.allclose(found.log_prob, parts.log_prob)
    drawn = mm.posterior_draws(story, posterior, batch, 5, vectorize=False)
    assert drawn["m"].shape == (5, 3)


def test_an_autoguide_for_the_global_latent(double):
    """AutoNormal has an auxiliary site beside that of the model: log p(x) is then that of N(m, 1 + v)."""
    torch.manual_seed(0)

    def story(batch):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with batch.plate():
            z = pyro.sample("z", dist.Normal(m, 0.8))
            batch.observe("x", dist.Normal(z, 0.6))

    batch = mm.Batch({"x": torch.linspace(-1, 2, 9)})
    auto = AutoNormal(poutine.block(story, expose=["m"]), init_scale=0.4)

    def posterior(batch):
        auto(batch)
        with batch.plate():
            pyro.sample("z", dist.Normal(0.6 * batch["x"], 0.7))

    posterior(batch)
    mean, scale = auto.locs.m.detach(), auto.scales.m.detach()
    exact = dist.Normal(mean, (1 + scale**2).sqrt()).log_prob(batch["x"])
    found = mm.log_marginal(story, posterior, batch, num_particles=3000, seed=0)
    assert ((found.log_prob - exact) / found.standard_error).abs().max() < 4.5


def test_weights_of_a_network_as_global_latents(double):
    """Particle by particle, as a layer takes one matrix: x = w z + e with w ~ N(1, 0.25^2), by quadrature."""

    class Story(PyroModule):
        def __init__(self):
            super().__init__()
            self.layer = PyroModule[torch.nn.Linear](1, 1, bias=False)
            self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 1]).to_event(2))

        def forward(self, batch):
            layer, weight = self.layer, self.layer.weight
            with batch.plate():
                z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
                batch.observe("x", lambda z: dist.Normal(torch.nn.functional.linear(z, weight), 0.5).to_event(1), z)
            return layer

    def posterior(batch):
        pyro.sample("layer.weight", dist.Normal(torch.ones(1, 1), 0.25).to_event(2))
        with batch.plate():
            pyro.sample("z", dist.Normal(0.8 * batch["x"], 0.6).to_event(1))

    x = torch.linspace(-2, 2, 8)
    w = 1 + 0.25 * GRID[:, None]
    log_q = dist.Normal(0.0, 1.0).log_prob(GRID)[:, None] + (GRID[1] - GRID[0]).log()
    exact = (log_q + dist.Normal(0.0, (w**2 + 0.25).sqrt()).log_prob(x)).logsumexp(0)
    found = mm.log_marginal(Story(), posterior, mm.Batch({"x": x[:, None]}), num_particles=300, vectorize=False, seed=0)
    assert ((found.log_prob - exact) / found.standard_error).abs().max() < 4.5


@pytest.mark.filterwarnings("ignore:latent site")
def test_a_global_latent_on_one_side_only_is_refused(double):
    def local(batch):
        with batch.plate():
            pyro.sample("s", dist.LogNormal(0.0, 1.0))
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def without(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def story_of_rows(batch):
        with batch.plate():
            s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
            z = pyro.sample("z", dist.Normal(0.0, s))
            batch.observe("x", dist.Normal(z, 0.5))

    @pyro.infer.config_enumerate
    def enumerated(batch):
        pyro.sample("s", dist.Bernoulli(0.5))
        without(batch)

    def switch(batch):
        s = pyro.sample("s", dist.Bernoulli(0.5))
        with batch.plate():
            z = pyro.sample("z", dist.Normal(s, 1.0))
            batch.observe("x", dist.Normal(z, 0.5))

    batch = mm.Batch({"x": torch.zeros(3)})
    cases = [
        (model, without, r"'s' lies outside the plate 'data', .* give it pyro.sample\('s', ..\) before"),
        (model, local, r"'s' lies outside the plate 'data', .* the guide has none outside the plate"),
        (story_of_rows, guide, "'s' lies in the plate 'data' in the model and outside it in the guide"),
        (switch, enumerated, "'s' lies outside the plate 'data' and is enumerated by the guide"),
        (switch, without, "'s' lies outside the plate 'data'"),
    ]
    for story, posterior, message in cases:
        with pytest.raises(ValueError, match=message):
            mm.log_marginal(story, posterior, batch, num_particles=5)


def test_training_by_rows_still_refuses(double):
    with pytest.raises(ValueError, match="or train with pyro"):
        mm.objectives.elbo(mm.estimators.IWAE(2)).loss(model, guide, mm.Batch({"x": torch.zeros(3)}))


def off_by(found, exact):
    return ((found.log_prob - exact) / found.standard_error).abs().max()


@pytest.mark.parametrize("options", [{}, {"components": 2, "draws": 64}, {"guide_share": 0.0, "prior_share": 0.0}])
def test_fitted_proposals_are_fitted_to_the_mean_over_global_draws(batch, options):
    def narrow(batch):
        pyro.sample("s", dist.LogNormal(MEAN, DEVIATION))
        with batch.plate():
            pyro.sample("z", dist.Normal(batch["x"] + 1.0, 0.15))

    rows = batch.only("x")[::6]
    found = mm.log_marginal(model, narrow, rows, proposal=mm.Fitted(**options), seed=0)
    assert off_by(found, predictive(rows["x"])) < 4.5
    assert found.pareto_k.max() < 0.7 < mm.log_marginal(model, narrow, rows, seed=0).pareto_k.max()
    parts = mm.log_marginal(model, narrow, rows, proposal=mm.Fitted(**options), seed=0, chunk=333)
    assert torch.allclose(parts.log_prob, found.log_prob, atol=3 * found.standard_error.max().item())


def test_fitted_proposals_one_particle_at_a_time(batch):
    rows = batch.only("x")[:3]
    proposal = mm.Fitted(rounds=3, draws=16, pilot=10)
    found = mm.log_marginal(model, guide, rows, proposal=proposal, num_particles=60, vectorize=False, seed=0)
    assert off_by(found, predictive(rows["x"])) < 4.5
    assert mm.log_marginal(model, guide, rows, proposal=proposal, num_particles=1, seed=0).log_prob.isfinite().all()


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_annealing_has_a_global_draw_in_each_chain(batch, start):
    rows = batch[::12]
    options = {"num_chains": 100, "temperatures": 15, "seed": 0, "start": start}
    found = mm.annealed_importance(model, guide, rows, **options)
    assert off_by(found, predictive(rows["x"], rows["y"])) < 4.5
    assert found.shared and "'s'" in found.summary()


def test_bounds_from_both_sides_hold_given_a_global_draw(batch):
    """The mean gap of 40 rows is 0 within 4 standard errors over rows, and 0.02 nats for 20 temperatures."""
    rows = batch.only("x")[:40]
    lower, upper = mm.bidirectional(model, guide, rows, num_chains=10, temperatures=20, seed=0)
    gap = upper.log_prob - lower.log_prob
    assert gap.mean().abs() < 4 * gap.std() / 40**0.5 + 0.02
    assert lower.notes and upper.notes
    least = {"num_chains": 2, "temperatures": 1, "leapfrog_steps": 1, "pilot_chains": 2}
    one = mm.bidirectional(model, guide, rows[:2], vectorize=False, seed=0, **least)
    assert one[0].log_prob.isfinite().all()
