"""The report of a check of a pair, as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..estimators import PerRow
from ..evidence.evidence import LARGE_STANDARD_ERROR, PARETO_K_THRESHOLD, Evidence
from ..objectives.bounds import Target
from ..scoring.audit.sites import Sites
from ..utils.text import align_columns, plus_minus, wrap_remark
from .bound_gap import Gap
from .gradient_noise import GradientNoise
from .site_checks import site_findings

MANY_DOUBTFUL = 0.1  # the share of doubtful rows that is worth a remark


MAX_GROUPS = 24  # parts of a gradient that are printed


LOW_SNR = 0.1  # the signal-to-noise ratio below which a gradient is


@dataclass(frozen=True)
class Check:
    """Result of :func:`check`; printed, a report.

    Attributes:
        rows: N.
        sites: latent and observed sites, and what is amiss with them (:class:`~pyro_mm.scoring.audit.sites.Sites`).
        objective: the estimator and what the objective bounds, in words.
        gap: of the objective; None where it bounds no sum of log-evidences, for which ``remark`` has the reason.
        elbo: the gap of the plain ELBO, the mean over rows of KL(q(z | x) || p(z | x)).
        evidence: of everything that is present, and of each modality alone, by quantity.
        gradients: signal and noise of the gradient, by part of model and guide.
        errors: what could not be evaluated, with the exception that says why.
        findings: in words, most serious first.
    """

    rows: int
    sites: Sites
    objective: str
    gap: Gap | None
    elbo: Gap | None
    evidence: Mapping[str, Evidence]
    gradients: GradientNoise | None
    errors: Mapping[str, Exception]
    findings: tuple[str, ...]
    remark: str = ""

    def __repr__(self) -> str:
        parts = [_sites_text(self), _gap_text(self), _evidence_text(self), _gradient_text(self)]
        findings = [wrap_remark(f"{i}. ", text) for i, text in enumerate(self.findings, 1)] or ["  nothing to remark"]
        return "\n\n".join([f"Check of {self.rows} rows", *filter(None, parts), "\n".join(["Findings", *findings])])


def objective_text(objective: Any, estimator: Any, target: Target | None) -> str:
    text = repr(estimator) if isinstance(estimator, PerRow) else type(estimator).__name__
    return f"{text}; {target or 'a bound on nothing that is known here'}"


def _sites_text(found: Check) -> str:
    sites = found.sites
    lines = {
        "latents": sites.model,
        "modalities": tuple(n for n in sites.observed if n not in (*sites.unheld, *sites.unmasked)),
        "summed out": sites.summed_out,
        "from the prior": sites.from_prior,
        "in the guide only": sites.guide_only,
        "not in the batch": sites.unheld,
        "without a mask": sites.unmasked,
        "never observed": sites.unobserved,
    }
    width = max(len(name) for name, those in lines.items() if those) if any(lines.values()) else 0
    return "\n".join(
        ["Sites", *(f"  {name.ljust(width)}  {', '.join(those)}" for name, those in lines.items() if those)]
    )


def _gap_text(found: Check) -> str:
    rows = []
    for name, gap in (("training objective", found.gap), ("plain ELBO", found.elbo)):
        if gap is not None:
            numbers = ((gap.bound, gap.bound_error), (gap.evidence, gap.evidence_error), (gap.value, gap.error))
            rows.append([name, *(plus_minus(*n) for n in numbers)])
    lines = [align_columns(["Bound, nats a row", "bound", "evidence", "gap"], rows)] if rows else ["Bound"]
    lines.append(f"  objective: {found.objective}" + (f", {found.remark}" if found.remark else ""))
    if found.gap is not None and found.gap.rows < found.rows:
        lines.append(f"  training objective: over the {found.gap.rows} rows that its bound holds for")
    if found.elbo is not None and not found.sites.guide_only:
        lines.append("  the gap of the plain ELBO is the mean of KL(q(z | x) || p(z | x))")
    return "\n".join(lines)


def _evidence_text(found: Check) -> str:
    rows = [
        [
            e.quantity if e.counts is None else f"{e.quantity}, {e.rows_text}",
            plus_minus(*e.mean()),
            f"{e.ess[e.counted].median().item():.0f} of {e.num_particles}",
            f"{_doubtful_proportion(e):.1%}",
        ]
        for e in found.evidence.values()
        if bool(e.counted.any())
    ]
    return align_columns(["Guide as a proposal", "nats a row", "median ESS", "doubtful rows"], rows) if rows else ""


def _gradient_text(found: Check) -> str:
    if found.gradients is None:
        return ""
    groups, more = list(found.gradients.groups), len(found.gradients.groups) - MAX_GROUPS
    if more > 0:
        groups = sorted(groups, key=lambda g: g.snr if g.snr == g.snr else -1.0)[:MAX_GROUPS]
    rows = [[g.name, _ratio(g), f"{g.signal:.1e}", f"{g.noise:.1e}", f"{g.size}"] for g in groups]
    header = [
        f"Gradient, {found.gradients.repeats} draws on these rows",
        "signal / noise",
        "signal",
        "noise",
        "entries",
    ]
    text = align_columns(header, rows) if rows else "Gradient\n  no parameter wants one"
    text += f"\n  and {more} more, of larger ratios" if more > 0 else ""
    text += "\n  norms of the mean gradient and of one draw's departure from it, in nats a row" if rows else ""
    frozen = found.gradients.frozen
    return text + (f"\n  frozen: {_summarize_names(frozen)}" if frozen else "")


def _ratio(group: Any) -> str:
    if math.isnan(group.snr):
        return "no gradient" if group.signal == group.noise == 0 else "not finite"
    return "no noise" if group.snr > 1e4 else f"{group.snr:.2f}"


def _doubtful_proportion(evidence: Evidence) -> float:
    return evidence.doubtful[evidence.counted].float().mean().item()


def _summarize_names(names: tuple[str, ...], limit: int = 8) -> str:
    """The names, those of one module as the module's."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        layer = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        short = name if " " in name else ".".join(parts[:layer]) or name  # names with a space are of no module
        counts[short] = counts.get(short, 0) + 1
    each = [f"{name} ({count} tensors)" if count > 1 else name for name, count in counts.items()]
    return ", ".join(each[:limit]) + (f" and {len(each) - limit} more" if len(each) > limit else "")


def findings(found: Check, per_row: bool, clash: str, why: str) -> Iterator[tuple[int, str]]:
    """What a reader should know, each with its rank: lower ones are more serious."""
    yield from ((0, text) for text in _failures(found, clash))
    yield from site_findings(found.sites, per_row)
    proportions = {e.quantity: _doubtful_proportion(e) for e in found.evidence.values()}
    doubts = sorted(((p, quantity) for quantity, p in proportions.items() if p > MANY_DOUBTFUL), reverse=True)
    if doubts:
        those = ", ".join(f"{share:.0%} in {quantity}" for share, quantity in doubts)
        text = (
            f"Many rows are doubtful, their k-hat above {PARETO_K_THRESHOLD} or standard error above "
            f"{LARGE_STANDARD_ERROR}: {those}. "
        )
        yield (
            4,
            text
            + "The guide is a poor proposal there, and likelihoods and gaps are more likely too low than too high.",
        )
    if found.gradients is None:
        return
    gradients = found.gradients
    if gradients.nonfinite:
        yield 0, f"The gradient is not finite: {_summarize_names(gradients.nonfinite)}."
    if gradients.unused:
        yield 2, f"No gradient reaches {_summarize_names(gradients.unused)}, and fit would raise. {why}"
    if gradients.zero:
        yield 2, f"The gradient is exactly zero, in every draw, for {_summarize_names(gradients.zero)}."
    if quiet := tuple(group.name for group in gradients.groups if group.snr < LOW_SNR):
        those = ", ".join(quiet)
        text = f"Little of the gradient is signal, less than {LOW_SNR:g} of its noise: {those}. Near an optimum "
        yield 5, text + "that is as it should be; far from one, more rows, more particles or another estimator help."


def _failures(found: Check, clash: str) -> Iterator[str]:
    reasons: dict[str, list[str]] = {}
    for what, error in found.errors.items():
        text = (
            str(error).split("\n")[0]
            if isinstance(error, ValueError) and str(error)
            else f"{type(error).__name__}: {error}"
        )
        reasons.setdefault(". ".join([text, *getattr(error, "__notes__", [])]), []).append(what)
    for text, those in reasons.items():
        yield f"Not evaluated: {', '.join(those)}. {text[0].upper() + text[1:]}"
    if clash:
        yield clash[0].upper() + clash[1:] + "."
    for e in found.evidence.values():
        if lost := int((~e.log_prob.isfinite()).sum()):
            yield f"{e.quantity} is not finite in {lost} of {len(e)} rows."
    for name, gap in (("objective", found.gap), ("ELBO", found.elbo)):
        if gap is not None and gap.value < -max(3 * gap.error, 1e-6 * abs(gap.evidence)):
            by = f"{-gap.value:.3f} ± {gap.error:.3f} nats a row"
            yield f"The {name} exceeds what it bounds, by {by}: no bound of this story, or the evidence is too low."
