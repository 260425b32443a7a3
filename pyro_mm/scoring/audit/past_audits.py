"""Results of the audits of a pair, by the kind of batch, and what they tell of a likelihood."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from ...batch.batch import Batch
from ...batch.stored import StoredColumn
from ...distributions.support import OffGrid, OnGrid, has_fractions
from ...utils.reachable import Fingerprint
from .padding_reads import has_padding
from .sites import Sites

MOST_AUDITS = 64  # kinds of batches remembered for one pair


@dataclass
class PastAudit:
    """Result of the audit of a pair on one kind of batch.

    Attributes:
        fingerprint: a fingerprint of the pair, which is audited again once this differs.
        sites: the sites of the pair.
        stacking: reason why particles cannot be stacked; empty if they can be, None if that was not tested.
    """

    fingerprint: Fingerprint
    sites: Sites
    stacking: str | None = None


_past: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


class _Absent:
    """Key in the place of a model or a guide that is None, which cannot be referred to weakly."""


ABSENT = _Absent()


def likelihood_notes(model: Any, guide: Any, batch: Batch, guide_batch: Batch | None = None) -> tuple[str, ...]:
    """Return remarks on a likelihood of a batch, if the pair was audited on its kind of batch.

    Args:
        model, guide: the pair.
        batch: the rows.
        guide_batch: the same rows as the guide saw them, if that is another batch.
    """
    known = past_audits(model, guide).get(kind_of_batch(batch, guide_batch, False))
    if known is None:
        return ()
    grey = [
        name
        for name, support in known.sites.supports.items()
        if support.bits and name in batch and batch.holds(name) and _has_fractions(batch, name)
    ]
    present = {n: s for n, s in known.sites.supports.items() if n in batch and batch.presence(n) is not False}
    left = [n for n in known.sites.unobserved if batch.presence(n) is not False and n not in known.sites.read]
    return (
        *(f"{name} is in these rows, and the story does not observe it" for name in left),
        *(f"{name} has values between 0 and 1: under a Bernoulli this is no likelihood of bits" for name in grey),
        *(
            f"{name} has a density: of dequantised levels, less log(levels) per dimension, a lower bound of their "
            "log-probability"
            for name, support in present.items()
            if isinstance(support.other, OffGrid)
        ),
        *(
            f"{name} has probabilities of {support.other.levels} levels: the dequantisation noise is a latent"
            for name, support in present.items()
            if isinstance(support.other, OnGrid)
        ),
    )


def _has_fractions(batch: Batch, name: str) -> bool:
    """Return True if some values of a modality lie strictly between 0 and 1."""
    column = batch[name]
    present = batch.presence(name)
    if not isinstance(column, StoredColumn):
        return has_fractions(column, present)
    found: bool = column.fact("fractions", lambda: any(has_fractions(x, present) for _, x in column.blocks()))
    return found


def modalities_read(model: Any, guide: Any, batch: Batch, guide_batch: Batch | None = None) -> frozenset[str]:
    """Return the modalities whose values the story reads, if the pair was audited on the batch's kind.

    Args:
        model, guide: the pair.
        batch: the rows.
        guide_batch: the same rows as the guide saw them, if that is another batch.
    """
    known = past_audits(model, guide).get(kind_of_batch(batch, guide_batch, False))
    return frozenset() if known is None else known.sites.read


def past_audits(model: Any, guide: Any) -> dict[Hashable, PastAudit]:
    """Return kind of batch -> :class:`PastAudit` of a pair, a dictionary to add to, which lives as long as the pair.

    It is empty, and forgotten, for callables that cannot be referred to weakly.
    """
    keys = [ABSENT if f is None else getattr(f, "__func__", f) for f in (model, guide)]
    owners = tuple(id(getattr(f, "__self__", None)) for f in (model, guide))
    try:
        of_guide = _past.setdefault(keys[0], weakref.WeakKeyDictionary()).setdefault(keys[1], {})
        if len(of_guide) >= MOST_AUDITS and owners not in of_guide:
            of_guide.clear()  # of methods of as many objects, most of which do not live any more
        audits: dict[Hashable, PastAudit] = of_guide.setdefault(owners, {})
        return audits
    except TypeError:  # a callable that cannot be referred to weakly
        return {}


def kind_of_batch(batch: Batch, guide_batch: Batch | None, hides: bool) -> Hashable:
    """Return all properties of a batch that the result of an audit depends on, except its values.

    Args:
        batch: the rows.
        guide_batch: the same rows as the guide sees them, if that is another batch.
        hides: True if modalities that rows have will be hidden from the pair.
    """

    def presence(name: str) -> Any:
        mask = batch.presence(name)
        return mask if isinstance(mask, bool) else None

    held = tuple(
        (n, presence(n), (batch[n].shape[1:], batch[n].dtype) if batch.holds(n) else None) for n in batch.names
    )
    more = tuple((n, x.shape[1:], x.dtype) for n, x in batch.covariates.items())
    shown = None if guide_batch is None or guide_batch is batch else kind_of_batch(guide_batch, None, hides)
    lengths = tuple((name, has_padding(batch, name)) for name in batch.lengths)
    return (held, more, lengths, hides, shown)
