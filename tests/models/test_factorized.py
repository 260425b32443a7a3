"""Factorised stories: against closed forms and quadrature, with labels and modalities missing; swaps of factors."""

import math
from itertools import combinations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import pyro_mm as mm
from pyro_mm.objectives import Objective, Term

SHARED, PRIVATE = 2, {"a": 1, "b": 2}
FACTOR, PRIVATE_FACTOR = 3, {"a": 2, "b": 2}
SIZES, NOISE = {"a": 3, "b": 2, "label": 1}, {"a": 0.6, "b": 0.9, "label": 0.4}


def standard(size):
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


def linear_story():
    """A story of affine networks, with a real label."""
    decoders = {
        name: mm.conditionals.Normal(nn.Linear(FACTOR + PRIVATE_FACTOR[name], SIZES[name]), scale=NOISE[name])
        for name in "ab"
    }
    labels = {"label": mm.conditionals.Normal(nn.Linear(FACTOR, 1), scale=NOISE["label"])}
    factors = {name: nn.Linear(PRIVATE[name], PRIVATE_FACTOR[name]) for name in "ab"}
    priors = {name: standard(size) for name, size in PRIVATE.items()}
    return mm.models.Factorized(standard(SHARED), priors, decoders, labels, nn.Linear(SHARED, FACTOR), factors)


def as_linear_gaussian(story):
    """The same story with one latent, [z, w_a, w_b]."""
    columns = {"z": slice(0, 2), "a": slice(2, 3), "b": slice(3, 5)}
    loadings, offsets = {}, {}
    for name in (*"ab", "label"):
        net = (story.labels if name == "label" else story.decoders)[name].net
        of_shared = net.weight[:, :FACTOR]
        loading = torch.zeros(SIZES[name], 5)
        loading[:, columns["z"]] = of_shared @ story.factor.weight
        offset = net.bias + of_shared @ story.factor.bias
        if name != "label":
            of_private = net.weight[:, FACTOR:]
            loading[:, columns[name]] = of_private @ story.private_factors[name].weight
            offset = offset + of_private @ story.private_factors[name].bias
        loadings[name], offsets[name] = loading.detach(), offset.detach()
    return mm.models.LinearGaussian(loadings, NOISE, offsets), columns


def exact_guide(linear, columns):
    """q(z | x_S) q(w_a | z, x_S) q(w_b | z, x_S), all exact."""

    def guide(batch):
        posterior = linear.posterior(batch)
        mean, covariance = posterior.mean, posterior.covariance_matrix
        z = columns["z"]
        with batch.plate():
            value = pyro.sample("z", dist.MultivariateNormal(mean[..., z], covariance[..., z, z]))
            for name in "ab":
                own = columns[name]
                slope = torch.linalg.solve(covariance[..., z, z], covariance[..., z, own]).mT
                loc = mean[..., own] + (slope @ (value - mean[..., z])[..., None])[..., 0]
                rest = covariance[..., own, own] - slope @ covariance[..., z, own]
                pyro.sample(f"w_{name}", dist.MultivariateNormal(loc, rest))

    return guide


def rows_with_every_pattern(linear, repeats=2):
    """Each set of modalities and label, twice."""
    names = [*"ab", "label"]
    patterns = [p for size in range(1, 4) for p in combinations(names, size)]
    full = linear.sample(repeats * len(patterns))
    present = {n: torch.tensor([n in p for p in patterns for _ in range(repeats)]) for n in names}
    return mm.Batch({n: full[n] for n in names}, present)


@pytest.fixture
def linear_case(double):
    story = linear_story()
    linear, columns = as_linear_gaussian(story)
    return story, linear, exact_guide(linear, columns), rows_with_every_pattern(linear)


def test_every_weight_of_the_exact_posterior_is_the_evidence(linear_case):
    """Whatever is missing in a row, the label or a modality."""
    story, linear, guide, batch = linear_case
    exact = linear.log_prob(batch)
    torch.testing.assert_close(mm.log_weights(story, guide, batch, 3), exact.expand(3, -1), rtol=1e-9, atol=1e-9)
    evidence = mm.log_marginal(story, guide, batch, num_particles=20, seed=0)
    torch.testing.assert_close(evidence.log_prob, exact, rtol=1e-9, atol=1e-9)
    rows = batch[batch.having(["label", "a"], every=True)]
    conditional = mm.log_conditional(story, guide, rows, target="label", given="a", num_particles=20, seed=0)
    wanted = linear.log_conditional(rows, ["label"], ["a"])
    torch.testing.assert_close(conditional.log_prob, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("estimator", [mm.estimators.IWAE, mm.estimators.DReG, mm.estimators.StickTheLanding])
def test_every_term_of_the_exact_posterior_is_its_evidence(linear_case, estimator):
    """Terms of one set each, by themselves and in one pass: all, a modality alone, the label alone."""
    story, linear, guide, batch = linear_case
    sets = ("a", "b", "label"), ("a",), ("b", "label"), ("label",)
    exact = [-linear.log_prob(batch.only(*names)).sum().item() for names in sets]
    for names, value in zip(sets, exact, strict=True):
        assert Objective([Term(names, names)], estimator(2)).loss(story, guide, batch) == pytest.approx(value, rel=1e-9)
    table = Objective([Term(names, names) for names in sets], estimator(2))
    assert table.loss(story, guide, batch) == pytest.approx(sum(exact), rel=1e-9)


# -- a class, and networks that are not linear ------------------------------------------------------------------------

GRID = torch.linspace(-7, 7, 2801, dtype=torch.float64)[:, None]


def class_story():
    """z and w of one dimension each; x = c F(z) + b w + noise, and a class of three."""
    torch.manual_seed(2)
    decoder = mm.conditionals.Normal(nn.Linear(2 + 1, 2), scale=0.7)
    label = mm.conditionals.Categorical(nn.Linear(2, 3))
    factor = nn.Sequential(nn.Linear(1, 2), nn.Tanh())
    story = mm.models.Factorized(standard(1), {"x": standard(1)}, {"x": decoder}, {"label": label}, factor)
    with torch.no_grad():
        label.net.weight.mul_(4)
        factor[0].weight.mul_(2)
    return story


def log_joint(story, batch):
    """log p(z, x_S) + log dz with w integrated out, ``(G, N)``, and p(y | z) ``(G, 3)``."""
    f = story.factor(GRID)
    net = story.decoders["x"].net
    covariance = net.weight[:, 2:] @ net.weight[:, 2:].T + 0.7**2 * torch.eye(2)
    x = dist.MultivariateNormal((f @ net.weight[:, :2].T + net.bias)[:, None], covariance)
    y = story.labels["label"].net(f).log_softmax(-1)
    total = standard(1).log_prob(GRID)[:, None] + math.log(GRID[1, 0] - GRID[0, 0])
    total = total + x.log_prob(batch["x"]) * batch.present["x"]
    return total + y[:, batch["label"]] * batch.present["label"], y.exp()


def wide_guide(batch):
    with batch.plate():
        pyro.sample("z", dist.Normal(torch.zeros(1), 1.1).to_event(1))
        pyro.sample("w_x", dist.Normal(torch.zeros(1), 1.1).to_event(1))


@pytest.fixture
def class_case(double):
    story = class_story()
    i = torch.arange(8)
    values = {"x": 1.2 * torch.randn(8, 2), "label": i % 3}
    return story, mm.Batch(values, present={"x": i % 4 != 0, "label": i % 4 != 1})


def test_the_evidence_of_rows_with_a_class_is_that_of_quadrature(class_case):
    """Label and modality missing in two rows each; eight |t| below 4.5 fail with probability 6e-5."""
    story, batch = class_case
    with torch.no_grad():
        exact = log_joint(story, batch)[0].logsumexp(0)
    found = mm.log_marginal(story, wide_guide, batch, num_particles=20_000, seed=0)
    assert found.standard_error.max() < 0.03
    assert ((found.log_prob - exact).abs() < 4.5 * found.standard_error + 1e-12).all()


def test_class_probabilities_are_those_of_quadrature(class_case):
    """By an exact q(z | x) on a grid. 24 means of 1,000 draws within 4.5 errors: fails with probability 2e-4."""
    story, batch = class_case
    with torch.no_grad():
        weights, of_class = log_joint(story, batch.only("x"))
        posterior = weights.softmax(0).T
        exact = posterior @ of_class
        error = (posterior @ of_class.square() - exact.square()).clamp(min=0).sqrt() / math.sqrt(1000)

    class OnGrid(nn.Module):
        """The exact q(z | x), without a gradient."""

        def forward(self, rows):
            with torch.no_grad():
                probabilities = log_joint(story, rows.only("x"))[0].softmax(0).T
            return GridDistribution(probabilities)

    guide = mm.Guide(z=OnGrid(), w_x=mm.posteriors.Private("x", mm.conditionals.Normal(nn.Linear(2, 2))))
    torch.manual_seed(0)
    found = mm.metrics.class_probabilities(story, guide, batch, "label", "x", 1000, audit=False)
    assert ((found - exact).abs() < 4.5 * error + 1e-9).all()


class GridDistribution(dist.TorchDistribution):
    """A distribution on the points of the grid, event shape ``(1,)``."""

    arg_constraints, has_rsample = {}, True
    support = dist.constraints.real_vector

    def __init__(self, probabilities, batch_shape=None):
        self.probabilities = probabilities
        shape = probabilities.shape[:-1] if batch_shape is None else batch_shape
        super().__init__(torch.Size(shape), torch.Size([1]), validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return GridDistribution(self.probabilities.expand(*batch_shape, -1), batch_shape)

    def rsample(self, sample_shape=()):
        flat = self.probabilities.reshape(-1, self.probabilities.shape[-1])
        index = torch.multinomial(flat, math.prod(sample_shape), replacement=True)
        return GRID[index.T].reshape(*sample_shape, *self.batch_shape, 1)

    def log_prob(self, value):
        return torch.zeros(value.shape[:-1])


# -- generation and factors -------------------------------------------------------------------------------------------


def test_the_private_latent_of_a_missing_modality_stays_at_its_prior(double):
    """A guide that has N(7, 1) in its place. 400 draws: |mean| > 0.3 has probability 2e-9."""
    story = linear_story()
    elsewhere = {
        f"w_{name}": mm.posteriors.Private(
            name, mm.conditionals.Normal(nn.Linear(SIZES[name], 2 * PRIVATE[name])), standard_at(7.0, PRIVATE[name])
        )
        for name in "ab"
    }
    experts = {n: mm.conditionals.Normal(nn.Linear(SIZES[n], 2 * SHARED)) for n in SIZES}
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts(experts), **elsewhere)
    values = {n: torch.randn(5, size) for n, size in SIZES.items()}
    batch = mm.Batch(values, present={"b": torch.tensor([True, False, True, False, False])})
    drawn = mm.posterior_draws(story, guide, batch, 400, seed=0)
    assert drawn["w_b"][:, ~batch.presence("b")].mean((0, 1)).abs().max() < 0.3
    encoded = mm.encode(guide, batch)["w_b"].mean
    assert (encoded[1] == 7).all() and not (encoded[0] == 7).any()
    samples = mm.generate(story, guide, batch, 3, mean=True, seed=0)
    assert {n: tuple(x.shape) for n, x in samples.items()} == {"a": (3, 5, 3), "b": (3, 5, 2), "label": (3, 5, 1)}


def standard_at(loc, size):
    return dist.Normal(torch.full((size,), loc), 1.0).to_event(1)


def test_decoding_the_factors_of_latents_is_the_story_given_them(double):
    story = linear_story()
    batch = mm.Batch({n: torch.randn(4, size) for n, size in SIZES.items()})
    trace = poutine.trace(story).get_trace(batch)
    latents = {site: trace.nodes[site]["value"] for site in ("z", "w_a", "w_b")}
    decoded = story.decode(story.factors(latents))
    for name in SIZES:
        torch.testing.assert_close(decoded[name].mean, trace.nodes[name]["fn"].mean, rtol=0, atol=0)
    assert set(story.decode(story.factors({"z": latents["z"]}))) == {"label"}


def test_swapping_a_private_factor_changes_its_modality_and_no_other(double):
    story = linear_story()
    factors = story.factors({"z": torch.randn(6, 2), "w_a": torch.randn(6, 1), "w_b": torch.randn(6, 2)})
    before = story.decode(factors)
    for site, changed in (("w_a", {"a"}), ("w_b", {"b"}), ("z", set(SIZES))):
        after = story.decode(factors | {site: factors[site].roll(1, 0)})
        assert {name for name in SIZES if not torch.equal(before[name].mean, after[name].mean)} == changed


class ReadsCovariate(nn.Module):
    def forward(self, z, covariates):
        return z + covariates["batch"][..., None]


class ReadsLengths(nn.Module):
    def forward(self, f, lengths):
        return f * lengths[..., None]


def test_networks_of_factors_read_covariates_and_decoders_lengths(double):
    decoder = mm.conditionals.Normal(ReadsLengths(), scale=1.0)
    story = mm.models.Factorized(standard(2), {}, {"x": decoder}, {}, ReadsCovariate())
    lengths, effect = torch.tensor([1, 2, 2]), torch.tensor([0.0, 10.0, 20.0])
    batch = mm.Batch({"x": torch.zeros(3, 2)}, covariates={"batch": effect}, lengths={"x": lengths})
    trace = poutine.trace(story).get_trace(batch)
    wanted = (trace.nodes["z"]["value"] + effect[:, None]) * lengths[:, None]
    torch.testing.assert_close(trace.nodes["x"]["fn"].mean, wanted)
    latents = {"z": trace.nodes["z"]["value"]}
    torch.testing.assert_close(story.decode(story.factors(latents, batch), batch)["x"].mean, wanted)
    with pytest.raises(
        ValueError, match=r"network of the shared factor reads covariates: give the batch that has them"
    ):
        story.factors(latents)
    with pytest.raises(ValueError, match=r"decoder of 'x' reads lengths: give the batch that has them"):
        story.decode(latents)
    with pytest.raises(ValueError, match=r"network of the shared factor.*needs covariates; this batch has none"):
        mm.simulate(story, mm.Batch({"x": torch.zeros(3, 2)}, lengths={"x": lengths}))


def test_parts_that_do_not_fit_together_are_refused():
    net = mm.conditionals.Normal(nn.Linear(2, 2))
    prior = standard(2)
    for arguments, message in (
        (({}, {"x": net}, {"x": net}), "'x' is among the decoders and among the labels"),
        (({"y": prior}, {"x": net}, {"y": net}), "private latent of the label 'y', which depends on the shared factor"),
        (({"a": prior}, {"x": net}, {}), r"private latent of 'a', which is not among the decoders \['x'\]"),
        (({}, {"x": net}, {}, None, {"x": net}), r"private factor of 'x', which has no private prior: \[\] have one"),
        (({}, {"z": net}, {}), "the story has a site or a plate of that name"),
        (({}, {}, {"y": net}), "at least one modality"),
    ):
        with pytest.raises(ValueError, match=message):
            mm.models.Factorized(prior, *arguments)
    story = mm.models.Factorized(prior, {}, {"x": net}, {})
    with pytest.raises(ValueError, match="factors: unknown site 'w_x', the story has z"):
        story.decode({"w_x": torch.zeros(3, 2)})
    with pytest.raises(ValueError, match=r"expected factors to hold the shared one, 'z', got \[\]"):
        story.decode({})


def test_class_probabilities_ask_no_mean_of_other_modalities():
    """A string has no mean that is known, and none is needed. Six means of 500 draws: within 4.5 errors."""
    decoders = {"text": mm.conditionals.Tokens(mm.nn.RecurrentTokens(2, 4, 8), steps=3, end=0)}
    labels = {"label": mm.conditionals.Categorical(nn.Linear(2, 3))}
    story = mm.models.Factorized(standard(2), {}, decoders, labels)
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"label": mm.conditionals.Normal(nn.Embedding(3, 4))}))
    batch = mm.Batch({"text": torch.tensor([[1, 2, 0], [3, 0, 0]]), "label": torch.tensor([0, 2])})
    found = mm.metrics.class_probabilities(story, guide, batch, "label", "text", 500)
    with torch.no_grad():
        of_class = story.labels["label"](torch.randn(100_000, 2)).probs
    error = of_class.std(0) * math.sqrt(1 / 500 + 1e-5)
    assert ((found - of_class.mean(0)).abs() < 4.5 * error).all(), "from the prior: the guide sees the label alone"
    with pytest.raises(ValueError, match=r"modality 'text': TokenSequence has no mean that is known"):
        mm.generate(story, guide, batch, mean=True)
