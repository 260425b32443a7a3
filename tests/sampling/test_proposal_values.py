"""``mm.Proposal`` as a value: the same draws as by keywords, and a proposal of one's own by the same protocol."""

import dataclasses
from dataclasses import dataclass

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_mm as mm
from pyro_mm import protocols
from pyro_mm.sampling.particle_sampler import ParticleSampler, ProposalScheme
from pyro_mm.scoring.reduction import SiteReducer
from pyro_mm.scoring.structure import latent_sites
from tests.support.linear_gaussian import every_pattern, oracle

SETTINGS = [{}, {"draws": "antithetic"}, {"draws": "quasi", "stratify": False}, {"prior_share": 0.25}]
FEW = {"num_particles": 40, "seed": 3}
NAMES = {"target": ("x0",), "given": ("x1",)}


@pytest.fixture
def pair(double):
    """A linear-Gaussian story, a guide that is wider than the posterior and beside it, and rows of every pattern."""
    torch.manual_seed(1)
    model = oracle(3, latent=2, noise=1.0)
    for p in model.parameters():
        p.requires_grad_(False)

    def beside(batch):
        q = model.posterior(batch)
        return dist.Normal(q.mean + 0.3, 1.3 * q.stddev).to_event(1)

    return model, mm.Guide(z=beside), every_pattern(model, rows=2, empty=False)


ESTIMATES = {
    "log_marginal": lambda m, g, b, **how: mm.log_marginal(m, g, b, **FEW, **how),
    "log_conditional": lambda m, g, b, **how: mm.log_conditional(m, g, b, target="x0", given="x1", **FEW, **how),
    "posterior_draws": lambda m, g, b, **how: mm.posterior_draws(m, g, b, 5, resample=True, **FEW, **how),
    "compare": lambda m, g, b, **how: mm.compare({"a": (m, g), "b": (m, g)}, b, **FEW, **how),
    "compare, conditional": lambda m, g, b, **how: mm.compare(
        {"a": (m, g), "b": (m, g)}, b, target="x0", given="x1", **FEW, **how
    ),
    **{
        f"protocols.{name}": lambda m, g, b, name=name, **how: getattr(protocols, name)(m, g, b, **NAMES, **FEW, **how)
        for name in ("joint", "multiple", "single", "conditional", "both_ways")
    },
}


def numbers(result):
    """Return the tensors of a result, in order."""
    if isinstance(result, mm.Comparison):
        result = result.evidence
    if isinstance(result, mm.Evidence):
        return [result.log_prob, result.standard_error, result.ess, result.pareto_k]
    return [
        x for value in result.values() for x in (numbers(value) if not isinstance(value, torch.Tensor) else [value])
    ]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ESTIMATES)
def test_a_proposal_gives_the_numbers_of_its_fields_one_by_one(name, settings, pair):
    by_value = numbers(ESTIMATES[name](*pair, proposal=mm.Proposal(**settings)))
    by_keyword = numbers(ESTIMATES[name](*pair, **settings))
    assert len(by_value) == len(by_keyword) > 0
    for one, other in zip(by_value, by_keyword, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    default = numbers(ESTIMATES[name](*pair))
    assert (settings == {}) == all(torch.equal(one, other) for one, other in zip(by_value, default, strict=True))


def test_generate_takes_latents_by_the_proposal_that_it_is_given(pair):
    model, guide, batch = pair
    options = {"num_samples": 4, "resample": True, "num_particles": 30, "seed": 0}
    quasi = mm.generate(model, guide, batch, proposal=mm.Proposal("quasi"), **options)
    plain = mm.generate(model, guide, batch, **options)
    named = mm.generate(model, guide, batch, proposal=mm.Proposal(), **options)
    assert all(torch.equal(plain[n], named[n]) for n in plain)
    assert not any(torch.equal(plain[n], quasi[n]) for n in plain)
    z = mm.posterior_draws(model, guide, batch, proposal=mm.Proposal("quasi"), **options)["z"]
    means = mm.generate(model, guide, batch, proposal=mm.Proposal("quasi"), mean=True, **options)
    torch.testing.assert_close(means["x0"], model.likelihood("x0", z).mean)


@pytest.mark.parametrize("name", ESTIMATES)
def test_a_proposal_and_its_fields_are_refused_together(name, pair):
    words = r"settings of draws once, got stratify=True, prior_share=0.0 beside proposal=Proposal\(draws='quasi', "
    with pytest.raises(ValueError, match=words):
        ESTIMATES[name](*pair, proposal=mm.Proposal("quasi"), stratify=True, prior_share=0.0)


def test_a_proposal_without_weights_is_refused(pair):
    for function in (mm.generate, mm.posterior_draws):
        with pytest.raises(ValueError, match="proposal: for draws by weight, with resample=True"):
            function(*pair, proposal=mm.Proposal())


@pytest.mark.parametrize("wrong", ["quasi", 3, {"draws": "quasi"}])
def test_an_argument_that_is_no_proposal_is_named(wrong, pair):
    words = r"expected proposal to be a pyro_mm\.Proposal, a pyro_mm\.Fitted, 'fitted' or None, got"
    with pytest.raises(TypeError, match=words if isinstance(wrong, str) else "expected proposal to be a function"):
        mm.log_marginal(*pair, proposal=wrong)
    with pytest.raises(TypeError, match=words):
        mm.log_conditional(*pair, target="x0", proposal=wrong)
    with pytest.raises(TypeError, match=words):
        mm.posterior_draws(*pair, resample=True, proposal=wrong)


def test_a_proposal_is_a_frozen_value_that_prints_itself():
    proposal = mm.Proposal("antithetic", prior_share=0.1)
    assert repr(proposal) == "Proposal(draws='antithetic', stratify=True, prior_share=0.1)"
    assert eval(repr(proposal), {"Proposal": mm.Proposal}) == proposal and len({proposal, mm.Proposal()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        proposal.draws = "quasi"
    with pytest.raises(TypeError, match="stratify to be True or False, got 1"):
        mm.Proposal(stratify=1)


@dataclass(frozen=True)
class Exact(ProposalScheme):
    """Draws around the exact posterior of a linear-Gaussian story, in pairs z and 2 m - z, m being its mean."""

    model: mm.models.LinearGaussian
    width: float = 1.0

    def sampler(self, rows):
        return ExactSampler(self.model.posterior(rows.views.encode), self.width)


class ExactSampler(ParticleSampler):
    group_size = 2

    def __init__(self, q, width):
        self.q = dist.MultivariateNormal(q.mean, width**2 * q.covariance_matrix)

    def draw(self, pair):
        half = self.q.sample((-(-pair.num_particles // 2),))
        z = torch.stack([half, 2 * self.q.mean - half], 1).flatten(0, 1)[: pair.num_particles]
        with poutine.block():
            pair.guide()
        trace = pair.trace.copy()
        (site,) = latent_sites(trace).values()
        site = site | {"value": z.reshape(site["value"].shape)}
        trace.nodes["z"] = site
        pair.trace = trace
        pair.log_q = {"z": SiteReducer(pair).log_prob(site | {"fn": self.q})}  # 0 in rows where nothing is present


@pytest.mark.parametrize("options", [{}, {"chunk": 7}, {"vectorize": False}, {"num_particles": 1}], ids=str)
def test_a_proposal_of_ones_own_is_two_classes(options, pair):
    """Exact draws have weights without variance, whatever the guide: the evidence is the closed form."""
    model, guide, batch = pair
    proposal = Exact(model)
    options = {"num_particles": 6, "seed": 0} | options
    found = mm.log_marginal(model, guide, batch, proposal=proposal, **options)
    torch.testing.assert_close(found.log_prob, model.log_prob(batch), rtol=0, atol=1e-10)
    conditional = mm.log_conditional(model, guide, batch, target="x0", given="x1", proposal=proposal, **options)
    truth = model.log_conditional(batch, ["x0"], ["x1"])
    torch.testing.assert_close(conditional.log_prob, truth, rtol=0, atol=1e-10)
    single = protocols.single(model, guide, batch, ("x0",), proposal=proposal, **options)
    torch.testing.assert_close(single.log_prob, model.log_prob(batch.only("x0")), rtol=0, atol=1e-10)


def test_groups_of_a_proposal_of_ones_own_are_those_of_the_standard_error(pair):
    """Pairs around the mean have equal weights here, so that K draws are worth K / 2."""
    model, guide, _ = pair
    rows = model.sample(400)
    wide = Exact(model, width=1.3)
    found = mm.log_marginal(model, guide, rows, num_particles=400, seed=0, proposal=wide)
    pulls = (found.log_prob - model.log_prob(rows)) / found.standard_error
    # 400 standard normal numbers: their root mean square is 1 within 0.035; with groups of one it would be 1.41
    assert 0.85 < pulls.square().mean().sqrt() < 1.15


def test_a_proposal_of_ones_own_resamples(pair):
    model, guide, batch = pair
    options = {"resample": True, "num_particles": 400, "seed": 0, "proposal": Exact(model)}
    z = mm.posterior_draws(model, guide, batch, 400, **options)["z"]
    q = model.posterior(batch)
    # equal weights, 400 draws with replacement out of 200 pairs around the mean
    off = (z.mean(0) - q.mean).abs() / q.stddev
    assert off.max() < 5 * (1 / 400) ** 0.5
    assert mm.generate(model, guide, batch, 3, **options)["x0"].shape[:2] == (3, batch.size)
