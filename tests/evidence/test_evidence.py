"""The sums behind an estimate, its diagnostics, and what it says in words."""

import math

import numpy as np
import pytest
import torch

from pyro_mm.evidence.accumulator import WeightAccumulator, evidence_from_weights
from pyro_mm.evidence.evidence import Evidence, concatenate


@pytest.fixture
def log_w(double):
    return 3 * torch.randn(1000, 7) - 50


@pytest.mark.parametrize("group", [1, 4, 7, 300])
@pytest.mark.parametrize("blocks", [(1000,), (1, 2, 3, 994), (333, 333, 334), (5,) * 200])
def test_sums_are_those_of_all_weights_however_they_come(group, blocks, log_w):
    """Against the formulas on the whole array: 7 and 300 leave a smaller last group."""
    sums = WeightAccumulator(1000, group)
    for part in log_w.split(blocks):
        sums.add(part)
    found = sums.evidence("log p(x)")
    w = log_w.exp()
    torch.testing.assert_close(found.log_prob, w.mean(0).log(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.ess, w.sum(0) ** 2 / (w**2).sum(0), rtol=1e-12, atol=0)
    groups, m = w.split(group), w.mean(0)
    spread = sum((part.sum(0) - len(part) * m) ** 2 for part in groups)
    error = (spread * len(groups) / (len(groups) - 1)).sqrt() / (1000 * m)
    torch.testing.assert_close(found.standard_error, error, rtol=1e-9, atol=0)
    assert list(found.running) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
    torch.testing.assert_close(found.running[64][0], w[:64].mean(0).log(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.running[1000][1], found.standard_error)
    assert found.running[1][1].isnan().all()
    torch.testing.assert_close(found.pareto_k, evidence_from_weights(log_w, "").pareto_k, rtol=1e-12, atol=0)


def test_constant_weights_are_known_exactly(double):
    found = evidence_from_weights(torch.full((100, 3), -700.0), "log p(x)")
    assert found.log_prob.eq(-700).all() and found.standard_error.max() < 1e-7 and found.pareto_k.eq(0).all()
    assert not found.doubtful.any() and "No row gives reason for doubt" in found.summary()


def test_rounding_of_constant_weights_gives_no_pareto_k():
    """In single precision a constant log-weight wobbles in its last place, and that has no k-hat."""
    log_w = torch.full((1000, 5), -123.4) + 1e-5 * torch.randn(1000, 5)
    assert evidence_from_weights(log_w, "log p(x)").pareto_k.eq(0).all()
    assert evidence_from_weights(log_w.double(), "log p(x)").pareto_k.ne(0).all()


def test_the_summary_names_doubtful_rows(double):
    torch.manual_seed(0)
    log_w = torch.cat([0.3 * torch.randn(1000, 6), 6 * torch.randn(1000, 2)], 1)
    found = evidence_from_weights(log_w, "log p(a | b)")
    assert found.doubtful.tolist() == [False] * 6 + [True] * 2
    text = found.summary()
    assert "log p(a | b): " in text and "mean of 8 rows, K = 1000" in text
    assert "Trusted: 6 rows (75.0%)" in text and "Not to be trusted: 2 rows (25.0%): 2 with k-hat > 0.7" in text
    assert "Trusted: 1 row (33.3%)." in found[torch.tensor([0, 6, 7])].summary()
    assert "row 6: " in text and "row 7: " in text and "row 5: " not in text and "annealed_importance" in text
    assert "row 7" not in found.summary(worst=1) or "row 6" not in found.summary(worst=1)
    assert "Too few draws for k-hat" in evidence_from_weights(log_w[:8], "log p(x)").summary()
    assert found.untrusted() == 0.25 and math.isnan(evidence_from_weights(log_w[:8], "").untrusted())
    assert "too few for k-hat" in repr(evidence_from_weights(log_w[:8], ""))


def test_a_row_without_finite_weights_is_told_apart_from_too_few_draws(double):
    """One row of zeros, one with a NaN, and one with an infinity, among rows that are well and one that is not."""
    torch.manual_seed(0)
    log_w = torch.cat([0.3 * torch.randn(1000, 6), 6 * torch.randn(1000, 1)], 1)
    log_w[:, 2], log_w[5, 3], log_w[7, 4] = -math.inf, math.nan, math.inf
    found = evidence_from_weights(log_w, "log p(x)")
    assert not found.few and found.lost.tolist() == [False, False, True, True, True, False, False]
    assert found.doubtful.tolist() == [False, False, True, True, True, False, True]
    assert found.untrusted() == pytest.approx(4 / 7)
    assert "k-hat > 0.7 in 57.1%, 3 rows without finite weights" in repr(found)
    text = found.summary()
    assert "Too few" not in text and "Without finite weights: 3 rows (2, 3, 4). All weights are zero" in text
    assert "Trusted: 3 rows (42.9%)" in text and "Not to be trusted: 1 row (14.3%): 1 with k-hat > 0.7" in text
    assert "row 6: " in text and "row 2: " not in text
    assert "rows (2, ..)" in found.summary(worst=1)
    well = found[:4].summary()
    assert "2 rows (2, 3)" in well and "No other row gives reason for doubt." in well
    assert "reason for doubt" not in found[2:5].summary() and "Trusted" not in found[2:5].summary()
    few = evidence_from_weights(log_w[:8], "log p(x)")
    assert few.few and math.isnan(few.untrusted()) and "Too few" in few.summary()
    assert "Without finite weights: 3 rows" in few.summary()
    assert "too few for k-hat, 3 rows without finite weights" in repr(few)


def test_a_row_is_an_integer_of_any_kind(log_w):
    found = evidence_from_weights(log_w, "log p(x)")
    for row in (2, np.int64(2), np.array(2), torch.tensor(2), -5):
        assert len(found[row]) == 1 and torch.equal(found[row].log_prob, found.log_prob[2:3])
        assert found[row].running[64][0].shape == (1,)
    for rows in ([0, 2], np.array([0, 2]), torch.tensor([0, 2]), slice(0, 3, 2)):
        assert torch.equal(found[rows].log_prob, found.log_prob[[0, 2]])
    with pytest.raises(IndexError, match="index 7 is out of bounds"):
        found[7]
    with pytest.raises(TypeError, match="integer"):
        found[torch.tensor(1.5)]


def test_evidence_of_rows_can_be_indexed_and_joined(log_w):
    found = evidence_from_weights(log_w, "log p(x)")
    parts = [found[:3], found[torch.tensor([3, 4])], found[torch.arange(7) > 4]]
    assert [len(p) for p in parts] == [3, 2, 2]
    whole = concatenate(parts)
    for column in ("log_prob", "standard_error", "ess", "pareto_k"):
        assert torch.equal(getattr(whole, column), getattr(found, column))
    assert all(torch.equal(whole.running[k][0], found.running[k][0]) for k in found.running)
    mean, error = whole.mean()
    assert mean == pytest.approx(found.log_prob.mean().item())
    assert error == pytest.approx(found.standard_error.square().sum().sqrt().item() / 7)
    assert isinstance(whole, Evidence) and whole.quantity == "log p(x)"


def test_a_difference_is_a_conditional(log_w):
    joint, marginal = (
        evidence_from_weights(log_w, "log p(a, b)"),
        evidence_from_weights(log_w[:600].flip(1), "log p(b)"),
    )
    found = joint - marginal
    torch.testing.assert_close(found.log_prob, joint.log_prob - marginal.log_prob)
    torch.testing.assert_close(found.standard_error, torch.hypot(joint.standard_error, marginal.standard_error))
    assert torch.equal(found.ess, torch.minimum(joint.ess, marginal.ess))
    assert torch.equal(found.pareto_k, torch.maximum(joint.pareto_k, marginal.pareto_k))
    assert found.quantity == "log p(a, b) - log p(b)" and found.num_particles == 600
    assert 512 in found.running and 1000 not in found.running
    assert len(joint[3]) == 1 and torch.equal(joint[3].log_prob, joint.log_prob[3:4])
    with pytest.raises(ValueError, match="expected likelihoods of the same rows, got 7 and 2"):
        joint - marginal[:2]
