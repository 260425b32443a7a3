"""Terms, tables and weights that make no sense are refused in words."""

import copy
import math
import pickle

import pytest
import torch
from pyro.infer import ReweightedWakeSleep, Trace_ELBO, TraceTailAdaptive_ELBO

import pyro_mm as mm
from pyro_mm.estimators import IWAE, AnalyticKL
from pyro_mm.objectives import ALL, EACH, EVERY, OTHERS, PRIOR, Objective, Random, Symbol, Term
from tests.support.linear_gaussian import encoders, oracle

tables = mm.objectives


def nan(step):
    return math.nan


def negative(step):
    return -0.5


@pytest.fixture(scope="module")
def pair():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    model = oracle(2)
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts(encoders(model)))
    yield model, guide, model.sample(3)
    torch.set_default_dtype(before)


NO_TABLE = {
    "a name": lambda: Objective("elbo"),
    "one term": lambda: Objective(Term(ALL, ALL)),
    "an estimator": lambda: Objective(IWAE(2)),
    "no terms": lambda: Objective([ALL]),
    "a class for terms": lambda: Objective(Term),
    "a class for an estimator": lambda: tables.elbo(IWAE),
    "a name for an estimator": lambda: tables.elbo("iwae"),
    "an objective for an estimator": lambda: tables.elbo(tables.elbo()),
    "a function for an estimator": lambda: tables.elbo(tables.elbo),
    "a number for an estimator": lambda: tables.elbo(0.5),
    "vectorize": lambda: Objective([Term(ALL, ALL)], vectorize="no"),
    "subsample": lambda: tables.elbo().subsampled(1.5),
    "None": lambda: Term(ALL, ALL, None),
    "a number": lambda: Term(3, ALL),
    "a symbol among names": lambda: Term(("a", EACH), ALL),
    "a number among names": lambda: Term(("a", 1), ALL),
    "a positional index": lambda: Random(1),
    "an index": lambda: Random(index=0.5),
    "freeze_decoder": lambda: Term(ALL, ALL, freeze_decoder=1),
    "average": lambda: Term(ALL, ALL, average="yes"),
    "a weight in words": lambda: Term(ALL, ALL, kl="warm_up"),
    "a truth for a weight": lambda: Term(ALL, ALL, kl=True),
    "no weight": lambda: Term(ALL, ALL, kl=None),
    "weights in a list": lambda: Term(ALL, ALL, likelihood=[1.0, 2.0]),
    "weights by number": lambda: Term(ALL, ALL, likelihood={0: 1.0}),
    "a weight in words by name": lambda: Term(ALL, ALL, likelihood={"a": "1"}),
    "a function of nothing": lambda: Term(ALL, ALL, kl=lambda: 1.0),
    "a class for a weight": lambda: Term(ALL, ALL, kl=torch.nn.Linear),
    "a trained weight": lambda: Term(ALL, ALL, kl=torch.nn.Parameter(torch.tensor(1.0))),
    "mvae of an estimator": lambda: tables.mvae(IWAE(2)),
    "mvae of half a set": lambda: tables.mvae(0.5),
    "subset_mean of an estimator": lambda: tables.subset_mean(IWAE(2)),
    "mmvae of an estimator": lambda: tables.mmvae(IWAE(2)),
    "mmjsd of an estimator": lambda: tables.mmjsd(IWAE(2)),
    "mvtcae of an estimator": lambda: tables.mvtcae(IWAE(2)),
    "mvtcae of a function": lambda: tables.mvtcae(tables.warm_up(3)),
    "warm_up in words": lambda: tables.warm_up("10"),
}
NO_WEIGHT = {
    "NaN": lambda: Term(ALL, ALL, kl=math.nan),
    "infinity": lambda: Term(ALL, ALL, likelihood=math.inf),
    "infinity by name": lambda: Term(ALL, ALL, likelihood={"a": -math.inf}),
    "elbo": lambda: tables.elbo(kl=-1),
    "beta_vae": lambda: tables.beta_vae(-4.0),
    "jmvae_kl alpha": lambda: tables.jmvae_kl(alpha=-0.1),
    "jmvae_kl kl": lambda: tables.jmvae_kl(kl=-0.1),
    "mvae likelihood": lambda: tables.mvae(likelihood={"b": -1}),
    "mvae kl": lambda: tables.mvae(kl=math.nan),
    "mvae num_subsets": lambda: tables.mvae(-1),
    "telbo": lambda: tables.telbo(likelihood=-1.0),
    "mixture_mean": lambda: tables.mixture_mean(-1.0),
    "mixture_mean likelihood": lambda: tables.mixture_mean(likelihood={"a": -1.0}),
    "dmvae": lambda: tables.dmvae(likelihood={"a": math.nan}),
    "mopoe": lambda: tables.mopoe(kl=-1.0),
    "subset_mean": lambda: tables.subset_mean(kl=-1.0),
    "subset_mean of none": lambda: tables.subset_mean(0),
    "mmjsd above 1": lambda: tables.mmjsd(1.5),
    "mmjsd below 0": lambda: tables.mmjsd(-0.5),
    "mmvm": lambda: tables.mmvm(-1.0),
    "mvtcae alpha": lambda: tables.mvtcae(1.2),
    "mvtcae beta": lambda: tables.mvtcae(beta=-1.0),
    "mmvae": lambda: tables.mmvae(0),
    "warm_up": lambda: tables.warm_up(-3),
    "warm_up to NaN": lambda: tables.warm_up(3, stop=math.nan),
    "both sums": lambda: Term(EVERY, EACH),
    "EVERY with OTHERS": lambda: Term(EVERY, OTHERS),
    "an unknown symbol": lambda: Term(Symbol("all"), ALL),
    "a name twice": lambda: Term(("a", "a"), ALL),
    "a random set of two kinds": lambda: Objective([Term(Random(), ALL), Term(Random(empty=False), ALL)]),
    "no modality to decode": lambda: tables.elbo().subsampled(0),
}


@pytest.mark.parametrize("case", NO_TABLE)
def test_a_table_argument_of_the_wrong_type_is_a_type_error(case):
    with pytest.raises(TypeError, match=r"expected|estimator"):
        NO_TABLE[case]()


@pytest.mark.parametrize("case", NO_WEIGHT)
def test_a_table_argument_out_of_range_is_a_value_error(case):
    with pytest.raises(ValueError, match=r"expected|not over both|share a draw"):
        NO_WEIGHT[case]()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: tables.elbo(kl=nan), r"kl at step 0 .*got nan"),
        (lambda: tables.elbo(kl=negative), r"kl at step 0 .*got -0.5"),
        (lambda: tables.mvae(likelihood={"x0": negative}), r"likelihood\['x0'\] at step 0 .* got -0.5"),
        (lambda: tables.mvtcae(beta=negative), r"beta at step 0"),
        (lambda: tables.subset_mean(2, kl=negative), r"kl at step 0"),
        (lambda: tables.mixture_mean(negative), r"beta at step 0"),
        (lambda: tables.mmvm(negative), r"beta at step 0"),
        (lambda: Objective([Term(ALL, ALL, kl=nan)]), r"weight nan\(step\) at step 0 .*got nan"),
        (lambda: Objective([Term(ALL, ALL, likelihood=lambda step: math.inf)]), r"got inf"),
        (lambda: Objective([Term(ALL, ALL, likelihood={"x1": nan})]), r"weight nan\(step\) at step 0"),
    ],
)
@pytest.mark.parametrize("estimator", [AnalyticKL(), Trace_ELBO()], ids=["ours", "Pyro's"])
def test_a_weight_that_a_function_of_the_step_returns_is_checked(build, message, estimator, pair):
    objective = build()
    objective.estimator = estimator
    for evaluate in (objective.loss, objective.differentiable_loss, lambda *_: objective.step_weights(("x0", "x1"), 0)):
        with pytest.raises(ValueError, match=message):
            evaluate(*pair)


def test_a_weight_of_another_type_from_a_function_is_a_type_error(pair):
    for wrong in (lambda step: "1", lambda step: None, lambda step: [1.0]):
        with pytest.raises(TypeError, match="at step 0 to be a number"):
            Objective([Term(ALL, ALL, kl=wrong)]).loss(*pair)


def test_negative_weights_of_ones_own_terms_are_weights(pair):
    """So mixture_mean has one in its table."""
    plain = Objective([Term(ALL, (), kl=1.0)]).loss(*pair)
    assert Objective([Term(ALL, (), kl=-1.0)]).loss(*pair) == pytest.approx(-plain, rel=1e-12)
    assert Objective([Term(ALL, (), kl=lambda step: -1.0)]).loss(*pair) == pytest.approx(-plain, rel=1e-12)
    assert "kl -1" in repr(tables.mixture_mean())
    assert math.isfinite(tables.mixture_mean(tables.warm_up(3, start=0.5)).loss(*pair))


def test_weights_of_other_types_of_numbers_are_the_same_numbers(pair):
    for two in (2, torch.tensor(2.0), torch.tensor([2]), 2.0):
        expected = _seeded(tables.elbo(kl=2.0), pair)
        assert _seeded(tables.elbo(kl=two), pair) == pytest.approx(expected, rel=1e-14)
    assert repr(tables.elbo(kl=tables.warm_up(3))).count("kl warm_up(step)") == 1


def _seeded(objective, pair):
    torch.manual_seed(0)
    return objective.loss(*pair)


@pytest.mark.parametrize("estimator", [None, Trace_ELBO()], ids=["ours", "Pyro's"])
@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([Term(ALL, ALL, likelihood={"lable": 50.0})], r"likelihood weight for 'lable'.*the story observes 'x0', 'x1'"),
        ([Term("lable", ALL)], r"term \(lable, \*, P\), encode: 'lable' is a modality that is not observed"),
        ([Term(ALL, ("x0", "lable"))], "decode: 'lable'"),
        ([Term(ALL, ALL, ("lable",))], "given: 'lable'"),
        (lambda names: [Term(ALL, "lable")], "decode: 'lable'"),
    ],
)
def test_unknown_modalities_are_refused(terms, message, estimator, pair):
    objective = Objective(terms, estimator)
    with pytest.raises(ValueError, match=message):
        objective.loss(*pair)


def test_a_modality_that_only_the_guide_reads_can_be_encoded_and_not_decoded(pair):
    model, guide, batch = pair
    wide = mm.Batch({**{n: batch[n] for n in batch.names}, "seen": torch.zeros(batch.size)})
    assert Objective([Term("seen", ())]).loss(model, guide, wide) == pytest.approx(
        Objective([Term((), ())]).loss(model, guide, wide)
    )
    for term in (Term(ALL, "seen"), Term(ALL, ALL, likelihood={"seen": 2.0})):
        with pytest.raises(ValueError, match="'seen'"):
            Objective([term]).loss(model, guide, wide)


def test_a_modality_that_the_batch_does_not_hold_is_one_that_is_missing(pair):
    model, guide, batch = pair
    absent = mm.Batch({"x0": batch["x0"]})
    for terms in ([Term(ALL, ALL, likelihood={"x1": 50.0})], [Term("x0", ("x0", "x1")), Term("x1", "x1")]):
        narrow = _seeded(Objective(terms), (model, guide, absent))
        assert narrow == pytest.approx(_seeded(Objective(terms), (model, guide, batch.only("x0"))), rel=1e-12)


@pytest.mark.parametrize(
    "estimator", [ReweightedWakeSleep(), TraceTailAdaptive_ELBO(num_particles=2)], ids=lambda e: type(e).__name__
)
def test_estimators_of_no_value_are_refused(estimator, pair):
    for evaluate in (tables.elbo(estimator).loss, tables.elbo(estimator).differentiable_loss):
        with pytest.raises(ValueError, match="is no estimate of a term's value"):
            evaluate(*pair)


def test_a_batch_of_another_type_is_pointed_out(pair):
    model, guide, batch = pair
    with pytest.raises(TypeError, match=r"pyro_mm.Batch"):
        tables.elbo().loss(model, guide, {"x0": batch["x0"]})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_table_is_the_same_table(copied, pair):
    """PRIOR and ALL are known by what they are, in a copy as well."""
    objective = Objective(
        [Term(PRIOR, (), ALL), Term(ALL, OTHERS, EACH), Term(Random(), Random(rest=True)), Term("x0", ALL)]
    )
    other = copied(objective)
    assert repr(other) == repr(objective) and other.terms[0].encode is PRIOR
    assert _seeded(other, pair) == pytest.approx(_seeded(objective, pair), rel=1e-14)
