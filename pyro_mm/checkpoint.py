"""A training that was stopped, from the end of its latest epoch on."""

from __future__ import annotations

import math
import os
import pickle
import re
import time
from pathlib import Path
from typing import Any

import torch

from .seeding import generator_state, set_generator_state
from .stepping import Problem

SPARED = 20  # times as long as the latest writing took, until the next one


class Checkpoint:
    """One file with all that decides how a training goes on: after reading it, the same numbers as without a stop.

    Weights and buffers of the modules, leaves that are in none, the optimiser's state, the step that warm-ups have
    come to, the history's columns and the states of torch's own generators; but neither a loader's generator nor the
    buffers of modules that functions hold. The file is replaced as a whole, so a stop while it is written leaves the
    one before. Settings of the optimiser, such as its step size, are those of the caller and not of the file.

    Args:
        path: the file.
        problem, optimizer: what is trained.
        columns: of the history; filled by :meth:`read`.
        device: whose generator makes the draws, besides the CPU's.
    """

    def __init__(
        self,
        path: str | Path,
        problem: Problem,
        optimizer: torch.optim.Optimizer,
        columns: dict[str, list[float]],
        device: torch.device,
    ):
        self.path, self.problem, self.optimizer = Path(path), problem, optimizer
        self.columns, self.device = columns, device
        own = {id(p) for m in problem.modules for p in m.parameters()}
        self._loose = [p for p in problem.parameters if id(p) not in own]
        self._due, self._written = -math.inf, 0

    def read(self) -> int:
        """Restores what the file holds, and the number of epochs behind it: 0 where there is no file.

        Raises:
            ValueError: the file is damaged, or of another model, guide, objective or optimiser, and says which part
                does not fit.
        """
        if not self.path.is_file():
            return 0
        try:
            state = torch.load(self.path, map_location=self.device, weights_only=True)
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{self.path} is damaged, or no checkpoint: {type(error).__name__} {error}") from error
        for part, here in self._what().items():
            if state.get(part) != here:
                what = f"its {part} is {state.get(part)}, and not {here}"
                raise ValueError(f"{self.path} does not fit what is to be trained: {what}")
        try:
            for module, saved in zip(self.problem.modules, state["modules"], strict=True):
                module.load_state_dict(saved)
            with torch.no_grad():
                for p, saved in zip(self._loose, state["loose"], strict=True):
                    p.copy_(saved)
            self._restore_optimizer(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self.path} does not fit what is to be trained: {error}") from error
        if hasattr(self.problem.objective, "steps"):
            self.problem.objective.steps = state["steps"]
        self.columns.update(state["columns"])
        for device, generator in zip(self._devices(), state["generators"], strict=False):
            set_generator_state(device, generator.cpu())
        self._written = state["epochs"]
        return self._written

    def _restore_optimizer(self, state: dict[str, Any]) -> None:
        groups = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, settings in zip(self.optimizer.param_groups, groups, strict=True):
            group.update(settings)
        for p, held in self.optimizer.state.items():
            for name, x in held.items():
                if isinstance(x, torch.Tensor) and x.shape == p.shape:
                    # laid out as the weights are now: a fused optimiser walks both in the order of the memory
                    held[name] = torch.empty_like(p, dtype=x.dtype).copy_(x)

    def _what(self) -> dict[str, str]:
        objective = re.sub(r" at 0x[0-9a-f]+", "", repr(self.problem.objective))  # where an object lies, if it says so
        return {"optimizer's kind": type(self.optimizer).__name__, "objective": objective}

    def after(self, epochs: int) -> None:
        """Writes after an epoch, unless that would take more than a twentieth of the time: of epochs of milliseconds
        the file has those of some moments ago."""
        if time.perf_counter() >= self._due:
            self.write(epochs)

    def write(self, epochs: int) -> None:
        """Replaces the file by one of this moment, where it is of another one."""
        if epochs == self._written:
            return
        start = time.perf_counter()
        state: dict[str, Any] = self._what() | {
            "epochs": epochs,
            "modules": [m.state_dict() for m in self.problem.modules],
            "loose": [p.detach() for p in self._loose],
            "optimizer": self.optimizer.state_dict(),
            "steps": getattr(self.problem.objective, "steps", 0),
            "columns": self.columns,
            "generators": [generator_state(device) for device in self._devices()],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".new")
        torch.save(state, beside)
        os.replace(beside, self.path)
        end = time.perf_counter()
        self._due, self._written = end + SPARED * (end - start), epochs

    def _devices(self) -> list[torch.device]:
        return [torch.device("cpu")] + ([self.device] if self.device.type == "cuda" else [])
