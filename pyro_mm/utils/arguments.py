"""Checks of arguments of public functions: each returns the value, or raises with what was expected and found.

A value of the wrong type is a ``TypeError``, one of the right type but out of range a ``ValueError``.
"""

from __future__ import annotations

import inspect
import math
import numbers
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .network_keywords import keywords_of

MAX_LENGTH = 60  # characters of a value that are printed


def describe(value: Any) -> str:
    """Describe a value in a few words, for the end of an error message.

    >>> describe(torch.zeros(2, 3)), describe(nn.Linear), describe(0.5)
    ('Tensor of torch.float32 and shape (2, 3)', 'the class Linear', '0.5, a float')
    """
    if value is None or isinstance(value, bool | str):
        return _short(value)
    if isinstance(value, numbers.Number):
        return f"{_short(value)}, {_with_article(type(value).__name__)}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} of {value.dtype} and shape {tuple(value.shape)}"
    if isinstance(value, nn.Module):
        return f"the module {type(value).__name__}"
    if inspect.isroutine(value):
        return f"the function {value.__name__}"
    if isinstance(value, list | tuple | set | frozenset) and len(repr(value)) <= MAX_LENGTH:
        return f"the {type(value).__name__} {value!r}"
    return f"an object of type {type(value).__name__}"


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def check_integer(argument: str, value: Any, least: int | None = None, most: int | None = None) -> int:
    """Return an integer within a range.

    Args:
        argument: the name of the argument, for the message.
        value: an integer of Python, NumPy or torch; booleans and floats are refused.
        least, most: inclusive bounds; None for none.

    Raises:
        TypeError: the value is no integer.
        ValueError: the integer is out of range.
    """
    wanted = f"expected {argument} to be an integer{_range(least, most)}"
    boolean = isinstance(value, bool | np.bool_) or (isinstance(value, Tensor) and value.dtype == torch.bool)
    try:
        if boolean:
            raise TypeError
        found = operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{wanted}, got {describe(value)}") from None
    if (least is not None and found < least) or (most is not None and found > most):
        raise ValueError(f"expected {argument}{_range(least, most)}, got {found}")
    return found


def check_number(
    argument: str,
    value: Any,
    least: float | None = None,
    most: float | None = None,
    *,
    above: float | None = None,
    below: float | None = None,
) -> float:
    """Return a finite number within a range, as a float.

    Args:
        argument: the name of the argument, for the message.
        value: a number of Python or NumPy, or a tensor of one element; booleans are refused.
        least, most: inclusive bounds; None for none.
        above, below: exclusive bounds; None for none.

    Raises:
        TypeError: the value is no number.
        ValueError: it is NaN, infinite or out of range.
    """
    wanted = f"expected {argument} to be a number{_range(least, most, above, below)}"
    single = isinstance(value, Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1
    boolean = isinstance(value, bool | np.bool_) or (single and value.dtype in (torch.bool, np.bool_))
    if boolean or not (single or isinstance(value, numbers.Real)):
        raise TypeError(f"{wanted}, got {describe(value)}")
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{wanted}, got {describe(value)}") from None
    inside = (
        math.isfinite(found)
        and (least is None or found >= least)
        and (most is None or found <= most)
        and (above is None or found > above)
        and (below is None or found < below)
    )
    if not inside:
        bounds = _range(least, most, above, below)
        raise ValueError(f"expected {argument}{bounds or ' to be a finite number'}, got {found:g}")
    return found


def check_flag(argument: str, value: Any) -> bool:
    """Return True or False. Raises a TypeError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"expected {argument} to be True or False, got {describe(value)}")
    return bool(value)


def check_flags(**values: Any) -> None:
    """Raise a TypeError unless each of the arguments is True or False."""
    for argument, value in values.items():
        check_flag(argument, value)


def check_counts(least: int = 1, **values: Any) -> None:
    """Raise a TypeError or a ValueError unless each of the arguments is an integer of ``least`` or more."""
    for argument, value in values.items():
        check_integer(argument, value, least)


def check_choice(argument: str, value: Any, choices: Iterable[str]) -> str:
    """Return one of the strings ``choices``. Raises a TypeError for another type, a ValueError for another string."""
    choices = list(choices)
    wanted = f"expected {argument} to be one of {', '.join(map(repr, choices))}"
    if not isinstance(value, str):
        raise TypeError(f"{wanted}, got {describe(value)}")
    if value not in choices:
        raise ValueError(f"{wanted}, got {_short(value)}")
    return value


def check_name(argument: str, value: Any, known: Iterable[str] | None = None, what: str = "modality") -> str:
    """Return a name, checked against the known ones.

    Args:
        argument: the name of the argument, for the message.
        value: a string.
        known: the names to choose from; None for any.
        what: the kind of thing that is named, for the message.

    Raises:
        TypeError: the value is no string.
        ValueError: the name is unknown.
    """
    if not isinstance(value, str):
        raise TypeError(f"expected {argument} to be the name of a {what}, got {describe(value)}")
    if known is not None and value not in (known := list(known)):
        raise ValueError(f"{argument}: unknown {what} {_short(value)}, expected one of {', '.join(map(repr, known))}")
    return value


def check_names(
    argument: str, value: Any, known: Iterable[str] | None = None, *, least: int = 0, what: str = "modality"
) -> tuple[str, ...]:
    """Return names as a tuple; a string alone is one name.

    Args:
        argument: the name of the argument, for the message.
        value: a string, or an iterable of strings.
        known: the names to choose from, such as those of a batch; None for any.
        least: the smallest number of names.
        what: the kind of thing that is named, for the message.

    Raises:
        TypeError: the value is neither a string nor an iterable of strings.
        ValueError: a name is unknown or given twice, or there are too few.
    """
    if isinstance(value, str):
        value = (value,)
    if isinstance(value, Mapping | Tensor) or not isinstance(value, Iterable):
        raise TypeError(f"expected {argument} to be names, each of a {what}, got {describe(value)}")
    known = None if known is None else list(known)
    found = tuple(check_name(argument, name, known, what) for name in value)
    if len(set(found)) < len(found):
        raise ValueError(f"{argument}: expected every name once, got {', '.join(map(repr, found))}")
    if len(found) < least:
        raise ValueError(f"{argument}: expected {least} name{'s' * (least != 1)} at least, got {len(found)}")
    return found


def check_function(argument: str, value: Any, parameters: Sequence[str] | None = ("batch",)) -> Callable[..., Any]:
    """Return a function or module that accepts the given positional arguments.

    Args:
        argument: the name of the argument, for the message.
        value: a callable; a class, or a factory of such functions, is refused.
        parameters: the positional arguments in words; None if they are unknown.

    Raises:
        TypeError: the value is not callable with these arguments.
    """
    of = "" if parameters is None else f" of {', '.join(f'({p})' if ' ' in p else p for p in parameters)}"
    wanted = f"expected {argument} to be a function{of}"
    if isinstance(value, type):
        raise TypeError(f"{wanted}, got the class {value.__name__}: make an instance, {value.__name__}(..)")
    if not callable(value):
        unpack = isinstance(value, tuple) and any(callable(x) for x in value)
        hint = f": unpack it, as in model, guide, *_ = {type(value).__name__.lower()}" if unpack else ""
        raise TypeError(f"{wanted}, got {describe(value)}{hint}")
    function: Callable[..., Any] = value
    signature = _signature(value)
    if parameters is None or signature is None:
        return function
    try:
        signature.bind(*parameters)
    except TypeError:
        name = getattr(value, "__name__", type(value).__name__)
        raise TypeError(f"{wanted}, got {name}{signature}: was its result meant, {name}(..)?") from None
    return function


def check_head(
    argument: str, value: Any, parameter: str = "features", keywords: Sequence[str] = ("covariates",)
) -> Any:
    """Return a network of one input that belongs to no single modality.

    Args:
        argument: the name of the argument, for the message.
        value: a module or function.
        parameter: the input in words.
        keywords: those of ``"lengths"`` and ``"covariates"`` that the network may need.

    Raises:
        TypeError: the value is not callable with the input, or needs another of the keywords.
    """
    needed = [k for k in keywords_of(value) if k.required and k.position != 0]
    for keyword in needed:
        if keyword.name not in keywords:
            raise TypeError(
                f"expected {argument} to be a function of {parameter}, got {keyword.owner}, which needs "
                f"{keyword.name}: networks of a modality get them, so read {keyword.name} there"
            )
    return value if needed else check_function(argument, value, (parameter,))


def check_programs(**programs: Any) -> None:
    """Raise a TypeError unless each of the arguments is a function of a batch."""
    for argument, value in programs.items():
        check_function(argument, value)


def check_module(argument: str, value: Any) -> nn.Module:
    """Return a ``torch.nn.Module``. Raises a TypeError for a class or anything else."""
    if isinstance(value, nn.Module):
        return value
    if isinstance(value, type):
        raise TypeError(f"expected {argument} to be a module, got {describe(value)}: make an instance of it")
    hint = ", whose parameters nobody would find: make it the forward of a torch.nn.Module" if callable(value) else ""
    raise TypeError(f"expected {argument} to be a torch.nn.Module, got {describe(value)}{hint}")


def check_mapping(argument: str, value: Any, what: str = "values", *, least: int = 0) -> dict[str, Any]:
    """Return a mapping from names as a dictionary.

    Args:
        argument: the name of the argument, for the message.
        value: a mapping whose keys are strings.
        what: the kind of its values, for the message.
        least: the smallest number of entries.

    Raises:
        TypeError: the value is no mapping, or a key is no string.
        ValueError: there are too few entries.
    """
    wanted = f"expected {argument} to map names to {what}"
    # torch's ModuleDict and pandas' frames are mappings that are not registered as collections.abc.Mapping
    if isinstance(value, type) or not (hasattr(value, "keys") and hasattr(value, "items")):
        raise TypeError(f"{wanted}, got {describe(value)}")
    entries: dict[str, Any] = dict(value.items())
    for name in entries:
        if not isinstance(name, str):
            raise TypeError(f"{wanted}, got the key {describe(name)}")
    if len(entries) < least:
        raise ValueError(f"{wanted}, {least} at least, got {len(entries)}")
    return entries


def check_modules(argument: str, value: Any) -> dict[str, nn.Module]:
    """Return a mapping from names to modules, all of which ``torch.nn.ModuleDict`` accepts.

    Args:
        argument: the name of the argument, for the message.
        value: name -> module.

    Raises:
        TypeError: the value is no mapping, or one of its values is no module.
        ValueError: there are no modules, or a name is forbidden by torch.
    """
    found = check_mapping(argument, value, "modules")
    if not found:
        raise ValueError(f"expected {argument} of at least one modality, got none")
    for name, module in found.items():
        check_name(argument, name)
        check_attribute(argument, name)
        check_module(f"{argument}[{name!r}]", module)
    return found


def check_attribute(argument: str, name: str, container: type[nn.Module] = nn.ModuleDict) -> str:
    """Return a name under which torch can register a module or a parameter.

    Args:
        argument: the name of the argument, for the message.
        name: the name to check.
        container: the class of the module that will hold it.

    Raises:
        ValueError: the name is empty, has a dot, or is an attribute of ``container``, such as "values".
    """
    if not name or "." in name:
        raise ValueError(f"{argument}: torch forbids names that are empty or have a dot in them, got {name!r}")
    if hasattr(container, name) or name == "training":
        raise ValueError(
            f"{argument}: torch has a use of its own for the name {name!r}, choose another one: {name + '_'!r}, say"
        )
    return name


def check_seed(value: Any) -> int | None:
    """Return a seed: any integer, or None. Raises a TypeError for anything else."""
    return None if value is None else check_integer("seed", value)


def check_path(argument: str, value: Any) -> Path:
    """Return a path. Raises a TypeError for another type, a ValueError for an empty path or one with a null byte."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"expected {argument} to be a path, got {describe(value)}")
    text = os.fspath(value)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    if not text or "\0" in text:
        raise ValueError(f"expected {argument} to be the path of a file or folder, got {text!r}")
    return Path(text)


def check_tensor(argument: str, value: Any, shape: Sequence[int | str | None] | None = None) -> Tensor:
    """Return a tensor, checked against a shape.

    Args:
        argument: the name of the argument, for the message.
        value: a tensor.
        shape: an integer per dimension, or a letter for any size; None for any shape.

    Raises:
        TypeError: the value is no tensor.
        ValueError: it has another shape.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {argument} to be a tensor{_shape_text(shape)}, got {describe(value)}")
    if shape is None:
        return value
    fits = len(shape) == value.dim() and all(
        not isinstance(size, int) or size == found for size, found in zip(shape, value.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"expected {argument}{_shape_text(shape)}, got shape {tuple(value.shape)}")
    return value


def check_shape(argument: str, value: Any) -> torch.Size:
    """Return an event shape, all sizes at least 1. Raises a TypeError or a ValueError for anything else."""
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise TypeError(f"expected {argument} to be a shape, such as (28, 28), got {describe(value)}")
    return torch.Size([check_integer(f"every size in {argument}", size, least=1) for size in value])


def _shape_text(shape: Sequence[int | str | None] | None) -> str:
    if shape is None:
        return ""
    sizes = ", ".join(".." if size is None else str(size) for size in shape)
    return f" of shape ({sizes}{',' if len(shape) == 1 else ''})"


def _range(
    least: float | None = None, most: float | None = None, above: float | None = None, below: float | None = None
) -> str:
    bounds = [
        *([f">= {least}"] if least is not None else []),
        *([f"> {above}"] if above is not None else []),
        *([f"<= {most}"] if most is not None else []),
        *([f"< {below}"] if below is not None else []),
    ]
    return f" {' and '.join(bounds)}" if bounds else ""


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= MAX_LENGTH else text[: MAX_LENGTH - 2] + ".."


def _signature(value: Any) -> inspect.Signature | None:
    """Return the signature that a call has to fit; None if Python cannot tell."""
    try:
        return inspect.signature(value.forward if isinstance(value, nn.Module) else value)
    except (TypeError, ValueError):
        return None
