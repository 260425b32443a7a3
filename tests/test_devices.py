"""Fitted proposals, batch statistics, strings and classes on either device: where the rows are, and right."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.utils.global_state import import_zuko, override_validation
from tests.support import sequences

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
on_devices = pytest.mark.parametrize("device", DEVICES)
NETWORKS = {
    "recurrent": (mm.nn.Recurrent, mm.nn.RecurrentTokens),
    "attention": (
        lambda f, o, w, **k: mm.nn.Attention(f, o, w, heads=2, **k),
        lambda f, v, w: mm.nn.AttentionTokens(f, v, w, heads=2),
    ),
}


@on_devices
def test_a_fitted_proposal_finds_the_exact_likelihood(device):
    """Of 40 rows none is further than 5 standard errors off, which has probability 2e-5."""
    model = mm.models.LinearGaussian({"a": torch.eye(3), "b": torch.randn(4, 3)}, noise=0.3)
    batch = model.sample(40)
    batch = mm.Batch({n: batch[n] for n in batch.names}, present={"a": torch.arange(40) % 3 > 0}).to(device)
    model = model.to(device)
    guide = mm.Guide(z=lambda rows: dist.Normal(model.posterior(rows).mean + 0.5, 0.2).to_event(1))

    evidence = mm.log_marginal(model, guide, batch, num_particles=500, proposal="fitted", seed=0)
    truth = model.log_prob(batch)
    assert evidence.log_prob.device.type == device
    assert ((evidence.log_prob - truth).abs() < 5 * evidence.standard_error + 1e-3).all()
    assert evidence.untrusted() == 0

    samples = mm.posterior_draws(model, guide, batch, num_samples=2, resample=True, proposal="fitted", seed=0)
    assert samples["z"].device.type == device


def _autoencoder(features=6, latent=2):
    encoder = mm.conditionals.Normal(mm.nn.MLP(features, 2 * latent))
    prior = dist.Normal(torch.zeros(latent), 1.0).to_event(1)
    model = mm.models.SharedLatent(prior, {"a": mm.conditionals.Normal(mm.nn.MLP(latent, features), scale=1.0)})
    return model, mm.Guide(z=mm.posteriors.ProductOfExperts({"a": encoder}))


@on_devices
def test_a_sum_with_a_batch_statistic_trains_and_compiles(device):
    """The last losses, of draws of their own where the step is compiled, are within a tenth of each other."""
    batch = mm.Batch({"a": torch.randn(64, 6)})
    objective = mm.objectives.elbo(kl=0) + 10 * mm.objectives.MMD("z")
    start = _autoencoder()

    def train(compiled):
        model, guide = copy.deepcopy(start)
        with override_validation(True):
            history = mm.fit(
                model, guide, objective, batch, epochs=40, batch_size=32, seed=0, device=device, compile=compiled,
                optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2), progress=False,
            )  # fmt: skip
        return torch.tensor(history.to_dict()["loss"]), next(model.parameters())

    eager, weight = train(False)
    compiled, _ = train(device == "cuda")
    assert weight.device.type == device
    assert eager[-5:].mean() < 0.95 * eager[0]
    torch.testing.assert_close(compiled[-5:].mean(), eager[-5:].mean(), rtol=0.1, atol=0)


@on_devices
def test_strings_are_scored_and_drawn(device):
    decoder = mm.conditionals.Tokens(mm.nn.RecurrentTokens(2, 5, hidden=8), steps=6, end=0)
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    model = mm.models.SharedLatent(prior, {"word": decoder}).to(device)
    guide = mm.Guide(z=lambda rows: dist.Normal(torch.zeros(rows.size, 2, device=rows.device), 1.0).to_event(1))
    tokens = torch.tensor([[1, 2, 0, 0, 0, 0], [3, 3, 3, 3, 3, 3], [0, 0, 0, 0, 0, 0]])
    batch = mm.Batch({"word": tokens}, lengths={"word": torch.tensor([3, 6, 1])})

    here = mm.log_marginal(copy.deepcopy(model).cpu(), guide, batch, num_particles=400, seed=0)
    there = mm.log_marginal(model, guide, batch.to(device), num_particles=400, seed=0)
    error = (here.standard_error.square() + there.standard_error.square().cpu()).sqrt()
    assert there.log_prob.device.type == device
    assert ((here.log_prob - there.log_prob.cpu()).abs() < 5 * error + 1e-5).all()

    generated = mm.generate(model, guide, batch.to(device), num_samples=3, seed=0)
    assert generated["word"].device.type == device and int(generated["word"].max()) < 5


@on_devices
@pytest.mark.parametrize("networks", NETWORKS)
def test_sequences_of_unequal_length_train_and_are_scored(device, networks):
    model, guide = (program.to(device) for program in sequences.pair(*NETWORKS[networks]))
    batch = sequences.rows()
    with override_validation(True):
        mm.fit(
            model, guide, mm.objectives.mvae(), batch, epochs=1, batch_size=6, seed=0, device=device,
            compile=device == "cuda", progress=False,
        )  # fmt: skip
    here = copy.deepcopy(model).cpu(), copy.deepcopy(guide).cpu()
    expected = mm.encode(here[1], batch)["z"]
    torch.testing.assert_close(mm.encode(guide, batch.to(device))["z"].mean.cpu(), expected.mean, rtol=1e-3, atol=1e-3)
    evidence = mm.log_marginal(model, guide, batch.to(device), num_particles=20, seed=0)
    assert evidence.log_prob.device.type == device and evidence.log_prob.isfinite().all()
    samples = mm.generate(model, guide, batch.without("w").to(device), num_samples=2, seed=0)
    assert samples.lengths["w"].device.type == device


@on_devices
def test_classes_are_read_off_a_mixture(device):
    def model(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(torch.tensor([0.3, 0.7], device=batch.device)))
            z = pyro.sample("z", dist.Normal(2.0 * y - 1, 0.5))
            batch.observe("x", dist.Normal(z, 0.5))

    batch = mm.Batch({"x": torch.tensor([-1.0, 0.0, 0.5])}).to(device)
    guide = mm.Guide(z=lambda rows: dist.Normal(rows["x"], 0.7))
    result = mm.class_probabilities(model, guide, batch, "y", seed=0)
    density = torch.tensor([0.3, 0.7], device=device) * torch.stack(
        [dist.Normal(torch.tensor(c, device=device), 0.5**0.5).log_prob(batch["x"]).exp() for c in (-1.0, 1.0)], -1
    )
    exact = density / density.sum(-1, keepdim=True)
    assert result.probabilities.device.type == device
    assert ((result.probabilities - exact).abs() < 5 * result.standard_error + 1e-6).all()


@on_devices
def test_a_flow_is_a_prior(device):
    """The fitted estimate and the guide's agree within 5 standard errors in each of 8 rows."""
    prior = mm.priors.Flow(import_zuko().flows.MAF(features=2, transforms=2))
    model = mm.models.SharedLatent(prior, {"a": mm.conditionals.Normal(nn.Linear(2, 3), scale=1.0)}).to(device)
    guide = mm.Guide(z=lambda rows: dist.Normal(torch.zeros(rows.size, 2, device=rows.device), 1.5).to_event(1))
    batch = mm.Batch({"a": torch.randn(8, 3)}).to(device)
    plain, fitted = (mm.log_marginal(model, guide, batch, proposal=p, seed=0) for p in (None, "fitted"))
    difference = fitted - plain
    assert fitted.log_prob.device.type == device
    assert (difference.log_prob.abs() < 5 * difference.standard_error).all()
