r"""The losses of critics and generators.

The rows and terms of a table weigh in the loss of a generator as they do in the table. With :math:`w_t` the weight of
a term, :math:`a_t` its weight of the likelihood of the modality, :math:`s_{tn}` the share of a row in it (below 1 in a
mean over sets of modalities) times the story's own scale of the site, and :math:`T_t` the log ratio of joint to fake
that the critic of the term gives,

.. math:: L_G = \sum_t w_t a_t \sum_n s_{tn} f(T_t(x_{tn}, z_{tn})), \qquad x_{tn} = g(z_{tn}, u_{tn}).

For the best critic, :math:`e^{T_t} = q_t(x, z) / (p(x | z) q_t(z))` (against the prior with p(z) in the place of
:math:`q_t(z)`), and for :math:`f = -e^T` held at fixed T the gradient of the mean is

.. math:: - \sum_t w_t a_t \int \nabla p(x | z) \, q_t(z) \, e^{T_t} \, dx \, dz
          = - \sum_t w_t a_t \, E_{q_t(x, z)} [\nabla \log p(x | z)],

which is the gradient that the table gives an explicit decoder. The non-saturating loss has the same minimum in each
term. The equation needs :math:`q_t` to be the distribution of the weighted rows, so a critic's cross-entropy is a mean
over rows with the weights :math:`s_{tn}`. The weights :math:`w_t a_t` are no part of it: each term has a network of its
own, whose best answer does not depend on them. A term of weight 0 therefore trains its critic, and not the generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..scoring.program import Program
from ..scoring.structure import pair_structure
from ..scoring.training_objective import Loss, PreparedObjective, StepWeights
from ..utils.shared_rows import gather_rows, own_rows, rows_are_shared
from .concrete_terms import ConcreteTerm
from .critic_runs import Pairs, Programs, TermRun, next_row
from .critic_terms import RatioDensity, assign_critics, likelihood_weight
from .critics import Critic, Key, key_text, names_of
from .expansion import expand
from .terms import Term, step_weight, weights_in_order

Tables = Sequence[tuple[Callable[[tuple[str, ...]], Sequence[Term]], Mapping[Key, Critic]]]
WeightAt = Callable[[Callable[[int], float], str], float | Tensor]


@dataclass(frozen=True)
class Game:
    """A critic's game: the terms of one label, which encode and decode the same modalities.

    Attributes:
        terms: the terms, with their weights.
        name: a modality of the critic.
    """

    terms: Sequence[ConcreteTerm]
    name: str

    @property
    def term(self) -> ConcreteTerm:
        return self.terms[0]

    @property
    def share(self) -> float | Tensor:
        """Sum of the terms' shares in means: a number or ``(N,)``."""
        total = self.terms[0].share
        for term in self.terms[1:]:
            total = total + term.share
        return total

    @property
    def weight(self) -> float | Tensor:
        """Weight of the log-likelihood in the table: a number, or one per row ``(N,)``.

        Raises:
            ValueError: a negative one.
        """
        total: float | Tensor = 0.0
        for term in self.terms:
            weight = term.weight * likelihood_weight(term, self.name)
            if not isinstance(weight, Tensor) and weight < 0:
                raise ValueError(
                    f"{term.label} weighs the likelihood of {self.name!r} by {weight:g}, and a generator cannot be "
                    "trained to make values less likely: give it a weight that is not negative"
                )
            total = total + weight * term.share
        return total


class CriticLoss(PreparedObjective):
    """A loss of pairs of a critic's modalities, over the terms of a table that decode them.

    Args:
        owner: the objective.
        tables: of its parts, functions from names to terms, with the critics of each.
        key: the modality, or the modalities.
        critic: its critic.
    """

    ignores_padding = True

    def __init__(self, owner: PreparedObjective, tables: Tables, key: Key, critic: Critic):
        self.owner = owner
        self.tables = tables
        self.key = key
        self.names = names_of(key)
        self.critic = critic

    @property
    def estimator_name(self) -> str:
        return f"the critic of {key_text(self.key)}"

    @property
    def modules(self) -> list[nn.Module]:
        return self.owner.modules

    def games(self, batch: Batch, weight_at: WeightAt = lambda weight, kind: 1.0) -> list[Game]:
        """Return the games of the terms that decode the modalities, one for each label.

        Args:
            batch: N rows.
            weight_at: gives the value of a weight that depends on the step.
        """
        found: dict[str, list[ConcreteTerm]] = {}
        for table, critics in self.tables:
            terms = [term.evaluated(weight_at) for term in table(batch.names)]
            for term in assign_critics(expand(terms, batch), critics):
                if isinstance(term.kind, RatioDensity) and term.kind.critics.get(self.key) is self.critic:
                    found.setdefault(term.label, []).append(term.with_weights(terms[term.place]))
        return [Game(terms, self.names[0]) for terms in found.values()]

    def evaluate(self, model: Program, guide: Program, batch: Batch, *, step: int | Tensor) -> Loss:
        games = self.games(batch, lambda weight, kind: step_weight(weight, int(step)))
        return self.of_games(games, Programs(model, guide, batch, pair_structure(model, guide, batch)))

    def of_games(self, games: Sequence[Game], programs: Programs) -> Loss:
        """Return the loss of all games, summed over rows."""
        raise NotImplementedError


class ClassificationLoss(CriticLoss):
    """Cross-entropy of a critic, the mean over its games, with guide, model and generator held constant.

    Pairs with another row, and the weights of rows, are those of one process where several share a minibatch out.
    """

    def gathers_rows(self, names: tuple[str, ...]) -> bool:
        return True

    def evaluate(self, model: Program, guide: Program, batch: Batch, *, step: int | Tensor) -> Loss:
        return self.of_games(self.games(batch), Programs(model, guide, batch, pair_structure(model, guide, batch)))

    def of_games(self, games: Sequence[Game], programs: Programs) -> Loss:
        parts = [self.part(game, programs) for game in games]
        if not parts:
            return Loss(torch.zeros((), device=programs.batch.device), {})
        total = sum((part.total for part in parts[1:]), parts[0].total)
        accuracy = sum((part.by_term["accuracy"] for part in parts[1:]), parts[0].by_term["accuracy"])
        return Loss(total / len(parts), {"accuracy": accuracy / len(parts)})

    def part(self, game: Game, programs: Programs) -> Loss:
        """Return the loss of a game, summed over rows."""
        critic, form, term = self.critic, self.critic.form, game.term
        with torch.no_grad():
            run = programs.run(critic, self.names, term)
            drawn_from = programs.run(critic, self.names, term, from_prior=True) if form.fakes_from_prior else run
            joint, fake = run.observed, drawn_from.generate()
        if critic.penalty:
            joint, fake = joint.as_leaves(), fake.as_leaves()

        def logits(pairs: Pairs) -> Tensor:
            return critic.logits(term.label, pairs.x, pairs.conditions)

        rows = run.rows
        every = gather_rows(rows, f"the critic of {term.label}")
        of_joint, of_fake, of_other = logits(joint), logits(fake), None
        if form.has_other:
            others = gather_rows(joint.x.detach(), f"the critic of {term.label}")[next_row(every)]
            of_other = logits(Pairs(own_rows(others, len(rows)), joint.conditions))
            rows, every = (flags & (every.sum() > 1) for flags in (rows, every))
        loss = form.loss(of_joint, of_fake, of_other)
        if critic.penalty:
            slopes = [_squared_slope(form.realness(of_joint), joint), _squared_slope(form.realness(of_fake), fake)]
            loss = loss + critic.penalty / 2 * (slopes[0] + slopes[1])

        is_right = (form.realness(of_joint) > 0).to(loss.dtype) + (form.realness(of_fake) < 0).to(loss.dtype)
        right = gather_rows(is_right.detach() / 2, f"the accuracy of the critic of {term.label}")
        correct = _sum_rows(right, every) / every.sum().clamp(min=1)  # share of the rows that count
        shown = programs.batch.rows
        size = shown.sum() if isinstance(shown, Tensor) else programs.batch.size
        weights = game.share * run.scale
        if rows_are_shared():  # of which some processes may know that they are equal
            weights = torch.as_tensor(weights, dtype=torch.float64, device=rows.device).expand(len(rows))
        weights = _mean_one(weights, every, f"the weights of rows in {term.label}")
        return Loss(
            _sum_rows((weights * loss).to(loss.dtype), rows) * run.factor, {"accuracy": correct * size * run.factor}
        )


class GeneratorLoss(CriticLoss):
    """Loss of generators on their own draws, weighted as the table weighs, with guide and critic held constant."""

    def step_weights(self, names: tuple[str, ...], step: int) -> StepWeights:
        return self.owner.step_weights(names, step)

    def evaluate_with_weights(
        self, weights: Tensor, fixed: Mapping[int, float], model: Program, guide: Program, batch: Batch, step: Tensor
    ) -> Loss:
        games = self.games(batch, weights_in_order(weights, fixed))
        return self.of_games(games, Programs(model, guide, batch, pair_structure(model, guide, batch)))

    def of_games(self, games: Sequence[Game], programs: Programs) -> Loss:
        total = torch.zeros((), device=programs.batch.device)
        for game in games:
            critic, run = self.critic, self.run(game.term, programs)
            fake = run.generate()
            logits = critic.logits(game.term.label, fake.x, fake.conditions, frozen=True)
            loss = critic.fooling_loss(critic.form.realness(logits))
            weights = game.weight * run.scale
            total = total + _sum_rows((weights * loss).to(loss.dtype), run.rows) * run.factor
        return Loss(total, {})

    def run(self, term: ConcreteTerm, programs: Programs) -> TermRun:
        """Run guide, or prior, and model for a term."""
        return programs.run(self.critic, self.names, term, from_prior=self.critic.form.fakes_from_prior)


def _sum_rows(values: Tensor, rows: Tensor) -> Tensor:
    """Return the sum of values over the rows that count."""
    return torch.where(rows, values, torch.zeros_like(values)).sum()


def _mean_one(weights: float | Tensor, every: Tensor, what: str) -> float | Tensor:
    """Return weights of rows divided by their mean over the rows that count; 1 for a number.

    Args:
        weights: a number, or one per row.
        every: the rows that count, of all processes that share a minibatch out.
        what: what is weighed, in words.
    """
    if not isinstance(weights, Tensor) or weights.dim() == 0:
        return 1.0
    mean = _sum_rows(gather_rows(weights.detach(), what), every) / every.sum().clamp(min=1)
    return weights / torch.where(mean > 0, mean, torch.ones_like(mean))


def _squared_slope(realness: Tensor, pairs: Pairs) -> Tensor:
    """Return the squared norm of the gradient of the logit by the pair, ``(N,)``."""
    slopes = torch.autograd.grad(realness.sum(), [pairs.x, pairs.conditions], create_graph=True)
    return slopes[0].flatten(1).square().sum(-1) + slopes[1].flatten(1).square().sum(-1)
