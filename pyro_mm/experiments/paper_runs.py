"""The run of one paper's recipe: trained, and its figures estimated beside the published ones."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch

from ..batch.batch import Batch
from ..recipes import Recipe
from ..utils.atomic_files import replace_text
from .console import format_share, print_table
from .published import Figure, Reproduction
from .trainings import COURSE_PARTICLES, Progress, RunOptions, train_recipe

HEADER = ("quantity", "proposal", "K", "rows", "published", "here", "s.e.", "k-hat > 0.7")
COURSE_ROWS = 500  # test rows of the points of course-<seed>.csv


def reproduce_paper(paper: Reproduction, options: RunOptions) -> None:
    """Train a paper's recipe, estimate its figures on the test rows, print the table and write table-<seed>.json."""
    train, test = options.load(paper)
    torch.manual_seed(options.seed)
    run = paper.recipe(train)
    epochs = options.epochs or paper.epochs
    course = partial(
        paper.figures[0].estimate, run.model, run.guide, test[:COURSE_ROWS], num_particles=COURSE_PARTICLES, seed=0
    )
    train_recipe(paper, run, train, options, Progress("", options, options.out, epochs, course))

    test = test[: options.rows or test.size]
    lines = [_estimate(figure, paper, run, test, options.seed) for figure in paper.figures]
    table = {"epochs": epochs, "seed": options.seed, "rows": lines}
    replace_text(options.out / f"table-{options.seed}.json", json.dumps(table, indent=2) + "\n")
    title = f"{paper.title}: {epochs} of {paper.epochs} epochs, seed {options.seed}; {paper.pixels}"
    print_table(title, HEADER, [_format(line) for line in lines])


def _estimate(figure: Figure, paper: Reproduction, run: Recipe, test: Batch, seed: int) -> dict[str, Any]:
    """Estimate a figure: the entry of table-<seed>.json."""
    evidence = figure.estimate(run.model, run.guide, test, num_particles=paper.num_particles, seed=seed)
    value, error = evidence.mean()
    return {
        "quantity": evidence.quantity, "proposal": figure.proposal, "num_particles": paper.num_particles,
        "rows": test.size, "value": value, "standard_error": error, "untrusted": evidence.untrusted(),
        "published": dict(figure.published),
    }  # fmt: skip


def _format(line: dict[str, Any]) -> list[str]:
    """Format an entry of :func:`_estimate` as cells under :data:`HEADER`."""
    published = ", ".join(f"{value:.2f} ({source})" for source, value in line["published"].items()) or "–"
    return [
        line["quantity"], line["proposal"], str(line["num_particles"]), str(line["rows"]), published,
        f"{line['value']:.3f}", f"{line['standard_error']:.3f}", format_share(line["untrusted"]),
    ]  # fmt: skip
