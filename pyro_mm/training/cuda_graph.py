"""A step replayed as a CUDA graph, the optimiser inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARMUP_STEPS = 3  # steps on a side stream before the capture, as torch's notes on CUDA graphs ask for


class CUDAGraphStep:
    """Runs the first steps eagerly, then captures one as a CUDA graph and replays it.

    Inputs are copied to fixed places; the gradients lie in the graph's own memory and are overwritten by the next step.
    Draws follow torch's CUDA generator, step by step.

    Args:
        step: a :class:`~pyro_mm.training.compile.GraphStep`.
        report: called with a sentence if the step cannot be captured, which then runs uncaptured; None raises.
    """

    def __init__(self, step: Any, report: Callable[[str], object] | None = None):
        self.step = step
        self.report = report
        self.is_capturable = True
        self.graph: torch.cuda.CUDAGraph | None = None
        self._warmups = 0
        self.inputs: list[Tensor] = []
        self._constants: list[Any] = []
        self.result: Any = None

    def __call__(self, inputs: list[Tensor]) -> Any:
        """Take a step; return the loss and the value of each term."""
        if not self.is_capturable:
            return self.step(inputs)
        if self._warmups < WARMUP_STEPS:
            self._warmups += 1
            return self._warm_up(inputs)
        if self.graph is None or self._constants != self._find_constants():
            try:
                self._capture(inputs)
            except (RuntimeError, AssertionError) as error:
                if self.report is None:
                    raise
                return self._give_up(inputs, error, self.report)
        for place, x in zip(self.inputs, inputs, strict=True):
            place.copy_(x, non_blocking=True)
        self.graph.replay()  # type: ignore[union-attr]
        self.step.assign_gradients()
        loss, terms = self.result
        return loss.clone(), tuple(term.clone() for term in terms)

    def _warm_up(self, inputs: list[Tensor]) -> Any:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            result = self.step(inputs)
        torch.cuda.current_stream().wait_stream(side)
        return result

    def _capture(self, inputs: list[Tensor]) -> None:
        self.inputs = [x.clone() for x in inputs]
        self.graph = torch.cuda.CUDAGraph()
        self._constants = self._find_constants()
        # thread_local: a loader's thread that pins memory is none of this capture's business
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.result = self.step(self.inputs)

    def _give_up(self, inputs: list[Tensor], error: Exception, report: Callable[[str], object]) -> Any:
        """Take this step and all others uncaptured, after a capture that failed and took none."""
        self.is_capturable = False
        self.graph = None
        self.inputs = []
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
            pass  # torch's generator counts its draws as those of a capture until one has ended well
        text = (str(error).splitlines() or [type(error).__name__])[0]
        report(f"the step is not captured as a CUDA graph, and runs as it was compiled: {text}")
        return self.step(inputs)

    def _find_constants(self) -> list[Any]:
        """Return the constants of a capture: the addresses of tensors, and the optimiser's settings."""
        optimizer = self.step.update.optimizer if self.step.optimizes else None
        groups = [] if optimizer is None else optimizer.param_groups
        settings = [v for group in groups for v in group.values() if isinstance(v, bool | int | float | tuple)]
        return [*(x.data_ptr() for x in self.step.parameters_and_buffers), *settings]


def can_capture(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if an optimiser's step can be captured; set its option ``capturable`` if it needs that.

    An optimiser with neither that setting nor plain arithmetic, as SGD has, cannot be captured, nor can one that has
    taken steps without the setting: it is stepped after the replay.
    """
    if type(optimizer) is torch.optim.SGD:
        return True
    if not all("capturable" in group for group in optimizer.param_groups) or optimizer.state:
        return all(group.get("capturable", False) for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        group["capturable"] = True
    return True
