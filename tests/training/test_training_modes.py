"""Networks train in training mode, are validated in evaluation mode, and are left in it whatever ends ``fit``."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm

QUIET = {"progress": False, "batch_size": 8, "seed": 0}
ROWS = mm.Batch({"a": torch.randn(32, 3, generator=torch.Generator().manual_seed(0))})


class Stopped(Exception):
    pass


class Spy(nn.Module):
    """Hands its input on, and notes in which mode it was."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward(self, x):
        self.modes.append((self.training, torch.is_grad_enabled()))
        return x


class Networks:
    """A decoder and an encoder with dropout and batch normalisation, used as modules or by functions."""

    def __init__(self):
        torch.manual_seed(0)
        self.spy = Spy()
        self.decoder = nn.Sequential(nn.Linear(2, 3), self.spy, nn.Dropout(0.5))
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        z = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        self.conditional = mm.conditionals.Normal(self.decoder, scale=1.0)
        self.model = mm.models.SharedLatent(z, {"a": self.conditional})
        self.guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"a": mm.conditionals.Normal(self.encoder)}))

    def programs(self, kind):
        if kind == "modules":
            return self.model, self.guide
        if kind == "closures":
            model, guide = self.model, self.guide
            return (lambda batch: model(batch)), (lambda batch: guide(batch))
        if kind == "a method and a dictionary":
            return self.story, self.guide_of({"encoder": self.guide})
        raise ValueError(kind)

    def story(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            batch.observe("a", self.conditional, z)

    def guide_of(self, held):
        def guide(batch):
            held["encoder"](batch)

        return guide

    @property
    def all(self):
        return [self.decoder, self.encoder, *self.decoder, *self.encoder]


KINDS = ["modules", "closures", "a method and a dictionary"]


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_and_batch_normalisation_are_on_in_steps_and_off_in_validation(kind, compile, monkeypatch):
    """Buffers move with the steps alone, and as by hand; the validation loss is that in evaluation mode."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    networks = Networks()
    still = lambda ps: torch.optim.SGD(ps, 0.0)  # noqa: E731
    for module in networks.all:
        module.train(False)
    networks.spy.modes.clear()
    history = mm.fit(*networks.programs(kind), mm.objectives.elbo(), ROWS, validation=ROWS, epochs=2, optimizer=still,
                     compile=compile, **QUIET | {"batch_size": 32})  # fmt: skip
    mean = torch.zeros(4)
    for _ in range(2):
        mean = 0.9 * mean + 0.1 * networks.encoder[0](ROWS["a"]).mean(0)
    torch.testing.assert_close(networks.encoder[1].running_mean, mean.detach())
    assert int(networks.encoder[1].num_batches_tracked) == 2
    assert (True, True) in networks.spy.modes and networks.spy.modes[-1] == (False, False)
    assert not any(module.training for module in networks.all)
    torch.manual_seed(0)
    expected = mm.objectives.elbo().loss(*networks.programs("modules"), ROWS) / 32
    assert history.columns["validation"][-1] == pytest.approx(expected, rel=1e-6)


def stop(*_):
    raise Stopped


def interrupt(*_):
    raise KeyboardInterrupt


def infinite(batch):
    return batch.replaced({"a": batch["a"] * torch.inf}) if batch.size == 8 else batch


def broken(batch):
    raise RuntimeError("broken")


ENDS = {
    "an error of the callback": ({"callback": stop}, Stopped),
    "an interruption": ({"callback": interrupt}, KeyboardInterrupt),
    "infinity": ({"transform": infinite}, mm.training.nonfinite.NotFinite),
    "an error of the transform": ({"transform": broken}, RuntimeError),
    "an optimiser that leaves out parameters": (
        {"optimizer": lambda ps: torch.optim.SGD(list(ps)[1:], 0.1)}, ValueError,
    ),
    "a schedule that is none": ({"scheduler": lambda o: None}, TypeError),
    "validation of other modalities": ({"validation": mm.Batch({"q": torch.zeros(3, 1)})}, ValueError),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS[:2])
@pytest.mark.parametrize("end", ENDS)
def test_networks_are_left_in_evaluation_mode_whatever_ends_it(end, kind):
    options, error = ENDS[end]
    networks = Networks()
    with pytest.raises(error):
        mm.fit(*networks.programs(kind), mm.objectives.elbo(), ROWS, epochs=2, **QUIET | options)
    assert not any(module.training for module in networks.all)


def test_a_frozen_network_that_a_function_refers_to_is_left_as_it_is():
    """Features of a network trained before, whose batch normalisation is not to move."""
    networks, features = Networks(), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).requires_grad_(False).eval()
    before = [x.clone() for x in features.state_dict().values()]

    def guide(batch):
        networks.guide(batch.replaced({"a": features(batch["a"])}))

    mm.fit(networks.model, guide, mm.objectives.elbo(), ROWS, epochs=2, **QUIET)
    assert all(map(torch.equal, before, features.state_dict().values())) and not features.training


def test_the_first_run_on_a_few_rows_moves_no_buffer():
    networks = Networks()
    none = lambda ps: torch.optim.SGD(ps, 0.0)  # noqa: E731
    mm.fit(*networks.programs("closures"), mm.objectives.elbo(), ROWS, epochs=0, optimizer=none, **QUIET)
    assert int(networks.encoder[1].num_batches_tracked) == 0
    assert not networks.encoder[1].running_mean.any()


def test_padding_is_not_used_where_a_function_normalises_batches(monkeypatch):
    """A last smaller minibatch counts as it is: the running mean is that by hand."""
    monkeypatch.setattr("pyro_mm.training.compile.CompiledStep._compile", lambda self, traced, inputs: traced.graph)
    networks, order = Networks(), []
    still = lambda ps: torch.optim.SGD(ps, 0.0)  # noqa: E731

    def watched(batch):
        order.append(batch["a"].clone())
        return batch

    mm.fit(*networks.programs("closures"), mm.objectives.elbo(), ROWS, epochs=2, optimizer=still, transform=watched,
           compile=True, **QUIET | {"batch_size": 12})  # fmt: skip
    mean = torch.zeros(4)
    steps = [rows for rows in order if len(rows) > 2]
    assert [len(rows) for rows in steps] == [12, 12, 8] * 2
    for rows in steps:
        mean = 0.9 * mean + 0.1 * networks.encoder[0](rows).mean(0)
    torch.testing.assert_close(networks.encoder[1].running_mean, mean.detach())
