"""Fixtures shared by the tests: exactness is claimed in float64, and Pyro's store starts empty."""

import signal

import pyro
import pytest
import torch

from tests.support.small_files import small  # noqa: F401, a fixture

collect_ignore = ["support/calls_in_a_fresh_process.py"]  # a program, which looking for doctests would run


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
    pyro.clear_param_store()
    torch.manual_seed(0)
    yield


@pytest.fixture
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
