"""The pages of the documentation are complete, their links lead somewhere, and their mistakes are refused."""

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest

import pyro_mm as mm
from pyro_mm.cli import TRAINED
from pyro_mm.experiments.families import FAMILIES
from pyro_mm.experiments.proposals import COMPARISONS
from pyro_mm.experiments.published import REPRODUCTIONS
from pyro_mm.experiments.studies import STUDIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
generate_pages = import_module("generate_pages")
refused_mistakes = import_module("refused_mistakes")
sys.path.remove(str(DOCS))

SOURCES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
ANSWERS = (
    "zz: drawn by the guide", "are model and guide swapped", "Is 'label' meant", "reads its values where they are",
    "Is 'image' meant", "would be broadcast", "to_event", "would be broadcast", "among particles", "as many rows",
    "numbers above 0", "Classes are counted from 0", "add noise to them", "divide by 255",
    "expected numbers, got 'cat'", "is it the estimator", "needs a mixture posterior",
    "expected train to be", "collate_fn", "not finite",
)  # fmt: skip


def test_twenty_mistakes_of_five_kinds_are_shown():
    assert len(refused_mistakes.MISTAKES) == len(ANSWERS) == 20
    kinds = ["sites", "shapes", "supports", "types", "loaders"]
    assert list(dict.fromkeys(mistake.kind for mistake in refused_mistakes.MISTAKES)) == kinds


@pytest.mark.parametrize("index", range(20), ids=lambda i: refused_mistakes.MISTAKES[i].kind + str(i))
def test_a_mistake_is_refused_with_words_that_mend_it(index):
    assert ANSWERS[index] in refused_mistakes.message(refused_mistakes.MISTAKES[index])


def test_a_mistake_that_passes_is_noticed():
    harmless = refused_mistakes.Mistake("types", "Nothing is wrong.", "mm.log_marginal(model, guide, batch[:2])")
    with pytest.raises(AssertionError, match="this mistake is not refused"):
        refused_mistakes.message(harmless)


def test_every_objective_story_posterior_and_estimator_has_a_page():
    pages = generate_pages.pages()
    assert {*generate_pages.TABLES, *generate_pages.LANGUAGE} == {*mm.objectives.__all__}
    names = {f"objectives/{name}" for name in generate_pages.TABLES}
    names |= {f"stories/{name}" for name in mm.models.__all__} | {f"posteriors/{n}" for n in mm.posteriors.__all__}
    per_row = {n for n, c in vars(mm.estimators).items() if inspect.isclass(c) and issubclass(c, mm.estimators.PerRow)}
    assert {*generate_pages.ESTIMATORS} == per_row - {"PerRow"}
    assert names | {f"estimators/{name}" for name in generate_pages.ESTIMATORS} <= {*pages}
    assert "lower bound on log p(image, label)" in pages["objectives/jmvae_kl"]
    assert "arXiv:1611.01891" in pages["objectives/jmvae_kl"] and "jmvae-mnist" in pages["objectives/jmvae_kl"]


def test_every_public_module_is_in_the_reference():
    modules = {name for name in mm.__all__ if inspect.ismodule(getattr(mm, name))}
    kinds = {"models", "posteriors", "objectives", "estimators", "recipes"}
    assert modules == kinds | {"nn" if name == "networks" else name for name, *_ in generate_pages.SECTIONS}
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert all(f"_generated/reference/{name}" in index for name, *_ in generate_pages.SECTIONS)


def test_every_recipe_stands_on_the_page_of_the_objective_that_it_trains():
    listed = [name for names in generate_pages.RECIPES_OF.values() for name in names]
    assert sorted(listed) == sorted(
        name for name in mm.recipes.__all__ if inspect.isfunction(getattr(mm.recipes, name))
    )


def test_every_run_and_recipe_on_a_page_is_one_of_the_command_line():
    runs = {run for names in generate_pages.RUNS_OF.values() for run in names}
    assert runs <= {*REPRODUCTIONS, *FAMILIES, *STUDIES, *COMPARISONS}
    assert {*mm.recipes.RECIPES} - {*TRAINED} == {*generate_pages.NOT_ON_THE_COMMAND_LINE}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_links_lead_to_files(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    made = {f"_generated/{name}.md" for name in generate_pages.pages()}
    for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
        assert link in made or (path.parent / link).exists(), link


def test_every_paper_with_a_number_that_a_model_refers_to_is_in_the_bibliography():
    known = "\n".join(generate_pages.bibliography())
    for module in (mm.models, mm.posteriors, mm.objectives, mm.recipes, mm.estimators, mm.priors, mm.conditionals):
        for name in vars(module):
            text = (inspect.getdoc(getattr(module, name)) or "").partition("References:")[2]
            missing = [n for n in re.findall(r"arXiv:([\d.]+\d)", text) if n not in known and n != "2606.13381"]
            assert not missing, (name, missing)
