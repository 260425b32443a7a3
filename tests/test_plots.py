"""Every picture is a figure with labelled axes, drawn without pyplot."""

import numpy as np
import pytest
import torch

from pyro_mm import plots
from pyro_mm.diagnostics.rank_tests import band, p_text
from pyro_mm.diagnostics.sbc import Calibration
from pyro_mm.evidence.accumulator import evidence_from_weights
from pyro_mm.evidence.evidence import Evidence


def rendered(figure, tmp_path):
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 2000
    return figure.axes


@pytest.mark.parametrize("epochs", [1, 3, 60])
def test_training_curve_has_a_panel_for_the_terms(tmp_path, epochs):
    falling = list(np.linspace(3, 1, epochs))
    columns = {"loss": falling, "(*, *, P)": falling, "(image, image, P)": falling, "validation": falling}
    axes = rendered(plots.training_curve(columns), tmp_path)
    assert [len(ax.lines) for ax in axes] == [2, 2]
    assert all("nats per row" in ax.get_ylabel() and ax.get_xlabel() == "epoch" for ax in axes)
    assert len(rendered(plots.training_curve({"loss": falling, "(*, *, P)": falling}), tmp_path)) == 1


def test_training_curve_has_panels_for_players_and_for_accuracies(tmp_path):
    falling = [100.0 - i for i in range(30)]
    names = ["critic image+sound", "generator image+sound", "text decoder", "text decoder prior", "text discriminator"]
    columns = {"loss": falling, "(*, *, P)": falling, **dict.fromkeys(names, falling)}
    columns["critic image+sound accuracy"] = [0.9] * 30
    loss, players, accuracy = rendered(plots.training_curve(columns), tmp_path)
    assert [line.get_label() for line in loss.lines] == ["training", "text decoder"]
    assert [line.get_label() for line in players.lines] == [name for name in names if name != "text decoder"]
    assert accuracy.get_ylabel() == "accuracy" and accuracy.get_ylim() == (-0.02, 1.02)
    assert [line.get_label() for line in accuracy.lines] == ["critic image+sound", "chance"]


def test_image_grid_has_a_cell_for_each(tmp_path):
    figure = plots.image_grid(torch.rand(2, 3, 8, 6), rows=[0, 1], columns="abc", title="t")
    axes = rendered(figure, tmp_path)
    assert len(axes) == 6
    assert [ax.get_title() for ax in axes[:3]] == list("abc")


def test_confusion_writes_counts_and_survives_an_absent_class(tmp_path):
    ax = rendered(plots.confusion(np.array([[3, 1], [0, 0]]), classes=["cat", "dog"]).figure, tmp_path)[0]
    assert sorted(t.get_text() for t in ax.texts) == ["1", "3"]


@pytest.mark.parametrize("size", [1, 4])
def test_latent_view_finds_the_plane_of_most_variance(tmp_path, size):
    points = torch.randn(40, size, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 3, 0.1, 0.1][:size])
    ax = rendered(plots.latent_view(points, torch.arange(40) % 3).figure, tmp_path)[0]
    assert len(ax.collections) == 3
    first = torch.cat([torch.as_tensor(c.get_offsets().data[:, 0]) for c in ax.collections])
    assert first.std() == pytest.approx(points[:, 0].std().item(), rel=0.05)


def ranked(size, draws=20, rows=200):
    """Coordinates of uniform ranks, but that those of the first are low, the guide's draws too high."""
    ranks = torch.randint(draws + 1, (rows, size), generator=torch.Generator().manual_seed(0))
    ranks[:, 0] //= 2
    return Calibration({"z": ranks, "log_likelihood": ranks[:, -1:]}, draws)


@pytest.mark.parametrize("size", [1, 4, 30])
def test_ranks_have_a_panel_for_each_coordinate_with_its_band(tmp_path, size):
    found = ranked(size)
    figure = plots.ranks(found)
    shown = [ax for ax in rendered(figure, tmp_path) if ax.lines]
    assert len(shown) == min(20, size + 1)
    first = found.findings["z[0]" if size > 1 else "z"]
    assert shown[0].get_title(loc="left").endswith(f", {p_text(first.adjusted, 1)}\ntoo high and wide")
    assert shown[0].lines[-1].get_color() == "#D55E00" and first.verdict != "uniform"
    (note,) = figure.legends
    assert [t.get_text() for t in note.get_texts()] == ["95 % band, one curve", f"95 % band, all {size + 1} curves"]
    assert bool(figure.get_suptitle()) == (size == 30)
    if size == 4:
        assert shown[1].lines[-1].get_color() == "#0072B2"
        x, difference = shown[1].lines[-1].get_data()
        ecdf = [(found.ranks["z"][:, 1] < i).double().mean() for i in range(22)]
        np.testing.assert_allclose(difference, np.array(ecdf) - np.arange(22) / 21, atol=1e-12)
        vertices = shown[1].collections[1].get_paths()[0].vertices
        lower = band(200, 20)[0] / 200 - np.arange(1, 21) / 21
        for place, low in zip(x[1:-1], lower, strict=True):
            assert vertices[np.isclose(vertices[:, 0], place), 1].min() == pytest.approx(low)
    assert len([ax for ax in plots.ranks(found, names=["log_likelihood"], title="t").axes if ax.lines]) == 1


def estimate(k, seed=0, rows=7):
    return evidence_from_weights(torch.randn(k, rows, generator=torch.Generator().manual_seed(seed)), "log p(x)")


def test_convergence_shows_the_mean_with_its_error_and_the_worst_rows(tmp_path):
    one = estimate(100)
    mean, rows = rendered(plots.convergence(one), tmp_path)
    k, values = mean.lines[0].get_data()
    assert list(k) == [1, 2, 4, 8, 16, 32, 64, 100] and mean.get_xscale() == "log"
    assert values[-1] == pytest.approx(one.mean()[0], abs=1e-6) and "nats" in mean.get_ylabel()
    vertices = mean.collections[0].get_paths()[0].vertices
    last = vertices[vertices[:, 0] == 100, 1]
    assert last.min() == pytest.approx(one.mean()[0] - 2 * one.mean()[1], abs=1e-6)
    assert last.max() == pytest.approx(one.mean()[0] + 2 * one.mean()[1], abs=1e-6)
    worst = one.pareto_k.topk(5).indices.tolist()
    assert [t.get_text().split(",")[0] for t in rows.get_legend().get_texts()] == [f"row {n}" for n in worst]
    for row, line in zip(worst, rows.lines[:5], strict=True):
        expected = [(one.running[j][0][row] - one.log_prob[row]).item() for j in one.running]
        np.testing.assert_allclose(line.get_ydata(), expected, atol=1e-6)


def test_convergence_of_several_of_few_particles_and_of_none(tmp_path):
    (axes,) = rendered(plots.convergence({"a": estimate(64), "b": estimate(500, 1, rows=3)}), tmp_path)
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a", "b"]
    assert len(rendered(plots.convergence({"a": estimate(64), "b": estimate(64)}, rows=[0, 2]), tmp_path)[1].lines) == 5
    for k in (1, 2, 3, 10):
        rendered(plots.convergence(estimate(k)), tmp_path)
    nothing = torch.zeros(2)
    with pytest.raises(ValueError, match="running estimate"):
        plots.convergence(Evidence(nothing, nothing, nothing, nothing, "log p(x)", 5))
