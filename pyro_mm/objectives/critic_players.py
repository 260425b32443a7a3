"""The updates of critics and generators, as further players of a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..batch.context import TermStack
from ..batch.masks import all_of
from ..distributions.pushforward import Pushforward
from ..scoring.importance import propose, run_model
from ..scoring.reduction import SiteReducer
from ..scoring.structure import Callback, PairStructure, observed_sites, pair_structure
from ..scoring.term_pair import TermPair
from ..scoring.training_objective import Loss, Player, PreparedObjective
from ..utils.graph import graph_leaves
from ..utils.modules import preserve_buffers
from ..utils.reachable import ReachableObjects
from .concrete_terms import ConcreteTerm
from .critic_terms import RatioDensity, assign_critics, implicit_distribution, latents_of
from .critics import Critic
from .expansion import expand
from .stacked_views import stack_views
from .terms import Term

Tables = Sequence[tuple[Callable[[tuple[str, ...]], Sequence[Term]], Mapping[str, Critic]]]
WINNING = 0.99  # accuracy of a critic that has won
EPOCHS_TO_WIN = 3  # in so many epochs one after the other


@dataclass(frozen=True)
class Pairs:
    """Values of a modality and what its critic is shown beside them.

    Attributes:
        x: values ``(N, *event)``.
        conditions: parents or latents ``(N, F)``.
    """

    x: Tensor
    conditions: Tensor

    def as_leaves(self) -> Pairs:
        """Return the same pairs, to be differentiated by."""
        return Pairs(*(value.detach().clone().requires_grad_() for value in (self.x, self.conditions)))


@dataclass(frozen=True)
class TermRun:
    """A run of guide and model for a term, as a critic of a modality sees it.

    Attributes:
        observed: the values of the rows, and what the critic is shown beside them.
        distribution: of generated values given the same latents.
        rows: the rows that count, boolean ``(N,)``.
        factor: size of the data plate over that of its subsample.
    """

    observed: Pairs
    distribution: Pushforward
    rows: Tensor
    factor: float

    def generate(self) -> Pairs:
        """Return generated values with the latents that they are generated from."""
        return Pairs(self.distribution.rsample(), self.observed.conditions)


@dataclass(frozen=True)
class Programs:
    """A pair and a batch that losses of critics run on.

    Attributes:
        model, guide: the pair.
        batch: N rows.
        structure: structure of the pair on them.
    """

    model: Callback
    guide: Callback
    batch: Batch
    structure: PairStructure

    def run(self, critic: Critic, name: str, term: ConcreteTerm, from_prior: bool = False) -> TermRun:
        """Run guide and model for a term.

        Args:
            critic: the modality's.
            name: the modality.
            term: the term.
            from_prior: True for latents of the prior; False for those of the guide, held constant.
        """
        batch = self.batch
        decode = term.decode
        if not self.structure.chained:  # else what it is given has to be observed
            decode = {n: mask if n == name else False for n, mask in decode.items()}
        encode_prior = from_prior or term.encode_prior
        alone = replace(term, decode=decode, encode_prior=encode_prior, frozen_encoder=not from_prior)
        pair = TermPair(self.model, self.guide, stack_views([alone], batch, self.structure, {}))
        propose(pair, self.structure)
        site = observed_sites(run_model(pair, self.structure))[name]
        d = implicit_distribution(name, site)
        conditions = latents_of(pair.trace) if critic.form.replaces_kl else d.parents

        reducer = SiteReducer(pair)
        reducer.scale(site)
        counts = all_of([batch.rows, term.counts, term.decode[name]])
        rows = counts
        if not isinstance(counts, Tensor):
            rows = torch.full((batch.size,), counts, device=conditions.device)
        observed = Pairs(site["value"], conditions.expand(batch.size, -1))
        return TermRun(observed, d, rows, reducer.factor)  # type: ignore[arg-type]


def next_row(rows: Tensor) -> Tensor:
    """Return for each row that counts another one that does, cyclically, as indices ``(N,)``.

    Args:
        rows: boolean ``(N,)``.
    """
    order = torch.argsort((~rows).to(torch.uint8), stable=True)  # those that count come first
    rank = torch.argsort(order)
    return order[torch.remainder(rank + 1, rows.sum().clamp(min=1))]


class _CriticLoss(PreparedObjective):
    """A loss of pairs of a modality, summed over the terms of a table that decode it.

    Args:
        owner: the objective.
        tables: of its parts, functions from names to terms, with the critics of each.
        name: the modality.
        critic: its critic.
    """

    ignores_padding = True

    def __init__(self, owner: PreparedObjective, tables: Tables, name: str, critic: Critic):
        self.owner = owner
        self.tables = tables
        self.name = name
        self.critic = critic

    @property
    def estimator_name(self) -> str:
        return f"the critic of {self.name}"

    @property
    def modules(self) -> list[nn.Module]:
        return self.owner.modules

    def terms(self, batch: Batch) -> list[ConcreteTerm]:
        """Return the concrete terms that decode the modality, one for each label."""
        found: dict[str, ConcreteTerm] = {}
        for table, critics in self.tables:
            for term in assign_critics(expand(table(batch.names), batch), critics):
                if isinstance(term.kind, RatioDensity) and term.kind.critics.get(self.name) is self.critic:
                    found.setdefault(term.label, term)
        return list(found.values())

    def evaluate(self, model: Callback, guide: Callback, batch: Batch, *, step: int | Tensor) -> Loss:
        programs = Programs(model, guide, batch, pair_structure(model, guide, batch))
        parts = [self.part(term, programs) for term in self.terms(batch)]
        if not parts:
            return Loss(torch.zeros((), device=batch.device), {})
        total = sum((part.total for part in parts[1:]), parts[0].total)
        by_term: dict[str, Tensor] = {}
        for part in parts:
            for label, value in part.by_term.items():
                by_term[label] = by_term.get(label, 0.0) + value / len(parts)
        return Loss(total / len(parts), by_term)

    def part(self, term: ConcreteTerm, programs: Programs) -> Loss:
        """Return the loss of a term, summed over rows."""
        raise NotImplementedError


class ClassificationLoss(_CriticLoss):
    """Cross-entropy of a critic, with guide, model and generator held constant."""

    def part(self, term: ConcreteTerm, programs: Programs) -> Loss:
        critic, form = self.critic, self.critic.form
        with torch.no_grad():
            run = programs.run(critic, self.name, term)
            drawn_from = programs.run(critic, self.name, term, from_prior=True) if form.fakes_from_prior else run
            joint, fake = run.observed, drawn_from.generate()
        if critic.penalty:
            joint, fake = joint.as_leaves(), fake.as_leaves()

        def logits(pairs: Pairs) -> Tensor:
            return critic.logits(term.label, pairs.x, pairs.conditions, run.distribution.event_dim)

        rows = run.rows
        of_joint, of_fake, of_other = logits(joint), logits(fake), None
        if form.has_other:
            of_other = logits(Pairs(joint.x[next_row(rows)], joint.conditions))
            rows = rows & (rows.sum() > 1)
        loss = form.loss(of_joint, of_fake, of_other)
        if critic.penalty:
            slopes = [_squared_slope(form.realness(of_joint), joint), _squared_slope(form.realness(of_fake), fake)]
            loss = loss + critic.penalty / 2 * (slopes[0] + slopes[1])

        is_right = (form.realness(of_joint) > 0).to(loss.dtype) + (form.realness(of_fake) < 0).to(loss.dtype)
        share = _sum_rows(is_right.detach() / 2, rows) / rows.sum().clamp(min=1)  # of the rows that count
        shown = programs.batch.rows
        size = shown.sum() if isinstance(shown, Tensor) else programs.batch.size
        accuracy = share * size * run.factor
        return Loss(_sum_rows(loss, rows) * run.factor, {"accuracy": accuracy})


class GeneratorLoss(_CriticLoss):
    """Loss of a generator on its own draws, with guide and critic held constant."""

    def part(self, term: ConcreteTerm, programs: Programs) -> Loss:
        critic = self.critic
        run = self.run(term, programs)
        fake = run.generate()
        logits = critic.logits(term.label, fake.x, fake.conditions, run.distribution.event_dim, frozen=True)
        loss = critic.fooling_loss(critic.form.realness(logits))
        return Loss(_sum_rows(loss, run.rows) * run.factor, {})

    def run(self, term: ConcreteTerm, programs: Programs) -> TermRun:
        """Run guide, or prior, and model for a term."""
        return programs.run(self.critic, self.name, term, from_prior=self.critic.form.fakes_from_prior)


def _sum_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Return the sum of values over the rows that count."""
    return torch.where(rows, values, torch.zeros_like(values)).sum()


def _squared_slope(realness: Tensor, pairs: Pairs) -> Tensor:
    """Return the squared norm of the gradient of the logit by the pair, ``(N,)``."""
    slopes = torch.autograd.grad(realness.sum(), [pairs.x, pairs.conditions], create_graph=True)
    return slopes[0].flatten(1).square().sum(-1) + slopes[1].flatten(1).square().sum(-1)


def critic_players(
    owner: Any, tables: Tables, critics: Mapping[str, Critic], model: Callback, guide: Callback, batch: Batch
) -> list[Player]:
    """Return the players of an objective with critics: of each modality its critic and then its generator.

    Args:
        owner: the objective.
        tables: as in the losses.
        critics: modality -> critic.
        model, guide: the pair.
        batch: a few rows.

    Raises:
        ValueError: a modality that the story does not generate or no term decodes, or a generator that shares a
            parameter with what the objective trains.
    """
    players: list[Player] = []
    shown = {name: True for name in batch.names if batch.holds(name)}
    complete = batch.view({n: shown.get(n, False) for n in batch.names}, TermStack({}), None, True)
    programs = Programs(model, guide, complete, pair_structure(model, guide, complete))
    devices = [batch.device] if batch.device.type == "cuda" else []
    for name, critic in critics.items():
        critic.to(batch.device)
        classification = ClassificationLoss(owner, tables, name, critic)
        generation = GeneratorLoss(owner, tables, name, critic)
        terms = generation.terms(complete)
        if not terms:
            raise ValueError(
                f"with_critics has a critic of {name!r}, which no term of the objective decodes: the batch has "
                f"{', '.join(map(repr, batch.names))}"
            )
        with torch.enable_grad(), torch.random.fork_rng(devices=devices), preserve_buffers(model, guide):
            own: dict[int, Tensor] = {}
            for term in terms:
                run = generation.run(term, programs)
                pairs = run.generate()
                critic.logits(term.label, pairs.x, pairs.conditions, run.distribution.event_dim)  # makes its network
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


def _parameter_name(p: Tensor, programs: Mapping[str, Any]) -> str:
    for path, module in ReachableObjects(programs).modules.items():
        for name, parameter in module.named_parameters():
            if parameter is p:
                return f"{path}.{name}"
    return f"a tensor of shape {tuple(p.shape)}"


def _winning(name: str, critic: Critic) -> Callable[[Mapping[str, float]], str | None]:
    """Return a function that says of an epoch's entry if the critic has won outright, epochs on end."""
    epochs = 0

    def diagnose(entry: Mapping[str, float]) -> str | None:
        nonlocal epochs
        accuracy = entry.get(f"critic {name} accuracy", math.nan)
        epochs = epochs + 1 if accuracy > WINNING else 0
        if epochs < EPOCHS_TO_WIN:
            return None
        return (
            f"the critic of {name!r} has won: for {epochs} epochs it has told {100 * accuracy:.1f} % of values of "
            "the data and generated ones apart, so that its logit is no estimate of a ratio, and the generator learns "
            "little. "
            f"Give it a penalty ({critic.penalty:g} now), a smaller rate or every=2, or the generator a larger one"
        )

    return diagnose
