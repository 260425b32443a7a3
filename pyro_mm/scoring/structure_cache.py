"""A cache of results of running a (model, guide) pair, invalidated by changes of what the runs depended on."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from ..handlers.internals import tree_iter
from ..utils.snapshot import Slot, Snapshot

MOST_RESULTS = 256  # kept for one pair
MOST_RERUNS = 4  # for changes of one attribute or variable that leave the result as it is


Result = TypeVar("Result")


@dataclass
class CachedResult(Generic[Result]):
    """A result, and what it depends on.

    Attributes:
        value: the result.
        snapshot: the pair as it was after the run.
        harmless: attribute or variable -> number of its changes after which a run gave an equal result. After
            ``MOST_RERUNS`` of them it is no longer compared. A temperature that is annealed in every step is an
            example.
    """

    value: Result
    snapshot: Snapshot
    harmless: Counter[Slot] = field(default_factory=Counter)


class PairCache(Generic[Result]):
    """Results per (model, guide) pair and key, each kept as long as the pair lives and nothing it depends on changes.

    A :class:`~pyro_mm.utils.snapshot.Snapshot` after the run notices changes of all that the pair refers to, and of the
    modules and leaf tensors that the run used. Attributes and variables that the run itself changes do not count.
    """

    def __init__(self) -> None:
        self._pairs: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()

    def get(self, model: Any, guide: Any, key: Hashable, rows: Callable[[], Any], run: Callable[..., Result]) -> Result:
        """Return the cached result, computing it on first use and after a change.

        Args:
            model, guide: the pair. Nothing is cached for callables that cannot be referred to weakly.
            key: all else that the result depends on.
            rows: returns the batch to run on, whose tensors do not count as used.
            run: computes the result from model, guide and that batch.
        """
        try:
            of_model = self._pairs.setdefault(model, weakref.WeakKeyDictionary())
            results: dict[Hashable, CachedResult[Result]] = of_model.setdefault(guide, {})
        except TypeError:
            return run(model, guide, rows())
        known = results.get(key)
        if known is not None and not known.snapshot.changed():
            return known.value
        if len(results) >= MOST_RESULTS:
            results.clear()
        with disable_proxy_modes_tracing():  # else the run would become a part of the graph of a step
            results[key] = _compute(model, guide, rows(), run, known)
        return results[key].value


def _compute(
    model: Any, guide: Any, batch: Any, run: Callable[..., Result], known: CachedResult[Result] | None
) -> CachedResult[Result]:
    """Run a pair, and return the result with a snapshot of what it depends on."""
    programs = {"model": model, "guide": guide}
    harmless: Counter[Slot] = Counter() if known is None else known.harmless
    changes = frozenset() if known is None else known.snapshot.changed_slots()
    ignored = frozenset(slot for slot, count in harmless.items() if count >= MOST_RERUNS)

    snapshot = Snapshot(programs, ignored=ignored)
    with recording_use([model, guide], batch.parts()[1]) as used:
        value = run(model, guide, batch)
    tensors = used.tensors()
    if not snapshot.extend(used.modules, tensors):
        snapshot = Snapshot(programs, modules=used.modules, tensors=tensors, since=snapshot, ignored=ignored)

    if known is not None and known.value == value:
        harmless.update(changes)
    return CachedResult(value, snapshot, harmless)


class Use:
    """The modules and leaf tensors that a run used.

    Attributes:
        modules: modules that were called, and programs that are modules.
    """

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self._tensors: list[weakref.ref[Tensor]] = []

    def tensors(self) -> list[Tensor]:
        """Return the leaf tensors that outlived the run."""
        found = [reference() for reference in self._tensors]
        return [x for x in found if x is not None]


@contextmanager
def recording_use(programs: list[Any], ignored: list[Tensor]) -> Iterator[Use]:
    """Record the modules and leaf tensors that the code inside uses.

    Args:
        programs: callables; those that are modules count as used.
        ignored: tensors that do not count as used.
    """
    use = Use()
    leaves = _LeafTensors(ignored)
    called = {id(program): program for program in programs if isinstance(program, nn.Module)}

    def note(module: nn.Module, _: Any) -> None:
        called[id(module)] = module

    hook = register_module_forward_pre_hook(note)
    try:
        with leaves:
            yield use
    finally:
        hook.remove()
    use.modules = list(called.values())
    use._tensors = leaves.release()


class _LeafTensors(TorchFunctionMode):
    """A mode that collects the leaf tensors that torch's functions are called with and have not returned themselves.

    Args:
        ignored: tensors that are not collected.
    """

    def __init__(self, ignored: list[Tensor]) -> None:
        super().__init__()
        self._used: dict[int, Tensor] = {}
        self._made = {id(x): x for x in ignored}  # the tensors are kept alive, so that no other one gets their identity

    def release(self) -> list[weakref.ref[Tensor]]:
        """Return weak references to the collected tensors, and release all tensors.

        This ends those that the run made by functions that no mode sees, such as ``torch.Tensor(..)``.
        """
        references = [weakref.ref(x) for x in self._used.values()]
        self._used.clear()
        self._made.clear()
        return references

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for x in tree_iter((args, kwargs)):
            if isinstance(x, Tensor) and id(x) not in self._made and x.is_leaf and x.is_floating_point():
                self._used[id(x)] = x
        result = func(*args, **kwargs)
        for x in tree_iter(result):
            if isinstance(x, Tensor) and id(x) not in self._used:
                self._made[id(x)] = x
        return result
