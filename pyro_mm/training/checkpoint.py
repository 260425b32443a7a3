"""Checkpoints: a training that was stopped goes on from the end of its latest epoch, or from a step within one."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ..utils.processes import Processes
from ..utils.reachable import referenced_modules
from ..utils.seeding import generator_state, set_generator_state
from ..utils.tensor_files import describe_mismatch, describe_tensor_mismatch, load_modules, load_tensors, save_tensors
from ..utils.versions import library_versions
from .callback_list import CallbackList
from .checkpoint_checks import (
    FILE_KIND,
    check_accumulated,
    check_entries,
    check_generators,
    check_optimizer_state,
    damage_error,
    data_identity,
    difference,
    mismatch_error,
)
from .gradients import GradientSequence
from .loader import MinibatchLoader
from .nonfinite_report import generator_devices
from .pace import PACE, Pace
from .position import Position, loader_states, restore_loader

__all__ = ["Checkpoint", "data_identity", "difference", "load_weights"]

FORMAT = 3
READABLE_FORMATS = (2, FORMAT)  # 2 has no place within an epoch, and no callbacks


class Checkpoint:
    """One file with everything that decides how a training goes on: the numbers are those of one without a stop.

    It holds weights and buffers of the modules, parameters outside of modules, buffers of modules that a function
    holds, the optimisers' states, the count of steps, the history's columns, the states of torch's generators, of a
    loader's own and of callbacks, and the place within an epoch that was broken off. It names the objective, the kind
    of optimiser, the data, the batch size and the seed. The versions of the package and of torch, the optimiser's
    settings and the schedule are noted under ``notes``, for people: settings of the optimiser, such as its step size,
    are those of the caller.

    The file is replaced as a whole, so a stop while it is written leaves the one before.

    Args:
        path: the file.
        sequence: the steps of the training, by the objective's update and those of further players.
        loader: the source of its minibatches.
        columns: of the history; filled by :meth:`read`.
        device: whose generator makes the draws, besides the CPU's.
        identity: what else has to be the same, such as :func:`data_identity`.
        objective: the objective in words.
        callbacks: whose states are part of it.
        pace: how often :meth:`after_epoch` writes.
        processes: the processes that train together, of which rank 0 reads and writes.
    """

    schedule: LRScheduler | None = None
    stopped_at: int | None = None
    position: Position | None = None

    def __init__(
        self,
        path: str | Path,
        sequence: GradientSequence,
        loader: MinibatchLoader,
        columns: dict[str, list[float]],
        device: torch.device,
        identity: Mapping[str, Any],
        objective: str,
        callbacks: CallbackList,
        pace: Pace = PACE,
        processes: Processes | None = None,
    ):
        (update,) = [update for update in sequence.updates if not update.name]
        self.path = Path(path)
        self.columns = columns
        self.identity = dict(identity)
        self._sequence = sequence
        self._loader = loader
        self._device = device
        self._problem = update.loss
        self._optimizer: Any = update.optimizer
        self._objective = re.sub(r" at 0x[0-9a-f]+", "", objective)  # where an object lies, if it says so
        self._devices = generator_devices(device)
        own = {id(p) for m in self._problem.modules for p in m.parameters()}
        every = {id(p): p for p in (*self._problem.parameters, *sequence.parameters)}
        self._loose = [p for key, p in every.items() if key not in own]
        self._players: dict[str, Any] = {update.name: update.optimizer for update in sequence.updates if update.name}
        self._modules_in_functions = referenced_modules(self._problem.model, self._problem.guide)
        self._callbacks = callbacks
        self._pace = pace
        self._processes = processes or Processes()
        self._next_write = -math.inf
        self._written: tuple[Any, ...] = (0, 0, None)  # epochs, steps of the next one, epochs asked for if stopped

    # -- reading ------------------------------------------------------------------------------------------------

    def read(self, epochs: int, force: bool = False) -> int:
        """Restore the state that the file holds, after comparing all of it with what is to be trained.

        Args:
            epochs: the largest number of epochs that the file may hold.
            force: True accepts another format, other data, another batch size and another seed.

        Returns:
            The number of epochs behind it: 0 if there is no file.

        Raises:
            ValueError: the file is damaged or of another training; the message says which part does not fit. Nothing
                has been changed then.
        """
        state = self._load()
        if state is None:
            return 0
        self._check_identity(state, force)
        begun = state.get("position") is not None
        if state["epochs"] + begun > epochs:
            more = " and a part of the next" * begun
            raise ValueError(f"{self.path} is of {state['epochs']} epochs{more}, more than the {epochs} asked for")
        self._check_tensors(state)
        self._restore(state)
        steps = 0 if self.position is None else self.position.number
        self._written = (state["epochs"], steps, self.stopped_at)
        epochs_done: int = state["epochs"]
        return epochs_done

    def _load(self) -> dict[str, Any] | None:
        """Return what the file holds for this process, after rank 0 has read it; None if there is no file.

        Raises:
            ValueError: it is damaged.
            OSError: it cannot be read.
        """
        found: Any = None
        if self._processes.is_main and self.path.exists():
            try:
                found = load_tensors(self.path, FILE_KIND)
                check_entries(self.path, found)
            except (OSError, ValueError) as error:
                found = error
        found = self._processes.broadcast(found)
        if isinstance(found, Exception):
            raise found
        of_ranks = (found or {}).get("of ranks", [])
        return {**found, **of_ranks[self._processes.rank]} if self._processes.rank < len(of_ranks) else found

    def _check_identity(self, state: dict[str, Any], force: bool) -> None:
        """Raise a ValueError unless data, batch size, seed, objective and kind of optimiser are the same."""
        version = state.get("format", 1)
        if version not in READABLE_FORMATS and not force:
            raise mismatch_error(
                self.path,
                f"its format is {version}, of another version of pyro_mm, and not {FORMAT}, so that it cannot be told "
                "whether data, batch size and seed are the same",
                forcible=True,
            )
        if not force:
            saved = state.get("identity")
            if not isinstance(saved, dict):
                raise damage_error(self.path, "it does not say of what data it is")
            if text := difference(saved, self.identity):
                raise mismatch_error(self.path, f"its data, or how they are used, differ: {text}", forcible=True)
            if (kinds := state.get("callbacks' kinds", [])) != self._callbacks.kinds:
                names = [", ".join(each) or "none" for each in (kinds, self._callbacks.kinds)]
                raise mismatch_error(self.path, f"its callbacks are {names[0]}, and not {names[1]}", forcible=True)
        if (saved_players := list(state.get("players", {}))) != list(self._players):
            names = [", ".join(each) or "none" for each in (saved_players, list(self._players))]
            raise mismatch_error(self.path, f"its further players are {names[0]}, and not {names[1]}")
        for part, here in self._kind().items():
            if state.get(part) != here:
                raise mismatch_error(self.path, f"its {part} is {state.get(part)}, and not {here}")

    def _check_tensors(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless every tensor has the name, shape and dtype of the one that it replaces."""
        modules = self._problem.modules
        if len(state["modules"]) != len(modules):
            raise mismatch_error(self.path, f"it is of {len(state['modules'])} modules, and not of {len(modules)}")
        for module, saved in zip(modules, state["modules"], strict=True):
            if text := describe_mismatch(saved, module):
                raise mismatch_error(self.path, f"{type(module).__name__}: {text}")
        self._check_loose(state)
        self._check_buffers(state)
        check_optimizer_state(self.path, self._optimizer, state["optimizer"])
        saved = state.get("players", {})
        for name, optimizer in self._players.items():
            check_optimizer_state(self.path, optimizer, saved[name])
        check_generators(self.path, self._devices, state["generators"])
        check_accumulated(self.path, self._sequence.state_tensors, state.get("gradients", []))
        if self._has_states(state) and (text := self._callbacks.describe_mismatch(state["callbacks"])):
            raise mismatch_error(self.path, text)

    def _has_states(self, state: dict[str, Any]) -> bool:
        return bool(self._callbacks.kinds) and state.get("callbacks' kinds") == self._callbacks.kinds

    def _check_loose(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless the parameters outside of modules are those of this training."""
        names = self._loose_names()
        here = self._loose
        if len(state["loose"]) != len(here):
            shapes = ", ".join(str(tuple(p.shape)) for p in here)
            raise mismatch_error(
                self.path,
                f"it has {len(state['loose'])} parameters outside of modules, and not {len(here)}, of shapes {shapes}",
            )
        if state.get("loose names", names) != names:
            raise mismatch_error(
                self.path, f"its parameters outside of modules are {state['loose names']}, and not {names}"
            )
        for place, (saved, p) in enumerate(zip(state["loose"], here, strict=True)):
            if text := describe_tensor_mismatch(saved, p):
                raise mismatch_error(self.path, f"parameter {names[place] or place} outside of modules is {text}")

    def _check_buffers(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless the buffers of modules that functions hold are those of this training."""
        if "format" not in state:  # which had none of them
            return
        saved = state.get("buffers")
        here = self._buffers()
        if not isinstance(saved, dict):
            raise damage_error(self.path, "it has no buffers of what functions hold")
        if saved.keys() != here.keys():
            names = ", ".join(map(str, saved.keys() ^ here.keys()))
            raise mismatch_error(self.path, f"functions hold other buffers than its own: {names}")
        for name, buffer in here.items():
            if text := describe_tensor_mismatch(saved[name], buffer):
                raise mismatch_error(self.path, f"buffer {name} is {text}")

    def _restore(self, state: dict[str, Any]) -> None:
        saved = [(self._optimizer, state["optimizer"])]
        saved += [(optimizer, state["players"][name]) for name, optimizer in self._players.items()]
        before = [optimizer.state_dict() for optimizer, _ in saved]
        try:
            for optimizer, own in saved:
                _restore_optimizer(optimizer, own)
            load_modules(self._problem.modules, state["modules"])
        except Exception as error:
            for (optimizer, _), moments in zip(saved, before, strict=True):
                optimizer.load_state_dict(moments)
            raise mismatch_error(self.path, str(error)) from error
        with torch.no_grad():
            for p, saved in zip(self._loose, state["loose"], strict=True):
                p.copy_(saved)
            for name, buffer in self._buffers().items():
                if name in state.get("buffers", {}):
                    buffer.copy_(state["buffers"][name])
        self._sequence.steps = state["steps"]
        self.columns.update(state["columns"])
        self.stopped_at = state.get("stopped at")
        if state.get("position") is not None:
            self.position = Position.of_state(state["position"], self._device)
        restore_loader(self._loader, state.get("loader", []))
        for sums, saved in zip(self._sequence.state_tensors, state.get("gradients", []), strict=False):
            sums.copy_(saved)
        if self._has_states(state):
            self._callbacks.load(state["callbacks"])
        for device, generator in zip(self._devices, state["generators"], strict=False):
            set_generator_state(device, generator.cpu())

    # -- writing ------------------------------------------------------------------------------------------------

    def after_epoch(self, epochs: int) -> None:
        """Write after an epoch, unless that would take more than a twentieth of the time.

        If an epoch takes milliseconds, the file may be some epochs behind.
        """
        if self._processes.broadcast(time.perf_counter() >= self._next_write):
            self.write(epochs)

    def write(self, epochs: int, position: Position | None = None, stopped_at: int | None = None) -> None:
        """Replace the file by the present state, unless it holds that already.

        Args:
            epochs: epochs behind it.
            position: the place in the next one, if that was broken off.
            stopped_at: the number of epochs asked for, if a callback stopped the training.
        """
        place = (epochs, 0 if position is None else position.number, stopped_at)
        if place == self._written:
            return
        start = time.perf_counter()
        of_ranks = self._processes.gather(self._own_state(position))
        if self._processes.is_main:
            state: dict[str, Any] = self._kind() | {
                "format": FORMAT,
                "identity": self.identity,
                "notes": self._notes(),
                "epochs": epochs,
                "modules": [m.state_dict() for m in self._problem.modules],
                "loose": [p.detach() for p in self._loose],
                "loose names": self._loose_names(),
                "buffers": self._buffers(),
                "optimizer": _moments(self._optimizer),
                "players": {name: _moments(optimizer) for name, optimizer in self._players.items()},
                "steps": self._sequence.steps,
                "columns": self.columns,
                "callbacks' kinds": self._callbacks.kinds,
                "callbacks": self._callbacks.state(),
                "stopped at": stopped_at,
                "of ranks": of_ranks[1:] and of_ranks,
            }
            save_tensors(self.path, state | of_ranks[0])
        end = time.perf_counter()
        self._next_write = end + self._pace.write_share * (end - start)
        self._written = place

    def _own_state(self, position: Position | None) -> dict[str, Any]:
        """Return the part of the state that each of several processes has for itself."""
        return {
            "generators": [generator_state(device) for device in self._devices],
            "loader": loader_states(self._loader),
            "gradients": self._sequence.state_tensors,
            "position": None if position is None else position.state_dict(),
        }

    def _kind(self) -> dict[str, str]:
        kinds = {f"kind of the optimizer of {name}": type(own).__name__ for name, own in self._players.items()}
        return {"optimizer's kind": type(self._optimizer).__name__, "objective": self._objective, **kinds}

    def _notes(self) -> dict[str, str]:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self._optimizer.param_groups]
        notes = {**library_versions(), "optimizer": "; ".join(map(_settings, groups))}
        if self.schedule is not None:
            notes["schedule"] = f"{type(self.schedule).__name__}: {_settings(self.schedule.state_dict())}"
        return notes

    def _loose_names(self) -> list[str]:
        """Return the names of parameters outside of the modules: in Pyro's store, in a function's module, or empty."""
        store = pyro.get_param_store()
        modules = self._modules_in_functions
        paths = {id(p): f"{path}.{name}" for path, m in modules.items() for name, p in m.named_parameters()}
        return [store.param_name(p) or paths.get(id(p), "") for p in self._loose]

    def _buffers(self) -> dict[str, Tensor]:
        """Return the persistent buffers of modules that functions hold, by path."""
        return {
            f"{path}.{name}": buffer
            for path, module in self._modules_in_functions.items()
            for name, buffer in module.named_buffers()
            if name in module.state_dict()
        }


def _restore_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """Load the moments, and keep the caller's settings, by which torch also decides the device of the moments."""
    groups = [
        {**here, "params": saved["params"]}
        for here, saved in zip(optimizer.param_groups, state["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    for p, moments in optimizer.state.items():
        for name, x in moments.items():
            if isinstance(x, Tensor) and x.shape == p.shape:
                # laid out as the weights are now: a fused optimiser walks both in the order of the memory
                moments[name] = torch.empty_like(p, dtype=x.dtype).copy_(x)


def _moments(optimizer: Any) -> dict[str, Any]:
    """Return an optimiser's state without its settings, which need not be of types that can be read again."""
    state = optimizer.state_dict()
    return {"state": state["state"], "param_groups": [{"params": g["params"]} for g in state["param_groups"]]}


def load_weights(path: Path, modules: Sequence[nn.Module]) -> tuple[dict[str, list[float]], int, int]:
    """Load the modules of a checkpoint, whatever it was trained on, and leave them in ``eval`` mode.

    Returns:
        (columns of the history, epochs, steps of the next epoch).

    Raises:
        ValueError: the file is damaged, or of other modules. Nothing has been changed then.
    """
    state = load_tensors(path, FILE_KIND)
    check_entries(path, state)
    if len(state["modules"]) != len(modules):
        raise ValueError(f"{path} is of {len(state['modules'])} modules, and not of {len(modules)}")
    for module, saved in zip(modules, state["modules"], strict=True):
        if text := describe_mismatch(saved, module):
            raise ValueError(f"{path} does not fit, {type(module).__name__}: {text}")
    load_modules(modules, state["modules"])
    for module in modules:
        module.eval()
    position = state.get("position") or {"number": 0}
    return state["columns"], state["epochs"], position["number"]


def _settings(held: Mapping[str, Any]) -> str:
    plain = {k: v for k, v in held.items() if isinstance(v, bool | int | float | str | list | tuple | Tensor)}
    return ", ".join(f"{k} {v.tolist() if isinstance(v, Tensor) else v}" for k, v in plain.items())
