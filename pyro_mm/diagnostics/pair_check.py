r"""What to look at after writing a story: its sites, the gap of its bound, its guide, and the noise of its gradient."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from .arguments import check_counts, check_programs, check_seed
from .audit import Sites, look
from .batch import Batch
from .bounds import Target
from .comparison import Comparison, compare
from .estimators import PerRow, check_pairing
from .evaluation import check_batch, evaluating
from .evidence import THRESHOLD, WIDE, Evidence
from .export import to_arviz
from .gap import Gap, bound_of, elbo_gap, gap_of, why_no_gap
from .gradients import Gradients, gradient_noise, unchanged
from .likelihood import log_marginal
from .objective import Objective
from .pairs import structure
from .reached import Reached
from .tables import aligned, plus_minus, wrapped
from .training_arguments import check_objective
from .unreached import reasons

__all__ = ["Check", "Comparison", "check", "compare", "to_arviz"]

DOUBTFUL = 0.1  # the share of doubtful rows that is worth a remark
GROUPS = 24  # parts of a gradient that are printed
QUIET = 0.1  # the signal-to-noise ratio below which a gradient is


@dataclass(frozen=True)
class Check:
    """Result of :func:`check`; printed, a report.

    Attributes:
        rows: N.
        sites: latent and observed sites, and what is amiss with them (:class:`~pyro_mm.audit.Sites`).
        objective: the estimator and what the objective bounds, in words.
        gap: of the objective; None where it bounds no sum of log-evidences, for which ``remark`` has the reason.
        elbo: the gap of the plain ELBO, the mean over rows of KL(q(z | x) || p(z | x)).
        evidence: of everything that is present, and of each modality alone, by quantity.
        gradients: signal and noise by part of model and guide (:class:`~pyro_mm.gradients.Gradients`).
        errors: what could not be evaluated, with the exception that says why.
        findings: in words, most serious first.
    """

    rows: int
    sites: Sites
    objective: str
    gap: Gap | None
    elbo: Gap | None
    evidence: Mapping[str, Evidence]
    gradients: Gradients | None
    errors: Mapping[str, Exception]
    findings: tuple[str, ...]
    remark: str = ""

    def __repr__(self) -> str:
        parts = [_sites_text(self), _gap_text(self), _evidence_text(self), _gradient_text(self)]
        findings = [wrapped(f"{i}. ", text) for i, text in enumerate(self.findings, 1)] or ["  nothing to remark"]
        return "\n\n".join([f"Check of {self.rows} rows", *filter(None, parts), "\n".join(["Findings", *findings])])


def check(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    objective: Any,
    batch: Batch,
    *,
    num_particles: int = 1000,
    repeats: int = 20,
    seed: int = 0,
) -> Check:
    r"""Check a story, a guide and an objective on some rows, and report what is amiss.

    * Sites: which latents and modalities model and guide share, which of them lacks one and what comes of it, and who
      reads values of a modality that a row lacks.
    * The gap, :math:`\sum_i w_i \log p(x_{S_i}) - L`, of an objective L that is a lower bound on such a sum, in nats a
      row with its standard error; and that of the plain ELBO, :math:`E_n KL(q(z | x_n) \| p(z | x_n))`. Weights that
      depend on the step are those after any warm-up, of which the bound is spoken.
    * The guide as a proposal: Pareto k-hat and effective sample size (:func:`~pyro_mm.likelihood.log_marginal`) with
      all that is present, and with each modality alone.
    * The signal-to-noise ratio of the gradient by part (:func:`~pyro_mm.gradients.gradient_noise`), and the parameters
      that it never reaches.

    Modules run in evaluation mode, but for the gradient, which is that of training in the mode that they are in. They,
    the objective, ``.grad`` and the generators are left as they are; a ``pyro.param`` that was never run enters Pyro's
    store, as in any run.

    Args:
        model, guide: callables of a batch.
        objective: an :class:`~pyro_mm.objectives.Objective`, or a ``pyro.infer.ELBO``, which bounds log p(x).
        batch: N rows; a few hundred do.
        num_particles: K, of the likelihoods.
        repeats: R, of the gradient.
        seed: of all draws.

    Raises:
        What story and guide themselves raise on these rows. What an objective or a likelihood of them raises is
        reported, and kept in ``errors``.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_objective(objective)
    check_counts(num_particles=num_particles)
    check_counts(2, repeats=repeats)
    check_seed(seed)
    batch = batch._copy(total=None, _index=None)  # these rows are the data: nothing is scaled up to others
    objective, estimator = copy.copy(objective), getattr(objective, "estimator", objective)
    vectorize = getattr(objective, "vectorize", True)
    vectorize = vectorize and (not isinstance(estimator, PerRow) or estimator.vectorize_particles)
    options: dict[str, Any] = {"num_particles": num_particles, "seed": seed, "vectorize": vectorize, "audit": False}
    errors: dict[str, Exception] = {}
    known: dict[frozenset[str], Evidence] = {}

    def evidence(names: frozenset[str]) -> Evidence:
        if names not in known:
            shown = batch.only(*(n for n in batch.names if n in names))
            known[names] = log_marginal(model, guide, shown, **options)
        return known[names]

    def attempt(what: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except Exception as error:  # reported: the story and the guide by themselves have run
            errors[what] = error
            return None

    with unchanged(model, guide), _quiet(), evaluating(model, guide, batch, audit=False) as batch:
        sites = look(model, guide, batch, seed, stacked=vectorize)
        joint = attempt("the likelihood", evidence, frozenset(batch.names))
        alone = [n for n in sites.observed if batch.presence(n) is not False]
        for name in alone if len(alone) > 1 and joint is not None else []:
            attempt(f"the likelihood of {name!r} alone", evidence, frozenset({name}))
        target = bound_of(objective, batch.names)
        gap, remark = None, why_no_gap(target)
        if joint is not None and target is not None and not remark:
            gap = attempt("the objective", gap_of, target, objective, model, guide, batch, evidence, seed)
            remark = "" if gap or "the objective" in errors else "no gap: no row here has every modality"
        plain = attempt("the ELBO", elbo_gap, model, guide, batch, joint, seed) if joint is not None else None
    with unchanged(model, guide), _quiet():
        gradients = attempt("the gradient", gradient_noise, model, guide, objective, batch, repeats=repeats, seed=seed)
        clash = _clash(estimator, model, guide, batch) if not isinstance(objective, Objective) else ""
    found = Check(
        batch.size, sites, _objective_text(objective, estimator, target), gap, plain,
        {e.quantity: e for e in known.values()}, gradients, errors, (), remark,
    )  # fmt: skip
    why = " ".join(
        reasons(
            gradients.unused if gradients is not None else (),
            Reached({"model": model, "guide": guide}).modules,
            batch.names,
            [name for name in batch.names if batch.presence(name) is False],
            sites.summed_out,
            type(estimator).__name__,
        )
    )
    ranked = sorted(_findings(found, isinstance(estimator, PerRow), clash, why), key=lambda x: x[0])
    return replace(found, findings=tuple(text for _, text in ranked))


def _clash(estimator: Any, model: Any, guide: Any, batch: Batch) -> str:
    """Why one of Pyro's own estimators, which do not ask, is wrong for a pair."""
    try:
        check_pairing(estimator, structure(model, guide, batch))
    except ValueError as error:
        return str(error)
    return ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of sites that the report speaks of."""
    with warnings.catch_warnings():
        for message in (".*is in the model and not in the guide", "Found .*vars in"):
            warnings.filterwarnings("ignore", message=message)
        yield


# -- the report ---------------------------------------------------------------------------------------------------


def _objective_text(objective: Any, estimator: Any, target: Target | None) -> str:
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
    lines = [aligned(["Bound, nats a row", "bound", "evidence", "gap"], rows)] if rows else ["Bound"]
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
            f"{_doubt(e):.1%}",
        ]
        for e in found.evidence.values()
        if bool(e.counted.any())
    ]
    return aligned(["Guide as a proposal", "nats a row", "median ESS", "doubtful rows"], rows) if rows else ""


def _gradient_text(found: Check) -> str:
    if found.gradients is None:
        return ""
    groups, more = list(found.gradients.groups), len(found.gradients.groups) - GROUPS
    if more > 0:
        groups = sorted(groups, key=lambda g: g.snr if g.snr == g.snr else -1.0)[:GROUPS]
    rows = [[g.name, _ratio(g), f"{g.signal:.1e}", f"{g.noise:.1e}", f"{g.size}"] for g in groups]
    header = [
        f"Gradient, {found.gradients.repeats} draws on these rows",
        "signal / noise",
        "signal",
        "noise",
        "entries",
    ]
    text = aligned(header, rows) if rows else "Gradient\n  no parameter wants one"
    text += f"\n  and {more} more, of larger ratios" if more > 0 else ""
    text += "\n  norms of the mean gradient and of one draw's departure from it, in nats a row" if rows else ""
    frozen = found.gradients.frozen
    return text + (f"\n  frozen: {_some(frozen)}" if frozen else "")


def _ratio(group: Any) -> str:
    if math.isnan(group.snr):
        return "no gradient" if group.signal == group.noise == 0 else "not finite"
    return "no noise" if group.snr > 1e4 else f"{group.snr:.2f}"


def _doubt(evidence: Evidence) -> float:
    return evidence.doubtful[evidence.counted].float().mean().item()


def _some(names: tuple[str, ...], limit: int = 8) -> str:
    """The names, those of one module as the module's."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        layer = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
        short = name if " " in name else ".".join(parts[:layer]) or name  # names with a space are of no module
        counts[short] = counts.get(short, 0) + 1
    each = [f"{name} ({count} tensors)" if count > 1 else name for name, count in counts.items()]
    return ", ".join(each[:limit]) + (f" and {len(each) - limit} more" if len(each) > limit else "")


# -- findings -----------------------------------------------------------------------------------------------------


def _findings(found: Check, per_row: bool, clash: str, why: str) -> Iterator[tuple[int, str]]:
    """What a reader should know, each with its rank: lower ones are more serious."""
    yield from ((0, text) for text in _failures(found, clash))
    yield from found.sites.findings(per_row)
    doubts = sorted([(_doubt(e), e.quantity) for e in found.evidence.values() if _doubt(e) > DOUBTFUL], reverse=True)
    if doubts:
        those = ", ".join(f"{share:.0%} in {quantity}" for share, quantity in doubts)
        text = f"Many rows are doubtful, their k-hat above {THRESHOLD} or standard error above {WIDE}: {those}. "
        yield (
            4,
            text
            + "The guide is a poor proposal there, and likelihoods and gaps are more likely too low than too high.",
        )
    if found.gradients is None:
        return
    gradients = found.gradients
    if gradients.nonfinite:
        yield 0, f"The gradient is not finite: {_some(gradients.nonfinite)}."
    if gradients.unused:
        yield 2, f"No gradient reaches {_some(gradients.unused)}, and fit would raise. {why}"
    if gradients.zero:
        yield 2, f"The gradient is exactly zero, in every draw, for {_some(gradients.zero)}."
    if quiet := tuple(group.name for group in gradients.groups if group.snr < QUIET):
        those = ", ".join(quiet)
        text = f"Little of the gradient is signal, less than {QUIET:g} of its noise: {those}. Near an optimum "
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
