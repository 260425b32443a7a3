r"""Log-likelihoods row by row, with what is needed to trust them or not, and the sums that they are made of."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..utils.arviz import build_inference_data
from .pareto import MIN_TAIL_LENGTH, tail_length

PARETO_K_THRESHOLD = 0.7  # of k-hat (Vehtari et al. 2024): the variance of heavier tails is too large, or infinite
ROUNDING_UNITS = (
    32  # of log-weights, in units of their last place, and their least size: sums of many terms that cancel
)
LARGE_STANDARD_ERROR = 0.5  # nats: a standard error beyond which the delta method that made it no longer holds


@dataclass(frozen=True)
class Evidence:
    r"""Log-likelihoods of N rows, estimated, with what is needed to trust them or not.

    Attributes:
        log_prob: :math:`\log \frac1K \sum_k w_{kn}`, ``(N,)``, in nats. Biased low by about half the squared error.
        standard_error: of ``log_prob``, ``(N,)``, by the delta method, from the spread of the independent groups of
            draws (single ones, unless draws are stratified, antithetic or quasi-random).
        ess: effective sample size :math:`(\sum_k w_k)^2 / \sum_k w_k^2`, between 1 and K.
        pareto_k: tail shape of the weights (``pyro_mm.evidence.pareto``); above 0.7 the row is not to be trusted.
        quantity: which log-likelihood this is, in words.
        num_particles: K.
        running: k -> ``(log_prob, standard_error)`` from the first k particles, for k = 1, 2, 4, .., K.
        counts: boolean ``(N,)``, the rows that have what the quantity is of: means and shares are over them, since the
            0 of a row that lacks it would dilute these. None for all rows.
        notes: what else is to be said of the quantity, such as that grey levels are no bits.
    """

    log_prob: Tensor
    standard_error: Tensor
    ess: Tensor
    pareto_k: Tensor
    quantity: str
    num_particles: int
    running: Mapping[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    counts: Tensor | None = field(default=None, repr=False)
    notes: tuple[str, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.log_prob)

    def mean(self) -> tuple[float, float]:
        """The mean over rows, and the standard error that the estimation (not the choice of rows) gives it.

        Over the rows that ``counts`` names; NaN where these are none.
        """
        rows = self.counted
        error = self.standard_error[rows].square().sum().sqrt() / rows.sum()
        return self.log_prob[rows].mean().item(), error.item()

    @property
    def counted(self) -> Tensor:
        """The rows that means and shares are over, boolean ``(N,)``."""
        return torch.ones_like(self.log_prob, dtype=torch.bool) if self.counts is None else self.counts

    @property
    def rows_text(self) -> str:
        """The number of rows that means are over, in words: "360 rows", or "295 of 360 rows"."""
        counted = int(self.counted.sum())
        return _rows(len(self)) if counted == len(self) else f"{counted} of {_rows(len(self))}"

    def untrusted(self) -> float:
        """The share of rows whose k-hat exceeds 0.7, or is none; NaN where there were too few draws for any k-hat."""
        return math.nan if self.few else (~(self.pareto_k <= PARETO_K_THRESHOLD))[self.counted].float().mean().item()

    @property
    def few(self) -> bool:
        """Whether there were too few draws for a k-hat of any row."""
        return tail_length(self.num_particles) < MIN_TAIL_LENGTH

    @property
    def lost(self) -> Tensor:
        """Which rows have no finite estimate, ``(N,)``: all their weights are zero, or one is infinite or NaN."""
        return ~self.log_prob.isfinite()

    @property
    def doubtful(self) -> Tensor:
        """Which rows are not to be trusted, ``(N,)``: k-hat above 0.7, or a standard error above 0.5 or unknown."""
        return (self.pareto_k > PARETO_K_THRESHOLD) | ~(self.standard_error <= LARGE_STANDARD_ERROR)

    def __repr__(self) -> str:
        mean, error = self.mean()
        tail = "too few for k-hat" if self.few else f"k-hat > {PARETO_K_THRESHOLD} in {self.untrusted():.1%}"
        if lost := int(self.lost.sum()):
            tail += f", {_rows(lost)} without finite weights"
        return (
            f"Evidence({self.quantity}: {mean:.3f} ± {error:.3f} nats a row, mean of {self.rows_text}, "
            f"K = {self.num_particles}, {tail}{''.join(f'; {note}' for note in self.notes)})"
        )

    def summary(self, worst: int = 5) -> str:
        """Which rows are to be trusted and which are not, in words, with the ``worst`` of them and what to do.

        The mean of the trusted rows alone is not given, as it would be biased: draws that miss the tail of the weights
        have both a low estimate and a low k-hat.
        """
        mean, error = self.mean()
        n, doubtful = int(self.counted.sum()), self.doubtful & ~self.lost & self.counted
        bad, lost = int(doubtful.sum()), self.lost.nonzero()[:, 0].tolist()
        lines = [
            f"{self.quantity}: {mean:.3f} ± {error:.3f} nats a row, mean of {self.rows_text}, K = {self.num_particles}."
        ]
        lines += [f"{note}." for note in self.notes]
        if self.few:
            lines.append("Too few draws for k-hat: judged by the standard error alone.")
        if lost:
            shown = ", ".join(map(str, lost[:worst])) + (", .." if len(lost) > worst else "")
            lines.append(
                f"Without finite weights: {_rows(len(lost))} ({shown}). All weights are zero, or one is infinite or "
                "NaN: see what densities the story and the guide give there."
            )
        good = n - bad - len(lost)
        if good and bad:
            lines.append(f"Trusted: {_rows(good)} ({good / n:.1%}).")
        elif good:
            lines.append(f"No {'other ' if lost else ''}row gives reason for doubt.")
        if not bad:
            return "\n".join(lines)
        heavy = int((doubtful & (self.pareto_k > PARETO_K_THRESHOLD)).sum())
        why = [f"{heavy} with k-hat > {PARETO_K_THRESHOLD}"] if heavy else []
        wide = int((doubtful & ~(self.standard_error <= LARGE_STANDARD_ERROR)).sum())
        why += [f"{wide} with a standard error above {LARGE_STANDARD_ERROR} nats, or none"] if wide else []
        lines.append(
            f"Not to be trusted: {_rows(bad)} ({bad / n:.1%}): {' and '.join(why)}. A few draws carry "
            "the weight, so that the estimate is more likely too low than too high, and its error understated."
        )
        order = torch.where(doubtful, self.pareto_k.nan_to_num(0.0) + self.standard_error.nan_to_num(99.0), -math.inf)
        for row in order.topk(min(worst, bad)).indices.tolist():
            k_hat, ess = self.pareto_k[row].item(), self.ess[row].item()
            lines.append(
                f"  row {row}: {self.log_prob[row].item():.3f} ± {self.standard_error[row].item():.3f}, "
                f"k-hat {k_hat:.2f}, ESS {ess:.1f}"
            )
        lines.append("To do: annealed_importance on batch[evidence.doubtful], or in few dimensions prior_share=0.1.")
        return "\n".join(lines)

    def __getitem__(self, rows: Any) -> Evidence:
        """The evidence of some rows, by a slice, a mask or an index."""
        if isinstance(rows, int) or getattr(rows, "ndim", None) == 0:
            rows = [operator.index(rows)]
        take = lambda x: x[rows]  # noqa: E731
        return Evidence(
            take(self.log_prob),
            take(self.standard_error),
            take(self.ess),
            take(self.pareto_k),
            self.quantity,
            self.num_particles,
            {k: (take(one), take(error)) for k, (one, error) in self.running.items()},
            None if self.counts is None else take(self.counts),
            self.notes,
        )

    def __sub__(self, other: Evidence) -> Evidence:
        r"""The difference row by row: of log p(x_T, x_G) and log p(x_G), for instance, log p(x_T | x_G).

        Errors add in quadrature, as of independent estimates; ``ess`` and ``pareto_k`` are the worse of the two.
        """
        if not isinstance(other, Evidence):
            return NotImplemented
        if len(self) != len(other):
            raise ValueError(f"expected likelihoods of the same rows, got {len(self)} and {len(other)} of them")

        def less(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return one[0] - two[0], (one[1].square() + two[1].square()).sqrt()

        log_prob, error = less((self.log_prob, self.standard_error), (other.log_prob, other.standard_error))
        return Evidence(
            log_prob,
            error,
            torch.minimum(self.ess, other.ess),
            torch.maximum(self.pareto_k, other.pareto_k),
            f"{self.quantity} - {other.quantity}",
            min(self.num_particles, other.num_particles),
            {k: less(one, other.running[k]) for k, one in self.running.items() if k in other.running},
            None if self.counts is None or other.counts is None else self.counts | other.counts,
            tuple(dict.fromkeys([*self.notes, *other.notes])),
        )

    def to_arviz(self) -> Any:
        """As ArviZ's inference data: group ``log_likelihood``, and the diagnostics under ``sample_stats``."""
        column = lambda x: x.detach().cpu().numpy()[None, None]  # noqa: E731  # chain, draw, row
        stats = {name: column(getattr(self, name)) for name in ("standard_error", "ess", "pareto_k")}
        return build_inference_data({"log_likelihood": {self.quantity: column(self.log_prob)}, "sample_stats": stats})


def _rows(n: int) -> str:
    return f"{n} row{'s' * (n != 1)}"


def concatenate(parts: Sequence[Evidence]) -> Evidence:
    """The evidence of the rows of all parts, which are estimates of one quantity from as many particles."""

    def cat(pick: Callable[[Evidence], Tensor]) -> Tensor:
        return torch.cat([pick(part) for part in parts])

    return Evidence(
        cat(lambda e: e.log_prob),
        cat(lambda e: e.standard_error),
        cat(lambda e: e.ess),
        cat(lambda e: e.pareto_k),
        parts[0].quantity,
        parts[0].num_particles,
        {k: (cat(lambda e, k=k: e.running[k][0]), cat(lambda e, k=k: e.running[k][1])) for k in parts[0].running},  # type: ignore[misc]
        None if all(part.counts is None for part in parts) else cat(lambda e: e.counted),
        parts[0].notes,
    )
