"""Fixtures shared by the tests: exactness is claimed in float64, and Pyro's store starts empty."""

import pyro
import pytest
import torch


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
