"""Noise and the proposals made of it: exact properties of the points, and unbiased estimates with honest errors."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import TransformedDistribution
from torch.distributions.transforms import AffineTransform, ExpTransform

import pyro_mm as mm
import pyro_mm.sampling.streams
from pyro_mm.distributions.mixture import Mixture
from pyro_mm.distributions.quantiles import component_at, quantile
from pyro_mm.distributions.where import Where
from pyro_mm.sampling.proposals import Proposal
from pyro_mm.sampling.streams import REPLICATES, Antithetic, QuasiRandom, Systematic
from tests.support.linear_gaussian import every_pattern, oracle

CPU = torch.device("cpu")
HOW = {
    "independent": {},
    "not stratified": {"stratify": False},
    "antithetic": {"draws": "antithetic"},
    "quasi": {"draws": "quasi"},
    "defensive": {"prior_share": 0.25},
    "defensive at random": {"prior_share": 0.25, "stratify": False},
    "defensive, antithetic": {"prior_share": 0.25, "draws": "antithetic"},
    "defensive, quasi": {"prior_share": 0.25, "draws": "quasi"},
    "prior": {"prior_share": 1.0},
}


# -- the points ---------------------------------------------------------------------------------------------------

STREAMS = {
    "systematic": lambda: Systematic(23, 4, 5, 1, 0, CPU),
    "systematic, repeated": lambda: Systematic(23, 4, 3, 2, 0, CPU),
    "antithetic": lambda: Antithetic(4, 3, 0, CPU),
    "quasi": lambda: QuasiRandom(4, 3, 6, 0, CPU),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_does_not_depend_on_how_it_is_taken(name):
    whole = STREAMS[name]().take(23)
    stream = STREAMS[name]()
    torch.testing.assert_close(torch.cat([stream.take(k) for k in (1, 7, 2, 13)]), whole, rtol=0, atol=0)
    assert whole.shape[:2] == (23, 4) and ((whole >= 0) & (whole <= 1)).all()
    assert not torch.equal(whole[:, 0], whole[:, 1]), "rows have noise of their own"


def test_systematic_noise_has_one_point_in_every_interval():
    u = Systematic(23, 4, 5, 1, 0, CPU).take(23)
    for start, size in ((0, 5), (5, 5), (15, 5), (20, 3)):  # the last group is what is left
        cells = (u[start : start + size] * size).floor().sort(0).values
        assert torch.equal(cells, torch.arange(size, dtype=cells.dtype)[:, None].expand(-1, 4))
    each = Systematic(5, 4000, 5, 1, 0, CPU).take(5).mean(1)
    assert (each - 0.5).abs().max() < 4.5 / 12**0.5 / 4000**0.5, (
        "each of a group is uniform by itself, not the k-th fifth"
    )
    doubled = Systematic(24, 4, 3, 2, 0, CPU).take(24)
    assert torch.equal(doubled[::2], doubled[1::2])


def test_antithetic_pairs_add_to_one():
    u = Antithetic(4, 3, 0, CPU).take(10)
    torch.testing.assert_close(u[::2] + u[1::2], torch.ones(5, 4, 3, dtype=u.dtype))


def test_quasi_random_points_fill_the_cube():
    """A group of 64 Sobol points has 4 in every sixteenth of each coordinate, shifted as they are 3 to 5."""
    u = QuasiRandom(2, 3, 64, 0, CPU).take(128)
    for group in (u[:64], u[64:]):
        counts = torch.stack([(group * 16).floor().eq(i).sum(0) for i in range(16)])
        assert counts.sum(0).eq(64).all() and (counts >= 3).all() and (counts <= 5).all()
    assert not torch.equal(u[:64], u[64:])
    with pytest.raises(ValueError, match="at most 21201 dimensions"):
        QuasiRandom(1, 30000, 4, 0, CPU)


def test_quantiles_are_those_of_the_families(double):
    u = torch.rand(1000, 2)
    choice = torch.rand(1000)
    loc, scale = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])
    normal = dist.Normal(loc, scale).to_event(1)
    torch.testing.assert_close(quantile(normal.expand([1000]), u, choice), dist.Normal(loc, scale).icdf(u))
    flow = TransformedDistribution(dist.Normal(loc, scale).to_event(1), [AffineTransform(1.0, 2.0, 1), ExpTransform()])
    torch.testing.assert_close(quantile(flow, u, choice), (1 + 2 * dist.Normal(loc, scale).icdf(u)).exp())
    mask = choice < 0.3
    both = quantile(Where(mask, normal.expand([1000]), dist.Laplace(loc, scale).to_event(1).expand([1000])), u, choice)
    torch.testing.assert_close(both[mask], dist.Normal(loc, scale).icdf(u)[mask])
    torch.testing.assert_close(both[~mask], dist.Laplace(loc, scale).icdf(u)[~mask])
    triangle = torch.tensor([[0.5, 0.0], [3.0, 2.0]])
    drawn = quantile(dist.MultivariateNormal(loc, scale_tril=triangle).expand([1000]), u, choice)
    torch.testing.assert_close(drawn, loc + dist.Normal(0.0, 1.0).icdf(u) @ triangle.T)
    parts = dist.Normal(torch.stack([loc, loc + 100.0, loc - 100.0]), scale).to_event(1)
    mixture = Mixture(parts, torch.tensor([0.25, 0.75, 0.0]).log()).expand([1000])
    drawn = quantile(mixture, u, choice)
    torch.testing.assert_close(drawn, dist.Normal(loc, scale).icdf(u) + 100.0 * (choice >= 0.25)[:, None])
    with pytest.raises(NotImplementedError):
        quantile(dist.Gamma(2.0, 1.0), torch.rand(3), torch.rand(3))


def test_components_fall_in_their_proportions(double):
    parts = dist.Normal(torch.zeros(4), 1.0)
    mixture = Mixture(parts, torch.tensor([-math.inf, math.log(0.3), math.log(0.7), -math.inf]))
    u = (torch.arange(1000) + 0.5) / 1000
    assert torch.bincount(component_at(mixture.expand([1000]), u), minlength=4).tolist() == [0, 300, 700, 0]
    ends = component_at(mixture.expand([2]), torch.tensor([0.0, math.nextafter(1.0, 0.0)]))
    assert ends.tolist() == [1, 2], "never a component that is left out"


# -- estimates ----------------------------------------------------------------------------------------------------


class Broad(torch.nn.Module):
    """A mixture with an expert a modality, wider than the posterior, so that weights are bounded."""

    def __init__(self, model, mixture, shift=0.0):
        super().__init__()
        self.model, self.mixture, self.shift = model, mixture, shift

    def forward(self, batch):
        q = self.model.posterior(batch)
        loc, wide = q.mean + self.shift, 1.2 * torch.ones_like(q.mean)
        if not self.mixture:
            return dist.Normal(loc, wide).to_event(1)
        masks = torch.stack([batch.present[n].expand(loc.shape[:-1]) for n in batch.names], -1)
        shifts = torch.linspace(-0.6, 0.6, len(batch.names))
        components = dist.Normal(loc[..., None, :] + shifts[:, None], 1.3).to_event(1)
        return Mixture(components, torch.where(masks, 0.0, -torch.inf))


@pytest.fixture(scope="module")
def broad():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    model = oracle(3, latent=2, noise=1.0)
    for p in model.parameters():
        p.requires_grad_(False)
    torch.manual_seed(3)
    yield model, {kind: mm.Guide(z=Broad(model, kind == "mixture")) for kind in ("single", "mixture")}
    torch.set_default_dtype(before)


@pytest.mark.parametrize("kind", ["single", "mixture"])
@pytest.mark.parametrize("how", HOW)
def test_every_proposal_is_unbiased_and_knows_its_error(how, kind, broad):
    model, guides = broad
    batch = every_pattern(model, rows=40, empty=False)  # 280 rows, each with draws of its own
    truth = model.log_prob(batch)
    found = mm.log_marginal(model, guides[kind], batch, num_particles=400, seed=11, **HOW[how])
    ratio = (found.log_prob - truth).exp()  # of mean 1 in every row
    t = (ratio.mean() - 1) / (ratio.std() / len(batch) ** 0.5)
    assert abs(t) < 4, "fails with probability 6e-5"
    # 280 standardised errors of variance about 1 (t with 19 degrees of freedom for quasi-random draws): the mean of
    # their squares has a standard error of 0.09
    z = (found.log_prob - truth) / found.standard_error
    assert 0.6 < z.square().mean() < 1.6
    assert (z.abs() > 4).sum() <= 2


def test_better_draws_have_smaller_errors(broad):
    """Quasi-random draws always; antithetic ones where weights change sign-wise, and not where they are symmetric."""
    model, guides = broad
    batch = every_pattern(model, rows=150, empty=False)
    truth = model.log_prob(batch)

    def error(guide, how):
        found = mm.log_marginal(model, guide, batch, num_particles=1000, seed=2, **HOW[how])
        return (found.log_prob - truth).square().mean().sqrt()  # of a relative error of 2 %

    plain = error(guides["single"], "independent")
    assert error(guides["single"], "quasi") < 0.5 * plain
    assert error(guides["single"], "antithetic") > 1.2 * plain, "pairs of equal weights are half as many draws"
    shifted = mm.Guide(z=Broad(model, False, shift=0.8))
    assert error(shifted, "antithetic") < 0.97 * error(shifted, "independent")  # 0.89 of it


def test_stratified_draws_remove_the_choice_of_components():
    """Components of which only one has any weight: at random their number adds an error, stratified it does not."""

    def guide(batch):
        with batch.plate():
            far = dist.Normal(torch.tensor([[0.0], [50.0]]), 1.0).to_event(1)
            pyro.sample("z", Mixture(far, torch.tensor([0.5, 0.5]).log()).expand([len(batch)]))

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            batch.observe("x", lambda z: dist.Normal(0 * z, 1.0).to_event(1), z)

    batch = mm.Batch({"x": torch.zeros(50, 1)})
    truth = -0.5 * math.log(2 * math.pi)
    for stratify, size in ((True, 0.0), (False, 1 / 20)):  # half the draws count: their number has a relative error
        found = mm.log_marginal(model, guide, batch, num_particles=400, seed=0, stratify=stratify)
        errors = (found.log_prob - truth).abs()
        assert errors.max() <= 1e-5 if stratify else errors.square().mean().sqrt() > size / 2
        np.testing.assert_allclose(found.standard_error, size, atol=3e-3, rtol=0.2)
        np.testing.assert_allclose(found.ess, 200, rtol=0.2)
    mixed = mm.log_marginal(model, guide, batch, num_particles=400, seed=0, prior_share=0.25)
    ratio = (mixed.log_prob - truth).exp()  # 5/8 of the draws count: a quarter of the prior's, half of the others
    assert abs(ratio.mean() - 1) < 0.01 and 200 < mixed.ess.mean() < 300


def test_weights_of_a_defensive_proposal_are_bounded(broad):
    """No weight exceeds p(x | z) / share, so a guide that is far too narrow is rescued."""
    model, _ = broad

    def narrow(batch):
        return dist.Normal(model.posterior(batch).mean + 1.0, 0.05).to_event(1)

    guide = mm.Guide(z=narrow)
    batch = model.sample(30)
    truth = model.log_prob(batch)
    bare = mm.log_marginal(model, guide, batch, num_particles=4000, seed=0)
    safe = mm.log_marginal(model, guide, batch, num_particles=4000, seed=0, prior_share=0.5)
    assert (bare.log_prob - truth).abs().median() > 1 and bare.doubtful.double().mean() > 0.9
    trusted = ~safe.doubtful
    assert trusted.double().mean() > 0.8
    assert ((safe.log_prob - truth).abs() < 4.5 * safe.standard_error)[trusted].all()


def test_the_prior_alone_is_a_proposal(broad):
    """With all draws from the prior the weights are p(x | z), whatever the guide."""
    model, guides = broad
    batch = model.sample(5)
    found = mm.log_marginal(model, guides["single"], batch, num_particles=200_000, seed=0, prior_share=1.0)
    assert ((found.log_prob - model.log_prob(batch)).abs() < 4.5 * found.standard_error).all()
    other = mm.log_marginal(model, guides["mixture"], batch, num_particles=3000, seed=0, prior_share=1.0, chunk=77)
    assert not torch.isnan(other.log_prob).any()


@pytest.mark.parametrize("how", HOW)
def test_a_proposal_in_chunks_gives_the_same_numbers(how, broad):
    model, guides = broad
    batch = every_pattern(model, rows=3)
    whole = mm.log_marginal(model, guides["mixture"], batch, num_particles=60, seed=5, **HOW[how])
    again = mm.log_marginal(model, guides["mixture"], batch, num_particles=60, seed=5, chunk=7, **HOW[how])
    for column in ("log_prob", "standard_error", "ess", "pareto_k"):
        one, other = getattr(whole, column), getattr(again, column)
        torch.testing.assert_close(other, one, rtol=1e-10, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("how", HOW)
def test_every_proposal_is_unbiased_for_draws_one_by_one(how, broad):
    model, guides = broad
    batch = model.sample(4)
    found = mm.log_marginal(model, guides["mixture"], batch, num_particles=100, seed=0, vectorize=False, **HOW[how])
    # four differences: |t| > 5 in one of them has probability 1e-4 or less with 19 degrees of freedom
    assert ((found.log_prob - model.log_prob(batch)).abs() < 5 * found.standard_error).all()


@pytest.mark.parametrize("how", ["independent", "antithetic", "quasi", "defensive"])
def test_every_proposal_is_unbiased_for_latents_in_plates_within_a_row(how, double):
    """A story with a vectorised plate within each row: quantiles and priors land in the right places."""

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("parts", 3, dim=-2):
                v = pyro.sample("v", dist.Normal(z, 0.5))
            batch.observe("x", lambda v: dist.Normal(v.sum(-2, keepdim=True), 1.0), v)

    def guide(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(batch["x"] / 4, 0.9))
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("v", dist.Normal(z, 0.7))

    batch = mm.Batch({"x": torch.tensor([0.3, -2.0, 4.0, 1.0])})
    truth = dist.Normal(0.0, math.sqrt(9 + 3 * 0.25 + 1)).log_prob(batch["x"])
    found = mm.log_marginal(model, guide, batch, num_particles=20_000, seed=0, **HOW[how])
    assert ((found.log_prob - truth).abs() < 4.5 * found.standard_error + 1e-9).all()
    assert found.standard_error.max() < 0.05


def test_a_share_of_the_prior_is_exact_for_a_latent_given_another(double):
    """The guide's second site is scored again at the prior's draws of the first."""

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            w = pyro.sample("w", dist.Normal(z, 1.0))
            batch.observe("x", lambda w: dist.Normal(w, 1.0), w)

    def guide(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(batch["x"] / 3, 1.0))
            pyro.sample("w", dist.Normal((z + batch["x"]) / 2, 0.8))

    batch = mm.Batch({"x": torch.tensor([0.3, -2.0, 4.0])})
    truth = dist.Normal(0.0, math.sqrt(3)).log_prob(batch["x"])
    for how in HOW.values():
        found = mm.log_marginal(model, guide, batch, num_particles=20_000, seed=0, **how)
        assert ((found.log_prob - truth).abs() < 4.5 * found.standard_error + 1e-9).all(), how


def test_a_proposal_refuses_unknown_draws_and_shares_out_of_range(broad):
    model, guides = broad
    batch = model.sample(3)
    with pytest.raises(ValueError, match="draws to be one of 'independent', 'antithetic', 'quasi', got 'sobol'"):
        mm.log_marginal(model, guides["single"], batch, draws="sobol")
    with pytest.raises(ValueError, match=r"prior_share >= 0 and <= 1, got 1.5"):
        Proposal(prior_share=1.5)

    def gamma(batch):
        with batch.plate():
            pyro.sample("z", dist.Gamma(torch.ones(2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="site 'z' cannot be drawn from uniforms, so take draws='independent'"):
        mm.log_marginal(model, gamma, batch, draws="quasi")

    def both(batch):
        with batch.plate():
            pyro.sample("z", Broad(model, False)(batch))
            pyro.sample("extra", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'extra' is in the guide only"):
        mm.log_marginal(model, both, batch, prior_share=0.1, audit=False)

    def chained(batch):
        with batch.plate():
            x = batch.observe("x0", dist.Normal(torch.zeros(2), 1.0).to_event(1).expand([len(batch)]))
            z = pyro.sample("z", dist.Normal(x, 1.0).to_event(1))
            batch.observe("x1", lambda z: dist.Normal(z.sum(-1, keepdim=True), torch.ones(3)).to_event(1), z)

    with pytest.raises(ValueError, match="this story draws while it is scored"):
        mm.log_marginal(chained, guides["single"], batch.only("x1"), prior_share=0.1)


def counts_story(batch):
    with batch.plate():
        z = pyro.sample("z", dist.Poisson(3.0))
        batch.observe("x", lambda z: dist.Normal(z, 1.0), z)


def counts_guide(batch):
    with batch.plate():
        parts = dist.Poisson(torch.tensor([1.0, 3.0, 6.0]))
        pyro.sample("z", Mixture(parts, torch.tensor([0.3, 0.5, 0.2]).log()).expand([len(batch)]))


def test_a_mixture_of_components_without_rsample_is_stratified_too(double):
    """Of counts, against the sum over them; the components in their proportions."""
    batch = mm.Batch({"x": torch.tensor([0.5, 3.0, 7.0])})
    z = torch.arange(60.0)
    truth = (dist.Poisson(3.0).log_prob(z) + dist.Normal(z, 1.0).log_prob(batch["x"][:, None])).logsumexp(-1)
    for how in ({}, {"stratify": False}, {"prior_share": 0.25}):
        found = mm.log_marginal(counts_story, counts_guide, batch, num_particles=20_000, seed=0, **how)
        assert ((found.log_prob - truth).abs() < 4.5 * found.standard_error).all() and found.standard_error.max() < 0.05
    drawn = mm.posterior_draws(counts_story, counts_guide, batch, 7, resample=True, num_particles=100)["z"]
    assert drawn.shape == (7, 3) and (drawn == drawn.round()).all()


@pytest.mark.parametrize("draws", ["antithetic", "quasi"])
def test_draws_without_an_inverse_distribution_function_are_refused_in_words(draws, double):
    def many(batch):  # a mixture for each of three coordinates
        with batch.plate():
            parts = dist.Normal(torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 3.0]]), 1.0)
            pyro.sample("z", Mixture(parts, torch.tensor([0.5, 0.5]).log()).expand([len(batch), 3]).to_event(1))

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            batch.observe("x", lambda z: dist.Normal(z.sum(-1), 1.0), z)

    batch = mm.Batch({"x": torch.tensor([0.5, 3.0, 7.0])})
    words = "site 'z' cannot be drawn from uniforms, so take draws='independent': "
    with pytest.raises(ValueError, match=words + "a mixture inside to_event chooses a component for each of its"):
        mm.log_marginal(story, many, batch, num_particles=100, draws=draws)
    with pytest.raises(ValueError, match=words + "components of type Poisson cannot be taken one by one"):
        mm.log_marginal(counts_story, counts_guide, batch, num_particles=100, draws=draws)
    found = mm.log_marginal(story, many, batch, num_particles=100_000, seed=0)
    truth = dist.Normal(0.0, 2.0).log_prob(batch["x"])
    assert ((found.log_prob - truth).abs() < 4.5 * found.standard_error).all()


@pytest.mark.parametrize("how", ["independent", "antithetic", "quasi", "defensive, antithetic", "defensive, quasi"])
def test_the_two_halves_of_a_conditional_share_no_stream(how, broad, monkeypatch):
    """Errors in quadrature are those of independent draws: no two streams of one seed, nor a Sobol scrambling twice.

    As torch's generators see them, which is by their last 32 bits; those of the caller under that seed and near-by
    ones, who may have made the rows with them, are none of these either.
    """
    model, guides = broad
    streams, scramblings, Engine, generator = [], [], torch.quasirandom.SobolEngine, pyro_mm.sampling.streams.generator

    class Seen(Engine):
        def __init__(self, *args, **options):
            scramblings.append(options["seed"])
            super().__init__(*args, **options)

    def seen(seed, device):
        streams.append(seed % 2**32)
        return generator(seed, device)

    monkeypatch.setattr(pyro_mm.sampling.streams, "generator", seen)
    monkeypatch.setattr(torch.quasirandom, "SobolEngine", Seen)
    batch = model.sample(3)
    mm.log_conditional(model, guides["mixture"], batch, target="x0", given=["x1"], num_particles=60, seed=4, **HOW[how])
    assert len(streams) == (2 if how == "independent" else 4)
    assert len(scramblings) == (2 * REPLICATES if "quasi" in how else 0)
    blocks = {mm.utils.seeding.part_seed(seed, 0) % 2**32 for seed in (4, 5)}
    assert len({*streams, *blocks, *range(100)}) == len(streams) + 102
    assert len(set(scramblings)) == len(scramblings)


def test_the_errors_of_the_two_halves_are_independent(double):
    """Of 4000 rows: the correlation of the two estimates, of standard error 0.016, within 4.5 of them.

    It was 0.10 where the uniforms that choose the joint's draws were those that made the marginal's.
    """

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for n in "xy":
                batch.observe(n, lambda z: dist.Normal(z, 1.0), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.ones(batch.size), 0.5))

    batch = mm.Batch({n: torch.full((4000,), -0.5) for n in "xy"})
    options = {"num_particles": 20, "seed": 0, "draws": "antithetic", "prior_share": 0.2}
    joint = mm.log_marginal(model, guide, batch, **options).log_prob
    marginal = joint - mm.log_conditional(model, guide, batch, target="y", given="x", **options).log_prob
    assert abs(torch.corrcoef(torch.stack([joint.exp(), marginal.exp()]))[0, 1]) < 4.5 / 4000**0.5


def test_a_standard_error_has_the_stated_number_of_independent_groups(broad):
    """The number of independent groups behind a standard error, as the docstrings say."""
    assert REPLICATES == 20
    model, guides = broad
    batch = model.sample(2)
    one = mm.log_marginal(model, guides["mixture"], batch, num_particles=2, seed=0)
    assert not one.standard_error.isnan().any(), "two particles are two groups, mixture or not"
    assert mm.log_marginal(model, guides["mixture"], batch, num_particles=1, seed=0).standard_error.isnan().all()
