"""The protocol between an importance sampler and its proposals.

A proposal has two halves. A :class:`ProposalScheme` is a value that the user makes, such as
:class:`pyro_mm.Proposal`: settings, and no state. For each block of rows it makes a :class:`ParticleSampler`, which
draws. The engine (:func:`pyro_mm.sampling.weighted.weighted_blocks`) knows nothing else of either::

    sampler = scheme.sampler(rows)                   # once per block of rows
    for pair in blocks_of_particles:
        sampler.draw(pair)                           # sets pair.trace and pair.log_q
        scores = score_model(pair, ...)              # log p(x | z), log p(z), log q(z)
        log_w = log_weights(sampler, scores)         # log p(x, z) - sampler.log_density(scores, rows)
    # standard errors come from groups of sampler.group_size successive particles

So another proposal is two classes: a frozen dataclass that subclasses ``ProposalScheme``, and its sampler. What is
computed once per block of rows belongs into the sampler's constructor, as the fit of
:class:`pyro_mm.sampling.fitted_proposal.FittedSampler` does. All of this runs without gradient, which a fit enables
itself (``torch.enable_grad``), with modules in evaluation mode and torch's generator under a seed. A complete example
is ``Exact`` in ``tests/sampling/test_proposal_values.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ..scoring.program import Program
from ..scoring.scores import Scores
from ..scoring.structure import PairStructure
from ..scoring.term_pair import TermPair
from ..scoring.views import TermViews


@dataclass(frozen=True)
class RowBlock:
    """A block of rows, the pair that is evaluated on it, and the particles that are wanted.

    Attributes:
        model, guide: callables of a batch.
        views: the rows as the guide sees them (``views.encode``) and as the model scores them (``views.decode``).
        structure: sites of the pair.
        num_particles: K, of all blocks of particles together.
        seed: for draws of the sampler outside the blocks of particles; each block has a seed of its own.
        vectorize: True if the particles of a block lie along a plate.
        pairs_at_once: the number of (row, particle) pairs that a sampler decodes at once, which bounds the memory.
    """

    model: Program
    guide: Program
    views: TermViews
    structure: PairStructure
    num_particles: int
    seed: int
    vectorize: bool = True
    pairs_at_once: int = 2**14

    @property
    def size(self) -> int:
        """The number of rows N."""
        return self.views.encode.size

    @property
    def device(self) -> torch.device:
        """The device of the rows."""
        return self.views.encode.device

    def pair(self, num_particles: int | None = None) -> TermPair:
        """Return the pair for so many particles, or for one without a plate by default."""
        if num_particles is None:
            return TermPair(self.model, self.guide, self.views)
        plated = self.vectorize and self.num_particles > 1
        return TermPair(self.model, self.guide, self.views, num_particles, plated=plated)


class ParticleSampler(ABC):
    """Draws of K particles for each row of a block, in blocks of particles.

    Attributes:
        group_size: the number of successive particles that depend on each other; 1 if all are independent. The last
            group may be smaller. Standard errors treat groups as the independent units, so K should hold at least
            20 of them (:data:`~pyro_mm.sampling.streams.REPLICATES`).
        needs_prior_density: True if :meth:`log_density` uses ``scores.log_prior``. Stories that draw while they are
            scored, whose prior density is random, are then refused.
        num_pilot, num_gradients: evaluations of the model, and of its gradient, per row that the sampler has made
            beforehand, beside the K of the particles.
        fallback: rows whose proposal could not be made as its settings ask, boolean ``(N,)``; None if all could.
    """

    group_size: int = 1
    needs_prior_density: bool = False
    num_pilot: int = 0
    num_gradients: int = 0
    fallback: Tensor | None = None

    @abstractmethod
    def draw(self, pair: TermPair) -> None:
        """Draw the next ``pair.num_particles`` particles of every row.

        Leaves in ``pair.trace`` the guide's trace with the values that were drawn, and in ``pair.log_q`` their
        log-densities: site -> ``(k, N)``, plates within a row summed, or one entry for several sites drawn together;
        without the dimension of particles if ``pair.plated`` is False. A density is 0 where its site is masked, as in a
        row in which nothing is present: ``SiteReducer(pair).log_prob(site | {"fn": q})`` sees to that. Random numbers
        from torch's generator are seeded per block of particles.
        """

    def skip(self, pair: TermPair) -> None:
        """Pass over the next ``pair.num_particles`` particles, which another process draws.

        By default it draws them. A sampler whose draws go on from the ones before only by streams passes those over.
        """
        self.draw(pair)

    def log_density(self, scores: Scores, rows: slice = slice(None)) -> Tensor:
        """Return the log-density of the whole proposal at the particles, ``(k, N)``, in nats.

        Args:
            scores: log-densities of some of the particles and rows of the last :meth:`draw`, one term.
            rows: those rows among the rows of the block.
        """
        return scores.log_proposal[:, 0]


class ProposalScheme(ABC):
    """Settings by which the particles of an importance sampler are drawn: a value given as ``proposal=``."""

    def rows_at_once(self, structure: PairStructure, device: torch.device) -> int | None:
        """Return the most rows that a sampler of this pair holds; None for as many as are encoded at once."""
        return None

    @abstractmethod
    def sampler(self, rows: RowBlock) -> ParticleSampler:
        """Return a sampler for a block of rows.

        Raises:
            ValueError: a guide or a story that cannot be sampled so.
        """


def log_weights(sampler: ParticleSampler, scores: Scores, rows: slice = slice(None)) -> Tensor:
    r"""Return the log-weights :math:`\log p(x, z_k) - \log q(z_k)`, ``(k, N)``, in nats.

    Args:
        sampler: the sampler of the particles.
        scores: log-densities of some particles and rows.
        rows: those rows among the rows of the sampler.
    """
    log_joint = sum(scores.likelihood.values(), scores.log_prior)[:, 0]
    return log_joint - sampler.log_density(scores, rows)
