"""Roles of factors: gradient norms, normalised HSIC and swaps, against closed forms, on stories of several kinds."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.metrics.dependence import leave_one_out

N, STEPS, SIZE = 12, 4, 2
LENGTHS = torch.arange(N) % STEPS + 1


def standard(size):
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


def factorised_story():
    """An image of 6 numbers, a series of 4 steps of 2, and a class; affine networks, but for the class."""
    decoders = {
        "image": mm.conditionals.Normal(nn.Linear(3 + 2, 6), scale=0.5),
        "series": mm.conditionals.Normal(nn.Linear(3 + 2, STEPS * SIZE), scale=0.5, event_shape=(STEPS, SIZE)),
    }
    labels = {"label": mm.conditionals.Categorical(nn.Linear(3, 4))}
    factors = {name: nn.Linear(2, 2) for name in decoders}
    return mm.models.Factorized(
        standard(2), {name: standard(2) for name in decoders}, decoders, labels, nn.Linear(2, 3), factors
    )


def factorised_guide():
    experts = {
        "image": mm.conditionals.Normal(nn.Linear(6, 4)),
        "series": mm.conditionals.Normal(mm.nn.Recurrent(SIZE, 4, 8)),
        "label": mm.conditionals.Normal(nn.Embedding(4, 4)),
    }
    own = {
        "w_image": mm.posteriors.Private("image", mm.conditionals.Normal(nn.Linear(6, 4))),
        "w_series": mm.posteriors.Private("series", mm.conditionals.Normal(mm.nn.Recurrent(SIZE, 4, 8))),
    }
    return mm.Guide(z=mm.posteriors.ProductOfExperts(experts), **own)


def rows(missing=False):
    values = {"image": torch.randn(N, 6), "series": torch.randn(N, STEPS, SIZE), "label": torch.arange(N) % 4}
    present = {"image": torch.arange(N) % 3 > 0, "series": torch.arange(N) % 4 > 0} if missing else None
    return mm.Batch(values, present, lengths={"series": LENGTHS})


@pytest.fixture
def case(double):
    torch.manual_seed(0)
    return factorised_story(), factorised_guide(), rows(missing=True)


def linear_norms(story):
    """Modality -> (norm of z, of its own factor) per step."""
    found = {}
    for name, steps in (("image", 1), ("series", STEPS)):
        weight = story.decoders[name].net.weight.detach().reshape(steps, -1, 5)
        found[name] = torch.stack([weight[..., :3].flatten(1).norm(dim=1), weight[..., 3:].flatten(1).norm(dim=1)])
    return found


# -- gradient norms ---------------------------------------------------------------------------------------------------


def test_gradient_norms_of_affine_decoders_are_the_norms_of_their_loadings(case):
    """To rounding, without an error over rows; of factors that a modality does not depend on, exactly 0."""
    story, guide, batch = case
    found = mm.metrics.gradient_norms(story, guide, batch, seed=0)
    assert found.factors == ("z", "w_image", "w_series")
    exact = linear_norms(story)
    for name, other in (("image", 2), ("series", 1)):
        own = 3 - other
        torch.testing.assert_close(found.norms[name][[0, own]], exact[name], rtol=1e-12, atol=1e-12)
        assert (found.norms[name][other] == 0).all() and found.errors[name].max() < 1e-12
    assert (found.norms["label"][1:] == 0).all() and (found.norms["label"][0] > 0).all()
    there = batch.present["series"]
    expected = torch.stack([(there & (t < LENGTHS)).sum() for t in range(STEPS)])
    assert torch.equal(found.rows["series"][0], expected) and torch.equal(found.rows["series"][2], expected)
    both = there & batch.present["image"]
    assert found.rows["series"][1].tolist() == [(both & (t < LENGTHS)).sum().item() for t in range(STEPS)]
    assert "z" in found.table() and repr(found).endswith("per unit of the factor")


def test_gradient_norms_per_standard_deviation(case):
    story, guide, batch = case
    found = mm.metrics.gradient_norms(story, guide, batch, "z", standardise=True, seed=0)
    latents = mm.posterior_draws(story, guide, batch, seed=0)  # the same draws, in the same order
    deviation = story.factors({"z": latents["z"][0]})["z"].std(0, correction=0)
    weight = story.decoders["image"].net.weight[:, :3] * deviation
    torch.testing.assert_close(found.norms["image"][0, 0], weight.detach().norm(), rtol=1e-9, atol=1e-9)


def test_padding_changes_no_gradient_norm(double):
    """Of a decoder that is not linear, under an encoder that reads the lengths."""
    torch.manual_seed(0)
    decoder = mm.conditionals.Normal(mm.nn.MLP(2, STEPS * SIZE, (8,)), scale=1.0, event_shape=(STEPS, SIZE))
    model = mm.models.SharedLatent(standard(2), {"series": decoder})
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"series": mm.conditionals.Normal(mm.nn.Recurrent(SIZE, 4, 8))}))
    values = torch.randn(N, STEPS, SIZE)
    padding = torch.arange(STEPS) >= LENGTHS[:, None]
    found = []
    for filler in (0.0, 1e3):
        filled = torch.where(padding[..., None], filler, values)
        batch = mm.Batch({"series": filled}, lengths={"series": LENGTHS})
        found.append(mm.metrics.gradient_norms(model, guide, batch, seed=0))
    assert torch.equal(found[0].norms["series"], found[1].norms["series"])
    assert found[0].rows["series"][0].tolist() == [N, N * 3 // 4, N // 2, N // 4]


class Tanh(torch.autograd.Function):
    """An operation whose derivative has no batched form."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, gradient):
        (y,) = ctx.saved_tensors
        sign = 1.0 if bool(gradient.sum() == gradient.sum()) else 0.0  # looks at values, which a batch does not have
        return sign * gradient * (1 - y.square())


class Unbatched(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(Tanh.apply(x))


@pytest.mark.parametrize("batched", [True, False])
def test_gradient_norms_of_networks_are_those_of_the_jacobian(double, batched):
    """Each row's Jacobian by torch.autograd.functional, of networks that allow for batches of gradients or not."""
    torch.manual_seed(0)
    inner = nn.Linear(2, 3 * 2)
    net = nn.Sequential(nn.Tanh(), inner) if batched else Unbatched(inner)
    decoder = mm.conditionals.Normal(net, scale=1.0, event_shape=(3, 2))
    model = mm.models.SharedLatent(standard(2), {"x": decoder})
    guide = mm.Guide(
        z=mm.posteriors.ProductOfExperts({"x": mm.conditionals.Normal(nn.Sequential(nn.Flatten(-2), nn.Linear(6, 4)))})
    )
    batch = mm.Batch({"x": torch.randn(7, 3, 2)})
    found = mm.metrics.gradient_norms(model, guide, batch, sequences="x", seed=3)
    z = mm.posterior_draws(model, guide, batch, seed=3)["z"][0]
    each = [torch.autograd.functional.jacobian(lambda v: inner(v.tanh()), row).reshape(3, -1).norm(dim=1) for row in z]
    each = torch.stack(each).detach()
    torch.testing.assert_close(found.norms["x"][0], each.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.errors["x"][0], each.std(0) / 7**0.5, rtol=1e-9, atol=1e-12)
    assert all(p.grad is None for p in (*model.parameters(), *guide.parameters()))


def strings(vocabulary=5, steps=6):
    torch.manual_seed(1)
    decoder = mm.conditionals.Tokens(mm.nn.RecurrentTokens(2, vocabulary, 8, embedding=4), steps, end=0)
    model = mm.models.SharedLatent(standard(2), {"text": decoder})
    encoder = mm.nn.Recurrent(4, 4, 8, vocabulary=vocabulary)
    posterior = mm.posteriors.ProductOfExperts({"text": mm.conditionals.Normal(encoder)})
    lengths = torch.tensor([6, 2, 3, 4, 2, 5])
    tokens = torch.randint(1, vocabulary, (6, steps))
    tokens[torch.arange(steps) >= (lengths - 1)[:, None]] = 0
    return model, posterior, mm.Batch({"text": tokens}, lengths={"text": lengths})


def test_gradient_norms_of_strings_are_those_of_the_next_tokens(double):
    model, posterior, batch = strings()
    guide = mm.Guide(z=posterior)
    found = mm.metrics.gradient_norms(model, guide, batch, seed=0)
    z = mm.posterior_draws(model, guide, batch, seed=0)["z"][0]
    net = model.decoders["text"].net
    norms = torch.zeros(6, 6)
    for n in range(6):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, n=n: net(v[None], batch["text"][n : n + 1, :-1]).softmax(-1)[0], z[n]
        )
        norms[n] = jacobian.flatten(1).norm(dim=1)
    valid = torch.arange(6) < batch.lengths["text"][:, None]
    expected = torch.where(valid, norms, 0).sum(0) / valid.sum(0)
    torch.testing.assert_close(found.norms["text"][0], expected, rtol=1e-9, atol=1e-12)
    assert found.rows["text"][0].tolist() == valid.sum(0).tolist()


def test_what_a_story_names_is_a_factor_too(double):
    """A story written out, with a factor named by pyro.deterministic, and a latent in a plate within each row."""
    loading, map_ = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[2.0, 0.0], [0.0, 5.0]])

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", standard(2))
            f = pyro.deterministic("f", z @ map_.T, event_dim=1)
            batch.observe("x", lambda f: dist.Normal(f @ loading.T, 0.3).to_event(1), f)
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("v", dist.Normal(0.0, 1.0))

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(batch["x"], 0.1).to_event(1))
            with pyro.plate("parts", 3, dim=-2):
                pyro.sample("v", dist.Normal(0.0, 1.0))

    batch = mm.Batch({"x": torch.randn(9, 2)})
    found = mm.metrics.gradient_norms(model, guide, batch, ("z", "f", "v"), seed=0)
    expected = [(loading @ map_).norm(), loading.norm(), 0.0]
    assert found.norms["x"][:, 0].tolist() == pytest.approx([float(x) for x in expected], rel=1e-12)
    assert set(mm.metrics.gradient_norms(model, guide, batch, seed=0).factors) == {"z", "v"}
    ratios = mm.metrics.hsic_ratios(model, guide, batch, ("f", "v"), seed=0)
    assert ratios.ratios["f"]["x"] > 0.5 and ratios.rows["v"]["x"] == 9
    effects = mm.metrics.swaps(model, guide, batch, ("z", "f", "v"), seed=0).effects
    assert effects["v"]["x"] == 0 and effects["f"]["x"] == pytest.approx(1) and effects["z"]["x"] == pytest.approx(1)


# -- normalised HSIC --------------------------------------------------------------------------------------------------


def centred(gram):
    n = len(gram)
    h = torch.eye(n) - torch.full((n, n), 1 / n)
    return h @ gram @ h


def by_hand(x, y, bandwidth):
    """tr(KHLH) / (|HKH| |HLH|), kernels exp(-r^2 / 2 h^2)."""
    k, kernel = (centred((-torch.cdist(v, v).square() / (2 * bandwidth**2)).exp()) for v in (x, y))
    return ((k * kernel).sum() / k.norm() / kernel.norm()).item()


def test_biased_ratios_are_the_papers_formula(case):
    story, guide, batch = case
    found = mm.metrics.hsic_ratios(story, guide, batch, bandwidth=1.5, unbiased=False, seed=0)
    factors = story.factors({name: x[0] for name, x in mm.posterior_draws(story, guide, batch, seed=0).items()})
    means = {name: d.mean.detach() for name, d in story.decode(factors).items() if name != "label"}
    means["series"] = torch.where((torch.arange(STEPS) < LENGTHS[:, None])[..., None], means["series"], 0).flatten(1)
    for name, factor in (("image", "z"), ("image", "w_image"), ("series", "w_series"), ("series", "z")):
        there = batch.present[name]
        expected = by_hand(factors[factor][there].detach(), means[name][there], 1.5)
        assert found.ratios[factor][name] == pytest.approx(expected, rel=1e-9)
        assert found.rows[factor][name] == there.sum()
    ratio, error = found.shared_to_private["z", "image"]
    assert ratio == pytest.approx(found.ratios["z"]["image"] / found.ratios["w_image"]["image"]) and error > 0
    assert set(found.shared_to_private) == {("z", "image"), ("z", "series")}
    assert "biased estimates" in repr(found) and "bandwidth 1.5" in repr(found)


@pytest.mark.parametrize("unbiased", [True, False])
def test_statistics_without_each_row_are_those_of_fewer_rows(double, unbiased):
    torch.manual_seed(0)
    n = 9
    grams = [x @ x.T for x in torch.randn(2, n, 3)]
    if unbiased:
        grams = [gram - gram.diagonal().diag() for gram in grams]
    whole, each = leave_one_out(*grams, unbiased)
    for i in range(n):
        rest = torch.arange(n) != i
        one, _ = leave_one_out(*(gram[rest][:, rest] for gram in grams), unbiased)
        assert each[i].item() == pytest.approx(one.item(), rel=1e-9)
    if not unbiased:
        assert whole.item() == pytest.approx((centred(grams[0]) * centred(grams[1])).sum().item() / n**2)


def two_factor_story(share):
    """x = a share of z, rotated, and the rest of w; y is a rotation of z; v has nothing to do with either."""
    loadings = {"x": torch.eye(2) * share, "y": torch.tensor([[0.0, -2.0], [2.0, 0.0]]), "v": torch.zeros(2, 2)}

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", standard(2))
            w = pyro.sample("w_x", standard(2))
            batch.observe("x", lambda z, w: dist.Normal(z @ loadings["x"] + (1 - share) * w, 0.1).to_event(1), z, w)
            for name in "yv":
                batch.observe(name, lambda z, name=name: dist.Normal(z @ loadings[name].T, 0.1).to_event(1), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", standard(2))
            pyro.sample("w_x", standard(2))

    return model, guide


def test_independent_variables_have_ratio_zero_and_rotations_one(double):
    """Ten ratios of independent variables, 300 rows each: below 4.5 jackknife errors, which fails 1 time in 10^4."""
    model, guide = two_factor_story(1.0)
    batch = mm.Batch({name: torch.randn(300, 2) for name in "xyv"})
    for seed in range(10):
        found = mm.metrics.hsic_ratios(model, guide, batch, seed=seed)
        assert found.ratios["z"]["y"] == pytest.approx(1, abs=1e-9) and found.errors["z"]["y"] < 1e-9
        assert found.ratios["z"]["v"] == 0 and found.errors["z"]["v"] == 0
        assert abs(found.ratios["w_x"]["y"]) < 4.5 * found.errors["w_x"]["y"] < 0.1


def test_the_jackknife_error_is_the_deviation_of_the_ratio(double):
    """Of 100 samples of 60 rows the deviation is known to 7 %; a limit of 30 % fails with probability below 1e-4."""
    model, guide = two_factor_story(0.6)
    batch = mm.Batch({name: torch.randn(60, 2) for name in "xyv"})
    found = [mm.metrics.hsic_ratios(model, guide, batch, "z", seed=seed, audit=seed == 0) for seed in range(100)]
    deviation = torch.tensor([one.ratios["z"]["x"] for one in found]).std()
    error = torch.tensor([one.errors["z"]["x"] for one in found]).square().mean().sqrt()
    assert error == pytest.approx(deviation.item(), rel=0.3)


def test_strings_are_drawn_where_no_mean_is_known(double):
    model, posterior, batch = strings()
    found = mm.metrics.hsic_ratios(model, mm.Guide(z=posterior), batch, seed=0)
    assert math.isfinite(found.ratios["z"]["text"]) and found.rows["z"]["text"] == 6


# -- swaps ------------------------------------------------------------------------------------------------------------


def test_a_private_factor_changes_its_own_modality_and_no_other(case):
    """Exactly; and the effects are those of decoding by hand."""
    story, guide, batch = case
    partners = torch.arange(N).roll(5)
    found = mm.metrics.swaps(story, guide, batch, partners=partners, seed=0)
    assert found.effects["w_image"]["series"] == found.effects["w_series"]["image"] == 0
    assert found.effects["w_image"]["label"] == found.effects["w_series"]["label"] == 0
    assert found.effects["z"]["label"] == 1
    for name in ("series", "label"):
        assert torch.equal(found.swapped["w_image"][name], found.reconstructions[name])
    assert not torch.equal(found.swapped["w_image"]["image"], found.reconstructions["image"])

    factors = story.factors({name: x[0] for name, x in mm.posterior_draws(story, guide, batch, seed=0).items()})
    decode = lambda **changes: story.decode(factors | changes)["image"].mean  # noqa: E731
    moved = {name: x[partners] for name, x in factors.items()}
    own, every = (
        (decode(**change) - decode()).square().sum(1).detach() for change in ({"w_image": moved["w_image"]}, moved)
    )
    counted = batch.present["image"] & batch.present["image"][partners]
    own, every = own[counted], every[counted]
    ratio = own.sum() / every.sum()
    assert found.effects["w_image"]["image"] == pytest.approx(ratio.item(), rel=1e-9)
    error = (own - ratio * every).std() / len(own) ** 0.5 / every.mean()
    assert found.errors["w_image"]["image"] == pytest.approx(error.item(), rel=1e-9)
    assert torch.equal(found.truth["label"], batch["label"]) and torch.equal(found.lengths["series"], LENGTHS)


def test_swaps_of_strings_share_their_random_numbers(double):
    """A string whose factor is not swapped is the same string."""
    text, posterior, batch = strings()
    decoders = {"text": text.decoders["text"], "x": mm.conditionals.Normal(nn.Linear(4, 3), scale=1.0)}
    model = mm.models.PrivateLatents(standard(2), {"x": standard(2)}, decoders)
    guide = mm.Guide(z=posterior, w_x=mm.posteriors.Private("x", mm.conditionals.Normal(nn.Linear(3, 4))))
    batch = mm.Batch({"text": batch["text"], "x": torch.randn(6, 3)}, lengths={"text": batch.lengths["text"]})
    found = mm.metrics.swaps(model, guide, batch, seed=0)
    assert torch.equal(found.swapped["w_x"]["text"], found.reconstructions["text"])
    assert found.effects["w_x"]["text"] == 0 and found.effects["z"]["text"] == 1


# -- beside other features --------------------------------------------------------------------------------------------


def test_networks_called_factors_and_decode_are_no_methods(double):
    """A story that is a module, with networks of the names of the methods of a factorised story."""

    class Story(nn.Module):
        def __init__(self):
            super().__init__()
            self.factors, self.decode = nn.Linear(2, 2), nn.Linear(2, 3)

        def forward(self, batch):
            with batch.plate():
                z = pyro.sample("z", standard(2))
                batch.observe("x", lambda z: dist.Normal(self.decode(self.factors(z)), 1.0).to_event(1), z)

    model, batch = Story(), mm.Batch({"x": torch.randn(9, 3)})
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"x": mm.conditionals.Normal(nn.Linear(3, 4))}))
    found = mm.metrics.gradient_norms(model, guide, batch, seed=0)
    expected = (model.decode.weight @ model.factors.weight).norm().item()
    assert found.norms["x"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", ["mfm", "mfm_variational", "dmvae", "mmvae_plus", "jmvae_kl"])
def test_recipes_have_exact_zeros_where_their_stories_have_no_arrow(name):
    """Images and labels, some missing; deterministic encoders, mixtures and joint encoders; blocks of rows."""
    torch.manual_seed(0)
    n = 300
    values = {
        "image": (torch.rand(n, 4, 4) > 0.5).float(),
        "other": torch.rand(n, 3, 3).round(),
        "label": torch.arange(n) % 3,
    }
    batch = mm.Batch(values, {"image": torch.arange(n) % 5 > 0, "label": torch.arange(n) % 4 > 0})
    pair = getattr(mm.recipes, name)(batch, latent=2, hidden=(4,))[:2]
    norms = mm.metrics.gradient_norms(*pair, batch, seed=0)
    effects = mm.metrics.swaps(*pair, batch, seed=0).effects
    for i, factor in enumerate(norms.factors):
        for modality in batch:
            enters = factor == "z" or factor == f"w_{modality}"
            assert bool(norms.norms[modality][i] > 0) == (effects[factor][modality] > 0) == enters
    ratios = mm.metrics.hsic_ratios(*pair, batch, seed=0)
    assert ratios.rows["z"]["image"] == 240 and set(ratios.ratios) == set(norms.factors)
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


# -- refusals ---------------------------------------------------------------------------------------------------------


def discrete_model(batch):
    with batch.plate():
        y = pyro.sample("y", dist.Categorical(torch.ones(3)))
        batch.observe("x", lambda y: dist.Normal(y.to(torch.get_default_dtype()), 1.0), y)


def discrete_guide(batch):
    with batch.plate():
        pyro.sample("y", dist.Categorical(torch.ones(3)))


REFUSED = {
    "an unknown factor": (lambda m, g, b: mm.metrics.gradient_norms(m, g, b, "w"), "unknown factor 'w'"),
    "one row": (lambda m, g, b: mm.metrics.swaps(m, g, b[:1]), "two rows at least"),
    "partners": (lambda m, g, b: mm.metrics.swaps(m, g, b, partners=torch.arange(N) + 1), "row numbers from 0 to 11"),
    "few rows": (lambda m, g, b: mm.metrics.hsic_ratios(m, g, b[:4]), "expected 5 rows at least"),
    "a discrete factor": (
        lambda m, g, b: mm.metrics.gradient_norms(discrete_model, discrete_guide, mm.Batch({"x": torch.zeros(5)}), "y"),
        "'y' is discrete",
    ),
    "no factor": (
        lambda m, g, b: mm.metrics.gradient_norms(discrete_model, discrete_guide, mm.Batch({"x": torch.zeros(5)})),
        "no latent in the plate",
    ),
    "no row": (
        lambda m, g, b: mm.metrics.gradient_norms(m, g, b.without("image")), "modality 'image': no row has it"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_answer_is_refused(case, name):
    call, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        call(*case)


def test_too_many_rows_for_a_kernel_matrix_are_refused(double):
    model, guide = two_factor_story(0.5)
    with pytest.raises(ValueError, match="5000 rows at most"):
        mm.metrics.hsic_ratios(model, guide, mm.Batch({name: torch.zeros(5001, 2) for name in "xyv"}))
