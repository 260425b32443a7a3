"""The concrete terms that a table stands for on a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.masks import Presence, all_of, any_of, invert, subsets
from .concrete_terms import ConcreteTerm
from .term_kinds import DENSITY, PENALTY
from .terms import ALL, EACH, EVERY, PRIOR, Names, Random, Term, _text, members


def expand(terms: Sequence[Term], batch: Batch, factors: bool = False) -> list[ConcreteTerm]:
    """Return the concrete terms of a table for a batch, each of weight 1, without those that count in no row.

    Args:
        terms: a table.
        batch: N rows.
        factors: True if the model observes something besides the batch's modalities, as a ``pyro.factor`` does. It
            belongs to the log joint of a term given the prior, once, and with the weight of the likelihood. A term
            given C does not count it, since q(z | x_C) is the posterior of a joint that includes it, and neither does a
            penalty, which has no likelihood.
    """
    masks = _Masks(batch)
    found: list[ConcreteTerm] = []
    for place, term in enumerate(terms):
        for symbol in (term.encode, term.decode, term.given):
            masks.draw(symbol)
        sums: Sequence[Sequence[str]] = [()]
        if term.over is EACH:
            sums = [(name,) for name in batch.names]
        elif term.over is EVERY:
            sums = subsets(batch.names)
        each = [_concrete_term(term, place, chosen, masks, factors) for chosen in sums]
        group = [concrete for concrete in each if concrete is not None]
        if term.average:
            _weigh_as_mean(group)
        found += group
    return found


class _Masks:
    """Masks of sets of modalities in a batch; random sets are drawn once."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.names = batch.names
        self.present: dict[str, Presence] = {name: batch.presence(name) for name in batch.names}
        self._subsets: dict[int, dict[str, Tensor]] = {}
        self._random: dict[Random, dict[str, Presence]] = {}

    def draw(self, which: Names) -> None:
        """Draw a random set, unless it was drawn for another term."""
        if isinstance(which, Random) and which.index not in self._subsets:
            self._subsets[which.index] = _random_subset(self.batch, which.empty)

    def of(self, which: Names, chosen: Sequence[str]) -> dict[str, Presence]:
        """Return modality -> rows, for the modalities of a set that are present."""
        if isinstance(which, Random):
            return self._of_random(which)
        those = set(members(which, chosen, self.names))
        return {name: mask if name in those else False for name, mask in self.present.items()}

    def _of_random(self, which: Random) -> dict[str, Presence]:
        """Return modality -> rows, as the same tensors for all terms of one draw: equal sets are found by identity."""
        if which not in self._random:
            drawn = self._subsets[which.index]
            some = {name: invert(drawn[name]) if which.rest else drawn[name] for name in self.present}
            self._random[which] = {name: all_of([mask, some[name]]) for name, mask in self.present.items()}
        return self._random[which]

    def counts(self, which: Names, chosen: Sequence[str]) -> Presence:
        """Return the rows that have something of a set, or True for a set that may be empty."""
        if isinstance(which, Random) or which is PRIOR:
            return True
        those = members(which, chosen, self.names)
        return any_of(self.present.get(name, False) for name in those) if those else True


def _concrete_term(term: Term, place: int, chosen: Sequence[str], masks: _Masks, factors: bool) -> ConcreteTerm | None:
    """Return a term with its symbols filled in; None if it counts in no row."""
    counts = all_of([masks.counts(term.encode, chosen), masks.counts(term.given, chosen)])
    if counts is False:
        return None
    decode = {name: all_of([mask, counts]) for name, mask in masks.of(term.decode, chosen).items()}
    joint = factors and term.of_joint
    kind = term.kind
    if kind is None:
        kind = DENSITY if joint or any(mask is not False for mask in decode.values()) else PENALTY
    sets = (term.encode, term.decode, term.given)
    texts = [_text(_fill_in_names(which, chosen, masks.names)) for which in sets]
    return ConcreteTerm(
        place=place,
        label=term.label(*texts) + (" encoder frozen" if term.freeze_encoder else ""),
        encode=masks.of(term.encode, chosen),
        decode=decode,
        given=masks.of(term.given, chosen),
        encode_prior=term.encode is PRIOR,
        given_prior=term.given is PRIOR,
        counts=counts,
        frozen=term.freeze_decoder,
        has_kl=callable(term.kl) or term.kl != 0,
        frozen_encoder=term.freeze_encoder,
        kind=kind,
        decodes=_decodes(term, chosen, masks.names),
        joint=joint,
    )


def _weigh_as_mean(terms: Sequence[ConcreteTerm]) -> None:
    """Divide terms by the number of terms that count in each row."""
    tensors = [term.counts for term in terms if isinstance(term.counts, Tensor)]
    total: Any = len(terms) - len(tensors)
    if tensors:
        total = total + sum(counts.double() for counts in tensors)
    for term in terms:
        term.among = total
        term.share = 1 / (total.clamp(min=1) if isinstance(total, Tensor) else total)


def _decodes(term: Term, chosen: Sequence[str], names: tuple[str, ...]) -> bool:
    """Return True if no row in which the term counts lacks all that it decodes."""
    if term.decode is ALL:
        return True  # a row of nothing at all counts nowhere
    if isinstance(term.decode, Random):
        return False
    decode = set(members(term.decode, chosen, names))
    needed = [which for which in (term.encode, term.given) if which is not PRIOR and not isinstance(which, Random)]
    sets = [set(members(which, chosen, names)) for which in needed]
    return any(some and some <= decode for some in sets)


def _random_subset(batch: Batch, empty: bool) -> dict[str, Tensor]:
    """Draw a uniform subset of each row's modalities, modality -> boolean ``(N,)``; it may be empty if ``empty``."""
    present = batch.present
    left = torch.stack([p.float() for p in present.values()]).sum(0)
    chosen = {}
    none = torch.ones(batch.size, dtype=torch.bool, device=batch.device)
    for name, there in present.items():
        # with r modalities left and none chosen yet, 2^(r-1) of the 2^r - 1 non-empty subsets have this one, a share
        # that is written so that it does not overflow where there are many
        odds = torch.full_like(left, 0.5)
        if not empty:
            odds = torch.where(none, 0.5 / (1 - 2**-left).clamp(min=0.5), odds)
        chosen[name] = there & (torch.rand(batch.size, device=batch.device) < odds)
        none = none & ~chosen[name]
        left = left - there.float()
    return chosen


def _fill_in_names(names: Names, chosen: Sequence[str], all_names: tuple[str, ...]) -> Names:
    """Return a set with its modalities' names, but for symbols that stand for themselves in a label."""
    return names if names is ALL or names is PRIOR or isinstance(names, Random) else members(names, chosen, all_names)
