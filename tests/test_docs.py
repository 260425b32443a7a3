"""The pages of the documentation are complete, their links lead somewhere, and their mistakes are refused."""

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import pyro_mm as mm
from pyro_mm.experiments.families import FAMILIES
from pyro_mm.experiments.proposals import COMPARISONS
from pyro_mm.experiments.published import REPRODUCTIONS
from pyro_mm.experiments.studies import STUDIES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.insert(0, str(DOCS))
generate_pages = import_module("generate_pages")
page_figures = import_module("page_figures")
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
    assert {"elbo", "masked", "MMD"} <= {*generate_pages.TABLES} and "Term" in generate_pages.LANGUAGE
    names = {f"objectives/{name}" for name in generate_pages.TABLES}
    names |= {f"stories/{name}" for name in mm.models.__all__} | {f"posteriors/{n}" for n in mm.posteriors.__all__}
    per_row = {n for n, c in vars(mm.estimators).items() if inspect.isclass(c) and issubclass(c, mm.estimators.PerRow)}
    assert {*generate_pages.ESTIMATORS} == per_row - {"PerRow"}
    assert names | {f"estimators/{name}" for name in generate_pages.ESTIMATORS} <= {*pages}
    assert "lower bound on log p(image, label)" in pages["objectives/jmvae_kl"]
    assert "arXiv:1611.01891" in pages["objectives/jmvae_kl"] and "jmvae-mnist" in pages["objectives/jmvae_kl"]


def test_figures_show_the_terms_graphs_and_densities_of_the_code(tmp_path):
    figures = generate_pages.figures()
    pages = generate_pages.pages()
    assert all(f"({name.rpartition('/')[2]}.png)" in pages[name] for name in figures)
    assert not any("(FIGURE)" in text for text in pages.values())

    drawn = page_figures.concrete_terms(mm.objectives.jmvae_kl().terms, ("image", "label"))
    both = ["image", "label"]
    assert drawn[0] == (both, both, mm.objectives.PRIOR, "KL to p(z)")
    assert [term[3] for term in drawn[1:]] == ["KL to q(z | image)", "KL to q(z | label)"]

    texts = {text.get_text() for text in figures["stories/PrivateLatents"]().axes[0].texts}
    assert {"z", "w_image", "image", "label"} <= texts
    page_figures.save(figures["posteriors/ProductOfExperts"](), tmp_path / "product.png")
    assert (tmp_path / "product.png").stat().st_size > 2000
    expert = mm.conditionals.Normal(page_figures.Expert(*page_figures.EXPERTS["x1"]))(torch.zeros(1, 1))
    assert torch.allclose(expert.mean, torch.tensor([[-1.2, 0.3]]))
    assert torch.allclose(expert.stddev, torch.tensor([[1.1, 0.35]]), atol=1e-3)


def test_every_public_module_is_in_the_reference():
    modules = {name for name in mm.__all__ if inspect.ismodule(getattr(mm, name))}
    kinds = {"models", "posteriors", "objectives", "estimators", "recipes"}
    assert modules == kinds | {"nn" if name == "networks" else name for name, *_ in generate_pages.sections()}
    assert "_generated/reference/*" in (DOCS / "index.md").read_text(encoding="utf-8")


def test_recipes_stand_on_the_page_of_the_objective_that_they_train():
    shown = [recipe for name in generate_pages.TABLES for recipe in generate_pages.recipes_of(name)]
    assert {"jmvae_kl", "mopoe", "mfm", "jnf_second"} <= {*shown} <= {*mm.recipes.__all__}
    assert "objectives.subset_mean" in inspect.getdoc(mm.recipes.mopoe)
    assert "mopoe" in generate_pages.recipes_of("subset_mean")


def test_every_run_on_a_page_is_one_of_the_command_line():
    runs = {run for names in generate_pages.RUNS_OF.values() for run in names}
    assert runs <= {*REPRODUCTIONS, *FAMILIES, *STUDIES, *COMPARISONS}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_links_lead_to_files(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    made = {f"_generated/{name}.md" for name in generate_pages.pages()}
    for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
        assert link in made or (path.parent / link).exists(), link


def test_papers_that_an_object_refers_to_are_linked():
    (entry,) = generate_pages.papers_of(mm.objectives.jmvae_kl)
    assert entry.startswith("**Suzuki et al. 2016**") and "https://arxiv.org/abs/1611.01891" in entry

    def unlisted():
        """Do nothing.

        References:
            Nobody 2099 (arXiv:9912.34567).
        """

    assert generate_pages.papers_of(unlisted) == ["[arXiv:9912.34567](https://arxiv.org/abs/9912.34567)"]


def test_papers_of_stories_posteriors_and_tables_are_in_the_bibliography():
    things = [*generate_pages.STORIES.values(), *generate_pages.POSTERIORS.values()]
    things += [getattr(mm.objectives, name) for name in ("jmvae_kl", "mvae", "mmvae", "masked", "mmvm", "MMD")]
    entries = [entry for thing in things for entry in generate_pages.papers_of(thing)]
    unlisted = {entry for entry in entries if entry.startswith("[arXiv")}
    assert len(entries) > 20 and unlisted <= {"[arXiv:2606.13381](https://arxiv.org/abs/2606.13381)"}
