"""A step replayed as a CUDA graph, the optimiser inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

WARM = 3  # steps on a side stream before the capture, as torch's notes on CUDA graphs ask for


class CUDAGraphStep:
    """Takes the first steps as they are, then captures one and replays it.

    Inputs are copied to fixed places; the gradients lie in the graph's own memory and are overwritten by the next step.
    Draws follow torch's CUDA generator, step by step.
    """

    def __init__(self, step: Any):
        self.step, self.count = step, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.fixed: list[Any] = []
        self.result: Any = None

    def __call__(self, inputs: list[Tensor]) -> Any:
        if self.count < WARM:
            self.count += 1
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                result = self.step(inputs)
            torch.cuda.current_stream().wait_stream(side)
            return result
        if self.graph is None or self.fixed != self._fixed():  # a parameter moved, or a learning rate: capture anew
            self.inputs = [x.clone() for x in inputs]
            self.graph, self.fixed = torch.cuda.CUDAGraph(), self._fixed()
            # thread_local: a loader's thread that pins memory is none of this capture's business
            with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                self.result = self.step(self.inputs)
        for here, x in zip(self.inputs, inputs, strict=True):
            here.copy_(x, non_blocking=True)
        self.graph.replay()
        self.step.hand_over()
        loss, terms = self.result
        return loss.clone(), tuple(term.clone() for term in terms)

    def _fixed(self) -> list[Any]:
        """What a capture holds for good: where tensors are, and the optimiser's settings."""
        groups = [] if self.step.optimizer is None else self.step.optimizer.param_groups
        settings = [v for group in groups for v in group.values() if isinstance(v, bool | int | float | tuple)]
        return [*(x.data_ptr() for x in self.step.held), *settings]


def capturable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimiser's step can be captured, made so where it is a matter of a setting.

    One with neither a ``capturable`` setting nor plain arithmetic, as SGD's, cannot, nor can one that has taken steps
    without that setting: it is stepped after the replay.
    """
    if type(optimizer) is torch.optim.SGD:
        return True
    if not all("capturable" in group for group in optimizer.param_groups) or optimizer.state:
        return all(group.get("capturable", False) for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["capturable"] = True
    return True
