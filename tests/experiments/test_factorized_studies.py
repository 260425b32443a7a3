"""Studies of factorised representations on a few rows: every row trains and is measured, and scores are right."""

import json
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pyro_mm as mm
import pyro_mm.experiments.reproduce as command
from pyro_mm.cli import app
from pyro_mm.datasets import simulated
from pyro_mm.experiments.studies import ablations, factorized, fusion_baselines, known_factors, prediction_scores
from pyro_mm.experiments.studies.prediction_scores import Truth
from pyro_mm.experiments.studies.study import Sample
from pyro_mm.recipes import mfm

SMALL = {"latent": 2, "hidden": (8,), "private": 2, "generation": 1.0}


def vectors(n, seed=0):
    """Rows whose class is the sign of an entry that both modalities show, some of which lack a modality."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(n, 1, generator=generator)
    values = {name: shared + 0.3 * torch.randn(n, 3, generator=generator) for name in ("a", "b")}
    return mm.Batch(values | {"label": (shared[:, 0] > 0).long()}, {"b": torch.arange(n) % 7 != 0})


def sequences(n, seed=0):
    """Rows with series of unequal lengths, and ratings in standard units."""
    found = simulated.factors(n, label="real", seed=1, part=seed).batch
    values = {"series": found["series"], "image": found["image"], "label": torch.stack([found["label"]] * 2, -1)}
    return mm.Batch(values, lengths={"series": found.lengths["series"]})


def samples(rows, scale=None):
    train, test, validation = (rows(n, seed) for seed, n in enumerate((40, 20, 20)))
    return lambda seed, directory: Sample(train, test, Truth(scale, validation))


STUDIES = {
    "a class": (factorized.MOSI, samples(vectors), ("a", "b")),
    "ratings": (factorized.MMMO, samples(sequences, torch.tensor([2.0, 3.0])), ("image", "series")),
}


@pytest.mark.parametrize("name", STUDIES)
def test_rows_of_a_study_are_trained_and_measured(name, monkeypatch, tmp_path):
    study, draw, names = STUDIES[name]
    chosen = ("MFM", "variational twin", "late fusion")
    members = {row: make for row, make in factorized.members(**SMALL).items() if row in chosen}
    small = replace(
        study,
        groups={"few": draw},
        members=members,
        known=factorized.known(*names),
        published={},
    )
    monkeypatch.setattr(prediction_scores, "DRAWS", 3)
    monkeypatch.setattr(command, "STUDIES", {"small": small})
    options = ["--epochs", "1", "--seeds", "1", "--no-compile", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, ["reproduce", "small", *options])
    assert result.exit_code == 0, result.output
    first = "accuracy" if name == "a class" else "MAE"
    assert ("best of 1 epochs on validation rows" in result.output) == (small.validate is not None)
    for row in [*small.known, *small.members]:
        (path,) = (tmp_path / "few" / row).glob("measured-*.json")
        found = json.loads(path.read_text())
        assert all(math.isfinite(value) for value in found.values()), row
        assert first in found
        if row in small.members:
            assert ("epoch" in found) == ("best-of" in path.name) == (small.validate is not None)
            assert (f"error of {names[0]}" in found) == (row != "late fusion")
        assert ("alone" in row or "constant" in row or "most" in row) or f"{first}, no {names[1]}" in found


def test_the_studies_have_the_rows_of_the_paper_and_what_the_library_has_beside_them():
    for study in (factorized.MOSI, factorized.MMMO, factorized.POM, factorized.DIGITS, known_factors.FACTORS):
        assert {"MFM", "missing paths untrained", "variational twin", "late fusion", "no generation"} <= {
            *study.members
        }
        paper = [name[:3] for name in study.members if name.startswith("M_")]
        assert paper == ["M_A", "M_C", "M_D"] if study is known_factors.FACTORS else ["M_A", "M_B", "M_C", "M_D"]
        assert study.seeds == 5 and "regression" in study.known
        assert (study.validate is None) == (study is factorized.MOSI), "MOSI has no clean rows for validation"


@pytest.mark.parametrize("row", factorized.members(**SMALL))
def test_every_row_has_a_loss_on_rows_that_lack_a_modality(row):
    torch.manual_seed(0)
    rows = vectors(12)
    model, guide, objective = factorized.members(**SMALL)[row](rows)
    objective.differentiable_loss(model, guide, rows).backward()
    found = [p.grad for module in (model, guide) for p in module.parameters() if p.grad is not None]
    assert found and all(grad.isfinite().all() for grad in found)


def test_scores_of_labels_by_hand():
    classes = prediction_scores.label_scores(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 1]), None)
    # F1 of class 0 is 2/3, of class 1 is 4/5, each of two rows
    assert classes == {"accuracy": pytest.approx(0.75), "F1": pytest.approx((2 / 3 + 4 / 5) / 2)}
    true = np.array([[0.0, 1.0], [1.0, 0.0], [2.0, 5.0]])
    wrong = np.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    found = prediction_scores.label_scores(wrong, true, torch.tensor([2.0, 3.0]))
    assert found == {"MAE": pytest.approx((2 * 1 + 3 * 5 / 3) / 2), "r": pytest.approx(0.5)}  # a constant has r = 0


def test_the_error_of_a_missing_modality_is_one_for_its_mean_and_zero_for_itself():
    """A story whose decoder ignores its factors, and one that was given the values."""
    rows = vectors(30)
    rows = mm.Batch({n: rows[n] for n in rows.names})
    torch.manual_seed(0)
    run = mfm(rows, **SMALL)
    mean = rows["a"].mean(0)

    class Fixed(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, *parents):
            lead = parents[0].shape[:-2]
            return torch.distributions.Normal(self.value.expand(*lead, 30, 3), 1.0)

    for value, expected in ((mean, 1.0), (rows["a"], 0.0)):
        run.model.decoders["a"] = Fixed(value)
        assert prediction_scores.missing_errors(run, rows, rows, 0)["error of a"] == pytest.approx(expected, abs=1e-6)


def test_features_of_sequences_are_means_over_valid_steps():
    rows = sequences(10)
    found = fusion_baselines.features(rows, "series", None)
    lengths = rows.lengths["series"]
    for n in range(10):
        np.testing.assert_allclose(found[n], rows["series"][n, : lengths[n]].mean(0).numpy(), rtol=1e-5)
    padded = rows.replaced({"series": rows["series"] + 9 * (torch.arange(12) >= lengths[:, None])[..., None]})
    np.testing.assert_array_equal(fusion_baselines.features(padded, "series", None), found)


def test_the_error_of_a_ridge_regression_is_the_share_of_variance_that_is_left():
    """Of three entries with variance 1.09 a shared one explains 1: seen with a ninth of the noise, all but 0.11."""
    found = fusion_baselines.ridge_errors(Sample(vectors(3000), vectors(3000, 1), Truth()))
    # noise 0.09, and that of the mean of three entries, 0.03 times its slope near 1
    assert found == {
        name: pytest.approx((0.09 + 0.03 / 1.03) / 1.09, abs=0.01) for name in ("error of a", "error of b")
    }


def test_late_fusion_sums_what_the_modalities_say():
    torch.manual_seed(0)
    rows = vectors(8)
    rows = mm.Batch({n: rows[n] for n in rows.names})
    run = fusion_baselines.late_fusion(rows, 2, (8,))
    both, a, b = (mm.encode(run.guide, rows.only(*names))["z"].mean for names in (("a", "b"), ("a",), ("b",)))
    torch.testing.assert_close(both, a + b)


def test_without_a_shared_factor_z_generates_nothing():
    torch.manual_seed(0)
    rows = vectors(8)
    run = ablations.without_shared_factor(rows, **SMALL)
    found = {"z": torch.randn(8, 2), "w_a": torch.randn(8, 2), "w_b": torch.randn(8, 2)}
    before, after = (run.model.decode(found | {"z": z}) for z in (found["z"], found["z"] + 1))
    assert torch.equal(before["a"].mean, after["a"].mean)
    assert not torch.equal(before["label"].logits, after["label"].logits)


def test_known_factors_are_found_in_a_short_training():
    """z has the label and each w_m does not, by a margin of 0.25 already; a swap changes its modality and no other."""
    parts = [simulated.factors(n, seed=0, part=part).batch for part, n in enumerate((600, 300))]
    names = ("image", "series")
    train, test = (
        mm.Batch({"image": b["image"], "series": b["series"].flatten(1), "label": b["label"]}) for b in parts
    )
    torch.manual_seed(0)
    run = mfm(train, latent=2, hidden=(32,), private=2, generation=1.0, reconstruct_missing=False)
    adam = partial(torch.optim.Adam, lr=1e-2)
    mm.fit(*run, train, epochs=30, batch_size=100, optimizer=adam, seed=0, progress=False)
    sample = Sample(train, test, Truth())
    found = known_factors.label_in_latents(run, sample, names, 0)
    assert found["margin"] > 0.25
    effects = known_factors.swap_effects(run, test, names, 0)
    assert effects["swap, own"] > 0.1 and effects["swap, others"] == 0


def test_the_factors_of_ablations_see_what_the_paper_says():
    torch.manual_seed(0)
    rows = vectors(8)
    rows = mm.Batch({n: rows[n] for n in rows.names})
    settings = SMALL | {"private": {"a": 3, "b": 5}}
    first, second = slice(0, 2), slice(2, 6)  # latent 2, and the mean of 3 and 5

    def changed(run, places):
        """The modalities and labels that change with some factors."""
        factor = torch.randn(8, run.model.factor.blocks[-1].stop)
        other = factor.clone()
        other[:, places] += 1
        before, after = run.model.decode({"z": factor}), run.model.decode({"z": other})
        value = {"a": "mean", "b": "mean", "label": "logits"}
        return {n for n in before if not torch.equal(getattr(before[n], value[n]), getattr(after[n], value[n]))}

    one = ablations.one_generative_factor(rows, **settings)
    assert changed(one, first) == {"a", "b", "label"} and changed(one, second) == {"a", "b"}

    none = ablations.without_joint_factor(rows, **settings)
    assert changed(none, slice(0, 3)) == {"a", "label"} and changed(none, slice(3, 8)) == {"b", "label"}
    before, after = (mm.encode(none.guide, x)["z"].mean for x in (rows, rows.replaced({"a": rows["a"] + 1})))
    assert (before != after).any(0).tolist() == 3 * [True] + 5 * [False]

    alone = ablations.label_alone(rows, **settings)
    assert set(alone.model.decoders) == {"label"}
    assert {term.decode for term in alone.objective.terms} == {("label",), ()}
    assert not any(term.kind for term in alone.objective.terms)


def test_the_mmd_of_codes_side_by_side_is_the_sum_of_theirs():
    torch.manual_seed(0)
    x, y = torch.randn(2, 30, 7, dtype=torch.float64)
    blocks = [slice(0, 3), slice(3, 7)]
    mmd = partial(mm.distributions.squared_mmd, unbiased=False)
    each = [mmd(x[:, b], y[:, b], bandwidth=size / 2**0.5) for b, size in zip(blocks, (3, 4), strict=True)]
    torch.testing.assert_close(mmd(x, y, kernel=ablations.SumOfKernels(blocks)), sum(each))


@pytest.mark.parametrize("row", ["MFM", "M_D: M_B without generation and MMD", "variational twin", "late fusion"])
@pytest.mark.parametrize("kind", ["a class", "ratings"])
def test_the_validation_score_is_that_of_predictions_from_all_and_from_all_but_each(row, kind, monkeypatch):
    """Many draws: of the two ways to predict one has all modalities decoded, and draws of its own."""
    torch.manual_seed(0)
    scale = None if kind == "a class" else torch.tensor([2.0, 3.0])
    rows = {"a class": vectors, "ratings": sequences}[kind](30, 2)
    run = factorized.members(**SMALL)[row](rows)
    for draws in ("VALIDATION_DRAWS", "DRAWS"):
        monkeypatch.setattr(prediction_scores, draws, 2000)
    found = prediction_scores.validation_score(run, Sample(rows, rows, Truth(scale, rows)), 0)
    each = []
    for given in prediction_scores.given_sets(rows).values():
        error = prediction_scores.predict_label(run, rows, given, 0) - rows["label"].numpy()
        each.append((error == 0).mean() if scale is None else -np.abs(error).mean())
    assert found == pytest.approx(sum(each) / 3, abs=0.02)
