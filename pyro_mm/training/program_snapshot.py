"""Notice, from one step to the next, that programs are made of other modules, parameters or hooks."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..utils.reachable import ReachableObjects

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OF_ALL_MODULES = [
    hooks for name, hooks in vars(torch_module).items() if name.startswith("_global_") and name.endswith("_hooks")
]
WATCHED = (nn.Module, Tensor, FunctionType)


class Composition:
    """The objects that programs are made of, as they were when this was made.

    Those are modules, their classes and what is put in the place of their ``forward``, their parameters and buffers,
    the hooks of both, and the modules, tensors and functions that a function refers to by name. Of the numbers and
    strings that a module or a function holds nothing is noticed.

    Args:
        programs: name -> callable of a batch.
    """

    def __init__(self, programs: Mapping[str, Any]):
        reached = ReachableObjects(programs)
        self.modules = list(reached.all_modules())
        functions = [x for x in reached._seen.values() if isinstance(x, FunctionType)]
        self.cells = [cell for f in functions for cell in f.__closure__ or () if isinstance(_held(cell), WATCHED)]
        self.globals = [
            (f.__globals__, name)
            for f in functions
            for name in f.__code__.co_names
            if isinstance(f.__globals__.get(name), WATCHED)
        ]
        kinds = ("_modules", "_parameters", "_buffers")
        registers = [module.__dict__[kind] for module in self.modules for kind in kinds]
        self.registers = registers
        self.filled = [register for register in registers if register]
        self.entries = sum(map(len, registers))
        self.objects = self._objects()
        self.tensors = [x for x in self.objects if isinstance(x, Tensor)]
        self.hooks = [getattr(module, kind) for module in self.modules for kind in HOOKS] + OF_ALL_MODULES
        self.settings = self._settings()

    def changed(self) -> bool:
        """Return True if any of it is another object now, or has other settings."""
        if sum(map(len, self.registers)) != self.entries:
            return True
        objects = self._objects()
        if len(objects) != len(self.objects) or not all(map(operator.is_, objects, self.objects)):
            return True
        return self._settings() != self.settings

    def _objects(self) -> list[Any]:
        found: list[Any] = [module.__class__ for module in self.modules]
        for register in self.filled:  # those that are empty would be missed in the count of entries
            found += register.values()
        found += [m.__dict__["forward"] for m in self.modules if "forward" in m.__dict__]
        found += [_held(cell) for cell in self.cells]
        found += [namespace.get(name) for namespace, name in self.globals]
        return found

    def _settings(self) -> list[Any]:
        found: list[Any] = [(x.requires_grad, x.dtype, x.device) for x in self.tensors]
        found += [list(x._backward_hooks) for x in self.tensors if x._backward_hooks]
        found += [list(hooks) for hooks in self.hooks if hooks]
        return found


def _held(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a name without a value
        return None


def left_out(parameters: Iterable[Tensor], optimizer: Any, before: Iterable[Tensor]) -> list[Tensor]:
    """The parameters that an optimiser does not have, and that are none of those of before."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]} | {id(p) for p in before}
    return [p for p in parameters if p.requires_grad and id(p) not in held]
