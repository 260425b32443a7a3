"""Anything that trains has one interface; an evaluation moves nothing of an objective."""

import pyro
import pyro.infer
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyro_mm as mm
from pyro_mm.scoring.prepare_objective import prepare_objective
from pyro_mm.scoring.training_objective import PreparedObjective
from tests.support.contract import data, pair

tables, E = mm.objectives, mm.estimators


def squared(model, guide, batch, *, step):
    """The squared error of a linear readout, with a weight of the step."""
    trace = pyro.poutine.trace(guide).get_trace(batch)
    z = trace.nodes["z"]["value"]
    error = (z.sum(-1) - batch["b"].sum(-1)).square().sum()
    return mm.Loss(error * (1 + step), {"error": -error})


class Squared:
    def __init__(self):
        self.width = 2.0

    def evaluate(self, model, guide, batch, *, step):
        return squared(model, guide, batch, step=step)


class SquaredModule(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, model, guide, batch, *, step):
        return squared(model, guide, batch, step=step).total * self.log_scale.exp()


def state_of(objective):
    return {name: dict(x) if isinstance(x, dict) else x for name, x in vars(objective).items()}


def gradients(model, guide):
    found = [None if p.grad is None else p.grad.clone() for m in (model, guide) for p in m.parameters()]
    model.zero_grad()
    guide.zero_grad()
    return found


def assert_equal(one, other):
    for x, y in zip(one, other, strict=True):
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x, y)


@pytest.mark.parametrize(
    "make", [tables.mvae, lambda: tables.mvae(1, Trace_ELBO()), lambda: tables.elbo().subsampled(2)]
)
def test_an_evaluation_moves_nothing_of_an_objective(make):
    objective = make()
    (model, guide), batch = pair("shared", "product"), data()
    objective.steps, objective.by_term = 5, {"mine": torch.ones(())}
    before = state_of(objective)
    objective.evaluate(model, guide, batch, step=3)
    objective.evaluate_with_gradient(model, guide, batch, step=4)
    objective.step_weights(batch.names, 7)
    with torch.no_grad():
        objective.evaluate(model, guide, batch, step=3)
    assert {n: x for n, x in state_of(objective).items() if n != "_known"} == {
        n: x for n, x in before.items() if n != "_known"
    }


def test_the_step_given_is_that_of_the_weights():
    objective = tables.elbo(kl=tables.warm_up(10))
    (model, guide), batch = pair("shared", "product"), data()

    def loss(step):
        torch.manual_seed(0)
        return objective.evaluate(model, guide, batch, step=step)

    none, half, whole = loss(0), loss(5), loss(10)
    torch.testing.assert_close(2 * half.total, none.total + whole.total)
    assert loss(torch.tensor(5)).total == half.total and whole.total != none.total
    assert objective.steps == 0 and objective.by_term == {}
    torch.testing.assert_close(-sum(whole.by_term.values()), whole.total)
    assert all(not term.requires_grad for term in whole.by_term.values())


def test_used_as_an_elbo_an_objective_counts_for_itself():
    objective = tables.elbo(kl=tables.warm_up(10))
    (model, guide), batch = pair("shared", "product"), data()
    for step in range(3):
        torch.manual_seed(step)
        loss = objective.differentiable_loss(model, guide, batch)
        torch.manual_seed(step)
        assert loss == objective.evaluate(model, guide, batch, step=step).total
        assert objective.steps == step + 1 and list(objective.by_term) == ["(*, *, P)"]
    objective.loss(model, guide, batch)
    assert objective.steps == 3
    objective.loss_and_grads(model, guide, batch)
    assert objective.steps == 4


@pytest.mark.parametrize(
    "objective",
    [tables.elbo(), tables.elbo(TraceGraph_ELBO()), E.IWAE(2), Trace_ELBO(), TraceMeanField_ELBO(), TraceGraph_ELBO(),
     Squared(), squared, SquaredModule()],
    ids=lambda x: getattr(x, "__name__", type(x).__name__),
)  # fmt: skip
def test_the_loss_with_gradient_is_that_without_and_its_gradient(objective):
    prepared = prepare_objective(objective)
    assert isinstance(prepared, PreparedObjective) and prepare_objective(prepared) is prepared
    (model, guide), batch = pair("shared", "product"), data()
    torch.manual_seed(0)
    loss = prepared.evaluate_with_gradient(model, guide, batch, step=2)
    found = gradients(model, guide)
    assert not loss.total.requires_grad and any(g is not None and g.any() for g in found)
    with torch.no_grad():
        torch.manual_seed(0)
        assert prepared.evaluate(model, guide, batch, step=2).total.item() == pytest.approx(loss.total.item(), rel=1e-5)
    if not prepared.differentiable:
        with pytest.raises(TypeError, match=r"takes its gradient itself|no differentiable loss"):
            prepared.evaluate(model, guide, batch, step=2)
        return
    torch.manual_seed(0)
    prepared.evaluate(model, guide, batch, step=2).total.backward()
    assert_equal(gradients(model, guide), found)


@pytest.mark.parametrize("make", [Trace_ELBO, TraceGraph_ELBO, lambda: Trace_ELBO(num_particles=2)])
def test_pyros_elbos_have_the_gradient_that_they_have_without_us(make):
    (model, guide), batch = pair("shared", "product"), data()
    torch.manual_seed(0)
    loss = prepare_objective(make()).evaluate_with_gradient(model, guide, batch, step=0).total.item()
    found = gradients(model, guide)
    torch.manual_seed(0)

    def announced(batch):
        for module in (model, guide):
            pyro.module(type(module).__name__, module)
        guide(batch)

    assert make().loss_and_grads(model, announced, batch) == pytest.approx(loss, rel=1e-5)
    for x, y in zip(gradients(model, guide), found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_a_prepared_objective_knows_its_modules_and_its_layout():
    batch = data()
    module = SquaredModule()
    assert prepare_objective(module).modules == [module] and prepare_objective(Squared()).modules == []
    assert tuple(prepare_objective(tables.mvae()).layout(batch)) == (True, True)
    assert tuple(prepare_objective(E.IWAE(3)).layout(batch)) == (True, False)
    assert tuple(prepare_objective(Trace_ELBO(num_particles=3, vectorize_particles=True)).layout(batch)) == (
        True,
        False,
    )
    assert tuple(prepare_objective(squared).layout(batch)) == (False, False)
    assert prepare_objective(tables.elbo()).ignores_padding and prepare_objective(E.DReG()).ignores_padding
    assert not any(prepare_objective(x).ignores_padding for x in (Trace_ELBO(), squared, module))
    assert [prepare_objective(x).estimator_name for x in (tables.elbo(E.IWAE(2)), Trace_ELBO(), squared, module)] == [
        "IWAE", "Trace_ELBO", "squared", "SquaredModule"
    ]  # fmt: skip
    some = tables.elbo().subsampled(2)
    assert some.decoding_all().subsample is None and some.subsample == 2
    assert all(prepare_objective(x).decoding_all() is prepare_objective(x) for x in (tables.elbo(), E.IWAE(2)))


def test_a_subclass_of_an_estimator_may_go_on_from_its_loss():
    class Half(E.AnalyticKL):
        def differentiable_loss(self, model, guide, batch):
            return super().differentiable_loss(model, guide, batch) / 2

    (model, guide), batch = pair("shared", "product"), data()
    losses = []
    for estimator in (E.AnalyticKL(), Half()):
        torch.manual_seed(0)
        losses.append(prepare_objective(estimator).evaluate(model, guide, batch, step=0).total)
        torch.manual_seed(0)
        assert estimator.loss(model, guide, batch) == losses[-1].item()
    assert losses[1] == losses[0] / 2


def test_an_untraceable_objective_gives_its_reason():
    reasons = {
        "drawn in Python": tables.elbo().subsampled(2),
        "TraceEnum_ELBO takes its gradient itself": tables.elbo(TraceEnum_ELBO()),
        "TraceGraph_ELBO takes its gradient itself": TraceGraph_ELBO(),
        "RenyiELBO takes its gradient itself": pyro.infer.RenyiELBO(num_particles=2),
    }
    for text, objective in reasons.items():
        assert text in prepare_objective(objective).untraceable
    for objective in (tables.elbo(), tables.elbo(Trace_ELBO()), Trace_ELBO(), TraceMeanField_ELBO(), E.IWAE(), squared):
        assert prepare_objective(objective).untraceable is None


def test_the_form_of_a_loss_follows_an_objectives_settings():
    for objective, name, value in ((Squared(), "width", 3.0), (E.IWAE(2), "num_particles", 3)):
        prepared = prepare_objective(objective)
        before = prepared.step_weights(("a",), 0)
        assert prepared.step_weights(("a",), 9) == before
        setattr(objective, name, value)
        assert prepared.step_weights(("a",), 0) != before
    module = SquaredModule()
    prepared = prepare_objective(module)
    before = prepared.step_weights(("a",), 0)
    module.eval()
    assert prepared.step_weights(("a",), 0) != before


REFUSED = {
    "a class": (E.IWAE, r"class IWAE: make an instance"),
    "a table not called": (tables.elbo, r"function elbo: call it, elbo\(\)"),
    "a word": ("elbo", r"got 'elbo'.*evaluate\(model, guide, batch, \*, step\)"),
    "nothing": (None, "expected objective"),
    "a function of other arguments": (lambda x: x, "cannot be called|call it"),
    "a module of rows": (torch.nn.Linear(2, 2), "module Linear whose forward cannot be called with"),
    "another evaluate": (type("Other", (), {"evaluate": lambda self, x: x})(), "whose evaluate cannot be called with"),
    "SVI": (pyro.infer.SVI(lambda: None, lambda: None, pyro.optim.Adam({}), Trace_ELBO()), "pass the ELBO"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_preparing_what_is_no_objective_is_refused_in_words(name):
    value, text = REFUSED[name]
    with pytest.raises(TypeError, match=text):
        prepare_objective(value)


WRONG = {
    "nothing": (lambda z: None, TypeError, "got None: is a return missing"),
    "a number": (lambda z: 3.0, TypeError, r"scalar tensor to minimise.* got 3\.0"),
    "a loss of a number": (lambda z: mm.Loss(3.0), TypeError, "scalar tensor"),
    "a loss a row": (lambda z: z.sum(-1), ValueError, r"shape \(6,\): sum it over the rows"),
    "an integer": (lambda z: torch.ones((), dtype=torch.long), TypeError, "torch.int64"),
    "a term per row": (lambda z: mm.Loss(z.sum(), {"x": z.sum(-1)}), ValueError, r"shape \(6,\) for 'x'"),
    "terms in a list": (lambda z: mm.Loss(z.sum(), [z.sum()]), TypeError, "map labels to scalars"),
    "a term in words": (lambda z: mm.Loss(z.sum(), {"x": "much"}), TypeError, "no number"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_result_that_is_no_loss_is_refused_in_words(name):
    value, error, text = WRONG[name]

    def mine(model, guide, batch, *, step):
        return value(pyro.poutine.trace(guide).get_trace(batch).nodes["z"]["value"])

    with pytest.raises(error, match=text):
        prepare_objective(mine).evaluate(*pair("shared", "product"), data(), step=0)


def test_terms_of_a_users_objective_are_tensors_without_gradient():
    def mine(model, guide, batch, *, step):
        z = pyro.poutine.trace(guide).get_trace(batch).nodes["z"]["value"]
        return mm.Loss(z.square().sum(), {"with a graph": z.sum(), "a number": 2})

    loss = prepare_objective(mine).evaluate(*pair("shared", "product"), data(), step=0)
    assert loss.total.requires_grad and not any(x.requires_grad for x in loss.by_term.values())
    assert loss.by_term["a number"] == 2
