"""Means are over the rows that have what is asked for: the 0 of a row that lacks it would dilute them."""

import math

import pyro
import pytest
import torch

import pyro_mm as mm
from pyro_mm.experiments.evaluation import evaluate_recipe


def partial_rows(rows=36):
    """Rows of which every fifth lacks b, every seventh lacks a, and some lack both; the exact log-likelihoods."""
    torch.manual_seed(0)
    story = mm.models.LinearGaussian({"a": torch.randn(3, 2), "b": torch.randn(2, 2)}, 0.7)
    whole, index = story.sample(rows), torch.arange(rows)
    batch = mm.Batch({n: whole[n] for n in whole}, present={"a": index % 7 > 0, "b": index % 5 > 0})
    guide = lambda batch: posterior(story, batch)  # noqa: E731
    return story.requires_grad_(False), guide, batch


def posterior(story, batch):
    with batch.plate():
        pyro.sample("z", story.posterior(batch))


QUANTITIES = {
    "log_marginal": (lambda m, g, b: mm.log_marginal(m, g, b, num_particles=4, seed=0), ("a", "b"), ()),
    "of one": (lambda m, g, b: mm.log_marginal(m, g, b.only("b"), num_particles=4, seed=0), ("b",), ()),
    "log_conditional": (
        lambda m, g, b: mm.log_conditional(m, g, b, target="b", given="a", num_particles=4, seed=0), ("b",), ("a",)
    ),
    "without given": (lambda m, g, b: mm.log_conditional(m, g, b, target="b", num_particles=4, seed=0), ("b",), ()),
    "joint": (
        lambda m, g, b: mm.protocols.joint(m, g, b, ["b"], ["a"], num_particles=4, seed=0), ("a", "b"), ()
    ),
    "single": (lambda m, g, b: mm.protocols.single(m, g, b, ["b"], num_particles=4, seed=0), ("b",), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTITIES)
def test_a_mean_is_over_the_rows_that_have_the_target(name):
    evaluate, target, given = QUANTITIES[name]
    story, guide, batch = partial_rows()
    found = evaluate(story, guide, batch)
    rows = torch.stack([batch.present[n] for n in target]).any(0)
    exact = story.log_conditional(batch, target, given)[rows]
    assert found.counted.tolist() == rows.tolist() and 0 < rows.sum() < len(rows)
    assert found.mean()[0] == pytest.approx(exact.mean().item(), abs=1e-4)
    assert f"mean of {int(rows.sum())} of 36 rows" in repr(found) and f"{int(rows.sum())} of 36 rows" in found.summary()
    assert found[rows].mean() == pytest.approx(found.mean()) and found[rows].log_prob.shape == exact.shape
    assert math.isnan(found[~rows].mean()[0])


def test_annealed_means_are_over_the_rows_that_have_anything():
    story, guide, batch = partial_rows(8)
    options = {"num_chains": 2, "temperatures": 4, "pilot_chains": 2, "seed": 0}
    batch = batch.only("b")
    found = mm.annealed_importance(story, guide, batch, **options)
    assert found.counted.tolist() == batch.present["b"].tolist()
    assert found.mean()[0] == pytest.approx(story.log_prob(batch)[batch.present["b"]].mean().item(), abs=1e-3)
    lower, upper = mm.bidirectional(story, guide, batch, **options)
    assert lower.counted.tolist() == upper.counted.tolist() == batch.present["b"].tolist()


def test_the_bidirectional_score_counts_the_rows_that_have_both():
    story, guide, batch = partial_rows()
    found = mm.protocols.both_ways(story, guide, batch, ["b"], ["a"], num_particles=4, seed=0)
    rows = batch.having(every=True)
    exact = story.log_conditional(batch, ["b"], ["a"]) + story.log_conditional(batch, ["a"], ["b"])
    assert found.counted.tolist() == rows.tolist()
    assert found.mean()[0] == pytest.approx(exact[rows].mean().item(), abs=1e-4)


def test_a_comparison_is_over_the_rows_that_have_the_target():
    story, guide, batch = partial_rows()
    options = {"target": "b", "given": "a", "num_particles": 4, "seed": 0}
    found = mm.compare({"one": (story, guide), "two": (story, guide)}, batch, **options)
    rows = batch.present["b"]
    exact = story.log_conditional(batch, ["b"], ["a"])[rows].mean().item()
    assert [c.mean for c in found.candidates] == pytest.approx([exact] * 2, abs=1e-4)
    assert found.rows.tolist() == rows.tolist() and f"Means over {int(rows.sum())} of 36 rows" in repr(found)
    with pytest.raises(ValueError, match="no row has what is compared"):
        mm.compare({"one": (story, guide), "two": (story, guide)}, batch.without("b"), **options)


def test_a_check_compares_bounds_and_evidence_over_the_same_rows():
    """The guide is the exact posterior, so that the gap of the ELBO is 0 whatever rows lack."""
    story, guide, batch = partial_rows()
    found = mm.check(story, guide, mm.objectives.elbo(), batch, num_particles=8, repeats=2)
    rows = batch.having()
    assert found.gap.rows == found.elbo.rows == int(rows.sum()) < 36
    exact = story.log_prob(batch)[rows].mean().item()
    for gap in (found.gap, found.elbo):
        assert gap.evidence == pytest.approx(exact, abs=1e-4) and gap.value == pytest.approx(0, abs=1e-3)
    assert f"log p(a, b), {int(rows.sum())} of 36 rows" in repr(found)


@pytest.mark.parametrize("table", ["elbo", "mvae"])
def test_a_report_is_over_the_rows_that_have_what_a_line_is_of(table):
    """Under the exact posterior every bound equals its evidence: the joint one, and that of complete rows."""
    story, guide, batch = partial_rows(24)
    recipe = mm.recipes.Recipe(story, guide, getattr(mm.objectives, table)())
    lines, _ = evaluate_recipe(recipe, batch, 4, 0, fitted=False)  # the guide's weights are equal
    found = {line.title: line.value for line in lines}
    some, b, whole = batch.having(), batch.present["b"], batch.having(every=True)
    exact = story.log_prob(batch)
    assert found[f"log p(a, b), {int(some.sum())} of 24 rows"] == pytest.approx(exact[some].mean().item(), abs=1e-4)
    of_b = story.log_prob(batch.only("b"))[b].mean().item()
    assert found[f"log p(b), {int(b.sum())} of 24 rows"] == pytest.approx(of_b, abs=1e-4)
    assert found["ELBO, below log p(a, b)"] == pytest.approx(exact[some].mean().item(), abs=1e-3)
    bounded = exact[some].mean().item()
    if table == "mvae":
        parts = (story.log_prob(batch.only(*names))[whole].mean().item() for names in (("a", "b"), ("a",), ("b",)))
        bounded = sum(parts)
    assert found["training objective (see below)"] == pytest.approx(bounded, abs=1e-3)
    assert found["what it bounds, estimated"] == pytest.approx(bounded, abs=1e-3)
