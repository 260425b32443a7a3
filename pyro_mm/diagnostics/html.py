"""Reports of diagnostics as HTML."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..evidence.evidence import PARETO_K_THRESHOLD
from ..utils.html import Markup, escape, listing, report, table
from ..utils.text import plus_minus

if TYPE_CHECKING:
    from .check_report import Check
    from .comparison import Comparison


def comparison_html(comparison: Comparison) -> str:
    """Return the table of a comparison, best first, with its legend and remarks.

    Args:
        comparison: result of :func:`pyro_mm.compare`.
    """
    header = ["model", "nats per row", "difference", "± rows", "± draws", f"k-hat > {PARETO_K_THRESHOLD}", "K"]
    rows = []
    for c in comparison.candidates:
        difference = [f"{c.difference:+.3f}", *(_number(e) for e in (c.paired_error, c.estimation_error))]
        if c.name == comparison.reference:
            difference = ["reference", "", ""]
        untrusted = "unknown" if math.isnan(c.untrusted) else f"{c.untrusted:.1%}"
        rows.append([c.name, plus_minus(c.mean, c.error), *difference, untrusted, f"{c.num_particles}"])
    legend = (
        "Means over rows ± standard error by the draws; standard errors of the difference by the choice of rows "
        "(paired), and by the draws."
    )
    title = f"{comparison.quantity} of {int(comparison.rows.sum())} rows"
    return report(title, table(header, rows), legend, listing(comparison.remarks()))


def check_html(found: Check) -> str:
    """Return the findings of a check, its log-likelihoods as a table, and the whole report to unfold.

    Args:
        found: result of :func:`pyro_mm.check`.
    """
    findings = listing(found.findings, ordered=True) or "No findings."
    rows = []
    for e in found.evidence.values():
        untrusted = "unknown" if e.few else f"{e.untrusted():.1%}"
        rows.append([e.quantity, plus_minus(*e.mean()), untrusted, f"{e.num_particles}"])
    likelihoods = table(["log-likelihood", "nats per row", f"k-hat > {PARETO_K_THRESHOLD}", "K"], rows) if rows else ""
    bounds = []
    for name, gap in (("training objective", found.gap), ("plain ELBO", found.elbo)):
        if gap is not None:
            numbers = ((gap.bound, gap.bound_error), (gap.evidence, gap.evidence_error), (gap.value, gap.error))
            bounds.append([name, *(plus_minus(*n) for n in numbers)])
    gap_table = table(["bound", "nats per row", "log-evidence", "gap"], bounds) if bounds else ""
    whole = Markup(f"<details><summary>whole report</summary><pre>{escape(repr(found))}</pre></details>")
    return report(f"Check of {found.rows} rows: findings", findings, found.objective, gap_table, likelihoods, whole)


def _number(error: float) -> str:
    """Return a standard error; an unknown one is NaN."""
    return "?" if math.isnan(error) else f"{error:.3f}"
