"""The run of a comparison of proposals: pairs trained or loaded and measured, and their table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import typer

from ..batch.batch import Batch
from ..recipes import Recipe
from ..sampling.fitted_proposal import Fitted
from ..training.weights import load, save
from ..utils.atomic_files import replace_text
from .console import format_share, markdown, print_table
from .proposal_measurements import measure_agreement, measure_proposals, missed_limits
from .proposals import ProposalComparison, TrainedPair
from .trainings import Progress, RunOptions, train_recipe

HEADER = (
    "quantity", "k-hat > 0.7: guide", "fitted", "median ESS: guide", "fitted", "nats per row: guide", "fitted", "time",
    "fitted - annealed", "rms z",
)  # fmt: skip
ROWS_LISTED = 8  # untrusted rows of a missed limit in the text; the JSON file has all


def compare_proposals(comparison: ProposalComparison, options: RunOptions, only: Sequence[str]) -> None:
    """Measure the pairs of a comparison, print one table and the limits that were missed.

    Weights are loaded from ``options.weights``, by default the folder "weights" of the run, or trained and saved there.
    A pair that has been measured before, with the same rows, particles, seed and device, is read from its file. Files:
    ``table-<seed>.json`` and ``table-<seed>.md``.

    Args:
        comparison: the pairs.
        options: the options of the run.
        only: parts of the names of pairs to measure; empty for all.

    Raises:
        typer.BadParameter: no pair has such a name, or ``options.fitted`` is False.
    """
    if not options.fitted:
        raise typer.BadParameter("--no-fitted: a comparison of proposals needs both of them")
    pairs = [pair for pair in comparison.pairs if not only or any(part in pair.name for part in only)]
    if not pairs:
        names = "; ".join(pair.name for pair in comparison.pairs)
        raise typer.BadParameter(f"--only: no pair has {' or '.join(only)} in its name: {names}")

    lines = []
    for pair in pairs:
        lines += _measured(comparison, pair, options)

    rows = options.rows or comparison.rows
    particles = options.particles or comparison.num_particles
    epochs = options.epochs or comparison.epochs
    settings = {pair.recipe: pair.proposal for pair in pairs if pair.proposal != Fitted()}
    others = "".join(f"; {recipe} by {proposal!r}" for recipe, proposal in settings.items())
    title = (
        f"{comparison.title}: {epochs} epochs of {comparison.train_rows} rows, seed {options.seed}; {rows} test rows, "
        f"K = {particles}, on {options.device.type}. Time is that of fitted over that of the guide's{others}"
    )
    cells = [_format(line) for line in lines]
    print_table(title, HEADER, cells)
    missed = [text for line in lines for text in _describe_missed(line)]
    for text in missed:
        typer.echo(text)
    if not missed:
        typer.echo("every limit holds")
    table = {"title": title, "lines": lines}
    replace_text(options.out / f"table-{options.seed}.json", json.dumps(table, indent=2) + "\n")
    listed = "".join(f"* {text}\n" for text in missed) or "Every limit holds.\n"
    replace_text(options.out / f"table-{options.seed}.md", f"{title}.\n\n{markdown(HEADER, cells)}\n{listed}")


def _measured(comparison: ProposalComparison, pair: TrainedPair, options: RunOptions) -> list[dict[str, Any]]:
    """Return the measurements of a pair, one per quantity, from its file if there is one."""
    rows = options.rows or comparison.rows
    particles = options.particles or comparison.num_particles
    epochs = options.epochs or comparison.epochs
    done = options.out / "measured" / (
        f"{pair.stem}-{epochs}-{rows}-{particles}-{options.seed}-{options.device.type}.json"
    )  # fmt: skip
    if not done.is_file():
        train, test = comparison.data[pair.dataset](**({"directory": options.data} if options.data else {}))
        test = test[:rows].to(options.device)
        run = _trained(comparison, pair, train[: comparison.train_rows], options, epochs)
        lines, fitted = measure_proposals(run, test, pair.proposal, particles, options.seed)
        annealed = test[: min(comparison.annealed_rows, test.size)]
        agreement = measure_agreement(run, annealed, fitted, comparison.annealing, options.seed)
        found = [
            {
                "pair": pair.name,
                **line,
                "annealed": agreement[line["quantity"]],
                "missed": missed_limits(line, pair.limits),
            }
            for line in lines
        ]
        done.parent.mkdir(parents=True, exist_ok=True)
        replace_text(done, json.dumps(found, indent=2) + "\n")
        typer.echo(f"{pair.name}: measured")
    measured: list[dict[str, Any]] = json.loads(done.read_text())
    return measured


def _trained(
    comparison: ProposalComparison, pair: TrainedPair, train: Batch, options: RunOptions, epochs: int
) -> Recipe:
    """Load the weights of a pair, or train it and save them."""
    folder = options.weights or options.out / "weights"
    path = folder / f"{_weights_stem(comparison, pair, options, epochs)}.pt"
    torch.manual_seed(options.seed)
    run = pair.build(train)
    if path.is_file():
        load(path, run.model, run.guide)
    else:
        progress = Progress(f"{pair.name}, ", options, options.out / "training" / pair.stem, epochs)
        train_recipe(comparison, run, train, options, progress)
        folder.mkdir(parents=True, exist_ok=True)
        save(path, run.model, run.guide)
    for module in (run.model, run.guide):
        module.to(options.device).requires_grad_(False)
    return run


def _weights_stem(comparison: ProposalComparison, pair: TrainedPair, options: RunOptions, epochs: int) -> str:
    """Return the name of a file of weights: another number of epochs or another seed is in it."""
    other = (epochs, options.seed) != (comparison.epochs, 0)
    return f"{pair.stem}_{epochs}_{options.seed}" if other else pair.stem


def _format(line: dict[str, Any]) -> list[str]:
    """Format the measurements of a quantity as cells under :data:`HEADER`."""
    guide, fitted, annealed = (line[name] for name in ("guide", "fitted", "annealed"))
    return [
        f"{line['pair']}: {line['quantity']}",
        format_share(guide["untrusted"]), format_share(fitted["untrusted"]),
        f"{guide['median_ess']:.0f}", f"{fitted['median_ess']:.0f}",
        f"{guide['value']:.3f} ± {guide['standard_error']:.3f}",
        f"{fitted['value']:.3f} ± {fitted['standard_error']:.3f}",
        f"{fitted['seconds'] / guide['seconds']:.1f}",
        f"{annealed['difference']:+.3f} ± {annealed['difference_error']:.3f}", f"{annealed['rms_z']:.2f}",
    ]  # fmt: skip


def _describe_missed(line: dict[str, Any]) -> list[str]:
    """Describe each limit that a quantity misses, with the rows that are not to be trusted."""
    listed = [f"{row['row']} ({row['pareto_k']:.2f})" for row in line["untrusted_rows"][:ROWS_LISTED]]
    more = ", .." if len(line["untrusted_rows"]) > ROWS_LISTED else ""
    rows = f"; rows (k-hat): {', '.join(listed)}{more}" if listed else ""
    return [f"{line['pair']}: {line['quantity']}: {text}{rows}" for text in line["missed"]]
