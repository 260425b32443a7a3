"""The choice of an epoch by a score on validation rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..recipes import Recipe
from ..utils.tensor_files import load_tensors, save_tensors
from .trainings import append_epoch, checkpoint_path

WHAT = "the weights of a best epoch"


class BestEpoch:
    """A callback of ``fit`` that scores each epoch and holds the weights of the best one, in a file.

    Of equal scores the last counts. Scores are in ``validation-<seed>.csv`` too. A training that goes on from its
    checkpoint goes on from this file as well; where there is no checkpoint, what an earlier training left is removed.

    Args:
        run: the recipe in training.
        score: returns the score of its present weights, the larger the better.
        folder: the folder of the training.
        seed: the seed of the training.
        then: the callback that follows.
    """

    def __init__(
        self,
        run: Recipe,
        score: Callable[[], float],
        folder: Path,
        seed: int,
        then: Callable[[int, dict[str, float]], None],
    ) -> None:
        self.run = run
        self.score = score
        self.weights = folder / f"best-{seed}.pt"
        self.scores = folder / f"validation-{seed}.csv"
        self.then = then
        folder.mkdir(parents=True, exist_ok=True)
        if not checkpoint_path(folder, seed).is_file():
            self.weights.unlink(missing_ok=True)
            self.scores.unlink(missing_ok=True)

    def __call__(self, epoch: int, entry: dict[str, float]) -> None:
        score = self.score()
        append_epoch(self.scores, {"epoch": epoch, "score": score})
        best = self._load()["score"] if self.weights.is_file() else -math.inf
        if score >= best:
            modules: Any = {"model": self.run.model, "guide": self.run.guide}
            state = {name: module.state_dict() for name, module in modules.items()}
            save_tensors(self.weights, {**state, "epoch": epoch, "score": score})
        self.then(epoch, entry)

    def restore(self) -> int:
        """Load the weights of the best epoch into the recipe and return its number.

        Raises:
            ValueError: no epoch was scored.
        """
        if not self.weights.is_file():
            raise ValueError(
                f"{self.weights} is missing, though the training has ended: remove its checkpoint in "
                f"{self.weights.parent} to train again"
            )
        state = self._load()
        modules: Any = {"model": self.run.model, "guide": self.run.guide}
        for name, module in modules.items():
            module.load_state_dict(state[name])
            module.eval()
        return int(state["epoch"])

    def _load(self) -> Mapping[str, Any]:
        """Return the content of the file."""
        found: Mapping[str, Any] = load_tensors(self.weights, WHAT)
        return found
