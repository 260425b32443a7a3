"""Fixtures shared by the tests: exactness is claimed in float64, and Pyro's store starts empty."""

import signal

import pyro
import pytest
import torch
from torch.distributions import Distribution

from tests.support.small_files import small  # noqa: F401, a fixture

collect_ignore = ["support/calls_in_a_fresh_process.py"]  # a program, which looking for doctests would run


def pytest_collection_finish(session):
    """Stop if importing a test has switched the checks of distributions off, as a plain import of zuko does."""
    if not Distribution._validate_args:
        raise pytest.UsageError("a test module has switched validation off for the whole process by its imports")


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") is not None and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture
def interruptible():
    """An interruption raises KeyboardInterrupt, also where tests run in the background and signals are ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def clean_store():
    """Start from an empty store and a fixed seed, and hold a test to leave the checks of distributions as they were."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    checked = Distribution._validate_args
    yield
    left = Distribution._validate_args
    Distribution._validate_args = checked  # lest every later test fails too
    assert left == checked, "the test, or what it calls, has switched validation for the whole process"


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
