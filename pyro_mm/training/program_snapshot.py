"""Detect, from one step to the next, that programs are made of other modules, parameters or hooks."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from itertools import chain, repeat
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..utils.reachable import ReachableObjects

REGISTERS = ("_modules", "_parameters", "_buffers")
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = [
    hooks for name, hooks in vars(torch_module).items() if name.startswith("_global_") and name.endswith("_hooks")
]
REFERENCES = (nn.Module, Tensor, FunctionType)  # kinds of objects that a function may refer to by name

tensor_settings = operator.attrgetter("requires_grad", "dtype", "device")
tensor_hooks = operator.attrgetter("_backward_hooks")


class ProgramSnapshot:
    """The objects that programs are made of at one moment, to be compared with those of later moments.

    It holds the modules, their classes and assigned ``forward`` methods, their parameters and buffers, the hooks of
    both, and the modules, tensors and functions that a function refers to by name. Numbers and strings that a module or
    a function holds are not compared. A comparison is made at every compiled step, so it loops in C where it can.

    Args:
        programs: name -> callable of a batch.
    """

    def __init__(self, programs: Mapping[str, Any]):
        reached = ReachableObjects(programs)
        self._modules = list(reached.all_modules())
        self._attributes = [vars(module) for module in self._modules]
        functions = reached.functions
        self._cells = [
            cell for f in functions for cell in f.__closure__ or () if isinstance(_content(cell), REFERENCES)
        ]
        self._globals = [
            (f.__globals__, name)
            for f in functions
            for name in f.__code__.co_names
            if isinstance(f.__globals__.get(name), REFERENCES)
        ]
        self._registers = [attributes[kind] for attributes in self._attributes for kind in REGISTERS]
        self._filled = [register for register in self._registers if register]
        self._entries = sum(map(len, self._registers))
        self._hooks = [getattr(module, kind) for module in self._modules for kind in HOOKS] + GLOBAL_HOOKS

        self._objects = self._find_objects()
        self._tensors = [x for x in self._objects if isinstance(x, Tensor)]
        self._settings = self._find_settings()

    def changed(self) -> bool:
        """Return True if an object has been replaced, or has other settings or hooks."""
        if sum(map(len, self._registers)) != self._entries:
            return True
        objects = self._find_objects()
        if len(objects) != len(self._objects) or not all(map(operator.is_, objects, self._objects)):
            return True
        return self._find_settings() != self._settings

    def _find_objects(self) -> list[Any]:
        objects: list[Any] = list(map(type, self._modules))
        objects += chain.from_iterable(map(dict.values, self._filled))  # an entry in an empty one changes the count
        objects += map(dict.get, self._attributes, repeat("forward"))
        objects += map(_content, self._cells)
        objects += [namespace.get(name) for namespace, name in self._globals]
        return objects

    def _find_settings(self) -> list[Any]:
        settings: list[Any] = list(map(tensor_settings, self._tensors))
        if any(map(tensor_hooks, self._tensors)):
            settings += [list(tensor_hooks(x) or ()) for x in self._tensors]
        if any(self._hooks):
            settings += map(list, self._hooks)
        return settings


def _content(cell: Any) -> Any:
    """Return the content of a closure's cell, or None if it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def unknown_to_optimizer(parameters: Iterable[Tensor], optimizer: Any, before: Iterable[Tensor]) -> list[Tensor]:
    """Return the parameters to train that neither the optimiser nor the earlier parameters include."""
    known = {id(p) for group in optimizer.param_groups for p in group["params"]} | {id(p) for p in before}
    return [p for p in parameters if p.requires_grad and id(p) not in known]
