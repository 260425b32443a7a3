"""Every picture is a figure with labelled axes, drawn without pyplot."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from pyro_mm import plots


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
    assert all("nats a row" in ax.get_ylabel() and ax.get_xlabel() == "epoch" for ax in axes)
    assert len(rendered(plots.training_curve({"loss": falling, "(*, *, P)": falling}), tmp_path)) == 1


def test_image_grid_has_a_cell_for_each(tmp_path):
    figure = plots.image_grid(torch.rand(2, 3, 8, 6), rows=[0, 1], columns="abc", title="t")
    axes = rendered(figure, tmp_path)
    assert len(axes) == 6
    assert [ax.get_title() for ax in axes[:3]] == list("abc")


def test_confusion_writes_counts_and_survives_an_absent_class(tmp_path):
    ax = rendered(plots.confusion(np.array([[3, 1], [0, 0]]), classes=["cat", "dog"]), tmp_path)[0]
    assert sorted(t.get_text() for t in ax.texts) == ["1", "3"]


@pytest.mark.parametrize("size", [1, 4])
def test_latent_view_finds_the_plane_of_most_variance(tmp_path, size):
    points = torch.randn(40, size, generator=torch.Generator().manual_seed(0)) * torch.tensor([9.0, 3, 0.1, 0.1][:size])
    ax = rendered(plots.latent_view(points, torch.arange(40) % 3), tmp_path)[0]
    assert len(ax.collections) == 3
    first = torch.cat([torch.as_tensor(c.get_offsets().data[:, 0]) for c in ax.collections])
    assert first.std() == pytest.approx(points[:, 0].std().item(), rel=0.05)


def test_pyplot_is_never_imported():
    draw = "import sys, pyro_mm.plots as p; p.training_curve({'loss': [1.0, 2.0]})"
    code = f"{draw}; print('matplotlib.pyplot' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
