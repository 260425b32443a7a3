"""Properties that hold for all examples of hypothesis: their number, a guard against hangs, and whose an error is.

The examples are the same in every run. ``PYRO_MM_LONG=1`` tries twenty times as many.
"""

from __future__ import annotations

import faulthandler
import functools
import inspect
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyro
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import pyro_mm

LONG = os.environ.get("PYRO_MM_LONG") == "1"
EXAMPLES = 1000 if LONG else 50
HANGS_AFTER = 120  # seconds; an example takes a tenth of one, and a minute where a machine is busy
PACKAGE = Path(pyro_mm.__file__).parent

SETTINGS = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=(Phase.generate, Phase.shrink),  # no explanations, which take minutes
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


def for_all(examples=EXAMPLES, **strategies):
    """Decorate a test of one example: hypothesis calls it with many, each from the same seeds and an empty store.

    Args:
        examples: how many; fewer than :data:`EXAMPLES` for examples that are slow.
        strategies: argument -> strategy.
    """

    def decorate(test):
        @functools.wraps(test)
        def example(**arguments):
            pyro.clear_param_store()
            torch.manual_seed(0)
            with no_hang(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                test(**arguments)

        names = [name for name in inspect.signature(test).parameters if name not in strategies]
        example.__signature__ = inspect.Signature(
            [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in [*names, *strategies]]
        )
        return settings(SETTINGS, max_examples=examples)(given(**strategies)(example))

    return decorate


@contextmanager
def no_hang():
    """Raise an AssertionError if what runs inside does not end; end the process if it does not return to Python."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def fail(*_):
        raise AssertionError(f"no end after {HANGS_AFTER} seconds")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, HANGS_AFTER)
    faulthandler.dump_traceback_later(3 * HANGS_AFTER, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def assert_ours(error, *words):
    """Assert that an error is a ValueError or TypeError that this package raised, and says all of some things.

    Args:
        error: the exception.
        words: regular expressions, each of which its message has to match: the modality, what was expected and given.
    """
    text = str(error)
    assert isinstance(error, ValueError | TypeError), f"{type(error).__name__}: {text}"
    last = traceback.extract_tb(error.__traceback__)[-1]
    assert Path(last.filename).is_relative_to(PACKAGE), f"raised in {last.filename}: {text}"
    for word in words:
        assert re.search(word, text, re.S), f"{word!r} is not in: {text}"


def number(value):
    """Return the regular expression of a number that stands by itself."""
    return rf"(?<![\w.-]){re.escape(str(value))}(?![\w]|\.\d)"


def shape(sizes):
    """Return the regular expression of a shape, as Python writes it."""
    return re.escape(str(tuple(sizes)))


seeds = st.integers(0, 2**31 - 1)


def generator(seed):
    """Return NumPy's generator of a seed."""
    return np.random.default_rng(seed)
