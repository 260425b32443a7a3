"""Figures of the generated pages: the graph of each story, densities of posteriors, and terms of objectives.

``generate_pages.py`` draws them at every build. Graphs are read off a run of the story in its docstring, densities are
those of the package, and terms are those of the table, so that no figure can say something else than the code.
"""

from __future__ import annotations

import doctest
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from pyro.infer.inspect import get_model_relations
from torch import Tensor, nn

import pyro_mm as mm
from pyro_mm.objectives import ALL, EACH, EVERY, OTHERS, PRIOR, Term

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"  # of Okabe & Ito's palette
TWO = ("image", "label")
RADIUS = 0.34
PIXELS = 120
EXPERTS: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "x1": ((-1.2, 0.3), (1.1, 0.35)),
    "x2": ((0.9, -0.6), (0.4, 1.0)),
}
"""Modality -> mean and standard deviations of its expert in the plane."""

SETTINGS: Mapping[str, Mapping[str, Any]] = {"DependentExperts": {"correlation": 0.4}, "HoelderPooling": {}}
POOLED = ("ProductOfExperts", "MixtureOfExperts", "MixtureOfProducts", "HoelderPooling", "DependentExperts")
"""Posteriors that are made of an expert per modality, and so have a picture in the plane."""


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=PIXELS)


def empty(width: float, height: float, columns: int = 1) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure of panels in a row."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


# -- stories ----------------------------------------------------------------------------------------------------


def story_of_docstring(story: Any) -> tuple[Any, Any]:
    """Return the model and the batch of the example in a story's docstring."""
    names: dict[str, Any] = {}
    for example in doctest.DocTestParser().get_examples(inspect.getdoc(story)):
        exec(compile(example.source, story.__name__, "single"), names)
        batch = names.get("rows", names.get("batch"))
        if "model" in names and batch is not None:
            return names["model"], batch
    raise ValueError(f"the docstring of {story.__name__} has no example of a model and a batch")


def draw_story(story: Any) -> Figure:
    """Draw the graphical model of the example in a story's docstring."""
    with torch.random.fork_rng(devices=[]):
        model, batch = story_of_docstring(story)
        relations = get_model_relations(model, (batch,))
    parents = {site: [p for p in found if p != site] for site, found in relations["sample_sample"].items()}
    depth: dict[str, int] = {}
    for site in parents:  # in the order in which they are sampled, so that parents come first
        depth[site] = 1 + max((depth[p] for p in parents[site] if p in depth), default=-1)
    lowest = max(depth.values())
    observed = {*relations["observed"]}
    depth |= {site: lowest for site in observed if not any(site in found for found in parents.values())}

    levels = [[site for site in parents if depth[site] == level] for level in range(lowest + 1)]
    widest = max(len(level) for level in levels)
    place = {
        site: (1.6 * (index - (len(level) - 1) / 2) + _aside(row, levels), -1.5 * row)
        for row, level in enumerate(levels)
        for index, site in enumerate(level)
    }
    figure, (ax,) = empty(1.25 * widest + 0.8, 1.15 * len(levels) + 0.5)
    for site, (x, y) in place.items():
        for parent in parents[site]:
            _arrow(ax, place[parent], (x, y))
        ax.add_patch(Circle((x, y), 0.46, fc="#d9d9d9" if site in observed else "white", ec="black", zorder=2))
        ax.text(x, y, site, ha="center", va="center", fontsize=9, zorder=3)
    left, low = -0.8 * widest - 0.05, -1.5 * lowest - 0.8
    plate = FancyBboxPatch((left, low), -2 * left, 1.5 * lowest + 1.45, "round,pad=0.02", fc="none", ec=GREY)
    ax.add_patch(plate)
    ax.text(-left - 0.1, low + 0.08, "data, N rows", ha="right", va="bottom", fontsize=8, color=GREY)
    ax.set(xlim=(left - 0.15, -left + 0.15), ylim=(low - 0.15, 0.8), aspect="equal")
    ax.axis("off")
    return figure


def _aside(row: int, levels: Sequence[Sequence[str]]) -> float:
    """Return the shift of a level between two others, so that arrows past it stay visible."""
    return 0.8 if 0 < row < len(levels) - 1 else 0.0


def _arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow between two nodes."""
    style = {"arrowstyle": "-|>", "color": "black", "shrinkA": 20, "shrinkB": 28, "linewidth": 0.9}
    ax.annotate("", end, start, arrowprops=style, zorder=1)


# -- posteriors -------------------------------------------------------------------------------------------------


class Expert(nn.Module):
    """A Normal in the plane that reads nothing of its modality."""

    def __init__(self, mean: Sequence[float], deviation: Sequence[float]):
        super().__init__()
        raw = torch.tensor(deviation).expm1().log() - math.log(math.expm1(1.0))  # a raw scale of 0 is a deviation of 1
        self.raw = torch.tensor([*mean, *raw.tolist()])

    def forward(self, x: Tensor) -> Tensor:
        """Return mean and raw scale for every row."""
        return self.raw.expand(*x.shape[:-1], 4)


def draw_posterior(name: str) -> Figure:
    """Draw q(z | x1), q(z | x2) and q(z | x1, x2) of a posterior of experts in the plane."""
    experts = {key: mm.conditionals.Normal(Expert(*values)) for key, values in EXPERTS.items()}
    posterior = getattr(mm.posteriors, name)(experts, **SETTINGS.get(name, {}))
    batch = mm.Batch({key: torch.zeros(1, 1) for key in EXPERTS})
    axis = torch.linspace(-4, 4, 121)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    figure, panels = empty(8.4, 2.9, 3)
    shown = (
        ("q(z | x1)", batch.only("x1"), BLUE),
        ("q(z | x2)", batch.only("x2"), ORANGE),
        ("q(z | x1, x2)", batch, GREEN),
    )
    for ax, (title, rows, colour) in zip(panels, shown, strict=True):
        with torch.no_grad():
            density = posterior(rows).log_prob(grid.reshape(-1, 1, 2)).exp().reshape(grid.shape[:2])
        levels = density.max() * torch.tensor([0.02, 0.1, 0.25, 0.5, 0.75, 0.95])
        ax.contourf(
            axis, axis, density, levels=[*levels.tolist(), 1.01 * float(density.max())], colors=colour, alpha=0.2
        )
        ax.contour(axis, axis, density, levels=levels.tolist(), colors=colour, linewidths=0.8)
        for (x, y), _ in EXPERTS.values():
            ax.plot(x, y, "k+", markersize=6)
        ax.set_title(title, fontsize=10)
        ax.set(xticks=(), yticks=(), aspect="equal")
    return figure


# -- objectives -------------------------------------------------------------------------------------------------


def concrete_terms(table: Sequence[Term], names: Sequence[str]) -> list[tuple[Any, Any, Any, str]]:
    """Return (encode, decode, given, text) of every term: sets of these names, PRIOR, or the text of a symbol."""
    found = []
    for term in table:
        sets = (term.encode, term.decode, term.given)
        if EACH in sets or OTHERS in sets:
            cases: list[Any] = list(names)
        elif EVERY in sets:
            cases = [[n for i, n in enumerate(names) if number >> i & 1] for number in range(1, 2 ** len(names))]
        else:
            cases = [None]
        for case in cases:
            encode, decode, given = (_resolve(each, case, names) for each in sets)
            found.append((encode, decode, given, _below(term, given)))
    return found


def _resolve(value: Any, case: Any, names: Sequence[str]) -> Any:
    """Return a set of modalities, PRIOR as it is, or the text of a symbol that no fixed set stands for."""
    if value is PRIOR:
        return PRIOR
    known = {ALL: list(names), EACH: [case], OTHERS: [name for name in names if name != case], EVERY: case}
    for symbol, members in known.items():
        if value is symbol:
            return members
    if isinstance(value, tuple | list | frozenset):
        return [name for name in names if name in value]
    return str(value)


def draw_objective(objective: Any) -> Figure:
    """Draw each term of an objective with two modalities: what it encodes, what it decodes, and what its KL is to."""
    terms = objective.terms(TWO) if callable(objective.terms) else objective.terms
    shown = concrete_terms(terms, TWO)
    columns = min(len(shown), 4)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(2.5 * columns, 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for ax in panels:
        ax.axis("off")
    for ax, term in zip(figure.axes, shown, strict=False):
        _draw_term(ax, *term)
    return figure


def _below(term: Term, given: Any) -> str:
    """Return what stands beside the likelihood in a term."""
    if term.kind is not None:
        return f"statistic {type(term).__name__}"
    return "no KL" if term.kl == 0 else f"KL to {_density('q', given)}"


def _draw_term(ax: Axes, encode: Any, decode: Any, given: Any, below: str) -> None:
    """Draw a term: encoded modalities on the left, z, decoded ones on the right, and the text of its KL below."""
    _node(ax, (0, 0), "z", "white")
    for place, name in zip((0.6, -0.6), TWO, strict=True):
        encoded, decoded = (not isinstance(s, list) or name in s for s in (encode, decode))
        encoded = encoded and encode is not PRIOR
        _node(ax, (-1.5, place), name, "#cfe3f1" if encoded else "white", faint=not encoded)
        _node(ax, (1.5, place), name, "#f7dccb" if decoded else "white", faint=not decoded)
        if encoded:
            _edge(ax, (-1.5, place), (0, 0), BLUE, dashed=not isinstance(encode, list))
        if decoded:
            _edge(ax, (0, 0), (1.5, place), ORANGE, dashed=not isinstance(decode, list))
    ax.text(0, 1.18, f"E of {_density('q', encode)}", ha="center", fontsize=8, color=BLUE)
    ax.text(0, -1.3, below, ha="center", fontsize=8, color=GREY)
    ax.set(xlim=(-2.1, 2.1), ylim=(-1.5, 1.5), aspect="equal")


def _density(letter: str, names: Any) -> str:
    if names is PRIOR:
        return "p(z)"
    inside = ", ".join(names) if isinstance(names, list) else names
    return f"{letter}(z | {inside or 'nothing'})"


def _node(ax: Axes, place: tuple[float, float], text: str, fill: str, faint: bool = False) -> None:
    colour = "#bbbbbb" if faint else "black"
    ax.add_patch(Circle(place, RADIUS if text == "z" else 0.44, fc=fill, ec=colour, zorder=2))
    ax.text(*place, text, ha="center", va="center", fontsize=8, color=colour, zorder=3)


def _edge(ax: Axes, start: tuple[float, float], end: tuple[float, float], colour: str, dashed: bool) -> None:
    style = {
        "arrowstyle": "-|>", "color": colour, "shrinkA": 15, "shrinkB": 19, "linestyle": "--" if dashed else "-",
    }  # fmt: skip
    ax.annotate("", end, start, arrowprops=style, zorder=1)
