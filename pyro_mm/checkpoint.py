"""A training that was stopped, from the end of its latest epoch on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from .seeding import generator_state, set_generator_state
from .stepping import Problem


class Checkpoint:
    """One file with all that decides how a training goes on: after reading it, the same numbers as without a stop.

    Weights and buffers of the modules, leaves that are in none, the optimiser's state, the step that warm-ups have
    come to, the history's columns and the states of torch's generators. The file is replaced as a whole, so a stop
    while it is written leaves the one before.

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

    def read(self) -> int:
        """Restores what the file holds, and the number of epochs behind it: 0 where there is no file.

        Raises:
            ValueError: the file is of another model, guide or optimiser, and says which part does not fit.
        """
        if not self.path.is_file():
            return 0
        state = torch.load(self.path, map_location=self.device, weights_only=True)
        try:
            for module, saved in zip(self.problem.modules, state["modules"], strict=True):
                module.load_state_dict(saved)
            with torch.no_grad():
                for p, saved in zip(self._loose, state["loose"], strict=True):
                    p.copy_(saved)
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{self.path} does not fit what is to be trained: {error}") from error
        if hasattr(self.problem.objective, "steps"):
            self.problem.objective.steps = state["steps"]
        self.columns.update(state["columns"])
        for device, generator in zip(self._devices(), state["generators"], strict=False):
            set_generator_state(device, generator.cpu())
        return state["epochs"]

    def write(self, epochs: int) -> None:
        """Replaces the file by one of this moment."""
        state: dict[str, Any] = {
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

    def _devices(self) -> list[torch.device]:
        return [torch.device("cpu")] + ([self.device] if self.device.type == "cuda" else [])
