"""Sampling importance resampling: latents drawn from the posterior by their weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.masks import add_event_dims
from ..scoring.program import Program
from ..scoring.term_pair import TermPair
from ..utils.seeding import normalize_seed
from .ancestral import SiteValues, to_sample_layout
from .particle_sampler import ProposalScheme
from .proposals import Proposal
from .weighted import BlockSizes, ImportanceSampling, row_blocks, weighted_blocks


@dataclass(frozen=True)
class Resampling:
    """Settings of sampling importance resampling.

    Args:
        num_particles: K, the weighted draws per row to take from.
        proposal: the way to draw them.
        sizes: sizes of blocks.
    """

    num_particles: int = 1000
    proposal: ProposalScheme = field(default_factory=Proposal)
    sizes: BlockSizes = field(default_factory=BlockSizes)


def resample_latents(
    model: Program, guide: Program, batch: Batch, num_samples: int, resampling: Resampling, vectorize: bool = True
) -> SiteValues:
    """Draw S of K weighted particles per row, with replacement.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        num_samples: S.
        resampling: K, the proposal and the sizes of blocks.
        vectorize: True to score all particles of a block in one run.

    Returns:
        Latent site of the guide -> ``(S, N, *plates, *event)``.
    """
    settings = ImportanceSampling(
        resampling.num_particles, normalize_seed(None), resampling.proposal, vectorize, resampling.sizes
    )
    parts = []
    for first, rows in row_blocks(batch, settings.rows_at_once(model, guide, batch)):
        reservoir = WeightedReservoir(num_samples)
        for block in weighted_blocks(model, guide, rows, settings.for_rows(first)):
            reservoir.add(block.pair, block.log_weights)
        parts.append(reservoir.values)
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


class WeightedReservoir:
    """S draws per row by weight, out of particles that come in blocks.

    Each draw is replaced by one of the new block with the probability that the block has of all the weight so far, so
    that the result is distributed as if all particles had been there at once.

    Args:
        num_samples: S.

    Attributes:
        values: latent site -> ``(S, N, *plates, *event)``.
    """

    def __init__(self, num_samples: int):
        self.num_samples = num_samples
        self.values: SiteValues = {}
        self._log_total: Tensor | None = None  # of the weights so far, (N,)

    def add(self, pair: TermPair, log_weights: Tensor) -> None:
        """Add a block of particles: the latents in the pair's trace, and their log-weights ``(k, N)``."""
        log_weights = log_weights.double()
        log_block = log_weights.logsumexp(0)
        log_total = log_block if self._log_total is None else torch.logaddexp(self._log_total, log_block)

        # a row whose weights are all zero has no posterior to draw from, and keeps the guide's draws
        probabilities = (log_weights - log_block).exp().T.nan_to_num(1.0)
        index = torch.multinomial(probabilities, self.num_samples, replacement=True).T
        replace = torch.rand(index.shape, dtype=log_total.dtype, device=log_total.device)
        replace = replace < (log_block - log_total).exp().nan_to_num(1.0)

        rows = torch.arange(index.shape[1], device=index.device)
        for name, site in pair.row_latents().items():
            values = to_sample_layout(site, len(rows))[index, rows]
            if self._log_total is not None:
                values = torch.where(add_event_dims(replace, values.dim() - 2), values, self.values[name])
            self.values[name] = values
        self._log_total = log_total
