"""Settings of the whole process that other libraries change: changed for a while at most, and put back exactly."""

from __future__ import annotations

import multiprocessing
import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType

import pyro
from torch.distributions import Distribution

VALIDATION = ("validate_distributions_pyro", "validate_distributions_torch", "validate_infer", "validate_poutine")


def override_validation(on: bool) -> AbstractContextManager[None]:
    """Switches the checks of Pyro and of ``torch.distributions`` on or off for a while.

    ``pyro.validation_enabled`` puts torch's setting back to what Pyro's was, and not to what torch's was.
    """
    return pyro.settings.context(**dict.fromkeys(VALIDATION, on))


@contextmanager
def preserve_process_settings() -> Iterator[None]:
    """Puts back what importing a library, or torch's compiler, changes of the process: it is imported within.

    Those are the filters of warnings (scipy, sympy), the state of Python's generator (rich draws from it), and the
    start method of processes (inductor settles it, after which nobody can set another). What a library goes on needing
    is left: environment variables for its runtime, entries of ``sys.path``, colour maps that it adds.
    """
    state = random.getstate()
    start_method = multiprocessing.get_start_method(allow_none=True)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        random.setstate(state)
        if multiprocessing.get_start_method(allow_none=True) != start_method:
            multiprocessing.set_start_method(start_method, force=True)


def import_zuko() -> ModuleType:
    """Imports zuko, and puts back the attributes of ``torch.distributions.Distribution`` that its import replaces.

    The checks of arguments that zuko switches off for all distributions are off for its own ones alone. Where zuko is
    imported already, whoever did that has chosen, and nothing is put back.
    """
    if "zuko" in sys.modules:
        return sys.modules["zuko"]
    with preserve_process_settings(), _preserve_attributes(Distribution):
        import zuko
    for own in vars(zuko.distributions).values():
        if isinstance(own, type) and issubclass(own, Distribution) and own.__module__.startswith("zuko."):
            own._validate_args = False
            if own.arg_constraints is Distribution.arg_constraints:
                own.arg_constraints = {}  # type: ignore[assignment, misc]
    return zuko


@contextmanager
def _preserve_attributes(owner: type) -> Iterator[None]:
    before = dict(vars(owner))
    try:
        yield
    finally:
        for name, value in before.items():
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)
