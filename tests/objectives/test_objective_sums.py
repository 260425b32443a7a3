"""Sums and multiples of objectives: values, passes, bounds, text, and every use that an objective has."""

import itertools

import numpy as np
import pytest
import torch
from pyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam

import pyro_mm as mm
from pyro_mm.diagnostics.gradient_noise import gradient_noise
from pyro_mm.objectives import ALL, EACH, HSIC, MMD, PRIOR, Objective, SlicedWasserstein, Term
from tests.support.compiled import agree
from tests.support.contract import ESTIMATORS, data
from tests.support.contract import pair as contract_pair

E, tables = mm.estimators, mm.objectives


def evaluated(objective, model, guide, batch, seed=0, step=0):
    torch.manual_seed(seed)
    return objective.evaluate(model, guide, batch, step=step)


@pytest.fixture
def things():
    model, guide = contract_pair("private", "product")
    return model, guide, data(9)


class Runs:
    """A guide that counts its runs with the number of terms."""

    def __init__(self, guide):
        self.guide = guide
        self.count = 0

    def __call__(self, batch):
        self.count += 1
        self.guide(batch)


# -- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_multiple_of_an_objective_is_that_multiple(name, things):
    model, guide, batch = things
    objective = tables.mvae(estimator=ESTIMATORS[name]())
    parameters = [*model.parameters(), *guide.parameters()]

    def losses(objective):
        for p in parameters:
            p.grad = None
        torch.manual_seed(0)
        loss = objective.evaluate_with_gradient(model, guide, batch, step=0).total
        return loss, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]

    one, gradient = losses(objective)
    for multiple in (0.25 * objective, objective * np.float64(0.25), torch.tensor(0.25) * objective):
        other, other_gradient = losses(multiple)
        torch.testing.assert_close(other, 0.25 * one, rtol=1e-5, atol=1e-5)
        for g, h in zip(gradient, other_gradient, strict=True):
            torch.testing.assert_close(h, 0.25 * g, rtol=1e-4, atol=1e-4)


def test_a_multiple_of_a_weighted_bound_stays_outside_of_its_logarithm(things):
    model, guide, batch = things
    weighted = Objective([Term(ALL, ALL, likelihood={"c": 50.0}, kl=2.0)], E.IWAE(5))
    one = evaluated(weighted, model, guide, batch).total
    torch.testing.assert_close(evaluated(3 * weighted, model, guide, batch).total, 3 * one)


def test_a_sum_of_two_estimators_is_the_sum_of_their_values(things):
    model, guide, batch = things
    first, second = tables.elbo(E.IWAE(4)), 0.5 * tables.jmvae_kl(0.1, Trace_ELBO())
    total = first + second
    loss = evaluated(total, model, guide, batch)
    torch.manual_seed(0)
    one = first.evaluate(model, guide, batch, step=0)
    other = second.evaluate(model, guide, batch, step=0)
    torch.testing.assert_close(loss.total, one.total + other.total)
    torch.testing.assert_close(loss.by_term["(*, *, P)"], one.by_term["(*, *, P)"])

    twice = tables.elbo(E.IWAE(4)) + tables.elbo()
    labels = list(evaluated(twice, model, guide, batch).by_term)
    assert labels == ["(*, *, P) IWAE(num_particles=4)", "(*, *, P) AnalyticKL(num_particles=1)"]


def test_equal_estimators_share_a_pass_and_others_do_not(things):
    model, guide, batch = things

    def runs(objective):
        counting = Runs(guide)
        objective.evaluate(model, counting, batch, step=0)  # which looks at the structure first
        counting.count = 0
        objective.evaluate(model, counting, batch, step=0)
        return counting.count

    elbo, penalty = tables.elbo(), Objective([Term(ALL, (), PRIOR)])
    assert type(elbo + penalty) is type(elbo + MMD("z")) is type(MMD("z") + elbo) is Objective
    assert runs(elbo + penalty + MMD("z") + 0.1 * HSIC("z", "w_a")) == runs(elbo) == 1
    assert runs(tables.elbo(E.IWAE(3)) + MMD("z")) == 1
    assert runs(tables.elbo(E.DReG(3)) + MMD("z")) == 1
    assert runs(tables.elbo(E.IWAE(3)) + tables.elbo(E.IWAE(3)) + elbo) == 2
    assert runs(tables.elbo(Trace_ELBO()) + MMD("z")) == 2  # with no particles of ours
    model, guide = contract_pair("shared", "mixture")
    assert runs(tables.elbo(E.IWAE(3, stratified="inside")) + MMD("z")) == 2


def test_encoders_run_once_for_all_parts(things):
    model, guide, batch = things
    calls = []
    encoder = guide.posteriors["z"].experts["b"].net
    hook = encoder.register_forward_hook(lambda *_: calls.append(1))
    total = tables.elbo() + tables.elbo(E.IWAE(3)) + 2 * tables.elbo(E.DReG(2)) + MMD("z")
    total.evaluate(model, guide, batch, step=0)
    calls.clear()
    total.evaluate(model, guide, batch, step=0)
    assert len(calls) == 1
    hook.remove()


def test_tables_that_draw_sets_keep_their_own_draws(things):
    model, guide, batch = things
    total = tables.masked() + tables.subset_mean(2)
    loss = evaluated(total, model, guide, batch)
    assert len(total.parts) == 2 and loss.total.isfinite()


def test_sums_of_functions_of_the_modalities(things):
    model, guide, batch = things
    total = tables.mmjsd() + tables.elbo() + 2 * MMD("z")
    assert type(total) is Objective and "(terms depend on the modalities)" in str(total)
    loss = evaluated(total, model, guide, batch)
    assert "MMD(z | *; p(z))" in loss.by_term and loss.total.isfinite()
    torch.testing.assert_close(loss.total, -sum(loss.by_term.values()), check_dtype=False)


def test_the_builtin_sum_and_zero():
    one = tables.elbo()
    assert one + 0 is one and 0 + one is one
    assert len(sum([tables.elbo(), MMD("z"), 0.5 * tables.elbo(E.IWAE(2))]).parts) == 2
    assert len((Trace_ELBO() + MMD("z")).terms) == 2
    assert (E.IWAE(5) + MMD("z")).estimator.num_particles == 5


# -- weights of the step ----------------------------------------------------------------------------------------------


def test_a_weight_may_be_a_function_of_the_step(things):
    model, guide, batch = things
    ramp = tables.warm_up(10)
    for objective in (MMD("z"), tables.elbo(E.IWAE(3)), tables.elbo(kl=tables.warm_up(4)), tables.mvtcae()):
        for multiple in (ramp * objective, 1.0 * (ramp * objective), ramp * (0.5 * objective) * 2):
            whole = evaluated(objective, model, guide, batch, step=5).total
            torch.testing.assert_close(evaluated(multiple, model, guide, batch, step=5).total, 0.5 * whole)
    twice = ramp * (ramp * MMD("z"))
    torch.testing.assert_close(
        4 * evaluated(twice, model, guide, batch, step=5).total, evaluated(MMD("z"), model, guide, batch).total
    )
    assert "weight warm_up(step)" in str(ramp * MMD("z"))
    assert "weight 0.5 warm_up(step)" in str(0.5 * (ramp * MMD("z")))
    with pytest.raises(ValueError, match="expected the weight of an objective at step 0 >= 0, got -1"):
        evaluated((lambda step: step - 1.0) * MMD("z"), model, guide, batch)


# -- bounds and text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "target"),
    [
        (lambda: tables.elbo() + tables.elbo(E.IWAE(5)), "lower bound on 2 log p(x)"),
        (lambda: 0.5 * tables.elbo(E.IWAE(5)), "lower bound on 0.5 log p(x)"),
        (lambda: tables.elbo() + 3 * Objective([Term(EACH, EACH)], E.IWAE(2)),
         "lower bound on log p(x) + 3 sum_m log p(x_m)"),
        (lambda: tables.elbo(E.IWAE(3)) + 2 * Objective([Term(ALL, (), EACH)]), "lower bound on log p(x)"),
        (lambda: 0 * tables.elbo() + tables.elbo(E.DReG(2)), "lower bound on log p(x)"),
        (lambda: tables.warm_up(10) * tables.elbo(), "lower bound on log p(x)"),
        (lambda: tables.elbo(E.IWAE(5), kl=2.0) + tables.elbo(), "surrogate: not a bound"),
        (lambda: tables.elbo(kl=2.0) + tables.elbo(E.IWAE(5)), "lower bound on 2 log p(x)"),
        (lambda: tables.elbo() + tables.elbo(E.Renyi(-1.0, 3)), "surrogate: not a bound"),
        (lambda: tables.elbo() + MMD("z"), "surrogate: not a bound"),
        (lambda: tables.elbo(E.IWAE(5)) + HSIC("z", "w"), "surrogate: not a bound"),
        (lambda: MMD("z"), "surrogate: not a bound"),
        (lambda: (lambda step: 1.0 + step % 2) * tables.elbo(), "surrogate: not a bound"),
    ],
)  # fmt: skip
def test_a_sum_knows_what_it_bounds(objective, target):
    assert objective().target == target


def test_a_term_with_a_negative_weight_bounds_nothing(things):
    model, guide, batch = things
    plain, minus = Objective([Term(ALL, ALL)], E.IWAE(3)), Objective([Term(ALL, ALL, weight=-2.0)], E.IWAE(3))
    assert minus.bounds().kind == "surrogate"
    torch.testing.assert_close(
        evaluated(minus, model, guide, batch).total, -2 * evaluated(plain, model, guide, batch).total
    )


def test_the_text_shows_every_part():
    text = str(tables.elbo() + 0.5 * tables.elbo(E.IWAE(5)) + MMD("z"))
    assert text.splitlines() == [
        "Sum of 2 objectives; surrogate: not a bound",
        "Objective, AnalyticKL(num_particles=1); surrogate: not a bound",
        "  (encode, decode, given)",
        "  (*, *, P)",
        "  MMD(z | *; p(z)) gaussian kernel, median bandwidth, U-statistic",
        "Objective, IWAE(num_particles=5); lower bound on 0.5 log p(x)",
        "  (encode, decode, given)",
        "  (*, *, P) weight 0.5",
    ]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tables.elbo() + 1, "expected an objective of pyro_mm.objectives to add, or a pyro.infer.ELBO, got 1"),
        (lambda: 1 + tables.elbo(), "expected an objective of pyro_mm.objectives to add"),
        (lambda: tables.elbo() + (lambda m, g, b, step: 0), "objective of one's own has no table"),
        (lambda: -0.5 * tables.elbo(), "expected the weight of an objective >= 0, got -0.5"),
        (lambda: float("nan") * tables.elbo(), "to be a finite number, got nan"),
        (lambda: tables.elbo() * tables.elbo(), "a weight is a number or a function of the step"),
        (lambda: "2" * tables.elbo(), "expected the weight of an objective to be a number"),
        (lambda: torch.ones((), requires_grad=True) * MMD("z"), "weights are not trained"),
        (lambda: Term(ALL, ALL, weight="1"), "expected weight to be a number"),
        (lambda: (tables.elbo() + tables.elbo(E.IWAE(3))).subsampled(1), "takes the logarithm of a mean of weights"),
    ],
)  # fmt: skip
def test_a_sum_or_multiple_of_something_else_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_pyros_renyi_is_refused_a_weight_which_it_takes_into_its_logarithm(things):
    model, guide, batch = things
    for terms in ([Term(ALL, ALL, weight=0.5)], [Term(ALL, ALL, likelihood={"a": 2.0}, weight=0.5)]):
        objective = Objective(terms, RenyiELBO(num_particles=2))
        with pytest.raises(ValueError, match="or a weight, into its logarithm"):
            objective.evaluate_with_gradient(model, guide, batch, step=0)


# -- in use -----------------------------------------------------------------------------------------------------------

SUMS = {
    "wae": lambda: tables.elbo(kl=0) + 10 * MMD("z"),
    "private": lambda: tables.elbo(E.DReG(2)) + SlicedWasserstein("w_a", projections=4) + HSIC("z", "w_c"),
    "two": lambda: tables.warm_up(2) * tables.elbo(E.IWAE(2)) + tables.elbo(kl=tables.warm_up(3))
    + tables.warm_up(4) * MMD("z", "a", "imq", (1, 2), reference="b") + MMD("z", unbiased=False),
    "trace": lambda: 0.5 * tables.elbo(Trace_ELBO()) + MMD("z"),
}  # fmt: skip


@pytest.mark.parametrize("name", ["private", "two"])
def test_a_sum_is_compiled_to_the_same_numbers(name):
    model, guide = contract_pair("private", "product")
    torch.manual_seed(5)
    batches = [data(8), data(6).padded(8)]
    agree(SUMS[name](), model, guide, batches)


@pytest.mark.parametrize("name", ["two"])
def test_a_training_that_is_resumed_is_the_same(name, tmp_path):
    def fit(epochs, path=None, **options):
        torch.manual_seed(0)
        model, guide = contract_pair("private", "product")
        torch.manual_seed(2)
        batch = data(20)
        optimizer = lambda ps: torch.optim.Adam(ps, 1e-3)  # noqa: E731
        history = mm.fit(model, guide, SUMS[name](), batch, epochs=epochs, batch_size=10, seed=3, progress=False,
                         optimizer=optimizer, checkpoint=path, **options)  # fmt: skip
        return history, [p.detach().clone() for p in [*model.parameters(), *guide.parameters()]]

    history, whole = fit(2)
    assert "MMD(z | a; z | b)" in history.columns
    fit(1, tmp_path / "state.pt")
    resumed, parameters = fit(2, tmp_path / "state.pt")
    assert resumed.columns["loss"] == history.columns["loss"]
    assert all(torch.equal(p, q) for p, q in zip(whole, parameters, strict=True))


@pytest.mark.parametrize("name", SUMS)
def test_a_sum_serves_svi_check_and_gradient_noise(name, things):
    model, guide, batch = things
    objective = SUMS[name]()
    svi = SVI(model, guide, Adam({"lr": 1e-3}), objective)
    assert all(np.isfinite(svi.step(batch)) for _ in range(2)) and objective.steps == 2 and objective.by_term
    found = mm.check(model, guide, objective, batch, num_particles=20, repeats=2)
    assert not found.errors and objective.estimator_text in str(found)
    assert set(found.value.by_term) >= {label for label in objective.by_term if label.startswith("MMD")}
    noise = gradient_noise(model, guide, objective, batch, repeats=2)
    assert noise.groups and not noise.nonfinite


@pytest.mark.parametrize("estimator", [TraceGraph_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO])
@pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")
def test_a_statistic_beside_pyros_own_estimators_trains(estimator, things):
    model, guide, batch = things
    for objective in (estimator() + MMD("z"), tables.elbo(estimator()) + tables.elbo(E.IWAE(2)) + MMD("z")):
        loss = objective.evaluate_with_gradient(model, guide, batch, step=0)
        assert loss.total.isfinite() and loss.by_term["MMD(z | *; p(z))"].isfinite()
        assert all(p.grad is not None for p in guide.parameters())


def test_modalities_are_subsampled_beside_a_statistic(things):
    model, guide, batch = things
    for objective in (tables.elbo() + MMD("z"), tables.elbo() + tables.elbo(E.StickTheLanding()) + MMD("z")):
        some = objective.subsampled(2)
        assert evaluated(some, model, guide, batch).total.isfinite()
        assert type(some.decoding_all()) is type(objective)
        assert some.untraceable is not None and objective.untraceable is None
        mean = torch.stack(
            [evaluated(some, model, guide, batch, seed).by_term["MMD(z | *; p(z))"] for seed in range(3)]
        )
        assert mean.isfinite().all()


def test_any_order_of_three_has_the_same_parts(things):
    model, guide, batch = things
    three = [tables.elbo(), tables.elbo(E.IWAE(2)), MMD("z")]
    for order in itertools.permutations(three):
        total = sum(order)
        assert len(total.parts) == 2
        assert len(evaluated(total, model, guide, batch).by_term) == 3
