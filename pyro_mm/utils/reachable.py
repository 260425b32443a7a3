"""Find the modules, functions and objects that programs refer to."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

MOST = 4096  # entries of a container that are looked at
LIBRARIES = {"torch", "pyro", "numpy", "zuko", "scipy", "sklearn", "pandas", "matplotlib", "arviz"}
LIBRARIES |= {"pytest", "_pytest", "pluggy", "hypothesis"}  # an assert in a test refers to all of pytest
LIBRARIES |= set(sys.stdlib_module_names)  # objects of these refer to no module of a user's
SCALARS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
INTERNAL = frozenset(vars(nn.Module())) | {"_pyro_name", "_is_full_backward_hook"}


class ReachableObjects:
    """The modules, functions and objects that programs refer to, directly or through each other.

    References are followed through closures, globals, default arguments, attributes and containers; not into
    libraries, and not into containers of more than 4,096 entries.

    Args:
        programs: name -> callable; a module, a function, a method, a ``functools.partial``, or any object.

    Attributes:
        modules: path -> outermost module, such as ``"model"`` for a module itself and ``"model.decoder"`` for one that
            a function calls by that name; a module inside another one is not named again.
        functions: functions, those of methods too.
        objects: objects of a user's classes, apart from modules.
        loose: parameters that are in no module.

    Example::

        >>> parts = {"decoder": nn.Linear(2, 2)}
        >>> story = functools.partial(lambda parts, batch: parts["decoder"](batch), parts)
        >>> ReachableObjects({"model": story}).modules
        {'model.decoder': Linear(in_features=2, out_features=2, bias=True)}
    """

    def __init__(self, programs: Mapping[str, Any]):
        self.modules: dict[str, nn.Module] = {}
        self.functions: list[FunctionType] = []
        self.objects: list[Any] = []
        self._seen: dict[int, Any] = {}  # objects by identity, kept alive so that no identity is used twice
        self._inside: set[int] = set()
        self._scalars: list[Any] = []
        self.loose: list[Tensor] = []
        for name, program in programs.items():
            self._visit(name, program)

    def all_modules(self) -> Iterator[nn.Module]:
        """Yield every module once, inner ones too."""
        seen: set[int] = set()
        for root in self.modules.values():
            for module in root.modules():
                if id(module) not in seen:
                    seen.add(id(module))
                    yield module

    def device(self) -> torch.device | None:
        """Return the device of the first parameter or buffer; None if the programs have none."""
        for root in self.modules.values():
            for tensor in (*root.parameters(), *root.buffers()):
                return tensor.device
        return self.loose[0].device if self.loose else None

    def fingerprint(self) -> Fingerprint:
        """Return the :class:`Fingerprint` of the programs."""
        return Fingerprint(self)

    def _visit(self, path: str, value: Any) -> None:
        if isinstance(value, SCALARS):
            self._scalars.append((path, value))
            return
        if type(value) in (Tensor, nn.Parameter):
            self._scalars.append((path, value.shape, value.dtype, value.device))
            if value.requires_grad and value.is_leaf:
                self.loose.append(value)
            return
        if id(value) in self._seen or isinstance(value, Tensor):
            return
        self._seen[id(value)] = value
        if isinstance(value, nn.Module):
            self._visit_module(path, value)
        elif isinstance(value, FunctionType):
            self._visit_function(path, value)
        elif isinstance(value, MethodType):
            self._visit(path, value.__self__)
            self._visit_function(path, value.__func__)
        elif isinstance(value, functools.partial):
            self._visit(path, value.func)
            self._visit_all(path, [*value.args, *value.keywords.values()])
        elif isinstance(value, dict):
            if len(value) <= MOST:
                for key, item in list(value.items()):
                    self._visit(f"{path}.{key}" if isinstance(key, str) else path, item)
        elif isinstance(value, list | tuple):
            if len(value) <= MOST:
                for i, item in enumerate(value):
                    self._visit(f"{path}[{i}]", item)
        elif isinstance(value, set | frozenset):
            if len(value) <= MOST:
                self._visit_all(path, value)
        elif isinstance(value, type):
            self._scalars.append((path, *_qualified_name(value)))
            if not belongs_to_library(value) and package_of(value) != "pyro_mm":
                self._visit_attributes(path, vars(value))
        elif belongs_to_library(type(value)):
            self._scalars.append((path, *_qualified_name(type(value)), *_shapes(value)))
        elif not isinstance(value, ModuleType):
            self.objects.append(value)
            self._visit_attributes(path, getattr(value, "__dict__", {}))
            self._visit_calls(path, type(value))

    def _visit_all(self, path: str, values: Any) -> None:
        for value in values:
            self._visit(path, value)

    def _visit_module(self, path: str, root: nn.Module) -> None:
        if id(root) not in self._inside:
            while path in self.modules:
                path += "'"
            self.modules[path] = root
        for name, module in root.named_modules():
            self._inside.add(id(module))
            self._seen[id(module)] = module
            inner = f"{path}.{name}" if name else path
            if not belongs_to_library(type(module)):
                self._visit_attributes(inner, vars(module))
                self._visit_calls(inner, type(module))

    def _visit_attributes(self, path: str, attributes: Mapping[str, Any]) -> None:
        for name, value in list(attributes.items()):
            if name not in INTERNAL:
                self._visit(f"{path}.{name}", value)

    def _visit_calls(self, path: str, kind: type) -> None:
        """Visit what a user's class has for all of its objects, and what its methods refer to."""
        if package_of(kind) == "pyro_mm":
            return
        for owner in kind.__mro__:
            if not belongs_to_library(owner) and package_of(owner) != "pyro_mm":
                for name, value in vars(owner).items():
                    if isinstance(value, FunctionType) or not name.startswith("_"):
                        self._visit(f"{path}.{name}", _function_of_descriptor(value))

    def _visit_function(self, path: str, function: Any) -> None:
        function = getattr(function, "__wrapped__", function)
        if not isinstance(function, FunctionType) or belongs_to_library(function):
            return
        self.functions.append(function)
        self._visit_all(path, function.__defaults__ or ())
        self._visit_all(path, (function.__kwdefaults__ or {}).values())
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            try:
                self._visit(f"{path}.{name}", cell.cell_contents)
            except ValueError:  # an empty cell: a name that is not defined yet
                continue
        if package_of(function) == "pyro_mm":
            return
        names = names_in(function.__code__)
        for name in names:
            if name in function.__globals__:
                value = function.__globals__[name]
                if isinstance(value, ModuleType):
                    self._visit_namespace(path, value, names)
                else:
                    self._visit(f"{path}.{name}", value)
        self._seen[id(function.__code__)] = function.__code__

    def _visit_namespace(self, path: str, module: ModuleType, names: tuple[str, ...]) -> None:
        """Visit the entries of an imported Python module that code refers to by name."""
        if module.__name__.split(".")[0] in LIBRARIES | {"pyro_mm"}:
            return
        for name in names:
            if name in vars(module):
                self._visit(f"{path}.{name}", vars(module)[name])


class Fingerprint:
    """The modules and functions of programs, the numbers and strings they hold, and the shapes of their parameters.

    Two fingerprints are equal if modules and functions are the same objects, and all else is equal: values of
    parameters do not count, their types and devices do. Nothing is kept alive.

    Args:
        reached: what the programs refer to.
    """

    def __init__(self, reached: ReachableObjects):
        objects = [*reached.all_modules(), *(x for x in reached._seen.values() if isinstance(x, FunctionType))]
        self.objects = [weakref.ref(x) for x in objects]
        self.codes = [x.__code__ for x in objects if isinstance(x, FunctionType)]
        self.scalars = reached._scalars
        self.tensors = [
            (name, tuple(p.shape), p.dtype, p.device)
            for m in reached.modules.values()
            for name, p in m.named_parameters()
        ]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Fingerprint)
            and len(self.objects) == len(other.objects)
            and all(one() is two() is not None for one, two in zip(self.objects, other.objects, strict=True))
            and self.codes == other.codes
            and self.scalars == other.scalars
            and self.tensors == other.tensors
        )

    __hash__ = None  # type: ignore[assignment]


@contextmanager
def evaluation_mode(roots: Iterable[nn.Module]) -> Iterator[None]:
    """Put modules, and those inside them, in evaluation mode; afterwards each gets its own mode back."""
    roots = list(roots)
    before = {module: module.training for root in roots for module in root.modules()}
    for root in roots:
        if any(module.training for module in root.modules()):
            root.eval()
    try:
        yield
    finally:
        # by train(), which some modules override, from the outside in, since it changes the inner ones too
        for module, training in before.items():
            if module.training != training:
                module.train(training)
        for module, training in before.items():
            module.training = training


def own_modules(model: Any, guide: Any) -> dict[str, nn.Module]:
    """Return name -> module, for a model and a guide that are modules or methods of modules."""
    owners = {name: getattr(f, "__self__", f) for name, f in (("model", model), ("guide", guide))}
    return {name: owner for name, owner in owners.items() if isinstance(owner, nn.Module)}


def referenced_modules(model: Any, guide: Any) -> dict[str, nn.Module]:
    """Return path -> module, for the modules that model and guide refer to, apart from themselves."""
    own = set(map(id, own_modules(model, guide).values()))
    found = ReachableObjects({"model": model, "guide": guide}).modules
    return {path: module for path, module in found.items() if id(module) not in own}


@functools.lru_cache(maxsize=4096)
def names_in(code: CodeType) -> tuple[str, ...]:
    """Return the names that code refers to, those of functions defined in it too."""
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in names_in(const)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


def _function_of_descriptor(value: Any) -> Any:
    """Return the function of a static or class method or of a property; any other value as it is."""
    if isinstance(value, property):
        return value.fget
    return value.__func__ if isinstance(value, staticmethod | classmethod) else value


def _qualified_name(kind: type) -> tuple[str, str]:
    """Return the name of a type, which a fingerprint can keep without keeping the type alive."""
    return kind.__module__, kind.__qualname__


def _shapes(value: Any) -> tuple[torch.Size, ...]:
    """Return the shapes of a distribution; nothing of any other object."""
    if isinstance(value, torch.distributions.Distribution):
        return value.batch_shape, value.event_shape
    return ()


def package_of(thing: Any) -> str:
    """Return the name of the package that a class or a function is defined in."""
    return str(getattr(thing, "__module__", "")).split(".")[0]


def belongs_to_library(thing: Any) -> bool:
    """Return True for a class or a function of a library, which refers to no module of a user's."""
    return package_of(thing) in LIBRARIES
