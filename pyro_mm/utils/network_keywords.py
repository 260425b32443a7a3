"""Keyword arguments that networks ask for by their signatures: ``lengths`` and ``covariates``."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Mapping
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType
from typing import Any, NamedTuple

from torch import nn

NAMES = ("lengths", "covariates")
WRAPPED = ("net", "module", "_orig_mod")  # where our conditionals, torch's wrappers and torch.compile hold a network


class Keyword(NamedTuple):
    """A parameter of a network that is handed over by keyword.

    Attributes:
        name: ``"lengths"`` or ``"covariates"``.
        position: its index among the positional parameters, which a caller may have filled; None if it has none.
        required: True if it has no default.
        owner: the name of the network's class, or of the function.
    """

    name: str
    position: int | None
    required: bool
    owner: str


class Signature(NamedTuple):
    """The part of a network's signature that matters here.

    Attributes:
        keywords: the parameters that are handed over by keyword.
        passes_on: True if it takes ``**keywords``, as one does that hands them on to a network within.
    """

    keywords: tuple[Keyword, ...] = ()
    passes_on: bool = False


NOTHING = Signature()
_known: weakref.WeakKeyDictionary[Any, Signature] = weakref.WeakKeyDictionary()


def keywords_of(network: Any) -> tuple[Keyword, ...]:
    """Return the parameters ``lengths`` and ``covariates`` of a network's signature.

    The signature of a module is that of its ``forward``. Of an ``nn.Sequential`` it is that of the first of its modules
    that has such a parameter, so that an embedding may stand before a recurrent network; of one with ``**keywords``
    that holds a network as ``net`` or ``module`` (our conditionals, ``nn.DataParallel``), or that ``torch.compile`` has
    made, it is that network's. A conditional hands its parents to the network as one input, so that however many there
    are, they fill its first parameter alone. Each signature is read once.

    Args:
        network: a module, or any other callable.
    """
    one_input = False
    while True:
        if _is_sequential(network):
            network = receiver_of(network)
        signature = _signature(network)
        inner = _wrapped_network(network) if signature.passes_on and isinstance(network, nn.Module) else None
        concatenates = hasattr(network, "composes")
        if inner is None or (_is_sequential(inner) and not concatenates):
            # a wrapper calls a Sequential by itself, which takes no keywords
            return _of_one_input(signature.keywords) if one_input else signature.keywords
        one_input |= concatenates
        network = inner


def _of_one_input(keywords: tuple[Keyword, ...]) -> tuple[Keyword, ...]:
    """Return the keywords of a network that is called with one positional input: no other can fill a parameter."""
    return tuple(k._replace(position=None) if k.position else k for k in keywords)


def receiver_of(network: Any) -> Any:
    """Return the module of an ``nn.Sequential``, however deep, that is given the keywords, and anything else as it is.

    It is the first one that asks for any, and the first one of all if none does.
    """
    if not _is_sequential(network):
        return network
    receivers = [receiver_of(module) for module in network]
    return next((module for module in receivers if keywords_of(module)), receivers[0])


def _is_sequential(network: Any) -> bool:
    """Return True for an ``nn.Sequential`` of one module at least, which calls them one after the other."""
    return isinstance(network, nn.Sequential) and len(network) > 0 and type(network).forward is nn.Sequential.forward


def call_network(network: Any, inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> Any:
    """Return ``network(*inputs, **keywords)``; of an ``nn.Sequential`` the module that asks for them gets them."""
    if not keywords:
        return network(*inputs)
    receiver = receiver_of(network)
    if receiver is network:
        return network(*inputs, **keywords)
    with _added_once(receiver, keywords):
        return network(*inputs)


@contextmanager
def _added_once(module: nn.Module, keywords: Mapping[str, Any]) -> Any:
    """Add keywords to the next call of a module."""

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hook.remove()  # a module that stands in a Sequential twice gets them the first time
        return args, {**kwargs, **keywords}

    hook = module.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _wrapped_network(network: nn.Module) -> Any:
    """Return the network that a conditional or a wrapper holds; None without one."""
    modules = network._modules
    for name in WRAPPED:
        if modules.get(name) is not None:
            return modules[name]
    return None


def _signature(network: Any) -> Signature:
    """Return the signature of a callable, read once per module and once per function's code."""
    if isinstance(network, nn.Module):
        found = _known.get(network)
        return _cached(network, network) if found is None else found
    if isinstance(network, FunctionType) and not hasattr(network, "__wrapped__"):
        return _of_code(network.__code__, network)
    if isinstance(network, MethodType):
        return _without_first(_signature(network.__func__), 1)
    if isinstance(network, functools.partial):
        inner = _without_first(_signature(network.func), len(network.args))
        return inner._replace(keywords=tuple(k for k in inner.keywords if k.name not in network.keywords))
    if isinstance(network, type) or not callable(network):
        return NOTHING
    return _cached(network, network)


def _of_code(code: CodeType, network: FunctionType) -> Signature:
    """Return the signature of a function, cached for its code: a story may define the function anew in every step."""
    names = code.co_varnames
    return _cached(code, network) if NAMES[0] in names or NAMES[1] in names else NOTHING


def _cached(key: Any, network: Any) -> Signature:
    """Return the signature of a network, cached while ``key`` lives."""
    try:
        return _known[key]
    except KeyError:
        pass
    except TypeError:  # neither hashed nor referred to weakly
        return _read(network)
    signature = _known[key] = _read(network)
    return signature


def _read(network: Any) -> Signature:
    """Return the signature that Python knows of a network; an empty one if it knows none."""
    try:
        signature = inspect.signature(network.forward if isinstance(network, nn.Module) else network)
    except (TypeError, ValueError):
        return NOTHING
    parameters = signature.parameters.values()
    owner = getattr(network, "__name__", None) or type(network).__name__
    found = []
    for place, parameter in enumerate(parameters):
        if parameter.name in NAMES and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            position = place if parameter.kind is parameter.POSITIONAL_OR_KEYWORD else None
            found.append(Keyword(parameter.name, position, parameter.default is parameter.empty, owner))
    return Signature(tuple(found), any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters))


def _without_first(signature: Signature, filled: int) -> Signature:
    """Return a signature without its first ``filled`` positional parameters."""
    keywords = []
    for keyword in signature.keywords:
        if keyword.position is None:
            keywords.append(keyword)
        elif keyword.position >= filled:
            keywords.append(keyword._replace(position=keyword.position - filled))
    return signature._replace(keywords=tuple(keywords))
