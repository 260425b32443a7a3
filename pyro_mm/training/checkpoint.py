"""A training that was stopped, from the end of its latest epoch on."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ..batch.batch import Batch
from ..utils.arguments import check_seed
from ..utils.reachable import held
from ..utils.seeding import generator_state, set_generator_state
from ..utils.tensor_files import describe_mismatch, describe_tensor_mismatch, load_modules, load_tensors, save_tensors
from .fingerprint import layout, rows_hash
from .step import TrainingProblem

WRITE_SHARE = 20  # seconds of training between two writings, a second that the latest one took
FORMAT = 2
WHAT = "a checkpoint of mm.fit"
ENTRIES = {
    "epochs": int,
    "modules": list,
    "loose": list,
    "optimizer": dict,
    "steps": int,
    "columns": dict,
    "generators": list,
}
FREE_SHAPES = ("LBFGS", "Adafactor", "Muon")  # optimisers of torch whose state is not of the parameters' shapes
SMALL = (2,)  # a shape that is not that of a count of steps


def data_identity(
    data: Any, head: Batch, rows: int, batch_size: int, minibatches: int, seed: int | None
) -> dict[str, Any]:
    """Describe what decides a training's minibatches, to be compared when it goes on.

    Args:
        data: a batch; or a loader, whose values are not looked at, since they may differ from epoch to epoch.
        head: some of its rows.
        rows: their number in all.
        batch_size: rows of a minibatch.
        minibatches: their number in an epoch.
        seed: that of the training.
    """
    return {
        "rows": rows,
        "batch size": batch_size,
        "minibatches of an epoch": minibatches,
        "seed": check_seed(seed),
        "holds": layout(head),
        "values": rows_hash(data) if isinstance(data, Batch) else "of a loader",
    }


def difference(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Compare two results of :func:`data_identity`: the first difference in words, or an empty text.

    Two minibatches of a loader may lack different modalities, so that only those of both are compared.
    """
    for part, value in here.items():
        found = saved.get(part)
        if found == value:
            continue
        if part == "values":
            return "some rows have other values"
        if part != "holds" or not isinstance(found, Mapping):
            return f"{part}: {found!r}, and not {value!r}"
        loader = "of a loader" in (saved.get("values"), here.get("values"))
        for name in sorted({*found, *value}):
            kinds = found.get(name, ""), value.get(name, "")
            absent = name not in found or name not in value or "" in kinds
            if kinds[0] != kinds[1] and not (loader and absent):
                return f"{name}: {kinds[0] or 'none'}, and not {kinds[1] or 'none'}"
    return ""


class Checkpoint:
    """One file with all that decides how a training goes on: after reading it, the same numbers as without a stop.

    Weights and buffers of the modules, leaves that are in none, the optimiser's state, the step that warm-ups have
    come to, the history's columns and the states of torch's own generators; of modules that a function holds, the
    buffers too; but not a loader's generator. It says what it is of: the objective, the kind of optimiser, the data,
    the batch size and the seed. The versions of the package and of torch, the optimiser's settings and the schedule are
    noted under ``notes``, for people: settings of the optimiser, such as its step size, are those of the caller.

    The file is replaced as a whole, so a stop while it is written leaves the one before.

    Args:
        path: the file.
        problem, optimizer: what is trained.
        columns: of the history; filled by :meth:`read`.
        device: whose generator makes the draws, besides the CPU's.
        identity: what else has to be the same, such as :func:`data_identity`.
    """

    schedule: LRScheduler | None = None

    def __init__(
        self,
        path: str | Path,
        problem: TrainingProblem,
        optimizer: torch.optim.Optimizer,
        columns: dict[str, list[float]],
        device: torch.device,
        identity: Mapping[str, Any],
    ):
        self.path, self.problem, self.optimizer = Path(path), problem, optimizer
        self.columns, self.device, self.identity = columns, device, dict(identity)
        own = {id(p) for m in problem.modules for p in m.parameters()}
        self._loose = [p for p in problem.parameters if id(p) not in own]
        self._held = held(problem.model, problem.guide)
        self._due = -math.inf
        self._written = 0

    # -- reading ------------------------------------------------------------------------------------------------

    def read(self, epochs: int, force: bool = False) -> int:
        """Restore what the file holds, after all of it was compared with what is to be trained.

        Args:
            epochs: the most that the file may be of.
            force: whether another format, other data, another batch size and another seed will do.

        Returns:
            The number of epochs behind it: 0 where there is no file.

        Raises:
            ValueError: the file is damaged, or of something else, and says which part does not fit. Nothing has been
                changed then.
        """
        if not self.path.exists():
            return 0
        state = load_tensors(self.path, WHAT)
        check_entries(self.path, state)
        self._check_identity(state, force)
        if state["epochs"] > epochs:
            raise ValueError(f"{self.path} is of {state['epochs']} epochs, more than the {epochs} asked for")
        self._check_tensors(state)
        self._restore(state)
        self._written = state["epochs"]
        return self._written

    def _check_identity(self, state: dict[str, Any], force: bool) -> None:
        """Raise a ValueError unless it is of the same data, batch size, seed, objective and kind of optimiser."""
        version = state.get("format", 1)
        if version != FORMAT and not force:
            raise self._unfit(
                f"its format is {version}, of another version of pyro_mm, and not {FORMAT}, so that it cannot be told "
                "whether data, batch size and seed are the same",
                forcible=True,
            )
        if not force:
            self._check_data(state.get("identity"))
        for part, here in self._kind().items():
            if state.get(part) != here:
                raise self._unfit(f"its {part} is {state.get(part)}, and not {here}")

    def _check_data(self, saved: Any) -> None:
        if not isinstance(saved, dict):
            raise _damaged(self.path, "it does not say of what data it is")
        if text := difference(saved, self.identity):
            raise self._unfit(f"its data, or how they are used, differ: {text}", forcible=True)

    def _check_tensors(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless every tensor has the name, shape and dtype of the one that it replaces."""
        modules = self.problem.modules
        if len(state["modules"]) != len(modules):
            raise self._unfit(f"it is of {len(state['modules'])} modules, and not of {len(modules)}")
        for module, saved in zip(modules, state["modules"], strict=True):
            if text := describe_mismatch(saved, module):
                raise self._unfit(f"{type(module).__name__}: {text}")
        names, here = self._loose_names(), self._loose
        if len(state["loose"]) != len(here):
            shapes = ", ".join(str(tuple(p.shape)) for p in here)
            raise self._unfit(
                f"it has {len(state['loose'])} parameters outside of modules, and not {len(here)}, of shapes {shapes}"
            )
        if state.get("loose names", names) != names:
            raise self._unfit(f"its parameters outside of modules are {state['loose names']}, and not {names}")
        for place, (saved, p) in enumerate(zip(state["loose"], here, strict=True)):
            if text := describe_tensor_mismatch(saved, p):
                raise self._unfit(f"parameter {names[place] or place} outside of modules is {text}")
        self._check_buffers(state)
        self._check_optimizer(state["optimizer"])
        self._check_generators(state["generators"])

    def _check_buffers(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless the buffers of modules that functions hold are those of here."""
        if "format" not in state:  # which had none of them
            return
        saved, here = state.get("buffers"), self._buffers()
        if not isinstance(saved, dict):
            raise _damaged(self.path, "it has no buffers of what functions hold")
        if saved.keys() != here.keys():
            names = ", ".join(map(str, saved.keys() ^ here.keys()))
            raise self._unfit(f"functions hold other buffers than its own: {names}")
        for name, buffer in here.items():
            if text := describe_tensor_mismatch(saved[name], buffer):
                raise self._unfit(f"buffer {name} is {text}")

    def _check_optimizer(self, state: dict[str, Any]) -> None:
        """Raise a ValueError unless the moments are those of an optimiser of these parameters."""
        groups, moments = state.get("param_groups"), state.get("state")
        if not isinstance(groups, list) or not isinstance(moments, dict):
            raise _damaged(self.path, "the state of the optimiser is not one")
        if not all(isinstance(group, dict) and isinstance(group.get("params"), list) for group in groups):
            raise _damaged(self.path, "the state of the optimiser has groups without parameters")
        here = self.optimizer.param_groups
        sizes, own = [len(group["params"]) for group in groups], [len(group["params"]) for group in here]
        if sizes != own:
            raise self._unfit(f"its optimiser has groups of {sizes} parameters, and not of {own}")
        numbers = [number for group in groups for number in group["params"]]
        parameters = dict(zip(numbers, (p for group in here for p in group["params"]), strict=True))
        if len(parameters) != len(numbers) or not moments.keys() <= parameters.keys():
            raise _damaged(self.path, "its optimiser has a state of parameters that are not in its groups")
        for number, moment in moments.items():
            if not isinstance(moment, dict):
                raise _damaged(
                    self.path, f"the state of the optimiser for parameter {number} is a {type(moment).__name__}"
                )
        for group, its_numbers in zip(here, (group["params"] for group in groups), strict=True):
            like = self._moments_like(group)
            for number in its_numbers:
                if moments.get(number):
                    self._check_moments(number, moments[number], parameters[number], like)

    def _check_moments(self, number: int, moment: dict[str, Any], p: Tensor, like: dict[str, Any]) -> None:
        for name, here in like.items():
            if name not in moment:
                raise self._unfit(f"its optimiser has no {name} of parameter {number}")
            if isinstance(here, Tensor):
                text = describe_tensor_mismatch(moment[name], p if here.shape == SMALL else here)
            else:
                text = "" if isinstance(moment[name], type(here)) else f"a {type(moment[name]).__name__}"
            if text:
                raise self._unfit(f"{name} of parameter {number} in its optimiser is {text}")

    def _moments_like(self, group: dict[str, Any]) -> dict[str, Any]:
        """The state that one of torch's optimisers has of a parameter of shape :data:`SMALL` after a step.

        Its tensors of that shape are those of a parameter's shape. Empty where it cannot be known.
        """
        kind = type(self.optimizer)
        if not kind.__module__.startswith("torch.optim") or kind.__name__ in FREE_SHAPES:
            return {}
        first = group["params"][0]
        p = torch.zeros(SMALL, dtype=first.dtype, device=first.device, requires_grad=True)
        p.grad = torch.zeros_like(p)
        try:
            like = kind([p], **{k: v for k, v in group.items() if k in self.optimizer.defaults})
            like.step()
        except (RuntimeError, TypeError, ValueError):
            return {}
        return dict(like.state[p])

    def _check_generators(self, states: list[Any]) -> None:
        for device, saved in zip(self._devices(), states, strict=False):
            try:
                torch.Generator(device).set_state(saved.cpu())
            except (AttributeError, RuntimeError, TypeError) as error:
                raise _damaged(self.path, f"the state of torch's generator on {device} cannot be used here") from error
        if not states:
            raise _damaged(self.path, "it has no state of torch's generator")

    def _restore(self, state: dict[str, Any]) -> None:
        before = self.optimizer.state_dict()
        try:
            self._restore_optimizer(state["optimizer"])
            load_modules(self.problem.modules, state["modules"])
        except Exception as error:
            self.optimizer.load_state_dict(before)
            raise self._unfit(str(error)) from error
        with torch.no_grad():
            for p, saved in zip(self._loose, state["loose"], strict=True):
                p.copy_(saved)
            for name, buffer in self._buffers().items():
                if name in state.get("buffers", {}):
                    buffer.copy_(state["buffers"][name])
        if hasattr(self.problem.objective, "steps"):
            self.problem.objective.steps = state["steps"]
        self.columns.update(state["columns"])
        for device, generator in zip(self._devices(), state["generators"], strict=False):
            set_generator_state(device, generator.cpu())

    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        """Load the moments; the settings stay those of the caller, by which torch also decides where they lie."""
        groups = [
            {**here, "params": saved["params"]}
            for here, saved in zip(self.optimizer.param_groups, state["param_groups"], strict=True)
        ]
        self.optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
        for p, moments in self.optimizer.state.items():
            for name, x in moments.items():
                if isinstance(x, torch.Tensor) and x.shape == p.shape:
                    # laid out as the weights are now: a fused optimiser walks both in the order of the memory
                    moments[name] = torch.empty_like(p, dtype=x.dtype).copy_(x)

    def _unfit(self, text: str, forcible: bool = False) -> ValueError:
        mend = '. Give fit(.., resume="force") to go on all the same, or another path to start anew' * forcible
        return ValueError(f"{self.path} does not fit what is to be trained: {text}{mend}")

    # -- writing ------------------------------------------------------------------------------------------------

    def after(self, epochs: int) -> None:
        """Write after an epoch, unless that would take more than a twentieth of the time.

        Of epochs of milliseconds the file has those of some moments ago.
        """
        if time.perf_counter() >= self._due:
            self.write(epochs)

    def write(self, epochs: int) -> None:
        """Replace the file by one of this moment, where it is of another one."""
        if epochs == self._written:
            return
        start = time.perf_counter()
        state: dict[str, Any] = self._kind() | {
            "format": FORMAT,
            "identity": self.identity,
            "notes": self._notes(),
            "epochs": epochs,
            "modules": [m.state_dict() for m in self.problem.modules],
            "loose": [p.detach() for p in self._loose],
            "loose names": self._loose_names(),
            "buffers": self._buffers(),
            "optimizer": self._moments(),
            "steps": getattr(self.problem.objective, "steps", 0),
            "columns": self.columns,
            "generators": [generator_state(device) for device in self._devices()],
        }
        save_tensors(self.path, state)
        end = time.perf_counter()
        self._due = end + WRITE_SHARE * (end - start)
        self._written = epochs

    def _moments(self) -> dict[str, Any]:
        """The optimiser's state without its settings, which need not be of types that can be read again."""
        state = self.optimizer.state_dict()
        return {"state": state["state"], "param_groups": [{"params": g["params"]} for g in state["param_groups"]]}

    def _kind(self) -> dict[str, str]:
        objective = re.sub(r" at 0x[0-9a-f]+", "", repr(self.problem.objective))  # where an object lies, if it says so
        return {"optimizer's kind": type(self.optimizer).__name__, "objective": objective}

    def _notes(self) -> dict[str, str]:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        notes = {"pyro_mm": _version(), "torch": str(torch.__version__), "optimizer": "; ".join(map(_settings, groups))}
        if self.schedule is not None:
            notes["schedule"] = f"{type(self.schedule).__name__}: {_settings(self.schedule.state_dict())}"
        return notes

    def _loose_names(self) -> list[str]:
        """Names of the parameters outside of the modules: in Pyro's store, or of what a function holds, or empty."""
        store = pyro.get_param_store()
        paths = {id(p): f"{path}.{name}" for path, m in self._held.items() for name, p in m.named_parameters()}
        return [store.param_name(p) or paths.get(id(p), "") for p in self._loose]

    def _buffers(self) -> dict[str, Tensor]:
        """The persistent buffers of modules that functions hold, by path."""
        return {
            f"{path}.{name}": buffer
            for path, module in self._held.items()
            for name, buffer in module.named_buffers()
            if name in module.state_dict()
        }

    def _devices(self) -> list[torch.device]:
        return [torch.device("cpu")] + ([self.device] if self.device.type == "cuda" else [])


def load_weights(path: Path, modules: Sequence[nn.Module]) -> tuple[dict[str, list[float]], int]:
    """Load the modules of a checkpoint, whatever it was trained on, and leave them in ``eval`` mode.

    Returns:
        (columns of the history, epochs).

    Raises:
        ValueError: the file is damaged, or of other modules. Nothing has been changed then.
    """
    state = load_tensors(path, WHAT)
    check_entries(path, state)
    if len(state["modules"]) != len(modules):
        raise ValueError(f"{path} is of {len(state['modules'])} modules, and not of {len(modules)}")
    for module, saved in zip(modules, state["modules"], strict=True):
        if text := describe_mismatch(saved, module):
            raise ValueError(f"{path} does not fit, {type(module).__name__}: {text}")
    load_modules(modules, state["modules"])
    for module in modules:
        module.eval()
    return state["columns"], state["epochs"]


def check_entries(path: Path, state: dict[str, Any]) -> None:
    """Raise a ValueError unless a checkpoint has all entries, of their types and of as many epochs as it says."""
    if not state.keys() & ENTRIES.keys():
        raise ValueError(f"{path} is not {WHAT}: it holds {', '.join(map(str, state)) or 'nothing'}")
    for name, kind in ENTRIES.items():
        if not isinstance(state.get(name), kind) or isinstance(state[name], bool):
            found = type(state[name]).__name__ if name in state else "nothing"
            raise _damaged(path, f"expected {name!r} to be of type {kind.__name__}, found {found}")
    columns = state["columns"]
    for name, column in columns.items():
        numbers = isinstance(column, list) and all(isinstance(x, int | float) for x in column)
        if not (isinstance(name, str) and numbers and len(column) == state["epochs"]):
            raise _damaged(path, f"expected {state['epochs']} numbers in the column {name!r} of its history")
    if state["epochs"] < 1 or state["steps"] < 0 or "loss" not in columns:
        raise _damaged(path, f"it is of {state['epochs']} epochs, {state['steps']} steps and {len(columns)} columns")


def _damaged(path: Path, text: str) -> ValueError:
    return ValueError(f"{path} is damaged, or not {WHAT}: {text}")


def _settings(held: Mapping[str, Any]) -> str:
    plain = {k: v for k, v in held.items() if isinstance(v, bool | int | float | str | list | tuple | Tensor)}
    return ", ".join(f"{k} {v.tolist() if isinstance(v, Tensor) else v}" for k, v in plain.items())


def _version() -> str:
    return str(getattr(sys.modules[__name__.split(".")[0]], "__version__", "unknown"))
