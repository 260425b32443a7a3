"""What objectives say of themselves, and what they must not say."""

import math

import pyro.distributions as dist
import pytest
import torch
from linear_gaussian import encoders, oracle
from pyro.infer import RenyiELBO, Trace_ELBO

import pyro_mm as mm
from pyro_mm.objectives import ALL, EACH, Objective, Term

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
    ],
)
def test_target(objective, text):
    assert str(objective.bounds(NAMES)) == text


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
    with pytest.raises(ValueError, match="pass a module whose forward makes it"):
        mm.models.SharedLatent(dist.Normal(loc, 1.0).to_event(1), {"x": mm.conditionals.Normal(mm.nn.MLP(2, 4))})
