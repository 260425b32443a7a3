"""Encoders that are held constant, and deterministic ones: which gradients flow, and where a density is refused."""

import math

import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn

import pyro_mm as mm
from pyro_mm.objectives import ALL, EACH, MMD, OTHERS, PRIOR, Objective, Term
from tests.support.compiled import agree
from tests.support.contract import POSTERIORS, data
from tests.support.contract import pair as contract_pair

E = mm.estimators
LATENT, SCALE = 2, 0.5


def autoencoder(surrogates=True):
    """A deterministic encoder of both modalities, and a Normal of fixed scale for each alone."""
    torch.manual_seed(1)
    prior = dist.Normal(torch.zeros(LATENT), 1.0).to_event(1)
    decoders = {n: mm.conditionals.Normal(mm.nn.MLP(LATENT, 3, (4,)), scale=1.0) for n in ("x", "y")}
    alone = {n: mm.conditionals.Normal(mm.nn.MLP(3, LATENT, (4,)), scale=SCALE) for n in ("x", "y")}
    partial = mm.posteriors.ProductOfExperts(alone, prior=None) if surrogates else None
    head = mm.conditionals.Delta(mm.nn.MLP(8, LATENT, (4,)))
    encoder = mm.posteriors.JointEncoder({n: mm.nn.MLP(3, 4, ()) for n in ("x", "y")}, head, partial)
    return mm.models.SharedLatent(prior, decoders), mm.Guide(z=encoder)


def rows(size=7):
    return mm.Batch({"x": torch.randn(size, 3), "y": torch.randn(size, 3)})


def gradients(objective, model, guide, batch, seed=0):
    parameters = [*model.parameters(), *guide.parameters()]
    for p in parameters:
        p.grad = None
    torch.manual_seed(seed)
    loss = objective.evaluate_with_gradient(model, guide, batch, step=0)
    names = [n for m in (model, guide) for n, _ in m.named_parameters()]
    found = {
        n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in zip(names, parameters, strict=True)
    }
    return loss, found


# -- a frozen encoder -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectorize", [True, False])
def test_a_surrogate_learns_the_code_by_its_squared_error_and_the_encoder_does_not(vectorize):
    model, guide = autoencoder()
    batch = rows()
    objective = Objective([Term(ALL, (), EACH, freeze_encoder=True)], vectorize=vectorize)
    loss, found = gradients(objective, model, guide, batch)

    encoder = guide.posteriors["z"]
    code = encoder(batch).mean.detach()
    errors = {n: encoder.partial.experts[n].net(batch[n]) - code for n in "xy"}
    squared = {n: e.square().sum() / (2 * SCALE**2) for n, e in errors.items()}
    constant = len(batch) * LATENT * math.log(SCALE * math.sqrt(2 * math.pi))
    for n in "xy":
        torch.testing.assert_close(loss.by_term[f"(*, -, {n}) encoder frozen"], -(squared[n] + constant).detach())
    expected = torch.autograd.grad(sum(squared.values()), list(encoder.partial.parameters()))
    own = {n: g for n, g in found.items() if "partial" in n}
    for g, h in zip(own.values(), expected, strict=True):
        torch.testing.assert_close(g, h)
    assert all((g == 0).all() for n, g in found.items() if n not in own)


@pytest.mark.parametrize("name", POSTERIORS)
@pytest.mark.parametrize("terms", ["penalty", "density"])
def test_no_gradient_reaches_what_only_a_frozen_encoder_uses(name, terms):
    model, guide = contract_pair("shared", name)
    batch = data(8)
    table = {
        "penalty": [Term(ALL, (), PRIOR, freeze_encoder=True)],
        "density": [Term(ALL, ALL, freeze_encoder=True)],
    }[terms]
    frozen, found = gradients(Objective(table), model, guide, batch)
    assert all((g == 0).all() for n, g in found.items() if n.startswith("posteriors"))
    if terms == "density":
        assert any(g.abs().max() > 1e-3 for n, g in found.items() if n.startswith("decoders"))
    live, _ = gradients(Objective([Term(ALL, t.decode) for t in table]), model, guide, batch)
    torch.testing.assert_close(frozen.total, live.total)


@pytest.mark.parametrize(
    "estimator",
    [
        E.AnalyticKL, lambda: E.IWAE(3), lambda: E.DReG(2), lambda: E.IWAE(3, resample=True),
        lambda: E.IWAE(2, vectorize_particles=False), Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO,
    ],
)  # fmt: skip
def test_the_gradient_is_that_of_networks_whose_parameters_are_frozen(estimator):
    """The encoder given x is held constant, those given y and the decoders learn."""
    model, guide = contract_pair("shared", "product without prior")
    batch = data(8)
    batch = batch[batch.having(("a", "b"), every=True)]
    terms = [Term("a", "b", "b", freeze_encoder=True), Term("a", (), "b", freeze_encoder=True)]
    _, found = gradients(Objective(terms, estimator()), model, guide, batch)
    experts = guide.posteriors["z"].experts
    experts["a"].requires_grad_(False)
    live = [Term("a", "b", "b"), Term("a", (), "b")]
    _, expected = gradients(Objective(live, estimator()), model, guide, batch)
    experts["a"].requires_grad_(True)
    for n, g in found.items():
        if ".a." in n:
            assert (g == 0).all()
        else:
            torch.testing.assert_close(g, expected[n], rtol=1e-4, atol=1e-4)
    assert any(g.abs().max() > 1e-3 for n, g in found.items() if "experts.b" in n)
    assert any(g.abs().max() > 1e-3 for n, g in found.items() if "decoders.b" in n)


def test_live_and_frozen_terms_of_one_set_have_passes_of_their_own():
    model, guide = contract_pair("shared", "product")
    batch = data(8)
    live, frozen = Objective([Term(ALL, ALL)]), Objective([Term(ALL, (), EACH, freeze_encoder=True)])
    both = live + frozen
    assert "(*, -, m) encoder frozen" in str(both) and both.target == "lower bound on log p(x)"
    _, one = gradients(live, model, guide, batch)
    loss, found = gradients(both, model, guide, batch)
    torch.manual_seed(0)
    live.evaluate(model, guide, batch, step=0)
    other, rest = gradients(frozen, model, guide, batch)
    for n, g in found.items():
        torch.testing.assert_close(g, one[n] + rest[n], rtol=1e-4, atol=1e-4)
    for label, value in other.by_term.items():
        torch.testing.assert_close(loss.by_term[label], value)


def test_an_encoder_that_runs_without_gradient_is_run_again_with_it():
    """What the frozen pass has cached must not hide the gradient of a later one."""
    model, guide = contract_pair("shared", "product")
    batch = data(8)
    frozen_first = Objective([Term(ALL, (), PRIOR, freeze_encoder=True), Term(ALL, ALL)], E.IWAE(2), vectorize=False)
    _, found = gradients(frozen_first, model, guide, batch)
    assert all(g.abs().max() > 0 for n, g in found.items() if n.startswith("posteriors"))


# -- a deterministic encoder ------------------------------------------------------------------------------------------


def test_an_autoencoder_decodes_its_code():
    model, guide = autoencoder()
    batch = rows()
    for estimator in (E.AnalyticKL(), E.IWAE(3), E.DReG(3), E.StickTheLanding(), Trace_ELBO()):
        loss, found = gradients(mm.objectives.elbo(estimator, kl=0), model, guide, batch)
        code = guide.posteriors["z"](batch).mean
        expected = sum(model.decoders[n](code).log_prob(batch[n]).sum() for n in "xy")
        torch.testing.assert_close(loss.total, -expected.detach())
        assert all(found[n].abs().max() > 0 for n in found if "head" in n or n.startswith("decoders"))


def table():
    """The objective of a factorised representation: reconstruction, codes like the prior, surrogates."""
    surrogates = [Term(ALL, (), EACH, freeze_encoder=True), Term("x", "y", kl=0.0), Term("y", "y", weight=0.1)]
    return mm.objectives.elbo(kl=0) + 10 * MMD("z") + Objective(surrogates)


def test_a_table_of_codes_and_surrogates_trains_compiled_and_not():
    model, guide = autoencoder()
    agree(table(), model, guide, [rows(6), rows(4).padded(6)])
    batch = rows(20)
    torch.manual_seed(0)
    before = table().evaluate(model, guide, batch, step=0).total
    optimizer = lambda ps: torch.optim.Adam(ps, 1e-2)  # noqa: E731
    history = mm.fit(
        model, guide, table(), batch, epochs=10, batch_size=10, optimizer=optimizer, progress=False, seed=0
    )
    torch.manual_seed(0)
    assert table().evaluate(model, guide, batch, step=0).total < before
    assert {"(*, -, x) encoder frozen", "MMD(z | *; p(z))", "(y, y, P)"} <= set(history.columns)


def test_codes_are_encoded_and_decoded():
    model, guide = autoencoder()
    batch = rows()
    code = mm.encode(guide, batch)["z"].mean
    torch.testing.assert_close(code, guide.posteriors["z"](batch).mean)
    made = mm.generate(model, guide, batch, mean=True, num_samples=2, seed=0)
    torch.testing.assert_close(made["x"][0], model.decoders["x"](code).mean)
    assert mm.generate(model, guide, batch.only("x"), seed=0)["y"].shape[-2:] == (7, 3)


REFUSED = {
    "elbo": lambda m, g, b: mm.objectives.elbo().evaluate(m, g, b, step=0),
    "kl of the step": lambda m, g, b: mm.objectives.elbo(kl=mm.objectives.warm_up(5)).evaluate(m, g, b, step=0),
    "iwae": lambda m, g, b: mm.objectives.elbo(E.IWAE(3)).evaluate(m, g, b, step=0),
    "dreg": lambda m, g, b: mm.objectives.elbo(E.DReG(3)).evaluate(m, g, b, step=0),
    "alone": lambda m, g, b: E.AnalyticKL().evaluate(m, g, b, step=0),
    "penalty": lambda m, g, b: Objective([Term(ALL, (), EACH)]).evaluate(m, g, b, step=0),
    "given": lambda m, g, b: Objective([Term(EACH, OTHERS, ALL)]).evaluate(m, g, b, step=0),
    "given, frozen": lambda m, g, b: Objective([Term("x", (), ALL, freeze_encoder=True)]).evaluate(m, g, b, step=0),
    "frozen": lambda m, g, b: Objective([Term(ALL, ALL, freeze_encoder=True)]).evaluate(m, g, b, step=0),
    "trace": lambda m, g, b: mm.objectives.elbo(Trace_ELBO()).evaluate(m, g, b, step=0),
    "trace, given": lambda m, g, b: Objective([Term(EACH, OTHERS, ALL)], Trace_ELBO()).evaluate(m, g, b, step=0),
    "mean field": lambda m, g, b: mm.objectives.elbo(TraceMeanField_ELBO()).evaluate(m, g, b, step=0),
    "fit": lambda m, g, b: mm.fit(m, g, mm.objectives.elbo(), b, epochs=1, progress=False),
    "log_weights": lambda m, g, b: mm.log_weights(m, g, b),
    "log_marginal": lambda m, g, b: mm.log_marginal(m, g, b, num_particles=5),
    "log_conditional": lambda m, g, b: mm.log_conditional(m, g, b, target="x", given="y", num_particles=5),
    "annealing": lambda m, g, b: mm.annealed_importance(m, g, b, num_chains=2, temperatures=2),
    "resampling": lambda m, g, b: mm.generate(m, g, b, resample=True, num_particles=3),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_density_of_a_code_is_refused_in_words(name):
    model, guide = autoencoder()
    with pytest.raises(Exception, match=r"'z' is deterministic \(a Delta\) in some rows, and has no density there"):
        REFUSED[name](model, guide, rows(4))


def test_calibration_of_a_code_is_refused():
    model, guide = autoencoder(surrogates=False)
    with pytest.raises(ValueError, match="'z' is deterministic"):
        mm.calibration(model, guide, rows(4), num_draws=3)


def test_check_reports_what_it_cannot_know_of_a_code():
    model, guide = autoencoder()
    found = mm.check(model, guide, table(), rows(), num_particles=5, repeats=2)
    assert "deterministic (a Delta)" in str(found.errors["the likelihood"]) and found.gradients is not None


def test_a_modality_that_a_delta_decodes_is_refused():
    model = mm.models.SharedLatent(
        dist.Normal(torch.zeros(3), 1.0).to_event(1), {"x": mm.conditionals.Delta(nn.Identity())}
    )
    guide = mm.Guide(z=lambda batch: dist.Normal(batch["x"], 1.0).to_event(1))
    with pytest.raises(ValueError, match="'x' is deterministic"):
        mm.objectives.elbo(kl=0).evaluate(model, guide, mm.Batch({"x": torch.randn(4, 3)}), step=0)


def test_the_latent_of_one_modality_may_be_a_code_and_that_of_another_one_a_normal():
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    decoders = {n: mm.conditionals.Normal(mm.nn.MLP(4, 3, ()), scale=1.0) for n in ("x", "y")}
    model = mm.models.PrivateLatents(prior, {"x": prior, "y": prior}, decoders)
    posterior = mm.posteriors.ProductOfExperts({n: mm.conditionals.Normal(mm.nn.MLP(3, 4, ())) for n in ("x", "y")})
    guide = mm.Guide(
        z=posterior,
        w_x=mm.posteriors.Private("x", mm.conditionals.Delta(mm.nn.MLP(3, 2, ()))),
        w_y=mm.posteriors.Private("y", mm.conditionals.Normal(mm.nn.MLP(3, 4, ()))),
    )
    batch = mm.Batch({"x": torch.randn(8, 3), "y": torch.randn(8, 3)}, present={"x": torch.arange(8) > 2})
    objective = mm.objectives.elbo(kl=0) + MMD("z") + MMD("w_x") + MMD("w_y")
    _, found = gradients(objective, model, guide, batch)
    assert all(g.isfinite().all() for g in found.values())
    with pytest.raises(ValueError, match="'w_x' is deterministic"):
        mm.objectives.elbo().evaluate(model, guide, batch, step=0)
    only_y = Objective([Term("y", "y")]).evaluate(model, guide, batch, step=0)  # in which no row has w_x
    assert only_y.total.isfinite()


def test_a_conditional_of_a_point_has_the_shape_of_its_event():
    point = mm.conditionals.Delta(nn.Linear(2, 12), event_shape=(3, 4))
    d = point(torch.zeros(5, 2))
    assert d.batch_shape == (5,) and d.event_shape == (3, 4) and d.has_rsample
    with pytest.raises(ValueError, match=r"expected an output of shape \(..., 12\)"):
        mm.conditionals.Delta(nn.Linear(2, 11), event_shape=(3, 4))(torch.zeros(5, 2))
