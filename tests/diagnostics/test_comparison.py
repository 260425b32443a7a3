"""Comparisons of models against exact likelihoods, numpy and ArviZ."""

import inspect
import math

import arviz
import numpy as np
import pytest
import torch

import pyro_mm as mm
from pyro_mm.diagnostics.comparison import compare
from tests.support.linear_gaussian import encoders, oracle

tables, E = mm.objectives, mm.estimators


def evidence_of(log_prob, error=0.0, k=0.1, quantity="log p(x)", num_particles=100):
    like = torch.ones_like(log_prob)
    return mm.Evidence(log_prob, error * like, 50 * like, k * like, quantity, num_particles)


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


def test_equal_pairs_compare_as_exactly_equal_under_one_seed(double):
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
