"""Evidence as HTML."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..utils.html import Markup, escape, report, table
from ..utils.text import plus_minus

if TYPE_CHECKING:
    from .evidence import Evidence


def evidence_html(evidence: Evidence) -> str:
    """Return the mean of an evidence with its error and diagnostics, and its summary in words to unfold.

    Args:
        evidence: per-row estimates.
    """
    doubtful = evidence.doubtful & evidence.counted
    untrusted = evidence.untrusted()
    heavy = "unknown" if math.isnan(untrusted) else f"{untrusted:.1%}"
    header = ["quantity", "mean, nats per row", "rows", "K", "median ESS", "k-hat > 0.7", "doubtful rows"]
    ess = evidence.ess[evidence.counted]
    row = [
        evidence.quantity, plus_minus(*evidence.mean()), evidence.rows_text.removesuffix("s").removesuffix(" row"),
        f"{evidence.num_particles}", f"{ess.median().item():.1f}" if len(ess) else "", heavy, f"{int(doubtful.sum())}",
    ]  # fmt: skip
    summary = Markup(f"<details><summary>in words</summary><pre>{escape(evidence.summary())}</pre></details>")
    return report("Evidence", table(header, [row]), *(f"{note}." for note in evidence.notes), summary)
