"""A staged step notices that a module, a parameter or a hook is another one, wherever it is."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

import pyro_mm as mm
from pyro_mm.scoring.prepare_objective import prepare_objective
from pyro_mm.training.problem import problem_from_run
from pyro_mm.training.program_snapshot import ProgramSnapshot
from tests.support.compiled import assert_same, eager, gradients


class Story(nn.Module):
    """A decoder with modules inside of modules, one of them in a list."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(2, 4), nn.Tanh()), nn.Linear(4, 2)])

    def forward(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            mean = self.layers[1](self.layers[0](z))
            batch.observe("b", dist.Normal(mean, 1.0).to_event(1))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mm.conditionals.Normal(nn.Linear(2, 4))

    def forward(self, batch):
        return self.net(batch["b"])


def setting():
    return Story(), mm.Guide(z=Encoder()), mm.Batch({"b": torch.randn(6, 2)})


def of_functions():
    """The same as functions, whose networks are in their closures."""
    nets = {"decoder": nn.Linear(2, 2)}
    decoder = nn.Linear(2, 2)

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            batch.observe("b", dist.Normal(decoder(z), 1.0).to_event(1))

    def replace():
        nonlocal decoder
        decoder = nn.Linear(2, 2)

    return model, replace, nets


def doubled(module, inputs, output):
    return output * 2


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


CHANGES = {
    "a module in a list": lambda model, guide: model.layers.__setitem__(1, nn.Linear(4, 2)),
    "a module deep inside": lambda model, guide: model.layers[0].__setitem__(1, nn.ReLU()),
    "a module of the guide": lambda model, guide: setattr(guide.posteriors["z"].net, "net", nn.Linear(2, 4)),
    "a module that is added": lambda model, guide: model.layers[0].append(nn.ReLU()),
    "a parameter": lambda model, guide: setattr(model.layers[1], "bias", nn.Parameter(torch.ones(2))),
    "a parameter that is taken away": lambda model, guide: setattr(model.layers[1], "bias", None),
    "a hook": lambda model, guide: model.layers[1].register_forward_hook(doubled),
    "a hook before": lambda model, guide: model.layers[1].register_forward_pre_hook(lambda m, inputs: (inputs[0] * 2,)),
    "a hook of a parameter": lambda model, guide: model.layers[1].bias.register_hook(lambda g: 3 * g),
    "another forward": lambda model, guide: setattr(model.layers[1], "forward", lambda x: x[..., :2] * 2),
    "a parametrisation": lambda model, guide: register_parametrization(model.layers[1], "weight", Doubled()),
    "another class": lambda model, guide: setattr(model.layers[0][1], "__class__", nn.Sigmoid),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_step_follows_what_a_program_is_made_of(change):
    model, guide, batch = setting()
    objective = mm.objectives.elbo(mm.estimators.IWAE(2))
    step = mm.stage(objective, model, guide, batch, backend=None)
    before = step(batch).clone()
    CHANGES[change](model, guide)
    parameters = problem_from_run(prepare_objective(objective), model, guide, batch).parameters
    torch.manual_seed(4)
    staged = step(batch), gradients(parameters)
    assert step.reasons == [] and not torch.equal(staged[0], before)
    assert_same(staged, eager(objective, model, guide, batch, parameters, 4))


def test_a_step_follows_a_network_that_a_function_refers_to():
    model, replace, _ = of_functions()
    _, guide, batch = setting()
    objective = mm.objectives.elbo()
    step = mm.stage(objective, model, guide, batch, backend=None)
    step(batch)
    replace()
    parameters = problem_from_run(prepare_objective(objective), model, guide, batch).parameters
    torch.manual_seed(4)
    staged = step(batch), gradients(parameters)
    assert_same(staged, eager(objective, model, guide, batch, parameters, 4))


def test_a_hook_of_all_modules_is_noticed():
    model, guide, _ = setting()
    snapshot = ProgramSnapshot({"model": model, "guide": guide})
    handle = nn.modules.module.register_module_forward_hook(doubled)
    try:
        assert snapshot.changed()
    finally:
        handle.remove()
    assert not snapshot.changed()


def test_steps_evaluations_and_modes_are_no_change():
    """Or every one of them would be followed by a trace."""
    model, guide, batch = setting()
    optimizer = torch.optim.Adam([*model.parameters(), *guide.parameters()])
    step = mm.stage(mm.objectives.elbo(), model, guide, batch, optimizer, backend=None)
    snapshot = ProgramSnapshot({"model": model, "guide": guide})
    step(batch)
    mm.log_marginal(model, guide, batch, num_particles=10)
    model.eval(), model.train()
    model.load_state_dict(model.state_dict())
    assert not snapshot.changed()


@pytest.mark.parametrize("change", ["a module in a list", "a module of the guide", "a parameter"])
def test_a_new_parameter_that_the_optimiser_lacks_is_named(change):
    model, guide, batch = setting()
    optimizer = torch.optim.SGD([*model.parameters(), *guide.parameters()], 0.1)
    step = mm.stage(mm.objectives.elbo(), model, guide, batch, optimizer, backend=None)
    step(batch)
    CHANGES[change](model, guide)
    with pytest.raises(ValueError, match=r"the optimiser does not have (model\.layers\.1|guide)\..*add_param_group"):
        step(batch)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    new = [p for p in (*model.parameters(), *guide.parameters()) if id(p) not in known]
    optimizer.add_param_group({"params": new})
    before = [p.detach().clone() for p in new]
    step(batch)
    assert not any(map(torch.equal, before, new))


def test_replaced_parameters_that_the_optimiser_never_had_stay_untrained():
    """Whoever trains the guide alone may replace a module that has no parameters."""
    model, guide, batch = setting()
    step = mm.stage(mm.objectives.elbo(), model, guide, batch, torch.optim.SGD(guide.parameters(), 0.1), backend=None)
    step(batch)
    CHANGES["a module deep inside"](model, guide)
    before = [p.detach().clone() for p in model.parameters()]
    step(batch)
    assert all(map(torch.equal, before, model.parameters()))
