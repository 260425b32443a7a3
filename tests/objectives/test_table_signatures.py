"""All tables of the literature have one signature, and say what they bound and where they are from."""

import inspect
import re

import pytest

from pyro_mm.estimators import AnalyticKL
from pyro_mm.objectives import Objective, tables

TABLES = {
    name: function
    for name, function in vars(tables).items()
    if inspect.isfunction(function) and function.__module__ == tables.__name__ and not name.startswith("_")
    and inspect.signature(function).return_annotation == "Objective"
}  # fmt: skip


def test_every_table_is_checked_for_its_signature():
    assert len(TABLES) == 16


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_the_one_signature(name):
    parameters = inspect.signature(TABLES[name]).parameters
    positional = [n for n, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    keywords = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY]
    assert positional[-1] == "estimator" and parameters["estimator"].default is None
    assert keywords[-1] == "vectorize" and parameters["vectorize"].default is True
    assert len(positional) <= 3

    given = [parameters[n].default for n in positional[:-1]]
    estimator = AnalyticKL(2)
    for objective in (
        TABLES[name](*given, estimator, vectorize=False),
        TABLES[name](estimator=estimator, vectorize=False),
    ):
        assert isinstance(objective, Objective)
        assert objective.estimator is estimator and objective.vectorize is False


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_documented(name):
    text = inspect.getdoc(TABLES[name])
    arguments = text.split("Args:")[1].split("References:")[0]
    for parameter in inspect.signature(TABLES[name]).parameters:
        assert re.search(rf"^ +{parameter}: ", arguments, re.MULTILINE), parameter
    assert ".. math::" in text and re.search(r"bound|surrogate|evidence", text, re.IGNORECASE)
    assert re.search(r"(19|20)\d\d", text.split("References:")[1])
