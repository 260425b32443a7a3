"""The further players of a training: their checks, their training problems, and their warnings."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..scoring.prepare_objective import prepare_objective
from ..scoring.program import Program
from ..scoring.training_objective import Player, PreparedObjective
from ..utils.arguments import check_integer, describe
from .arguments import check_optimizer_factory
from .optimization import make_optimizer
from .parameter_names import parameter_names
from .problem import TrainingError, TrainingProblem
from .step import Update

RESERVED = ("loss", "validation")


def players_of(objective: PreparedObjective, model: Program, guide: Program, batch: Batch) -> list[Player]:
    """Return the further players that an objective brings, after checking them.

    Args:
        objective, model, guide: the training.
        batch: a few rows.

    Raises:
        TypeError, ValueError: a player that is not as :class:`Player` says.
        TrainingError: a player that moves nothing, or what another one moves.
    """
    players = list(objective.players(model, guide, batch))
    owner: dict[int, str] = {}
    names: set[str] = set()
    for player in players:
        if not isinstance(player, Player):
            raise TypeError(f"expected players to be pyro_mm.Player objects, got {describe(player)}")
        if not isinstance(player.name, str) or not player.name or player.name in (*RESERVED, *names):
            raise ValueError(f"expected each player to have a name of its own, and not {player.name!r}")
        names.add(player.name)
        check_integer(f"every of the player {player.name!r}", player.every, least=1)
        check_optimizer_factory(player.optimizer)
        _check_parameters(player, owner)
    return players


def _check_parameters(player: Player, owner: dict[int, str]) -> None:
    """Raise a TrainingError unless a player moves something, and nothing of the players before it, by their names."""
    trainable = [p for p in player.parameters if p.requires_grad]
    if not trainable:
        raise TrainingError(
            f"the player {player.name!r} has nothing to train: none of its {len(player.parameters)} parameters "
            "requires a gradient. Unfreeze one by requires_grad_(), or leave the player out"
        )
    for p in trainable:
        if id(p) in owner:
            raise TrainingError(
                f"the players {owner[id(p)]!r} and {player.name!r} both move a tensor of shape {tuple(p.shape)}: give "
                "each networks of its own"
            )
        owner[id(p)] = player.name


def player_updates(
    players: Sequence[Player],
    problem: TrainingProblem,
    factory: Callable[[Iterable[Tensor]], torch.optim.Optimizer] | None,
) -> tuple[list[Update], dict[int, str]]:
    """Return the updates of players, and the names of their parameters by identity.

    Args:
        players: as :func:`players_of` returns them.
        problem: the training problem of model, guide and objective.
        factory: parameters -> optimiser, for players without one of their own; None for the default.
    """
    updates = []
    names: dict[int, str] = {}
    for player in players:
        own = [p for p in player.parameters if p.requires_grad]
        theirs = TrainingProblem(
            prepare_objective(player.loss),
            problem.model,
            problem.guide,
            leaves={id(p): p for p in own},
            scales_to_data=problem.scales_to_data,
            all_in_plate=problem.all_in_plate,
            discrete_sites=problem.discrete_sites,
            autocast=problem.autocast,
        )
        names = parameter_names(theirs) | names
        optimizer = make_optimizer(player.optimizer or factory, own, own, names, player.name)
        updates.append(Update(theirs, own, optimizer, player.every, name=player.name))
    return updates, names


def warn_of_players(players: Iterable[Player], entry: Mapping[str, float], warned: set[str]) -> None:
    """Warn of players that say that something is wrong, of each once.

    Args:
        players: the players.
        entry: an epoch's entry of the history.
        warned: names of the players that have been warned of, to which others are added.
    """
    for player in players:
        if player.diagnose is None or player.name in warned or not math.isfinite(entry.get(player.name, math.nan)):
            continue
        if text := player.diagnose(entry):
            warned.add(player.name)
            warnings.warn(text, stacklevel=4)


def check_every(updates: Iterable[Any], accumulate: int) -> None:
    """Raise a ValueError for a player that is not due at every step of a training that accumulates gradients."""
    for update in updates:
        if update.every > 1 and accumulate > 1:
            raise ValueError(
                f"the player {update.name!r} is due at every {update.every} steps, and accumulate={accumulate} makes "
                "one step of the optimisers out of several minibatches: leave out one of the two"
            )
