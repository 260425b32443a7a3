"""Likelihoods in the layer of a discriminator: value and gradients against torch by hand, training, and refusals."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, softplus

import pyro_mm as mm
from pyro_mm.objectives import Discriminator, Objective, Term
from pyro_mm.objectives.feature_likelihood import check_mean_alone

N = 6
SIGMA = 0.7
NOISE = torch.randn(N + 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def parts(scale=0.5, features="1", dtype=torch.float64, **settings):
    """A story of an image of 2 x 2 pixels and a label, a guide, and a table with a discriminator of the image."""
    torch.manual_seed(1)
    decoder = nn.Sequential(nn.Linear(2, 4), nn.Tanh())
    decoders = {
        "image": mm.conditionals.Normal(decoder, (2, 2), scale=scale),
        "label": mm.conditionals.Categorical(nn.Linear(2, 3)),
    }
    features_of = {"image": nn.Sequential(nn.Flatten(-2), nn.Linear(4, 3)), "label": nn.Embedding(3, 3)}
    head = mm.conditionals.Normal(nn.Linear(6, 4))
    model = mm.models.SharedLatent(dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1), decoders)
    guide = mm.Guide(z=mm.posteriors.JointEncoder(features_of, head))
    net = nn.Sequential(nn.Unflatten(-2, (1, 2)), nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Tanh(), nn.Linear(3, 1))
    discriminator = Discriminator(net, features=features, feature_scale=SIGMA, **settings)
    return model.to(dtype), guide.to(dtype), net.to(dtype), discriminator


def objective_of(discriminator, estimator=None, likelihood=1.0):
    table = Objective([Term(("image", "label"), ("image", "label"), likelihood=likelihood)], estimator)
    return table.with_discriminators({"image": discriminator})


def rows(n=N, dtype=torch.float64, present=None):
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(n, 2, 2, dtype=dtype, generator=generator)
    return mm.Batch({"image": image, "label": torch.arange(n) % 3}, present)


@pytest.fixture
def noise(monkeypatch):
    """The same noise behind every Normal draw."""
    monkeypatch.setattr(
        "torch.distributions.normal._standard_normal", lambda shape, **_: NOISE[: shape[-2]].expand(shape)
    )


class ByHand:
    """The objective above, in torch alone."""

    def __init__(self, model, guide, net, batch):
        encoder = guide.posteriors["z"]
        codes = [encoder.features[name](batch[name]) for name in ("image", "label")]
        self.m, raw = encoder.head.net(torch.cat(codes, -1)).chunk(2, -1)
        self.s = 1e-4 + softplus(raw + math.log(math.expm1(1 - 1e-4)))
        self.z = self.m + self.s * NOISE[: batch.size]
        self.net, self.x = net, batch["image"]
        self.decode = nn.Sequential(model.decoders["image"].net, nn.Unflatten(-1, (2, 2)))
        self.label = -cross_entropy(model.decoders["label"].net(self.z), batch["label"], reduction="none")

    def features(self):
        """log N(l(x); l(G(z)), sigma^2) of each row, l the convolution, whose three features are independent."""
        found = conv(self.net, self.decode(self.z))
        return dist.Normal(found, SIGMA).log_prob(conv(self.net, self.x)).sum(-1)

    def kl(self):
        return (-self.s.log() + (self.s**2 + self.m**2) / 2 - 0.5).sum(-1)

    def log_ratio(self):
        """log p(z) - log q(z) of each row's draw."""
        return (dist.Normal(0.0, 1.0).log_prob(self.z) - dist.Normal(self.m, self.s).log_prob(self.z)).sum(-1)


def conv(net, x):
    """Return the three outputs of the convolution of 2 x 2 pixels with a 2 x 2 kernel, its weights constant."""
    return torch.einsum("nij,fij->nf", x, net[1].weight.detach()[:, 0]) + net[1].bias.detach()


def gradients(loss, parameters):
    parameters = list(parameters)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def assert_equal(found, exact):
    for first, second in zip(found, exact, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


def test_the_table_s_update_is_that_of_torch_by_hand(noise):
    """The weight 2 of the image's likelihood is that of its features; guide and decoders learn, the net does not."""
    model, guide, net, discriminator = parts()
    batch = rows()
    loss = objective_of(discriminator, likelihood={"image": 2.0}).evaluate(model, guide, batch, step=0).total
    hand = ByHand(model, guide, net, batch)
    exact = -(2 * hand.features() + hand.label - hand.kl()).sum()
    own = [*model.parameters(), *guide.parameters()]
    by_hand = gradients(exact, own)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-12)
    assert_equal(gradients(loss, own), by_hand)
    assert all(gradient.abs().max() > 0 for gradient in by_hand)
    loss = objective_of(discriminator).evaluate(model, guide, batch, step=0).total
    assert all(g is None for g in torch.autograd.grad(loss, list(net.parameters()), allow_unused=True))


def test_the_decoder_s_update_is_that_of_torch_by_hand(noise):
    model, guide, net, discriminator = parts(weight=2.5)
    batch = rows()
    player = {p.name: p for p in objective_of(discriminator).players(model, guide, batch[:2])}["image decoder"]
    loss = player.loss.evaluate(model, guide, batch, step=0).total
    hand = ByHand(model, guide, net, batch)
    verdicts = sum(softplus(-net(hand.decode(z))).sum() for z in (NOISE[:N], hand.z.detach()))
    exact = -(hand.features() + hand.label - hand.kl()).sum() + 2.5 * verdicts
    assert_equal(gradients(loss, player.parameters), gradients(exact, player.parameters))


def test_features_count_as_a_likelihood_of_particles_and_masks(noise):
    """Three equal particles of an importance-weighted bound; then two rows without the image, and padding."""
    model, guide, net, discriminator = parts()
    batch = rows()
    hand = ByHand(model, guide, net, batch)
    bound = objective_of(discriminator, mm.estimators.IWAE(3)).evaluate(model, guide, batch, step=0).total
    exact = -(hand.features() + hand.label + hand.log_ratio()).sum()
    assert bound.item() == pytest.approx(exact.item(), rel=1e-12)
    own = list(guide.parameters())
    assert_equal(gradients(bound, own), gradients(exact, own))

    lacks = rows(present={"image": torch.arange(N) > 1, "label": torch.ones(N, dtype=torch.bool)})
    lacks = mm.Batch({"image": torch.where(torch.arange(N)[:, None, None] > 1, lacks["image"], math.nan)}
                     | {"label": lacks["label"]}, lacks.present)  # fmt: skip
    decodes = Objective([Term(("label",), ("image",), kl=0.0)]).with_discriminators({"image": discriminator})
    some = decodes.evaluate(model, guide, lacks, step=0).total
    assert some.item() == pytest.approx(decodes.evaluate(model, guide, lacks.padded(N + 3), step=0).total.item())
    whole = decodes.evaluate(model, guide, batch, step=0).total
    first = decodes.evaluate(model, guide, batch[:2], step=0).total
    assert some.item() == pytest.approx((whole - first).item(), rel=1e-12)
    assert all(g.isfinite().all() for g in gradients(some, model.decoders["image"].parameters()))


@pytest.mark.parametrize(
    "estimator",
    [
        mm.estimators.AnalyticKL(2),
        mm.estimators.IWAE(3),
        mm.estimators.IWAE(3, resample=True),
        mm.estimators.DReG(3),
        mm.estimators.StickTheLanding(2),
        mm.estimators.Renyi(0.5, 3),
    ],
    ids=repr,
)
def test_features_that_are_the_pixels_give_the_story_s_own_likelihood(estimator):
    """With the identity for a layer, and the decoder's scale: value and gradients of rows, some without the image."""
    model, guide, _, _ = parts(scale=0.5)
    net = nn.Sequential(nn.Identity(), nn.Flatten(), nn.Linear(4, 1)).double()
    batch = rows(present={"image": torch.arange(N) != 1, "label": torch.arange(N) > 0})
    plain = Objective([Term(("image", "label"), ("image", "label"))], estimator)
    of_features = plain.with_discriminators({"image": Discriminator(net, features="0", feature_scale=0.5)})
    own = [*model.parameters(), *guide.parameters()]
    found = []
    for objective in (plain, of_features):
        torch.manual_seed(5)
        total = objective.evaluate(model, guide, batch, step=0).total
        found.append([total.detach(), *gradients(total, own)])
    assert_equal(*found)


OPTIONS = {"batch_size": 4, "seed": 0, "progress": False}


@pytest.mark.parametrize("family", ["Bernoulli", "Poisson"])
def test_decoders_of_one_parameter_train(family):
    model, guide, _, discriminator = parts()
    model.decoders["image"] = getattr(mm.conditionals, family)(nn.Linear(2, 4).double(), (2, 2))
    batch = mm.Batch({"image": rows()["image"].sigmoid().round(), "label": rows()["label"]})
    history = mm.fit(model, guide, objective_of(discriminator), batch, epochs=1, **OPTIONS)
    assert math.isfinite(history.columns["image decoder"][0])


def test_compiled_and_eager_trainings_are_equal_and_a_training_resumes(monkeypatch, tmp_path):
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    batch = rows(12, present={"image": torch.arange(12) > 1, "label": torch.arange(12) != 5})

    def train(epochs=3, **options):
        model, guide, net, discriminator = parts(penalty=0.1)
        objective = objective_of(discriminator)
        history = mm.fit(model, guide, objective, batch, epochs=epochs, **OPTIONS | options)
        return history.columns, [p.detach().clone() for m in (model, guide, net) for p in m.parameters()]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eager, weights = train()
        compiled, of_compiled = train(compile=True)
    for name, column in eager.items():
        if name not in ("seconds",):
            assert compiled[name] == pytest.approx(column, rel=1e-9)
    assert_equal(of_compiled, weights)

    train(1, checkpoint=tmp_path / "training")
    resumed, of_resumed = train(checkpoint=tmp_path / "training")
    assert resumed["loss"] == eager["loss"]
    assert all(map(torch.equal, of_resumed, weights))


def test_it_bounds_nothing_and_evidence_is_of_the_explicit_likelihood():
    model, guide, _, discriminator = parts()
    objective = objective_of(discriminator)
    assert objective.table.target == "lower bound on log p(image, label)"
    both = (2 * objective) + mm.objectives.elbo(mm.estimators.IWAE(2)) + mm.objectives.MMD("z")
    for one in (objective, both):
        assert str(one.bounds(("image", "label"))).startswith("surrogate: not a bound, since the likelihood of image")
        assert "likelihood of the layer '1' (scale 0.7)" in repr(one)
    batch = rows()
    found, _ = mm.log_marginal(model, guide, batch, num_particles=4000, prior_share=0.5, seed=0).mean()
    z = torch.randn(40_000, 2, dtype=torch.float64)
    mean = model.decoders["image"].net(z).unflatten(-1, (2, 2))
    image = dist.Normal(mean[:, None], 0.5).log_prob(batch["image"]).sum((-1, -2))
    label = dist.Categorical(logits=model.decoders["label"].net(z)[:, None]).log_prob(batch["label"])
    exact = (image + label).logsumexp(0) - math.log(len(z))
    assert found == pytest.approx(exact.mean().item(), abs=0.05)  # both of 4,000 draws or more: errors below 0.01
    assert "log-evidence" in repr(mm.check(model, guide, objective, batch, num_particles=4, repeats=2, seed=0))


# -- what is refused --------------------------------------------------------------------------------------------------


def learned_scale():
    return parts(scale=nn.Parameter(torch.zeros(1)))


def scale_of_each_pixel():
    model, guide, net, discriminator = parts()
    model.decoders["image"] = mm.conditionals.Normal(nn.Linear(2, 8).double(), (2, 2))
    return model, guide, net, discriminator


def with_layer(layer):
    model, guide, _, _ = parts()
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), layer, nn.Linear(3, 1)).double()
    return model, guide, net, Discriminator(net, features="2")


class Twice(nn.Module):
    """A network one of whose layers runs twice, and another one never."""

    def __init__(self):
        super().__init__()
        self.inner, self.never, self.last = nn.Linear(4, 4), nn.Linear(1, 1), nn.Linear(4, 1)

    def forward(self, x):
        return self.last(self.inner(self.inner(x.flatten(1))))


def runs(layer):
    model, guide, _, _ = parts()
    net = Twice().double()
    return model, guide, net, Discriminator(net, features=layer)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (learned_scale, "its decoder learns a scale, .* fix it, as conditionals.Normal"),
        (scale_of_each_pixel, "its decoder learns a scale"),
        (lambda: with_layer(nn.BatchNorm1d(3)), "features of a row in layer '2' change with the other rows"),
        (lambda: with_layer(nn.Dropout(0.5)), "or from one run to the next"),
        (lambda: runs("inner"), "runs 2 times for one value"),
        (lambda: runs("never"), "runs 0 times for one value"),
    ],
)
def test_pairs_and_layers_that_have_no_likelihood_of_features_are_refused(make, message):
    model, guide, _, discriminator = make()
    with pytest.raises(ValueError, match=message):
        mm.fit(model, guide, objective_of(discriminator), rows(), epochs=1, **OPTIONS)


def test_a_mixture_learns_more_than_its_mean():
    mixture = mm.conditionals.NormalMixture(nn.Linear(2, 18), 2)(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="its decoder learns a scale"):
        check_mean_alone("image", {"fn": mixture}, [])


def test_other_mistakes_are_refused():
    model, guide, net, discriminator = parts()
    for settings, message in (
        ({"features": "conv"}, "the name of a layer of net, one of '0', '1', '2', '3', '4', got 'conv'"),
        ({"features": 1}, "the name of a layer of net, .* got 1"),
        ({"feature_scale": 0.0}, "expected feature_scale > 0, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Discriminator(net, **settings)
    label = Objective([Term(("label",), ("label",))]).with_discriminators({"image": discriminator})
    with pytest.raises(ValueError, match="features='1': no term of the objective decodes 'image' by a likelihood"):
        mm.fit(model, guide, label, rows(), epochs=1, **OPTIONS)
    with pytest.raises(ValueError, match="Trace_ELBO asks for a density of image, in the place of which a discrim"):
        mm.fit(model, guide, objective_of(discriminator, pyro.infer.Trace_ELBO()), rows(), epochs=1, **OPTIONS)
