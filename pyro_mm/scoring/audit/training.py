"""Audit a pair before a training, and the minibatches of the training as they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ...batch.batch import Batch
from ...distributions.support import Support
from ..prepare_objective import prepare_objective
from ..program_errors import ExplainedError
from .audit import audit, audit_text
from .value_supports import unscored_values

INVALID_VALUES = "found invalid values"  # in torch's errors of parameters and values, and not in those of shapes


@dataclass
class TrainingAudit:
    """Result of the audit before a training, with a check of the minibatches to come.

    Attributes:
        unrunnable: error of a pair that cannot be run on a few of the training rows, to be raised after the first run
            of the training, which may know more of the reason; None if the pair can be run.
        supports: observed modality -> support of its distribution.
    """

    unrunnable: ExplainedError | None = None
    supports: dict[str, Support] = field(default_factory=dict)

    def check(self, batch: Batch) -> None:
        """Raise a ValueError if a minibatch has values outside the support of their distribution.

        Infinite values of a density over all real numbers are left to the check of the loss.
        """
        bounded = {name: support for name, support in self.supports.items() if support != Support(support.family)}
        if wrong := unscored_values(batch, bounded):
            raise ValueError(audit_text(wrong))


def audit_training(
    model: Callable[[Batch], Any], guide: Callable[[Batch], Any], objective: Any, train: Batch, validation: Any = None
) -> TrainingAudit:
    """Audit a pair with the rows that it is trained and validated on.

    Args:
        model, guide: callables of a batch.
        objective: anything that :func:`~pyro_mm.scoring.prepare_objective.prepare_objective` takes.
        train: all rows, or the first minibatch if the others are not at hand.
        validation: other rows, or None.

    Returns:
        The result, for the minibatches to come.

    Raises:
        ValueError, TypeError: as :func:`~pyro_mm.scoring.audit.audit.audit` raises.
    """
    found = TrainingAudit()
    prepared = prepare_objective(objective)
    for rows in (train, validation) if validation is not None else (train,):
        layout = prepared.layout(rows)
        try:
            sites = audit(model, guide, rows, stacked=layout.stacked, hides=layout.hides)
        except ExplainedError as error:
            if rows is not train:
                raise
            # networks in evaluation mode may give a scale that is not positive, say, and none in training mode
            found.unrunnable = None if INVALID_VALUES in str(error) else error
            break
        if rows is train:
            found.supports = sites.supports
    return found
