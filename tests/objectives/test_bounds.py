"""What objectives say of themselves, and what they must not say."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, ReweightedWakeSleep, Trace_ELBO, TraceTailAdaptive_ELBO, TraceTMC_ELBO

import pyro_mm as mm
from pyro_mm.objectives import ALL, EACH, EVERY, OTHERS, PRIOR, Objective, Term
from tests.support.linear_gaussian import encoders, oracle

tables, E = mm.objectives, mm.estimators
NAMES = ("image", "label")


@pytest.mark.parametrize(
    ("objective", "text"),
    [
        (tables.elbo(), "lower bound on log p(image, label)"),
        (tables.beta_vae(2.0), "lower bound on log p(image, label)"),
        (tables.beta_vae(0.5), "surrogate: not a bound"),
        (tables.beta_vae(2.0, E.IWAE(1)), "lower bound on log p(image, label)"),
        (tables.beta_vae(2.0, E.IWAE(5)), "surrogate: not a bound"),
        (tables.beta_vae(2.0, E.DReG(5)), "surrogate: not a bound"),
        (tables.beta_vae(2.0, E.StickTheLanding(5)), "lower bound on log p(image, label)"),
        (tables.beta_vae(2.0, Trace_ELBO(num_particles=5)), "lower bound on log p(image, label)"),
        (tables.jmvae_kl(0.1, E.IWAE(5)), "lower bound on log p(image, label)"),
        (tables.elbo(E.Renyi(-1.0)), "surrogate: not a bound"),
        (tables.elbo(E.Renyi(0.5)), "lower bound on log p(image, label)"),
        (tables.elbo(RenyiELBO(alpha=-0.5, num_particles=2)), "surrogate: not a bound"),
        (tables.elbo(kl=tables.warm_up(100)), "lower bound on log p(image, label)"),
        (tables.mvae(), "lower bound on log p(image, label) + log p(image) + log p(label)"),
        (tables.mvae(likelihood={"label": 50.0}), "surrogate: not a bound"),
        (tables.telbo(), "lower bound on log p(image, label) + log p(image) + log p(label)"),
        (tables.unimodal_mean(), "lower bound on log p(image, label)"),
        (tables.subset_mean(), "lower bound on log p(image, label)"),
        (tables.subset_mean(2), "lower bound on log p(image, label)"),
        (tables.mmvae(1, looser=False), "lower bound on log p(image, label)"),
        (tables.beta_vae(2.0, E.IWAE(1, stratified="inside")), "surrogate: not a bound"),
        (
            tables.mvtcae(1.0),
            "lower bound on 0.5 log p(label | image) + 0.5 log p(image | label) only where q(z | x_C) is"
            " the exact posterior",
        ),
        (tables.mmjsd(), "surrogate: not a bound"),
        (Objective([Term(ALL, ALL), Term(ALL, (), EACH, kl=-1.0)]), "surrogate: not a bound"),
        (Objective([Term("image", ALL, "image")]), "surrogate: not a bound"),
        (Objective([Term(ALL, "image", NAMES)]), "surrogate: not a bound"),
        (Objective([Term(ALL, EVERY, "label")]), "surrogate: not a bound"),
        (Objective([Term(EVERY, ALL)]), "lower bound on 3 log p(image, label)"),
        (Objective([Term(EVERY, ALL, average=True)]), "lower bound on log p(image, label)"),
        (Objective([Term(EACH, ALL)]), "lower bound on 2 log p(image, label)"),
        (Objective([Term(ALL, EVERY)]), "lower bound on log p(image) + log p(label) + log p(image, label)"),
        (Objective([Term(ALL, OTHERS)]), "lower bound on log p(label) + log p(image)"),
        (tables.elbo(TraceTMC_ELBO(), kl=2.0), "surrogate: not a bound"),
        (tables.elbo(TraceTMC_ELBO()), "lower bound on log p(image, label)"),
        (tables.elbo(TraceTailAdaptive_ELBO()), "surrogate: not a bound"),
        (tables.elbo(ReweightedWakeSleep()), "surrogate: not a bound"),
        (tables.elbo(RenyiELBO(alpha=0.0, num_particles=2)), "lower bound on log p(image, label)"),
        (tables.elbo(E.IWAE(5, stratified="outside")), "lower bound on log p(image, label)"),
        (tables.beta_vae(2.0, E.IWAE(5, stratified="outside")), "surrogate: not a bound"),
        (tables.beta_vae(2.0, E.IWAE(1, stratified="outside")), "lower bound on log p(image, label)"),
        (Objective([Term(ALL, ALL), Term(ALL, ALL, likelihood=0.0, kl=2.0)], E.IWAE(5)), "surrogate: not a bound"),
        (Objective([Term(ALL, ALL), Term(ALL, ALL, likelihood=0.0, kl=-2.0)]), "surrogate: not a bound"),
        (Objective([Term(ALL, ALL, likelihood=-1.0, kl=-1.0)]), "surrogate: not a bound"),
        (
            Objective([Term(ALL, ALL), Term(ALL, ALL, likelihood=0.0, kl=0.5)], E.IWAE(5)),
            "lower bound on log p(image, label)",
        ),
        (
            Objective([Term("label", "label", ())]),
            "lower bound on log p(label) only where q(z | x_C) is the exact posterior",
        ),
        (
            Objective([Term("image", "image"), Term(ALL, "label", "image")]),
            "lower bound on log p(image, label) only where q(z | x_C) is the exact posterior",
        ),
    ],
)
def test_a_table_states_what_it_bounds(objective, text):
    assert str(objective.bounds(NAMES)) == text


LINEAR = [E.AnalyticKL(2), E.StickTheLanding(2), E.IWAE(1), Trace_ELBO()]
LOGARITHMS = [E.IWAE(2), E.DReG(2), E.Renyi(0.5, 2), RenyiELBO(alpha=0.5)]


@pytest.mark.parametrize("estimator", [*LINEAR, *LOGARITHMS], ids=lambda e: type(e).__name__)
def test_a_weight_for_each_modality_is_inside_of_the_logarithm(estimator):
    """Where there is a logarithm of a mean of weights, no weight but 1 leaves a mapping a bound."""
    linear = estimator in LINEAR
    for weight, bound in ((1.0, True), (2.0, linear)):
        weights = {"likelihood": {"image": weight, "label": weight}, "kl": weight}
        both, one = Objective([Term(ALL, ALL, **weights)], estimator), tables.mvae(0, estimator, **weights)
        for objective in (both, one):
            assert objective.bounds(NAMES).kind == ("lower bound" if bound else "surrogate"), weight
    # only the weights of what is decoded count
    image = Objective([Term(ALL, "image", likelihood={"image": 2.0, "label": 7.0}, kl=2.0)], estimator)
    assert str(image.bounds(NAMES)) == ("lower bound on 2 log p(image)" if linear else "surrogate: not a bound")
    assert image.target == "known with the modalities"


def test_without_names_a_sum_is_told_by_its_symbol():
    each = {
        Term(EACH, ALL): "sum_m log p(x)",
        Term(EVERY, ALL): "sum_S log p(x)",
        Term(EVERY, ALL, average=True): "log p(x)",
        Term(EACH, EACH, average=True): "mean_m log p(x_m)",
        Term(EVERY, EVERY, likelihood=2.0, kl=2.0): "2 sum_S log p(x_S)",
        Term(PRIOR, ("a", "b")): "log p(a, b)",
    }
    for term, text in each.items():
        assert Objective([term]).target == f"lower bound on {text}", term


def test_a_weight_that_never_settles_makes_a_surrogate():
    schedule = [0.0, 0.5, 1.0]
    for forever in (lambda step: 1.0 + step % 2, lambda step: schedule[step], lambda step: 1.0 + math.exp(step)):
        for weights in ({"kl": forever}, {"likelihood": forever, "kl": 9.0}, {"likelihood": {"image": forever}}):
            assert Objective([Term(ALL, ALL, **weights)]).bounds(NAMES).kind == "surrogate"
    decaying = Objective([Term(ALL, ALL, kl=lambda step: 1 + 1 / (1 + step))])
    assert str(decaying.bounds(NAMES)) == "lower bound on log p(image, label)"


@pytest.mark.parametrize(
    ("terms", "present", "text"),
    [
        (tables.dmvae().terms, "ab", "3 log p(a, b)"),
        (tables.mvae().terms, "a", "2 log p(a)"),
        (tables.vaevae().terms, "a", "log p(a)"),
        (tables.unimodal_mean().terms, "ac", "log p(a, c)"),
        ([Term(EVERY, ALL)], "ac", "6 log p(a, c)"),  # of seven sets one has nothing of the row
        ([Term("a", ALL), Term("b", ALL)], "ac", "log p(a, c)"),
        ([Term(EACH, "a", average=True)], "ac", "log p(a)"),
        ([Term(EACH, EACH, average=True)], "ac", "0.5 log p(a) + 0.5 log p(c)"),
        ([Term(EACH, ALL), Term(ALL, OTHERS, EACH, average=True)], "b", "log p(b)"),
    ],
)
def test_a_row_that_lacks_modalities_has_a_target_of_its_own(terms, present, text):
    assert str(Objective(terms).bounds("abc", present)) == f"lower bound on {text}"


def test_more_sets_than_can_be_gone_through_are_left_a_symbol():
    names = [f"m{i}" for i in range(17)]
    assert str(Objective([Term(EVERY, ALL)]).bounds(names)) == "lower bound on sum_S log p(x)"


@pytest.mark.parametrize("objective", [tables.vaevae(), tables.masked()], ids=["vaevae", "masked"])
def test_conditional_terms_bound_only_at_the_exact_posterior(objective):
    target = objective.bounds(NAMES)
    assert target.kind == "approximate" and target.text == "log p(image, label)"


def test_weights_of_the_target_are_those_of_the_table():
    target = tables.mvtcae(0.6).bounds(NAMES)
    assert target.log_evidence == pytest.approx({frozenset(NAMES): 0.4})
    image, label = frozenset({"image"}), frozenset({"label"})
    assert target.conditional == pytest.approx({(label, image): 0.3, (image, label): 0.3})
    assert target.kind == "approximate"


def test_a_target_says_whether_it_has_random_sets_in_it():
    for objective, random in ((tables.mvae(1), True), (tables.mvae(0), False), (tables.masked(), False)):
        assert objective.bounds(NAMES).random == random, objective
        assert set(objective.bounds(NAMES).log_evidence) >= {frozenset(NAMES)}


def test_a_kl_weight_inside_of_the_logarithm_does_exceed_the_evidence(double):
    """Why beta > 1 is no bound under IWAE: the finding that the rule stands on."""
    model = oracle(2)
    row = mm.Batch({n: offset.detach()[None] for n, offset in model.offsets.items()})  # whose posterior has mean 0
    wide = mm.Guide(z=lambda batch: dist.Normal(torch.zeros(batch.size, 3), 3.0).to_event(1))
    # p / q is 27 at the mode, so the mean of p(x | z) (p / q)^2 is many times p(x)
    assert -tables.beta_vae(2.0, E.IWAE(20_000)).loss(model, wide, row) > model.log_prob(row).item() + 1


def test_target_before_and_after_the_first_batch():
    objective = tables.mvae()
    assert objective.target == "lower bound on log p(x) + sum_m log p(x_m)"
    model = oracle(2)
    objective.loss(model, mm.Guide(z=mm.posteriors.ProductOfExperts(encoders(model))), model.sample(2))
    assert objective.target == "lower bound on log p(x0, x1) + log p(x0) + log p(x1)"
    assert math.isfinite(sum(v.item() for v in objective.by_term.values()))


def test_a_prior_with_trainable_tensors_is_refused():
    loc = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match="pass a module whose forward builds"):
        mm.models.SharedLatent(dist.Normal(loc, 1.0).to_event(1), {"x": mm.conditionals.Normal(mm.nn.MLP(2, 4))})
