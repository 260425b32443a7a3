"""Ranks of true values: counted by hand, uniform for exact posteriors, and named rightly for guides that are off."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import binom

import pyro_mm as mm
from pyro_mm.diagnostics.rank_tests import band, uniformity
from pyro_mm.diagnostics.sbc import Calibration, calibration
from pyro_mm.sampling.ancestral import simulate
from pyro_mm.utils.seeding import temporary_seed
from tests.support.linear_gaussian import every_pattern, oracle

ALPHA = 1e-3  # where uniform ranks are claimed: the chance that a correct implementation fails at another seed


def bent(model, shift=0.0, width=1.0):
    """The exact posterior of a model whose latents are independent a posteriori, moved and stretched."""

    def guide(batch):
        p = model.posterior(batch)
        scale = p.variance.sqrt()
        with batch.plate():
            pyro.sample("z", dist.Normal(p.mean + torch.as_tensor(shift) * scale, width * scale).to_event(1))

    return guide


def diagonal():
    return mm.models.LinearGaussian({"a": torch.eye(4), "b": 0.7 * torch.eye(4)}, noise=0.8)


class Spy:
    """A quantity that keeps what it was shown."""

    def __init__(self, function=lambda latents, batch: latents["z"].sum(-1)):
        self.function, self.latents, self.batches = function, [], []

    def __call__(self, latents, batch):
        self.latents.append(latents), self.batches.append(batch)
        return self.function(latents, batch)


def uniform(found, names=None):
    return min(f.adjusted for n, f in found.findings.items() if names is None or n in names) > ALPHA


# -- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"chunk": 1}, {"chunk": 50}, {"vectorize": False}])
def test_ranks_are_those_counted_by_a_loop(options, double):
    """Every site and quantity, row by row, among the draws that a quantity is shown, the truth found by its value."""
    model, draws, spy = oracle(), 6, Spy()
    batch = every_pattern(model, rows=2)
    guide = mm.Guide(z=model.posterior)
    found = calibration(model, guide, batch, num_draws=draws, seed=3, quantities={"sum": spy}, **options)
    with temporary_seed(3, batch.device):
        rows, truth = simulate(model, batch)
    if "vectorize" in options:
        z, shown = torch.stack([x["z"] for x in spy.latents]), spy.batches[:1]
    else:
        z, shown = torch.cat([x["z"] for x in spy.latents], 1), spy.batches
    assert z.shape == (draws + 1, 16, 3) and found.num_draws == draws
    for name in batch.names:
        assert torch.equal(torch.cat([b[name] for b in shown]), rows[name])
        assert torch.equal(torch.cat([b.present[name] for b in shown]), batch.present[name])
    for n in range(16):
        if not any(batch.present[m][n] for m in batch.names):
            assert all((x[n] == -1).all() for x in found.ranks.values())
            continue
        (place,) = [k for k in range(draws + 1) if torch.equal(z[k, n], truth["z"][n])]
        others = [k for k in range(draws + 1) if k != place]
        for d in range(3):
            assert found.ranks["z"][n, d] == sum(bool(z[k, n, d] < truth["z"][n, d]) for k in others)
        assert found.ranks["sum"][n, 0] == sum(bool(z[k, n].sum() < truth["z"][n].sum()) for k in others)
        here = [m for m in batch.names if batch.present[m][n]]
        log_p = [sum(model.likelihood(m, z[k, n]).log_prob(rows[m][n]) for m in here) for k in range(draws + 1)]
        assert found.ranks["log_likelihood"][n, 0] == sum(bool(log_p[k] < log_p[place]) for k in others)
    assert all(x.shape == (16, 3 if name == "z" else 1) and x.dtype == torch.long for name, x in found.ranks.items())


def test_a_latent_that_only_the_model_has_is_summed_out_of_the_likelihood(double):
    """y ~ Cat, z ~ N(0, 1), x ~ N(z + shift_y, 0.5): ranks of log p(x | z) by hand; and the exact p(z | x) passes."""
    weights, shift = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([-2.0, 0.0, 3.0])
    spy = Spy(lambda latents, batch: latents["z"])

    def model(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(weights))
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe("x", lambda z, y: dist.Normal(z + shift[y], 0.5), z, y)

    def guide(batch):
        residual = batch["x"][:, None] - shift
        logits = weights.log() + dist.Normal(0.0, math.sqrt(1.25)).log_prob(residual)
        parts = dist.Normal(residual / 1.25, math.sqrt(0.2))
        with batch.plate():
            pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(logits=logits), parts))

    batch = mm.Batch({"x": torch.zeros(300)})
    found = calibration(model, guide, batch, num_draws=30, seed=0, quantities={"same": spy}, chunk=10**6)
    assert torch.equal(found.ranks["same"], found.ranks["z"]) and "y" not in found.ranks
    z, x = spy.latents[0]["z"], spy.batches[0]["x"]
    log_p = (weights.log() + dist.Normal(z[..., None] + shift, 0.5).log_prob(x[:, None])).logsumexp(-1)
    order = log_p.argsort(0)
    place = z.argsort(0).gather(0, found.ranks["z"].T)[0]
    assert torch.equal((order == place).float().argmax(0), found.ranks["log_likelihood"][:, 0])
    assert uniform(found)


def test_ties_are_broken_at_random():
    """A constant has the rank of its place, uniform; and a discrete latent with the exact posterior passes."""
    probs, table = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.1, 0.9]])

    def model(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(probs))
            batch.observe("x", lambda y: dist.Categorical(table[y]), y)

    def guide(batch):
        with batch.plate():
            pyro.sample("y", dist.Categorical((probs[:, None] * table).T[batch["x"]]))

    batch = mm.Batch({"x": torch.arange(600) % 2})
    constant = {"constant": lambda latents, rows: torch.zeros(latents["y"].shape)}
    found = calibration(model, guide, batch, num_draws=7, seed=0, quantities=constant)
    assert uniform(found) and set(found.ranks) == {"y", "log_likelihood", "constant"}

    def prior(batch):
        with batch.plate():
            pyro.sample("y", dist.Categorical(probs))

    assert calibration(model, prior, batch, num_draws=7, seed=0).off.keys() == {"log_likelihood"}


@pytest.mark.parametrize(("n", "cells"), [(4, 3), (5, 4), (7, 2), (3, 5)])
def test_p_values_and_bands_are_exact(n, cells):
    """Against every one of the equally likely ways in which n ranks can fall."""

    def gamma(counts):
        below, smallest = 0, 1.0
        for i in range(1, cells):
            below, p = below + counts[i - 1], i / cells
            pmf = [math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)]
            smallest = min(smallest, sum(pmf[: below + 1]), sum(pmf[below:]))
        return 2 * smallest

    orders = [np.bincount(w, minlength=cells) for w in itertools.product(range(cells), repeat=n)]
    ways, times = np.unique(orders, axis=0, return_counts=True)
    chance, gammas = times / times.sum(), np.array([gamma(w) for w in ways])
    p = np.array([uniformity(w) for w in ways])
    np.testing.assert_allclose(p, [chance[gammas <= g + 1e-12].sum() for g in gammas], atol=1e-12)
    for prob in (0.5, 0.8, 0.95):
        (lower, upper), below = band(n, cells - 1, prob), ways.cumsum(1)[:, :-1]
        inside = ((lower <= below) & (below <= upper)).all(1)
        assert chance @ inside >= prob and np.array_equal(inside, p > 1 - prob + 1e-12)


@pytest.mark.parametrize(("n", "draws"), [(30, 99), (500, 20), (3000, 9)])
def test_p_values_and_bands_keep_their_level(n, draws):
    """Monte Carlo: the band holds 95 % and a bit (discreteness), the p-value no less than its level.

    4 standard errors of 20 000 (800) simulations: fails at another seed with probability 1e-4.
    """
    counts = np.random.default_rng(0).multinomial(n, np.full(draws + 1, 1 / (draws + 1)), size=20_000)
    lower, upper = band(n, draws)
    below = counts.cumsum(1)[:, :-1]
    inside = ((below >= lower) & (below <= upper)).all(1)
    error = math.sqrt(0.95 * 0.05 / 20_000)
    assert 0.95 - 4 * error < inside.mean() < 0.96 + 4 * error
    p = np.array([uniformity(c) for c in counts[:800]])
    assert np.array_equal(p > 0.05, inside[:800])
    for level in (0.01, 0.05, 0.2, 0.5):
        assert (p <= level).mean() < level + 4 * math.sqrt(level * (1 - level) / 800)


def test_extreme_ranks_have_p_values_within_their_bounds():
    """All of n ranks alike: between the probability of that and L times that, far below what 1 - p can hold."""
    for n, draws, rank in ((10, 4, 4), (400, 100, 0), (5000, 10, 3)):
        counts = np.bincount([rank], minlength=draws + 1) * n
        p = uniformity(counts)
        below = counts.cumsum()[:-1]
        at = np.arange(1, draws + 1) / (draws + 1)
        tail = min(binom.cdf(below, n, at).min(), binom.sf(below - 1, n, at).min())
        assert tail <= p <= 2 * draws * tail and p < 1e-6
    assert uniformity(np.ones(8, dtype=int)) == pytest.approx(1.0)


# -- exact posteriors ------------------------------------------------------------------------------------------------


def test_the_exact_posterior_is_uniform_whatever_is_present(double):
    """All patterns together, then each alone: 36 Holm-adjusted p-values of eight runs, none below 0.001."""
    model = oracle()
    guide, batch = mm.Guide(z=model.posterior), every_pattern(model, rows=60)
    norm = {"norm": lambda latents, rows: latents["z"].square().sum(-1)}
    found = calibration(model, guide, batch, seed=0, quantities=norm)
    assert uniform(found) and not found.off and "all 5 coordinates uniform" in repr(found)
    assert {f.rows for f in found.findings.values()} == {420}  # 60 rows have nothing
    full = model.sample(150)
    for size in (1, 2, 3):
        for names in itertools.combinations(batch.names, size):
            assert uniform(calibration(model, guide, full.only(*names), seed=0, quantities=norm))


def test_p_values_of_the_exact_posterior_are_spread_evenly(double):
    """60 seeds: mean p within 4 standard errors of 1/2 (z[0] and the likelihood), and not too many below 0.1.

    Binomial(60, 0.1) exceeds 16 with probability 2e-4.
    """
    model = oracle()
    guide, batch = mm.Guide(z=model.posterior), model.sample(100)
    found = [calibration(model, guide, batch, num_draws=19, seed=seed).findings for seed in range(60)]
    for name in ("z[0]", "log_likelihood"):
        p = np.array([f[name].p_value for f in found])
        assert abs(p.mean() - 0.5) < 4 / math.sqrt(12 * 60) and (p < 0.1).sum() <= 16
        z = np.array([f[name].shift / f[name].shift_error for f in found])
        assert abs(z.mean()) < 4 / math.sqrt(60) and 0.6 < z.std() < 1.4  # standard error of the spread: 0.09
        z = np.array([math.log(f[name].width) * f[name].width / f[name].width_error for f in found])
        assert abs(z.mean()) < 4 / math.sqrt(60) + 0.2 and 0.6 < z.std() < 1.4  # log is biased by O(1 / sqrt(n))


def test_calibration_is_uniform_for_private_latents_and_empty_rows(double):
    """z, w ~ N(0, 1), a ~ N(z + w, 0.5), b ~ N(z, 0.5), in closed form; where the package does not use the guide it
    says N(50, 0.1), and that is left out."""

    def model(batch):
        with batch.plate():
            z, w = (pyro.sample(name, dist.Normal(0.0, 1.0)) for name in ("z", "w_a"))
            batch.observe("a", lambda z, w: dist.Normal(z + w, 0.5), z, w)
            batch.observe("b", lambda z: dist.Normal(z, 0.5), z)

    def guide(batch):
        a, b = batch.present["a"], batch.present["b"]
        precision = 1 + a / 1.25 + b / 0.25
        mean = (a * batch["a"] / 1.25 + b * batch["b"] / 0.25) / precision
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.where(a | b, mean, 50.0), precision.rsqrt()))
            residual = batch["a"] - z
            pyro.sample("w_a", dist.Normal(torch.where(a, residual / 1.25, 50.0), math.sqrt(0.2)))

    i = torch.arange(600)
    batch = mm.Batch({"a": torch.zeros(600), "b": torch.zeros(600)}, present={"a": i % 4 < 2, "b": i % 2 == 0})
    found = calibration(model, guide, batch, seed=0)
    assert uniform(found) and set(found.ranks) == {"z", "w_a", "log_likelihood"}
    empty = i % 4 == 3
    assert torch.equal(found.ranks["w_a"][:, 0] == -1, i % 4 >= 2)
    assert torch.equal(found.ranks["z"][:, 0] == -1, empty)
    assert torch.equal(found.ranks["log_likelihood"][:, 0] == -1, empty)
    assert [f.rows for f in found.findings.values()] == [450, 300, 450]
    assert set(calibration(model, guide, batch.only("b"), seed=0).ranks) == {"z", "log_likelihood"}


def test_calibration_ranks_latents_in_a_plate_within_a_row(double):
    """w_p ~ N(0, 1), x_p ~ N(w_p, 0.5) for p = 1, 2: q = N(0.8 x, 0.2) is exact; of width 2 for p = 2 it is not."""

    def decoder(w):
        mean = w.transpose(-1, -2)
        return dist.Normal(mean.unsqueeze(-3) if mean.dim() > 2 else mean, 0.5).to_event(1)

    def model(batch):
        with batch.plate():
            with pyro.plate("parts", 2, dim=-2):
                w = pyro.sample("w", dist.Normal(0.0, 1.0))
            batch.observe("x", decoder, w)

    def guide(width):
        def run(batch):
            scale = math.sqrt(0.2) * torch.tensor([1.0, width])[:, None]
            with batch.plate(), pyro.plate("parts", 2, dim=-2):
                pyro.sample("w", dist.Normal(0.8 * batch["x"].T, scale))

        return run

    batch = mm.Batch({"x": torch.zeros(400, 2)})
    for vectorize in (True, False):
        options = {"num_draws": 50 if vectorize else 9, "seed": 1, "vectorize": vectorize}
        found = calibration(model, guide(1.0), batch, **options)
        assert uniform(found) and list(found.findings) == ["w[0]", "w[1]", "log_likelihood"]
        found = calibration(model, guide(2.0), batch, **options)
        assert found.findings["w[1]"].verdict == "too wide" and found.findings["w[0]"].p_value > ALPHA


def test_calibration_takes_a_story_that_does_not_broadcast():
    """It indexes rows as the first dimension."""
    model = mm.models.LinearGaussian({"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[-1.0, 1.0]])}, noise=0.5)

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            batch.observe("a", dist.Normal(z[:, :1], 0.5).to_event(1))
            batch.observe("b", dist.Normal(z[:, 1:] - z[:, :1], 0.5).to_event(1))

    batch = mm.Batch({n: torch.zeros(250, 1) for n in "ab"}, present={"b": torch.arange(250) > 50})
    guide = mm.Guide(z=model.posterior)
    with pytest.raises((RuntimeError, IndexError, ValueError)) as caught:
        calibration(story, guide, batch, num_draws=9)
    assert "vectorize=False" in "".join(caught.value.__notes__)
    quantities = {"first": lambda latents, rows: latents["z"][:, 0]}
    found = calibration(story, guide, batch, num_draws=9, seed=0, quantities=quantities, vectorize=False)
    assert uniform(found) and torch.equal(found.ranks["first"][:, 0], found.ranks["z"][:, 0])


# -- guides that are off ---------------------------------------------------------------------------------------------


def test_shifted_and_misscaled_posteriors_are_found_and_named(double):
    """Four coordinates: exact, of width 0.6 and of 1.6, moved by -0.5. Found with p < 1e-5 from 800 rows.

    Shifts and widths within 4 standard errors, and 3 % for L = 100 draws in the place of quantiles.
    """
    model = diagonal()
    shift, width = torch.tensor([0.0, 0.0, 0.0, -0.5]), torch.tensor([1.0, 0.6, 1.6, 1.0])
    found = calibration(model, bent(model, shift, width), model.sample(800), seed=0)
    verdicts = {n: f.verdict for n, f in found.findings.items() if n.startswith("z")}
    assert verdicts == {"z[0]": "uniform", "z[1]": "too narrow", "z[2]": "too wide", "z[3]": "too low"}
    for d, f in enumerate(list(found.findings.values())[:4]):
        assert abs(f.shift - shift[d]) < 4 * f.shift_error + 0.03 and f.rows == 800
        assert abs(f.width / width[d] - 1) < 4 * f.width_error / width[d] + 0.03
        assert d == 0 or f.p_value < 1e-5
    assert "z[1]" in list(found.off)[:3] and "z[0]" not in found.off
    both = calibration(model, bent(model, 0.5, 0.6), model.sample(800), seed=0).findings["z[0]"]
    assert both.verdict == "too high and narrow"
    far = calibration(model, bent(model, 9.0), model.sample(100), num_draws=10, seed=0).findings["z[0]"]
    assert far.verdict.startswith("too high") and far.p_value < 1e-50 and math.isfinite(far.shift)


def test_a_guide_that_is_the_prior_passes_in_z_and_fails_in_the_likelihood(double):
    """Its draws explain the data worse than the truth does."""
    model = diagonal()
    found = calibration(model, lambda batch: model(batch.only()), model.sample(400), seed=0)
    assert found.off.keys() == {"log_likelihood"} and "too low" in found.off["log_likelihood"].verdict


def test_a_fault_in_one_pattern_of_presence_is_found_in_that_pattern(double):
    model = oracle()
    exact = mm.Guide(z=model.posterior)

    def guide(batch):
        there = batch.present["x0"] & ~batch.present["x1"] & ~batch.present["x2"]
        p = model.posterior(batch)
        with batch.plate():
            pyro.sample("z", dist.MultivariateNormal(p.mean + there[:, None], p.covariance_matrix))

    full = model.sample(200)
    assert calibration(model, guide, full.only("x0"), seed=0).off
    assert uniform(calibration(model, guide, full.only("x0", "x1"), seed=0))
    assert calibration(model, exact, full.only("x0"), seed=0).off == {}


def test_p_values_in_the_table_are_holms():
    """Two coordinates off out of five, by a hand-made table of ranks: Holm's p is 5, 4, .. times the sorted p's."""
    rng = np.random.default_rng(0)
    fair = torch.as_tensor(rng.integers(0, 20, (300, 3)))
    low, out = torch.as_tensor(rng.integers(0, 12, (300, 1))), torch.full((300, 1), -1)
    narrow = torch.as_tensor(rng.choice([0, 1, 18, 19], (300, 1)))
    found = Calibration({"z": fair, "w": torch.cat([low, out]), "t": narrow}, 19)
    assert list(found.findings) == ["z[0]", "z[1]", "z[2]", "w", "t"] and found.findings["w"].rows == 300
    p = sorted(f.p_value for f in found.findings.values())
    adjusted = sorted(f.adjusted for f in found.findings.values())
    expected = np.minimum(1, np.maximum.accumulate([5 * p[0], 4 * p[1], 3 * p[2], 2 * p[3], p[4]]))
    np.testing.assert_allclose(adjusted, expected)
    assert found.off.keys() == {"w", "t"}
    lines = found.table().splitlines()
    assert len(lines) == 7 and "2 of 5 off" in lines[-1] and "Holm" in lines[-1]
    assert lines[4].endswith("too high and wide") or lines[4].endswith("too high")
    assert "too narrow" in lines[5] and lines[1].endswith("uniform")
    assert "w too high" in repr(found) and "300 simulations, 19 draws" in repr(found)


# -- manners ---------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_ranks_and_leaves_the_generator_and_the_batch_alone():
    model = oracle()
    guide, batch = mm.Guide(z=model.posterior), every_pattern(model, rows=3)
    values = {n: (batch[n].clone(), batch.present[n].clone()) for n in batch.names}
    state, before = dict(batch.__dict__), torch.get_rng_state()
    one, other = (calibration(model, guide, batch, num_draws=5, seed=7) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one.ranks[n], other.ranks[n]) for n in one.ranks)
    assert all(batch.__dict__[k] is v for k, v in state.items()) and batch.__dict__.keys() == state.keys()
    assert all(torch.equal(batch[n], x) and torch.equal(batch.present[n], m) for n, (x, m) in values.items())
    different = calibration(model, guide, batch, num_draws=5)
    assert not torch.equal(different.ranks["z"], one.ranks["z"])
    torch.set_rng_state(before)
    torch.randint(2**62, ())
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    calibration(model, guide, batch, num_draws=5)
    assert torch.equal(torch.get_rng_state(), after)
    assert not any(x.requires_grad for x in one.ranks.values())


def test_calibration_refuses_what_it_cannot_take():
    model = oracle()
    guide, batch = mm.Guide(z=model.posterior), model.sample(5)
    sums = lambda latents, rows: latents["z"].sum(-1)  # noqa: E731
    with pytest.raises(ValueError, match="num_draws >= 2"):
        calibration(model, guide, batch, num_draws=1)
    with pytest.raises(ValueError, match="has anything present"):
        calibration(model, guide, batch.only())
    with pytest.raises(ValueError, match="none of the model's"):
        calibration(model, mm.Guide(other=model.posterior), batch)
    for name in ("z", "log_likelihood"):
        with pytest.raises(ValueError, match="names of their own"):
            calibration(model, guide, batch, quantities={name: sums})
    with pytest.raises(ValueError, match=r"'t': expected shape \(4, 5\), got \(4, 5, 3\)"):
        calibration(model, guide, batch, num_draws=3, quantities={"t": lambda latents, rows: latents["z"]})
    with pytest.raises(ValueError, match="'t' is NaN"):
        calibration(model, guide, batch, quantities={"t": lambda latents, rows: sums(latents, rows) * math.nan})
    few = mm.Batch({n: batch[n] for n in batch}, present=dict.fromkeys(batch, torch.arange(5) > 0))
    only = lambda latents, rows: torch.where(rows.present["x0"], sums(latents, rows), math.nan)  # noqa: E731
    assert calibration(model, guide, few, quantities={"t": only}).findings["t"].rows == 4  # NaN in a row left out

    def scaled(batch):
        with pyro.poutine.scale(scale=2.0):
            model(batch)

    with pytest.raises(ValueError, match="scaled"):
        calibration(scaled, guide, batch)


@pytest.mark.filterwarnings("ignore:latent site")
def test_a_latent_that_all_rows_share_and_the_guide_lacks_is_refused_in_words():
    def model(batch):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with batch.plate():
            z = pyro.sample("z", dist.Normal(level, 1.0))
            batch.observe("x", lambda z: dist.Normal(z, 0.8), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(batch["x"], 1.0))

    batch = mm.Batch({"x": torch.randn(10)})
    with pytest.raises(ValueError, match="'level' lies outside the plate 'data'"):
        calibration(model, guide, batch, num_draws=5)
    for draws in ("independent", "quasi"):
        with pytest.raises(ValueError, match="'level' lies outside the plate 'data'"):
            mm.log_marginal(model, guide, batch, num_particles=10, draws=draws)
