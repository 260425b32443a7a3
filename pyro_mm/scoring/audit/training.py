"""The audit of a pair before training, and of the minibatches in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...batch.batch import Batch
from ...distributions.support import Support
from ..program_errors import Explained
from .audit import audit, audit_text
from .value_supports import unscored_values

INVALID_VALUES = "found invalid values"  # what torch says of a parameter or a value, and not of a shape


@dataclass
class TrainingAudit:
    """Checks that an audit before training leaves for the minibatches to come.

    Attributes:
        unrunnable: the error of a pair that cannot be run on a few of the training rows, to be raised after the first
            run of the training, which may know more of the reason; None of a pair that can.
        supports: observed modality -> what its distribution scores.
    """

    unrunnable: Explained | None = None
    supports: dict[str, Support] = field(default_factory=dict)

    def check(self, batch: Batch) -> None:
        """Raise a ValueError if a minibatch, which was not at hand before, has values that are not scored."""
        # of a density of all real numbers, infinite ones are left to the watch over the loss
        bounded = {name: support for name, support in self.supports.items() if support != Support(support.family)}
        if wrong := unscored_values(batch, bounded):
            raise ValueError(audit_text(wrong))


def audit_training(
    model: Callable[[Batch], Any], guide: Callable[[Batch], Any], objective: Any, train: Batch, validation: Any = None
) -> TrainingAudit:
    """Audit a pair for training by an objective, with the rows that it is trained and validated on.

    Args:
        model, guide: callables of a batch.
        objective: one with a ``layout``, or a ``pyro.infer.ELBO``.
        train: all rows, or a few where the others are not at hand.
        validation: other rows, or None.

    Returns:
        What is left to be done while the pair is trained.

    Raises:
        ValueError, TypeError: as of :func:`audit`.
    """
    found = TrainingAudit()
    for rows in (train, validation) if validation is not None else (train,):
        if hasattr(objective, "layout"):
            stacked, hides = objective.layout(rows)
        else:
            stacked = getattr(objective, "num_particles", 1) > 1 and getattr(objective, "vectorize_particles", False)
            hides = False
        try:
            sites = audit(model, guide, rows, stacked=stacked, hides=hides)
        except Explained as error:
            if rows is not train:
                raise
            # networks in evaluation mode may give a scale that is not positive, say, and none in training mode
            found.unrunnable = None if INVALID_VALUES in str(error) else error
            break
        if rows is train:
            found.supports = sites.supports
    return found
