"""Weighted particles of a pair, in blocks of particles and parts of bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.context import TermStack
from ..scoring.model_scores import score_model
from ..scoring.program import Program
from ..scoring.structure import PairStructure, in_data_plate, latent_sites, pair_structure
from ..scoring.term_pair import TermPair
from ..scoring.views import TermViews
from ..utils.network_calls import ROWS
from ..utils.seeding import generator_state, part_seed, set_generator_state, temporary_seed
from .class_weights import ClassWeights
from .particle_sampler import ParticleSampler, ProposalScheme, RowBlock, log_weights
from .proposals import Proposal

DRAWN_PAIRS = 2**16
CUDA_DRAWN_PAIRS = 2**18  # a GPU takes as long for fewer
CUDA_DECODED_PAIRS = 2**16
DECODED_PAIRS = 2**14
DECODED_NUMBERS = 2**20  # larger arrays leave a CPU's cache, and are allocated anew each time


@dataclass(frozen=True)
class BlockSizes:
    """Numbers of rows and particles that an evaluation handles at once.

    A (row, particle) pair is one latent draw of one row.

    Args:
        rows: rows encoded at once.
        drawn_pairs: pairs drawn under one seed. It decides which random numbers a particle gets, and so the digits of a
            result. By default 2^16; on CUDA 2^18.
        decoded_pairs: pairs decoded at once, which bounds the memory and changes a result by rounding alone. By
            default 2^14, or fewer, so that the widest modality has 2^20 numbers; on CUDA 2^16.
    """

    rows: int = ROWS
    drawn_pairs: int | None = None
    decoded_pairs: int | None = None

    def particles_per_seed(self, rows: int, device: torch.device) -> int:
        """Return the number of particles of so many rows that are drawn under one seed."""
        pairs = self.drawn_pairs
        if pairs is None:
            pairs = CUDA_DRAWN_PAIRS if device.type == "cuda" else DRAWN_PAIRS
        return max(1, pairs // rows)

    def pairs_to_decode(self, batch: Batch) -> int:
        """Return the number of (row, particle) pairs of a batch to decode at once."""
        if self.decoded_pairs is not None:
            return self.decoded_pairs
        if batch.device.type == "cuda":
            return CUDA_DECODED_PAIRS
        widest = max([1, *(batch[name][0].numel() for name in batch if batch.holds(name))])
        return min(DECODED_PAIRS, max(1, DECODED_NUMBERS // widest))


@dataclass(frozen=True)
class ImportanceSampling:
    """Settings of an importance sampler.

    Args:
        num_particles: K, draws per row.
        seed: of all draws.
        proposal: the way to draw them.
        vectorize: True to score the particles of a block in one run of the model.
        sizes: sizes of blocks.
    """

    num_particles: int
    seed: int
    proposal: ProposalScheme = field(default_factory=Proposal)
    vectorize: bool = True
    sizes: BlockSizes = field(default_factory=BlockSizes)

    @property
    def stacked(self) -> bool:
        """True if the model is run on several particles at once."""
        return self.vectorize and self.num_particles > 1

    def block_size(self, rows: int, device: torch.device) -> int:
        """Return the number of particles of so many rows that are drawn under one seed."""
        return self.sizes.particles_per_seed(rows, device) if self.vectorize else 1

    def num_blocks(self, rows: int, device: torch.device) -> int:
        """Return the number of blocks that the particles of so many rows are drawn in."""
        return -(-self.num_particles // self.block_size(rows, device))

    def rows_at_once(self, model: Program, guide: Program, batch: Batch) -> int:
        """Return the most rows of a block.

        Args:
            model, guide: callables of a batch.
            batch: the rows as the guide sees them.
        """
        most = self.proposal.rows_at_once(pair_structure(model, guide, batch), batch.device)
        return self.sizes.rows if most is None else min(self.sizes.rows, most)

    def for_rows(self, first_row: int) -> ImportanceSampling:
        """Return these settings with the seed of the block of rows that begins at row ``first_row``."""
        return replace(self, seed=self.seed + first_row)


class WeightedBlock(NamedTuple):
    """A block of k particles of N rows.

    Attributes:
        pair: its trace holds the latents, with the particles' dimension and the plates of the story.
        log_weights: ``(k, N)``, in nats; ``(C, k, N)`` if they are split by the classes of a site.
        sampler: the sampler that has drawn them.
    """

    pair: TermPair
    log_weights: Tensor
    sampler: ParticleSampler


def row_blocks(batch: Batch, most: int) -> Iterator[tuple[int, Batch]]:
    """Yield (first row, rows) for blocks of at most so many rows; the batch itself if it is no larger."""
    for first_row in range(0, batch.size, most):
        yield first_row, row_block(batch, first_row, most)


def row_block(batch: Batch, first_row: int, most: int) -> Batch:
    """Return the block of at most so many rows that begins at a row, in memory; the batch itself if it is no larger."""
    return batch.read() if batch.size <= most else batch.block(slice(first_row, first_row + most))


@torch.no_grad()
def weighted_blocks(
    model: Program,
    guide: Program,
    batch: Batch,
    settings: ImportanceSampling,
    guide_batch: Batch | None = None,
    classes: ClassWeights | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[WeightedBlock]:
    """Draw particles in blocks, each under a seed of its own, and weigh them.

    Args:
        model, guide: callables of a batch.
        batch: N rows, which are scored.
        settings: K, the proposal, the seed and the sizes of blocks.
        guide_batch: the same rows as the guide sees them; ``batch`` by default.
        classes: a site by whose classes the weights are split.
        shard: ``(rank, world)`` yields the blocks ``rank``, ``rank + world``, .. alone.

    Yields:
        Blocks of particles, K in all shards together.

    Raises:
        ValueError: a story that draws while it is scored, if the proposal needs the density of its prior.
    """
    rows = _row_block(model, guide, batch, batch if guide_batch is None else guide_batch, settings)
    block_size = settings.block_size(batch.size, batch.device)
    rank, world = shard
    with temporary_seed(rows.seed, batch.device):
        sampler = settings.proposal.sampler(rows)

    draws_in_scoring = False  # a missing parent, say, is drawn anew whenever the story is scored
    for index, first_particle in enumerate(range(0, settings.num_particles, block_size)):
        with temporary_seed(part_seed(rows.seed, index), batch.device):
            pair = rows.pair(min(block_size, settings.num_particles - first_particle))
            if index % world != rank:
                sampler.skip(pair)
                continue
            sampler.draw(pair)
            state = generator_state(batch.device)
            if not draws_in_scoring:
                log_w = _log_weights_in_parts(pair, rows.structure, sampler, rows.pairs_at_once, classes)
                draws_in_scoring = not torch.equal(state, generator_state(batch.device))
            if draws_in_scoring:
                # parts of another size would draw other values, so the block is scored whole
                if sampler.needs_prior_density:
                    raise ValueError(
                        "prior_share needs the density of the prior, and this story draws while it is scored: a "
                        "missing modality on which others depend, or a latent that the guide lacks"
                    )
                set_generator_state(batch.device, state)
                log_w = _log_weights(pair, rows.structure, sampler, classes)
        yield WeightedBlock(pair, log_w, sampler)


def _row_block(
    model: Program, guide: Program, batch: Batch, guide_batch: Batch, settings: ImportanceSampling
) -> RowBlock:
    """Return the block of rows as the guide sees them and as the model scores them."""
    structure = pair_structure(model, guide, guide_batch)

    def view(rows: Batch, cache: dict[Any, Any], *scored_rows: Any) -> Batch:
        return rows.view({name: rows.presence(name) for name in rows.names}, TermStack({}), cache, *scored_rows)

    encoded = view(guide_batch, {}, batch.rows)
    views = TermViews(encoded, view(batch, {}), encoded, structure.nesting, modalities=structure.modalities)
    views = views.given_globals(structure)
    pairs_at_once = settings.sizes.pairs_to_decode(batch)
    return RowBlock(
        model, guide, views, structure, settings.num_particles, settings.seed, settings.vectorize, pairs_at_once
    )


def _log_weights(
    pair: TermPair,
    structure: PairStructure,
    sampler: ParticleSampler,
    classes: ClassWeights | None,
    rows: slice = slice(None),
) -> Tensor:
    """Return the log-weights of some rows of a block, ``(k, N)``, or ``(C, k, N)`` by the classes of a site."""
    if classes is not None:
        return classes.log_weights(pair, structure, sampler, rows)
    return log_weights(sampler, score_model(pair, structure, unscaled=True), rows)


def _log_weights_in_parts(
    pair: TermPair, structure: PairStructure, sampler: ParticleSampler, most: int, classes: ClassWeights | None
) -> Tensor:
    """Return the log-weights of a block as :func:`_log_weights`, from at most so many (row, particle) pairs at once."""
    num_rows = pair.views.decode.size
    num_particles = pair.num_particles
    if num_rows * num_particles <= most:
        return _log_weights(pair, structure, sampler, classes)

    rows, particles = (num_rows, most // num_rows) if most >= num_rows else (most, 1)

    def weigh(first_particle: int, first_row: int) -> Tensor:
        chosen = slice(first_row, first_row + rows)
        part = _part(pair, slice(first_particle, first_particle + particles), chosen)
        return _log_weights(part, structure, sampler, classes, chosen)

    return torch.cat(
        [torch.cat([weigh(k, n) for n in range(0, num_rows, rows)], -1) for k in range(0, num_particles, particles)], -2
    )


def _part(pair: TermPair, particles: slice, rows: slice) -> TermPair:
    """Return the pair with some of its particles and rows, their latent values and log-densities."""
    num_rows = pair.views.decode.size
    num_particles = pair.num_particles
    views = replace(pair.views, decode=pair.views.decode.block(rows))
    length = len(range(*particles.indices(num_particles)))
    part = TermPair(pair.source_model, pair.source_guide, views, length, plated=pair.plated)

    def cut(x: Tensor, event_dim: int = 0, of_rows: bool = True) -> Tensor:
        for dim, size, chosen in ((-1, num_rows, rows), (pair.particle_dim, num_particles, particles)):
            if dim == -1 and not of_rows:
                continue  # a latent that all rows share, or one in a plate of its own
            place = x.dim() + dim - event_dim
            if place >= 0 and x.shape[place] == size > 1:
                x = x[(slice(None),) * place + (chosen,)]
        return x

    part.trace = pair.trace.copy()
    for plate in {"data", "particles"} & set(part.trace.nodes):
        part.trace.remove_node(plate)  # its index set, which a replay would bring back whole
    for name, site in latent_sites(pair.trace).items():
        value = cut(site["value"], site["fn"].event_dim, of_rows=in_data_plate(site))
        part.trace.nodes[name] = site | {"value": value}
    part.log_q = {name: cut(x) for name, x in pair.log_q.items()}
    return part
