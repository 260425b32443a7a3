"""``reproduce`` with ``--compile``, ``--no-compile`` or neither: the value that ``fit`` is given."""

import pytest
from typer.testing import CliRunner

from pyro_mm import cli
from pyro_mm.experiments import trainings


@pytest.fixture
def received(monkeypatch):
    """Values of ``compile=`` that ``fit`` was given; no training takes place."""
    found = []

    def fit(*_, **options):
        found.append(options["compile"])
        raise ValueError("recorded")

    monkeypatch.setattr(trainings, "fit", fit)
    return found


CHOICES = [((), None), (("--compile",), True), (("--no-compile",), False)]


@pytest.mark.parametrize(("options", "value"), CHOICES)
@pytest.mark.parametrize(("name", "by_itself"), [("hirt-linear", True), ("weak-digits", None)])
def test_an_experiment_compiles_as_it_was_chosen_to_or_decides(name, by_itself, options, value, received, tmp_path):
    CliRunner().invoke(cli.app, ["reproduce", name, *options, "--out", str(tmp_path)])
    assert received == [by_itself if value is None else value]
