r"""Estimated log-likelihoods per row, with standard errors and diagnostics."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..utils.arguments import check_integer
from ..utils.arviz import build_inference_data
from .html import evidence_html
from .pareto import MIN_TAIL_LENGTH, tail_length

PARETO_K_THRESHOLD = 0.7  # of k-hat (Vehtari et al. 2024): the variance of heavier tails is too large, or infinite
LARGE_STANDARD_ERROR = 0.5  # nats: the delta method does not hold beyond it

# The spread of log-weights that is taken for rounding, in units of the last place of a log-weight of this size at
# least: a log-weight is a sum of many terms that cancel.
ROUNDING_UNITS = 32


@dataclass(frozen=True)
class Evidence:
    r"""Estimated log-likelihoods of N rows, with standard errors and the diagnostics of their weights.

    With K weights :math:`w_{kn}` per row, whose mean is an unbiased estimate of the likelihood,

    .. math:: \ell_n = \log \frac1K \sum_k w_{kn}, \qquad
              \mathrm{se}(\ell_n) \approx \frac{\mathrm{sd}_k(w_{kn})}{\sqrt K \, \bar w_n}, \qquad
              \mathrm{ess}_n = \frac{(\sum_k w_{kn})^2}{\sum_k w_{kn}^2}

    :math:`\ell_n` is biased low by about :math:`\mathrm{se}^2 / 2`. Printed, it gives the mean over rows; ``summary()``
    names the rows that are not to be trusted; ``evidence[rows]`` takes some of them, and a difference of two is a
    conditional.

    Attributes:
        log_prob (Tensor): :math:`\ell_n`, ``(N,)``, in nats.
        standard_error (Tensor): of ``log_prob``, ``(N,)``, in nats, by the delta method, from the spread of independent
            groups of draws (single ones, unless draws are stratified, antithetic or quasi-random). It says how far a
            repetition with other draws would be off, and nothing about other rows. NaN for a single group.
        ess (Tensor): effective sample size, ``(N,)``, between 1 and K.
        pareto_k (Tensor): k-hat, the shape of the tail of the weights, ``(N,)``
            (:func:`pyro_mm.evidence.pareto.pareto_k`). Above 0.7 a row is not to be trusted; NaN below K = 21.
        quantity (str): name of the log-likelihood, such as ``"log p(image | label)"``.
        num_particles (int): K.
        running (Mapping): k -> ``(log_prob, standard_error)`` of the first k particles, for k = 1, 2, 4, .., K: an
            estimate that still rises with k has not converged.
        counts (Tensor): the rows that have the quantity, boolean ``(N,)``; None for all. Means and shares are over
            them, as a row without it has an exact 0 that would dilute these.
        notes (tuple of str): remarks on the quantity, such as that grey levels have no likelihood in bits.
        proposal (str): the proposal that the draws come from, such as ``"Fitted(rounds=8, ..)"``.
        evaluations (int): evaluations of the model per row, those of pilot draws among them; 0 if not known.
        gradients (int): evaluations of the gradient of the model's density per row, by which the proposal was fitted.
        shared (tuple of Tensor): where rows share draws of global latents, so that their errors are correlated: the
            relative deviations of R groups of draws from their mean, ``(R, N)``, once per independent estimate.
        steps (Tensor): the numbers of valid steps, or tokens, that are scored, integers ``(N,)``; None if something
            else than sequences is.

    Example:
        >>> import torch, pyro_mm as mm
        >>> model = mm.models.LinearGaussian({"x": torch.eye(2)})
        >>> batch = mm.Batch({"x": torch.tensor([[0.0, 0.0], [1.0, 2.0]])})
        >>> evidence = mm.log_marginal(model, mm.Guide(z=model.posterior), batch, num_particles=100, seed=0)
        >>> evidence
        Evidence(log p(x): -3.156 ± 0.000 nats per row, mean of 2 rows, K = 100, k-hat > 0.7 in 0.0%)
        >>> bool(torch.allclose(evidence.log_prob, model.log_prob(batch)))  # the posterior has weights without variance
        True
        >>> evidence[1:].rows_text
        '1 row'
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
    proposal: str = field(default="", repr=False)
    evaluations: int = field(default=0, repr=False)
    gradients: int = field(default=0, repr=False)
    shared: tuple[Tensor, ...] = field(default=(), repr=False)
    steps: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        """Return the number of rows N."""
        return len(self.log_prob)

    def mean(self) -> tuple[float, float]:
        r"""Return the mean over rows and its standard error by estimation, in nats per row.

        The error, :math:`\frac1N \sqrt{\sum_n \mathrm{se}_n^2}`, is that of these very rows; it does not say how far
        the mean of other rows would be off (:func:`~pyro_mm.compare` does). Biases of rows, all downwards, do not
        average out. Rows are those of ``counts``; both numbers are NaN if there are none. Where rows share draws of
        global latents (``shared``), the error has the covariances of their errors too.
        """
        rows = self.counted
        variance = self.standard_error[rows].double().square()
        common = torch.zeros_like(variance[:1].sum())
        for deviations in self.shared:
            groups = deviations[:, rows].double()
            pairs = len(groups) * (len(groups) - 1)
            # the part of each row's variance that the groups show is counted with its covariances instead
            variance = (variance - groups.square().sum(0) / pairs).clamp(min=0)
            common = common + groups.mean(1).square().sum() / pairs
        error = (variance.sum() / rows.sum() ** 2 + common).sqrt()
        return self.log_prob[rows].mean().item(), error.item()

    def bits_per_dimension(self, dimensions: int, levels: int | None = None) -> tuple[float, float]:
        r"""Return the mean over rows in bits per dimension, less is better, and its standard error by estimation.

        .. math:: -\frac{\bar\ell - D \log L}{D \log 2}

        Args:
            dimensions: D, numbers in a row, such as the pixels of an image. The quantity should be of them alone: a
                marginal, log p(image), or a conditional, log p(image | label).
            levels: L, if the likelihood is a density of values that were dequantised from L levels to [0, 1]; None for
                a probability of levels, as under a Bernoulli, a Categorical or ``conditionals.Dequantized``.

        Raises:
            TypeError, ValueError: no integers of 1 or more, and of 2 or more.

        Example:
            >>> import torch, pyro_mm as mm
            >>> model = mm.models.LinearGaussian({"x": torch.eye(2)})
            >>> batch = mm.Batch({"x": torch.zeros(1, 2)})
            >>> evidence = mm.log_marginal(model, mm.Guide(z=model.posterior), batch, num_particles=100, seed=0)
            >>> bits, error = evidence.bits_per_dimension(2, levels=256)
            >>> f"{bits:.3f}"  # log2(sqrt(4 pi)) of a standard deviation sqrt(2), and 8 bits
            '9.826'
        """
        check_integer("dimensions", dimensions, least=1)
        if levels is not None:
            check_integer("levels", levels, least=2)
        nats, error = self.mean()
        unit = dimensions * math.log(2)
        return (dimensions * math.log(levels or 1) - nats) / unit, error / unit

    def nats_per_step(self) -> tuple[float, float]:
        r"""Return minus the log-likelihood per valid step, or token, and its standard error by estimation, in nats.

        .. math:: -\frac{\sum_n \ell_n}{\sum_n T_n}, \qquad \frac{\sqrt{\sum_n \mathrm{se}_n^2}}{\sum_n T_n}

        with :math:`T_n` the valid steps of row n, ``steps``. Its exponential is the perplexity. Rows are those of
        ``counts``; both numbers are NaN if they have no step.

        Raises:
            ValueError: the quantity is not of sequences alone.

        Example:
            >>> import torch, pyro_mm as mm
            >>> model = mm.models.LinearGaussian({"x": torch.ones(3, 2)})
            >>> batch = mm.Batch({"x": torch.zeros(2, 3)})
            >>> evidence = mm.log_marginal(model, mm.Guide(z=model.posterior), batch, num_particles=100, seed=0)
            >>> evidence.steps is None  # vectors without lengths
            True
        """
        if self.steps is None:
            raise ValueError(
                f"{self.quantity} is not of sequences with lengths alone, and has no number of steps: take that of "
                "sequences, by log_marginal of batch.only(..) or by log_conditional with target=.."
            )
        steps = int(self.steps[self.counted].sum())
        if not steps:
            return math.nan, math.nan
        mean, error = self.mean()
        rows_per_step = int(self.counted.sum()) / steps
        return -mean * rows_per_step, error * rows_per_step

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
        """Return the share of rows whose k-hat is above 0.7 or NaN; NaN if K is too small for any k-hat."""
        if self.few:
            return math.nan
        return (~(self.pareto_k <= PARETO_K_THRESHOLD))[self.counted].float().mean().item()

    @property
    def few(self) -> bool:
        """True if there are too few draws for a k-hat of any row, K below 21."""
        return tail_length(self.num_particles) < MIN_TAIL_LENGTH

    @property
    def lost(self) -> Tensor:
        """Rows without a finite estimate, boolean ``(N,)``: all weights are zero, or one is infinite or NaN."""
        return ~self.log_prob.isfinite()

    @property
    def doubtful(self) -> Tensor:
        """Rows not to be trusted, boolean ``(N,)``: k-hat above 0.7, or a standard error above 0.5 nats or NaN."""
        return (self.pareto_k > PARETO_K_THRESHOLD) | ~(self.standard_error <= LARGE_STANDARD_ERROR)

    def _repr_html_(self) -> str:
        return evidence_html(self)

    def __repr__(self) -> str:
        mean, error = self.mean()
        tail = "too few for k-hat" if self.few else f"k-hat > {PARETO_K_THRESHOLD} in {self.untrusted():.1%}"
        if lost := int(self.lost.sum()):
            tail += f", {_rows(lost)} without finite weights"
        return (
            f"Evidence({self.quantity}: {mean:.3f} ± {error:.3f} nats per row, mean of {self.rows_text}, "
            f"K = {self.num_particles}, {tail}{''.join(f'; {note}' for note in self.notes)})"
        )

    def summary(self, worst: int = 5) -> str:
        """Describe in words which rows can be trusted and which cannot, and what to do.

        The mean of the trusted rows alone is not given, as it would be biased: draws that miss the tail of the weights
        have both a low estimate and a low k-hat.

        Args:
            worst (int): the number of untrusted rows to list, worst first.
        """
        mean, error = self.mean()
        rows = int(self.counted.sum())
        doubtful = self.doubtful & ~self.lost & self.counted
        num_doubtful = int(doubtful.sum())
        lost = self.lost.nonzero()[:, 0].tolist()

        lines = [
            f"{self.quantity}: {mean:.3f} ± {error:.3f} nats per row, mean of {self.rows_text}, "
            f"K = {self.num_particles}."
        ]
        lines += [f"{note}." for note in self.notes]
        if self.proposal:
            gradients = f" and {self.gradients} of its gradient" if self.gradients else ""
            lines.append(f"Draws of {self.proposal}: {self.evaluations} evaluations of the model{gradients} per row.")
        if self.steps is not None and int(self.steps[self.counted].sum()):
            nats, error_per_step = self.nats_per_step()
            lines.append(
                f"Minus the log-likelihood per step: {nats:.3f} ± {error_per_step:.3f} nats, mean of "
                f"{int(self.steps[self.counted].sum())} valid steps (perplexity {math.exp(nats):.3g})."
            )
        if self.few:
            lines.append("Too few draws for k-hat: judged by the standard error alone.")
        if lost:
            shown = ", ".join(map(str, lost[:worst])) + (", .." if len(lost) > worst else "")
            lines.append(
                f"Without finite weights: {_rows(len(lost))} ({shown}). All weights are zero, or one is infinite or "
                "NaN: see what densities the story and the guide give there."
            )

        trusted = rows - num_doubtful - len(lost)
        if trusted and num_doubtful:
            lines.append(f"Trusted: {_rows(trusted)} ({trusted / rows:.1%}).")
        elif trusted:
            lines.append(f"No {'other ' if lost else ''}row gives reason for doubt.")
        if num_doubtful:
            lines += self._describe_doubtful(doubtful, rows, worst)
        return "\n".join(lines)

    def _describe_doubtful(self, doubtful: Tensor, rows: int, worst: int) -> list[str]:
        """Return lines on the doubtful rows: their number, the reasons, the worst of them, and remedies."""
        number = int(doubtful.sum())
        heavy = int((doubtful & (self.pareto_k > PARETO_K_THRESHOLD)).sum())
        reasons = [f"{heavy} with k-hat > {PARETO_K_THRESHOLD}"] if heavy else []
        if wide := int((doubtful & ~(self.standard_error <= LARGE_STANDARD_ERROR)).sum()):
            reasons.append(f"{wide} with a standard error above {LARGE_STANDARD_ERROR} nats, or none")
        lines = [
            f"Not to be trusted: {_rows(number)} ({number / rows:.1%}): {' and '.join(reasons)}. A few draws carry "
            "the weight, so that the estimate is more likely too low than too high, and its error understated."
        ]

        badness = self.pareto_k.nan_to_num(0.0) + self.standard_error.nan_to_num(99.0)
        order = torch.where(doubtful, badness, -math.inf)
        for row in order.topk(min(worst, number)).indices.tolist():
            lines.append(
                f"  row {row}: {self.log_prob[row].item():.3f} ± {self.standard_error[row].item():.3f}, "
                f"k-hat {self.pareto_k[row].item():.2f}, ESS {self.ess[row].item():.1f}"
            )
        lines.append(f"To do: {self._advice()}.")
        return lines

    def _advice(self) -> str:
        """Return the remedies for doubtful rows, the cheapest first."""
        annealing = "annealed_importance on batch[evidence.doubtful]"
        if self.proposal.startswith("annealing"):
            return "more temperatures, and then more chains"
        if self.gradients:
            return f"more particles, or {annealing}"
        return f'proposal="fitted", which fits the proposal to each row; if rows stay in doubt, {annealing}'

    def __getitem__(self, rows: Any) -> Evidence:
        """Return the evidence of some rows, by a slice, a mask, indices or one index."""
        if isinstance(rows, int) or getattr(rows, "ndim", None) == 0:
            rows = [operator.index(rows)]
        return replace(
            self,
            log_prob=self.log_prob[rows],
            standard_error=self.standard_error[rows],
            ess=self.ess[rows],
            pareto_k=self.pareto_k[rows],
            running={k: (log_prob[rows], error[rows]) for k, (log_prob, error) in self.running.items()},
            counts=None if self.counts is None else self.counts[rows],
            shared=tuple(deviations[:, rows] for deviations in self.shared),
            steps=None if self.steps is None else self.steps[rows],
        )

    def __sub__(self, other: Evidence) -> Evidence:
        r"""Return the difference per row: log p(x_T | x_G), for instance, from log p(x_T, x_G) and log p(x_G).

        Errors add in quadrature, as of independent estimates: give the two different seeds. ``ess`` and ``pareto_k``
        are the worse of the two, and the cost is that of both.

        Raises:
            ValueError: evidence of another number of rows.
        """
        if not isinstance(other, Evidence):
            return NotImplemented
        if len(self) != len(other):
            raise ValueError(f"expected likelihoods of the same rows, got {len(self)} and {len(other)} of them")

        def difference(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return one[0] - two[0], (one[1].square() + two[1].square()).sqrt()

        log_prob, error = difference((self.log_prob, self.standard_error), (other.log_prob, other.standard_error))
        return Evidence(
            log_prob,
            error,
            torch.minimum(self.ess, other.ess),
            torch.maximum(self.pareto_k, other.pareto_k),
            f"{self.quantity} - {other.quantity}",
            min(self.num_particles, other.num_particles),
            {k: difference(one, other.running[k]) for k, one in self.running.items() if k in other.running},
            None if self.counts is None or other.counts is None else self.counts | other.counts,
            tuple(dict.fromkeys([*self.notes, *other.notes])),
            " and ".join(dict.fromkeys(proposal for proposal in (self.proposal, other.proposal) if proposal)),
            self.evaluations + other.evaluations,
            self.gradients + other.gradients,
            self.shared + other.shared,
        )

    def to_arviz(self) -> Any:
        """Return ArviZ's inference data: group ``log_likelihood``, and the diagnostics as ``sample_stats``.

        Each variable is ``(chain=1, draw=1, N)``. It is an ``InferenceData`` with ArviZ 0.x, a ``DataTree`` with 1.x.
        """

        def column(x: Tensor) -> Any:
            return x.detach().cpu().numpy()[None, None]

        stats = {name: column(getattr(self, name)) for name in ("standard_error", "ess", "pareto_k")}
        return build_inference_data({"log_likelihood": {self.quantity: column(self.log_prob)}, "sample_stats": stats})


def _rows(n: int) -> str:
    return f"{n} row{'s' * (n != 1)}"


def concatenate(parts: Sequence[Evidence]) -> Evidence:
    """Return the evidence of the rows of all parts, which are estimates of one quantity from as many particles."""

    def cat(pick: Callable[[Evidence], Tensor]) -> Tensor:
        return torch.cat([pick(part) for part in parts])

    return replace(
        parts[0],
        log_prob=cat(lambda e: e.log_prob),
        standard_error=cat(lambda e: e.standard_error),
        ess=cat(lambda e: e.ess),
        pareto_k=cat(lambda e: e.pareto_k),
        running={
            k: (cat(lambda e, k=k: e.running[k][0]), cat(lambda e, k=k: e.running[k][1]))  # type: ignore[misc]
            for k in parts[0].running
        },
        counts=None if all(part.counts is None for part in parts) else cat(lambda e: e.counted),
        shared=tuple(torch.cat(blocks, 1) for blocks in zip(*(part.shared for part in parts), strict=True)),
    )
