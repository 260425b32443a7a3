"""Names of log-likelihoods, and the rows that have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..distributions.token_sequence import ends_before
from ..scoring.audit.past_audits import likelihood_notes, modalities_read
from ..scoring.program import Program
from ..scoring.structure import pair_structure
from .evidence import Evidence


def quantity_name(model: Program, guide: Program, batch: Batch, guide_batch: Batch | None = None) -> str:
    """Return the name of the log-likelihood that is estimated, such as ``"log p(image | label)"``.

    Before the bar are the modalities that are present in some row and observed by the story, and the sites that it
    observes besides modalities; after the bar those that it reads and does not observe.

    Args:
        model, guide: callables of a batch.
        batch: the rows that are scored.
        guide_batch: the same rows as the guide sees them; ``batch`` by default.
    """
    structure = pair_structure(model, guide, batch if guide_batch is None else guide_batch)
    present = [name for name in batch.names if batch.presence(name) is not False]
    observed = [name for name in present if name in structure.modalities]
    read = modalities_read(model, guide, batch, guide_batch) if observed != present else frozenset()
    given = [name for name in present if name in read and name not in structure.modalities]
    scored = ", ".join([*observed, *sorted(structure.factors)])
    return f"log p({scored}{' | ' if given else ''}{', '.join(given)})"


def name_quantity(
    evidence: Evidence, model: Program, guide: Program, batch: Batch, guide_batch: Batch | None = None
) -> Evidence:
    """Return an evidence with its quantity's name, the rows that means are over, and the audit's notes.

    Args:
        evidence: of the rows of ``batch``.
        model, guide, batch, guide_batch: as in :func:`quantity_name`.
    """
    quantity = quantity_name(model, guide, batch, guide_batch)
    modalities = pair_structure(model, guide, batch if guide_batch is None else guide_batch).modalities
    observed = [name for name in batch.names if name in modalities and batch.presence(name) is not False]
    rows = batch.having(observed) if observed else batch.having()
    notes = (*likelihood_notes(model, guide, batch, guide_batch), *notes_on_shared(model, guide, batch, guide_batch))
    steps = None if _observes_more(model, guide, batch, guide_batch) else scored_steps(model, guide, batch, observed)
    return restrict_means(replace(evidence, quantity=quantity, notes=notes, steps=steps), rows)


def scored_steps(model: Program, guide: Program, batch: Batch, names: Sequence[str]) -> Tensor | None:
    """Return the number of valid steps of some sequences in each row, integers ``(N,)``; None if not all have lengths.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        names: modalities that the story observes.
    """
    strings = pair_structure(model, guide, batch).strings
    total = torch.zeros(batch.size, dtype=torch.long, device=batch.device)
    for name in names:
        end = strings.get(name)
        if name in batch.lengths and (name in strings or not batch.has_end_marks):
            steps = batch.lengths[name]
        elif end is not None:
            blocks = [ends_before(block[name].long(), end) for block in batch.read_blocks()]
            steps = (torch.cat(blocks) == 0).sum(-1)
        elif name in strings:
            steps = torch.full_like(total, batch[name].shape[1])
        else:
            return None
        total = total + torch.where(batch.present[name], steps, 0)
    return total if names else None


def _observes_more(model: Program, guide: Program, batch: Batch, guide_batch: Batch | None) -> bool:
    """Return True if the story observes sites that are no modalities, such as a ``pyro.factor``."""
    return bool(pair_structure(model, guide, batch if guide_batch is None else guide_batch).factors)


def notes_on_shared(model: Program, guide: Program, batch: Batch, guide_batch: Batch | None = None) -> tuple[str, ...]:
    """Return a remark on a likelihood given draws of latents that all rows share, if there are such latents."""
    structure = pair_structure(model, guide, batch if guide_batch is None else guide_batch)
    if not structure.global_latents:
        return ()
    names = ", ".join(map(repr, sorted(structure.global_latents)))
    return (f"p of a row is its mean over draws of {names}, which all rows share, from the guide",)


def restrict_means(evidence: Evidence, rows: Tensor) -> Evidence:
    """Return an evidence whose means are over some rows, boolean ``(N,)``: those that have the quantity."""
    return replace(evidence, counts=None if bool(rows.all()) else rows)


def conditional_evidence(
    joint: Evidence, marginal: Evidence, rows: Tensor, quantity: str, steps: Tensor | None = None
) -> Evidence:
    """Return the difference of two estimates in rows with a target, and exactly 0 in others, which means leave out.

    Args:
        joint: log p(target, given).
        marginal: log p(given).
        rows: the rows that have a target, boolean ``(N,)``.
        quantity: the name of the difference.
        steps: the valid steps of the targets in each row, ``(N,)``; None if they are not sequences alone.
    """
    difference = joint - marginal

    def zero_elsewhere(x: Tensor) -> Tensor:
        return torch.where(rows, x, torch.zeros_like(x))

    return replace(
        difference,
        log_prob=zero_elsewhere(difference.log_prob),
        standard_error=zero_elsewhere(difference.standard_error),
        ess=torch.where(rows, difference.ess, float(joint.num_particles)),
        pareto_k=zero_elsewhere(difference.pareto_k),
        quantity=quantity,
        num_particles=joint.num_particles,
        running={
            k: (zero_elsewhere(log_prob), zero_elsewhere(error)) for k, (log_prob, error) in difference.running.items()
        },
        counts=None if bool(rows.all()) else rows,
        shared=tuple(torch.where(rows, deviations, 0.0) for deviations in difference.shared),
        steps=steps,
    )
