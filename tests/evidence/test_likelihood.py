"""Evidence against the truth: the linear-Gaussian model's closed form, and quadrature."""

import math
import os
import warnings
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm.evidence.annealing import AnnealingSettings, estimate_by_annealing
from pyro_mm.evidence.likelihood import estimate_log_marginal
from pyro_mm.evidence.pareto import pareto_k, tail_length
from pyro_mm.sampling.predictive import SampleSettings, sample_pair
from pyro_mm.sampling.resampling import Resampling
from pyro_mm.sampling.weighted import BlockSizes, ImportanceSampling
from tests.support.linear_gaussian import encoders, every_pattern, oracle

LONG = os.environ.get("PYRO_MM_LONG") == "1"
POSTERIORS = {
    "product": mm.posteriors.ProductOfExperts,
    "mixture": mm.posteriors.MixtureOfExperts,
    "mixture of products": mm.posteriors.MixtureOfProducts,
}


@pytest.fixture(scope="module")
def trained():
    """Guides fitted to the oracle for some seconds, so that importance sampling works as it does in use."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    model = oracle(3, latent=2, noise=1.0)
    for p in model.parameters():
        p.requires_grad_(False)
    train, guides = model.sample(1200), {}
    for name, posterior in POSTERIORS.items():
        guides[name] = mm.Guide(z=posterior(encoders(model, hidden=())))
        objective = mm.objectives.mvae() if name == "product" else mm.objectives.elbo(mm.estimators.IWAE(4))
        mm.fit(model, guides[name], objective, train, epochs=18, seed=0, progress=False,
               optimizer=lambda ps: torch.optim.Adam(ps, 2e-2))  # fmt: skip
    yield model, guides
    torch.set_default_dtype(before)


def snapshot(batch):
    return {n: (batch[n].clone(), batch.present[n].clone()) for n in batch.names}


@pytest.mark.parametrize("modalities", range(2, 9))
def test_exact_posterior_gives_the_evidence_to_rounding(modalities, double):
    model = oracle(modalities)
    guide, batch = mm.Guide(z=model.posterior), every_pattern(model, rows=1 if modalities > 5 else 2)
    evidence = mm.log_marginal(model, guide, batch, num_particles=20, seed=0)
    torch.testing.assert_close(evidence.log_prob, model.log_prob(batch), rtol=0, atol=1e-10)
    assert evidence.standard_error.max() < 1e-7 and (evidence.ess > 20 - 1e-9).all()
    assert mm.log_marginal(model, guide, batch, num_particles=200, seed=0).pareto_k.eq(0).all()
    for target, given in ((["x0"], ["x1"]), (["x1"], []), (["x0", "x1"], batch.names[2:])):
        found = mm.log_conditional(model, guide, batch, target=target, given=given, num_particles=3, seed=0)
        torch.testing.assert_close(found.log_prob, model.log_conditional(batch, target, given), rtol=0, atol=1e-10)


@pytest.mark.parametrize("modalities", range(2, 9) if LONG else [2, 5])
def test_a_trained_product_is_within_three_errors_on_99_rows_of_100(modalities, double):
    """Every row of every pattern, none left out for its diagnostic; a tenth of the draws from the prior."""
    torch.manual_seed(0)
    model = oracle(modalities, latent=2, noise=1.0)
    for p in model.parameters():
        p.requires_grad_(False)
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts(encoders(model, hidden=())))
    full = model.sample(4000)
    train = mm.Batch({n: full[n] for n in full}, present={n: torch.rand(4000) < 0.6 for n in full})
    mm.fit(model, guide, mm.objectives.elbo(), train, epochs=200 if LONG else 8, batch_size=256, seed=0,
           progress=False, optimizer=lambda ps: torch.optim.Adam(ps, 1e-2 if LONG else 2e-2))  # fmt: skip
    batch = every_pattern(model, rows=-(-500 // 2**modalities))
    options = {"num_particles": 4000 if LONG else 2500, "prior_share": 0.1}
    for seed, found, truth in (
        (1, partial(mm.log_marginal, model, guide, batch), model.log_prob(batch)),
        (2, partial(mm.log_conditional, model, guide, batch, target="x0", given="x1"),
         model.log_conditional(batch, ["x0"], ["x1"])),
    ):  # fmt: skip
        evidence = found(seed=seed, **options)
        within = (evidence.log_prob - truth).abs() <= 3 * evidence.standard_error + 1e-10
        # of 500 rows 0.3 % are beyond by chance: more than 5 of them with probability 4e-3 were errors normal
        assert within.double().mean() >= 0.99
        assert evidence.standard_error.median() < 0.02 and evidence.untrusted() < 0.08


@pytest.mark.parametrize("name", POSTERIORS)
def test_evidence_is_within_its_error(name, trained):
    model, guides = trained
    batch = every_pattern(model, rows=30)
    before = snapshot(batch)
    for quantity, truth in (
        (mm.log_marginal(model, guides[name], batch, num_particles=4000, seed=1), model.log_prob(batch)),
        (
            mm.log_conditional(model, guides[name], batch, target="x0", given=["x1"], num_particles=4000, seed=2),
            model.log_conditional(batch, ["x0"], ["x1"]),
        ),
    ):
        error = (quantity.log_prob - truth).abs()
        # a row fails with probability 0.3 %; of 240 rows, more than 1 % + 4 fail with probability 1e-5
        trusted = quantity.pareto_k < 0.5  # where the error is near normal
        assert trusted.float().mean() > 0.25
        beyond = (error > 3 * quantity.standard_error + 1e-9) & trusted
        assert beyond.sum() <= 0.01 * len(error) + 4
        assert error[trusted].max() < 0.2
    for n, (value, present) in before.items():
        assert torch.equal(batch[n], value) and torch.equal(batch.present[n], present)


@pytest.mark.parametrize("name", POSTERIORS)
def test_invariant_to_chunks_and_to_rows_within_error(name, trained):
    model, guides = trained
    batch = every_pattern(model, rows=5 if LONG else 2)

    def estimate(rows=None, num_particles=1500, **options):
        rows = batch if rows is None else batch[rows]
        return mm.log_marginal(model, guides[name], rows, num_particles=num_particles, **options)

    whole = estimate(seed=0, num_particles=30)
    for chunk in (1, 7, 64, 10**6):
        again = estimate(seed=0, num_particles=30, chunk=chunk)
        for column in ("log_prob", "standard_error", "ess", "pareto_k"):
            found, expected = getattr(again, column), getattr(whole, column)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10, equal_nan=True)
    whole = estimate(seed=0)
    backwards = torch.arange(batch.size - 1, -1, -1)
    single = [estimate([i], seed=i) for i in range(batch.size)]
    for log_prob, error in (
        (estimate(backwards, seed=0).log_prob.flip(0), estimate(backwards, seed=0).standard_error.flip(0)),
        (torch.cat([s.log_prob for s in single]), torch.cat([s.standard_error for s in single])),
    ):
        both = (error.square() + whole.standard_error.square()).sqrt()
        # of 40 differences |t| > 4.5 in one with probability 3e-4
        assert ((log_prob - whole.log_prob).abs() < 4.5 * both + 1e-9).all()


def test_a_mixture_deals_no_expert_out_by_place_or_to_all_draws(double):
    """Two known mistakes: the row's place decides the expert, or one expert serves all K draws of a row."""
    apart = dist.Normal(torch.tensor([[-30.0], [30.0]]), 0.5).to_event(1)
    chosen = []

    def guide(batch):
        with batch.plate():
            mixture = mm.distributions.Mixture(apart, torch.tensor([0.5, 0.5]).log()).expand([len(batch)])
            chosen.append(pyro.sample("z", mixture)[..., 0] > 0)

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            batch.observe("x", lambda z: dist.Normal(z, 1.0).to_event(1), z)

    batch = mm.Batch({"x": torch.zeros(30, 1)})
    for stratify in (True, False):
        chosen.clear()
        mm.log_marginal(model, guide, batch, num_particles=400, seed=0, stratify=stratify, audit=False)
        share = torch.cat([c.double() for c in chosen if c.dim() == 2]).mean(0)
        assert (share - 0.5).abs().max() < (0.003 if stratify else 0.12)  # 4.8 standard errors of a proportion
        first = next(c for c in chosen if c.dim() == 2 and len(c) > 2)[0]
        assert 4 < first.sum() < 26, "rows choose by themselves"


def test_a_likelihood_in_many_blocks_is_one_estimate(trained):
    """Draws come in canonical blocks: smaller ones are other draws, and the same quantity within its error."""
    model, guides = trained
    batch = every_pattern(model, rows=2)
    one = mm.log_marginal(model, guides["mixture"], batch, num_particles=999, seed=0)

    def in_blocks(**parts):
        sizes = BlockSizes(drawn_pairs=16 * 50, **parts)
        return estimate_log_marginal(model, guides["mixture"], batch, ImportanceSampling(999, 0, sizes=sizes))

    many = in_blocks(decoded_pairs=100)
    assert not torch.equal(one.log_prob, many.log_prob)
    both = (one.standard_error.square() + many.standard_error.square()).sqrt()
    assert ((one.log_prob - many.log_prob).abs() < 4.5 * both + 1e-9).all()
    torch.testing.assert_close(many.log_prob, in_blocks().log_prob)


@pytest.mark.parametrize("name", POSTERIORS)
def test_a_last_block_of_one_particle_is_cut_like_the_others(name, trained):
    """25 particles in blocks of 8, and rows in parts of 7: the numbers are those of rows decoded at once."""
    model, guides = trained
    batch = every_pattern(model, rows=2)
    sizes = (BlockSizes(drawn_pairs=8 * batch.size, decoded_pairs=pairs) for pairs in (None, 7))
    whole, cut = (estimate_log_marginal(model, guides[name], batch, ImportanceSampling(25, 0, sizes=s)) for s in sizes)
    torch.testing.assert_close(cut.log_prob, whole.log_prob, rtol=1e-10, atol=1e-10)


def test_statistics_of_a_likelihood_are_those_of_its_weights(trained):
    model, guides = trained
    batch = model.sample(3)
    evidence = mm.log_marginal(model, guides["product"], batch, num_particles=500, seed=4)
    with mm.utils.seeding.temporary_seed(mm.utils.seeding.part_seed(4, 0), batch.device), torch.no_grad():
        log_w = mm.log_weights(model, guides["product"], batch, 500)
    w = log_w.exp()
    torch.testing.assert_close(evidence.log_prob, w.mean(0).log(), rtol=1e-10, atol=0)
    torch.testing.assert_close(evidence.standard_error, w.std(0) / 500**0.5 / w.mean(0), rtol=1e-8, atol=0)
    torch.testing.assert_close(evidence.ess, w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-8, atol=0)


def test_a_likelihood_takes_another_guide_or_another_batch_as_proposal(trained):
    model, guides = trained
    batch = model.sample(20)
    only = batch.only("x0")
    truth = model.log_prob(only)
    joint = mm.log_marginal(model, guides["product"], only, proposal=batch, num_particles=8000, seed=0)
    exact = mm.log_marginal(
        model, guides["product"], only, proposal=mm.Guide(z=model.posterior), num_particles=3, seed=0
    )
    torch.testing.assert_close(exact.log_prob, truth, rtol=0, atol=1e-10)
    shown = mm.log_marginal(
        model, guides["product"], only, proposal=lambda _: guides["product"](batch), num_particles=8000, seed=0
    )
    torch.testing.assert_close(joint.log_prob, shown.log_prob, rtol=1e-10, atol=0)
    own = mm.log_marginal(model, guides["product"], only, num_particles=8000, seed=0)
    assert (joint.pareto_k > own.pareto_k).float().mean() > 0.8, "too narrow a proposal shows itself"


def bare(model, guide, batch, num_particles, **changes):
    """A log-mean-exp of weights as others write it, with a mistake or without."""
    z = guide(batch).rsample((num_particles,))
    likelihood = sum(model.likelihood(n, z).log_prob(batch[n]) for n in batch)
    prior = dist.Normal(torch.zeros_like(z[0]), 1.0).to_event(1).log_prob(z)
    log_w = changes.get("scale", 1.0) * likelihood + prior - guide(batch).log_prob(z)
    if changes.get("mix"):  # (K, N) read as if it were (N, K)
        return log_w.reshape(batch.size, -1).logsumexp(1) - math.log(num_particles)
    return log_w.logsumexp(0) - (0.0 if changes.get("sum") else math.log(num_particles))


@pytest.fixture
def evaluated(trained):
    model, guides = trained
    torch.manual_seed(3)
    batch = model.sample(12)
    truth = model.log_prob(batch)
    posterior = guides["product"].posteriors["z"]
    options = {"num_particles": 20_000, "seed": 0, "prior_share": 0.1}
    ours = mm.log_marginal(model, guides["product"], batch, **options)
    assert ((ours.log_prob - truth).abs() < 4.5 * ours.standard_error).all() and ours.standard_error.max() < 0.05
    with torch.no_grad():  # and the evaluator that the mistakes are put into is right without them
        assert (bare(model, posterior, batch, 20_000) - truth).abs().max() < 0.2
    return model, posterior, batch, truth, ours


@pytest.mark.parametrize(
    ("mistake", "off"), [({"mix": True}, 1.0), ({"scale": 3.92}, 5.0), ({"sum": True}, 9.0)], ids=str
)
def test_a_known_mistake_of_likelihood_code_is_far_from_our_estimate(mistake, off, evaluated):
    """Rows mixed in the log-mean-exp; a likelihood scaled as it was in training; an omitted - log K."""
    model, posterior, batch, truth, ours = evaluated
    with torch.no_grad():
        wrong = bare(model, posterior, batch, 20_000, **mistake)
    assert (wrong - truth).abs().max() > off and (wrong - ours.log_prob).abs().max() > off


def test_a_product_with_deviations_taken_for_variances_is_far_from_ours(evaluated):
    """It is no product of the experts, and as a proposal it is the worse for it."""
    model, posterior, batch, _, _ = evaluated

    def wrong(batch):
        locs, scales, _ = posterior.parameters_of(batch)
        precision = 1 + sum(1 / s for s in scales)
        loc = sum(m / s for m, s in zip(locs, scales, strict=True)) / precision
        return dist.Normal(loc, 1 / precision).to_event(1)

    locs, scales, _ = posterior.parameters_of(batch)
    experts = [dist.Normal(m, s).to_event(1) for m, s in zip(locs, scales, strict=True)]
    experts.append(dist.Normal(torch.zeros_like(locs[0]), 1.0).to_event(1))

    def constant(q):  # log q less the experts' log-densities, at several points: one number per row for a product
        points = [torch.full_like(locs[0], x) for x in (-1.0, 0.0, 2.0)]
        return torch.stack([q.log_prob(z) - sum(e.log_prob(z) for e in experts) for z in points])

    with torch.no_grad():
        torch.testing.assert_close(constant(posterior(batch)).std(0), torch.zeros(12), rtol=0, atol=1e-10)
        assert constant(wrong(batch)).std(0).min() > 0.1
    ess = [mm.log_marginal(model, mm.Guide(z=q), batch, num_particles=20_000, seed=0).ess for q in (wrong, posterior)]
    assert ess[0].mean() < 0.8 * ess[1].mean()


def test_a_scaled_site_is_refused(double):
    model = oracle(2)

    def scaled(batch):
        with pyro.poutine.scale(scale=3.92):
            model(batch)

    guide = mm.Guide(z=model.posterior)
    with pytest.raises(ValueError, match=r"site '(z|x0)' is scaled by 3.92"):
        mm.log_marginal(scaled, guide, model.sample(2))
    batch = model.sample(6)
    part = mm.log_marginal(model, guide, batch.subsample(torch.tensor([1, 4])), num_particles=2)
    torch.testing.assert_close(part.log_prob, model.log_prob(batch)[[1, 4]])


def test_nonlinear_story_agrees_with_quadrature(double):
    def decode(z):
        return torch.stack([(2 * z[..., 0]).sin() + z[..., 1], z[..., 0] * z[..., 1], z[..., 1] ** 2], -1)

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            batch.observe("a", lambda z: dist.Normal(decode(z), 0.5).to_event(1), z)
            batch.observe("b", lambda z: dist.Bernoulli(logits=3 * z.sum(-1)), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.2).to_event(1))

    a, b = torch.tensor([[0.5, 0.2, 0.3], [-1.0, 0.4, 1.0], [0.1, -0.5, 0.2]]), torch.tensor([1.0, 0.0, 1.0])
    batch = mm.Batch(
        {"a": a, "b": b}, present={"a": torch.tensor([True, True, False]), "b": torch.tensor([True, False, True])}
    )
    grid = torch.linspace(-8, 8, 801)
    z = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1)
    log_joint = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(z) + 2 * math.log(16 / 800)
    estimates = {how: mm.log_marginal(story, guide, batch, seed=0, **({"num_particles": 100_000} | options))
                 for how, options in (("plain", {}), ("antithetic", {"draws": "antithetic"}),
                                      ("quasi", {"draws": "quasi"}), ("defensive", {"prior_share": 0.3}),
                                      ("prior", {"prior_share": 1.0, "num_particles": 400_000}))}  # fmt: skip
    for start in ("guide", "prior") if LONG else ("guide",):
        options = {"num_chains": 40_000 if LONG else 12_000, "temperatures": 20, "start": start, "seed": 0}
        estimates[f"annealed from the {start}"] = mm.annealed_importance(story, guide, batch, **options)
    truths = []
    for row in range(3):
        total = log_joint
        if batch.present["a"][row]:
            total = total + dist.Normal(decode(z), 0.5).to_event(1).log_prob(a[row])
        if batch.present["b"][row]:
            total = total + dist.Bernoulli(logits=3 * z.sum(-1)).log_prob(b[row])
        truths.append(total.flatten().logsumexp(0))
    for how, evidence in estimates.items():
        error = (evidence.log_prob - torch.stack(truths)).abs()
        assert error.max() < 1e-2, how
        assert (error < 4.5 * evidence.standard_error).all(), how
    conditional = mm.log_conditional(story, guide, batch, target="a", given="b", num_particles=100_000, seed=0)
    alone = dist.Bernoulli(logits=3 * z.sum(-1)).log_prob(b[0])
    assert abs(conditional.log_prob[0] - truths[0] + (log_joint + alone).flatten().logsumexp(0)) < 1.5e-2


def test_rows_are_encoded_in_blocks(trained):
    """More rows than are encoded at once: joined estimates, each of its own rows, running ones included."""
    model, guides = trained
    batch = model.sample(23)
    sizes = []

    def watched(rows):
        sizes.append(rows.size)
        guides["mixture"](rows)

    blocks = BlockSizes(rows=10)
    sampling = ImportanceSampling(4000, 0, mm.Proposal(prior_share=0.2), sizes=blocks)
    found = estimate_log_marginal(model, watched, batch, sampling)
    assert max(sizes) == 10 and len(found) == 23 and {k: len(v[0]) for k, v in found.running.items()}[4000] == 23
    trusted = found.pareto_k < 0.7
    error = (found.log_prob - model.log_prob(batch)).abs()
    assert trusted.sum() > 15 and (error < 4.5 * found.standard_error)[trusted].all()
    drawn = mm.posterior_draws(model, guides["mixture"], batch, 5, resample=True, num_particles=50)["z"]
    settings = SampleSettings(5, decode=False, resampling=Resampling(50, sizes=blocks))
    parts = sample_pair(model, guides["mixture"], batch, settings, seed=None, audit=True).guide_latents["z"]
    assert drawn.shape == parts.shape == (5, 23, 2)


@pytest.mark.parametrize("how", ["rows", "chunks", "annealed", "draws"])
def test_parameters_of_each_row_are_its_own_however_rows_are_cut(how, double):
    """A story and a guide that index by the plate, the guide exact: the log-likelihood is known for every row."""
    size = 13
    slopes = torch.linspace(-1.5, 1.5, size)
    batch = mm.Batch({"x": torch.randn(size)})

    def model(batch):
        with batch.plate() as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            batch.observe("x", lambda z: dist.Normal(slopes[rows] * z, 0.5), z)

    def guide(batch):
        with batch.plate() as rows:
            precision = 1 + slopes[rows].square() / 0.25
            pyro.sample("z", dist.Normal(slopes[rows] * batch["x"] / 0.25 / precision, precision.rsqrt()))

    right = dist.Normal(0.0, (slopes.square() + 0.25).sqrt()).log_prob(batch["x"])
    options = {"num_particles": 6, "seed": 0}
    sizes = BlockSizes(rows=5)
    if how == "annealed":
        settings = AnnealingSettings(num_chains=2, temperatures=3, pairs_at_once=16 * 5)  # of 16 pilot chains
        found = estimate_by_annealing(model, guide, batch, settings, seed=0).log_prob
    elif how == "chunks":
        found = mm.log_marginal(model, guide, batch, chunk=7, **options).log_prob
    elif how == "rows":
        found = estimate_log_marginal(model, guide, batch, ImportanceSampling(**options, sizes=sizes)).log_prob
    else:
        settings = SampleSettings(400, decode=False, resampling=Resampling(500, sizes=sizes))
        draws = sample_pair(model, guide, batch, settings, seed=0, audit=True).guide_latents["z"].mean(0)
        precision = 1 + slopes.square() / 0.25
        # 400 draws with replacement out of 500: a variance of (1/400 + 1/500) of the posterior's, five of its roots
        off = (draws - slopes * batch["x"] / 0.25 / precision).abs() * precision.sqrt()
        assert off.max() < 5 * math.sqrt(1 / 400 + 1 / 500)
        return
    torch.testing.assert_close(found, right, rtol=0, atol=1e-10)


def test_a_likelihood_repeats_by_its_seed_and_leaves_the_generator_alone(trained):
    model, guides = trained
    batch = model.sample(2)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = mm.log_marginal(model, guides["product"], batch, num_particles=50, seed=1)
    assert torch.equal(state, torch.get_rng_state()), "the caller's generator is left alone"
    again = mm.log_marginal(model, guides["product"], batch, num_particles=50, seed=1)
    assert torch.equal(first.log_prob, again.log_prob)
    other = mm.log_marginal(model, guides["product"], batch, num_particles=50)
    assert not torch.equal(first.log_prob, other.log_prob)


@pytest.mark.parametrize("draws", [100, 1000, 5000])
def test_pareto_k_is_arvizs(draws):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        az = pytest.importorskip("arviz")
    if not hasattr(az, "psislw"):
        pytest.skip("this ArviZ has no psislw")
    log_w = torch.randn(draws, 40, dtype=torch.float64) * torch.linspace(0.05, 4, 40)
    found = pareto_k(log_w.T.topk(tail_length(draws) + 1, -1).values, draws)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = az.psislw(log_w.T.numpy())[1]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-9)
    assert pareto_k(torch.zeros(3, 1), 4).isnan().all(), "too few draws"


def test_to_arviz_holds_the_log_likelihoods(trained):
    model, guides = trained
    evidence = mm.log_marginal(model, guides["product"], model.sample(4), num_particles=100, seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = evidence.to_arviz()
    np.testing.assert_array_equal(data["log_likelihood"][evidence.quantity].values[0, 0], evidence.log_prob.numpy())
    np.testing.assert_array_equal(data["sample_stats"]["pareto_k"].values[0, 0], evidence.pareto_k.numpy())
    assert evidence.quantity == "log p(x0, x1, x2)" and "nats per row" in repr(evidence)


def test_a_likelihood_refuses_what_it_cannot_estimate(trained):
    model, guides = trained
    batch = model.sample(2)
    with pytest.raises(ValueError, match="num_particles >= 1"):
        mm.log_marginal(model, guides["product"], batch, num_particles=0)
    with pytest.raises(ValueError, match="none of them given"):
        mm.log_conditional(model, guides["product"], batch, target=["x0"], given=["x0"])
    with pytest.raises(ValueError, match="unknown modality 'nope'"):
        mm.log_conditional(model, guides["product"], batch, target=["nope"])
    with pytest.raises(ValueError, match="3 rows, and the batch 2"):
        mm.log_marginal(model, guides["product"], batch, proposal=model.sample(3))
