"""Checks of arguments: what is right comes back, what is wrong is a TypeError or a ValueError that names it."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pyro_mm.utils.arguments import (
    check_attribute,
    check_choice,
    check_flag,
    check_function,
    check_integer,
    check_mapping,
    check_modules,
    check_name,
    check_names,
    check_number,
    check_path,
    check_seed,
    check_shape,
    check_tensor,
)


def of_batch(batch):
    return None


def factory(decoders, *, latent=2):
    return None


class Story:
    def __call__(self, batch):
        return None


def test_a_valid_argument_is_returned_in_its_plain_type():
    assert check_integer("k", np.int64(3), 1, 3) == 3 and type(check_integer("k", torch.tensor(3))) is int
    assert check_number("s", np.float32(0.5), 0, 1) == 0.5 and check_number("s", torch.tensor([2.0])) == 2.0
    assert check_flag("mean", np.bool_(True)) is True
    assert check_choice("draws", "quasi", ["independent", "quasi"]) == "quasi"
    assert check_names("given", "a", ["a", "b"]) == ("a",) and check_names("given", ["b", "a"]) == ("b", "a")
    assert check_names("given", {"a": 1}.keys()) == ("a",)
    for function in (of_batch, Story(), nn.Linear(1, 1), functools.partial(factory, latent=1), lambda *batch: None):
        assert check_function("model", function) is function
    assert check_path("path", "a/b") == Path("a/b") == check_path("path", Path("a/b"))
    assert check_seed(None) is None and check_seed(-5) == -5
    assert check_shape("event_shape", (2, np.int64(3))) == (2, 3)
    x = torch.zeros(3, 2)
    assert check_tensor("x", x, ("N", 2)) is x
    net = nn.Linear(1, 1)
    assert check_modules("decoders", {"a": net}) == {"a": net} == check_modules("decoders", nn.ModuleDict({"a": net}))


WRONG = {
    "float for integer": (lambda: check_integer("k", 2.5, 1), TypeError, "expected k to be an integer >= 1, got 2.5"),
    "bool for integer": (lambda: check_integer("k", True), TypeError, "k to be an integer, got True"),
    "string for integer": (lambda: check_integer("k", "3"), TypeError, "k to be an integer, got '3'"),
    "small integer": (lambda: check_integer("k", 0, 1), ValueError, "expected k >= 1, got 0"),
    "large integer": (lambda: check_integer("k", 9, 1, 8), ValueError, ">= 1 and <= 8, got 9"),
    "string for number": (lambda: check_number("s", "1"), TypeError, "s to be a number, got '1'"),
    "complex for number": (lambda: check_number("s", 1j), TypeError, "s to be a number, got 1j"),
    "tensor for number": (lambda: check_number("s", torch.zeros(2)), TypeError, r"shape \(2,\)"),
    "NaN": (lambda: check_number("s", float("nan")), ValueError, "s to be a finite number, got nan"),
    "bound excluded": (lambda: check_number("s", 0, above=0), ValueError, "expected s > 0, got 0"),
    "integer for flag": (lambda: check_flag("mean", 1), TypeError, "mean to be True or False, got 1"),
    "unknown choice": (lambda: check_choice("draws", "sobol", ["quasi"]), ValueError, "one of 'quasi', got 'sobol'"),
    "no choice": (lambda: check_choice("draws", None, ["quasi"]), TypeError, "one of 'quasi', got None"),
    "unknown name": (lambda: check_name("target", "c", ["a", "b"]), ValueError, "unknown modality 'c', .* 'a', 'b'"),
    "None for names": (lambda: check_names("given", None), TypeError, "given to be names, .* got None"),
    "number for names": (lambda: check_names("given", [3]), TypeError, "given to be the name .* got 3"),
    "twice": (lambda: check_names("given", ["a", "a"]), ValueError, "every name once"),
    "none": (lambda: check_names("target", [], least=1), ValueError, "expected 1 name at least, got 0"),
    "class": (lambda: check_function("model", Story), TypeError, r"got the class Story: make an instance, Story\(..\)"),
    "uncalled": (
        lambda: check_function("model", functools.partial(lambda: None)), TypeError, "was its result meant"
    ),
    "two arguments": (lambda: check_function("model", lambda a, b: 0), TypeError, "was its result meant"),
    "pair for function": (lambda: check_function("model", (of_batch, of_batch)), TypeError, "unpack it"),
    "list for mapping": (lambda: check_mapping("weights", [1]), TypeError, r"map names to values, got the list \[1\]"),
    "number for a key": (lambda: check_mapping("weights", {1: 1}), TypeError, "got the key 1"),
    "empty mapping": (lambda: check_modules("decoders", {}), ValueError, "at least one modality, got none"),
    "function for module": (lambda: check_modules("decoders", {"a": of_batch}), TypeError, r"decoders\['a'\]"),
    "dot": (lambda: check_modules("decoders", {"a.b": nn.ReLU()}), ValueError, "torch forbids .* 'a.b'"),
    "number for path": (lambda: check_path("path", 3), TypeError, "path to be a path, got 3"),
    "empty path": (lambda: check_path("path", ""), ValueError, "path of a file or folder"),
    "string for seed": (lambda: check_seed("1"), TypeError, "seed to be an integer, got '1'"),
    "float in shape": (lambda: check_shape("event_shape", (2.0,)), TypeError, "every size in event_shape"),
    "number for shape": (lambda: check_shape("event_shape", 4), TypeError, "event_shape to be a shape"),
    "list for tensor": (lambda: check_tensor("x", [1.0]), TypeError, "x to be a tensor, got the list"),
    "shape": (
        lambda: check_tensor("x", torch.zeros(3, 4), ("N", 2)), ValueError, r"x of shape \(N, 2\), got shape \(3, 4\)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_an_invalid_argument_is_named_with_its_own_error_type(case):
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=message) as raised:
        call()
    assert raised.type is kind


@pytest.mark.parametrize("name", ["values", "keys", "type", "training", "forward", "half", "a.b", ""])
def test_names_that_torch_forbids_are_those_that_it_does_not_hold(name):
    with pytest.raises(KeyError):
        nn.ModuleDict({name: nn.ReLU()})
    with pytest.raises(ValueError, match="torch"):
        check_attribute("decoders", name)
