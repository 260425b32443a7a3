"""Train, evaluate and compare multimodal deep generative models."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from ..experiments.console import plain_warnings
from ..experiments.reproduce import reproduce
from . import compare, evaluate, train
from .choices import ESTIMATORS, OBJECTIVES, TRAINED
from .figures import draw_images

__all__ = ["ESTIMATORS", "OBJECTIVES", "TRAINED", "app"]

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pyro-mm {__version__}")
        raise typer.Exit


@app.callback()
def main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train, evaluate and compare multimodal deep generative models."""
    context.with_resource(plain_warnings())
    context.obj = draw_images  # for the pictures of `reproduce`, which lies below the plots


for command in (train.train, evaluate.evaluate, compare.compare, reproduce):
    app.command()(command)
