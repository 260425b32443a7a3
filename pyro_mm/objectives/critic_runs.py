"""Runs of guide and model for one term, as a critic sees them: pairs of values and latents, and generators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.masks import all_of
from ..distributions.pushforward import Pushforward
from ..scoring.program import Program
from ..scoring.program_runs import propose, run_model
from ..scoring.reduction import SiteReducer
from ..scoring.structure import PairStructure, observed_sites
from ..scoring.term_pair import TermPair
from .concrete_terms import ConcreteTerm
from .critic_terms import implicit_distribution, latents_of, observed_values
from .critics import Critic
from .stacked_views import stack_views


@dataclass(frozen=True)
class Pairs:
    """Values of modalities and what their critic is shown beside them.

    Attributes:
        x: values, flattened and behind each other, ``(N, D)``.
        conditions: parents or latents ``(N, F)``.
    """

    x: Tensor
    conditions: Tensor

    def as_leaves(self) -> Pairs:
        """Return the same pairs, to be differentiated by."""
        return Pairs(*(value.detach().clone().requires_grad_() for value in (self.x, self.conditions)))


@dataclass(frozen=True)
class TermRun:
    """A run of guide and model for a term, as a critic sees it.

    Attributes:
        observed: the values of the rows, and what the critic is shown beside them.
        distributions: of generated values given the same latents, of each modality of the critic.
        rows: the rows that count, boolean ``(N,)``.
        scale: that of the modality's site in the story, without that of a subsampled plate: a number or ``(N,)``.
        factor: size of the data plate over that of its subsample.
    """

    observed: Pairs
    distributions: Sequence[Pushforward]
    rows: Tensor
    scale: float | Tensor
    factor: float

    def generate(self) -> Pairs:
        """Return generated values with the latents that they are generated from."""
        each = [d.rsample().flatten(len(d.batch_shape)) for d in self.distributions]
        conditions = self.observed.conditions
        x = each[0] if len(each) == 1 else torch.cat(each, -1)
        return Pairs(x.to(conditions.dtype), conditions)


@dataclass(frozen=True)
class Programs:
    """A pair and a batch that losses of critics run on.

    Attributes:
        model, guide: the pair.
        batch: N rows.
        structure: structure of the pair on them.
    """

    model: Program
    guide: Program
    batch: Batch
    structure: PairStructure

    def run(self, critic: Critic, names: Sequence[str], term: ConcreteTerm, from_prior: bool = False) -> TermRun:
        """Run guide and model for a term.

        Args:
            critic: that of the modalities.
            names: the modalities.
            term: the term.
            from_prior: True for latents of the prior; False for those of the guide, held constant.
        """
        batch = self.batch
        term.kind.check(term, batch, self.structure)
        decode = term.decode
        if not self.structure.chained:  # else what it is given has to be observed
            decode = {n: mask if n in names else False for n, mask in decode.items()}
        encode_prior = from_prior or term.encode_prior
        alone = replace(term, decode=decode, encode_prior=encode_prior, frozen_encoder=not from_prior)
        pair = TermPair(self.model, self.guide, stack_views([alone], batch, self.structure, {}))
        propose(pair, self.structure)
        sites = observed_sites(run_model(pair, self.structure))
        distributions = [implicit_distribution(name, sites[name]) for name in names]
        site = sites[names[0]]
        conditions = latents_of(pair.trace) if critic.form.replaces_kl else distributions[0].parents

        reducer = SiteReducer(pair)
        scale = reducer.scale(site)
        if isinstance(scale, Tensor):
            scale = scale.expand(batch.size)
        counts = all_of([batch.rows, term.counts, *(term.decode[name] for name in names)])
        if site["mask"] is not None:
            counts = all_of([counts, site["mask"]])
        rows = counts
        if not isinstance(counts, Tensor):
            rows = torch.full((batch.size,), counts, device=conditions.device)
        conditions = conditions.expand(batch.size, -1)
        observed = Pairs(observed_values(batch, names, conditions), conditions)
        return TermRun(observed, distributions, rows.expand(batch.size), scale, reducer.factor)  # type: ignore[union-attr]


def next_row(rows: Tensor) -> Tensor:
    """Return for each row that counts another one that does, cyclically, as indices ``(N,)``.

    Args:
        rows: boolean ``(N,)``.
    """
    order = torch.argsort((~rows).to(torch.uint8), stable=True)  # those that count come first
    rank = torch.argsort(order)
    return order[torch.remainder(rank + 1, rows.sum().clamp(min=1))]
