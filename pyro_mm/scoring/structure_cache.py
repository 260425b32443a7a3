"""Cached results of running a (model, guide) pair, found again once what the runs depended on has changed."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from ..handlers.internals import Dropout, tree_iter

MOST = 256  # forms of a batch kept for one pair


class PairCache:
    """Results per (model, guide) pair and key, each kept while both live and nothing that its run used has changed.

    Changes that are seen: a parameter or other leaf tensor frozen, freed or replaced; a module replaced, or put into
    another mode; a flag or word among a module's attributes; a dropout's rate that is no longer, or not yet, 0.
    """

    def __init__(self) -> None:
        self._pairs: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def get(self, model: Any, guide: Any, key: Hashable, rows: Callable[[], Any], run: Callable[..., Any]) -> Any:
        """Return the cached result, or compute it.

        Args:
            model, guide: the pair. Callables that cannot be referred to weakly have nothing kept.
            key: what else the result depends on.
            rows: gives the batch to run on, whose tensors do not count as used.
            run: computes the result from model, guide and that batch.
        """
        try:
            known = self._pairs.setdefault(model, weakref.WeakKeyDictionary()).setdefault(guide, {})
        except TypeError:
            return run(model, guide, rows())
        if key in known and known[key][1].unchanged():
            return known[key][0]
        with disable_proxy_modes_tracing():  # or the run would become a part of a step's graph
            few = rows()
            with reading([model, guide], few.parts()[1]) as reads:
                result = run(model, guide, few)
        if len(known) >= MOST:
            known.clear()
        known[key] = result, reads
        return result


class Reads:
    """The modules and leaf tensors that a run used, with the state in which it found them."""

    def __init__(self) -> None:
        self._modules: list[tuple[weakref.ref[nn.Module], _State]] = []
        self._tensors: list[tuple[weakref.ref[Tensor], bool]] = []

    def keep(self, modules: list[nn.Module], watch: _LeafTensors) -> None:
        """Take note of the modules, of all within them, and of the tensors that outlive the run."""
        every = {id(m): m for root in modules for m in root.modules()}
        self._modules = [(weakref.ref(m), _State(m)) for m in every.values()]
        used = [(weakref.ref(x), x.requires_grad) for x in watch.used.values()]
        watch.forget()  # the last holder of what the run made in ways that torch does not tell of: torch.Tensor(..)
        self._tensors = [(ref, requires_grad) for ref, requires_grad in used if ref() is not None]

    def unchanged(self) -> bool:
        """Return whether all of it still lives, in the same state."""
        for ref, state in self._modules:
            module = ref()
            if module is None or not state.holds(module):
                return False
        for tensor_ref, requires_grad in self._tensors:
            tensor = tensor_ref()
            if tensor is None or tensor.requires_grad != requires_grad:
                return False
        return True


@contextmanager
def reading(programs: list[Any], ignored: list[Tensor]) -> Iterator[Reads]:
    """Record the modules and leaf tensors that the code inside uses; programs that are modules count as used."""
    reads, watch = Reads(), _LeafTensors(ignored)
    called = {id(program): program for program in programs if isinstance(program, nn.Module)}

    def note(module: nn.Module, _: Any) -> None:
        called[id(module)] = module

    hook = register_module_forward_pre_hook(note)
    try:
        with watch:
            yield reads
    finally:
        hook.remove()
    reads.keep(list(called.values()), watch)


class _LeafTensors(TorchFunctionMode):
    """Collects the leaf tensors that torch's functions are called with, but for those that they have made."""

    def __init__(self, ignored: list[Tensor]) -> None:
        super().__init__()
        self.used: dict[int, Tensor] = {}
        self.made = {id(x): x for x in ignored}  # the tensors too, lest another one gets the identity

    def forget(self) -> None:
        """Let go of all tensors."""
        self.used.clear()
        self.made.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in tree_iter((args, kwargs)):
            if isinstance(x, Tensor) and id(x) not in self.made and x.is_leaf and x.is_floating_point():
                self.used[id(x)] = x
        result = func(*args, **kwargs)
        for x in tree_iter(result):
            if isinstance(x, Tensor) and id(x) not in self.used:
                self.made[id(x)] = x
        return result


class _State:
    """A module's mode, flags and words, the identities of its children and parameters, and which of these are trained.

    Identities serve, since what they are of is referred to weakly besides: none is used again unnoticed.
    """

    __slots__ = ("children", "draws", "flags", "parameters")

    def __init__(self, module: nn.Module) -> None:
        self.flags = [(name, x) for name, x in module.__dict__.items() if type(x) in (bool, str)]
        self.draws = _draws(module)
        self.children = [id(child) for child in module._modules.values()]
        self.parameters = [(id(p), p.requires_grad) for p in module._parameters.values() if p is not None]

    def holds(self, module: nn.Module) -> bool:
        """Return whether the module is still in this state; it is asked at every step, and so compares no more."""
        attributes = module.__dict__
        for name, x in self.flags:
            if attributes.get(name) != x:
                return False
        if self.draws != _draws(module) or self.children != [id(child) for child in attributes["_modules"].values()]:
            return False
        parameters = attributes["_parameters"]
        return not (parameters or self.parameters) or self.parameters == [
            (id(p), p.requires_grad) for p in parameters.values() if p is not None
        ]


def _draws(module: nn.Module) -> bool:
    """Return whether a module is a dropout that draws numbers, which at a rate of 0 it does not."""
    return isinstance(module, Dropout) and module.p > 0
