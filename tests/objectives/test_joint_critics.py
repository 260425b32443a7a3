"""One critic of several implicit modalities against the prior: values by hand, masks, training, and what is refused."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

import pyro_mm as mm
from pyro_mm.objectives import ALL, Critic, Objective, Term, elbo, mvae
from tests.support.implicit_pair import pair, rows

OPTIONS = {"batch_size": 32, "seed": 0, "progress": False, "epochs": 1}


def both_implicit():
    model, guide = pair()
    decoders = {"x": model.decoders["x"], "y": mm.conditionals.Implicit(nn.Linear(3, 1), noise=1)}
    return mm.models.SharedLatent(dist.Normal(torch.zeros(2), 1.0).to_event(1), decoders), guide


def joint_critic(**options):
    torch.manual_seed(3)
    return Critic(mm.nn.MLP(5, 1, (8,)), "prior", **options)


def test_the_network_gets_the_modalities_in_the_order_of_the_key_and_all_latents():
    """Value: minus the logit of (y, x, z), once; the KL and both likelihoods are in it."""
    model, guide = both_implicit()
    batch = rows(16)
    critic = joint_critic()
    torch.manual_seed(0)
    found = elbo().with_critics({("y", "x"): critic}).evaluate(model, guide, batch, step=0).total
    q = mm.encode(guide, batch)["z"]
    torch.manual_seed(0)
    z = q.rsample()
    exact = critic.nets[0](torch.cat([batch["y"], batch["x"], z], -1)).sum()
    torch.testing.assert_close(found, exact)
    parameters = list(guide.parameters())
    for one, other in zip(*(torch.autograd.grad(v, parameters) for v in (found, exact)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_losses_of_critic_and_generators_are_those_of_torch_by_hand(monkeypatch):
    model, guide = both_implicit()
    batch = rows(16)
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(4))
    take = lambda *shape, **_: noise[: shape[-2], : shape[-1]]  # noqa: E731
    monkeypatch.setattr("torch.distributions.normal._standard_normal", lambda shape, **_: take(*shape))
    monkeypatch.setattr("pyro_mm.distributions.pushforward.torch.randn", take)
    critic = joint_critic()
    players = elbo().with_critics({("x", "y"): critic}).players(model, guide, batch)
    assert [player.name for player in players] == ["critic x+y", "generator x+y"]
    assert {id(p) for p in players[1].parameters} == {id(p) for p in model.decoders.parameters()}
    found = [player.loss.evaluate(model, guide, batch, step=0).total for player in players]

    q = mm.encode(guide, batch)["z"].base_dist
    z = q.loc + q.scale * noise
    x, y = (model.decoders[name].net(torch.cat([noise, noise[:, :size]], -1)) for name, size in (("x", 2), ("y", 1)))
    joint = critic.nets[0](torch.cat([batch["x"], batch["y"], z], -1))
    fake = critic.nets[0](torch.cat([x, y, noise], -1))
    torch.testing.assert_close(found[0], (softplus(-joint) + softplus(fake)).sum())
    torch.testing.assert_close(found[1], softplus(-fake).sum())


@pytest.mark.parametrize("compile", [False, True])
def test_both_generators_train(compile, monkeypatch):
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    model, guide = both_implicit()
    critic = joint_critic(penalty=0.1)
    before = [p.clone() for module in (model, guide, critic) for p in module.parameters()]
    objective = elbo().with_critics({("x", "y"): critic})
    history = mm.fit(model, guide, objective, rows(), compile=compile, **OPTIONS)
    assert list(history.columns) == ["loss", "(*, *, P)", "critic x+y", "critic x+y accuracy", "generator x+y"]
    after = [p for module in (model, guide, critic) for p in module.parameters()]
    assert not any(map(torch.equal, before, after))


def test_rows_without_any_of_them_have_a_kl_and_rows_with_one_of_them_are_refused():
    """A row that lacks x and y counts nowhere; with a third modality there its bound is that of the explicit story."""
    full = rows()
    lacks = torch.arange(64) % 3 == 0
    model, guide = both_implicit()
    objective = elbo().with_critics({("x", "y"): joint_critic()})
    batch = mm.Batch({"x": full["x"], "y": full["y"]}, {"x": ~lacks, "y": ~lacks})
    assert math.isfinite(mm.fit(model, guide, objective, batch, **OPTIONS).columns["loss"][0])
    some = mm.Batch({"x": full["x"], "y": full["y"]}, {"x": ~lacks, "y": lacks})
    with pytest.raises(ValueError, match=r"decodes 'x' without y in some rows, and one critic judges x\+y together"):
        mm.fit(model, guide, objective, some, **OPTIONS)
    with pytest.raises(ValueError, match=r"decodes 'x' without y in some rows, and one critic judges x\+y together"):
        objective.evaluate(model, guide, full.without("y"), step=0)


def test_a_compiled_training_with_missing_rows_is_the_eager_one(monkeypatch):
    """No update falls back; and a later row that has x without y is named, though a compiled step reads no masks."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    full = rows()
    lacks = torch.arange(64) % 3 == 0

    def train(of_y, compile):
        model, guide = both_implicit()
        batch = mm.Batch({"x": full["x"], "y": full["y"]}, {"x": ~lacks, "y": of_y})
        objective = elbo().with_critics({("x", "y"): joint_critic(penalty=0.1)})
        return mm.fit(model, guide, objective, batch, compile=compile, **OPTIONS | {"epochs": 2}).columns

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eager, compiled = (train(~lacks, compile) for compile in (False, True))
    assert list(eager) == list(compiled)
    for name, values in eager.items():
        assert compiled[name] == pytest.approx(values, rel=1e-5)
    with pytest.raises(ValueError, match=r"x\+y together|is nan"):
        train(~lacks | (torch.arange(64) == 63), True)


def test_in_rows_without_the_modality_the_kl_counts():
    """With x missing, the value of a critic of x against the prior is the bound of y alone."""
    model, guide = pair()
    full = rows()
    lacks = torch.arange(64) % 3 == 0
    batch = mm.Batch({"x": full["x"], "y": full["y"]}, {"x": ~lacks})

    class Zero(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, pairs):
            return 0 * pairs[..., :1] + self.unused

    torch.manual_seed(0)
    found = elbo().with_critics({"x": Critic(Zero(), "prior")}).evaluate(model, guide, batch, step=0).total
    q = mm.encode(guide, batch)["z"]
    torch.manual_seed(0)
    log_p = model.decoders["y"](q.rsample()).log_prob(full["y"])
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    kl = torch.distributions.kl_divergence(q, prior)
    torch.testing.assert_close(found, -(log_p - torch.where(lacks, kl, 0.0)).sum())


def test_the_target_is_the_joint_divergence():
    objective = elbo().with_critics({("x", "y"): joint_critic()})
    text = "estimates, by critics: lower bound on log p(x, y) + H(x, y), which is - KL(q(x, y, z) || p(x, y, z))"
    assert str(objective.bounds(("x", "y"))) == text + ", without bias"
    assert "I_q(others; z | x, y), a bias" in str(objective.bounds(("x", "y", "w")))
    assert "critic of x+y against the prior" in objective.describe(("x", "y"))


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.x = mm.conditionals.Implicit(nn.Linear(3 + 2, 2), 2)
        self.y = mm.conditionals.Implicit(nn.Linear(3, 1), 1)

    def forward(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            y = batch.observe("y", self.y, z)
            batch.observe("x", self.x, z, y)


def single(size):
    return Critic(mm.nn.MLP(size + 2, 1, ()), "prior")


@pytest.mark.parametrize(
    ("critics", "message"),
    [
        (lambda: {"x": single(2), "y": single(1)}, r"give them one critic together, with_critics\(\{\('x', 'y'\)"),
        (lambda: {("x", "y"): Critic(mm.nn.MLP(5, 3, ()))}, "one critic of x.y against the posterior: given the lat"),
        (lambda: {("x", "y"): joint_critic(), "y": single(1)}, r"critics of x\+y and of y both judge 'y'"),
        (lambda: {("x", "x"): joint_critic()}, "names a modality twice"),
        (lambda: {3: joint_critic()}, "expected the keys of critics to be modalities"),
    ],
)
def test_mistakes_are_refused(critics, message):
    with pytest.raises((ValueError, TypeError), match=message):
        mm.fit(*both_implicit(), elbo().with_critics(critics()), rows(), **OPTIONS)


def test_terms_and_stories_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(x, x, P\) decodes 'x' without y"):
        mm.fit(*both_implicit(), mvae().with_critics({("x", "y"): joint_critic()}), rows(), **OPTIONS)
    with pytest.raises(ValueError, match="modality 'y' has a density in the story"):
        mm.fit(*pair(), elbo().with_critics({("x", "y"): joint_critic()}), rows(), **OPTIONS)
    with pytest.raises(ValueError, match="y is a parent of another modality"):
        mm.fit(Chain(), pair()[1], elbo().with_critics({("x", "y"): joint_critic()}), rows(), **OPTIONS)
    weights = {"x": 1.0, "y": 2.0}
    with pytest.raises(ValueError, match="they weigh 2 and 1"):
        objective = Objective([Term(ALL, ALL, likelihood=weights)]).with_critics({("x", "y"): joint_critic()})
        mm.fit(*both_implicit(), objective, rows(), **OPTIONS)


class Classes(nn.Module):
    """A story with a class that is summed out."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("c", dist.Categorical(torch.ones(2)))
            for name in ("x", "y"):
                batch.observe(name, self.model.decoders[name], z)


@pytest.mark.parametrize("against", ["posterior", "prior"])
def test_a_discrete_latent_that_is_summed_out_is_refused(against):
    model, guide = pair()
    critic = Critic(mm.nn.MLP(4, 3 if against == "posterior" else 1, ()), against)
    with pytest.raises(ValueError, match="a discrete latent is summed out here: let the guide draw it"):
        mm.fit(Classes(model), guide, elbo().with_critics({"x": critic}), rows(), **OPTIONS)
