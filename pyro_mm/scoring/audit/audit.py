"""The audit of a pair: mistakes in its sites, shapes, supports and networks that would give a number all the same."""

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
    seen: Batch | None = None,
) -> Sites:
    """Run a pair on a few rows, once for each kind of batch, and refuse what would give wrong numbers.

    A kind of batch is given by the names, the types and the shapes of what it holds, and by what is missing in all,
    some or no rows. What is known is found again once a module, a function or a number that the pair refers to has
    changed. Values are checked against the support of their distributions in all rows, once for each tensor.

    Args:
        model, guide: callables of a batch; None for one that is not run.
        batch: N rows, on any device.
        targets, givens: modalities of which a conditional likelihood is asked for, and given which.
        stacked: whether particles or terms will stand to the left of the rows.
        hides: whether modalities that rows have will be hidden from the pair.
        draws: whether the guide's draws are asked for.
        seen: the same rows as the guide is shown them, where that is another batch.

    Returns:
        The sites.

    Raises:
        ValueError, TypeError: what is amiss and what mends it.
    """
    programs = {name: f for name, f in (("model", model), ("guide", guide)) if f is not None}
    reached = ReachableObjects(programs)
    known = _audit_sites(model, guide, batch, seen, reached, hides)
    wrong = list(known.sites.refusals(batch, targets, givens, hides, draws))
    wrong = wrong or unscored_values(batch, known.sites.supports)
    if wrong:
        raise ValueError(audit_text(wrong))
    if stacked and model is not None and guide is not None:
        if known.stacks is None:
            with without_side_effects(reached, programs):
                known.stacks = stacking_problem(model, guide, *few_rows(batch, seen, reached))
        if known.stacks:
            error = ValueError(f"{known.stacks} {HOW_TO_SWITCH_OFF}")
            error.add_note(UNBROADCAST)
            raise error
    return known.sites


def audit_text(texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return f"{texts[0]} {HOW_TO_SWITCH_OFF}"
    return "\n".join([*(f"{i}. {text}" for i, text in enumerate(texts, 1)), HOW_TO_SWITCH_OFF])


def _audit_sites(
    model: Any, guide: Any, batch: Batch, seen: Batch | None, reached: ReachableObjects, hides: bool
) -> PastAudit:
    remembered, fingerprint = past_audits(model, guide), reached.fingerprint()
    kind = kind_of_batch(batch, seen, hides)
    known = remembered.get(kind)
    if known is None or known.fingerprint != fingerprint:
        programs = {name: f for name, f in (("model", model), ("guide", guide)) if f is not None}
        with without_side_effects(reached, programs):
            known = PastAudit(fingerprint, collect_sites(model, guide, *few_rows(batch, seen, reached), hides))
        if len(remembered) >= MOST_AUDITS:
            remembered.clear()
        remembered[kind] = known
    return known
