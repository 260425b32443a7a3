"""The command ``pyro-mm reproduce``: train and evaluate as papers did, going on where a run was stopped."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from .console import check_writable, nearest, parse_device, print_table, report_errors
from .families import FAMILIES, Family
from .family_runs import reproduce_family
from .paper_runs import reproduce_paper
from .proposal_runs import compare_proposals
from .proposals import COMPARISONS, ProposalComparison
from .published import REPRODUCTIONS, Reproduction
from .studies import STUDIES
from .studies.study import Study
from .study_runs import reproduce_study
from .trainings import RunOptions, TimeLimitReached

Name = Annotated[str | None, typer.Argument(help="Name of the experiment, one of --list.", show_default=False)]
List = Annotated[bool, typer.Option("--list", help="List the experiments and exit.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Epochs of training; by default those of --list.")]
Minutes = Annotated[
    float | None, typer.Option(min=0.0, max=1e6, help="Stop after the epoch in which this time is over.")
]
Rows = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Number of test rows to evaluate, the first ones. By default all, 1000 for family-* and weak-*, or "
        "200 for fitted-proposals.",
    ),
]
Seed = Annotated[
    int,
    typer.Option(min=0, max=2**62, help="Seed; for hirt-*, mfm-* and other studies, the first of several."),
]
Seeds = Annotated[int | None, typer.Option(min=1, help="Number of seeds, for hirt-*, mfm-* and other studies.")]
Only = Annotated[
    list[str] | None,
    typer.Option(
        help='Rows of the tables of hirt-*, mfm-* and other studies whose "group, name" contains this text, of '
        'fitted-proposals whose "data set, recipe, latent" does, or a member of family-* and weak-*. May be '
        "repeated."
    ),
]
Full = Annotated[
    bool,
    typer.Option(
        "--full",
        help="Published numbers of epochs and units, for hirt-*; all images, for jmvae-gan-mnist and wae-mnist; larger "
        "images and networks, for wu-goodman-*.",
    ),
]
Course = Annotated[
    int,
    typer.Option(
        min=1,
        help="Epochs between two estimates of the first likelihood, which are printed and written to course-SEED.csv; "
        "for hirt-* and mfm-*, epochs between two printed lines.",
    ),
]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the training step, which needs a C++ compiler, or run it as it is. By default as the experiment "
        "was chosen to run, or on a GPU if the training is long enough for compilation to pay.",
        show_default=False,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        exists=True, file_okay=False, help="Folder of the data files. By default the folder named by PYRO_MM_DATA."
    ),
]
Fitted = Annotated[
    bool,
    typer.Option(
        "--fitted/--no-fitted",
        help="Estimate likelihoods by proposals fitted to each row, beside those by the guide; or by the guide alone.",
    ),
]
EvidenceParticles = Annotated[
    int | None,
    typer.Option(
        "--particles", min=2, help="Draws per row, K, of the likelihoods; by default those of the experiment. Not for "
        "hirt-*."
    ),
]  # fmt: skip
Weights = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        help="For one paper, a file of mm.save: evaluate these weights and train nothing. For fitted-proposals, the "
        "folder of weights, in which those that are missing are trained.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, .. By default cuda if it is available.")]
Finished = Annotated[
    bool,
    typer.Option(
        "--finished",
        help="Train nothing, and print the table of the runs that are finished in the folder. Several processes can "
        "train rows and seeds of one study into one folder (--only, --seed, --seeds); this is their table.",
    ),
]
Out = Annotated[
    Path | None, typer.Option(file_okay=False, help="Folder of the results. By default runs/reproduce/NAME.")
]

Experiment = Reproduction | Family | Study | ProposalComparison


def reproduce(
    context: typer.Context,
    name: Name = None,
    list_: List = False,
    epochs: Epochs = None,
    minutes: Minutes = None,
    rows: Rows = None,
    seed: Seed = 0,
    seeds: Seeds = None,
    only: Only = None,
    full: Full = False,
    course: Course = 10,
    compile: Compile = None,
    data: Data = None,
    fitted: Fitted = True,
    particles: EvidenceParticles = None,
    weights: Weights = None,
    device: Device = None,
    finished: Finished = False,
    out: Out = None,
) -> None:
    """Train and evaluate a paper's experiment and print its table.

    If a run is stopped, the same command goes on from its last epoch.
    """
    experiments: dict[str, Experiment] = {**REPRODUCTIONS, **FAMILIES, **STUDIES, **COMPARISONS}
    if list_ or name is None:
        _print_list(experiments)
        return
    if name not in experiments:
        raise typer.BadParameter(
            f"unknown reproduction {name!r}{nearest(name, experiments)}: expected one of {', '.join(experiments)}"
        )

    experiment = experiments[name]
    _check_options(experiment, particles, weights, only)
    if not isinstance(experiment, Study):
        for option, given in {"--seeds": seeds is not None, "--full": full, "--finished": finished}.items():
            if given:
                raise typer.BadParameter(f"{option}: this one is no study of several seeds, leave it out")
    elif rows is not None:
        raise typer.BadParameter("--rows: this one is measured on test rows of its own, leave it out")
    out = out or Path("runs") / "reproduce" / name
    directory = str(data) if data else None
    options = RunOptions(
        out, seed, epochs, minutes, rows, course, compile, parse_device(device), directory, fitted, particles, weights,
        draw=context.obj,
    )  # fmt: skip
    with report_errors(lambda: f"the same command goes on from the latest checkpoint in {out}"):
        check_writable(out)
        if not finished:
            out.mkdir(parents=True, exist_ok=True)
        try:
            if isinstance(experiment, Study):
                reproduce_study(experiment, options, seeds, full, only or [], finished)
            elif isinstance(experiment, ProposalComparison):
                compare_proposals(experiment, options, only or [])
            elif isinstance(experiment, Family):
                reproduce_family(experiment, options, only or [])
            else:
                reproduce_paper(experiment, options)
        except TimeLimitReached as stopped:
            typer.echo(f"{stopped}; the same command goes on from there")
            return
        typer.echo(f"written to {out}")


def _check_options(experiment: Experiment, particles: int | None, weights: Path | None, only: list[str] | None) -> None:
    """Raise a BadParameter for an option that the experiment does not have."""
    if isinstance(experiment, Reproduction) and only:
        raise typer.BadParameter("--only: this one is a single recipe, leave it out")
    if isinstance(experiment, Study) and particles is not None:
        raise typer.BadParameter("--particles: this one is measured with the published number of draws, leave it out")
    if weights is None:
        return
    if isinstance(experiment, Family | Study):
        raise typer.BadParameter("--weights: this one trains many recipes, leave it out")
    if weights.is_dir() != isinstance(experiment, ProposalComparison):
        kind = "a file of mm.save" if isinstance(experiment, Reproduction) else "a folder of such files"
        raise typer.BadParameter(f"--weights: expected {kind}, got {weights}")


def _print_list(experiments: Mapping[str, Experiment]) -> None:
    """Print the names, titles and epochs of all that can be reproduced."""
    rows = [(name, experiment.title, str(experiment.epochs)) for name, experiment in experiments.items()]
    print_table("pyro-mm reproduce NAME", ("name", "experiment", "epochs"), rows, num_left=2)
