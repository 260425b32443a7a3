"""The report of a check: gaps against exact likelihoods, findings, and the caller's state."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO

import pyro_mm as mm
from pyro_mm.diagnostics.bound_gap import NUM_DRAWS, objective_gap, target_evidence
from pyro_mm.diagnostics.pair_check import check
from pyro_mm.experiments.evaluation import evaluate_recipe
from pyro_mm.objectives import ALL, EACH, Term
from tests.support.linear_gaussian import encoders, every_pattern, oracle

tables, E = mm.objectives, mm.estimators


def kind(x):
    return type(getattr(x, "estimator", x)).__name__ if not isinstance(x, bool) else str(x)


def test_a_check_leaves_the_callers_state_alone():
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
    model = oracle(2).requires_grad_(False)
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
    model = oracle(2).requires_grad_(False)
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


def test_the_gap_is_that_of_the_weights_after_warm_up(double):
    model = oracle(2).requires_grad_(False)
    guide, batch = mm.Guide(z=mm.posteriors.ProductOfExperts(encoders(model))), model.sample(10)
    options = {"num_particles": 50, "repeats": 2}
    cold = check(model, guide, tables.elbo(kl=tables.warm_up(100)), batch, **options)
    plain = check(model, guide, tables.elbo(), batch, **options)
    assert cold.gap == plain.gap
    # the gradient is that of the present step, at which the KL weighs nothing
    assert cold.gradients.groups != plain.gradients.groups


def test_an_objective_that_bounds_no_sum_of_evidences_has_no_gap(double):
    model = oracle(2).requires_grad_(False)
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
    model = oracle(3, latent=1).requires_grad_(False)
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


def test_an_objective_is_evaluated_once_for_its_terms_and_its_gap_if_the_bound_holds_for_all_rows(monkeypatch):
    """Of mvae it holds for the rows that have every modality."""
    model = oracle(2).requires_grad_(False)
    objective = tables.mvae()
    evaluations = []
    evaluate = tables.Objective.evaluate

    def counted(self, model, guide, batch, *, step):
        if not torch.is_grad_enabled():
            evaluations.append(batch.size)
        return evaluate(self, model, guide, batch, step=step)

    monkeypatch.setattr(tables.Objective, "evaluate", counted)
    complete = model.sample(6)
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts(encoders(model)))
    found = check(model, guide, objective, complete, num_particles=50, repeats=2)
    assert evaluations == [6] * NUM_DRAWS
    target = objective.bounds(complete.names)
    known = {evidence.quantity: evidence for evidence in found.evidence.values()}
    wanted = {frozenset(complete.names): "log p(x0, x1)"} | {frozenset({n}): f"log p({n})" for n in complete.names}
    separate = objective_gap(target, objective, model, guide, complete, lambda names: known[wanted[names]], seed=0)
    assert found.gap == separate

    evaluations.clear()
    incomplete = mm.Batch({n: complete[n] for n in complete}, present={"x0": [True] * 4 + [False] * 2})
    found = check(model, guide, objective, incomplete, num_particles=50, repeats=2)
    assert found.gap.rows == 4 and evaluations == [6] * NUM_DRAWS + [4] * NUM_DRAWS


def test_the_command_lines_table_sums_the_evidences_that_a_check_sums(double):
    """With three modalities; a table that has a term on two of them needs an evidence of its own."""
    model = oracle(3).requires_grad_(False)
    guide, batch = mm.Guide(z=model.posterior), model.sample(6)
    objective = tables.Objective([tables.Term(tables.ALL, tables.ALL), tables.Term(("x0", "x1"), ("x0", "x1"), kl=2.0)])
    run = mm.recipes.Recipe(model, guide, objective)
    lines, _ = evaluate_recipe(run, batch, 20, 0, fitted=False)  # the guide's weights are equal
    (line,) = [x for x in lines if x.quantity == "what it bounds, estimated"]
    exact = model.log_prob(batch).mean() + model.log_prob(batch.only("x0", "x1")).mean()
    assert line.value == pytest.approx(exact.item(), abs=1e-9)


# -- findings ------------------------------------------------------------------------------------------------------


def findings(model, guide, batch, objective=None, **options):
    return check(model, guide, objective or tables.elbo(), batch, **{"num_particles": 30, "repeats": 2, **options})


def test_a_site_in_the_guide_only_is_off_by_its_entropy(double):
    model = oracle(2).requires_grad_(False)
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
    base, wide = oracle(2).requires_grad_(False), dist.Normal(0.0, 3.0)

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
def test_a_story_or_guide_that_reads_hidden_values_is_reported(model, guide, text):
    found = findings(model, guide, images())
    assert any(finding.startswith(text) for finding in found.findings), found.findings


def test_a_check_names_a_modality_that_the_batch_does_not_hold():
    found = findings(story_of(), guide_of(blind=True), mm.Batch({"a": torch.randn(40, 3)}))
    assert found.sites.unheld == ("b",) and "not in the batch" in repr(found)
    assert set(found.evidence) == {"log p(a)"}


def test_a_check_reports_evaluations_that_fail():
    batch, story, guide = images(), story_of(), guide_of()

    def outside(rows):
        pyro.sample("level", dist.Normal(0.0, 1.0))
        story(rows)

    def outside_guide(rows):
        pyro.sample("level", dist.Normal(0.0, 1.0))
        guide(rows)

    found = findings(outside, outside_guide, batch)
    assert found.gap is None and found.gradients is None and found.sites.outside == ("level",)
    assert any("'level' lies outside the plate 'data'" in text for text in found.findings)
    found = findings(outside, outside_guide, batch, Trace_ELBO())
    assert found.gap is None and found.gradients is not None and not found.gradients.unused
    assert "given 'level'" in found.remark and set(found.evidence) > {"log p(a, b)"}

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
