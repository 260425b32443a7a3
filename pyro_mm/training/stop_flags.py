"""Flags that end a training early: a callback's, and that of Ctrl-C."""

from __future__ import annotations

from ..utils.processes import Processes
from .gradients import GradientSequence
from .history import History
from .interruption import Interruption


class StopFlags:
    """Flags that end a training early, on which several processes agree.

    Args:
        history: whose ``stopped`` is the flag of the callbacks.
        processes: the processes that train together.

    Attributes:
        interruption: the context in which Ctrl-C sets its flag.
    """

    def __init__(self, history: History, processes: Processes):
        self.interruption = Interruption()
        self._history = history
        self._processes = processes
        self._interruption_agreed = False

    @property
    def is_over(self) -> bool:
        """True if a callback has stopped the training, or Ctrl-C has been pressed."""
        return self._history.stopped or self.is_interrupted

    @property
    def is_interrupted(self) -> bool:
        """True if Ctrl-C has been pressed; of several processes, if all of them know."""
        return self.interruption.requested if self._processes.world == 1 else self._interruption_agreed

    def agree(self) -> None:
        """Stop, or end by an interruption, if one of several processes does."""
        if self._processes.world > 1:
            flags = self._processes.gather((self._history.stopped, self.interruption.requested))
            self._history.stopped = any(stopped for stopped, _ in flags)
            self._interruption_agreed = any(requested for _, requested in flags)

    def exchange_with_gradients(self, sequence: GradientSequence) -> None:
        """Take the flags that came with the gradients of this step, and send this process's own with the next one's."""
        if self._processes.world > 1:
            stops = self._history.stopped or sequence.votes[0]
            sequence.votes = (stops, self.interruption.requested)
            self._history.stopped, self._interruption_agreed = sequence.agreed
