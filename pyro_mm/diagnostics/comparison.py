r"""Which model gives the same rows the higher likelihood, and whether these rows and draws can tell."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..evidence.evidence import PARETO_K_THRESHOLD, Evidence
from ..evidence.likelihood import log_conditional, log_marginal
from ..utils.arguments import check_mapping, check_names, check_seed
from ..utils.arviz import compare_log_likelihoods
from ..utils.text import align_columns, plus_minus, wrap_remark

MANY_UNTRUSTED = 0.1  # the share of rows with k-hat > 0.7 that is worth a remark
CLOSE_Z = 2.0  # standard errors


@dataclass(frozen=True)
class Candidate:
    """One model's line in a :class:`Comparison`, in nats a row, means over the rows that are finite in all of them.

    Attributes:
        mean: log-likelihood.
        error: of ``mean``, by estimation.
        difference: of ``mean`` to the reference's; zero for that.
        paired_error: of ``difference``, by the choice of rows.
        estimation_error: of ``difference``, by estimation.
        untrusted: the share of rows with k-hat > 0.7; NaN where there were too few draws to know.
        num_particles: K.
        lost: how many rows are not finite.
    """

    name: str
    mean: float
    error: float
    difference: float
    paired_error: float
    estimation_error: float
    untrusted: float
    num_particles: int
    lost: int


@dataclass(frozen=True)
class Comparison:
    """Result of :func:`compare`; printed, a table and remarks.

    Attributes:
        quantity: which log-likelihood this is, in words.
        reference: the candidate that differences are to.
        candidates: best first.
        evidence: of each candidate, by name, best first.
        rows: which rows the numbers are of, boolean ``(N,)``: those that have what is compared and are finite in all
            candidates.
    """

    quantity: str
    reference: str
    candidates: tuple[Candidate, ...]
    evidence: Mapping[str, Evidence]
    rows: Tensor

    def table(self) -> list[dict[str, Any]]:
        """A dictionary for each candidate, best first, with the fields of :class:`Candidate`."""
        return [asdict(candidate) for candidate in self.candidates]

    def to_arviz(self, **options: Any) -> Any:
        """ArviZ's comparison of the same rows, ``arviz.compare``, as a data frame.

        Its numbers are sums over rows where those here are means. Its ``dse`` is N times the paired error but for the
        factor ``sqrt((N - 1) / N)``, its ``se`` is by the choice of rows, and it knows of no estimation error. Its
        ``weight`` is the mixture of the candidates that predicts these rows best (Yao et al. 2018, arXiv:1704.02030).
        ArviZ 0.x counts differences from the best downwards, as positive numbers. ``options`` are those of
        ``arviz.compare``.
        """
        column = lambda x: x[self.rows.to(x.device)].double().cpu().numpy()  # noqa: E731
        return compare_log_likelihoods(
            {name: column(e.log_prob) for name, e in self.evidence.items()},
            {name: column(e.pareto_k) for name, e in self.evidence.items()},
            {name: e.num_particles for name, e in self.evidence.items()},
            PARETO_K_THRESHOLD,
            None if self.reference == self.candidates[0].name else self.reference,
            **options,
        )

    def __repr__(self) -> str:
        kept = int(self.rows.sum())
        header = [self.quantity, "nats a row", "difference", "± rows", "± draws", f"k-hat > {PARETO_K_THRESHOLD}", "K"]
        lines = []
        for c in self.candidates:
            apart = [f"{c.difference:+.3f}", _error_text(c.paired_error), _error_text(c.estimation_error)]
            if c.name == self.reference:
                apart = ["reference", "", ""]
            tail = "unknown" if math.isnan(c.untrusted) else f"{c.untrusted:.1%}"
            lines.append([c.name, plus_minus(c.mean, c.error), *apart, tail, f"{c.num_particles}"])
        of = "" if kept == len(self.rows) else f" of {len(self.rows)}"
        legend = (
            f"  means over {kept}{of} rows; errors by the choice of rows, paired, and by the draws of the estimation"
        )
        remarks = [wrap_remark("- ", text) for text in self.remarks()]
        return "\n".join([align_columns(header, lines), legend, *remarks])

    def remarks(self) -> list[str]:
        """What to beware of, in words."""
        found = []
        for c in self.candidates:
            if c.lost:
                found.append(
                    f"{c.name} is not finite in {c.lost} of {len(self.rows)} rows. They are left out of all numbers "
                    f"here, which flatters {c.name}."
                )
        # the paired error has that of the draws in it; a candidate of few rows has no error to go by
        close = [
            c.name
            for c in self.candidates
            if c.name != self.reference and not abs(c.difference) > CLOSE_Z * c.paired_error
        ]
        if close:
            found.append(f"Within {CLOSE_Z:g} standard errors of {self.reference}: {', '.join(close)}.")
        heavy = [f"{c.name} ({c.untrusted:.0%})" for c in self.candidates if c.untrusted > MANY_UNTRUSTED]
        if heavy:
            text = (
                f"Many rows have k-hat > {PARETO_K_THRESHOLD} in {', '.join(heavy)}: their likelihoods are more likely "
                "too low "
            )
            found.append(text + "than too high, and no error shows it. More particles help, or annealed_importance.")
        return found


def compare(
    candidates: Mapping[str, Any],
    batch: Batch | None = None,
    *,
    target: Sequence[str] | str | None = None,
    given: Sequence[str] | str = (),
    baseline: str | None = None,
    proposal: Any = None,
    seed: int | None = None,
    **options: Any,
) -> Comparison:
    r"""Compares models by the log-likelihood that they give to the same rows.

    With :math:`\ell_{cn}` the log-likelihood of row n under candidate c, s its standard error, b the reference, and
    :math:`d_n = \ell_{cn} - \ell_{bn}`,

    .. math:: \bar\ell_c = \frac1N \sum_n \ell_{cn}, \quad
              \mathrm{error}_c = \frac1N \sqrt{\textstyle\sum_n s_{cn}^2}, \quad
              \mathrm{paired}_c = \sqrt{\frac{1}{N (N - 1)} \textstyle\sum_n (d_n - \bar d)^2}, \quad
              \mathrm{estimation}_c = \sqrt{\mathrm{error}_c^2 + \mathrm{error}_b^2}

    ``paired_error`` says how far the difference might be off on other rows from the same source. It is of the pairs,
    and so does not count what makes rows easy or hard for both; the draws' own noise is in it already, and the two
    errors are not to be added. ``estimation_error`` says how far it might be off on these very rows, from a finite
    number of draws. It takes the candidates' draws for independent; pairs share a seed, so that what they have in
    common cancels, and then it is too large rather than too small. Neither shows the bias of a log-likelihood,
    downwards by about half its squared error in each row, nor what k-hat > 0.7 warns of.

    Args:
        candidates: name -> ``(model, guide)``, or anything that begins with these two, such as a recipe; or name ->
            :class:`~pyro_mm.Evidence` of the same rows and quantity. At least two.
        batch: N rows for the pairs: :func:`~pyro_mm.log_marginal`, or with a target
            :func:`~pyro_mm.log_conditional`, under one seed.
        target, given: as in ``log_conditional``.
        baseline: the name of the reference; by default it is the best candidate.
        proposal: the way to draw particles, an :class:`mm.Proposal <pyro_mm.Proposal>`, the same for all pairs; without
            a target also what else :func:`~pyro_mm.log_marginal` takes.
        seed: of the draws; None takes one from torch's generator.
        options: of ``log_marginal`` or ``log_conditional``, such as ``num_particles`` or ``audit``.

    Raises:
        ValueError: fewer than two candidates, an unknown baseline, unequal quantities or numbers of rows, pairs without
            a batch, or no row that is finite in all candidates.
        TypeError: a candidate that is neither a pair nor an ``Evidence``.
    """
    candidates = check_mapping("candidates", candidates, "pairs of model and guide, or Evidence")
    check_seed(seed)
    if len(candidates) < 2:
        raise ValueError(f"expected at least two candidates, got {list(candidates)}")
    if target is not None:
        check_names("target", target, least=1)
    check_names("given", given)
    if baseline is not None and baseline not in candidates:
        raise ValueError(f"expected a baseline among {list(candidates)}, got {baseline!r}")
    if proposal is not None:
        options["proposal"] = proposal
    evidence = _estimate(candidates, batch, target, given, seed, options)
    quantities = {name: e.quantity for name, e in evidence.items()}
    sizes = {name: len(e) for name, e in evidence.items()}
    for what, values in (("log-likelihood", quantities), ("number of rows", sizes)):
        if len(set(values.values())) > 1:
            raise ValueError(f"expected candidates of one {what}, got {values}")
    log_prob = {name: e.log_prob.double().cpu() for name, e in evidence.items()}
    counted = torch.stack([e.counted.cpu() for e in evidence.values()]).all(0)
    if not counted.any():
        raise ValueError(f"no row has what is compared, {next(iter(quantities.values()))}")
    rows = torch.stack([x.isfinite() for x in log_prob.values()]).all(0) & counted
    if not rows.any():
        lost = {name: int((~x.isfinite()).sum()) for name, x in log_prob.items()}
        raise ValueError(f"no row is finite in all candidates; rows that are not: {lost} of {len(rows)}")
    order = sorted(evidence, key=lambda name: -log_prob[name][rows].mean().item())
    reference = order[0] if baseline is None else baseline
    kept = {name: e[rows.to(e.log_prob.device)] for name, e in evidence.items()}
    errors = {name: e.mean()[1] for name, e in kept.items()}
    lines = []
    for name in order:
        apart, itself = (log_prob[name] - log_prob[reference])[rows], name == reference
        lines.append(
            Candidate(
                name,
                mean=log_prob[name][rows].mean().item(),
                error=errors[name],
                difference=apart.mean().item(),
                paired_error=0.0 if itself else (apart.std() / len(apart) ** 0.5).item(),
                estimation_error=0.0 if itself else math.hypot(errors[name], errors[reference]),
                untrusted=kept[name].untrusted(),
                num_particles=kept[name].num_particles,
                lost=int((~log_prob[name].isfinite()).sum()),
            )
        )
    return Comparison(quantities[reference], reference, tuple(lines), {name: evidence[name] for name in order}, rows)


def _estimate(
    candidates: Mapping[str, Any], batch: Batch | None, target: Any, given: Any, seed: int | None, options: Any
) -> dict[str, Evidence]:
    pairs: dict[str, Any] = {}
    for name, candidate in candidates.items():
        if isinstance(candidate, Evidence):
            continue
        if not isinstance(candidate, Sequence) or len(candidate) < 2 or not all(callable(f) for f in candidate[:2]):
            raise TypeError(f"expected (model, guide) or Evidence for {name!r}, got {type(candidate).__name__}")
        pairs[name] = candidate[:2]
    if pairs and batch is None:
        raise ValueError(f"expected a batch for the pairs {list(pairs)}, got none")
    if batch is not None:
        check_batch(batch)
    if not pairs and (batch is not None or target is not None or given or options):
        raise ValueError("expected nothing but candidates where all of them are Evidence: nothing is estimated here")
    if target is None and given:
        raise ValueError(f"expected a target where modalities are given, got none with given={given!r}")
    seed = int(torch.randint(2**62, ())) if seed is None and pairs else seed
    rows: Any = batch

    def estimated(model: Any, guide: Any) -> Evidence:
        if target is None:
            return log_marginal(model, guide, rows, seed=seed, **options)
        return log_conditional(model, guide, rows, target=target, given=given, seed=seed, **options)

    return {name: estimated(*pairs[name]) if name in pairs else one for name, one in candidates.items()}


def _error_text(x: float) -> str:
    return f"{x:.3f}" if x == x else "?"
