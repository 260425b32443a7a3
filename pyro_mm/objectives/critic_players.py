"""Critics and generators as further players of a training, and what is checked of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.context import TermStack
from ..batch.keywords import Covariates
from ..scoring.program import Program
from ..scoring.structure import pair_structure
from ..scoring.training_objective import Player
from ..utils.graph import graph_leaves
from ..utils.modules import preserve_buffers
from ..utils.reachable import ReachableObjects
from ..utils.seeding import temporary_seed
from .critic_losses import ClassificationLoss, Game, GeneratorLoss, Tables
from .critic_runs import Pairs, Programs
from .critics import Critic, Key, key_text

WINNING = 0.99  # accuracy of a critic that has won
# In so many epochs on end. It is usual at first against the prior, from which latents of the guide are far then.
EPOCHS_TO_WIN = {"posterior": 3, "prior": 10}
FALL = 0.002  # in accuracy over these epochs, by which the generator is catching up


def critic_players(
    owner: Any, tables: Tables, critics: Mapping[Key, Critic], model: Program, guide: Program, batch: Batch
) -> list[Player]:
    """Return the players of an objective with critics: of each modality its critic and then its generator.

    Args:
        owner: the objective.
        tables: as in the losses.
        critics: modality, or modalities, -> critic.
        model, guide: the pair.
        batch: a few rows.

    Raises:
        ValueError: a modality that the story does not generate or no term decodes, or a generator that shares a
            parameter with what the objective trains, or one that covariates move behind the critic's back.
    """
    players: list[Player] = []
    shown = {name: True for name in batch.names if batch.holds(name)}
    complete = batch.view({n: shown.get(n, False) for n in batch.names}, TermStack({}), None, True)
    programs = Programs(model, guide, complete, pair_structure(model, guide, complete))
    devices = [batch.device] if batch.device.type == "cuda" else []
    for key, critic in critics.items():
        name = key_text(key)
        _check_scales(name, critic, {"model": model, "guide": guide})
        critic.to(batch.device)
        classification = ClassificationLoss(owner, tables, key, critic)
        generation = GeneratorLoss(owner, tables, key, critic)
        games = generation.games(complete)
        if not games:
            raise ValueError(
                f"with_critics has a critic of {name!r}, which no term of the objective decodes: the batch has "
                f"{', '.join(map(repr, batch.names))}"
            )
        with torch.enable_grad(), torch.random.fork_rng(devices=devices), preserve_buffers(model, guide):
            own: dict[int, Tensor] = {}
            if critic.form.replaces_kl:
                _check_covariates(name, generation, games[0], programs)
            for game in games:
                pairs = generation.run(game.term, programs).generate()
                critic.logits(game.term.label, pairs.x, pairs.conditions)  # makes its network
                own |= graph_leaves([pairs.x])
            theirs = graph_leaves([owner.evaluate(model, guide, complete, step=0).total])
        shared = [_parameter_name(p, {"model": model, "guide": guide}) for key, p in own.items() if key in theirs]
        if shared:
            raise ValueError(
                f"the generator of {name!r} shares {', '.join(shared[:5])} with what the objective trains by the other "
                "terms, and one of the two updates would undo the other: give it networks and parents of its own"
            )
        parameters = list(critic.parameters())
        players.append(
            Player(f"critic {name}", classification, parameters, critic.optimizer, critic.every, _winning(name, critic))
        )
        generator = [p for p in own.values() if p.requires_grad]
        if generator:
            players.append(Player(f"generator {name}", generation, generator, critic.generator_optimizer))
    return players


def _check_scales(name: str, critic: Critic, programs: Mapping[str, Any]) -> None:
    """Raise a ValueError for a conditional whose scale may fall below that which a critic asks for."""
    if not critic.least_scale:
        return
    for path, module in ReachableObjects(programs).modules.items():
        for inner, conditional in module.named_modules():
            least = getattr(conditional, "least_scale", None)
            if least is not None and least < critic.least_scale and conditional is not critic:
                raise ValueError(
                    f"the critic of {name!r} against the prior has least_scale={critic.least_scale:g}, and the scale "
                    f"of {'.'.join(filter(None, (path, inner)))} may fall to {least:g}: give this "
                    f"{type(conditional).__name__} least_scale={critic.least_scale:g}, or the critic 0"
                )


def _check_covariates(name: str, generation: GeneratorLoss, game: Game, programs: Programs) -> None:
    """Raise a ValueError if covariates move latents or values, of which a critic against the prior is shown nothing.

    They do if the same noise gives other draws once each row has the covariates of the next one.
    """
    batch = programs.batch
    if not batch.covariates:
        return
    others = batch.with_context()
    others.covariates = Covariates({each: x.roll(1, 0) for each, x in batch.covariates.items()})
    drawn: list[Pairs] = []
    for rows in (batch, others):
        with temporary_seed(0, batch.device):
            drawn.append(generation.run(game.term, replace(programs, batch=rows)).generate())
    if not (torch.equal(drawn[0].x, drawn[1].x) and torch.equal(drawn[0].conditions, drawn[1].conditions)):
        raise ValueError(
            f"in this story latents or values of {name} depend on covariates ({', '.join(batch.covariates)}), and a "
            "critic against the prior is shown latents alone: let it stand against the posterior, with the covariates "
            "as a parent of the modality"
        )


def _parameter_name(p: Tensor, programs: Mapping[str, Any]) -> str:
    for path, module in ReachableObjects(programs).modules.items():
        for name, parameter in module.named_parameters():
            if parameter is p:
                return f"{path}.{name}"
    return f"a tensor of shape {tuple(p.shape)}"


def _winning(name: str, critic: Critic) -> Callable[[Mapping[str, float]], str | None]:
    """Return a function that says of an epoch's entry if the critic has won outright, epochs on end."""
    accuracies: list[float] = []
    needed = EPOCHS_TO_WIN[critic.against]

    def diagnose(entry: Mapping[str, float]) -> str | None:
        accuracies.append(entry.get(f"critic {name} accuracy", math.nan))
        if not accuracies[-1] > WINNING:
            accuracies.clear()
        latest = accuracies[-needed:]
        if len(latest) < needed or latest[-1] < latest[0] - FALL:
            return None
        return (
            f"the critic of {name!r} has won: for {len(accuracies)} epochs it has told {100 * latest[-1]:.1f} % of "
            "values of the data and generated ones apart, and no less of late, so that its logit is no estimate of a "
            f"ratio, and the generator learns little. Give it a penalty ({critic.penalty:g} now), a smaller rate or "
            "every=2, or the generator a larger one"
        )

    return diagnose
