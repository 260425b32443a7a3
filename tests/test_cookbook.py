"""The programs of the cookbook run as typed, with few epochs, and end in a conditional likelihood."""

import re
from pathlib import Path

import pytest

import pyro_mm as mm

COOKBOOK = Path(__file__).parents[1] / "docs" / "cookbook.md"
SECTIONS = dict(re.findall(r"^## (.*?)\n.*?^```python\n(.*?)^```$", COOKBOOK.read_text(encoding="utf-8"), re.M | re.S))
LINES = 40


def test_each_section_has_a_program():
    text = COOKBOOK.read_text(encoding="utf-8")
    assert len(SECTIONS) == text.count("\n## ") == text.count("```python") == 6


@pytest.mark.parametrize("title", SECTIONS)
def test_a_program_runs_and_ends_in_a_conditional_likelihood(title, monkeypatch, capsys):
    fit, conditional, found = mm.fit, mm.log_conditional, []

    def fit_shortly(model, guide, objective, train, *, epochs, **options):
        return fit(model, guide, objective, train[:32], epochs=1, **options)

    def conditional_of_few(model, guide, batch, **options):
        found.append(conditional(model, guide, batch[:4], num_particles=30, **options))
        return found[-1]

    def scenes_of_few(*args, rows, **options):
        return scenes(*args, rows=(32, 4), **options)

    scenes = mm.datasets.scenes
    monkeypatch.setattr(mm, "fit", fit_shortly)
    monkeypatch.setattr(mm, "log_conditional", conditional_of_few)
    monkeypatch.setattr(mm.datasets, "scenes", scenes_of_few)
    exec(compile(SECTIONS[title], f"cookbook, {title}", "exec"), {})
    (evidence,) = found
    counted = evidence.counted
    assert counted.any() and evidence.log_prob.isfinite().all() and (evidence.standard_error[counted] > 0).all()
    assert str(evidence) in capsys.readouterr().out


@pytest.mark.parametrize("title", SECTIONS)
def test_a_program_is_short(title):
    """Lines of code; imports, blank lines and comments are left out."""
    code = [line for line in SECTIONS[title].splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(code) < LINES
