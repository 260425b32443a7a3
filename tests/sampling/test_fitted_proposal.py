"""Proposals fitted to rows: exact where the posterior is Normal, unbiased everywhere, and the same by every road."""

import math
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_mm as mm
from pyro_mm import protocols
from pyro_mm.sampling.fitted_proposal import prior_deviations
from pyro_mm.scoring.structure import pair_structure
from pyro_mm.utils.global_state import override_validation
from tests.support.chain import chain
from tests.support.contract import MODELS, POSTERIORS, data, pair
from tests.support.linear_gaussian import every_pattern, oracle

ALONE = {"guide_share": 0.0, "prior_share": 0.0, "widen": 0.0}
NAMES = {"target": ("x0",), "given": ("x1",)}


def linear(modalities, latent=3):
    """A linear-Gaussian story without parameters to train."""
    model = oracle(modalities, latent=latent)
    for p in model.parameters():
        p.requires_grad_(False)
    torch.manual_seed(1)
    return model


def beside(model, shift=1.5, scale=0.3):
    """A guide that is too narrow and beside the posterior."""
    return mm.Guide(z=lambda batch: dist.Normal(model.posterior(batch).mean + shift, scale).to_event(1))


def within(found, truth, errors=4.0):
    """Return whether every row is within so many standard errors of the truth."""
    return ((found.log_prob - truth).abs() < errors * found.standard_error + 1e-9).all()


@pytest.mark.parametrize("modalities", [2, 3, 5, 8])
def test_a_normal_posterior_is_found_exactly(modalities, double):
    model = linear(modalities)
    batch = every_pattern(model, rows=1)
    guide = beside(model)
    settled = mm.Fitted(rounds=20, **ALONE)
    found = mm.log_marginal(model, guide, batch, proposal=settled, num_particles=100, seed=0)
    assert (found.log_prob - model.log_prob(batch)).abs().max() < 1e-6
    assert found.pareto_k.max() <= 0 and found.log_prob[~batch.rows].abs().max() < 1e-14


def test_the_defaults_are_right_within_their_errors(double):
    model = linear(3)
    batch = every_pattern(model, rows=30, empty=False)
    found = mm.log_marginal(model, beside(model), batch, proposal="fitted", num_particles=400, seed=0)
    z = (found.log_prob - model.log_prob(batch)) / found.standard_error
    assert 0.8 < z.square().mean().sqrt() < 1.2, "of 210 rows: 1 +- 0.05"
    assert found.pareto_k.max() < 0.5 and found.ess.min() > 200
    assert found.evaluations == 600 and found.gradients == 4 * 32 + 4 * 64


def test_the_number_is_the_same_at_any_chunk_and_repeats_by_its_seed(double):
    model = linear(2)
    batch, guide = every_pattern(model, rows=1), beside(model)
    quick = mm.Fitted(rounds=3, pilot=50)
    state = torch.get_rng_state()
    one, *others = (
        mm.log_marginal(model, guide, batch, proposal=quick, num_particles=90, seed=3, chunk=chunk)
        for chunk in (None, 9, 50)
    )
    assert torch.equal(state, torch.get_rng_state())
    for other in others:
        torch.testing.assert_close(other.log_prob, one.log_prob, rtol=0, atol=1e-8)


def test_rows_in_any_order_and_in_blocks_agree_within_their_errors(double, monkeypatch):
    model = linear(2)
    batch = every_pattern(model, rows=20, empty=False)
    guide, order = beside(model), torch.randperm(60)
    options = {"proposal": "fitted", "num_particles": 300}
    whole = mm.log_marginal(model, guide, batch, seed=0, **options)
    shuffled = mm.log_marginal(model, guide, batch[order], seed=1, **options)
    monkeypatch.setattr(mm.Fitted, "rows_at_once", lambda self, structure, device: 7)
    blocks = mm.log_marginal(model, guide, batch, seed=2, **options)
    truth = model.log_prob(batch)
    assert within(whole, truth) and within(shuffled, truth[order]) and within(blocks, truth)
    assert blocks.proposal == repr(mm.Fitted()) and len(blocks) == 60


def test_weights_are_unbiased_however_bad_the_fit(double):
    """E[w] = p(x), after one round and with few draws as after many: the mean of the weights over 400 rows."""
    model = linear(2, latent=2)
    batch, guide = model.sample(400), beside(model)
    for proposal in (
        mm.Fitted(rounds=1, draws=4, pilot=5),
        mm.Fitted(rounds=1, draws=4, pilot=0, guide_share=0.3),
        mm.Fitted(components=2, pilot=30),
    ):
        found = mm.log_marginal(model, guide, batch, proposal=proposal, num_particles=40, seed=0)
        ratio = (found.log_prob - model.log_prob(batch)).exp()
        assert abs(ratio.mean() - 1) < 4 * ratio.std() / 20, "fails with probability 6e-5"


def constrained(batch):
    """Latents on the half-line, the interval and the simplex, beside a label that only the story has."""
    with batch.plate():
        rate = pyro.sample("rate", dist.LogNormal(0.0, 0.7))
        size = pyro.sample("size", dist.HalfNormal(1.0))
        part = pyro.sample("part", dist.Beta(2.0, 1.5))
        share = pyro.sample("share", dist.Dirichlet(torch.tensor([2.0, 1.5])))
        kind = pyro.sample("kind", dist.Categorical(torch.tensor([0.3, 0.7])))
        batch.observe("count", lambda rate, kind: dist.Poisson(rate * (1.0 + kind)), rate, kind)
        batch.observe("y", lambda size: dist.Normal(0.0, size + 0.1), size)
        batch.observe("u", lambda part: dist.Binomial(10, part), part)
        batch.observe("v", lambda share: dist.Binomial(4, share[..., 0]), share)


def constrained_guide(batch):
    rows = [len(batch)]
    with batch.plate():
        pyro.sample("rate", dist.LogNormal(0.2, 0.4).expand(rows))
        pyro.sample("size", dist.LogNormal(0.0, 0.5).expand(rows))
        pyro.sample("part", dist.Beta(2.0, 2.0).expand(rows))
        pyro.sample("share", dist.Dirichlet(torch.tensor([3.0, 3.0])).expand(rows))


def integral(log_prior, log_likelihood, grid):
    return torch.trapezoid((log_prior(grid) + log_likelihood(grid)).exp(), grid)


def constrained_evidence(batch):
    """The evidence of each row by quadrature: the parts are independent."""
    line, unit = torch.linspace(1e-6, 60, 40_001), torch.linspace(1e-9, 1 - 1e-9, 4001)
    rows = []
    for n in range(batch.size):
        counts = [
            weight
            * integral(
                dist.LogNormal(0.0, 0.7).log_prob,
                lambda r, n=n, k=k: dist.Poisson(r * k).log_prob(batch["count"][n]),
                line,
            )
            for k, weight in ((1, 0.3), (2, 0.7))
        ]
        parts = [
            sum(counts),
            integral(
                dist.HalfNormal(1.0).log_prob, lambda s, n=n: dist.Normal(0.0, s + 0.1).log_prob(batch["y"][n]), line
            ),
            integral(dist.Beta(2.0, 1.5).log_prob, lambda p, n=n: dist.Binomial(10, p).log_prob(batch["u"][n]), unit),
            integral(dist.Beta(2.0, 1.5).log_prob, lambda p, n=n: dist.Binomial(4, p).log_prob(batch["v"][n]), unit),
        ]
        present = [batch.present[name][n] for name in ("count", "y", "u", "v")]
        rows.append(sum(p.log() for p, there in zip(parts, present, strict=True) if there))
    return torch.stack(rows)


def test_constrained_latents_and_a_label_that_is_summed_out(double):
    batch = mm.Batch(
        {
            "count": torch.tensor([0.0, 3.0, 9.0, 1.0]),
            "y": torch.tensor([0.1, 1.5, -3.0, 0.4]),
            "u": torch.tensor([0.0, 5.0, 10.0, 2.0]),
            "v": torch.tensor([4.0, 2.0, 0.0, 1.0]),
        },
        present={"v": torch.tensor([True, True, True, False]), "y": torch.tensor([True, True, True, False])},
    )
    truth = constrained_evidence(batch)
    found = mm.log_marginal(constrained, constrained_guide, batch, proposal="fitted", num_particles=5000, seed=0)
    assert within(found, truth) and found.standard_error.max() < 0.03


def valleys(batch):
    """A latent of which the story sees the square, or its cosine: two modes and more."""
    with batch.plate():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        batch.observe("x", lambda z: dist.Normal(z.square(), 0.3), z)
        batch.observe("c", lambda z: dist.Normal((3 * z).cos(), 0.3), z)


def wide(batch):
    with batch.plate():
        pyro.sample("z", dist.Normal(0.0, 1.2).expand([len(batch)]))


def test_several_modes_are_found_by_several_components(double):
    torch.manual_seed(0)
    rows, _ = mm.simulate(valleys, mm.Batch({"x": torch.zeros(60), "c": torch.zeros(60)}))
    z = torch.linspace(-9, 9, 20_001)[:, None]
    for batch in (rows.only("x"), rows.only("c")):
        log_p = dist.Normal(0.0, 1.0).log_prob(z)
        if batch.presence("x") is not False:
            log_p = log_p + dist.Normal(z.square(), 0.3).log_prob(rows["x"])
        else:
            log_p = log_p + dist.Normal((3 * z).cos(), 0.3).log_prob(rows["c"])
        truth = torch.trapezoid(log_p.exp(), z, dim=0).log()
        found = mm.log_marginal(valleys, wide, batch, proposal=mm.Fitted(components=4), num_particles=2000, seed=0)
        assert within(found, truth) and found.ess.median() > 300


def private_pair():
    """A story with private latents, and a guide for any modalities."""
    torch.manual_seed(0)
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
    return model, guide, mm.Batch({"a": torch.randn(4, 3), "b": torch.randn(4, 3)}, present=present)


def test_private_latents_of_missing_modalities_count_nowhere(double):
    model, guide, batch = private_pair()
    plain = mm.log_marginal(model, guide, batch, num_particles=40_000, seed=0)
    found = mm.log_marginal(model, guide, batch, proposal="fitted", num_particles=2000, seed=0)
    both = (found.standard_error.square() + plain.standard_error.square()).sqrt()
    assert ((found.log_prob - plain.log_prob).abs() < 4.5 * both).all() or both[3] == 0
    assert found.log_prob[3] == 0 and found.standard_error[3] < 1e-7 and found.ess[:3].min() > 500
    assert found.ess[:3].min() > plain.ess[:3].min() / 20


@pytest.mark.parametrize("vectorize", [True, False])
def test_latents_in_plates_within_a_row_and_given_each_other(vectorize, double):
    batch = mm.Batch({"x": torch.tensor([0.3, -2.0, 4.0])})
    truth = dist.Normal(0.0, math.sqrt(9 + 3 * 0.25 + 1)).log_prob(batch["x"])
    model, guide = chain(vectorize)
    settings = mm.Fitted() if vectorize else mm.Fitted(rounds=4, draws=8, pilot=20)
    options = {"proposal": settings, "num_particles": 500 if vectorize else 100, "vectorize": vectorize}
    assert within(mm.log_marginal(model, guide, batch, seed=0, **options), truth)
    draws = mm.posterior_draws(model, guide, batch, 100, resample=True, seed=0, **options)
    assert draws["z"].shape == (100, 3) and draws["v"].shape == (100, 3, 3)


ESTIMATES = {
    "log_marginal": lambda m, g, b, **how: mm.log_marginal(m, g, b, **how),
    "log_conditional": lambda m, g, b, **how: mm.log_conditional(m, g, b, **NAMES, **how),
    **{
        f"protocols.{name}": lambda m, g, b, name=name, **how: getattr(protocols, name)(m, g, b, **NAMES, **how)
        for name in ("joint", "multiple", "single", "conditional", "both_ways")
    },
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_every_likelihood_takes_it_by_name_and_as_a_value(name, double):
    model = linear(2)
    batch = model.sample(6)
    guide = beside(model, 1.0, 0.2)
    both, x0, x1 = (model.log_prob(b) for b in (batch, batch.only("x0"), batch.only("x1")))
    truth = {"log_marginal": both, "joint": both, "multiple": x0, "single": x0, "both_ways": 2 * both - x0 - x1}
    truth |= {"log_conditional": both - x1, "conditional": both - x1}
    by_name, by_value = (
        ESTIMATES[name](model, guide, batch, proposal=how, num_particles=200, seed=0) for how in ("fitted", mm.Fitted())
    )
    assert torch.equal(by_name.log_prob, by_value.log_prob) and by_name.gradients > 0
    assert within(by_name, truth[name.removeprefix("protocols.")])
    with pytest.raises(ValueError, match=r"settings of draws once, got stratify=True beside proposal=Fitted\("):
        ESTIMATES[name](model, guide, batch, proposal="fitted", stratify=True)


def test_draws_by_weight_are_those_of_the_posterior(double):
    model = linear(2)
    batch = model.sample(3).only("x0")
    posterior = model.posterior(batch)
    options = {"resample": True, "num_particles": 4000, "proposal": "fitted", "seed": 0}
    z = mm.posterior_draws(model, beside(model), batch, 2000, **options)["z"]
    assert (z.mean(0) - posterior.mean).abs().max() < 6 / 2000**0.5
    torch.testing.assert_close(z.var(0), posterior.variance, rtol=0.3, atol=0.02)
    generated = mm.generate(model, beside(model), batch, 2000, mean=True, **options)
    torch.testing.assert_close(generated["x1"], model.likelihood("x1", z).mean)


def test_a_comparison_takes_it(double):
    model = linear(2)
    batch = model.sample(5)
    pairs = {"one": (model, beside(model)), "other": (model, mm.Guide(z=model.posterior))}
    found = mm.compare(pairs, batch, proposal="fitted", num_particles=100, seed=0)
    assert abs(found.candidates[0].mean - found.candidates[1].mean) < 0.1


def test_a_check_takes_it_and_its_gaps_then_hold(double):
    model = linear(2)
    batch = model.sample(20)
    guide, elbo = beside(model), mm.objectives.elbo()
    options = {"num_particles": 200, "repeats": 2}
    plain = mm.check(model, guide, elbo, batch, **options)
    found = mm.check(model, guide, elbo, batch, proposal="fitted", **options)
    assert "Guide as a proposal" in str(plain) and 'With proposal="fitted" one is fitted to each row' in str(plain)
    assert "Proposal fitted to each row" in str(found) and "doubtful, with" not in str(found)
    assert (
        abs(found.elbo.evidence - model.log_prob(batch).mean()) < 0.05 < abs(plain.elbo.evidence - found.elbo.evidence)
    )


def test_the_evidence_says_what_drew_it_and_what_it_cost(double):
    model = linear(2)
    batch = model.sample(5)
    plain = mm.log_marginal(model, beside(model), batch, num_particles=50, seed=0)
    assert plain.evaluations == 50 and plain.gradients == 0 and plain.proposal == repr(mm.Proposal())
    assert 'To do: proposal="fitted", which fits the proposal to each row' in plain.summary()
    found = mm.log_marginal(model, beside(model), batch, proposal="fitted", num_particles=50, seed=0)
    assert (found.evaluations, found.gradients) == (250, 384) and found.proposal == repr(mm.Fitted())
    assert "250 evaluations of the model and 384 of its gradient per row" in found.summary()
    assert found[:2].proposal == found.proposal and found[:2].gradients == 384
    both = mm.log_conditional(model, beside(model), batch, **NAMES, proposal="fitted", num_particles=50, seed=0)
    assert (both.evaluations, both.gradients) == (500, 768) and both.proposal == found.proposal


def test_pairs_that_cannot_be_fitted_are_refused_in_words(double):
    model = linear(2)
    batch, guide = model.sample(2), beside(model)

    def discrete(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("k", dist.Categorical(torch.ones(3)))

    def lonely(batch):
        with batch.plate():
            extra = pyro.sample("extra", dist.Normal(0.0, 1.0))
            batch.observe("x0", dist.Normal(extra[..., None], torch.ones(2)).to_event(1))

    def chained(batch):
        with batch.plate():
            x = batch.observe("x0", dist.Normal(torch.zeros(2), 1.0).to_event(1).expand([len(batch)]))
            z = pyro.sample("z", dist.Normal(x.sum(-1, keepdim=True), torch.ones(3)).to_event(1))
            batch.observe("x1", lambda z: dist.Normal(z, 1.0).to_event(1), z)

    def scaled(batch):
        with batch.plate(), pyro.poutine.scale(scale=2.0):
            pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1).expand([len(batch)]))

    def bounded(batch):
        with batch.plate():
            top = pyro.sample("top", dist.LogNormal(0.0, 1.0).expand([len(batch)]))
            pyro.sample("z", dist.Uniform(0.0, top))

    options = {"proposal": "fitted", "audit": False, "num_particles": 30}
    with pytest.raises(ValueError, match="'k' is discrete: sum it out instead"):
        mm.log_marginal(model, discrete, batch, **options)
    with pytest.raises(ValueError, match="the guide lacks 'extra', a latent of the model"):
        mm.log_marginal(lonely, guide, batch, **options)
    with pytest.raises(ValueError, match="this one draws while it is scored"):
        mm.log_marginal(chained, guide, batch.only("x1"), **options)
    with pytest.raises(ValueError, match="site 'z' is scaled by"):
        mm.log_marginal(model, scaled, batch, **options)
    with pytest.raises(ValueError, match="that of 'z' depends on another latent"):
        mm.log_marginal(bounded, bounded, batch, **options)
    with pytest.raises(ValueError, match=r"guide_share=0\.6 and prior_share=0\.4: their sum must be below 1"):
        mm.Fitted(guide_share=0.6, prior_share=0.4)


@pytest.mark.parametrize("posterior", POSTERIORS)
@pytest.mark.parametrize("model", MODELS)
def test_every_posterior_and_story_with_modalities_missing(model, posterior, double):
    """Against draws of the prior, whose weights are the bounded likelihoods of small rows."""
    torch.manual_seed(0)
    story, guide = pair(model, posterior)
    batch = data(5)
    quick = mm.Fitted(rounds=4, draws=16, pilot=40)
    found = mm.log_marginal(story, guide, batch, proposal=quick, num_particles=200, seed=0, audit=False)
    prior = mm.Proposal("quasi", prior_share=1.0)
    truth = mm.log_marginal(story, guide, batch, proposal=prior, num_particles=2000, seed=0, audit=False)
    error = (found.standard_error.square() + truth.standard_error.square()).sqrt()
    assert ((found.log_prob - truth.log_prob).abs() < 5 * error + 1e-9).all()


def test_a_site_that_the_guide_enumerates_is_summed_out_of_both(double):
    def model(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7])))
            z = pyro.sample("z", dist.Normal(2.0 * y - 1, 0.7))
            batch.observe("x", lambda z, y: dist.Normal(z + y, 0.5), z, y)

    def guide(batch):
        with batch.plate():
            logits = torch.zeros(len(batch), 2)
            y = pyro.sample("y", dist.Categorical(logits=logits), infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(batch["x"] / 2 - y / 2, 0.5))

    batch = mm.Batch({"x": torch.linspace(-2, 4, 30)})
    each = [w * dist.Normal(3.0 * y - 1, 0.74**0.5).log_prob(batch["x"]).exp() for y, w in enumerate((0.3, 0.7))]
    found = mm.log_marginal(model, guide, batch, proposal=mm.Fitted(guide_share=0.4, pilot=0), seed=0)
    assert within(found, sum(each).log())
    of_class = mm.class_probabilities(model, guide, batch, "y", proposal="fitted", seed=0)
    error = (of_class.probabilities[:, 1] - each[1] / sum(each)).abs()
    assert (error < 4 * of_class.standard_error[:, 1] + 1e-9).all() and of_class.evidence.proposal == repr(mm.Fitted())


@pytest.mark.parametrize("family", ["Laplace", "Exponential", "HalfNormal", "Uniform"])
def test_a_prior_that_can_be_made_normal_is(family, double):
    """Without information the posterior is the prior, which the fit then has to the last digits."""
    prior = {
        "Laplace": dist.Laplace(1.0, 2.0), "Exponential": dist.Exponential(0.5), "HalfNormal": dist.HalfNormal(3.0),
        "Uniform": dist.Uniform(-2.0, 3.0),
    }[family]  # fmt: skip
    near = {"Laplace": dist.Normal(1.0, 1.0), "Uniform": dist.Uniform(-2.0, 3.0)}.get(family, dist.LogNormal(0.0, 0.5))

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", prior)
            batch.observe("x", lambda z: dist.Normal(0 * z, 1.0), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", near.expand([len(batch)]))

    batch = mm.Batch({"x": torch.tensor([0.5, -1.0])})
    settled = mm.Fitted(rounds=40, **ALONE)
    found = mm.log_marginal(model, guide, batch, proposal=settled, num_particles=100, seed=0)
    assert (found.log_prob - dist.Normal(0.0, 1.0).log_prob(batch["x"])).abs().max() < 1e-6


def test_single_precision(double):
    model = linear(3)
    batch = every_pattern(model, rows=4)
    truth = model.log_prob(batch)
    torch.set_default_dtype(torch.float32)
    model = model.float()
    batch = mm.Batch({n: batch[n].float() for n in batch}, present={n: batch.present[n] for n in batch.names})
    found = mm.log_marginal(model, beside(model), batch, proposal="fitted", num_particles=400, seed=0)
    assert found.log_prob.dtype == torch.float32
    assert ((found.log_prob - truth).abs() < 4 * found.standard_error + 1e-4).all()


def test_a_row_without_finite_density_is_reported_and_others_are_fitted(double):
    def broken(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe(
                "x", lambda z: dist.Normal(z, torch.where(batch["x"] > 5, math.nan, 1.0), validate_args=False), z
            )

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(0.0, 0.3).expand([len(batch)]))

    batch = mm.Batch({"x": torch.tensor([0.5, 9.0, -1.0])})
    with override_validation(False):
        found = mm.log_marginal(broken, guide, batch, proposal="fitted", num_particles=200, seed=0, audit=False)
    truth = dist.Normal(0.0, 2**0.5).log_prob(batch["x"])
    assert found.lost.tolist() == [False, True, False] and within(found[[0, 2]], truth[[0, 2]])
    assert found.notes == ("the fit found no finite density in 1 of 3 rows: their Normals are the guide's",)


def test_the_prior_has_one_deviation_unless_its_rows_differ():
    torch.manual_seed(0)
    draws = torch.randn(256, 40, 2) * torch.tensor([1.0, 3.0])
    assert prior_deviations(draws).std(0).max() < 1e-5
    draws[:, :20] *= 0.2
    own = prior_deviations(draws)
    assert (own[:20] / torch.tensor([0.2, 0.6]) - 1).abs().max() < 0.2 and own[20:, 0].min() > 0.8


@pytest.mark.parametrize(
    ("device", "latent", "rows"),
    [("cpu", 2, 256), ("cuda", 2, 4096), ("cuda", 64, 4096), ("cuda", 128, 1024), ("cuda", 5000, 256)],
)
def test_more_rows_are_fitted_at_once_on_a_gpu_as_long_as_their_covariances_are_small(device, latent, rows):
    model = linear(2)
    structure = pair_structure(model, beside(model), model.sample(3))
    assert structure.latent_numbers == 3
    structure = replace(structure, latent_numbers=latent)
    assert mm.Fitted().rows_at_once(structure, torch.device(device)) == rows
