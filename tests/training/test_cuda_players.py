"""Trainings of several players, averages of weights and flows of images, with steps as CUDA graphs and without."""

import copy
import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.objectives import ALL, Critic, Discriminator, Objective, Term, elbo
from pyro_mm.utils.global_state import override_validation
from tests.support import implicit_pair
from tests.support.adversarial_game import game
from tests.support.adversarial_game import rows as rows_of_game

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
on_devices = pytest.mark.parametrize("device", DEVICES)
STEPS = 8  # more than those before a capture


class Reseed:
    """A transform that makes the draws of each step repeatable."""

    def __init__(self):
        self.calls = 0

    def __call__(self, batch):
        self.calls += 1
        torch.manual_seed(self.calls)
        return batch


def of_critics(against):
    model, guide = implicit_pair.pair()
    torch.manual_seed(2)
    critic = Critic(mm.nn.MLP(4, 3 if against == "posterior" else 1, (8,)), against, penalty=0.1)
    objective = Objective([Term(ALL, ALL), Term(("x",), ("x",), weight=0.5)])
    return model, guide, objective.with_critics({"x": critic})


def of_discriminator():
    model, guide = implicit_pair.pair(implicit=False)
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1))
    return model, guide, elbo().with_discriminators({"x": Discriminator(net, penalty=0.1)})


GAMES = {
    "critic, posterior": (lambda: of_critics("posterior"), implicit_pair.rows),
    "critic, prior": (lambda: of_critics("prior"), implicit_pair.rows),
    "VAE-GAN": (of_discriminator, implicit_pair.rows),
    "own players": (game, rows_of_game),
}


def train(make, batch, device, **options):
    """Return columns and weights of STEPS steps of 32 of 64 rows."""
    model, guide, objective = make()
    settings = {"batch_size": 32, "epochs": STEPS // 2, "seed": 0, "device": device, "progress": False, "audit": False}
    history = mm.fit(model, guide, objective, batch[:64], transform=Reseed(), **settings | options)
    modules = [model, guide, *_modules(objective)]
    return history.to_dict(), [p.detach().cpu() for module in modules for p in module.parameters()]


def _modules(objective):
    """The networks of the objective's own players."""
    return [objective] if isinstance(objective, nn.Module) else objective.modules


ON_GPU = [pytest.param(name, "cuda", marks=pytest.mark.cuda) for name in GAMES]


@pytest.mark.parametrize(("name", "device"), [("own players", "cpu"), *ON_GPU])
def test_traced_steps_of_all_players_are_the_eager_ones(name, device, monkeypatch):
    """On a GPU each player's step is a CUDA graph of the trace, whose draws are those of the programs."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    make, rows = GAMES[name]
    eager, ends = train(make, rows(), device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a step that is not traced
        traced, found = train(make, rows(), device, compile=True)
    assert list(traced) == list(eager)
    for column in eager:
        assert traced[column] == pytest.approx(eager[column], rel=1e-3, abs=1e-4, nan_ok=True), column
    for one, other in zip(found, ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("name", GAMES)
def test_compiled_players_train_on_the_gpu(name):
    """By inductor, whose draws are others: no step falls back, and the losses of 40 steps stay close to the eager ones.

    Both are means of 64 rows over ten epochs; they differ by less than a fifth of 1 plus their size.
    """
    make, rows = GAMES[name]
    with warnings.catch_warnings(), override_validation(True):
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch itself, within inductor
        compiled, _ = train(make, rows(), "cuda", compile=True, epochs=20)
    eager, _ = train(make, rows(), "cuda", epochs=20)
    for column in eager:
        one, other = (torch.tensor(values[column])[-10:].nanmean() for values in (compiled, eager))
        assert abs(one - other) < 0.2 * (1 + abs(other)), column


@on_devices
@pytest.mark.parametrize(
    "options",
    [
        {"callbacks": lambda: [mm.callbacks.WeightAverage(0.9)]},
        {"callbacks": lambda: [mm.callbacks.WeightAverage(None)]},
        {"accumulate": 2},
        {"clip_norm": 0.05},
        {"accumulate": 2, "clip_norm": 0.05, "callbacks": lambda: [mm.callbacks.WeightAverage(0.9)]},
    ],
    ids=["moving average", "mean over epochs", "accumulate", "clip", "all of them"],
)
def test_averages_accumulation_and_clipping_are_the_same_in_traced_steps(options, device, monkeypatch):
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)

    def make():
        return *implicit_pair.pair(implicit=False), elbo(mm.estimators.AnalyticKL(2))

    def run(**more):
        settings = {key: value() if callable(value) else value for key, value in options.items()}
        return train(make, implicit_pair.rows(), device, **settings, **more)

    eager, ends = run()
    traced, found = run(compile=True)
    assert traced["loss"] == pytest.approx(eager["loss"], rel=1e-4)
    for one, other in zip(found, ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    plain, _ = train(make, implicit_pair.rows(), device)
    if "callbacks" not in options or "accumulate" in options:
        assert plain["loss"] != pytest.approx(eager["loss"], rel=1e-5)  # the option does something


def image_flow():
    torch.manual_seed(0)
    decoder = mm.conditionals.ImageFlow(
        nn.Linear(2, 3), (4, 4), 3, scales=2, steps=2, hidden=4, context_channels=2, bounds=None
    )
    with torch.no_grad():
        for p in decoder.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return decoder


@on_devices
def test_a_flow_of_images_has_the_same_density_and_gradient_everywhere(device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # as on a CPU
    decoder = image_flow()
    z, x = torch.randn(6, 2), torch.randn(6, 4, 4)
    there = copy.deepcopy(decoder).to(device)
    found = there(z.to(device)).log_prob(x.to(device))
    exact = decoder(z).log_prob(x)
    torch.testing.assert_close(found.cpu(), exact, rtol=1e-4, atol=1e-3)
    found.sum().backward()
    exact.sum().backward()
    for one, other in zip(there.parameters(), decoder.parameters(), strict=True):
        torch.testing.assert_close(one.grad.cpu(), other.grad, rtol=1e-3, atol=1e-2)
    drawn = there(z.to(device)).sample()
    assert drawn.device.type == device and drawn.isfinite().all()


@on_devices
def test_a_flow_of_images_trains_and_is_scored(device):
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    model = mm.models.SharedLatent(prior, {"image": image_flow()})
    encoder = mm.conditionals.Normal(nn.Sequential(nn.Flatten(-2), nn.Linear(16, 4)))
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"image": encoder}))
    batch = mm.Batch({"image": torch.randn(64, 4, 4)})
    options = {"batch_size": 32, "epochs": 3, "seed": 0, "device": device, "progress": False}
    with override_validation(True):
        history = mm.fit(model, guide, elbo(), batch, compile=device == "cuda", **options)
    assert all(map(math.isfinite, history.columns["loss"]))
    evidence = mm.log_marginal(model, guide, batch[:8], num_particles=20, seed=0)
    assert evidence.log_prob.isfinite().all()
