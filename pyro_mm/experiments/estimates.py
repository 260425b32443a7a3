"""Likelihoods of an experiment, estimated by proposals fitted to each row and by the guide beside them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..evidence.evidence import Evidence

FITTED = "fitted"  # the value of ``proposal=`` that fits a proposal to each row
FITTED_TEXT = "fitted to each row"
BY_GUIDE = ", by the guide"  # follows the name of a quantity


@dataclass(frozen=True)
class Estimates:
    """One likelihood of the same rows by one proposal or by two.

    Attributes:
        evidence: the estimate that is reported.
        by_guide: the estimate with draws of the guide; None if ``evidence`` is that already.
    """

    evidence: Evidence
    by_guide: Evidence | None = None

    @property
    def guide(self) -> Evidence:
        """The estimate with draws of the guide."""
        return self.evidence if self.by_guide is None else self.by_guide

    def columns(self, quantity: str) -> dict[str, float | tuple[float, float]]:
        """Return column -> value of a table: the mean with its error, and the share of rows with k-hat above 0.7."""
        found: dict[str, float | tuple[float, float]] = {
            quantity: self.evidence.mean(),
            "k-hat > 0.7": self.evidence.untrusted(),
        }
        if self.by_guide is not None:
            found[f"{quantity}{BY_GUIDE}"] = self.by_guide.mean()
            found[f"k-hat > 0.7{BY_GUIDE}"] = self.by_guide.untrusted()
        return found


def estimate(likelihood: Callable[..., Evidence], *args: Any, fitted: bool, **options: Any) -> Estimates:
    """Estimate a likelihood with draws of the guide and, if ``fitted``, with proposals fitted to each row.

    Args:
        likelihood: :func:`pyro_mm.log_marginal` or a function of its form.
        args, options: its arguments, ``proposal`` not among them.
        fitted: True to estimate by fitted proposals too, and to report that estimate.
    """
    by_guide = likelihood(*args, **options)
    if not fitted:
        return Estimates(by_guide)
    return Estimates(likelihood(*args, **options, proposal=FITTED), by_guide)


def median_ess(evidence: Evidence) -> float:
    """Return the median effective sample size over the rows that have the quantity; NaN if there are none."""
    counted = evidence.counted
    return evidence.ess[counted].median().item() if bool(counted.any()) else math.nan


def summarize(evidence: Evidence) -> dict[str, float]:
    """Return mean, standard error, share of rows with k-hat above 0.7, and median effective sample size, by name."""
    value, error = evidence.mean()
    return {
        "value": value,
        "standard_error": error,
        "untrusted": evidence.untrusted(),
        "median_ess": median_ess(evidence),
    }
