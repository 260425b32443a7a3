r"""Comparison of models by the log-likelihood of the same rows, with two kinds of error."""

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
from .html import comparison_html

MANY_UNTRUSTED = 0.1  # proportion of rows with k-hat > 0.7 above which there is a remark
CLOSE_Z = 2.0  # standard errors within which a difference counts as close


@dataclass(frozen=True)
class Candidate:
    """One model's row of a :class:`Comparison`: means over the rows that are finite in all models, in nats per row.

    Attributes:
        name: name of the model.
        mean: mean log-likelihood.
        error: standard error of ``mean`` by the finite number of draws.
        difference: ``mean`` minus that of the reference.
        paired_error: standard error of ``difference`` by the choice of rows.
        estimation_error: standard error of ``difference`` by the finite number of draws.
        untrusted: proportion of rows with k-hat > 0.7; NaN if there are too few draws to know.
        num_particles: K, draws per row.
        lost: number of rows whose estimate is not finite.
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
    """Result of :func:`compare`: ``print`` shows a table and remarks.

    Attributes:
        quantity: the log-likelihood that is compared, such as ``"log p(x, y)"``.
        reference: name of the candidate that differences refer to.
        candidates: one :class:`Candidate` per model, best first.
        evidence: name -> per-row estimates, best first.
        rows: boolean ``(N,)``, True for the rows that all numbers are means over: they have what is compared, and are
            finite in all candidates.
    """

    quantity: str
    reference: str
    candidates: tuple[Candidate, ...]
    evidence: Mapping[str, Evidence]
    rows: Tensor

    def table(self) -> list[dict[str, Any]]:
        """Return one dictionary per candidate, best first, with the fields of :class:`Candidate`."""
        return [asdict(candidate) for candidate in self.candidates]

    def to_arviz(self, **options: Any) -> Any:
        """Compare the same rows by ``arviz.compare``.

        ArviZ's numbers are sums over rows, not means. Its ``dse`` is N times the paired error, up to a factor of
        ``sqrt((N - 1) / N)``; its ``se`` is by the choice of rows; it has no error by estimation. Its ``weight`` is the
        stacking weight in the mixture of candidates that predicts these rows best. ArviZ 0.x gives differences from
        the best as positive numbers.

        Args:
            options: keyword arguments of ``arviz.compare``.

        Returns:
            Data frame with one row per candidate.

        References:
            Yao et al. 2018 (arXiv:1704.02030), for the stacking weights.
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

    def _repr_html_(self) -> str:
        return comparison_html(self)

    def __repr__(self) -> str:
        heavy = f"k-hat > {PARETO_K_THRESHOLD}"
        header = [self.quantity, "nats per row", "difference", "± rows", "± draws", heavy, "K"]
        lines = []
        for c in self.candidates:
            difference = [f"{c.difference:+.3f}", _error_text(c.paired_error), _error_text(c.estimation_error)]
            if c.name == self.reference:
                difference = ["reference", "", ""]
            untrusted = "unknown" if math.isnan(c.untrusted) else f"{c.untrusted:.1%}"
            lines.append([c.name, plus_minus(c.mean, c.error), *difference, untrusted, f"{c.num_particles}"])
        count = int(self.rows.sum())
        rows = f"{count} rows" if count == len(self.rows) else f"{count} of {len(self.rows)} rows"
        legend = (
            f"Means over {rows}, ± standard error by the draws. Standard errors of the difference: ± rows by the "
            "choice of rows (paired), ± draws by the draws."
        )
        remarks = [wrap_remark("- ", text) for text in self.remarks()]
        return "\n".join([align_columns(header, lines), wrap_remark("", legend), *remarks])

    def remarks(self) -> list[str]:
        """Return warnings about these numbers, as sentences."""
        remarks = [
            f"{c.name} is not finite in {c.lost} of {len(self.rows)} rows. They are left out of all numbers here, "
            f"which flatters {c.name}."
            for c in self.candidates
            if c.lost
        ]
        notes = dict.fromkeys(note for c in self.candidates for note in self.evidence[c.name].notes)
        for note in notes:
            names = ", ".join(c.name for c in self.candidates if note in self.evidence[c.name].notes)
            remarks.append(f"{names}: {note}.")
        # `not .. >`: a single row gives an error of NaN, and counts as close
        close = [
            c.name
            for c in self.candidates
            if c.name != self.reference and not abs(c.difference) > CLOSE_Z * c.paired_error
        ]
        if close:
            remarks.append(f"Within {CLOSE_Z:g} standard errors of {self.reference}: {', '.join(close)}.")
        untrusted = [f"{c.name} ({c.untrusted:.0%})" for c in self.candidates if c.untrusted > MANY_UNTRUSTED]
        if untrusted:
            remarks.append(
                f"Many rows have k-hat > {PARETO_K_THRESHOLD} in {', '.join(untrusted)}. Their log-likelihoods are "
                'more likely too low than too high, which no error here shows. proposal="fitted" helps, or '
                "annealed_importance."
            )
        return remarks


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
    r"""Compare models by the log-likelihood of the same rows.

    Let :math:`\ell_{cn}` be the log-likelihood of row n under candidate c, :math:`s_{cn}` its standard error, b the
    reference, and :math:`d_n = \ell_{cn} - \ell_{bn}`:

    .. math:: \bar\ell_c = \frac1N \sum_n \ell_{cn}, \quad
              \mathrm{error}_c = \frac1N \sqrt{\textstyle\sum_n s_{cn}^2}, \quad
              \mathrm{paired}_c = \sqrt{\frac{1}{N (N - 1)} \textstyle\sum_n (d_n - \bar d)^2}, \quad
              \mathrm{estimation}_c = \sqrt{\mathrm{error}_c^2 + \mathrm{error}_b^2}

    ``paired_error`` is the standard error on other rows from the same source. Differences are paired, so that what
    makes a row hard for both models cancels. It includes the noise of the draws: do not add the two errors.
    ``estimation_error`` is the standard error on these rows, by the finite number of draws. It assumes independent
    draws; pairs share a seed, so that it is too large rather than too small. Neither error shows the bias of a
    log-likelihood estimate, about half its squared standard error downwards in each row, or the effect of heavy-tailed
    weights, which k-hat > 0.7 indicates.

    Args:
        candidates: name -> ``(model, guide)``, or a sequence that begins with these two, such as a recipe; or name ->
            :class:`~pyro_mm.Evidence` of the same rows and quantity. At least two.
        batch: N rows on which pairs are evaluated, all with one seed: by :func:`~pyro_mm.log_marginal`, or by
            :func:`~pyro_mm.log_conditional` if there is a target.
        target, given: names of modalities, as in ``log_conditional``.
        baseline: name of the reference; by default the best candidate.
        proposal: the way to draw particles, an :class:`mm.Proposal <pyro_mm.Proposal>`, an :class:`mm.Fitted
            <pyro_mm.Fitted>` or ``"fitted"``, the same for all pairs; without a target also what else
            :func:`~pyro_mm.log_marginal` takes.
        seed: of the draws; None takes one from torch's generator.
        options: keyword arguments of ``log_marginal`` or ``log_conditional``, such as ``num_particles`` or ``audit``.

    Returns:
        A :class:`Comparison`.

    Raises:
        ValueError: fewer than two candidates, an unknown baseline, unequal quantities or numbers of rows, pairs without
            a batch, or no row that is finite in all candidates.
        TypeError: a candidate that is neither a pair nor an ``Evidence``.

    Example::

        mm.compare({"mvae": (model, guide), "jmvae": jmvae_recipe}, test, num_particles=1000, seed=0)
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
    rows = _comparable_rows(evidence)

    means = {name: e.log_prob.double().cpu()[rows].mean().item() for name, e in evidence.items()}
    order = sorted(evidence, key=lambda name: -means[name])
    reference = order[0] if baseline is None else baseline
    return Comparison(
        quantity=quantities[reference],
        reference=reference,
        candidates=tuple(_candidate(name, reference, evidence, rows) for name in order),
        evidence={name: evidence[name] for name in order},
        rows=rows,
    )


def _comparable_rows(evidence: Mapping[str, Evidence]) -> Tensor:
    """Return the rows that have what is compared and are finite in all candidates, boolean ``(N,)`` on the CPU."""
    have = torch.stack([e.counted.cpu() for e in evidence.values()]).all(0)
    if not have.any():
        raise ValueError(f"no row has what is compared, {next(iter(evidence.values())).quantity}")
    finite = {name: e.log_prob.isfinite().cpu() for name, e in evidence.items()}
    rows = torch.stack([*finite.values()]).all(0) & have
    if not rows.any():
        lost = {name: int((~x).sum()) for name, x in finite.items()}
        raise ValueError(f"no row is finite in all candidates; rows that are not: {lost} of {len(rows)}")
    return rows


def _candidate(name: str, reference: str, evidence: Mapping[str, Evidence], rows: Tensor) -> Candidate:
    """Compute a candidate's row of the table from its estimates and those of the reference."""
    own, other = (evidence[n][rows.to(evidence[n].log_prob.device)] for n in (name, reference))
    log_prob = own.log_prob.double().cpu()
    difference = log_prob - other.log_prob.double().cpu()
    error = own.mean()[1]
    is_reference = name == reference
    return Candidate(
        name,
        mean=log_prob.mean().item(),
        error=error,
        difference=difference.mean().item(),
        paired_error=0.0 if is_reference else (difference.std() / len(difference) ** 0.5).item(),
        estimation_error=0.0 if is_reference else math.hypot(error, other.mean()[1]),
        untrusted=own.untrusted(),
        num_particles=own.num_particles,
        lost=int((~evidence[name].log_prob.isfinite()).sum()),
    )


def _estimate(
    candidates: Mapping[str, Any], batch: Batch | None, target: Any, given: Any, seed: int | None, options: Any
) -> dict[str, Evidence]:
    """Estimate the log-likelihoods of the candidates that are pairs, and return those of all."""
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

    def log_likelihood(model: Any, guide: Any) -> Evidence:
        if target is None:
            return log_marginal(model, guide, rows, seed=seed, **options)
        return log_conditional(model, guide, rows, target=target, given=given, seed=seed, **options)

    return {name: log_likelihood(*pairs[name]) if name in pairs else one for name, one in candidates.items()}


def _error_text(error: float) -> str:
    """Format a standard error; an unknown one is NaN."""
    return "?" if math.isnan(error) else f"{error:.3f}"
