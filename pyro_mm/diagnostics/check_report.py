"""Report of a check of a pair, as text: tables, and findings in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from ..evidence.evidence import LARGE_STANDARD_ERROR, PARETO_K_THRESHOLD, Evidence
from ..scoring.audit.sites import Sites
from ..utils.text import align_columns, plus_minus, wrap_remark
from .bound_gap import Gap, ObjectiveValue
from .gradient_noise import GradientNoise, GroupNoise
from .html import check_html
from .site_checks import site_findings

MANY_DOUBTFUL = 0.1  # proportion of doubtful rows above which there is a finding
LOW_SNR = 0.1  # signal-to-noise ratio of a gradient below which there is a finding
NO_NOISE = 1e4  # ratio above which noise is rounding error
MAX_GROUPS = 24  # parts of a gradient that are printed


@dataclass(frozen=True)
class Check:
    """Result of :func:`check`: ``print`` shows a report.

    Attributes:
        rows: number of rows, N.
        sites: latent sites, observed sites, and mistakes in them.
        objective: the estimator and what the objective bounds, in words.
        gap: gap of the objective; None if it bounds no sum of log-evidences, for the reason in ``remark``.
        elbo: gap of the plain ELBO, which is the mean over rows of KL(q(z | x) || p(z | x)).
        evidence: quantity -> per-row log-likelihood of everything that is present, and of each modality alone.
        gradients: signal and noise of the gradient, by part of model and guide.
        errors: what could not be evaluated -> the exception.
        findings: sentences, the most serious first.
        remark: reason why there is no gap; empty if there is one.
        value: estimates of the objective and of its terms; None if it could not be evaluated.
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
    value: ObjectiveValue | None = field(default=None)

    def _repr_html_(self) -> str:
        return check_html(self)

    def __repr__(self) -> str:
        sections = [
            f"Check of {self.rows} rows",
            _sites_text(self.sites),
            _gap_text(self),
            _value_text(self),
            _evidence_text(self),
            _gradient_text(self.gradients) if self.gradients is not None else "",
        ]
        findings = [wrap_remark(f"{i}. ", text) for i, text in enumerate(self.findings, 1)] or ["  none"]
        return "\n\n".join([*filter(None, sections), "\n".join(["Findings", *findings])])


# -- sections -------------------------------------------------------------------------------------------------------


def _sites_text(sites: Sites) -> str:
    """List the sites by kind."""
    modalities = tuple(n for n in sites.observed if n not in (*sites.unheld, *sites.unmasked))
    lines = {
        "latents": sites.model,
        "modalities": modalities,
        "summed out": sites.summed_out,
        "from the prior": sites.from_prior,
        "in the guide only": sites.guide_only,
        "not in the batch": sites.unheld,
        "without a mask": sites.unmasked,
        "never observed": sites.unobserved,
    }
    lines = {label: names for label, names in lines.items() if names}
    width = max(map(len, lines), default=0)
    return "\n".join(["Sites", *(f"  {label.ljust(width)}  {', '.join(names)}" for label, names in lines.items())])


def _gap_text(found: Check) -> str:
    """Show bounds, log-evidences and gaps as a table, and what the objective bounds."""
    rows = []
    for name, gap in (("training objective", found.gap), ("plain ELBO", found.elbo)):
        if gap is not None:
            numbers = ((gap.bound, gap.bound_error), (gap.evidence, gap.evidence_error), (gap.value, gap.error))
            rows.append([name, *(plus_minus(*n) for n in numbers)])
    lines = [align_columns(["Bounds, nats per row", "bound", "log-evidence", "gap"], rows)] if rows else ["Bounds"]

    remark = f", {found.remark}" if found.remark else ""
    lines.append(wrap_remark("training objective: ", f"{found.objective}{remark}"))
    if found.gap is not None and found.gap.rows < found.rows:
        lines.append(
            f"  bound and gap of the training objective: over the {found.gap.rows} rows that its bound holds for"
        )
    if found.elbo is not None and not found.sites.guide_only:
        lines.append("  The gap of the plain ELBO is the mean of KL(q(z | x) || p(z | x)).")
    return "\n".join(lines)


def _value_text(found: Check) -> str:
    """Show the terms of an objective of several, and the value of one that has no gap."""
    if found.value is None:
        return ""
    terms = found.value.by_term
    rows = [[label, plus_minus(*term)] for label, term in terms.items()] if len(terms) > 1 or not found.gap else []
    if found.gap is None:
        rows.insert(0, ["training objective", plus_minus(*found.value.total)])
    return align_columns(["Values per row (higher is better)", "value"], rows) if rows else ""


def _evidence_text(found: Check) -> str:
    """Show log-likelihoods and their diagnostics as a table."""
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
    fitted = any(e.gradients for e in found.evidence.values())
    title = "Proposal fitted to each row" if fitted else "Guide as a proposal"
    return align_columns([title, "nats per row", "median ESS", "doubtful rows"], rows) if rows else ""


def _gradient_text(gradients: GradientNoise) -> str:
    """Show signal and noise of the gradient as a table, the noisiest parts only if there are many."""
    groups = list(gradients.groups)
    hidden = len(groups) - MAX_GROUPS
    if hidden > 0:
        groups = sorted(groups, key=lambda g: -1.0 if math.isnan(g.snr) else g.snr)[:MAX_GROUPS]
    rows = [[g.name, _snr_text(g), f"{g.signal:.1e}", f"{g.noise:.1e}", f"{g.size}"] for g in groups]

    if rows:
        at_step = "" if gradients.step is None else f" at step {gradients.step}"
        title = f"Gradient{at_step}, {gradients.repeats} draws on these rows"
        lines = [align_columns([title, "signal / noise", "signal", "noise", "entries"], rows)]
        if hidden > 0:
            lines.append(f"  and {hidden} more, of larger ratios")
        lines.append("  Signal: norm of the mean gradient. Noise: root mean square distance of a draw from it.")
        lines.append("  Both are of the loss in nats per row. Entries: scalar parameters.")
    else:
        lines = ["Gradient", "  no parameter requires a gradient"]
    if gradients.frozen:
        lines.append(f"  Frozen: {_summarize_names(gradients.frozen)}.")
    return "\n".join(lines)


def _snr_text(group: GroupNoise) -> str:
    """Format a signal-to-noise ratio, or the reason that there is none."""
    if math.isnan(group.snr):
        return "no gradient" if group.signal == group.noise == 0 else "not finite"
    return "no noise" if group.snr > NO_NOISE else f"{group.snr:.2f}"


def _doubtful_proportion(evidence: Evidence) -> float:
    """Return the proportion of rows whose estimate is doubtful."""
    return evidence.doubtful[evidence.counted].float().mean().item()


def _summarize_names(names: tuple[str, ...], limit: int = 8) -> str:
    """List names of tensors, with one entry and a count for all layers of a network."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        layer = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        # a name with a space, such as "closure (3,)", is of a tensor in no module
        network = name if " " in name else ".".join(parts[:layer]) or name
        counts[network] = counts.get(network, 0) + 1
    texts = [f"{name} ({count} tensors)" if count > 1 else name for name, count in counts.items()]
    return ", ".join(texts[:limit]) + (f" and {len(texts) - limit} more" if len(texts) > limit else "")


# -- findings -------------------------------------------------------------------------------------------------------


def findings(
    found: Check, per_row: bool | None, pairing_error: str, missing_gradient_reason: str
) -> Iterator[tuple[int, str]]:
    """Yield (rank, sentence) for each finding; a lower rank is more serious.

    Args:
        found: the check, without its findings.
        per_row: True if the estimator is one of :mod:`pyro_mm.estimators`, False if it is one of Pyro's, None if there
            is none.
        pairing_error: reason why one of Pyro's estimators is wrong for the pair; empty if it is not.
        missing_gradient_reason: reason why some parameters have no gradient.
    """
    for text in _failures(found, pairing_error):
        yield 0, text
    yield from site_findings(found.sites, per_row)
    if text := _doubtful_text(found):
        yield 4, text
    if found.gradients is not None:
        yield from _gradient_findings(found.gradients, missing_gradient_reason)


def _doubtful_text(found: Check) -> str:
    """Name the quantities with many doubtful rows; empty if there are none."""
    proportions = {e.quantity: _doubtful_proportion(e) for e in found.evidence.values()}
    many = sorted(((p, quantity) for quantity, p in proportions.items() if p > MANY_DOUBTFUL), reverse=True)
    if not many:
        return ""
    quantities = ", ".join(f"{p:.0%} in {quantity}" for p, quantity in many)
    reason = f"k-hat above {PARETO_K_THRESHOLD} or a standard error above {LARGE_STANDARD_ERROR} nats"
    fitted = any(e.gradients for e in found.evidence.values())
    cause = "Even a fitted proposal is poor there" if fitted else "The guide is a poor proposal there"
    remedy = "" if fitted else ' With proposal="fitted" one is fitted to each row.'
    return (
        f"Estimates of many rows are doubtful, with {reason}: {quantities}. {cause}; likelihoods and gaps are more "
        f"likely too low than too high.{remedy}"
    )


def _gradient_findings(gradients: GradientNoise, missing_gradient_reason: str) -> Iterator[tuple[int, str]]:
    """Yield (rank, sentence) for parameters without a usable gradient."""
    if gradients.nonfinite:
        yield 0, f"The gradient is not finite: {_summarize_names(gradients.nonfinite)}."
    if gradients.unused:
        text = f"No gradient reaches {_summarize_names(gradients.unused)}: fit would raise an error."
        yield 2, f"{text} {missing_gradient_reason}".rstrip()
    if gradients.zero:
        yield 2, f"The gradient is exactly zero, in every draw, for {_summarize_names(gradients.zero)}."
    if quiet := [group.name for group in gradients.groups if group.snr < LOW_SNR]:
        text = f"The gradient is mostly noise, with a signal-to-noise ratio below {LOW_SNR:g}: {', '.join(quiet)}."
        hint = "This is expected near an optimum; far from one, more rows, more particles or another estimator help."
        yield 5, f"{text} {hint}"


def _failures(found: Check, pairing_error: str) -> Iterator[str]:
    """Yield what could not be evaluated, what is not finite, and bounds above what they bound."""
    reasons: dict[str, list[str]] = {}
    for what, error in found.errors.items():
        reasons.setdefault(_error_text(error), []).append(what)
    for text, names in reasons.items():
        yield f"Not evaluated: {', '.join(names)}. {text[0].upper() + text[1:]}"
    if pairing_error:
        yield f"{pairing_error[0].upper() + pairing_error[1:]}."
    for e in found.evidence.values():
        if lost := int((~e.log_prob.isfinite()).sum()):
            yield f"{e.quantity} is not finite in {lost} of {len(e)} rows."
    for name, gap in (("objective", found.gap), ("ELBO", found.elbo)):
        if gap is not None and gap.value < -max(3 * gap.error, 1e-6 * abs(gap.evidence)):
            excess = f"{-gap.value:.3f} ± {gap.error:.3f} nats per row"
            yield f"The {name} exceeds the log-evidence by {excess}: it is no bound, or the log-evidence is too low."


def _error_text(error: Exception) -> str:
    """Return the first line of an exception's message, with its notes."""
    first_line = str(error).split("\n")[0]
    text = first_line if isinstance(error, ValueError) and str(error) else f"{type(error).__name__}: {error}"
    return ". ".join([text, *getattr(error, "__notes__", [])])
