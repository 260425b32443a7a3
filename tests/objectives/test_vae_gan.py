"""VAE-GAN modalities: the three gradients against torch by hand, masks, training, and what is refused."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

import pyro_mm as mm
from pyro_mm.objectives import ALL, EACH, Discriminator, Objective, Term
from pyro_mm.objectives import decoded_means as means
from tests.support import implicit_pair

N = 7
ALPHA = 0.3


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pair(dtype=torch.float64):
    """A story of an image of two pixels and a label, and a joint guide with unimodal ones."""
    torch.manual_seed(1)
    decoders = {
        "image": mm.conditionals.Normal(nn.Linear(2, 2), scale=nn.Parameter(torch.tensor(-0.5))),
        "label": mm.conditionals.Categorical(nn.Linear(2, 3)),
    }
    experts = {
        "image": mm.conditionals.Normal(nn.Linear(2, 4)), "label": mm.conditionals.Normal(nn.Embedding(3, 4))
    }  # fmt: skip
    features = {"image": nn.Linear(2, 3), "label": nn.Embedding(3, 3)}
    head = mm.conditionals.Normal(nn.Linear(6, 4))
    partial = mm.posteriors.ProductOfExperts(experts, prior=None)
    prior = dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1)
    model = mm.models.SharedLatent(prior, decoders)
    guide = mm.Guide(z=mm.posteriors.JointEncoder(features, head, partial))
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
    return model.to(dtype), guide.to(dtype), net.to(dtype)


def table():
    return mm.objectives.jmvae_kl(ALPHA)


def rows(dtype=torch.float64, present=None):
    return mm.Batch({"image": torch.randn(N, 2, dtype=dtype), "label": torch.arange(N) % 3}, present)


def players(objective, model, guide, batch):
    return {player.name: player for player in objective.players(model, guide, batch[:2])}


def gradients(loss, parameters):
    found = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


NOISE = torch.randn(N, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def noise(monkeypatch):
    """The same noise behind every Normal draw: z is m + s e of the posterior's, and e of the prior."""
    monkeypatch.setattr(
        "torch.distributions.normal._standard_normal", lambda shape, **_: NOISE[: shape[-2]].expand(shape)
    )


class ByHand:
    """JMVAE-GAN of the pair above, in torch alone."""

    def __init__(self, model, guide, net, batch):
        self.decode, self.log_scale = model.decoders["image"].net, model.decoders["image"].log_scale
        self.classify = model.decoders["label"].net
        encoder = guide.posteriors["z"]
        self.features, self.head, self.experts = encoder.features, encoder.head.net, encoder.partial.experts
        self.net, self.x, self.y = net, batch["image"], batch["label"]

    def joint(self):
        return split(self.head(torch.cat([self.features["image"](self.x), self.features["label"](self.y)], -1)))

    def alone(self, name):
        return split(self.experts[name].net(self.x if name == "image" else self.y))

    def table(self):
        """-log p(x | z) - log p(y | z) + KL(q || p) + alpha sum_m KL(q || q_m), summed over rows."""
        m, s = self.joint()
        z = m + s * NOISE
        scale = self.log_scale.exp()
        loss = (0.5 * ((self.x - self.decode(z)) / scale) ** 2 + self.log_scale + 0.5 * math.log(2 * math.pi)).sum()
        loss = loss + nn.functional.cross_entropy(self.classify(z), self.y, reduction="sum")
        loss = loss + kl(m, s, torch.zeros_like(m), torch.ones_like(s))
        return loss + ALPHA * sum(kl(m, s, *self.alone(name)) for name in ("image", "label"))

    def generated(self):
        m, s = self.joint()
        return self.decode(NOISE), self.decode((m + s * NOISE).detach())


def kl(m, s, n, t):
    return (torch.log(t / s) + (s**2 + (m - n) ** 2) / (2 * t**2) - 0.5).sum()


def split(output):
    """Return location and scale as ``conditionals.Normal`` reads them off a network's output."""
    m, raw = output.chunk(2, -1)
    return m, 1e-4 + nn.functional.softplus(raw + math.log(math.expm1(1 - 1e-4)))


def assert_equal(found, exact):
    for first, second in zip(found, exact, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)


def test_the_table_s_update_is_that_of_torch_by_hand(noise):
    model, guide, net = pair()
    batch = rows()
    objective = table().with_discriminators({"image": Discriminator(net)})
    loss = objective.evaluate(model, guide, batch, step=0).total
    own = [*model.decoders["label"].parameters(), *guide.parameters()]
    assert_equal(gradients(loss, own), gradients(ByHand(model, guide, net, batch).table(), own))
    assert loss.item() == pytest.approx(table().evaluate(model, guide, batch, step=0).total.item(), rel=1e-14)


@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_the_decoder_s_update_is_that_of_torch_by_hand(weight, noise):
    """-log p(x | z) - w [log D(G(z~)) + log D(G(z))], by the parameters of p(x | z) alone, its scale among them."""
    model, guide, net = pair()
    batch = rows()
    objective = table().with_discriminators({"image": Discriminator(net, weight)})
    player = players(objective, model, guide, batch)["image decoder"]
    assert {id(p) for p in player.parameters} == {id(p) for p in model.decoders["image"].parameters()}
    found = gradients(player.loss.evaluate(model, guide, batch, step=0).total, player.parameters)
    hand = ByHand(model, guide, net, batch)
    verdicts = sum(softplus(-net(each)).sum() for each in hand.generated())
    assert_equal(found, gradients(hand.table() + weight * verdicts, player.parameters))


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_the_discriminator_s_update_is_that_of_torch_by_hand(penalty, noise):
    """-log D(x) - log(1 - D(G(z~))) - log(1 - D(G(z))), and half the penalty times the squared slope at x."""
    model, guide, net = pair()
    batch = rows()
    objective = table().with_discriminators({"image": Discriminator(net, penalty=penalty)})
    player = players(objective, model, guide, batch)["image discriminator"]
    assert list(map(id, player.parameters)) == list(map(id, net.parameters()))
    loss = player.loss.evaluate(model, guide, batch, step=0)
    found = gradients(loss.total, player.parameters)

    prior, posterior = ByHand(model, guide, net, batch).generated()
    x = batch["image"].clone().requires_grad_()
    parts = {
        "data": -softplus(-net(x)).sum(),
        "prior": -softplus(net(prior.detach())).sum(),
        "posterior": -softplus(net(posterior.detach())).sum(),
    }
    (slope,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    total = -sum(parts.values()) + 0.5 * penalty * slope.square().sum()
    assert_equal(found, gradients(total, player.parameters))
    for name, value in parts.items():
        assert loss.by_term[name].item() == pytest.approx(value.item(), rel=1e-10)


def test_the_discriminator_gives_no_gradient_to_the_rest():
    model, guide, net = pair()
    batch = rows()
    objective = table().with_discriminators({"image": Discriminator(net)})
    found = players(objective, model, guide, batch)
    others = [*model.parameters(), *guide.parameters()]
    total = found["image discriminator"].loss.evaluate(model, guide, batch, step=0).total
    assert all(g is None for g in torch.autograd.grad(total, others, allow_unused=True, retain_graph=True))
    total = objective.evaluate(model, guide, batch, step=0).total
    assert all(g is None for g in torch.autograd.grad(total, list(net.parameters()), allow_unused=True))


def test_uniform_latents_lie_between_minus_one_and_one():
    model, _, _ = pair()
    batch = rows()[torch.arange(N).repeat(100)]
    decoder = model.decoders["image"].net
    with torch.no_grad():
        decoder.weight.copy_(torch.eye(2))
        decoder.bias.zero_()
        prior, uniform = (means.mean_of(means.prior_site(model, batch, "image", uniform=u)) for u in (False, True))
    assert uniform.abs().max() <= 1 < prior.abs().max()
    assert abs(uniform.var() - 1 / 3) < 0.05 and abs(prior.var() - 1) < 0.15  # 5 standard errors of 1400 draws


# -- missing modalities, padding, subsamples --------------------------------------------------------------------------


def test_rows_without_the_modality_count_in_no_verdict_and_padding_changes_nothing():
    """Only the verdicts' sums are compared, at a decoder that ignores z, so that draws do not matter."""
    model, guide, net = pair()
    with torch.no_grad():
        model.decoders["image"].net.weight.zero_()
    present = {"image": torch.arange(N) < 4, "label": torch.arange(N) != 1}
    full = rows()
    some = mm.Batch({name: full[name] for name in full.names}, present)
    objective = table().with_discriminators({"image": Discriminator(net)})
    critic = players(objective, model, guide, full)["image discriminator"].loss
    whole, part, padded, only = (
        critic.evaluate(model, guide, batch, step=0).by_term for batch in (full, some, some.padded(N + 5), full[:4])
    )
    for source in ("data", "prior", "posterior"):
        assert part[source].item() == pytest.approx(only[source].item(), rel=1e-10)
        assert padded[source].item() == pytest.approx(part[source].item(), rel=1e-10)
        assert whole[source] < part[source]
    none = critic.evaluate(model, guide, full.without("image"), step=0)
    assert none.total.item() == 0.0


def test_a_subsample_is_scaled_to_the_data(noise):
    """Of 7 rows that stand for 70 each verdict counts ten times."""
    model, guide, net = pair()
    batch = rows()
    objective = table().with_discriminators({"image": Discriminator(net, penalty=0.1)})
    for player in objective.players(model, guide, batch):
        plain = player.loss.evaluate(model, guide, batch, step=0).total
        scaled = player.loss.evaluate(model, guide, batch.part_of(10 * N), step=0).total
        assert scaled.item() == pytest.approx(10 * plain.item(), rel=1e-10)


# -- training ---------------------------------------------------------------------------------------------------------


def trainable(dtype=torch.float32, **settings):
    model, guide, net = pair(dtype)
    return model, guide, table().with_discriminators({"image": Discriminator(net, **settings)})


def many(dtype=torch.float32):
    label = torch.arange(60) % 3
    image = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 3.0]], dtype=dtype)[label] + 0.3 * torch.randn(60, 2)
    return mm.Batch(
        {"image": image, "label": label}, {"image": torch.arange(60) % 5 > 0, "label": torch.arange(60) > 4}
    )


OPTIONS = {"batch_size": 32, "seed": 0, "progress": False}


def weights(*modules):
    return [p.detach().clone() for module in modules for p in module.parameters()]


def test_a_training_moves_every_player_and_resumes(tmp_path):
    batch = many()
    model, guide, objective = trainable(penalty=0.1, every=2)
    before = weights(model, guide, *objective.modules)
    whole = mm.fit(model, guide, objective, batch, epochs=3, **OPTIONS)
    after = weights(model, guide, *objective.modules)
    assert not any(map(torch.equal, before, after))
    names = ["image decoder", "image decoder prior", "image decoder posterior", "image discriminator"]
    assert set(names) < set(whole.columns) and all(math.isfinite(x) for n in names for x in whole.columns[n])

    path = tmp_path / "training"
    mm.fit(*trainable(penalty=0.1, every=2), batch, epochs=1, checkpoint=path, **OPTIONS)
    model, guide, objective = trainable(penalty=0.1, every=2)
    resumed = mm.fit(model, guide, objective, batch, epochs=3, checkpoint=path, **OPTIONS)
    assert resumed.columns["loss"] == whole.columns["loss"]
    assert all(map(torch.equal, after, weights(model, guide, *objective.modules)))


def test_the_steps_of_all_players_are_traced(monkeypatch):
    """Without a compiler, with masks, a padded minibatch and a penalty, whose gradient is of the second order."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    batch = many()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = mm.fit(*trainable(penalty=0.1), batch, epochs=2, compile=True, **OPTIONS)
    assert all(math.isfinite(value) for column in history.columns.values() for value in column)


def test_evidence_is_that_of_the_explicit_likelihood_and_bounds_are_the_table_s():
    model, guide, objective = trainable()
    batch = many()[:10]
    plain = table()
    assert str(objective.bounds(batch.names)) == str(plain.bounds(batch.names))
    assert objective.target == plain.target and "VAE-GAN 'image': weight 1, latents prior" in repr(objective)
    first = mm.log_marginal(model, guide, batch, num_particles=10, seed=0).mean()
    assert math.isfinite(first[0])
    both = objective + mm.objectives.MMD("z")
    assert isinstance(both, mm.objectives.VAEGAN) and len(both.terms) == len(plain.terms) + 1
    assert isinstance(2 * objective, mm.objectives.VAEGAN) and (2 * objective).discriminators
    assert "log-evidence" in repr(mm.check(model, guide, objective, batch, num_particles=4, repeats=2, seed=0))


def test_a_discriminator_that_has_won_is_named():
    player = players(trainable()[2], *pair(torch.float32)[:2], many())["image discriminator"]
    assert player.diagnose({"image discriminator": 1.0}) is None
    assert "the discriminator of 'image' tells values from generated ones" in player.diagnose(
        {"image discriminator": 1e-3}
    )


def test_two_tables_of_one_story_have_discriminators():
    """VAEVAE with a discriminator: every table trains."""
    model, guide, net = pair(torch.float32)
    objective = mm.objectives.vaevae().with_discriminators({"image": Discriminator(net, latents="uniform")})
    history = mm.fit(model, guide, objective, many(), epochs=2, **OPTIONS)
    assert math.isfinite(history.columns["image decoder"][-1])


# -- what is refused --------------------------------------------------------------------------------------------------


def label_discriminator(model, guide, net):
    return {"label": Discriminator(net)}


def wrong_shape(model, guide, net):
    return {"image": Discriminator(nn.Linear(2, 3))}


def unknown(model, guide, net):
    return {"sound": Discriminator(net)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (label_discriminator, "'label': Categorical has no mean of the shape of its values"),
        (wrong_shape, r"return logits of shape \(3,\) or \(3, 1\), got Tensor of torch.float32 and shape \(3, 3\)"),
        (unknown, "discriminators: unknown modality 'sound'"),
    ],
)
def test_modalities_that_cannot_be_judged_are_refused(make, message):
    model, guide, net = pair(torch.float32)
    objective = table().with_discriminators(make(model, guide, net))
    with pytest.raises(ValueError, match=message):
        mm.fit(model, guide, objective, many(), epochs=1, **OPTIONS)


def test_a_decoder_that_shares_its_network_is_refused():
    model, guide, net = pair(torch.float32)
    trunk = nn.Linear(2, 2)
    model.decoders["image"].net = nn.Sequential(trunk, nn.Linear(2, 2))
    model.decoders["label"].net = nn.Sequential(trunk, nn.Linear(2, 3))
    objective = table().with_discriminators({"image": Discriminator(net)})
    with pytest.raises(ValueError, match=r"something else of the story depends on parameters .* \(2, 2\), \(2,\)"):
        mm.fit(model, guide, objective, many(), epochs=1, **OPTIONS)


def test_mistakes_at_the_door_are_refused():
    _, _, net = pair()
    for given, kind, message in (
        ({}, ValueError, "discriminators, 1 at least, got 0"),
        ({"image": net}, TypeError, r"discriminators\['image'\] to be a pyro_mm.objectives.Discriminator, got the mod"),
        ({"image": Discriminator(net), "b": Discriminator(net)}, ValueError, "one network as their discriminator"),
    ):
        with pytest.raises(kind, match=message):
            table().with_discriminators(given)
    for settings, message in (
        ({"weight": 0.0}, "expected weight > 0, got 0"),
        ({"penalty": -1.0}, "expected penalty >= 0, got -1"),
        ({"latents": "normal"}, "latents to be one of 'prior', 'uniform'"),
        ({"every": 0}, "expected every >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Discriminator(net, **settings)
    with pytest.raises(ValueError, match="takes its gradient itself"):
        Objective([Term(ALL, ALL)], pyro.infer.TraceGraph_ELBO()).with_discriminators({"image": Discriminator(net)})
    assert EACH is not ALL


# -- beside a critic --------------------------------------------------------------------------------------------------


def with_an_implicit_x(discriminated):
    """A story whose x is implicit and y explicit, with a critic of x and a discriminator."""
    model, guide = implicit_pair.pair()
    net = nn.Sequential(nn.Linear(1 if discriminated == "y" else 2, 4), nn.Tanh(), nn.Linear(4, 1))
    critic = mm.objectives.Critic(mm.nn.MLP(4, 3, (8,)))
    objective = mm.objectives.elbo().with_critics({"x": critic})
    return model, guide, objective.with_discriminators({discriminated: Discriminator(net)})


@pytest.mark.parametrize("compile", [False, True])
def test_a_discriminator_stands_beside_a_critic(compile, monkeypatch):
    """Five updates a step, each of its own parameters, which all move; none is left to two of them."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    model, guide, objective = with_an_implicit_x("y")
    batch = implicit_pair.rows()
    before = weights(model, guide, *objective.modules)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = mm.fit(model, guide, objective, batch, epochs=2, compile=compile, **OPTIONS)
    assert {"critic x", "generator x", "y decoder", "y discriminator"} <= set(history.columns)
    moved = [not torch.equal(b, a) for b, a in zip(before, weights(model, guide, *objective.modules), strict=True)]
    assert sum(moved) >= len(moved) - 1  # of a logit's difference from others of the pair the last bias has no part
    owners = [id(p) for player in objective.players(model, guide, batch[:4]) for p in player.parameters]
    assert len(set(owners)) == len(owners)


def test_a_discriminator_of_an_implicit_modality_is_refused():
    model, guide, objective = with_an_implicit_x("x")
    with pytest.raises(ValueError, match="'x' is implicit, and has no likelihood for a discriminator to stand beside"):
        mm.fit(model, guide, objective, implicit_pair.rows(), epochs=1, **OPTIONS)


# -- what goes wrong --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_batch_of_one_row_trains(precision):
    model, guide, objective = trainable()
    batch = many()[torch.tensor([7, 8, 9])]
    history = mm.fit(model, guide, objective, batch, epochs=1, precision=precision, **OPTIONS | {"batch_size": 1})
    assert all(math.isfinite(column[0]) for column in history.columns.values())


@pytest.mark.parametrize("player", ["image discriminator", "image decoder"])
def test_nan_of_a_player_is_named_and_all_is_put_back(player):
    model, guide, _ = pair(torch.float32)
    net = nn.Sequential(nn.Linear(2, 4), nn.LeakyReLU(), nn.Linear(4, 1))
    wild = {"image discriminator": "optimizer", "image decoder": "decoder_optimizer"}[player]
    settings = {wild: lambda parameters: torch.optim.SGD(parameters, 1e30)}
    objective = table().with_discriminators({"image": Discriminator(net, **settings)})
    with pytest.raises(ValueError, match=r"(loss|gradient|parameter).* (is|are) (nan|inf|-inf)|not finite"):
        mm.fit(model, guide, objective, many(), epochs=20, **OPTIONS)
    assert all(p.isfinite().all() for p in weights(model, guide, net))


def test_a_discriminator_without_a_gradient_is_named():
    model, guide, net = pair(torch.float32)
    net.requires_grad_(False)
    objective = table().with_discriminators({"image": Discriminator(net)})
    with pytest.raises(ValueError, match="the player 'image discriminator' has nothing to train"):
        mm.fit(model, guide, objective, many(), epochs=1, **OPTIONS)
