"""Studies by several processes: one table and one picture of all rows that are finished."""

import json

import pytest
import torch
from typer.testing import CliRunner

import pyro_mm as mm
from pyro_mm.cli import app
from pyro_mm.experiments import reproduce as command
from pyro_mm.experiments.studies.study import Images, Sample, Study
from pyro_mm.experiments.study_pictures import load_images, save_images, write_pictures

GROUP = "eight rows"


def draw_sample(seed, directory=None):
    generator = torch.Generator().manual_seed(seed)
    rows = mm.Batch({"image": torch.rand(8, 4, 4, generator=generator).round()})
    return Sample(rows, rows)


def make_study():
    def images(run, sample, seed):
        return {"from the prior": Images(torch.full((3, 4, 4), 0.5), ("x", "y", "z"), sample.test["image"][:3])}

    return Study(
        title="Small",
        groups={GROUP: draw_sample},
        members={name: lambda batch: mm.recipes.vae(batch, latent=1, hidden=(2,)) for name in ("first", "second")},
        measure=lambda run, sample, seed, fitted: {"column": float(seed)},
        epochs=1,
        batch_size=8,
        optimizer=lambda run, parameters: torch.optim.Adam(parameters),
        seeds=2,
        images=images,
    )


def test_rows_and_seeds_of_several_commands_are_one_table_and_one_picture(monkeypatch, tmp_path):
    monkeypatch.setattr(command, "STUDIES", {"small": make_study()})

    def run(*arguments, code=0):
        result = CliRunner().invoke(app, ["reproduce", "small", "--out", str(tmp_path), *arguments])
        assert result.exit_code == code, result.output
        return result.output

    assert "holds no finished run" in " ".join(run("--finished", code=2).replace("│", " ").split())
    run("--only", "first")
    assert "first" not in run("--only", "second", "--seed", "1", "--seeds", "1").split("eight rows: 1 epochs")[1]
    table = (tmp_path / "table.md").read_text()
    assert "| first | 0.500 ± 0.707 |" in table and "| second (1 of 2 seeds) | 1.000 |" in table
    assert (tmp_path / GROUP / "from the prior.png").read_bytes()[1:4] == b"PNG"

    (tmp_path / "table.md").unlink()
    text = run("--finished")
    assert "epoch 1/1" not in text and "first" in text and "second (1 of 2 seeds)" in text
    assert (tmp_path / "table.md").read_text() == table
    assert not (tmp_path / GROUP / "second" / "measured-fitted-1-0.json").exists()
    found = json.loads((tmp_path / GROUP / "second" / "measured-fitted-1-1.json").read_text())
    assert found["column"] == 1.0


def test_only_studies_have_a_table_of_finished_runs():
    result = CliRunner().invoke(app, ["reproduce", "jmvae-mnist", "--finished"])
    assert result.exit_code == 2 and "no study" in result.output


@pytest.mark.parametrize("event", [(4, 5), (3, 4, 5)])
def test_a_picture_has_a_line_of_data_and_one_of_each_member(tmp_path, event):
    torch.manual_seed(0)
    truth, first, second = torch.rand(3, *event), 3 * torch.rand(3, *event) - 1, torch.rand(2, *event)
    labels = ("a", "b", "c")
    save_images(tmp_path / "1.pt", {"t": Images(first, labels, truth), "u": Images(first)})
    save_images(tmp_path / "2.pt", {"t": Images(second, labels)})
    assert load_images(tmp_path / "2.pt")["t"].labels == labels and load_images(tmp_path / "1.pt")["u"].truth is None

    calls = {}

    def draw(images, rows, columns, title):
        calls[title] = images, rows, columns
        return mm.plots.image_grid(images, rows, columns, title)

    files = {"one": tmp_path / "1.pt", "none": tmp_path / "0.pt", "two": tmp_path / "2.pt"}
    assert write_pictures(tmp_path, files, draw) == [tmp_path / "t.png", tmp_path / "u.png"]
    images, rows, columns = calls["t"]
    assert rows == ["data", "one", "two"] and tuple(columns) == ("a", "b")
    torch.testing.assert_close(images, torch.stack([truth[:2], first[:2].clamp(0, 1), second]))
    assert calls["u"][1] == ["one"] and calls["u"][0].shape == (1, 3, *event)


def test_a_slice_of_a_batch_is_written_without_the_batch(tmp_path):
    whole = torch.rand(2000, 4, 4)
    save_images(tmp_path / "images.pt", {"title": Images(whole[:2], truth=whole[2:4])})
    assert (tmp_path / "images.pt").stat().st_size < whole.nbytes / 10
    assert torch.equal(load_images(tmp_path / "images.pt")["title"].truth, whole[2:4])
