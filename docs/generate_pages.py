"""Write the pages of one kind: a page per story, posterior, objective, estimator and recipe, and the reference.

``conf.py`` runs this at every build, into ``docs/_generated``, which git ignores. Texts come from docstrings, what an
objective bounds from the objective, and papers from ``bibliography.md``.
"""

from __future__ import annotations

import inspect
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import page_figures
import refused_mistakes

import pyro_mm as mm
from pyro_mm.cli import TRAINED

DOCS = Path(__file__).parent
ROOT = DOCS.parent
TWO = ("image", "label")
THREE = ("image", "label", "text")

STORIES: Mapping[str, Any] = {name: getattr(mm.models, name) for name in mm.models.__all__}
POSTERIORS: Mapping[str, Any] = {name: getattr(mm.posteriors, name) for name in mm.posteriors.__all__}
ESTIMATORS: Mapping[str, Any] = {
    name: getattr(mm.estimators, name) for name in ("AnalyticKL", "IWAE", "Renyi", "StickTheLanding", "DReG")
}
TABLES: Mapping[str, Callable[[], Any]] = {
    "MMD": lambda: mm.objectives.MMD("z"),
    "SlicedWasserstein": lambda: mm.objectives.SlicedWasserstein("z"),
    "HSIC": lambda: mm.objectives.HSIC("z", "w_image"),
    **{
        name: getattr(mm.objectives, name)
        for name in mm.objectives.__all__
        if inspect.isfunction(getattr(mm.objectives, name))
        and name not in ("HSIC", "MMD", "SlicedWasserstein", "cyclical", "warm_up")
    },
}
"""Objective by name -> an example of it."""

LANGUAGE = tuple(name for name in mm.objectives.__all__ if name not in TABLES)
"""Public names of ``objectives`` that are no objective: what tables are written in."""

RECIPES_OF: Mapping[str, tuple[str, ...]] = {
    "elbo": ("vae", "cvae", "jmvae_zero", "hoelder", "mfm_variational"),
    "jmvae_kl": ("jmvae_kl", "jnf", "jnf_second"),
    "mvae": ("mvae",),
    "telbo": ("telbo",),
    "vaevae": ("vaevae", "vaevae_joint", "vaevae_flow"),
    "mmvae": ("mmvae",),
    "unimodal_mean": ("unimodal_mean",),
    "subset_mean": ("mopoe", "code"),
    "mmjsd": ("mmjsd",),
    "mixture_mean": ("mmvae_plus",),
    "dmvae": ("dmvae",),
    "mmvm": ("mmvm",),
    "mvtcae": ("mvtcae",),
    "MMD": ("mfm",),
}
"""Objective -> recipes that train it; of other recipes the docstring says it."""

RUNS_OF: Mapping[str, tuple[str, ...]] = {
    "jmvae_kl": ("jmvae-mnist", "jmvae-fashion"),
    "mvae": ("mvae-mnist",),
    "masked": ("hirt-linear", "hirt-identifiable", "hirt-mnist"),
    "MMD": ("wae-mnist", "mfm-factors"),
}
"""Objective -> what ``pyro-mm reproduce`` has of its paper."""

SECTIONS: tuple[tuple[str, ModuleType, str], ...] = (
    ("conditionals", mm.conditionals, "Conditionals: p(x | parents)"),
    ("priors", mm.priors, "Priors"),
    ("networks", mm.nn, "Networks"),
    ("distributions", mm.distributions, "Distributions and statistics"),
    ("datasets", mm.datasets, "Data sets"),
    ("metrics", mm.metrics, "Metrics"),
    ("callbacks", mm.callbacks, "Callbacks of a training"),
    ("protocols", mm.protocols, "Protocols of papers"),
    ("plots", mm.plots, "Figures"),
)


def sections() -> list[tuple[str, ModuleType, str]]:
    """Return page, module and heading of every public module that has no pages of another kind."""
    elsewhere = {"estimators", "models", "objectives", "posteriors", "recipes"}
    listed = {module.__name__ for _, module, _ in SECTIONS}
    modules = {name: getattr(mm, name) for name in mm.__all__ if inspect.ismodule(getattr(mm, name))}
    others = [n for n, module in modules.items() if module.__name__ not in listed and n not in elsewhere]
    return [*SECTIONS, *((name, modules[name], name.capitalize()) for name in others)]


def bibliography() -> list[str]:
    """Return the entries of the bibliography, one a line."""
    lines = (DOCS / "bibliography.md").read_text(encoding="utf-8").splitlines()
    return [line.removeprefix("- ") for line in lines if line.startswith("- ")]


def papers_of(thing: Any) -> list[str]:
    """Return the entries of the bibliography that a docstring refers to, by their numbers or authors and years."""
    text = " ".join((inspect.getdoc(thing) or "").partition("References:")[2].split())
    found = []
    for entry in bibliography():
        numbers = re.findall(r"arxiv\.org/abs/([\d.]+)", entry)
        short = re.match(r"\*\*(.+?)\*\*", entry)
        if any(number in text for number in numbers) or (short is not None and short[1] in text):
            found.append(entry)
    known = " ".join(found)
    numbers = [number for number in re.findall(r"arXiv:(\d{4}\.\d{4,5})", text) if number not in known]
    return found + [f"[arXiv:{number}](https://arxiv.org/abs/{number})" for number in numbers]


def title(name: str) -> str:
    """Return a heading with the name of a thing."""
    return f"# {name}\n"


def documented(directive: str, path: str, *options: str) -> str:
    """Return a block that documents the object at a path from its docstring."""
    lines = [f".. {directive}:: {path}", *(f"   :{option}" for option in options)]
    return "\n".join(["```{eval-rst}", *lines, "```", ""])


def reference(path: str, thing: Any) -> str:
    """Return a block that documents an object; fields of a named tuple are in its docstring already."""
    fields = getattr(thing, "_fields", ())
    options = [f"exclude-members: {', '.join(fields)}"] if fields else []
    return documented(directive_for(thing), path, *options)


def directive_for(thing: Any) -> str:
    """Return the directive of autodoc that fits an object."""
    if inspect.isclass(thing):
        return "autoclass"
    return "autofunction" if inspect.isroutine(thing) else "autodata"


def papers_text(things: Iterable[Any]) -> str:
    """Return the section of the papers that some objects refer to; empty if there are none."""
    entries = list(dict.fromkeys(entry for thing in things for entry in papers_of(thing)))
    return "\n".join(["## Papers", "", *(f"- {entry}" for entry in entries), ""]) if entries else ""


def bounds_text(objective: Any) -> str:
    """Return what an objective bounds, with two and with three modalities, as its table says."""
    lines = [f"- of `{', '.join(names)}`: {objective.bounds(names)}" for names in (TWO, THREE)]
    return "\n".join(["## What it bounds", "", *lines, ""])


def terms_text(objective: Any) -> str:
    """Return the table of terms of an objective with two modalities."""
    table = objective.describe(TWO)
    return "\n".join(["## Terms", "", "```text", table, "```", ""])


def recipes_of(name: str) -> list[str]:
    """Return the recipes that train an objective."""
    listed = {recipe for names in RECIPES_OF.values() for recipe in names}
    functions = [r for r in mm.recipes.__all__ if inspect.isfunction(getattr(mm.recipes, r)) and r not in listed]
    mention = re.compile(rf"objectives\.{name}\b")
    return [
        *RECIPES_OF.get(name, ()),
        *(r for r in functions if mention.search(inspect.getdoc(getattr(mm.recipes, r)))),
    ]


def runs_text(name: str) -> str:
    """Return the recipes and commands of an objective; empty if there are none."""
    lines = []
    for recipe in recipes_of(name):
        command = recipe.replace("_", "-")
        has_command = command in TRAINED
        shown = f": `pyro-mm train digits --recipe {command}`" if has_command else ""
        lines.append(f"- {{py:func}}`pyro_mm.recipes.{recipe}`{shown}")
    lines += [f"- `pyro-mm reproduce {run}`" for run in RUNS_OF.get(name, ())]
    return "\n".join(["## Recipes and commands", "", *lines, ""]) if lines else ""


FIGURE_CAPTIONS: Mapping[str, str] = {
    "models": "The graph of the example below; what is observed is grey",
    "posteriors": "{name} of two experts, whose means are the crosses: given either modality, and both",
}
"""Module -> the text under the figures of its pages."""


def has_figure(module: str, name: str) -> bool:
    """Return True if the page of a story, a posterior or an estimator has a figure."""
    return module == "models" or (module == "posteriors" and name in page_figures.POOLED)


def figure_text(caption: str) -> str:
    """Return the figure of a page, which is called as the page; its name is filled in where the page is written."""
    return f"![{caption}](FIGURE)\n\n*{caption}.*\n"


def figures() -> dict[str, Callable[[], Any]]:
    """Return the path of every page with a figure -> a function that draws it."""
    found: dict[str, Callable[[], Any]] = {}
    for name, make in TABLES.items():
        found[f"objectives/{name}"] = lambda make=make: page_figures.draw_objective(make())
    for name, thing in STORIES.items():
        found[f"stories/{name}"] = lambda thing=thing: page_figures.draw_story(thing)
    for name in page_figures.POOLED:
        found[f"posteriors/{name}"] = lambda name=name: page_figures.draw_posterior(name)
    return found


def objective_page(name: str) -> str:
    """Return the page of an objective."""
    function = getattr(mm.objectives, name)
    is_class = inspect.isclass(function)
    parts = [
        title(name),
        figure_text(f"The terms of {name} with two modalities"),
        bounds_text(TABLES[name]()),
        terms_text(TABLES[name]()),
        "## Definition\n",
        documented(directive_for(function), f"pyro_mm.objectives.{name}", *(["no-members:"] if is_class else [])),
        runs_text(name),
        papers_text([function]),
    ]
    return "\n".join(parts)


def class_page(module: str, name: str, thing: Any) -> str:
    """Return the page of a story, a posterior or an estimator."""
    definition = documented("autoclass", f"pyro_mm.{module}.{name}")
    shown = figure_text(FIGURE_CAPTIONS[module].format(name=name)) if has_figure(module, name) else ""
    return "\n".join([title(name), shown, definition, papers_text([thing])])


def recipes_page() -> str:
    """Return the page of all recipes."""
    parts = [title("Recipes"), module_text(mm.recipes)]
    names = [name for name in mm.recipes.__all__ if name != "RECIPES"]
    parts += [reference(f"pyro_mm.recipes.{n}", getattr(mm.recipes, n)) for n in names]
    return "\n".join(parts)


def module_text(module: ModuleType) -> str:
    """Return the docstring of a module, as a block."""
    return "\n".join(["```{eval-rst}", inspect.getdoc(module) or "", "```", ""])


def section_page(path: str, module: ModuleType, heading: str) -> str:
    """Return the page of what a module makes public."""
    parts = [title(heading), f"`pyro_mm.{path}`\n", module_text(module)]
    for name in module.__all__:
        thing = getattr(module, name)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            parts.append(reference(f"pyro_mm.{path}.{name}", thing))
    return "\n".join(parts)


def top_page() -> str:
    """Return the page of what ``import pyro_mm as mm`` makes public beside its modules."""
    parts = [title("pyro_mm"), "`import pyro_mm as mm`\n"]
    for name in mm.__all__:
        thing = getattr(mm, name)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            parts.append(reference(f"pyro_mm.{name}", thing))
    return "\n".join(parts)


def language_page() -> str:
    """Return the page of what tables of terms are written in."""
    parts = [title("Terms and tables"), module_text(mm.objectives)]
    for name in LANGUAGE:
        thing = getattr(mm.objectives, name)
        if inspect.isclass(thing) or inspect.isroutine(thing):
            parts.append(reference(f"pyro_mm.objectives.{name}", thing))
    return "\n".join(parts)


def index_page(heading: str, text: str, names: Iterable[str], things: Mapping[str, Any]) -> str:
    """Return a page that lists pages of one kind with the first sentence of each."""
    rows = [f"| [{name}]({name}.md) | {first_sentence(things[name])} |" for name in names]
    tree = ["```{toctree}", ":hidden:", "", *names, "```", ""]
    return "\n".join([title(heading), text, "", "| | |", "| --- | --- |", *rows, "", *tree])


def first_sentence(thing: Any) -> str:
    """Return the first sentence of a docstring, as Markdown."""
    text = " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`").replace("|", "\\|")


def mistakes_page() -> str:
    """Return the page of mistakes that are refused, with the messages that they give when they are run."""
    head = (DOCS / "refused_mistakes.md.in").read_text(encoding="utf-8")
    return head + "\n" + refused_mistakes.markdown()


def pages() -> dict[str, str]:
    """Return the path of every generated page -> its text."""
    objectives = {name: getattr(mm.objectives, name) for name in TABLES}
    texts = {
        "stories/index": index_page("Stories", "A story is p(z, x_1 .. x_M), a callable of a batch.", STORIES, STORIES),
        "posteriors/index": index_page(
            "Posteriors", "A posterior is q(z | x_S), for any set S of observed modalities.", POSTERIORS, POSTERIORS
        ),
        "objectives/index": index_page(
            "Objectives",
            "An objective is a table of terms. How to choose one: [choose an objective](../../choose_an_objective.md).",
            objectives,
            objectives,
        ),
        "estimators/index": index_page(
            "Estimators", "An estimator computes a term from draws of the guide.", ESTIMATORS, ESTIMATORS
        ),
        "reference/pyro_mm": top_page(),
        "reference/terms": language_page(),
        "reference/recipes": recipes_page(),
        "mistakes": mistakes_page(),
    }
    texts |= {f"objectives/{name}": objective_page(name) for name in TABLES}
    texts |= {f"stories/{name}": class_page("models", name, thing) for name, thing in STORIES.items()}
    texts |= {f"posteriors/{name}": class_page("posteriors", name, thing) for name, thing in POSTERIORS.items()}
    texts |= {f"estimators/{name}": class_page("estimators", name, thing) for name, thing in ESTIMATORS.items()}
    for name, module, heading in sections():
        path = "nn" if name == "networks" else name
        texts[f"reference/{name}"] = section_page(path, module, heading)
    return {name: text.replace("(FIGURE)", f"({name.rpartition('/')[2]}.png)") for name, text in texts.items()}


def copies() -> dict[str, Path]:
    """Return the name of every page that is a copy of a file outside of this folder -> that file."""
    notebooks = {f"notebooks/{path.name}": path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    return {"data.md": ROOT / "data" / "README.md", "contributing.md": ROOT / "CONTRIBUTING.md", **notebooks}


def write_all(folder: Path) -> None:
    """Write every generated page and copy into a folder, which is emptied first."""
    shutil.rmtree(folder, ignore_errors=True)
    for name, text in pages().items():
        path = folder / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name, draw in figures().items():
        page_figures.save(draw(), folder / f"{name}.png")
    for name, source in copies().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, path)
