"""The callbacks of one training: when each is called, and their part of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..utils.arguments import describe
from .callbacks import Callback, Training

METHODS = ("on_start", "on_step", "on_epoch", "before_evaluation", "after_evaluation", "on_end", "on_error")


def check_callbacks(callbacks: Any) -> tuple[Any, ...]:
    """Return callbacks as a tuple.

    Raises:
        TypeError: something else than objects with a method of a callback.
    """
    wanted = "expected callbacks to be a list of objects with on_epoch(training) or on_step(training)"
    if isinstance(callbacks, str | Mapping) or not isinstance(callbacks, Iterable):
        raise TypeError(f"{wanted}, got {describe(callbacks)}")
    found = tuple(callbacks)
    for each in found:
        if isinstance(each, type):
            raise TypeError(f"{wanted}, got the class {each.__name__} among them: make an object, {each.__name__}()")
        if not any(callable(getattr(each, method, None)) for method in METHODS):
            hint = ": pass a function of (epoch, entry) as callback=" if callable(each) else ""
            raise TypeError(f"{wanted}, got {describe(each)} among them{hint}")
    return found


class CallbackList:
    """The callbacks of a training, called in their order.

    Args:
        callbacks: objects with some of the methods of :class:`~pyro_mm.training.callbacks.Callback`.
        training: the state that they are shown.
    """

    def __init__(self, callbacks: Iterable[Any], training: Training):
        self.training = training
        self._callbacks = list(callbacks)
        self._methods = {
            method: [getattr(each, method) for each in self._callbacks if callable(getattr(each, method, None))]
            for method in METHODS
        }
        # an empty method would cost a call at every step
        steps = self._methods["on_step"]
        self._methods["on_step"] = [f for f in steps if getattr(f, "__func__", None) is not Callback.on_step]

    @property
    def watches_steps(self) -> bool:
        """True if some callback acts after every step."""
        return bool(self._methods["on_step"])

    def start(self) -> None:
        """Call them before the first step."""
        self._call("on_start")

    def after_step(self) -> bool:
        """Call them after a step; return True if one of them stops the training."""
        return self._call("on_step")

    def after_epoch(self) -> bool:
        """Call them after an epoch; return True if one of them stops the training."""
        return self._call("on_epoch")

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Evaluate with the weights that callbacks put in place, such as averages."""
        self._call("before_evaluation")
        try:
            yield
        finally:
            self._call("after_evaluation")

    def end(self) -> None:
        """Call them at the end, and leave the weights that they put in place."""
        self._call("before_evaluation")
        self._call("on_end")

    def fail(self, error: BaseException) -> None:
        """Call them when an error ends the training; their own errors are notes of that one."""
        for call in self._methods["on_error"]:
            try:
                call(self.training, error)
            except Exception as own:
                error.add_note(f"and a callback failed at the end: {type(own).__name__}: {own}")

    def _call(self, method: str) -> bool:
        answers = [call(self.training) for call in self._methods[method]]
        return any(answer is True for answer in answers)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    @property
    def kinds(self) -> list[str]:
        """Class names of the callbacks that have a state."""
        return [type(each).__name__ for each in self._with_state()]

    def state(self) -> list[dict[str, Any]]:
        """Return the state of every callback that has one."""
        return [each.state_dict() for each in self._with_state()]

    def describe_mismatch(self, states: Any) -> str:
        """Return, in words, a difference for which saved states cannot be loaded; empty if there is none."""
        holders = self._with_state()
        if not isinstance(states, list) or len(states) != len(holders):
            return "its callbacks have no states"
        for each, state in zip(holders, states, strict=True):
            if not isinstance(state, dict) or state.keys() != each.state_dict().keys():
                return f"the state of its callback {type(each).__name__} has other entries"
            text = each.check_state(state) if hasattr(each, "check_state") else ""
            if text:
                return f"the state of its callback {type(each).__name__} is of other weights: {text}"
        return ""

    def load(self, states: list[dict[str, Any]]) -> None:
        """Load saved states."""
        for each, state in zip(self._with_state(), states, strict=True):
            each.load_state_dict(state)

    def _with_state(self) -> list[Any]:
        return [each for each in self._callbacks if hasattr(each, "state_dict") and hasattr(each, "load_state_dict")]
