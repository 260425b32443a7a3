"""Comparisons, the report on a pair, the noise of gradients and ArviZ's data, against closed forms and libraries."""

import inspect
import math
import re

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

import pyro_mm as mm
from pyro_mm.diagnostics.bound_gap import target_evidence
from pyro_mm.diagnostics.comparison import compare
from pyro_mm.diagnostics.gradient_noise import gradient_noise
from pyro_mm.diagnostics.inference_data import to_arviz
from pyro_mm.diagnostics.pair_check import check
from pyro_mm.experiments.evaluation import evaluate_recipe
from pyro_mm.objectives import ALL, EACH, Term
from tests.support.linear_gaussian import encoders, every_pattern, oracle

tables, E = mm.objectives, mm.estimators


def evidence_of(log_prob, error=0.0, k=0.1, quantity="log p(x)", num_particles=100):
    like = torch.ones_like(log_prob)
    return mm.Evidence(log_prob, error * like, 50 * like, k * like, quantity, num_particles)


def kind(x):
    return type(getattr(x, "estimator", x)).__name__ if not isinstance(x, bool) else str(x)


def with_parameters(model, requires_grad=True):
    for p in model.parameters():
        p.requires_grad_(requires_grad)
    return model


# -- comparisons ---------------------------------------------------------------------------------------------------


def test_comparison_is_that_of_the_exact_likelihoods(double):
    """Guides are exact posteriors, so every log-likelihood is exact, and numpy gives the rest."""
    models = {f"noise {noise}": oracle(2, noise=noise) for noise in (0.7, 0.9, 2.0)}
    batch = models["noise 0.7"].sample(40)
    pairs = {name: (m, mm.Guide(z=m.posterior)) for name, m in models.items()}
    found = compare(pairs, batch, num_particles=20, seed=0)
    exact = {name: m.log_prob(batch).detach().numpy() for name, m in models.items()}
    best = max(exact, key=lambda name: exact[name].mean())
    assert found.reference == best == found.candidates[0].name
    assert [c.name for c in found.candidates] == sorted(exact, key=lambda name: -exact[name].mean())
    for c in found.candidates:
        apart = exact[c.name] - exact[best]
        np.testing.assert_allclose(c.mean, exact[c.name].mean(), atol=1e-9)
        np.testing.assert_allclose(c.difference, apart.mean(), atol=1e-9)
        np.testing.assert_allclose(c.paired_error, apart.std(ddof=1) / 40**0.5, atol=1e-9)
        assert c.error < 1e-8 and c.estimation_error < 1e-8 and c.lost == 0
    # paired: the rows' own spread, common to both, is not in it
    second = found.candidates[1]
    assert second.paired_error < 0.5 * exact[second.name].std(ddof=1) / 40**0.5
    conditional = compare(pairs, batch, target="x1", given="x0", baseline="noise 2.0", num_particles=20, seed=0)
    assert conditional.quantity == "log p(x1 | x0)"
    exact = {name: m.log_conditional(batch, ["x1"], ["x0"]).detach().numpy() for name, m in models.items()}
    for c in conditional.candidates:
        np.testing.assert_allclose(c.difference, (exact[c.name] - exact["noise 2.0"]).mean(), atol=1e-9)


def test_errors_of_estimation_and_the_choice_of_rows_are_told_apart():
    one = evidence_of(torch.tensor([-1.0, -2.0, -6.0]), error=0.3)
    other = evidence_of(torch.tensor([-2.0, -2.5, -9.0]), error=0.4)
    found = compare({"a": one, "b": other})
    b = found.candidates[1]
    assert b.difference == pytest.approx(-1.5) and found.candidates[0].difference == 0
    assert b.paired_error == pytest.approx(np.std([1.0, 0.5, 3.0], ddof=1) / 3**0.5)
    assert b.error == pytest.approx(0.4 / 3**0.5)
    assert b.estimation_error == pytest.approx(math.hypot(0.3, 0.4) / 3**0.5)
    assert found.table()[1]["name"] == "b" and found.table()[1]["num_particles"] == 100


def test_one_seed_makes_equal_pairs_equal(double):
    model = oracle(2)
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts(encoders(model)))
    found = compare({"a": (model, guide), "b": [model, guide, "more"]}, model.sample(5), num_particles=30)
    assert found.candidates[1].difference == found.candidates[1].paired_error == 0
    assert found.candidates[1].estimation_error > 0
    assert "Within 2 standard errors" in repr(found)


def test_arviz_compares_alike():
    """Log-likelihoods as low as those of an image, whose exponentials are all zero."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 150, generator=generator, dtype=torch.float64) - 800
    found = compare({"a": evidence_of(rows[0]), "b": evidence_of(rows[1] - 0.2), "c": evidence_of(rows[2] - 2, k=0.9)})
    exact = {"round_to": "none"} if "round_to" in inspect.signature(arviz.compare).parameters else {}
    frame = found.to_arviz(**exact)
    assert list(frame.index) == [c.name for c in found.candidates]
    assert (frame["weight"] >= -1e-9).all() and frame["weight"].sum() == pytest.approx(1)
    for c in found.candidates:
        assert abs(frame.loc[c.name, "elpd_diff"]) == pytest.approx(150 * abs(c.difference), abs=1e-6)
        assert frame.loc[c.name, "dse"] == pytest.approx((150 * 149) ** 0.5 * c.paired_error, abs=1e-6)
    column = "elpd_loo" if "elpd_loo" in frame else "elpd"
    assert frame.loc["c", column] == pytest.approx(150 * found.candidates[2].mean)
    spread = found.evidence["c"].log_prob.numpy().std() * 150**0.5
    assert frame.loc["c", "se"] == pytest.approx(spread)
    two = compare({"a": evidence_of(rows[0]), "b": evidence_of(rows[1] - 0.2)})
    frame = two.to_arviz(**exact)
    share = np.linspace(0.001, 0.999, 999)[:, None]
    a, b = rows[0].numpy() + 800, rows[1].numpy() - 0.2 + 800
    stacked = share[np.log(share * np.exp(a) + (1 - share) * np.exp(b)).sum(1).argmax(), 0]
    assert frame.loc["a", "weight"] == pytest.approx(stacked, abs=0.005)


def test_rows_that_are_not_finite_are_left_out_and_told_of():
    x = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    odd = torch.tensor([-0.5, -math.inf, -2.5, math.nan])
    found = compare({"plain": evidence_of(x), "odd": evidence_of(odd)})
    assert found.rows.tolist() == [True, False, True, False]
    odd, plain = found.candidates
    assert (odd.name, odd.mean, odd.lost) == ("odd", -1.5, 2) and (plain.mean, plain.lost) == (-2.0, 0)
    assert plain.difference == pytest.approx(-0.5)
    assert "odd is not finite in 2 of 4 rows" in repr(found)
    assert len(found.to_arviz()) == 2
    with pytest.raises(ValueError, match=r"no row is finite in all candidates.*'b': 4"):
        compare({"a": evidence_of(x), "b": evidence_of(x / 0)})


def test_comparisons_that_make_no_sense_are_refused():
    x, y = evidence_of(torch.zeros(3)), evidence_of(torch.zeros(4))
    with pytest.raises(ValueError, match="at least two"):
        compare({"a": x})
    with pytest.raises(ValueError, match=r"one number of rows, got \{'a': 3, 'b': 4\}"):
        compare({"a": x, "b": y})
    with pytest.raises(ValueError, match=r"one log-likelihood, got .*log p\(y\)"):
        compare({"a": x, "b": evidence_of(torch.zeros(3), quantity="log p(y)")})
    with pytest.raises(ValueError, match=r"a baseline among \['a', 'b'\], got 'c'"):
        compare({"a": x, "b": x}, baseline="c")
    with pytest.raises(ValueError, match="batch for the pairs"):
        compare({"a": x, "b": (print, print)})
    with pytest.raises(TypeError, match=r"\(model, guide\) or Evidence for 'b', got Linear"):
        compare({"a": x, "b": torch.nn.Linear(1, 1)})
    with pytest.raises(ValueError, match="nothing is estimated"):
        compare({"a": x, "b": x}, num_particles=5)
    with pytest.raises(ValueError, match="a target where"):
        compare({"a": x, "b": (print, print)}, oracle(2).sample(3), given="x0")


# -- gradients -----------------------------------------------------------------------------------------------------


class Given:
    """An "objective" whose gradients are those given, one after another."""

    def __init__(self, parameters, gradients):
        self.parameters, self.gradients = parameters, [gradients[0], *gradients]  # one is for a look at the leaves
        self.count = [0]  # shared by copies

    def differentiable_loss(self, model, guide, batch):
        self.count[0] += 1
        given = self.gradients[self.count[0] - 1]
        return sum((p * g).sum() for p, g in zip(self.parameters, given, strict=True) if g is not None)


class Two(torch.nn.Module):
    """A story of no consequence, with two networks."""

    def __init__(self):
        super().__init__()
        self.nets = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Sequential(torch.nn.Linear(3, 1))})
        self.extra = torch.nn.Parameter(torch.zeros(2))

    def forward(self, batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(0.0, 1.0))


def nothing(batch):
    with batch.plate():
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_signal_and_noise_are_those_of_the_gradients(double):
    story, batch = Two(), mm.Batch({"x": torch.zeros(5)})
    names = [name for name, _ in story.named_parameters()]
    parameters = list(story.parameters())
    draws = [[1.0 + torch.randn_like(p) for p in parameters] for _ in range(7)]
    draws[2][names.index("extra")] = None  # in one repeat it was not used
    found = gradient_noise(story, nothing, Given(parameters, draws), batch, repeats=7)
    assert [g.name for g in found.groups] == ["model", "model.nets.a", "model.nets.b"]
    for group, members in (("model", ["extra"]), ("model.nets.a", ["nets.a.weight", "nets.a.bias"])):
        each = [[draw[names.index(m)] for m in members] for draw in draws]
        zeros = [[torch.zeros(2) if x is None else x for x in one] for one in each]
        flat = np.stack([torch.cat([x.flatten() for x in one]).numpy() for one in zeros])
        trace = np.trace(np.atleast_2d(np.cov(flat.T)))
        signal = (flat.mean(0) ** 2).sum() - trace / 7
        assert found[group].noise == pytest.approx(trace**0.5 / 5)
        assert found[group].signal == pytest.approx(max(signal, 0) ** 0.5 / 5)
        assert found[group].snr == pytest.approx((max(signal, 0) / trace) ** 0.5)
        assert found[group].size == flat.shape[1] and found[group].tensors == len(members)
    with pytest.raises(ValueError, match="at least 2 repeats"):
        gradient_noise(story, nothing, Given(parameters, draws), batch, repeats=1)


def test_parameters_without_a_gradient_are_named(double):
    story, batch = Two(), mm.Batch({"x": torch.zeros(5)})
    parameters = dict(story.named_parameters())
    story.nets["b"][0].bias.requires_grad_(False)
    used = [parameters["extra"], parameters["nets.a.weight"], parameters["nets.b.0.weight"]]
    draws = [[torch.randn(2) / (r != 3), torch.zeros(2, 2), torch.ones(1, 3)] for r in range(5)]
    found = gradient_noise(story, nothing, Given(used, draws), batch, repeats=5)
    assert found.unused == ("model.nets.a.bias",)
    assert found.zero == ("model.nets.a.weight",)
    assert found.nonfinite == ("model.extra",)
    assert found.frozen == ("model.nets.b.0.bias",)
    assert found["model.nets.b"].snr == math.inf and found["model.nets.b"].signal == pytest.approx(3**0.5 / 5)
    assert math.isnan(found["model"].snr) and math.isnan(found["model.nets.a"].snr)


def toy(mean):
    """log w = log N(z; 0, 1) - log N(z; mean, 1) by one draw z = mean + e: its gradient in the mean is -(mean + e)."""
    location = torch.nn.Parameter(mean)

    def model(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(len(mean)), 1.0).to_event(1))
            batch.observe("x", dist.Normal(torch.zeros(()), 1.0).expand([len(batch)]))

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(location, 1.0).to_event(1).expand([len(batch)]))

    return model, guide, location


@pytest.mark.parametrize("objective", [tables.elbo(E.IWAE(1)), Trace_ELBO(), TraceGraph_ELBO()], ids=kind)
def test_signal_to_noise_of_a_known_gradient(objective, double):
    """Four rows: the gradient is N(4 mean, 4 I), its SNR is sqrt(4 / 3) |mean|."""
    model, guide, location = toy(torch.tensor([1.0, 2.0, -1.0]))
    location.grad = torch.full((3,), 7.0)
    found = gradient_noise(model, guide, objective, mm.Batch({"x": torch.zeros(4)}), repeats=300, seed=0)
    (group,) = found.groups
    assert group.name == "closure (3,)" and torch.equal(location.grad, torch.full((3,), 7.0))
    # 300 repeats: a standard error of 0.115 / 9.8 in the signal and of 1 / sqrt(2 * 900) in the noise; 4 of them
    assert group.signal == pytest.approx(6**0.5, rel=0.05)
    assert group.noise == pytest.approx(12**0.5 / 4, rel=0.1)
    assert group.snr == pytest.approx((4 / 3 * 6) ** 0.5, rel=0.11)


def test_no_signal_is_seen_where_there_is_none(double):
    """The estimate of SNR^2 is then of mean zero and standard error sqrt(2 / d) / R: it exceeds 4 with p = 1e-3."""
    model, guide, _ = toy(torch.zeros(50))
    batch, objective = mm.Batch({"x": torch.zeros(4)}), tables.elbo(E.IWAE(1))
    found = [gradient_noise(model, guide, objective, batch, repeats=10, seed=seed).groups[0].snr for seed in range(8)]
    assert max(found) < 2 * (2 / 50) ** 0.25 / 10**0.5
    assert min(found) == 0, "eight seeds are not all above their mean: p = 0.004"


def test_names_of_what_is_no_module():
    centres, nets = torch.nn.Embedding(3, 2), [torch.nn.Linear(2, 2)]

    def model(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(centres.weight[0], 1.0).to_event(1))
            batch.observe("x", lambda z: dist.Normal(nets[0](z), 1.0).to_event(1), z)

    def guide(batch):
        with batch.plate():
            scale = pyro.param("scale", torch.ones(2), constraint=dist.constraints.positive)
            pyro.sample("z", dist.Normal(torch.zeros(2), scale).to_event(1).expand([len(batch)]))

    batch = mm.Batch({"x": torch.randn(4, 2)})
    found = gradient_noise(model, guide, tables.elbo(), batch, repeats=2)
    assert {g.name for g in found.groups} == {
        "model.centres", "model.nets[0]", "pyro.param 'scale'",
    }  # fmt: skip

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder, self.encoder = torch.nn.Linear(2, 2), mm.conditionals.Normal(torch.nn.Linear(2, 4))

        def model(self, batch):
            with batch.plate():
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                batch.observe("x", lambda z: dist.Normal(self.decoder(z), 1.0).to_event(1), z)

        def guide(self, batch):
            with batch.plate():
                pyro.sample("z", self.encoder(batch["x"]))

    both = Both()
    found = gradient_noise(both.model, both.guide, tables.elbo(), batch, repeats=2)
    assert [g.name for g in found.groups] == ["model.decoder", "model.encoder"] and not found.unused


def test_the_callers_state_is_left_alone():
    model = oracle(2)
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(), torch.nn.Linear(8, 6))
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"x0": mm.conditionals.Normal(net)}))
    guide.train()
    model.eval()
    batch = model.sample(30)
    objective = tables.elbo(kl=tables.warm_up(100))
    objective.steps, objective.by_term = 17, {"kept": torch.ones(())}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {n: x.clone() for part in (model, guide) for n, x in part.state_dict().items()}
    state, table, values = torch.get_rng_state(), batch["x0"].clone(), dict(objective.by_term)
    found = check(model, guide, objective, batch, num_particles=50, repeats=3)
    assert torch.equal(state, torch.get_rng_state()) and torch.equal(table, batch["x0"])
    assert objective.steps == 17 and objective.by_term == values and objective._names is None
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(p.grad is None for p in guide.parameters())
    after = {n: x for part in (model, guide) for n, x in part.state_dict().items()}
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert not model.training and all(m.training for m in guide.modules())
    assert not any("training mode" in text for text in found.findings)  # likelihoods run in evaluation mode
    again = check(model, guide, objective, batch, num_particles=50, repeats=3)
    assert repr(found) == repr(again)


# -- the gap -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [tables.elbo(), tables.mvae(), tables.elbo(E.IWAE(3)), Trace_ELBO()], ids=kind)
def test_no_gap_at_the_exact_posterior(objective, double):
    model = with_parameters(oracle(2), False)
    batch = every_pattern(model, rows=4, empty=False)
    found = check(model, mm.Guide(z=model.posterior), objective, batch, num_particles=100, repeats=2)
    for gap in (found.gap, found.elbo):
        assert abs(gap.value) < 1e-9 and gap.error < 1e-8
    complete = batch[torch.stack(list(batch.present.values())).all(0)]
    if isinstance(objective, tables.Objective) and len(objective.terms) > 1:
        exact = sum(model.log_prob(b).mean() for b in (complete, complete.only("x0"), complete.only("x1")))
        assert found.gap.rows == 4 and "over the 4 rows that its bound holds for" in repr(found)
    else:
        exact = model.log_prob(batch).mean()
        assert found.gap.rows == 12
    assert found.gap.evidence == pytest.approx(exact.item(), abs=1e-9)
    assert set(found.evidence) == {"log p(x0, x1)", "log p(x0)", "log p(x1)"}
    assert not found.findings and repr(found).endswith("Findings\n  none")


def test_the_gap_is_the_divergence_of_the_guide(double):
    """A posterior moved by d has KL = d L d / 2 in every row, L the posterior precision."""
    model = with_parameters(oracle(2), False)
    batch = model.sample(50)
    shift = torch.tensor([0.3, -0.2, 0.1])

    def moved(rows):
        exact = model.posterior(rows)
        return dist.MultivariateNormal(exact.loc + shift, precision_matrix=exact.precision_matrix)

    found = check(model, mm.Guide(z=moved), tables.elbo(), batch, num_particles=2000, repeats=2)
    kl = 0.5 * (shift @ model.posterior(batch).precision_matrix[0] @ shift).item()
    for gap in (found.gap, found.elbo):
        assert gap.error < 0.1 * kl
        assert abs(gap.value - kl) < 4 * gap.error  # one of two fails with probability 1e-4
        assert abs(gap.evidence - model.log_prob(batch).mean()) < 4 * gap.evidence_error


def test_the_gap_is_that_of_the_settled_weights(double):
    model = with_parameters(oracle(2), False)
    guide, batch = mm.Guide(z=mm.posteriors.ProductOfExperts(encoders(model))), model.sample(10)
    options = {"num_particles": 50, "repeats": 2}
    cold = check(model, guide, tables.elbo(kl=tables.warm_up(100)), batch, **options)
    plain = check(model, guide, tables.elbo(), batch, **options)
    assert cold.gap == plain.gap
    # the gradient is that of the present step, at which the KL weighs nothing
    assert cold.gradients.groups != plain.gradients.groups


def test_what_bounds_no_sum_of_evidences_has_no_gap(double):
    model = with_parameters(oracle(2), False)
    guide, batch = mm.Guide(z=model.posterior), model.sample(6)
    for objective, why in (
        (tables.mmjsd(), "surrogate: not a bound, so that its distance"),
        (tables.vaevae(), "only where q(z | x_C) is the exact posterior, so that"),
        (tables.mvae(num_subsets=1), "which is not a sum of log-evidences"),
        (tables.elbo(E.Renyi(-1.0)), "surrogate"),
    ):
        found = check(model, guide, objective, batch, num_particles=20, repeats=2)
        assert found.gap is None and why in " ".join(repr(found).split()) and not found.errors
        assert abs(found.elbo.value) < 1e-9
        assert target_evidence(objective.bounds(batch.names), lambda names: None) is None
    only = check(model, guide, tables.mvae(), batch.only("x0"), num_particles=20, repeats=2)
    assert only.gap is None and "no row here has every modality" in repr(only)


@pytest.mark.parametrize("estimator", [E.IWAE(1), Trace_ELBO()], ids=kind)
@pytest.mark.parametrize(
    ("objective", "holds"),
    [
        (tables.dmvae(), (0, 1)),
        (tables.Objective([Term(EACH, ALL)]), (0, 1)),
        (tables.Objective([Term(EACH, ALL, average=True)]), range(8)),
        (tables.Objective([Term(ALL, ALL, likelihood=2.0, kl=2.0)]), range(8)),
        (tables.Objective([Term(("x0",), ALL)]), (0, 1, 2, 3, 6, 7)),
        (tables.Objective([Term(ALL, ALL), Term(("x0",), ALL)]), (0, 1, 2, 3, 6, 7)),
    ],
    ids=["dmvae", "sum", "mean", "twice", "of one", "of all and of one"],
)
def test_the_gap_is_over_rows_whose_own_bound_is_the_targets(objective, holds, estimator, double):
    """A row with k modalities has k + 1 bounds in dmvae: where k < M its value is above M + 1 times its evidence."""
    model = with_parameters(oracle(3, latent=1), False)
    has = {"x0": [True] * 4 + [False] * 2 + [True] * 2, "x1": [True, True, False, False, True, True, True, True]}
    full = model.sample(8)
    has["x2"] = [True, True, True, True, True, True, False, False]
    batch = mm.Batch({n: full[n] for n in full}, present=has)
    objective = tables.Objective(objective.terms, estimator)
    found = check(model, mm.Guide(z=model.posterior), objective, batch, num_particles=100, repeats=2)
    rows = torch.tensor(list(holds))
    (weight,) = objective.bounds(batch.names).log_evidence.values()
    assert found.gap.rows == len(rows) and not any("exceeds" in text for text in found.findings)
    assert found.gap.evidence == pytest.approx(weight * model.log_prob(batch)[rows].mean().item(), abs=1e-9)


def test_the_command_lines_table_has_the_same_sum(double):
    """With three modalities; a table that has a term on two of them needs an evidence of its own."""
    model = with_parameters(oracle(3), False)
    guide, batch = mm.Guide(z=model.posterior), model.sample(6)
    objective = tables.Objective([tables.Term(tables.ALL, tables.ALL), tables.Term(("x0", "x1"), ("x0", "x1"), kl=2.0)])
    run = mm.recipes.Recipe(model, guide, objective)
    (line,) = [x for x in evaluate_recipe(run, batch, 20, 0)[0] if x.quantity == "what it bounds, estimated"]
    exact = model.log_prob(batch).mean() + model.log_prob(batch.only("x0", "x1")).mean()
    assert line.value == pytest.approx(exact.item(), abs=1e-9)


# -- findings ------------------------------------------------------------------------------------------------------


def findings(model, guide, batch, objective=None, **options):
    return check(model, guide, objective or tables.elbo(), batch, **{"num_particles": 30, "repeats": 2, **options})


def test_a_site_in_the_guide_only_is_off_by_its_entropy(double):
    model = with_parameters(oracle(2), False)
    batch = model.sample(20)
    extra = dist.Normal(0.0, 3.0)

    def guide(rows):
        with rows.plate():
            pyro.sample("z", model.posterior(rows))
            pyro.sample("extra", extra.expand([len(rows)]))

    found = findings(model, guide, batch)
    assert found.sites.guide_only == ("extra",) and found.sites.model == ("z",)
    assert found.findings[0].startswith("The objective exceeds") or "extra: drawn by the guide" in found.findings[0]
    assert any("extra: drawn by the guide and unknown to the model" in text for text in found.findings)
    # -log q of a normal has a variance of 1/2: 20 draws of 20 rows
    off = found.elbo.bound - model.log_prob(batch).mean().item()
    assert abs(off - extra.entropy().item()) < 4 * (0.5 / 400) ** 0.5


@pytest.mark.parametrize(("objective", "off"), [(tables.elbo(E.IWAE(1)), False), (Trace_ELBO(), True)], ids=kind)
def test_a_site_in_the_model_only_is_off_under_pyros_estimators(objective, off, double):
    base, wide = with_parameters(oracle(2), False), dist.Normal(0.0, 3.0)

    def model(rows):
        with rows.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("extra", wide)
            for name in base.loadings:
                rows.observe(name, lambda z, name=name: base.likelihood(name, z), z)

    batch = base.sample(20)
    found = findings(model, mm.Guide(z=base.posterior), batch, objective)
    assert found.sites.from_prior == ("extra",) and abs(found.elbo.value) < 1e-9
    text = next(text for text in found.findings if text.startswith("extra: in the model only"))
    assert ("no bound" in text) == off
    expected = -wide.entropy().item() if off else 0.0
    assert abs(-found.gap.value - expected) < 4 * (0.5 / 400) ** 0.5


def images(rows=40):
    return mm.Batch({"a": torch.randn(rows, 3), "b": torch.randint(0, 4, (rows,))})


def story_of(decode_b=True, peek=False, name_a="a"):
    a, b = mm.conditionals.Normal(mm.nn.MLP(2, 6, (8,))), mm.conditionals.Categorical(mm.nn.MLP(2, 4, (8,)))
    table = torch.nn.Embedding(4, 2)

    def story(batch):
        with batch.plate():
            loc = table(batch["b"]) if peek else torch.zeros(2)
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            if name_a == "a":
                batch.observe("a", a, z)
            else:
                pyro.sample(name_a, a(z), obs=batch["a"])
            if decode_b:
                batch.observe("b", b, z)

    return story


def guide_of(peek=False, blind=False):
    a, b = mm.conditionals.Normal(mm.nn.MLP(3, 4, (8,))), mm.conditionals.Normal(torch.nn.Embedding(4, 4))
    if peek:

        def guide(batch):
            with batch.plate():
                pyro.sample("z", a(batch["a"]))

        return guide
    return mm.Guide(z=mm.posteriors.ProductOfExperts({"a": a} if blind else {"a": a, "b": b}))


def test_a_right_pair_gives_no_reason():
    found = findings(story_of(), guide_of(), images())
    assert not found.sites.reads_missing and not found.sites.ignored_by_guide
    assert not [text for text in found.findings if "doubtful" not in text and "signal" not in text]
    missing = mm.Batch({"a": torch.randn(40, 3), "b": torch.randint(0, 4, (40,))}, present={"b": torch.rand(40) < 0.5})
    found = findings(story_of(), guide_of(), missing)
    assert not found.sites.reads_missing and not found.sites.ignored_by_guide and found.gap.rows == 40


@pytest.mark.parametrize(
    ("model", "guide", "text"),
    [
        (story_of(peek=True), guide_of(), "b: the story reads its values where they are missing"),
        (story_of(), guide_of(peek=True), "a: the guide reads its values where they are missing"),
        (story_of(), guide_of(blind=True), "b: the guide ignores it: its posterior is the same if b is hidden"),
        (story_of(decode_b=False), guide_of(), "b: the batch has it, and the story never observes it"),
        (story_of(name_a="picture"), guide_of(), "picture: observed under the name of no modality"),
        (story_of(name_a="picture"), guide_of(), "a: the story reads its values where they are missing"),
    ],
)
def test_what_a_story_or_a_guide_sees_and_should_not(model, guide, text):
    found = findings(model, guide, images())
    assert any(finding.startswith(text) for finding in found.findings), found.findings


def test_a_modality_that_the_batch_does_not_hold():
    found = findings(story_of(), guide_of(blind=True), mm.Batch({"a": torch.randn(40, 3)}))
    assert found.sites.unheld == ("b",) and "not in the batch" in repr(found)
    assert set(found.evidence) == {"log p(a)"}


def test_what_cannot_be_evaluated_is_reported():
    batch, story, guide = images(), story_of(), guide_of()

    def outside(rows):
        pyro.sample("level", dist.Normal(0.0, 1.0))
        story(rows)

    def outside_guide(rows):
        pyro.sample("level", dist.Normal(0.0, 1.0))
        guide(rows)

    found = findings(outside, outside_guide, batch)
    assert found.gap is None and found.gradients is None and found.sites.outside == ("level",)
    assert "'level' lies outside the plate 'data'" in found.findings[0]
    found = findings(outside, outside_guide, batch, Trace_ELBO())
    assert found.gap is None and found.gradients is not None and not found.gradients.unused

    def scaled(rows):
        with pyro.poutine.scale(scale=2.0):
            story(rows)

    found = findings(scaled, guide, batch)
    assert found.sites.scaled == ("z", "a", "b") and "scaled by 2.0" in found.findings[0]

    def narrow(rows):
        with rows.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z.reshape(len(rows), 2)
            rows.observe(
                "a", lambda z: dist.Normal(z.sum(-1, keepdim=True).expand(*z.shape[:-1], 3), 1.0).to_event(1), z
            )

    found = findings(narrow, guide_of(blind=True), batch)
    assert "vectorize=False" in found.findings[0] and isinstance(found.errors["the likelihood"], RuntimeError)
    found = findings(narrow, guide_of(blind=True), batch, tables.elbo(vectorize=False))
    assert not found.errors and found.gap is not None


def test_errors_of_a_guide_on_one_modality_alone_are_kept():
    joint = mm.Guide(z=mm.posteriors.ProductOfExperts({"a": mm.conditionals.Normal(mm.nn.MLP(3, 4, (8,)))}))

    def picky(batch):
        if batch.presence("a") is False:
            raise ValueError("there is no a")
        joint(batch)

    found = findings(story_of(), picky, images())
    assert "log p(a)" in found.evidence and str(found.errors["the likelihood of 'b' alone"]) == "there is no a"
    assert found.gap is not None


def test_errors_of_the_story_pass_through():
    def broken(batch):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        findings(broken, guide_of(), images())
    with pytest.raises(ZeroDivisionError, match="mine"):
        findings(story_of(), broken, images())


def test_pyros_estimators_that_are_wrong_for_a_pair():
    def mixture(batch):
        with batch.plate():
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            batch.observe(
                "a", dist.Normal((z.sum(-1) + c)[..., None].expand(*(z.sum(-1) + c).shape, 3), 1.0).to_event(1)
            )

    found = findings(mixture, guide_of(blind=True), images(), Trace_ELBO())
    assert found.sites.summed_out == ("c",) and "Discrete latent site 'c' is in the model only" in found.findings[0]
    ours = findings(mixture, guide_of(blind=True), images())
    assert not ours.errors and not any("'c'" in text for text in ours.findings)
    found = findings(mixture, guide_of(blind=True), images(), TraceMeanField_ELBO())
    assert found.gap is None or found.findings


def test_a_poor_proposal_and_an_unused_parameter_are_found_and_renyi_has_gradients():
    class Story(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = mm.conditionals.Normal(mm.nn.MLP(2, 6, (8,)))
            self.forgotten = torch.nn.Linear(2, 2)

        def forward(self, batch):
            with batch.plate():
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                batch.observe("a", self.decoder, 30 * z)

    batch = mm.Batch({"a": torch.randn(20, 3)})
    objective = RenyiELBO(alpha=0.0, num_particles=2, vectorize_particles=True)
    found = findings(Story(), guide_of(blind=True), batch, objective, num_particles=400)
    assert found.gradients.unused == ("model.forgotten.weight", "model.forgotten.bias")
    assert any("No gradient reaches model.forgotten (2 tensors)" in text for text in found.findings)
    assert any(re.search(r"doubtful.*\d+% in log p\(a\)", text) for text in found.findings)
    assert found.gradients["model.decoder"].signal > 0 and "no gradient" in repr(found)


# -- ArviZ's data --------------------------------------------------------------------------------------------------


def test_arviz_has_the_draws_and_the_data(double):
    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            batch.observe("x", lambda z: dist.Normal(z, 1e-9).to_event(1), z)
            batch.observe("n", lambda z: dist.Poisson(z[..., 0].exp()), z)

    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"x": mm.conditionals.Normal(mm.nn.MLP(2, 4, (8,)))}))
    there = torch.tensor([True, True, False, True])
    batch = mm.Batch(
        {"x": torch.randn(4, 2), "n": torch.tensor([1, 2, 3, 4])},
        present={"x": there, "n": torch.tensor([True, False, False, True])},
        covariates={"dose": torch.arange(4.0)},
    )
    evidence = mm.log_marginal(story, guide, batch, num_particles=50, seed=0)
    data = to_arviz(story, guide, batch, num_samples=600, evidence=evidence, seed=0, prior=True)
    for group, latent in (("posterior", "z"), ("prior", "z"), ("posterior_predictive", "x"), ("prior_predictive", "x")):
        assert data[group][latent].dims == ("chain", "draw", "row", f"{latent}_dim_0")
        assert data[group][latent].shape == (1, 600, 4, 2)
    # of the same latents, whether the modality is there or not
    for one, other in (("posterior", "posterior_predictive"), ("prior", "prior_predictive")):
        np.testing.assert_allclose(data[one]["z"].values, data[other]["x"].values, atol=1e-7)
    values, constant = data["observed_data"], data["constant_data"]
    np.testing.assert_array_equal(values["x"].values[there], batch["x"][there])
    assert np.isnan(values["x"].values[2]).all() and values["n"].dims == ("row",)
    assert values["n"].dtype.kind == "i" and constant["n_present"].values.tolist() == [True, False, False, True]
    assert constant["x_present"].values.tolist() == there.tolist() and constant["dose"].values.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(data["log_likelihood"]["log p(x, n)"].values[0, 0], evidence.log_prob)
    np.testing.assert_array_equal(data["sample_stats"]["pareto_k"].values[0, 0], evidence.pareto_k)
    assert data["posterior"]["row"].values.tolist() == [0, 1, 2, 3]
    # a row that has nothing is of the prior, as are all of them in the prior: moments within 4.5 standard errors
    for draws in (data["posterior"]["z"].values[0, :, 2], data["prior"]["z"].values[0, :, 0]):
        assert np.abs(draws.mean(0)).max() < 4.5 / 600**0.5 and np.abs(draws.var(0) - 1).max() < 4.5 * (2 / 600) ** 0.5
    with torch.no_grad():
        exact = guide.posteriors["z"](batch).base_dist
    draws = data["posterior"]["z"].values[0, :, there.numpy()]
    apart = (draws.mean(1) - exact.loc[there].numpy()) / exact.scale[there].numpy()
    assert np.abs(apart).max() < 4.5 / 600**0.5
    again = to_arviz(story, guide, batch, num_samples=600, seed=0)
    np.testing.assert_array_equal(again["posterior"]["z"].values, data["posterior"]["z"].values)
    with pytest.raises(ValueError, match="the batch's 4 rows, got one of 2"):
        to_arviz(story, guide, batch, evidence=evidence[:2])


@pytest.mark.parametrize("num_samples", [1, 3])
def test_arviz_with_plates_in_a_row_and_what_is_hidden(num_samples, tmp_path):
    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            c = pyro.sample("c", dist.Categorical(torch.ones(3)))
            with pyro.plate("parts", 5, dim=-2):
                pyro.sample("w", dist.Normal(0.0, 1.0))
            batch.observe("x", lambda z, c: dist.Normal(z.sum(-1) + c, 1.0), z, c)
            batch.observe("y", dist.Normal(torch.zeros(()), 1.0).expand([len(batch)]))

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1).expand([len(batch)]))
            with pyro.plate("parts", 5, dim=-2):
                pyro.sample("w", dist.Normal(torch.zeros(5, len(batch)), 1.0))

    batch = mm.Batch({"x": torch.randn(4), "y": torch.randn(4)}).only("x")
    data = to_arviz(story, guide, batch, num_samples=num_samples)
    shapes = {name: x.shape for name, x in data["posterior"].data_vars.items()}
    assert shapes == {"z": (1, num_samples, 4, 2), "c": (1, num_samples, 4), "w": (1, num_samples, 4, 5)}
    assert set(data["observed_data"].data_vars) == {"x"}, "what is hidden is not handed out"
    assert set(data["posterior_predictive"].data_vars) == {"x", "y"}
    data.to_netcdf(str(tmp_path / "data.nc"))


def test_arviz_takes_stories_that_do_not_broadcast():
    """Rows are this story's first dimension. Samples one by one, their modalities with the latents handed out."""

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            batch.observe("x", lambda z: dist.Normal(z[:, 0], 1e-6), z)

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    batch = mm.Batch({"x": torch.randn(4)})
    data = to_arviz(story, guide, batch, num_samples=5, seed=0, prior=True, vectorize=False)
    for group in ("posterior", "prior"):
        z, x = data[group]["z"].values, data[f"{group}_predictive"]["x"].values
        assert z.shape == (1, 5, 4, 2) and len(np.unique(z)) == 40
        np.testing.assert_allclose(x, z[..., 0], atol=1e-4)
    data = to_arviz(story, guide, batch, num_samples=5, resample=True, vectorize=False)
    assert data["posterior"]["z"].shape == (1, 5, 4, 2)


def test_resampled_draws_are_nearer_to_the_posterior(double):
    model = with_parameters(oracle(2, latent=1), False)
    batch = model.sample(3)
    wide = mm.Guide(z=lambda rows: dist.Normal(torch.zeros(rows.size, 1), 2.0).to_event(1))
    data = to_arviz(model, wide, batch, num_samples=400, resample=True, seed=0)
    draws, exact = data["posterior"]["z"].values[0, :, :, 0], model.posterior(batch)
    # 400 of 1000 draws by weight, with some hundred effective ones: 5 standard errors of 100
    apart = (draws.mean(0) - exact.loc[:, 0].numpy()) / exact.stddev[:, 0].numpy()
    assert np.abs(apart).max() < 0.5
