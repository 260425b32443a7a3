"""Pictures of factors and of noise: what is in each panel, axes that are given, and refusals."""

import pytest
import torch
from matplotlib.figure import Figure

from pyro_mm import plots
from pyro_mm.metrics import GradientNorms, HSICRatios, Robustness, Swaps

FACTORS = ("z", "w_image")


def rendered(figure, tmp_path):
    figure.savefig(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 2000
    return figure.axes


def norms():
    series = torch.tensor([[0.5, 1.0, torch.nan], [0.0, 0.0, torch.nan]])
    image = torch.tensor([[2.0], [0.25]])
    values = {"image": image, "series": series}
    rows = {name: (~x.isnan()).long() * 7 for name, x in values.items()}
    return GradientNorms(values, {name: x / 10 for name, x in values.items()}, rows, FACTORS, True)


def test_gradient_norms_have_a_panel_per_modality_with_factors_and_steps(tmp_path):
    figure = plots.gradient_norms(norms(), title="t")
    image, series, *_ = rendered(figure, tmp_path)
    assert [ax.get_title() for ax in (image, series)] == ["image", "series"]
    assert [t.get_text() for t in image.get_yticklabels()] == list(FACTORS)
    assert [t.get_text() for t in image.texts] == ["2\n± 0.2", "0.25\n± 0.03"]  # 0.025 rounds to 0.03 in binary
    (picture,) = series.get_images()
    assert picture.get_array().shape == (2, 3) and picture.get_clim() == (0, 1)
    assert series.get_xlabel() == "step" and "standard deviation" in figure.get_supxlabel()
    assert len([ax for ax in plots.gradient_norms(norms(), "image").axes if ax.get_title()]) == 1


def ratios():
    values = {"z": {"image": 0.6, "text": 0.4}, "w_image": {"image": 0.5, "text": -0.02}}
    errors = {"z": {"image": 0.1, "text": 0.05}, "w_image": {"image": 0.02, "text": 0.02}}
    return HSICRatios(values, errors, {}, {}, "gaussian kernel")


def test_ratios_have_a_bar_per_factor_and_modality_with_its_error(tmp_path):
    ax = plots.hsic_ratios(ratios())
    rendered(ax.figure, tmp_path)
    bars = [bar for bar in ax.containers if hasattr(bar, "errorbar")]
    assert [[patch.get_height() for patch in bar] for bar in bars] == [[0.6, 0.4], [0.5, -0.02]]
    (segments,) = bars[0].errorbar.lines[2]
    low, high = segments.get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((0.4, 0.8))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == list(FACTORS)
    given = Figure().subplots()
    assert plots.hsic_ratios(ratios(), ax=given) is given


def swapped():
    truth = {
        "image": torch.rand(3, 5, 4), "series": torch.randn(3, 6, 2), "text": torch.randint(1, 5, (3, 4)),
        "tokens": torch.tensor([[1, 2, 0, 0]] * 3), "vector": torch.randn(3, 3), "label": torch.arange(3),
    }  # fmt: skip
    means = dict(truth)
    means["text"] = torch.nn.functional.one_hot(truth["text"], 5).double()
    means["label"] = torch.nn.functional.one_hot(truth["label"], 4).double()
    own = means | {"image": 1 - means["image"]}
    partners, lengths = torch.tensor([1, 2, 0]), {"series": torch.tensor([6, 1, 3]), "tokens": torch.tensor([3, 3, 3])}
    return Swaps({}, {}, partners, truth, means, {"z": means, "w_image": own}, lengths)


def test_swaps_show_the_row_its_swaps_and_the_other_row(tmp_path):
    found = swapped()
    figure = plots.swaps(found, rows=(0, 2), title="t")
    axes = rendered(figure, tmp_path)
    assert len(axes) == 5 * 12  # row, reconstruction, two factors, other row; two rows of six modalities
    lines = [axes[12 * i : 12 * (i + 1)] for i in range(5)]
    assert [line[0].get_ylabel() for line in lines] == [
        "row", "reconstruction", "z of the other", "w_image of the other", "other row"
    ]  # fmt: skip
    orange = [[ax.spines["left"].get_edgecolor()[0] > 0.82 for ax in line] for line in lines]
    assert [sum(line) for line in orange] == [0, 0, 0, 2, 0] and orange[3][:2] == [True, True]
    image = lines[4][1].get_images()[0].get_array()
    assert torch.equal(torch.as_tensor(image.data), found.truth["image"][found.partners[2]])
    assert [len(line.get_ydata()) for line in lines[0][3].lines] == [3, 3]  # two dimensions of a series of 3 steps
    spelled = "".join(plots.cells.SYMBOLS[t] for t in found.truth["text"][0])
    assert lines[0][4].texts[0].get_text() == lines[1][4].texts[0].get_text() == spelled
    assert lines[0][6].texts[0].get_text() == "ab" and lines[1][11].texts[0].get_text() == "2"
    assert len(plots.swaps(found, (1,), "label", symbols="?").axes) == 5


def robust(levels=(0.0, 1.0)):
    table = torch.tensor([[0.9, 0.7], [0.9, 0.5]])[:, : len(levels)]
    column = torch.tensor([0.4, 0.3])
    measures = {"label": "accuracy", "image": "unexplained"}
    values, missing = dict.fromkeys(measures, table), dict.fromkeys(measures, column)
    errors, missing_errors = dict.fromkeys(measures, 0.1 * table), dict.fromkeys(measures, 0.1 * column)
    return Robustness(levels, ("image", "text"), measures, values, errors, missing, missing_errors)


@pytest.mark.parametrize("levels", [(0.0, 1.0), (0.0,)])
def test_robustness_has_a_panel_per_target_and_a_curve_per_modality(tmp_path, levels):
    figure = plots.robustness(robust(levels), title="t")
    label, image = rendered(figure, tmp_path)
    assert [ax.get_title() for ax in (label, image)] == ["label", "image"]
    assert (label.get_ylabel(), image.get_ylabel()) == ("accuracy", "unexplained variance")
    assert [t.get_text() for t in label.get_xticklabels()] == [*(f"{x:g}" for x in levels), "missing"]
    curves = [line.get_ydata() for line in label.lines if line.get_marker() == "s" and line.get_linestyle() != ":"]
    assert [len(curve) for curve in curves] == [len(levels), 1]
    assert curves[1][0] == pytest.approx(0.3)
    (legend,) = figure.legends
    assert [t.get_text() for t in legend.get_texts()] == ["image", "text"]
    assert len([ax for ax in plots.robustness(robust(levels), "label").axes if ax.get_title()]) == 1


REFUSED = {
    "no norms": (lambda: plots.gradient_norms(None), TypeError, "what metrics.gradient_norms returned"),
    "an unknown modality": (lambda: plots.gradient_norms(norms(), "sound"), ValueError, "unknown modality 'sound'"),
    "no ratios": (lambda: plots.hsic_ratios(1), TypeError, "what metrics.hsic_ratios returned"),
    "no axes": (lambda: plots.hsic_ratios(ratios(), ax=3), TypeError, "expected ax to be axes of matplotlib"),
    "no swaps": (lambda: plots.swaps({}), TypeError, "what metrics.swaps returned"),
    "no rows": (lambda: plots.swaps(swapped(), ()), ValueError, "rows to be one at least"),
    "a row that is not there": (lambda: plots.swaps(swapped(), (3,)), ValueError, "rows >= 0 and <= 2, got 3"),
    "no robustness": (lambda: plots.robustness(0), TypeError, "what metrics.robustness returned"),
    "an unknown target": (lambda: plots.robustness(robust(), "sound"), ValueError, "unknown modality 'sound'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_drawn_is_refused(name):
    call, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        call()
