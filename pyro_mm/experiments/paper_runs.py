"""The run of one paper's recipe: trained, and its figures estimated beside the published ones."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any

import torch
import typer

from ..batch.batch import Batch
from ..recipes import Recipe
from ..training.weights import load, save
from ..utils.atomic_files import replace_text
from .console import format_share, markdown, print_table
from .estimates import FITTED_TEXT, estimate, summarize
from .published import Figure, Reproduction
from .trainings import COURSE_PARTICLES, Progress, RunOptions, train_recipe

HEADER = ("quantity", "the guide's draws", "K", "rows", "published", "by the guide", "s.e.", "k-hat > 0.7")
FITTED_HEADER = ("fitted", "s.e.", "median ESS", "k-hat > 0.7")
COURSE_ROWS = 500  # test rows of the points of course-<seed>.csv


def reproduce_paper(paper: Reproduction, options: RunOptions) -> None:
    """Train a paper's recipe, estimate its figures on the test rows and print the table.

    Files: ``weights-<seed>.pt`` by :func:`pyro_mm.save`, ``table-<seed>.json`` and ``table-<seed>.md``. With
    ``options.weights`` these weights are evaluated, and nothing is trained.
    """
    train, test = options.load(paper)
    torch.manual_seed(options.seed)
    run = paper.recipe(train)
    epochs = options.epochs or paper.epochs
    training = f"{epochs} of {paper.epochs} epochs, seed {options.seed}"
    if options.weights is not None:
        load(options.weights, run.model, run.guide)
        for module in (run.model, run.guide):
            module.to(options.device)
        training = f"weights of {options.weights.name}"
    else:
        course = partial(
            paper.figures[0].estimate, run.model, run.guide, test[:COURSE_ROWS], num_particles=COURSE_PARTICLES, seed=0
        )
        train_recipe(paper, run, train, options, Progress("", options, options.out, epochs, course))
        save(options.out / f"weights-{options.seed}.pt", run.model, run.guide)

    test = test[: options.rows or test.size]
    num_particles = options.particles or paper.num_particles
    header = HEADER + (FITTED_HEADER if options.fitted else ())
    lines = []
    for figure in paper.figures:  # written one by one: a run that is cut off keeps those that it has
        lines.append(_estimate(figure, num_particles, run, test, options))
        typer.echo(f"estimated {lines[-1]['quantity']}, {figure.proposal}")
        table = {"training": training, "seed": options.seed, "rows": lines}
        replace_text(options.out / f"table-{options.seed}.json", json.dumps(table, indent=2) + "\n")
        cells = [_format(line) for line in lines]
        replace_text(options.out / f"table-{options.seed}.md", markdown(header, cells))
    print_table(f"{paper.title}: {training}; {paper.pixels}", header, cells)


def _estimate(figure: Figure, num_particles: int, run: Recipe, test: Batch, options: RunOptions) -> dict[str, Any]:
    """Estimate a figure: the entry of table-<seed>.json, with one entry for each proposal."""
    found = estimate(
        figure.estimate, run.model, run.guide, test, fitted=options.fitted, num_particles=num_particles,
        seed=options.seed,
    )  # fmt: skip
    line = {
        "quantity": found.evidence.quantity, "num_particles": num_particles, "rows": test.size,
        "published": dict(figure.published), "guide": {"proposal": figure.proposal, **summarize(found.guide)},
    }  # fmt: skip
    if options.fitted:
        line["fitted"] = {"proposal": FITTED_TEXT, **summarize(found.evidence)}
    return line


def _format(line: dict[str, Any]) -> list[str]:
    """Format an entry of :func:`_estimate` as cells under :data:`HEADER`, and :data:`FITTED_HEADER` if it has them."""
    published = ", ".join(f"{value:.2f} ({source})" for source, value in line["published"].items()) or "–"
    guide = line["guide"]
    cells = [
        line["quantity"], guide["proposal"], str(line["num_particles"]), str(line["rows"]), published,
        f"{guide['value']:.3f}", f"{guide['standard_error']:.3f}", format_share(guide["untrusted"]),
    ]  # fmt: skip
    if fitted := line.get("fitted"):
        ess = "–" if math.isnan(fitted["median_ess"]) else f"{fitted['median_ess']:.0f}"
        cells += [
            f"{fitted['value']:.3f}", f"{fitted['standard_error']:.3f}", ess, format_share(fitted["untrusted"])
        ]  # fmt: skip
    return cells
