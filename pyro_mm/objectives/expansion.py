"""The terms of a table stacked along a batch dimension of their own, so that one pass evaluates them all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..batch.context import TermStack
from ..batch.masks import Presence, all_of, any_of, flags, negated, stacked, subsets
from ..scoring.structure import PairStructure, private_modality
from ..scoring.views import TermViews
from .terms import ALL, EACH, EVERY, PRIOR, Names, Random, Term, _text, members


def views(
    rows: Sequence[ConcreteTerm], batch: Batch, info: PairStructure, memo: Any, drawn: Mapping[str, float] | None = None
) -> TermViews:
    """The batch as T concrete terms show it, stacked at batch dim ``-(nesting + 1)`` when there are several.

    What holds for whole terms stays Python; a tensor is made only where rows of the data differ. Where modalities are
    ``drawn``, each with a scale, the others are not decoded.
    """
    nesting = info.nesting
    if drawn is not None:
        rows = [replace(row, decode={n: n in drawn and m for n, m in row.decode.items()}) for row in rows]
    decodes = {n: tuple(t for t, row in enumerate(rows) if row.decode[n] is not False) for n in batch.names}
    stack = TermStack(decodes, len(rows), -nesting - 1)
    # a row in which a term does not count is, for that term, a row with nothing present
    everywhere = stacked([all_of([batch.rows, row.counts]) for row in rows], batch.size, batch.device, nesting)

    def view(each: list[dict[str, Presence]]) -> Batch:
        full = {n: stacked([m[n] for m in each], batch.size, batch.device, nesting) for n in batch.names}
        return batch.view(full, stack, memo, everywhere, each)

    return TermViews(
        encode=view([row.encode for row in _guided(rows, lambda row: row.encode_prior)]),
        decode=view([row.decode for row in rows]),
        given=view([row.given for row in _guided(rows, lambda row: row.given_prior)]),
        nesting=nesting,
        encode_prior=_flags([row.encode_prior for row in rows], batch, nesting),
        given_prior=_flags([row.given_prior for row in rows], batch, nesting),
        terms=len(rows),
        modalities=info.modalities,
        scale=drawn or {},
        joint=_flags([row.joint for row in rows], batch, nesting),
        prior_terms=frozenset(t for t, row in enumerate(rows) if row.encode_prior),
    )


def _guided(rows: Sequence[ConcreteTerm], prior: Callable[[ConcreteTerm], bool]) -> Sequence[ConcreteTerm]:
    """The rows, with the first of those that the guide is asked for in the place of the prior's, where it is not: so it
    computes nothing for these alone."""
    first = next((row for row in rows if not prior(row)), None)
    return rows if first is None else [first if prior(row) else row for row in rows]


def sharing(rows: Sequence[ConcreteTerm], info: PairStructure) -> tuple[Sequence[ConcreteTerm], list[int] | None]:
    """Rows of which one decodes for all that encode the same set, and for each row which one does; None if none can.

    The expectation of a log-likelihood is the same whichever term asks for it, so one draw serves them all where a
    term is linear in it. Not so where a private latent counts only in the terms that decode its modality, or where a
    modality is the parent of another one, which sees the data in a term that decodes it and a draw in one that does
    not; nor where an observed site that is no modality counts in some terms only.
    """
    if (
        info.chained
        or info.enumerates
        or info.factors
        or any(private_modality(site, info.modalities) is not None for site in info.latents)
    ):
        return rows, None
    first: dict[Any, int] = {}
    carriers = []
    for t, row in enumerate(rows):
        sets = tuple(m if isinstance(m, bool) else id(m) for m in row.encode.values())
        carrier = first.setdefault((sets, row.encode_prior, row.frozen), t)
        carriers.append(carrier if rows[carrier].counts is True else t)
    if not any(c != t and not rows[t].penalty for t, c in enumerate(carriers)):
        return rows, None
    groups: list[list[ConcreteTerm]] = [[] for _ in rows]
    for row, c in zip(rows, carriers, strict=True):
        groups[c].append(row)
    shared = []
    for row, group in zip(rows, groups, strict=True):
        shared.append(replace(row, decode={n: any_of(other.decode[n] for other in group) for n in row.decode}))
    return shared, carriers


def _flags(values: list[bool], batch: Batch, nesting: int) -> Presence:
    return values[0] if len(set(values)) == 1 else flags(values, batch.device, nesting)


@dataclass
class ConcreteTerm:
    """One concrete term: which modalities of which rows it encodes, decodes and is given; step weights filled in.

    A weight that is a tensor is a single number that may change where the term's table is traced once and run often;
    of the likelihood it is positive. ``weight`` is the term's share in a mean, of which ``among`` terms count in a row.
    ``decodes`` says that it decodes something wherever it counts.
    ``joint`` says that what the model observes besides modalities counts in it.
    """

    label: str
    encode: dict[str, Presence]
    decode: dict[str, Presence]
    given: dict[str, Presence]
    encode_prior: bool
    given_prior: bool
    counts: Presence
    likelihood: float | Tensor | dict[str, float | Tensor]
    kl: float | Tensor
    frozen: bool
    weight: float | Tensor = 1.0
    among: float | Tensor = 1.0
    decodes: bool = False
    joint: bool = False

    @property
    def penalty(self) -> bool:
        """Whether it decodes nothing in any row."""
        return not self.joint and all(mask is False for mask in self.decode.values())

    @property
    def outer(self) -> float | Tensor:
        """The likelihood weight that can be taken out of a logarithm: a single, positive one, else 1."""
        weight = self.likelihood
        return weight if isinstance(weight, Tensor) or (isinstance(weight, float) and weight > 0) else 1.0


def expand(terms: Sequence[Term], batch: Batch, factors: bool = False) -> list[ConcreteTerm]:
    """The concrete terms of an evaluated table for a batch, those that count in none of its rows left out.

    Args:
        factors: whether the model observes something besides the batch's modalities, as a ``pyro.factor`` does. It
            belongs to the log joint of a term given the prior, once, and with the weight of the likelihood. In one
            given C it is in what q(z | x_C) is the posterior of, and a penalty has no likelihood.
    """
    names = batch.names
    there = {name: batch.presence(name) for name in names}
    draws: dict[int, dict[str, Tensor]] = {}
    rows: list[ConcreteTerm] = []
    known: dict[Any, Any] = {}
    for term in terms:
        for symbol in (term.encode, term.decode, term.given):
            if isinstance(symbol, Random) and symbol.index not in draws:
                draws[symbol.index] = _random_subset(batch, symbol.empty)
        sums: Sequence[Sequence[str]] = [()]
        if term.over is EACH:
            sums = [(name,) for name in names]
        elif term.over is EVERY:
            sums = subsets(names)
        group = [row for chosen in sums if (row := _row(term, chosen, there, draws, known)).counts is not False]
        if term.average and group:
            counts = [row.counts for row in group]
            tensors = [c for c in counts if isinstance(c, Tensor)]
            total: Any = len(counts) - len(tensors)
            total = total + sum(c.double() for c in tensors) if tensors else total
            for row in group:
                row.among = total
                row.weight = 1 / (total.clamp(min=1) if isinstance(total, Tensor) else total)
        for row in group:
            row.joint = factors and term.of_joint
        rows += group
    return rows


def _row(
    term: Term, chosen: Sequence[str], there: dict[str, Presence], draws: Any, known: dict[Any, Any]
) -> ConcreteTerm:
    def masks(names: Names) -> dict[str, Presence]:
        if isinstance(names, Random):
            # the same tensors for all terms of one draw, by which a set is known again
            if names not in known:
                drawn = draws[names.index]
                some = {n: negated(drawn[n]) if names.rest else drawn[n] for n in there}
                known[names] = {n: all_of([m, some[n]]) for n, m in there.items()}
            return known[names]
        those = set(members(names, chosen, tuple(there)))
        return {n: m if n in those else False for n, m in there.items()}

    counts: Presence = True
    for names in (term.encode, term.given):
        if isinstance(names, Random) or names is PRIOR:
            continue
        if those := members(names, chosen, tuple(there)):
            counts = all_of([counts, any_of(there.get(n, False) for n in those)])
    decode = {n: all_of([m, counts]) for n, m in masks(term.decode).items()}
    text = ", ".join(_text(_concrete(names, chosen, tuple(there))) for names in (term.encode, term.decode, term.given))
    return ConcreteTerm(
        label=f"({text})",
        encode=masks(term.encode),
        decode=decode,
        given=masks(term.given),
        encode_prior=term.encode is PRIOR,
        given_prior=term.given is PRIOR,
        counts=counts,
        likelihood={n: _number(w) for n, w in term.likelihood.items()}
        if isinstance(term.likelihood, Mapping)
        else _number(term.likelihood),
        kl=_number(term.kl),
        frozen=term.freeze_decoder,
        decodes=_decodes(term, chosen, tuple(there)),
    )


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


def _number(weight: Any) -> float | Tensor:
    return weight if isinstance(weight, Tensor) else float(weight)


def _random_subset(batch: Batch, empty: bool) -> dict[str, Tensor]:
    """Uniform over the subsets of what each row has, modality -> boolean (N,); without the empty one unless asked."""
    present = batch.present
    left = torch.stack([p.float() for p in present.values()]).sum(0)
    chosen, none = {}, torch.ones(batch.size, dtype=torch.bool, device=batch.device)
    for name, there in present.items():
        # with r modalities left and none chosen yet, 2^(r-1) of the 2^r - 1 non-empty subsets have this one, a share
        # that is written so that it does not overflow where there are many
        odds = torch.full_like(left, 0.5)
        if not empty:
            odds = torch.where(none, 0.5 / (1 - 2**-left).clamp(min=0.5), odds)
        chosen[name] = there & (torch.rand(batch.size, device=batch.device) < odds)
        none, left = none & ~chosen[name], left - there.float()
    return chosen


def _concrete(names: Names, chosen: Sequence[str], all_names: tuple[str, ...]) -> Names:
    return names if names is ALL or names is PRIOR or isinstance(names, Random) else members(names, chosen, all_names)
