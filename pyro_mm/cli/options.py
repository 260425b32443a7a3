"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from ..recipes.kinds import Kind
from .choices import EPOCHS, ESTIMATORS, FILE_EPOCHS, OBJECTIVES, TRAINED, join_names

Dataset = Annotated[
    str,
    typer.Argument(
        help=f"Data set: {join_names(EPOCHS)}; or an npz file of yours, as np.savez writes it: an array NAME with "
        "the rows of each modality, NAME.present with its mask and NAME.lengths with lengths of sequences."
    ),
]
TestFile = Annotated[
    Path | None,
    typer.Option(
        "--test",
        exists=True,
        dir_okay=False,
        help="For a file: an npz file of the test rows. By default a fifth of the rows, held out by the seed.",
    ),
]
Kinds = Annotated[
    str | None,
    typer.Option(
        help="For a file: kinds of modalities that their values do not say, as in rna=counts,notes=tokens. One of "
        f"{join_names(get_args(Kind))}."
    ),
]
RecipeName = Annotated[str, typer.Option(help=f"Model, posterior and objective of a paper: {join_names(TRAINED)}.")]
ObjectiveName = Annotated[
    str | None, typer.Option(help=f"Objective; by default that of the recipe. One of {join_names(OBJECTIVES)}.")
]
EstimatorName = Annotated[
    str | None,
    typer.Option(help=f"Gradient estimator; by default that of the objective. One of {join_names(ESTIMATORS)}."),
]
Particles = Annotated[int | None, typer.Option(min=1, help="Draws of the latents per row and training step.")]
Epochs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Epochs of training. By default "
        f"{join_names(f'{epochs} for {name}' for name, epochs in EPOCHS.items())}, {FILE_EPOCHS} for a file.",
        show_default=False,
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows per minibatch.")]
Rate = Annotated[float, typer.Option(min=0.0, max=1e6, help="Step size of the optimiser, Adam.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of weights, minibatches and draws.")]
Data = Annotated[
    Path | None,
    typer.Option(
        exists=True,
        file_okay=False,
        help="Folder of the data files, if the data set has any. By default the folder named by PYRO_MM_DATA; missing "
        "files are downloaded.",
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, .. By default cuda if it is available.")]
Rows = Annotated[int, typer.Option(min=1, help="Number of test rows to evaluate, the first ones.")]
Compile = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the training step, which needs a C++ compiler, or run it as it is. By default it is compiled on "
        "a GPU if the training is long enough for that to pay, which is said then.",
        show_default=False,
    ),
]
EvidenceParticles = Annotated[
    int, typer.Option(min=2, help="Draws per row, K, of the importance-sampled likelihoods in the table.")
]
Fitted = Annotated[
    bool,
    typer.Option(
        "--fitted/--no-fitted",
        help="Estimate likelihoods by proposals fitted to each row, with the guide's beside them; or by the guide "
        "alone.",
    ),
]
