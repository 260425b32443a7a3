"""Detect, at little cost, that programs refer to other objects than before, or hold other numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from operator import itemgetter
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.distributions import Distribution

from .reachable import INTERNAL, SCALARS, ReachableObjects, belongs_to_library, names_in, package_of

REFERENCES = (nn.Module, FunctionType, Distribution, type)
REGISTERS = ("_modules", "_parameters")
CONTAINERS = (dict, list, tuple, set, frozenset)
DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
MOST_ENTRIES = 64  # of a container whose entries are compared; of a larger one only its size is
MOST_DEPTH = 4  # of containers within containers
MOST_OBJECTS = 64  # objects of a user's classes; if programs reach more, no attributes of objects are compared
SIZE = "number of attributes"
ABSENT = object()

Slot = tuple[int, str]  # identity of an owner, and the name of an attribute, a free variable or a global of it
Note = Callable[[Any], Any]


class Snapshot:
    """The objects that programs refer to and the plain values that they hold, at the time of construction.

    Compared by identity are the class, the children and the parameters of each module and a ``forward`` of its own;
    and the modules, functions and distributions that attributes of modules and of a user's objects, free variables
    and globals refer to, also in dictionaries, lists and tuples. Compared by value are the numbers, strings and flags
    in the same places, of torch's own modules the flags and strings alone; which tensors require gradients; and
    whether a dropout has a rate of 0. Nothing is kept alive.

    Args:
        programs: name -> callable.
        modules: further modules, which a run has called.
        tensors: further tensors, which a run has used.
        since: an earlier snapshot; attributes and variables that have changed since then are not compared.
        ignored: attributes and variables that are not compared.

    Example::

        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        >>> snapshot = Snapshot({"model": net})
        >>> snapshot.changed()
        False
        >>> net[0] = nn.Linear(2, 2)
        >>> snapshot.changed()
        True
    """

    def __init__(
        self,
        programs: Mapping[str, Any],
        *,
        modules: Iterable[nn.Module] = (),
        tensors: Iterable[Tensor] = (),
        since: Snapshot | None = None,
        ignored: frozenset[Slot] = frozenset(),
    ):
        self._gone: list[Any] = []  # has an entry once something that is compared by identity is gone
        self._known: dict[int, weakref.ref[Any]] = {}

        reached = ReachableObjects(programs)
        found = {id(m): m for m in reached.all_modules()}
        found |= {id(m): m for root in modules for m in root.modules()}
        every = list(found.values())
        self._dropouts = [self._refer(m) for m in every if isinstance(m, DROPOUTS)]

        self._ignored = ignored if since is None else ignored | since.changed_slots()
        before = {} if since is None else since._names()
        self._modules = [self._watch(m, _attributes_of(m), before) for m in every]
        self._owners = [self._watch(f, names, before) for f, names in _variables_of(reached.functions)]
        self._owners += [self._watch(x, list(vars(x)), before) for x in _few_objects(reached.objects)]
        self._tensors = [self._refer(x) for x in self._tensors_among(every, tensors)]

        self._identities, self._values = self._find_state(self._refer)
        self._settings = self._find_settings()
        self._slots = self._find_slots()

    def changed(self) -> bool:
        """Return True if an object is gone or has been replaced, or if a value has changed."""
        if self._gone:
            return True
        try:
            identities, values = self._find_state()
            return identities != self._identities or values != self._values or self._find_settings() != self._settings
        except (AttributeError, KeyError, RuntimeError, ValueError):  # what is gone, or an array in a number's place
            return True

    def extend(self, modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> bool:
        """Add what a run has used, and return True; False, adding nothing, if this snapshot holds no more.

        That is so if the run has changed something, or has called modules that no reference of the programs leads to.

        Args:
            modules: modules that the run has called.
            tensors: tensors that it has used.
        """
        own = {id(owner.reference()) for owner in self._modules}
        if self.changed() or any(id(m) not in own for m in modules):
            return False
        self._tensors += [self._refer(x) for x in tensors if id(x) not in self._known]
        self._settings = self._find_settings()
        return True

    def changed_slots(self) -> frozenset[Slot]:
        """Return the attributes and variables that have another value now, or refer to another object."""
        now = self._find_slots()
        return frozenset(slot for slot, value in self._slots.items() if slot in now and not _equal(value, now[slot]))

    def _refer(self, thing: Any) -> weakref.ref[Any]:
        """Return a weak reference to something, after whose end everything counts as changed."""
        if id(thing) not in self._known:
            self._known[id(thing)] = weakref.ref(thing, self._gone.append)
        return self._known[id(thing)]

    def _watch(self, thing: Any, names: list[str], before: Mapping[int, set[str]]) -> _Owner:
        """Sort the attributes or variables of something by the way they are compared, without those to be ignored."""
        known = before.get(id(thing), names)
        names = [n for n in names if n in known and (id(thing), n) not in self._ignored]
        plain = [n for n in names if _is_plain(_read(thing, n))]
        sized = not isinstance(thing, FunctionType) and not belongs_to_library(type(thing))
        sized = sized and (id(thing), SIZE) not in self._ignored
        return _Owner(self._refer(thing), plain, [n for n in names if n not in plain], sized)

    def _names(self) -> dict[int, set[str]]:
        """Return identity -> names of the attributes or variables that are compared."""
        return {id(o.reference()): {*o.plain, *o.others} for o in [*self._modules, *self._owners]}

    def _tensors_among(self, modules: list[nn.Module], used: Iterable[Tensor]) -> list[Tensor]:
        """Return the tensors whose settings are compared: those of modules and of a run."""
        registers = [m.__dict__[kind] for m in modules for kind in REGISTERS]
        found = [x for register in registers for x in register.values() if isinstance(x, Tensor)]
        return list({id(x): x for x in [*found, *used]}.values())

    def _find_state(self, note: Note | None = None) -> tuple[list[int], list[Any]]:
        """Return the identities of what modules are made of, and what attributes and variables hold.

        It is called in every step, and so goes over each module once.
        """
        found: list[Any] = []
        values: list[Any] = []
        for owner in self._modules:
            module = owner.reference()
            attributes = module.__dict__
            found.append(module.__class__)
            for kind in REGISTERS:
                if register := attributes[kind]:
                    found += register.values()
            if "forward" in attributes:
                found.append(attributes["forward"])
            if owner.get is not None:
                values.append(owner.get(attributes))
            if owner.others:
                values += [self._signature(attributes.get(name, ABSENT), note) for name in owner.others]
            if owner.sized:
                values.append(len(attributes))
        for owner in self._owners:
            thing = owner.reference()
            values += [_read(thing, name) for name in owner.plain]
            values += [self._signature(_read(thing, name), note) for name in owner.others]
            if owner.sized:
                values.append(len(thing.__dict__))
        if note is not None:
            for thing in found:
                with suppress(TypeError):  # of None, and of a builtin method in the place of a forward
                    note(thing)
        return list(map(id, found)), values

    def _find_slots(self) -> dict[Slot, Any]:
        """Return slot -> what it holds, without those of owners that are gone."""
        found: dict[Slot, Any] = {}
        for owner in [*self._modules, *self._owners]:
            if (thing := owner.reference()) is None:
                continue
            found |= {(id(thing), name): _read(thing, name) for name in owner.plain}
            found |= {(id(thing), name): self._signature(_read(thing, name)) for name in owner.others}
            if owner.sized:
                found[id(thing), SIZE] = len(thing.__dict__)
        return found

    def _signature(self, value: Any, note: Note | None = None, depth: int = 0) -> Any:
        """Return what is compared of a value: itself, its identity, or both of the entries of a container."""
        if isinstance(value, REFERENCES):
            if note is not None:
                note(value)
            return id(value)
        if isinstance(value, SCALARS):
            return value
        if type(value) in (Tensor, nn.Parameter):
            return value.shape, value.requires_grad
        if isinstance(value, CONTAINERS):
            if depth == MOST_DEPTH or len(value) > MOST_ENTRIES:
                return type(value).__name__, len(value)
            entries = [x for item in value.items() for x in item] if isinstance(value, dict) else value
            return [type(value).__name__, *(self._signature(x, note, depth + 1) for x in entries)]
        return type(value).__qualname__

    def _find_settings(self) -> list[Any]:
        """Return which dropouts draw and which tensors require gradients."""
        dropouts = [module().p > 0 for module in self._dropouts]  # type: ignore[union-attr]
        return dropouts + [reference().requires_grad for reference in self._tensors]  # type: ignore[union-attr]


class _Owner:
    """A module, a function or an object, and the attributes or variables of it that are compared.

    Attributes:
        reference: weak reference to it.
        plain: names of those that hold plain values.
        others: names of those that hold something else.
        sized: True if the number of its attributes is compared.
        get: returns the plain values from a dictionary of attributes; None if there are none.
    """

    __slots__ = ("get", "others", "plain", "reference", "sized")

    def __init__(self, reference: weakref.ref[Any], plain: list[str], others: list[str], sized: bool):
        self.reference = reference
        self.plain = plain
        self.others = others
        self.sized = sized
        self.get: Callable[[Any], Any] | None = itemgetter(*plain) if plain else None


def _variables_of(functions: Iterable[FunctionType]) -> Iterator[tuple[FunctionType, list[str]]]:
    """Yield functions with the names of their free variables and, each once, of the globals that they refer to."""
    seen: set[tuple[int, str]] = set()
    for function in functions:
        names = list(function.__code__.co_freevars)
        if package_of(function) != "pyro_mm":
            space = function.__globals__
            more = [n for n in names_in(function.__code__) if n in space and (id(space), n) not in seen]
            seen |= {(id(space), n) for n in more}
            names += more
        if names:
            yield function, names


def _attributes_of(module: nn.Module) -> list[str]:
    """Return the names of a module's attributes: for torch's own modules, of flags and strings."""
    attributes = vars(module)
    if belongs_to_library(type(module)):
        return [name for name, x in attributes.items() if type(x) in (bool, str)]
    return [name for name in attributes if name not in INTERNAL or name == "training"]


def _few_objects(objects: Iterable[Any]) -> list[Any]:
    """Return the objects that have attributes and can be referred to weakly; none if they are many."""
    found = [x for x in objects if hasattr(x, "__dict__") and hasattr(x, "__weakref__")]
    return found if len(found) <= MOST_OBJECTS else []


def _read(owner: Any, name: str) -> Any:
    """Return an attribute of an object, or a free variable or a global of a function."""
    if type(owner) is not FunctionType:
        return owner.__dict__.get(name, ABSENT)
    free = owner.__code__.co_freevars
    if name not in free:
        return owner.__globals__.get(name, ABSENT)
    try:
        return owner.__closure__[free.index(name)].cell_contents  # type: ignore[index]
    except ValueError:  # a variable without a value
        return ABSENT


def _is_plain(value: Any) -> bool:
    """Return True for a value that cannot change itself and refers to nothing."""
    return isinstance(value, SCALARS) or (isinstance(value, tuple) and all(isinstance(x, SCALARS) for x in value))


def _equal(one: Any, other: Any) -> bool:
    try:
        return one is other or bool(one == other)
    except (RuntimeError, ValueError):
        return False
