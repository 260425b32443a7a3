"""Calls of the command line within the process, and the text that they print."""

import re

from typer.testing import CliRunner

from pyro_mm.cli import app


def run(*arguments):
    """Run ``pyro-mm`` with arguments, which become text; return the result of click's runner."""
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "TERM": "dumb"})


def text_of(result):
    """Return the output of a command in one line, without the frames of panels."""
    return re.sub(r"[\s│╭╮╰╯─]+", " ", result.output)
