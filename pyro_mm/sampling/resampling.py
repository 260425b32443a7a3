"""Draws of latents by their importance weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.masks import over_events
from ..scoring.structure import latent_sites
from ..scoring.term_pair import TermPair
from ..utils.network_calls import ROWS
from ..utils.seeding import normalize_seed
from .ancestral import SiteValues, to_sample_layout
from .proposals import Proposal
from .weighted import weighted_blocks


def resample_latents(
    model: Any, guide: Any, batch: Batch, num_samples: int, num_particles: int, proposal: Proposal, vectorize: bool
) -> SiteValues:
    """Draws of the guide's latents by their importance weights."""
    seed, parts = normalize_seed(None), []
    for start in range(0, batch.size, ROWS):
        rows = batch if batch.size <= ROWS else batch.block(slice(start, start + ROWS))
        chosen = WeightedReservoir(num_samples)
        blocks = weighted_blocks(model, guide, rows, rows, num_particles, proposal, seed + start, None, vectorize)
        for _, pair, log_w in blocks:
            chosen.add(pair, log_w)
        parts.append(chosen.values)
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


class WeightedReservoir:
    """S draws of every row out of those that come in blocks, by weight, as if all of them had been there at once."""

    def __init__(self, num_samples: int):
        self.num_samples = num_samples
        self.values: SiteValues = {}
        self.total: Tensor | None = None

    def add(self, pair: TermPair, log_w: Tensor) -> None:
        block = log_w.double().logsumexp(0)
        total = block if self.total is None else torch.logaddexp(self.total, block)
        # a row whose weights are all zero has no posterior to draw from, and keeps the guide's
        share = (log_w.double() - block).exp().T.nan_to_num(1.0)
        index = torch.multinomial(share, self.num_samples, replacement=True).T
        new = torch.rand(index.shape, dtype=total.dtype, device=total.device) < (block - total).exp().nan_to_num(1.0)
        rows = torch.arange(index.shape[1], device=index.device)
        for name, site in latent_sites(pair.trace).items():
            taken = to_sample_layout(site, len(rows))[index, rows]
            if self.total is not None:
                taken = torch.where(over_events(new, taken.dim() - 2), taken, self.values[name])
            self.values[name] = taken
        self.total = total
