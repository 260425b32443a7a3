"""Values that notebooks show: the tables hold their numbers, are well formed, and escape every text."""

import math
from html.parser import HTMLParser

import pytest
import torch

import pyro_mm as mm
from pyro_mm.evidence.accumulator import evidence_from_weights
from pyro_mm.objectives.terms import EACH, EVERY, OTHERS, PRIOR, Term

NAME = "<b>a & b</b>"


class Page(HTMLParser):
    """The cells of tables and the text of a page, whose tags have to be closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.rows, self.text = [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def page(value):
    return Page(value._repr_html_())


def test_a_batch_shows_masks_covariates_and_lengths():
    batch = mm.Batch(
        {
            NAME: torch.tensor([[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]),
            "text": torch.arange(12).reshape(3, 4),
            "none": None,
        },
        {NAME: [True, True, False]},
        covariates={"site": torch.arange(3)},
        lengths={"text": [4, 1, 2]},
    )
    found = page(batch)
    assert [NAME, "2", "float32", "1 to 4", "2 of 3 (67%)", ""] in found.rows
    assert ["text", "4", "int64", "0 to 9", "all", "1 to 4"] in found.rows
    assert ["none", "not known", "", "", "0 of 3 (0%)", ""] in found.rows
    assert ["site", "one number", "int64", "0 to 2"] in found.rows
    assert found.text.startswith("Batch of 3 rows on cpu")
    plain = page(mm.Batch({"x": torch.tensor([True, False])}))
    assert plain.rows == [["modality", "shape of a row", "type", "values", "present"],
                          ["x", "one number", "bool", "50% true", "all"]]  # fmt: skip


def test_a_missing_step_behind_the_end_is_no_value_of_a_batch():
    values = torch.tensor([[[1.0], [math.nan]], [[2.0], [5.0]]])
    assert ["x", "2 × 1", "float32", "1 to 5", "all", "1 to 2"] in page(
        mm.Batch({"x": values}, lengths={"x": [1, 2]})
    ).rows


@pytest.mark.parametrize(
    ("term", "equation", "weights"),
    [
        (Term("a", ["a", "b"]), "Eq(z | a) log p(a, b | z) − KL( q(z | a) ‖ p(z) )", ""),
        (Term("a", (), "b", kl=0.5), "− KL( q(z | a) ‖ q(z | b) )", "KL 0.5"),
        (Term(PRIOR, "a"), "Ep(z) log p(a | z)", ""),
        (Term(EACH, OTHERS, average=True), "meanm Eq(z | xm) log p(x∖m | z) − KL( q(z | xm) ‖ p(z) )", ""),
        (Term(EVERY, (), PRIOR), "∑S − KL( q(z | xS) ‖ p(z) )", ""),
        (Term("a", "b", likelihood=2, freeze_decoder=True), None, "likelihood 2, decoders frozen"),
        (Term(NAME, NAME), f"Eq(z | {NAME}) log p({NAME} | z) − KL( q(z | {NAME}) ‖ p(z) )", ""),
    ],
)
def test_a_term_is_typeset_with_its_weights_beside(term, equation, weights):
    (_, row) = page(mm.objectives.Objective([term])).rows
    assert row == [row[0] if equation is None else equation, weights]


def test_an_objective_says_what_it_bounds_and_waits_for_names_it_needs():
    assert "Target: lower bound on log p(x)." in page(mm.objectives.elbo()).text
    assert "The terms depend on the modalities" in page(mm.objectives.mmjsd()).text
    assert "MMD(z" in page(mm.objectives.elbo() + mm.objectives.MMD("z")).text
    assert "1 are decoded per step" in page(mm.objectives.elbo().subsampled(1)).text


@pytest.mark.parametrize("table", sorted(mm.objectives.__all__))
def test_every_objective_has_a_table(table):
    make = getattr(mm.objectives, table)
    if not callable(make) or table[0].isupper():
        return
    try:
        objective = make()
    except TypeError:
        return
    if hasattr(objective, "_repr_html_"):
        assert page(objective).text


def test_evidence_shows_its_mean_and_its_summary():
    evidence = evidence_from_weights(torch.randn(64, 5, generator=torch.Generator().manual_seed(0)), f"log p({NAME})")
    found = page(evidence)
    mean, error = evidence.mean()
    row = found.rows[1]
    assert row[:4] == [f"log p({NAME})", f"{mean:.3f} ± {error:.3f}", "5", "64"]
    assert row[5:] == [f"{evidence.untrusted():.1%}", str(int(evidence.doubtful.sum()))]
    assert evidence.summary() in found.text
    assert page(evidence[:1]).rows[1][2] == "1"


def test_a_history_shows_the_best_epoch_of_each_column():
    history = mm.History()
    assert "no epoch" in page(history).text
    for loss, term in ((3.0, -3.0), (1.0, math.nan), (2.0, -1.0)):
        history.append({"loss": loss, NAME: term})
    found = page(history)
    assert found.rows[1:] == [["loss", "3", "1 (epoch 2)", "2", ""], [NAME, "-3", "-1 (epoch 3)", "-1", ""]]
    assert history._repr_html_().count("<polyline") == 2


def test_a_comparison_and_a_check_show_their_tables_and_remarks():
    weights = [torch.randn(64, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    evidence = {
        NAME: evidence_from_weights(weights[0], "log p(x)"),
        "c": evidence_from_weights(weights[1] - 2, "log p(x)"),
    }
    comparison = mm.compare(evidence)
    found = page(comparison)
    best, other = comparison.candidates
    assert found.rows[1][:3] == [NAME, f"{best.mean:.3f} ± {best.error:.3f}", "reference"]
    assert found.rows[2][2:5] == [
        f"{other.difference:+.3f}", f"{other.paired_error:.3f}", f"{other.estimation_error:.3f}"
    ]  # fmt: skip
    assert all(remark in found.text for remark in comparison.remarks())

    model = mm.models.LinearGaussian({"x": torch.ones(3, 2)})
    check = mm.check(
        model, mm.Guide(z=model.posterior), mm.objectives.elbo(), model.sample(6), num_particles=30, seed=0
    )
    found = page(check)
    assert all(sentence in found.text for sentence in check.findings)
    assert [e.quantity for e in check.evidence.values()] == [row[0] for row in found.rows if row[0].startswith("log p")]
    assert repr(check) in found.text
