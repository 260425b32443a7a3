"""Weights of terms, likelihoods and rows in the losses of critics and generators, against torch by hand."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, softplus

import pyro_mm as mm
from pyro_mm.objectives import ALL, EACH, Critic, Objective, Term, elbo, warm_up
from tests.support.implicit_pair import pair, rows

N = 12
FULL = rows(N)
NOISE = torch.randn(N, 2, generator=torch.Generator().manual_seed(4))
STEP = 3


@pytest.fixture
def noise(monkeypatch):
    """The same noise behind every Normal draw and in every generator."""
    take = lambda *shape, **_: NOISE[: shape[-2]]  # noqa: E731
    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda shape, **_: take(*shape))
    monkeypatch.setattr("pyro_mm.distributions.pushforward.torch.randn", take)


def critic_of(**options):
    torch.manual_seed(8)
    return Critic(mm.nn.MLP(4, 3, (8,)), **options)


def player_losses(objective, model, guide, batch, step=STEP):
    players = {player.name.split()[0]: player for player in objective.players(model, guide, batch)}
    return {n: player.loss.evaluate(model, guide, batch, step=step).total for n, player in players.items()}


def logits_by_hand(critic, model, guide, batch, label, encode):
    """Logits of joint and fake pairs of a term, in torch alone but for the product of experts."""
    q = mm.encode(guide, batch.only(*encode))["z"].base_dist
    z = (q.loc + q.scale * NOISE[: batch.size]).detach()
    fake = model.decoders["x"].net(torch.cat([z, NOISE[: batch.size]], -1))
    net = critic.nets[critic.labels.index(label)]
    return net(torch.cat([batch["x"], z], -1)), net(torch.cat([fake, z], -1)), z


def realness(logits):
    return logits[:, 0] - logits[:, 1]


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.parameters()))


def assert_close(found, exact):
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_weights_of_terms_likelihoods_and_steps_multiply_in_the_generators_loss(noise):
    """2 * 0.5 for the joint term, and 0.3 * 0.25 for the other at step 3: the table's weights of log p(x | z)."""
    model, guide = pair()
    batch = FULL
    critic = critic_of()
    terms = [
        Term(ALL, ALL, weight=2.0, likelihood={"x": 0.5}),
        Term(("y",), ("x",), weight=0.25, likelihood=lambda step: 0.1 * step),
    ]
    found = player_losses(Objective(terms).with_critics({"x": critic}), model, guide, batch)["generator"]
    exact = 0.0
    for label, encode, weight in (("(*, *, P)", ("x", "y"), 1.0), ("(y, x, P)", ("y",), 0.075)):
        _, fake, _ = logits_by_hand(critic, model, guide, batch, label, encode)
        exact = exact + weight * softplus(-realness(fake)).sum()
    torch.testing.assert_close(found, exact)
    generator = model.decoders["x"]
    assert_close(gradients(found, generator), gradients(exact, generator))


def test_rows_weigh_as_in_a_mean_over_modalities(noise):
    """A row with x alone has one term, of weight 1; a row with both has two, of weight 1/2 each."""
    model, guide = pair()
    full = FULL
    has_y = torch.arange(N) % 3 > 0
    batch = mm.Batch({name: full[name] for name in "xy"}, {"y": has_y})
    critic = critic_of(optimizer=torch.optim.Adam)
    objective = Objective([Term(EACH, ("x",), average=True)]).with_critics({"x": critic})
    found = player_losses(objective, model, guide, batch)
    share = torch.where(has_y, 0.5, 1.0)
    generator = 0.0
    classification = 0.0
    for label, name, rows_of, weight in (
        ("(x, x, P)", "x", torch.ones(N, dtype=torch.bool), share),
        ("(y, x, P)", "y", has_y, 0.5 * has_y),
    ):
        joint, fake, z = logits_by_hand(critic, model, guide, full, label, (name,))
        generator = generator + (weight * softplus(-realness(fake))).sum()
        order = rows_of.nonzero().flatten()
        other = torch.arange(N)
        other[order] = order.roll(-1)
        net = critic.nets[critic.labels.index(label)]
        logits = (joint, fake, net(torch.cat([full["x"][other], z], -1)))
        each = sum(cross_entropy(x, torch.full((N,), k), reduction="none") for k, x in enumerate(logits))
        relative = weight / weight[rows_of].mean()
        classification = classification + (relative * each)[rows_of].sum() / 2  # the mean of two games
    torch.testing.assert_close(found["generator"], generator)
    torch.testing.assert_close(found["critic"], classification)
    assert_close(gradients(found["critic"], critic), gradients(classification, critic))


class ScaledRows(nn.Module):
    """A story that counts the rows of x with weights of its own, and leaves out some."""

    def __init__(self, model, scale, mask):
        super().__init__()
        self.model = model
        self.scale = scale
        self.mask = mask

    def forward(self, batch):
        rows = batch.covariates["row"].long()
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            with pyro.poutine.scale(scale=self.scale[rows]), pyro.poutine.mask(mask=self.mask[rows]):
                batch.observe("x", self.model.decoders["x"], z)
            batch.observe("y", self.model.decoders["y"], z)


def test_scales_and_masks_of_the_story_count(noise):
    """An explicit x would count so in the table's value."""
    model, guide = pair()
    full = FULL
    batch = mm.Batch({name: full[name] for name in "xy"}, covariates={"row": torch.arange(N).float()})
    scale = 1 + torch.arange(N) / 4
    mask = torch.arange(N) % 4 != 2
    critic = critic_of()
    story = ScaledRows(model, scale, mask)
    found = player_losses(elbo().with_critics({"x": critic}), story, guide, batch)
    _, fake, _ = logits_by_hand(critic, model, guide, full, "(*, *, P)", ("x", "y"))
    torch.testing.assert_close(found["generator"], (scale * softplus(-realness(fake)))[mask].sum())
    with pytest.raises(ValueError, match="site 'x' is scaled by the story, and a critic against the prior"):
        prior = Critic(mm.nn.MLP(4, 1, (8,)), "prior")
        elbo().with_critics({"x": prior}).evaluate(story, guide, batch, step=0)


def test_the_maximum_likelihood_loss_has_the_gradient_of_the_table():
    """With exact ratios, two terms of weights 0.5 and 2: that of - sum_t w_t E log p(x | z), of an explicit decoder.

    The guide is N(0.3 x, 0.8) or N(0.6 y, 0.9), and q(x | z) is normal. With 200,000 rows the entries' errors are below
    0.7 % of the largest one; the seed is fixed.
    """
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(200_000, 1, generator=generator)
    x, y = (z + 0.8 * torch.randn(z.shape, generator=generator) for _ in range(2))
    batch = mm.Batch({"x": x, "y": y})
    variance, shared = 1 + 0.8**2, 1.0

    class Encoder(nn.Module):
        def forward(self, batch):
            of_x = batch.presence("x") is not False
            loc = 0.3 * batch["x"] if of_x else 0.6 * batch["y"]
            return dist.Normal(loc, 0.8 if of_x else 0.9).to_event(1)

    class Exact(nn.Module):
        """Logits whose joint less fake is log q(x | z) - log p(x | z)."""

        def __init__(self, weight, scale, slope, noise, covariance):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))
            q = slope * covariance / (slope**2 * variance + noise**2)  # mean of x given z, by z
            self.mean, self.deviation = q, (variance - q * slope * covariance) ** 0.5
            self.weight, self.scale = weight, scale

        def forward(self, pairs):
            x, z = pairs.unbind(-1)
            joint = dist.Normal(self.mean * z, self.deviation).log_prob(x)
            fake = dist.Normal(self.weight * z, self.scale).log_prob(x)
            return torch.stack([joint, fake, 0 * x + self.unused], -1)

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor(0.7))
            self.scale = nn.Parameter(torch.tensor(1.2))

        def forward(self, pairs):
            return (self.weight * pairs[..., 0] + self.scale * pairs[..., 1])[..., None]

    made = Linear()
    model = mm.models.SharedLatent(
        dist.Normal(torch.zeros(1), 1.0).to_event(1), {"x": mm.conditionals.Implicit(made, noise=1)}
    )
    guide = mm.Guide(z=Encoder())
    critic = Critic(Exact(0.7, 1.2, 0.3, 0.8, variance), generator_loss="likelihood")
    critic.nets.append(Exact(0.7, 1.2, 0.6, 0.9, shared))
    critic.labels = ["(x, x, P)", "(y, x, P)"]
    terms = [Term(("x",), ("x",), weight=0.5), Term(("y",), ("x",), likelihood=2.0)]
    objective = Objective(terms).with_critics({"x": critic})
    (_, player) = objective.players(model, guide, batch[:8])
    torch.manual_seed(0)
    found = gradients(player.loss.evaluate(model, guide, batch, step=0).total / len(batch), made)

    exact = [torch.zeros(()), torch.zeros(())]
    for weight, values, slope, noise_of_q in ((0.5, x, 0.3, 0.8), (2.0, y, 0.6, 0.9)):
        latent = slope * values + noise_of_q * torch.randn(values.shape, generator=generator)
        log_p = dist.Normal(made.weight * latent, made.scale).log_prob(x).mean()
        exact = [total - weight * g for total, g in zip(exact, gradients(log_p, made), strict=True)]
    for one, other in zip(found, exact, strict=True):
        assert one.item() == pytest.approx(other.item(), abs=0.02 * max(map(abs, map(float, exact))))


@pytest.mark.parametrize("compile", [False, True])
def test_a_term_of_weight_0_trains_its_critic_and_not_the_generator(compile, monkeypatch):
    """A weight that warms up from 0 at the first of two steps, and one that stays 0."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)

    def moved(weight, epochs=1):
        model, guide = pair()
        critic = critic_of()
        before = [[p.clone() for p in m.parameters()] for m in (model.decoders["x"], critic)]
        objective = Objective([Term(ALL, ALL, likelihood={"x": weight})]).with_critics({"x": critic})
        options = {"batch_size": 32, "epochs": epochs, "seed": 0, "progress": False, "compile": compile}
        mm.fit(model, guide, objective, rows(32), **options)
        after = [list(m.parameters()) for m in (model.decoders["x"], critic)]
        return [not all(map(torch.equal, b, a)) for b, a in zip(before, after, strict=True)]

    assert moved(0.0) == [False, True]
    assert moved(warm_up(10)) == [False, True]
    assert moved(warm_up(10), epochs=2) == [True, True]


def test_a_negative_weight_is_refused():
    objective = Objective([Term(ALL, ALL, likelihood={"x": -1.0})]).with_critics({"x": critic_of()})
    with pytest.raises(ValueError, match=r"\(\*, \*, P\) weighs the likelihood of 'x' by -1, and a generator cannot"):
        mm.fit(*pair(), objective, rows(32), epochs=1, batch_size=32, seed=0, progress=False)
