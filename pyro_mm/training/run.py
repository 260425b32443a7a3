"""A training that is ready for its steps: its parts, and the place that it has reached."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..scoring.audit.training import TrainingAudit
from ..scoring.training_objective import Player
from .callback_list import CallbackList
from .checkpoint import Checkpoint
from .gradients import GradientSequence
from .history import History
from .missing_gradients import MissingGradients
from .nonfinite import NonFiniteMonitor
from .optimization import Schedule
from .position import Position
from .problem import TrainingProblem
from .progress import ProgressBar
from .setting import Setting
from .stop_flags import StopFlags
from .validation import Validation


@dataclass
class Run:
    """A training that is ready for its steps.

    Attributes:
        setting: programs, rows, options, processes and device.
        history: the losses of the epochs so far.
        flags: flags that end it early.
        bar: the progress bar.
        audit: the checks of the pair, which look at the values of the first epoch.
        problem: the training problem of the objective.
        players: further players.
        sequence: takes the steps.
        callbacks: called after steps and epochs.
        schedule: moves the step sizes.
        monitor: looks for NaN and infinity.
        missing_gradients: look for parameters without gradient, one for each update.
        validation: rows for validation, if there are some.
        checkpoint: the file, if there is one.
        first_epoch: epochs behind the checkpoint that it goes on from.
        position: the place within an epoch that a checkpoint holds, or at which this run was broken off.
        warned: sentences that have been said once.
    """

    setting: Setting
    history: History
    flags: StopFlags
    bar: ProgressBar
    audit: TrainingAudit
    problem: TrainingProblem
    players: list[Player]
    sequence: GradientSequence
    callbacks: CallbackList
    schedule: Schedule
    monitor: NonFiniteMonitor
    missing_gradients: list[MissingGradients]
    validation: Validation | None = None
    checkpoint: Checkpoint | None = None
    first_epoch: int = 0
    position: Position | None = None
    warned: set[str] = field(default_factory=set)
