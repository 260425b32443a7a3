"""Audit a pair before an evaluation: refuse mistakes that would give a number all the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...batch.batch import Batch
from ...utils.reachable import ReachableObjects
from ..term_pair import UNBROADCAST
from .collect_sites import collect_sites
from .few_rows import few_rows, without_side_effects
from .past_audits import MOST_AUDITS, PastAudit, kind_of_batch, past_audits
from .sites import Sites
from .stacking import stacking_problem
from .value_supports import unscored_values

HOW_TO_SWITCH_OFF = "Pass audit=False to go on all the same."


def audit(
    model: Callable[[Batch], Any] | None,
    guide: Callable[[Batch], Any] | None,
    batch: Batch,
    *,
    targets: Sequence[str] = (),
    givens: Sequence[str] = (),
    stacked: bool = False,
    hides: bool = False,
    draws: bool = False,
    guide_batch: Batch | None = None,
) -> Sites:
    """Refuse a pair whose sites, shapes, supports or networks would give wrong numbers on a batch.

    The pair is run on a few rows, once per kind of batch: the names, types and shapes of what it holds, and what is
    missing in all, some or no rows. It is run again once a module, a function or a number that it refers to has
    changed. Values are compared with the support of their distribution in all rows, once per tensor.

    Args:
        model, guide: callables of a batch; None for one that is not run.
        batch: N rows, on any device.
        targets, givens: modalities x_T and x_G of a conditional likelihood log p(x_T | x_G).
        stacked: True if particles or terms will stand to the left of the rows.
        hides: True if modalities that rows have will be hidden from the pair.
        draws: True if draws of the guide are returned.
        guide_batch: the same rows as the guide sees them, if that is another batch.

    Returns:
        The sites of the pair.

    Raises:
        ValueError, TypeError: the mistakes, with what mends them.
    """
    programs = {name: f for name, f in (("model", model), ("guide", guide)) if f is not None}
    reached = ReachableObjects(programs)
    known = _audit_sites(model, guide, batch, guide_batch, reached, hides)
    wrong = list(known.sites.refusals(batch, targets, givens, hides, draws))
    wrong = wrong or unscored_values(batch, known.sites.supports)
    if wrong:
        raise ValueError(audit_text(wrong))
    if stacked and model is not None and guide is not None:
        if known.stacking is None:
            with without_side_effects(reached, programs):
                known.stacking = stacking_problem(model, guide, *few_rows(batch, guide_batch, reached))
        if known.stacking:
            error = ValueError(f"{known.stacking} {HOW_TO_SWITCH_OFF}")
            error.add_note(UNBROADCAST)
            raise error
    return known.sites


def audit_text(texts: Sequence[str]) -> str:
    """Return one message of all mistakes, numbered if there are several, and how to switch the audit off."""
    if len(texts) == 1:
        return f"{texts[0]} {HOW_TO_SWITCH_OFF}"
    return "\n".join([*(f"{i}. {text}" for i, text in enumerate(texts, 1)), HOW_TO_SWITCH_OFF])


def _audit_sites(
    model: Any, guide: Any, batch: Batch, guide_batch: Batch | None, reached: ReachableObjects, hides: bool
) -> PastAudit:
    """Return the past audit of a pair on this kind of batch, made anew if there is none or the pair has changed."""
    audits = past_audits(model, guide)
    fingerprint = reached.fingerprint()
    kind = kind_of_batch(batch, guide_batch, hides)
    known = audits.get(kind)
    if known is None or known.fingerprint != fingerprint:
        programs = {name: f for name, f in (("model", model), ("guide", guide)) if f is not None}
        with without_side_effects(reached, programs):
            known = PastAudit(fingerprint, collect_sites(model, guide, *few_rows(batch, guide_batch, reached), hides))
        if len(audits) >= MOST_AUDITS:
            audits.clear()
        audits[kind] = known
    return known
