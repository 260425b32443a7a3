"""Signal and noise of gradients, against gradients that are known; and the names of their parts."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO

import pyro_mm as mm
from pyro_mm.diagnostics.gradient_noise import gradient_noise

tables, E = mm.objectives, mm.estimators


class Given:
    """An "objective" whose gradients are those given, one after another."""

    def __init__(self, parameters, gradients):
        self.parameters, self.gradients = parameters, [gradients[0], *gradients]  # one is for a look at the leaves
        self.count = [0]  # shared by copies

    def differentiable_loss(self, model, guide, batch):
        self.count[0] += 1
        given = self.gradients[self.count[0] - 1]
        return sum((p * g).sum() for p, g in zip(self.parameters, given, strict=True) if g is not None)


class Two(torch.nn.Module):
    """A story of no consequence, with two networks."""

    def __init__(self):
        super().__init__()
        self.nets = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Sequential(torch.nn.Linear(3, 1))})
        self.extra = torch.nn.Parameter(torch.zeros(2))

    def forward(self, batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(0.0, 1.0))


def nothing(batch):
    with batch.plate():
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_signal_and_noise_are_those_of_the_gradients(double):
    story, batch = Two(), mm.Batch({"x": torch.zeros(5)})
    names = [name for name, _ in story.named_parameters()]
    parameters = list(story.parameters())
    draws = [[1.0 + torch.randn_like(p) for p in parameters] for _ in range(7)]
    draws[2][names.index("extra")] = None  # in one repeat it was not used
    found = gradient_noise(story, nothing, Given(parameters, draws), batch, repeats=7)
    assert [g.name for g in found.groups] == ["model", "model.nets.a", "model.nets.b"]
    for group, members in (("model", ["extra"]), ("model.nets.a", ["nets.a.weight", "nets.a.bias"])):
        each = [[draw[names.index(m)] for m in members] for draw in draws]
        zeros = [[torch.zeros(2) if x is None else x for x in one] for one in each]
        flat = np.stack([torch.cat([x.flatten() for x in one]).numpy() for one in zeros])
        trace = np.trace(np.atleast_2d(np.cov(flat.T)))
        signal = (flat.mean(0) ** 2).sum() - trace / 7
        assert found[group].noise == pytest.approx(trace**0.5 / 5)
        assert found[group].signal == pytest.approx(max(signal, 0) ** 0.5 / 5)
        assert found[group].snr == pytest.approx((max(signal, 0) / trace) ** 0.5)
        assert found[group].size == flat.shape[1] and found[group].tensors == len(members)
    with pytest.raises(ValueError, match="at least 2 repeats"):
        gradient_noise(story, nothing, Given(parameters, draws), batch, repeats=1)


def test_parameters_without_a_gradient_are_named(double):
    story, batch = Two(), mm.Batch({"x": torch.zeros(5)})
    parameters = dict(story.named_parameters())
    story.nets["b"][0].bias.requires_grad_(False)
    used = [parameters["extra"], parameters["nets.a.weight"], parameters["nets.b.0.weight"]]
    draws = [[torch.randn(2) / (r != 3), torch.zeros(2, 2), torch.ones(1, 3)] for r in range(5)]
    found = gradient_noise(story, nothing, Given(used, draws), batch, repeats=5)
    assert found.unused == ("model.nets.a.bias",)
    assert found.zero == ("model.nets.a.weight",)
    assert found.nonfinite == ("model.extra",)
    assert found.frozen == ("model.nets.b.0.bias",)
    assert found["model.nets.b"].snr == math.inf and found["model.nets.b"].signal == pytest.approx(3**0.5 / 5)
    assert math.isnan(found["model"].snr) and math.isnan(found["model.nets.a"].snr)


def toy(mean):
    """log w = log N(z; 0, 1) - log N(z; mean, 1) by one draw z = mean + e: its gradient in the mean is -(mean + e)."""
    location = torch.nn.Parameter(mean)

    def model(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(len(mean)), 1.0).to_event(1))
            batch.observe("x", dist.Normal(torch.zeros(()), 1.0).expand([len(batch)]))

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(location, 1.0).to_event(1).expand([len(batch)]))

    return model, guide, location


@pytest.mark.parametrize(
    "objective",
    [tables.elbo(E.IWAE(1)), Trace_ELBO(), TraceGraph_ELBO()],
    ids=["IWAE", "Trace_ELBO", "TraceGraph_ELBO"],
)
def test_signal_to_noise_of_a_known_gradient(objective, double):
    """Four rows: the gradient is N(4 mean, 4 I), its SNR is sqrt(4 / 3) |mean|."""
    model, guide, location = toy(torch.tensor([1.0, 2.0, -1.0]))
    location.grad = torch.full((3,), 7.0)
    found = gradient_noise(model, guide, objective, mm.Batch({"x": torch.zeros(4)}), repeats=300, seed=0)
    (group,) = found.groups
    assert group.name == "closure (3,)" and torch.equal(location.grad, torch.full((3,), 7.0))
    # 300 repeats: a standard error of 0.115 / 9.8 in the signal and of 1 / sqrt(2 * 900) in the noise; 4 of them
    assert group.signal == pytest.approx(6**0.5, rel=0.05)
    assert group.noise == pytest.approx(12**0.5 / 4, rel=0.1)
    assert group.snr == pytest.approx((4 / 3 * 6) ** 0.5, rel=0.11)


def test_gradient_noise_reports_no_signal_where_there_is_none(double):
    """The estimate of SNR^2 is then of mean zero and standard error sqrt(2 / d) / R: it exceeds 4 with p = 1e-3."""
    model, guide, _ = toy(torch.zeros(50))
    batch, objective = mm.Batch({"x": torch.zeros(4)}), tables.elbo(E.IWAE(1))
    found = [gradient_noise(model, guide, objective, batch, repeats=10, seed=seed).groups[0].snr for seed in range(8)]
    assert max(found) < 2 * (2 / 50) ** 0.25 / 10**0.5
    assert min(found) == 0, "eight seeds are not all above their mean: p = 0.004"


def test_gradient_noise_names_parameters_that_functions_hold():
    centres, nets = torch.nn.Embedding(3, 2), [torch.nn.Linear(2, 2)]

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(centres.weight[0], 1.0).to_event(1))
            batch.observe("x", lambda z: dist.Normal(nets[0](z), 1.0).to_event(1), z)

    def guide(batch):
        with batch.plate():
            scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
            pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1).expand([len(batch)]))

    batch = mm.Batch({"x": torch.randn(4, 2)})
    found = gradient_noise(model, guide, tables.elbo(), batch, repeats=2)
    assert {g.name for g in found.groups} == {
        "model.centres", "model.nets[0]", "pyro.param 'scale'",
    }  # fmt: skip

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.encoder = torch.nn.Linear(2, 2), mm.conditionals.Normal(torch.nn.Linear(2, 4))

        def model(self, batch):
            with batch.plate():
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                batch.observe("x", lambda z: dist.Normal(self.decoder(z), 1.0).to_event(1), z)

        def guide(self, batch):
            with batch.plate():
                pyro.sample("z", self.encoder(batch["x"]))

    both = Both()
    found = gradient_noise(both.model, both.guide, tables.elbo(), batch, repeats=2)
    assert [g.name for g in found.groups] == ["model.decoder", "model.encoder"] and not found.unused
