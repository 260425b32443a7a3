"""``generate`` and ``encode`` against the closed forms of the linear-Gaussian model."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.diagnostics.inference_data import to_arviz
from pyro_mm.sampling.predictive import SampleSettings, sample_pair
from pyro_mm.sampling.resampling import Resampling
from pyro_mm.sampling.weighted import BlockSizes
from tests.support.linear_gaussian import every_pattern, oracle

S = 6000
Z = 4.75  # standard errors: a normal error exceeds it with p = 2e-6, and about 10^3 are looked at here


def moments(model, batch, row):
    """Mean and covariance of all modalities of a new draw, z ~ p(z | x_S): by hand, with inverses."""
    names = list(model.loadings)
    w = torch.cat([model.loadings[n] for n in names]).detach()
    b = torch.cat([model.offsets[n] for n in names]).detach()
    noise = torch.cat([model.log_noise[n].detach().exp().expand(len(model.loadings[n])) for n in names])
    keep = torch.cat([batch.present[n][row].expand(len(model.loadings[n])) for n in names])
    x = torch.cat([batch[n][row] for n in names])[keep]
    ws = w[keep]
    gain = ws.T @ torch.linalg.inv(ws @ ws.T + noise[keep].square().diag())  # of z on x_S
    loc, covariance = gain @ (x - b[keep]), torch.eye(w.shape[1]) - gain @ ws
    return w @ loc + b, (w @ covariance @ w.T + noise.square().diag()).diagonal()


def test_draws_have_the_exact_conditional_moments_whatever_is_present(double):
    """Every pattern of three modalities, nothing and everything included, in one batch, rows shuffled."""
    model = oracle()
    batch = every_pattern(model, rows=1)[torch.randperm(8)]
    torch.manual_seed(11)
    drawn = mm.generate(model, mm.Guide(z=model.posterior), batch, S)
    assert {n: x.shape for n, x in drawn.items()} == {n: (S, 8, *batch[n].shape[1:]) for n in batch.names}
    stacked = torch.cat([drawn[n] for n in model.loadings], -1)
    for row in range(8):
        mean, variance = moments(model, batch, row)
        z = (stacked[:, row].mean(0) - mean) / (variance / S).sqrt()
        assert z.abs().max() < Z
        z = (stacked[:, row].var(0) / variance - 1) / math.sqrt(2 / S)
        assert z.abs().max() < Z


def test_observing_nothing_draws_from_the_models_prior_whatever_the_guide(double):
    """The guide says N(50, 0.1); all rows empty, then only some. Moments in closed form, z-scores below 4.75."""
    model = oracle()

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.full((batch.size, 3), 50.0), 0.1).to_event(1))

    full = model.sample(3)
    there = torch.tensor([True, False, False])
    some = mm.Batch({n: full[n] for n in full.names}, present=dict.fromkeys(full.names, there))
    torch.manual_seed(12)
    for batch in (mm.Batch.empty(3, like=full), some, full.only()):
        drawn = mm.generate(model, guide, batch, S)
        for n, w in model.loadings.items():
            variance = (w.square().sum(1) + (2 * model.log_noise[n]).exp()).detach()
            z = (drawn[n][:, 1:].mean(0) - model.offsets[n].detach()) / (variance / S).sqrt()
            assert z.abs().max() < Z
            assert ((drawn[n][:, 1:].var(0) / variance - 1) / math.sqrt(2 / S)).abs().max() < Z
    assert drawn["x0"][:, 0].std() > 0 and mm.generate(model, guide, some, 10)["x0"][:, 0].abs().mean() > 10


def test_draws_are_independent_between_samples_and_rows(double):
    model = oracle()
    drawn = mm.generate(model, mm.Guide(z=model.posterior), mm.Batch.empty(5, like=model.sample(1)), 7)
    for x in drawn.values():
        assert len(x[..., 0].unique()) == 35
    torch.manual_seed(0)
    one = mm.generate(model, mm.Guide(z=model.posterior), model.sample(4), 1)
    torch.manual_seed(0)
    other = mm.generate(model, mm.Guide(z=model.posterior), model.sample(4), 1)
    assert all(torch.equal(one[n], other[n]) and one[n].shape[:2] == (1, 4) for n in one)


def test_all_modalities_of_a_draw_come_from_one_z(double):
    """Cov(x_0, x_1) = W_0 W_1' from the prior; its entries' standard error: sqrt((v_i v_j + c_ij^2) / S)."""
    model = oracle()
    torch.manual_seed(3)
    drawn = mm.generate(model, mm.Guide(z=model.posterior), mm.Batch.empty(1, like=model.sample(1)), S)
    x, y = (drawn[n][:, 0] - drawn[n][:, 0].mean(0) for n in ("x0", "x1"))
    exact = (model.loadings["x0"] @ model.loadings["x1"].T).detach()
    error = ((x.var(0)[:, None] * y.var(0) + exact.square()) / S).sqrt()
    assert ((x.T @ y / (S - 1) - exact) / error).abs().max() < Z


def test_the_mean_is_that_of_the_decoder_and_averages_to_the_conditional_mean(double):
    model = oracle()
    batch = every_pattern(model, rows=1)
    torch.manual_seed(4)
    means = mm.generate(model, mm.Guide(z=model.posterior), batch, S, mean=True)
    stacked = torch.cat([means[n] for n in model.loadings], -1)
    noise = torch.cat([(2 * model.log_noise[n]).exp().expand(len(w)) for n, w in model.loadings.items()]).detach()
    for row in range(8):
        mean, variance = moments(model, batch, row)
        error = ((variance - noise) / S).sqrt()  # the decoder's noise is not in it
        assert ((stacked[:, row].mean(0) - mean) / error).abs().max() < Z
        assert ((stacked[:, row].var(0) / (variance - noise) - 1) / math.sqrt(2 / S)).abs().max() < Z


def test_rows_keep_their_order_and_do_not_see_each_other(double):
    """A narrow story: each row's reconstruction is its own."""
    model = mm.models.LinearGaussian({"a": 30 * torch.eye(2), "b": torch.eye(2)}, noise=1e-3)
    batch = model.sample(9)
    guide = mm.Guide(z=model.posterior)
    order = torch.randperm(9)
    for rows in (batch, batch[order], batch.only("a")[order], batch[::2]):
        drawn = mm.generate(model, guide, rows, 2)
        torch.testing.assert_close(drawn["a"], rows["a"].expand(2, -1, -1), atol=0.02, rtol=0)
        torch.testing.assert_close(drawn["b"], rows["b"].expand(2, -1, -1), atol=0.02, rtol=0)


EVENTS = {
    "normal": (mm.conditionals.Normal, 2, (4,)), "laplace": (mm.conditionals.Laplace, 2, (2, 3)),
    "bernoulli": (mm.conditionals.Bernoulli, 1, (1, 4, 4)), "poisson": (mm.conditionals.Poisson, 1, (5,)),
    "counts": (mm.conditionals.NegativeBinomial, 1, (3,)), "class": (mm.conditionals.Categorical, 7, ()),
    "classes": (mm.conditionals.Categorical, 6, (3,)),
}  # fmt: skip


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("rows", [1, 3, 4])
def test_generate_has_samples_rows_and_events_of_every_kind_as_shape(samples, rows):
    decoders, values = {}, {}
    for name, (kind, per, event) in EVENTS.items():
        net = nn.Linear(2, per * max(1, math.prod(event)))
        if name == "classes":
            net = nn.Sequential(nn.Linear(2, 18), nn.Unflatten(-1, (3, 6)))
        decoders[name] = kind(net, event_shape=event)
        values[name] = torch.ones(rows, *event, dtype=torch.long if "class" in name else torch.float)
    model = mm.models.SharedLatent(dist.Normal(torch.zeros(2), 1.0).to_event(1), decoders)
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"normal": mm.conditionals.Normal(nn.Linear(4, 4))}))
    batch = mm.Batch(values)
    for b in (batch, batch.only("normal", "class"), batch.without("class"), batch.only()):
        drawn = mm.generate(model, guide, b, samples)
        assert {n: x.shape for n, x in drawn.items()} == {n: (samples, rows, *e) for n, (_, _, e) in EVENTS.items()}
        means = mm.generate(model, guide, b, samples, mean=True)
        classes = {"class": (7,), "classes": (6,)}
        for n, (_, _, event) in EVENTS.items():
            assert means[n].shape == (samples, rows, *event, *classes.get(n, ()))
            assert not means[n].requires_grad and not drawn[n].requires_grad
        for n in classes:
            torch.testing.assert_close(means[n].sum(-1), torch.ones(means[n].shape[:-1]))
            assert drawn[n].dtype == torch.long


def test_class_probabilities_are_the_decoders_own():
    logits = torch.tensor([0.3, -1.0, 2.0])

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe("y", lambda z: dist.Categorical(logits=logits + z[..., None] * torch.arange(3)), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Delta(torch.tensor([0.0, 1.0])))

    probs = mm.generate(story, guide, mm.Batch({"y": torch.tensor([0, 1])}), 4, mean=True)
    expected = torch.stack([logits, logits + torch.arange(3)]).softmax(-1)
    torch.testing.assert_close(probs["y"], expected.expand(4, 2, 3))


def test_the_mean_of_a_one_hot_category_is_its_probabilities():
    logits = torch.tensor([0.3, -1.0, 2.0])

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe("v", lambda z: dist.OneHotCategorical(logits=logits.expand(*z.shape, 3)), z)

    drawn = mm.generate(story, chain()[1], mm.Batch({"v": torch.eye(3)[:2]}), 4, mean=True)
    torch.testing.assert_close(drawn["v"], logits.softmax(-1).expand(4, 2, 3))


def chain():
    """b = a + noise of 1e-3, a | z ~ N(z, 1), z ~ N(0, 1)."""

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            a = batch.observe("a", lambda z: dist.Normal(z, 1.0), z)
            batch.observe("b", lambda a: dist.Normal(a, 1e-3), a)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(batch.size), 1.0))

    return story, guide


def test_descendants_see_a_present_parent_and_the_draw_of_an_absent_one():
    batch = mm.Batch(
        {"a": torch.tensor([5.0, 5.0, -3.0]), "b": torch.zeros(3)}, {"a": torch.tensor([True, False, True])}
    )
    story, guide = chain()
    drawn = mm.generate(story, guide, batch, 500)
    a, b = drawn["a"], drawn["b"]
    torch.testing.assert_close(b[:, [0, 2]], batch["a"][[0, 2]].expand(500, 2), atol=0.01, rtol=0)
    torch.testing.assert_close(b[:, 1], a[:, 1], atol=0.01, rtol=0)  # the draw that is returned
    assert abs(a[:, 1].mean()) < Z * math.sqrt(2 / 500) and a[:, [0]].std() > 0.5  # a present one is drawn anew
    drawn = mm.generate(story, guide, batch.without("a"), 50)
    torch.testing.assert_close(drawn["b"], drawn["a"], atol=0.01, rtol=0)


def test_a_modality_that_the_batch_does_not_hold_is_drawn_like_a_masked_one():
    story, guide = chain()
    drawn = mm.generate(story, guide, mm.Batch({"a": torch.tensor([5.0, -3.0])}), 3)
    assert drawn["b"].shape == (3, 2)


def test_generate_leaves_its_batch_untouched_and_needs_no_gradient():
    story, guide = chain()
    batch = mm.Batch({"a": torch.tensor([5.0, math.nan]), "b": torch.tensor([math.nan, 1.0])})
    before = {n: (batch[n].clone(), batch.present[n].clone()) for n in "ab"}
    state = dict(batch.__dict__)
    mm.generate(story, guide, batch, 3)
    for n in "ab":
        assert torch.equal(batch[n], before[n][0]) and torch.equal(batch.present[n], before[n][1])
    assert all(batch.__dict__[k] is v for k, v in state.items()) and batch.__dict__.keys() == state.keys()


def test_encode_gives_the_distributions(double):
    model = oracle()
    batch = every_pattern(model, rows=2, empty=False)
    q = mm.encode(mm.Guide(z=model.posterior), batch)
    assert q["z"].batch_shape == (14,) and q["z"].event_shape == (3,)
    for row in range(14):
        keep = [n for n in batch.names if batch.present[n][row]]
        w = torch.cat([model.loadings[n] / model.log_noise[n].exp() for n in keep])
        x = torch.cat([(batch[n][row] - model.offsets[n]) / model.log_noise[n].exp() for n in keep])
        precision = torch.eye(3) + w.T @ w
        torch.testing.assert_close(q["z"].mean[row], torch.linalg.solve(precision, w.T @ x), rtol=1e-10, atol=1e-10)
        covariance = q["z"].covariance_matrix[row]
        torch.testing.assert_close(covariance, torch.linalg.inv(precision), rtol=1e-10, atol=1e-10)


def test_encode_gives_the_latent_sites_and_nothing_else():
    model = oracle()
    for batch in (model.sample(4), model.sample(4).subsample(torch.tensor([1, 2]))):
        assert set(mm.encode(mm.Guide(z=model.posterior), batch)) == {"z"}


def test_an_empty_row_is_drawn_jointly_where_a_latent_depends_on_a_modality():
    """label -> z -> image: of an empty row the three come from one draw of the prior, and so agree."""
    centres = torch.tensor([-40.0, 0.0, 40.0])

    def story(batch):
        with batch.plate():
            label = batch.observe("label", dist.Categorical(torch.ones(3)))
            z = pyro.sample("z", dist.Normal(centres[label], 1.0))
            batch.observe("image", lambda z: dist.Normal(z, 1.0), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(0.0, 1.0))

    batch = mm.Batch({"label": torch.tensor([0, 1, 2]), "image": torch.zeros(3)},
                     present={n: torch.tensor([False, False, n == "label"]) for n in ("label", "image")})  # fmt: skip
    for rows in (mm.Batch.empty(4, like=batch), batch[:2], batch):
        draws = mm.generate(story, guide, rows, num_samples=50)
        label, image = draws["label"][:, :2], draws["image"][:, :2]
        assert (image - centres[label]).abs().max() < 15 and len(label.unique()) == 3


# -- private latents and what nothing informs on --------------------------------------------------------------------

# w_m | z ~ N(c z + d, s), x_m | z, w_m ~ N(l z + k w_m, r)
PRIVATE = {
    "a": {"c": -1.0, "d": 0.5, "s": 0.8, "l": 1.0, "k": 1.0, "r": 0.7},
    "b": {"c": 0.5, "d": 1.0, "s": 0.6, "l": 2.0, "k": -3.0, "r": 0.5},
}


def private_pair():
    """A linear-Gaussian story with private latents, and its exact posterior but for a wrong stand-in, N(50, 0.1)."""

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            for n, p in PRIVATE.items():
                w = pyro.sample(f"w_{n}", dist.Normal(p["c"] * z + p["d"], p["s"]))
                batch.observe(n, lambda z, w, p=p: dist.Normal(p["l"] * z + p["k"] * w, p["r"]), z, w)

    def guide(batch):
        precision, h = torch.ones(batch.size), torch.zeros(batch.size)
        for n, p in PRIVATE.items():  # x_m | z with w_m summed out: N(slope z + k d, variance)
            slope, variance = p["l"] + p["k"] * p["c"], (p["k"] * p["s"]) ** 2 + p["r"] ** 2
            here = batch.present[n].double()
            precision, h = (
                precision + here * slope**2 / variance,
                h + here * slope * (batch[n] - p["k"] * p["d"]) / variance,
            )
        with batch.plate():
            z = pyro.sample("z", dist.Normal(h / precision, precision.rsqrt()))
            for n, p in PRIVATE.items():
                tight = p["s"] ** -2 + (p["k"] / p["r"]) ** 2
                loc = (p["c"] * z + p["d"]) / p["s"] ** 2 + p["k"] * (batch[n] - p["l"] * z) / p["r"] ** 2
                here = batch.present[n]
                loc, scale = torch.where(here, loc / tight, 50.0), torch.where(here, tight**-0.5, 0.1)
                pyro.sample(f"w_{n}", dist.Normal(loc, scale))

    here = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([True, False, True, False])}
    return model, guide, mm.Batch({"a": torch.tensor([1.0, -2.0, 0.0, 0.0]), "b": torch.tensor([0.3, 0, 4, 0])}, here)


def private_moments(batch, row):
    """Mean and covariance of (z, w_a, w_b, x_a, x_b), the x drawn anew, given what is present in a row."""
    p = PRIVATE.values()
    step = torch.zeros(3, 3)  # (z, w_a, w_b) = step (z, w_a, w_b) + shift + noise
    step[1:, 0] = torch.tensor([q["c"] for q in p])
    solve = torch.linalg.inv(torch.eye(3) - step)
    loc = solve @ torch.tensor([0.0, *(q["d"] for q in p)])
    covariance = solve @ torch.tensor([1.0, *(q["s"] ** 2 for q in p)]).diag() @ solve.T
    decode = torch.tensor([[q["l"], q["k"] * (n == "a"), q["k"] * (n == "b")] for n, q in PRIVATE.items()])
    noise = torch.tensor([q["r"] ** 2 for q in p])
    keep = torch.stack([batch.present[n][row] for n in PRIVATE])
    seen, x = decode[keep], torch.stack([batch[n][row] for n in PRIVATE])[keep]
    gain = covariance @ seen.T @ torch.linalg.inv(seen @ covariance @ seen.T + noise[keep].diag())
    loc, covariance = loc + gain @ (x - seen @ loc), covariance - gain @ seen @ covariance
    both = torch.cat([torch.eye(3), decode])
    return both @ loc, both @ covariance @ both.T + torch.cat([torch.zeros(3), noise]).diag()


@pytest.mark.parametrize("resample", [False, True])
def test_private_latents_of_a_missing_modality_are_the_models_whatever_the_guide(resample, double):
    """Both present, either, none, row by row: all first and second moments of latents and modalities together."""
    model, guide, batch = private_pair()
    options = {"num_samples": S, "resample": resample, "seed": 0}
    data = to_arviz(model, guide, batch, **options)
    names = ["z", "w_a", "w_b"]
    arrays = [data["posterior"][n].values[0] for n in names]
    arrays += [data["posterior_predictive"][n].values[0] for n in "ab"]
    joint = torch.stack([torch.as_tensor(x) for x in arrays], -1)
    drawn = mm.generate(model, guide, batch, **options)
    latent = mm.posterior_draws(model, guide, batch, **options)
    apart = torch.stack([*(latent[n] for n in names), *(drawn[n] for n in "ab")], -1)
    size = 1 / (1 / S + resample / 1000)  # the exact guide's weights are constant: 1000 draws to take from
    for row in range(4):
        mean, covariance = private_moments(batch, row)
        variance = covariance.diagonal()
        error = ((variance[:, None] * variance + covariance**2) / size).sqrt()
        for draws in (joint[:, row], apart[:, row]):  # some 120 errors
            assert ((draws.mean(0) - mean) / (variance / size).sqrt()).abs().max() < Z
        assert ((joint[:, row].T.cov() - covariance) / error).abs().max() < Z
        for part in (slice(3), slice(3, 5)):
            assert ((apart[:, row].T.cov() - covariance) / error)[part, part].abs().max() < Z


@pytest.mark.parametrize("resample", [False, True])
def test_private_latents_of_a_modality_not_held_are_the_models_one_by_one(resample, double):
    model, guide, batch = private_pair()
    options = {"resample": resample, "seed": 0}
    batch = batch.only("b")[[1, 2, 3]]
    drawn = mm.generate(model, guide, batch, 300, vectorize=False, num_particles=300, **options)
    latent = mm.posterior_draws(model, guide, batch, 300, vectorize=False, num_particles=300, **options)
    found = torch.stack([*(latent[n] for n in ("z", "w_a", "w_b")), *(drawn[n] for n in "ab")], -1)
    for row in range(3):
        mean, covariance = private_moments(batch, row)
        assert (
            (found[:, row].mean(0) - mean) / (covariance.diagonal() / (150 if resample else 300)).sqrt()
        ).abs().max() < Z

    def without(rows):  # the same guide, which looks at b only
        none = torch.zeros(len(rows))
        guide(mm.Batch({"a": none, "b": rows["b"]}, {"a": none > 0, "b": rows.present["b"]}))

    held = mm.Batch({"b": batch["b"]}, {"b": batch.present["b"]})
    found = mm.generate(model, without, held, S, **options)["a"]
    for row in range(3):
        mean, covariance = (x[..., 3] for x in private_moments(batch, row))
        assert abs(found[:, row].mean() - mean) < Z * (covariance[3] * (1 / S + resample / 1000)).sqrt()


def test_the_stand_in_of_a_private_latent_says_nothing_of_a_discrete_one(double):
    """c chooses the prior of w_b: where b is missing the stand-in, at one of c's two places, must not choose c."""

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Bernoulli(0.3))
            w = pyro.sample("w_b", dist.Normal(4 * c - 2, 1.0))
            batch.observe("a", lambda z: dist.Normal(z, 1.0), z)
            batch.observe("b", lambda w: dist.Normal(w, 0.1), w)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(batch.size), 1.0))
            pyro.sample("w_b", dist.Normal(torch.where(batch.present["b"], batch["b"], 2.0), 0.1))

    batch = mm.Batch({"a": torch.zeros(2), "b": torch.tensor([-2.0, 0.0])}, {"b": torch.tensor([True, False])})
    data = to_arviz(model, guide, batch, num_samples=S, seed=0)
    c, w = (torch.as_tensor(data["posterior"][n].values[0]) for n in ("c", "w_b"))
    b = torch.as_tensor(data["posterior_predictive"]["b"].values[0])
    assert c[:, 0].mean() < 0.01, "where b is present its latent says what c is"
    assert abs(c[:, 1].mean() - 0.3) < Z * (0.21 / S) ** 0.5
    assert abs((w - 4 * c + 2)[:, 1].mean()) < Z / S**0.5 and abs((b - w)[:, 1].std() - 0.1) < 0.01


def test_a_discrete_latent_on_which_the_guides_depends_is_drawn_given_it(double):
    """A mixture for a prior, whose component only the model has: p(c | z) in closed form."""

    def model(batch):
        with batch.plate():
            c = pyro.sample("c", dist.Bernoulli(0.3))
            z = pyro.sample("z", dist.Normal(2 * c - 1, 1.0))
            batch.observe("x", lambda z: dist.Normal(z, 1.0), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(batch["x"], 1e-6))

    batch = mm.Batch({"x": torch.tensor([-0.5, 0.0, 1.0])})
    share = torch.sigmoid(2 * batch["x"] + math.log(0.3 / 0.7))
    c = torch.as_tensor(to_arviz(model, guide, batch, num_samples=S, seed=0)["posterior"]["c"].values[0])
    assert ((c.mean(0) - share) / (share * (1 - share) / S).sqrt()).abs().max() < Z
    assert mm.generate(model, guide, batch)["x"].shape == (1, 3)


def test_draws_of_a_row_with_nothing_are_the_priors(double):
    """Of the posterior's draws as of generate's, resampled or not, whatever the guide."""

    def guide(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.full((batch.size,), 50.0), 0.1))
            pyro.sample("w_a", dist.Normal(z, 0.1))
            pyro.sample("w_b", dist.Normal(z, 0.1))

    model, _, batch = private_pair()
    for rows, resample in ((batch, False), (batch, True), (batch.only(), False)):
        z = mm.posterior_draws(model, guide, rows, S, resample=resample, num_particles=100, seed=0)["z"][:, 3]
        assert abs(z.mean()) < Z / S**0.5 and abs(z.var() - 1) < Z * (2 / S) ** 0.5


# -- plates within a row --------------------------------------------------------------------------------------------


def parts(observed):
    """Three parts of every row, in a vectorised plate: what is drawn of part p of row n is 10 p + 100 n, nearly."""

    def place(batch):
        return 10.0 * torch.arange(3)[:, None] + 100.0 * torch.arange(batch.size)

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 100.0))
            with pyro.plate("parts", 3, dim=-2):
                v = pyro.sample("v", dist.Normal(z, 100.0))
                if observed:
                    pyro.sample("x", dist.Normal(v, 1e-2), obs=batch["x"].T)
            if not observed:
                batch.observe("x", lambda v: dist.Normal(v.sum(-2, keepdim=True), 1.0), v)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(batch.size), 0.1))
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("v", dist.Normal(place(batch), 0.1))

    values = torch.zeros(4, 3) if observed else torch.zeros(4)
    return model, guide, mm.Batch({"x": values}), place


@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("particles", [None, 1, 20])
@pytest.mark.parametrize("vectorize", [True, False])
def test_plates_within_a_row_come_after_it_however_draws_are_made(samples, particles, vectorize, double):
    options = {"vectorize": vectorize, "seed": 0}
    if particles is not None:
        options |= {"resample": True, "num_particles": particles}
    for observed in (True, False):
        model, guide, batch, place = parts(observed)
        where = place(batch).T.expand(samples, 4, 3)
        draws = mm.posterior_draws(model, guide, batch, samples, **options)
        assert {n: tuple(z.shape) for n, z in draws.items()} == {"z": (samples, 4), "v": (samples, 4, 3)}
        torch.testing.assert_close(draws["v"], where, atol=0.6, rtol=0)
        for mean in (False, True):
            x = mm.generate(model, guide, batch, samples, mean=mean, **options)["x"]
            expected = where if observed else where.sum(-1)
            torch.testing.assert_close(x, expected.clone(), atol=0.6 if observed else 6.0, rtol=0)


def test_modalities_in_plates_within_a_row_are_drawn_where_they_are_missing(double):
    model, guide, batch, place = parts(observed=True)
    rows = mm.Batch({"x": batch["x"]}, present={"x": torch.tensor([True, False, True, True])})
    x = mm.generate(model, guide, rows, 2000, seed=0)["x"]
    assert x.shape == (2000, 4, 3) and (x[:, [0, 2, 3]] - place(batch).T[[0, 2, 3]]).abs().max() < 1
    exact = 2e4**0.5  # of a row with nothing: z's variance and v's
    assert (x[:, 1].std(0) / exact - 1).abs().max() < Z / (2 * 2000) ** 0.5 * 1.5 and abs(
        x[:, 1].mean()
    ) < Z * exact / 2000**0.5


# -- by weight ------------------------------------------------------------------------------------------------------


def bent():
    """A story whose posterior is bent, a guide that is not, three rows, and the posterior's moments by quadrature."""

    def decode(z):
        return torch.stack([(2 * z[..., 0]).sin() + z[..., 1], z[..., 0] * z[..., 1]], -1)

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            batch.observe("a", lambda z: dist.Normal(decode(z), 0.5).to_event(1), z)
            batch.observe("b", lambda z: dist.Normal(z[..., 0] ** 2, 0.3), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.tensor([0.2, 0.1]), 1.1).to_event(1).expand([len(batch)]))

    a, b = torch.tensor([[0.5, 0.2], [-1.0, 0.4], [0.1, -0.5]]), torch.tensor([1.0, 0.2, 2.0])
    batch = mm.Batch({"a": a, "b": b}, present={"b": torch.tensor([False, True, False])})
    grid = torch.linspace(-6, 6, 601)
    z = torch.stack(torch.meshgrid(grid, grid, indexing="ij"), -1).reshape(-1, 2)
    moments = []
    for row in range(3):
        log_p = dist.Normal(torch.zeros(2), 1.0).to_event(1).log_prob(z)
        log_p = log_p + dist.Normal(decode(z), 0.5).to_event(1).log_prob(a[row])
        if batch.present["b"][row]:
            log_p = log_p + dist.Normal(z[:, 0] ** 2, 0.3).log_prob(b[row])
        weight = log_p.softmax(0)
        square = z[:, 0] ** 2
        variance = weight @ (square**2) + 0.09 - (weight @ square) ** 2
        moments.append(torch.cat([weight @ z, weight @ z**2, (weight @ square)[None], variance[None]]))
    return model, guide, batch, torch.stack(moments)


def test_resampled_draws_have_the_posteriors_moments_where_the_guides_have_not(double):
    model, guide, batch, truth = bent()
    options = {"num_samples": 4000, "num_particles": 20_000, "seed": 0}
    for resample in (True, False):
        draws = mm.generate(model, guide, batch, resample=resample, **options)["b"]
        z = mm.posterior_draws(model, guide, batch, resample=resample, **options)["z"]
        assert draws.shape == (4000, 3) and z.shape == (4000, 3, 2)
        found = torch.cat([z.mean(0), z.square().mean(0), draws.mean(0)[:, None]], -1)
        spread = torch.cat([z.std(0), z.square().std(0), draws.std(0)[:, None]], -1)
        # an ESS of some 2,000 of the 20,000 is behind the 4,000 draws: their errors add
        errors = (found - truth[:, :5]) / (spread * (1 / 4000 + 1 / 2000) ** 0.5)
        variance = (draws.var(0) / truth[:, 5]).log()
        if resample:  # 15 errors: one beyond 4.5 with probability 1e-4
            assert errors.abs().max() < 4.5 and variance.abs().max() < 0.25
        else:
            assert (errors.abs().amax(1) > 8).all() and variance.abs().max() > 0.3
    assert len(set(z[:, 0, 0].tolist())) == 4000


def test_resampled_draws_are_chosen_by_weight_across_blocks(double):
    """Blocks of two particles, in a guide of two point masses nearly: the shares are those of the weights."""
    loc = torch.tensor([0.0, 1.0])

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe("x", lambda z: dist.Normal(z, 0.7), z)

    def guide(batch):
        with batch.plate():
            k = pyro.sample("k", dist.Bernoulli(0.5), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(loc[k.long()], 1e-4))

    batch = mm.Batch({"x": torch.tensor([0.9, -0.4])})
    resampling = Resampling(600, sizes=BlockSizes(drawn_pairs=4))
    settings = SampleSettings(3000, decode=False, resampling=resampling)
    z = sample_pair(model, guide, batch, settings, seed=1, audit=True).guide_latents["z"]
    at = lambda c: dist.Normal(0.0, 1.0).log_prob(c) + dist.Normal(c, 0.7).log_prob(batch["x"])  # noqa: E731
    share = torch.sigmoid(at(loc[1]) - at(loc[0]))
    # the weights' own error, of 600 draws of either kind, is that of a proportion: 0.02, and the draws' 0.009
    assert ((z > 0.5).double().mean(0) - share).abs().max() < 4 * 0.022
    for row in range(2):  # 600 particles with an ESS of half of that at least, drawn from 3000 times
        assert len(set(z[:, row].tolist())) > 250, "every block has its share"


def test_resampling_with_empty_rows_private_latents_and_one_by_one(double):
    normal = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    decode = lambda: mm.conditionals.Normal(mm.nn.MLP(4, 6, (8,)))  # noqa: E731
    encode = lambda: mm.conditionals.Normal(mm.nn.MLP(3, 4, (8,)))  # noqa: E731
    model = mm.models.PrivateLatents(normal, {"a": normal, "b": normal}, {"a": decode(), "b": decode()})
    guide = mm.Guide(
        z=mm.posteriors.MixtureOfExperts({"a": encode(), "b": encode()}),
        w_a=mm.posteriors.Private("a", encode()),
        w_b=mm.posteriors.Private("b", encode()),
    )
    present = {"a": torch.tensor([True, True, False]), "b": torch.tensor([True, False, False])}
    batch = mm.Batch({"a": torch.randn(3, 3), "b": torch.randn(3, 3)}, present=present)
    state = torch.get_rng_state()
    for vectorize in (True, False):
        options = {"resample": True, "num_particles": 20, "seed": 0, "vectorize": vectorize}
        for samples in (1, 4):
            draws = mm.generate(model, guide, batch, samples, **options)
            assert {n: tuple(x.shape) for n, x in draws.items()} == {n: (samples, 3, 3) for n in "ab"}
            assert all(x.isfinite().all() for x in draws.values())
            z = mm.posterior_draws(model, guide, batch, samples, **options)
            assert {n: tuple(x.shape) for n, x in z.items()} == {n: (samples, 3, 2) for n in ("z", "w_a", "w_b")}
            plain = mm.posterior_draws(model, guide, batch, samples, vectorize=vectorize)
            assert {n: x.shape for n, x in plain.items()} == {n: x.shape for n, x in z.items()}
            torch.set_rng_state(state)
    mm.generate(model, guide, batch, 3, **options)
    assert torch.equal(torch.get_rng_state(), state), "a seed leaves the caller's generator alone"


@pytest.mark.parametrize("inner", [False, True])
def test_simulated_rows_are_the_models_whatever_its_plates(inner, double):
    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if inner:
                with pyro.plate("parts", 3, dim=-2):
                    z = pyro.sample("v", dist.Normal(z, 0.5)).sum(-2, keepdim=True)
            batch.observe("x", lambda z: dist.Normal(z[..., None], torch.ones(2)).to_event(1), z)

    batch = mm.Batch({"x": torch.zeros(5000, 2)}, present={"x": torch.arange(5000) % 2 == 0})
    rows, latent = mm.sampling.ancestral.simulate(model, batch)
    assert rows["x"].shape == (5000, 2) and torch.equal(rows.present["x"], batch.present["x"])
    assert batch["x"].eq(0).all() and latent["z"].shape[-1] == 5000
    z = latent["v"].sum(-2) if inner else latent["z"]
    assert rows[[1, 2]]["x"].shape == (2, 2)
    error = (rows["x"] - z.reshape(-1, 1)).flatten()  # of variance 1: 10,000 of them
    assert abs(error.mean()) < 4.5 / 100 and abs(error.var() - 1) < 4.5 * (2 / 10_000) ** 0.5


def test_generate_refuses_pairs_that_it_cannot_resample():
    def guide(batch):
        with batch.plate():
            pyro.sample("k", dist.Categorical(torch.ones(3)), infer={"enumerate": "parallel"})

    def model(batch):
        with batch.plate():
            k = pyro.sample("k", dist.Categorical(torch.ones(3)))
            batch.observe("x", lambda k: dist.Normal(k.float(), 1.0), k)

    batch = mm.Batch({"x": torch.zeros(4)})
    with pytest.raises(ValueError, match="resample needs a guide without enumerated sites"):
        mm.generate(model, guide, batch, resample=True)
    with pytest.raises(ValueError, match="prior_share: for draws by weight, with resample=True"):
        mm.posterior_draws(model, guide, batch, prior_share=0.5)
    with pytest.raises(TypeError, match="mean"):
        mm.posterior_draws(model, guide, batch, resample=True, mean=True)
    for vectorize in (True, False):
        with pytest.raises(ValueError, match="expected num_samples >= 1, got 0"):
            mm.generate(model, guide, batch, 0, vectorize=vectorize)
