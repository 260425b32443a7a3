"""The optimiser and the schedule of step sizes of a training."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ..utils.global_state import preserve_process_settings
from .arguments import check_optimizer, check_schedule
from .history import History
from .problem import TrainingError

MAX_LISTED = 5  # names in a message


def make_optimizer(
    factory: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None,
    parameters: Sequence[Tensor],
    required: Sequence[Tensor],
    names: dict[int, str],
    player: str = "",
    of_players: Collection[int] = (),
) -> torch.optim.Optimizer:
    """Return the optimiser of some parameters.

    Args:
        factory: parameters -> optimiser; None for Adam with a step size of 0.001.
        parameters: what it is called with.
        required: the parameters that it has to have.
        names: identity of a parameter -> its name in messages.
        player: name of the player whose optimiser it is; empty for that of the training.
        of_players: identities of the parameters that further players move, which it must not have.

    Raises:
        TypeError: no optimiser of torch.
        TrainingError: one that lacks a parameter, has one twice, or has one of a further player.
    """
    with preserve_process_settings():  # a process's first optimiser imports torch's compiler
        optimizer = check_optimizer((_adam if factory is None else factory)(list(parameters)))
    _check_complete(optimizer, required, names, f" of the player {player!r}" if player else "")
    of_others = [names[id(p)] for group in optimizer.param_groups for p in group["params"] if id(p) in of_players]
    if of_others:
        raise TrainingError(
            f"the optimiser has parameters that a further player moves: {', '.join(of_others[:MAX_LISTED])}. Give it "
            "those that its function is called with, and no others"
        )
    return optimizer


def _adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    parameters = list(parameters)
    return torch.optim.Adam(parameters, 1e-3, fused=all(p.is_floating_point() for p in parameters))


def _check_complete(
    optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], names: dict[int, str], whose: str
) -> None:
    """Raise a TrainingError unless the optimiser has every parameter, once.

    Args:
        optimizer: the optimiser.
        parameters: the parameters.
        names: identity of a parameter -> its name in messages.
        whose: words that follow "the optimiser".
    """
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    known = set(given)
    if len(given) > len(known):
        twice = dict.fromkeys(names.get(key, "a tensor of no module here") for key in given if given.count(key) > 1)
        raise TrainingError(
            f"the optimiser{whose} has {len(given) - len(known)} parameters more than once, and would move them as "
            f"often at every step: {', '.join(list(twice)[:MAX_LISTED])}. Give it each once"
        )
    missing = [names[id(p)] for p in parameters if id(p) not in known]
    if missing:
        more = f" and {len(missing) - MAX_LISTED} more" if len(missing) > MAX_LISTED else ""
        raise TrainingError(
            f"the optimiser{whose} leaves out {len(missing)} of {len(parameters)} parameters: "
            f"{', '.join(missing[:MAX_LISTED])}{more}. Give it all that its function is called with, and freeze with "
            "requires_grad_(False) what is not to be trained"
        )


class Schedule:
    """Step sizes that move on after every epoch, or every step, by one of ``torch.optim.lr_scheduler``.

    Args:
        schedulers: a schedule for each optimiser; none leaves step sizes as they are.
        history: of the training, whose losses a schedule that waits for a plateau sees.
        by_step: True moves on after every step of the optimisers.
    """

    def __init__(self, schedulers: Sequence[LRScheduler], history: History, by_step: bool = False):
        self.schedulers = list(schedulers)
        self._history = history
        self._by_step = by_step

    @classmethod
    def of(
        cls,
        factory: Callable[[torch.optim.Optimizer], LRScheduler] | None,
        optimizers: Sequence[torch.optim.Optimizer],
        history: History,
        by_step: bool = False,
    ) -> Schedule:
        """Return the schedules that a user's function makes of some optimisers, one for each.

        Raises:
            TypeError: it makes something else.
            ValueError: one that waits for a plateau of a loss, for every step.
        """
        if factory is None:
            return cls([], history)
        schedulers = [check_schedule(factory(optimizer)) for optimizer in optimizers]
        if by_step and any(isinstance(scheduler, ReduceLROnPlateau) for scheduler in schedulers):
            raise ValueError(
                "ReduceLROnPlateau waits for the loss of an epoch, and scheduler_interval is 'step': leave it out"
            )
        return cls(schedulers, history, by_step)

    def after_step(self) -> None:
        """Move on after a step of the optimisers."""
        if self._by_step:
            for scheduler in self.schedulers:
                scheduler.step()

    def after_epoch(self, epoch: int) -> None:
        """Move on after an epoch, counted from 0."""
        if self._by_step:
            return
        for scheduler in self.schedulers:
            if isinstance(scheduler, ReduceLROnPlateau):
                columns = self._history.columns
                scheduler.step(columns.get("validation", columns["loss"])[epoch])
            else:
                scheduler.step()

    def skip(self, epochs: int, steps: int) -> None:
        """Move on after the epochs of an earlier run, and its steps of the optimiser."""
        with warnings.catch_warnings():
            # the steps that came before were another process's
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
            for epoch in range(epochs):
                self.after_epoch(epoch)
            for _ in range(steps):
                self.after_step()
