"""Weighted draws of a pair, in chunks of a bounded size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.context import TermStack
from ..scoring.importance import score_model
from ..scoring.structure import Callback, PairStructure, latent_sites, pair_structure
from ..scoring.term_pair import TermPair
from ..scoring.views import TermViews
from ..utils.seeding import generator_state, part_seed, set_generator_state, temporary_seed
from .guide_sampler import GuideSampler
from .proposals import Proposal

BLOCK = 2**16  # draws of a (row, particle) pair that share a seed: the canonical block, whatever the chunk


CHUNK = 2**14  # pairs decoded at once, at most


NUMBERS = 2**20  # and of the widest modality, on a CPU: larger arrays leave the cache, and are allocated anew each time


@torch.no_grad()
def weighted_blocks(
    model: Callback,
    guide: Callback,
    batch: Batch,
    seen: Batch,
    num_particles: int,
    proposal: Proposal,
    seed: int,
    chunk: int | None = None,
    vectorize: bool = True,
) -> Iterator[tuple[GuideSampler, TermPair, Tensor]]:
    """Draws in canonical blocks of particles, each under a seed of its own, with their log-weights ``(k, N)``.

    The latents are those of the pair's trace, at the particles' dimension and the plates of the story.
    """
    info = pair_structure(model, guide, seen)
    chunk = chunk or _chunk(batch)
    memo: dict[Any, Any] = {}
    masks = lambda b: {n: b.presence(n) for n in b.names}  # noqa: E731
    shown = seen.view(masks(seen), TermStack({}), memo, batch.rows)
    decoded = batch.view(masks(batch), TermStack({}), {})
    views = TermViews(shown, decoded, shown, info.nesting, modalities=info.modalities)
    block = max(1, BLOCK // batch.size) if vectorize else 1
    with temporary_seed(seed, batch.device):
        sampler = GuideSampler(proposal, info, TermPair(model, guide, views), num_particles, seed)
    whole = False
    for index, start in enumerate(range(0, num_particles, block)):
        with temporary_seed(part_seed(seed, index), batch.device):
            pair = TermPair(
                model, guide, views, min(block, num_particles - start), plated=vectorize and num_particles > 1
            )
            sampler.propose(pair)
            before = generator_state(batch.device)
            if not whole:
                log_w = _log_weights_in_chunks(pair, info, sampler, chunk)
                # a story that draws (a missing parent, say) would draw otherwise in other chunks
                whole = not torch.equal(before, generator_state(batch.device))
            if whole:
                if proposal.prior_share:
                    raise ValueError(
                        "prior_share needs the density of the prior, and this story draws while it is scored: a "
                        "missing modality on which others depend, or a latent that the guide lacks"
                    )
                set_generator_state(batch.device, before)
                log_w = sampler.log_weights(score_model(pair, info, unscaled=True))
        yield sampler, pair, log_w


def _chunk(batch: Batch) -> int:
    """The (row, particle) pairs to decode at once."""
    if batch.device.type == "cuda":
        return BLOCK
    widest = max([1, *(batch[name][0].numel() for name in batch if batch.holds(name))])
    return min(CHUNK, max(1, NUMBERS // widest))


def _log_weights_in_chunks(pair: TermPair, info: PairStructure, sampler: GuideSampler, chunk: int) -> Tensor:
    """The log-weights of a block, decoding at most ``chunk`` (row, particle) pairs at once."""
    size, particles = pair.views.decode.size, pair.num_particles
    if size * particles <= chunk:
        return sampler.log_weights(score_model(pair, info, unscaled=True))
    rows, k = (size, chunk // size) if chunk >= size else (chunk, 1)
    parts = [
        torch.cat(
            [
                _log_weights_of_part(pair, info, sampler, slice(i, i + k), slice(j, j + rows))
                for j in range(0, size, rows)
            ],
            -1,
        )
        for i in range(0, particles, k)
    ]
    return torch.cat(parts)


def _log_weights_of_part(
    pair: TermPair, info: PairStructure, sampler: GuideSampler, particles: slice, rows: slice
) -> Tensor:
    """The log-weights of some particles and rows of a block, ``(k, n)``."""
    size, k = pair.views.decode.size, pair.num_particles

    views = replace(pair.views, decode=pair.views.decode.block(rows))
    part = TermPair(pair._model, pair._guide, views, len(range(*particles.indices(k))), plated=pair.plated)

    def cut(x: Tensor, event_dim: int = 0) -> Tensor:
        for dim, full, kept in ((-1, size, rows), (pair.particle_dim, k, particles)):
            place = x.dim() + dim - event_dim
            if place >= 0 and x.shape[place] == full > 1:
                x = x[(slice(None),) * place + (kept,)]
        return x

    part.trace = pair.trace.copy()
    for plate in {"data", "particles"} & set(part.trace.nodes):
        part.trace.remove_node(plate)  # its index set, which a replay would bring back whole
    for name, site in latent_sites(pair.trace).items():
        part.trace.nodes[name] = site | {"value": cut(site["value"], site["fn"].event_dim)}
    part.log_q = {name: cut(x) for name, x in pair.log_q.items()}
    return sampler.log_weights(score_model(part, info, unscaled=True))
