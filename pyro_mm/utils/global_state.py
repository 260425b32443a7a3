"""Settings of the whole process that other libraries change: changed for a while at most, then restored exactly."""

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
    """Switch the checks of Pyro and of ``torch.distributions`` on or off while the context lasts.

    ``pyro.validation_enabled`` would not do: it restores torch's setting to what Pyro's was.
    """
    settings: AbstractContextManager[None] = pyro.settings.context(**dict.fromkeys(VALIDATION, on))
    return settings


@contextmanager
def preserve_process_settings() -> Iterator[None]:
    """Restore what importing a library, or torch's compiler, changes in the process while the context lasts.

    These are the filters of warnings (changed by scipy and sympy), the state of Python's generator (rich draws from
    it), and the start method of processes (inductor fixes it, after which it cannot be set). What a library
    still needs later is left: environment variables of its runtime, entries of ``sys.path``, colour maps that it adds.
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
    """Import zuko, and restore the attributes of ``torch.distributions.Distribution`` that its import replaces.

    zuko switches off the argument checks of all distributions; here they stay off for zuko's own distributions only.
    If zuko is imported already, the user has chosen its settings, and nothing is restored.

    Returns:
        The module ``zuko``.
    """
    if "zuko" in sys.modules:
        return sys.modules["zuko"]
    with preserve_process_settings(), _preserve_attributes(Distribution):
        import zuko

    module: ModuleType = zuko
    for own in vars(zuko.distributions).values():
        if isinstance(own, type) and issubclass(own, Distribution) and own.__module__.startswith("zuko."):
            own._validate_args = False
            if own.arg_constraints is Distribution.arg_constraints:
                own.arg_constraints = {}  # type: ignore[assignment]
    return module


@contextmanager
def _preserve_attributes(owner: type) -> Iterator[None]:
    """Restore the attributes of a class that are replaced while the context lasts."""
    before = dict(vars(owner))
    try:
        yield
    finally:
        for name, value in before.items():
            if vars(owner).get(name) is not value:
                setattr(owner, name, value)
