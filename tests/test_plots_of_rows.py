"""Pictures of likelihoods per row, bounds, comparisons, coherences and sequences hold the numbers given to them."""

import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import pyro_mm as mm
from pyro_mm import plots
from pyro_mm.evidence.accumulator import evidence_from_weights
from pyro_mm.metrics import Share


def weights(k=64, rows=6, seed=0, spread=1.0):
    return spread * torch.randn(k, rows, generator=torch.Generator().manual_seed(seed)).double()


def spans(container, axis=1):
    """Return the ends of the error bars of an errorbar container."""
    (bars,) = container.lines[2]
    return np.array([segment[:, axis] for segment in bars.get_segments()])


def drawn(ax, tmp_path):
    ax.figure.savefig(tmp_path / "picture.png")
    return ax


# -- evidence -----------------------------------------------------------------------------------------------------


def test_rows_stand_at_their_k_hat_with_two_errors(tmp_path):
    evidence = evidence_from_weights(weights(rows=30, spread=2.5), "log p(x)")
    heavy = evidence.pareto_k > 0.7
    assert 0 < heavy.sum() < 30
    ax = drawn(plots.evidence_rows(evidence, title="t"), tmp_path)
    for container, rows in zip(ax.containers, (~heavy, heavy), strict=True):
        x, y = container.lines[0].get_data()
        np.testing.assert_allclose(x, evidence.pareto_k[rows])
        np.testing.assert_allclose(y, evidence.log_prob[rows])
        low, high = spans(container).T
        np.testing.assert_allclose(high - low, 4 * evidence.standard_error[rows])
    texts = [t.get_text() for t in ax.get_legend().get_texts()]
    assert texts[1] == f"{int(heavy.sum())} rows, k-hat > 0.7: not to be trusted"


def test_rows_without_the_quantity_or_a_finite_estimate_are_not_drawn():
    w = weights(rows=4)
    w[:, 1] = -math.inf
    batch_evidence = evidence_from_weights(w, "log p(x)")
    ax = plots.evidence_rows(batch_evidence)
    assert sum(len(container.lines[0].get_xdata()) for container in ax.containers) == 3


def test_evidence_of_few_draws_has_no_k_hat_to_plot():
    with pytest.raises(ValueError, match="K = 5 draws are too few for the k-hat of any row"):
        plots.evidence_rows(evidence_from_weights(weights(5), "log p(x)"))
    with pytest.raises(TypeError, match="expected evidence to be an Evidence"):
        plots.evidence_rows(None)


# -- bounds -------------------------------------------------------------------------------------------------------


def test_a_ladder_begins_at_the_elbo_never_falls_and_ends_at_the_estimate(tmp_path):
    w = weights(64)
    evidence = evidence_from_weights(w, "log p(x)")
    ax = drawn(plots.bound_ladder(w, evidence), tmp_path)
    k, values = ax.containers[0].lines[0].get_data()
    assert list(k) == [1, 2, 4, 8, 16, 32, 64] and ax.get_xscale() == "log"
    assert values[0] == pytest.approx(w.mean().item())
    assert values[-1] == pytest.approx(evidence.mean()[0])
    assert (np.diff(values) >= 0).all()
    low, high = spans(ax.containers[0]).T
    assert (high - low)[0] == pytest.approx(4 * w.mean(1).std().item() / 8)
    assert (high - low)[-1] == 0  # one block has no error
    pairs = torch.logaddexp(w[0::2], w[1::2]) - math.log(2)
    assert values[1] == pytest.approx(pairs.mean().item())


def test_a_ladder_leaves_out_draws_beyond_whole_blocks_and_takes_several():
    w = weights(11)
    ax = plots.bound_ladder({"a": w, "b": w - 1})
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    first, second = (container.lines[0].get_ydata() for container in ax.containers)
    np.testing.assert_allclose(first - second, 1)
    eight = w[:8].logsumexp(0).mean().item() - math.log(8)
    assert first[3] == pytest.approx(eight)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(3),), TypeError, r"a tensor \(K, N\)"),
        (({"a": [1.0]},), TypeError, "log_weights of a to be a tensor"),
        ((torch.zeros(3, 2), 1.0), TypeError, "expected evidence to be an Evidence, or None"),
        (({"a": torch.zeros(3, 2), "b": torch.zeros(3, 4)},), ValueError, r"the same rows everywhere, got \[2, 4\]"),
    ],
)
def test_a_ladder_of_anything_else_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        plots.bound_ladder(*arguments)


# -- comparisons --------------------------------------------------------------------------------------------------


def test_a_forest_has_differences_with_both_errors_and_means(tmp_path):
    evidence = {n: evidence_from_weights(weights(seed=i) - i, "log p(x)") for i, n in enumerate("abc")}
    found = mm.compare(evidence, baseline="b")
    ax = drawn(plots.forest(found, title="t"), tmp_path)
    names = [c.name for c in found.candidates]
    assert [t.get_text() for t in ax.get_yticklabels()] == [f"{n} (reference)" if n == "b" else n for n in names]
    top, bottom = sorted(ax.get_ylim())
    assert ax.get_ylim() == (bottom, top)  # the best is above
    for container, error in zip(ax.containers, ("paired_error", "estimation_error"), strict=True):
        np.testing.assert_allclose(container.lines[0].get_xdata(), [c.difference for c in found.candidates])
        low, high = spans(container, axis=0).T
        np.testing.assert_allclose(high - low, [4 * getattr(c, error) for c in found.candidates], atol=1e-12)
    shown = [t.get_text().rstrip("*") for t in ax.texts]
    assert shown == [f"{c.mean:.2f} ± {c.error:.2f}" for c in found.candidates]
    with pytest.raises(TypeError, match=r"what pyro_mm\.compare returned"):
        plots.forest(evidence)


def test_coherences_are_bars_by_name_and_model(tmp_path):
    one = {"x": Share(0.5, 0.1, 9), "y": Share(0.2, 0.01, 9)}
    two = {"a": one, "b": {"y": Share(0.3, 0.1, 9), "x": Share(1, 0, 9)}}
    ax = drawn(plots.coherence(two, chance=0.1, title="t"), tmp_path)
    bars = [c for c in ax.containers if hasattr(c, "errorbar")]
    assert [[patch.get_height() for patch in bar] for bar in bars] == [[0.5, 0.2], [1, 0.3]]
    assert spans(bars[0].errorbar)[0] == pytest.approx((0.3, 0.7))
    assert [line.get_ydata()[0] for line in ax.lines if line.get_label() == "chance"] == [0.1]
    assert plots.coherence({"x": Share(0.5, 0.1, 9)}).get_legend() is None
    with pytest.raises(TypeError, match=r"what metrics\.cross_modal_coherence returns"):
        plots.coherence({"x": 0.5})
    with pytest.raises(ValueError, match="the same proportions of all models"):
        plots.coherence({"a": {"x": Share(0.5, 0.1, 9)}, "b": {"y": Share(0.5, 0.1, 9)}})
    with pytest.raises(ValueError, match="one proportion at least"):
        plots.coherence({})


# -- sequences ----------------------------------------------------------------------------------------------------


def test_sequences_stop_at_their_length_and_have_quantiles_of_draws(tmp_path):
    values, lengths = torch.randn(5, 6, 2), torch.tensor([6, 3, 1, 6, 6])
    draws = torch.randn(40, 5, 6, 2)
    figure = plots.sequences(values, draws, lengths, rows=(1, 0), features=["left", "right"], title="t")
    figure.savefig(tmp_path / "picture.png")
    first, second = figure.axes[:2]
    assert [len(ax.lines[0].get_ydata()) for ax in (first, second)] == [3, 6]
    np.testing.assert_allclose(first.lines[0].get_ydata(), values[1, :3, 0])
    np.testing.assert_allclose(first.lines[1].get_ydata(), draws[:, 1, :3, 0].quantile(0.5, 0), rtol=1e-5)
    band = first.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(draws[:, 1, :3, 0].quantile(0.95, 0).max().item(), rel=1e-5)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["left", "right"]
    with pytest.raises(ValueError, match="names of 2 features, got 1"):
        plots.sequences(values, features=["left"])
    with pytest.raises(ValueError, match=r"draws of shape \(S, 5, 6, 2\)"):
        plots.sequences(values, draws[:, :2])


# -- one look -----------------------------------------------------------------------------------------------------


def test_functions_of_one_panel_draw_in_the_axes_that_they_are_given():
    evidence = evidence_from_weights(weights(), "log p(x)")
    comparison = mm.compare({"a": evidence, "b": evidence})
    calls = [
        lambda ax: plots.evidence_rows(evidence, ax=ax),
        lambda ax: plots.bound_ladder(weights(), ax=ax),
        lambda ax: plots.forest(comparison, ax=ax),
        lambda ax: plots.coherence({"x": Share(0.5, 0.1, 9)}, ax=ax),
        lambda ax: plots.confusion(np.eye(2), ax=ax),
        lambda ax: plots.latent_view(torch.randn(5, 3), ax=ax),
    ]
    for call in calls:
        given = Figure().subplots()
        assert call(given) is given
        assert call(None).figure.axes
        with pytest.raises(TypeError, match="expected ax to be axes of matplotlib"):
            call(Figure())


def test_nothing_global_is_changed():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.bound_ladder(weights())
    plots.latent_view(torch.randn(5, 3), torch.arange(5))
    assert dict(matplotlib.rcParams) == before
