"""Names of log-likelihoods, and the rows that have them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..scoring.audit.past_audits import likelihood_notes, modalities_read
from ..scoring.structure import Callback, pair_structure
from .evidence import Evidence


def conditional_evidence(joint: Evidence, marginal: Evidence, some: Tensor, quantity: str) -> Evidence:
    """The difference of two estimates, and exactly 0 in rows where there is nothing of which it is one."""
    found = joint - marginal
    only = lambda x: torch.where(some, x, torch.zeros_like(x))  # noqa: E731
    return Evidence(
        only(found.log_prob),
        only(found.standard_error),
        torch.where(some, found.ess, float(joint.num_particles)),
        only(found.pareto_k),
        quantity,
        joint.num_particles,
        {k: (only(log_prob), only(error)) for k, (log_prob, error) in found.running.items()},
        None if bool(some.all()) else some,
        found.notes,
    )


def restrict_means(found: Evidence, rows: Tensor) -> Evidence:
    """Return an evidence whose means are over some rows, boolean ``(N,)``: those that have what it is of."""
    return replace(found, counts=None if bool(rows.all()) else rows)


def name_quantity(
    found: Evidence, model: Callback, guide: Callback, batch: Batch, seen: Batch | None = None
) -> Evidence:
    """Return an evidence with the name of its quantity, the rows that have it, and what the audit says of it."""
    quantity = quantity_name(model, guide, batch, seen)
    scored = pair_structure(model, guide, batch if seen is None else seen).modalities
    observed = [n for n in batch.names if n in scored and batch.presence(n) is not False]
    rows = batch.having(observed) if observed else batch.having()
    return restrict_means(replace(found, quantity=quantity, notes=likelihood_notes(model, guide, batch, seen)), rows)


def quantity_name(model: Callback, guide: Callback, batch: Batch, seen: Batch | None = None) -> str:
    """Name the log-likelihood of what is present and observed, given what the story reads and does not observe.

    What the model observes besides modalities is named too.
    """
    info = pair_structure(model, guide, batch if seen is None else seen)
    there = [n for n in batch.names if batch.presence(n) is not False]
    observed = [n for n in there if n in info.modalities]
    read = modalities_read(model, guide, batch, seen) if observed != there else frozenset()
    given = [n for n in there if n in read and n not in info.modalities]
    scored = ", ".join([*observed, *sorted(info.factors)])
    return f"log p({scored}{' | ' if given else ''}{', '.join(given)})"
