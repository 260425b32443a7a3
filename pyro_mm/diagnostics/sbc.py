r"""Simulation-based calibration: whether the draws of a guide could be draws of the model's exact posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from .arguments import check_counts, check_flags, check_function, check_mapping, check_programs
from .audit import audit as audited
from .batch import Batch, check_batch
from .evaluation import evaluating, returned
from .global_state import settings_kept
from .importance import score_model
from .pairs import Callback, Pair, Structure, Views, latents, private, structure
from .predictive import simulate
from .presence import over_events
from .reduction import Reduce
from .seeding import seeded, settled

CHUNK = 2**14  # (row, draw) pairs at once, on CUDA four times as many
LEVEL = 0.05  # the chance that a table names anything at all where nothing is wrong
CLEAR = 2.5  # standard errors beyond which a finding's shift or width gives it its name
LIKELIHOOD = "log_likelihood"

Quantity = Callable[[dict[str, Tensor], Batch], Tensor]


@dataclass(frozen=True)
class Finding:
    r"""What the ranks of one coordinate say, from ``rows`` simulations.

    Attributes:
        p_value: of uniform ranks, exact (:func:`uniformity`); ``adjusted`` is Holm's, over all coordinates together.
        shift: by how much the guide's draws lie too high, in their own standard deviations, ± ``shift_error``.
        width: their standard deviation over the one that they should have, ± ``width_error``. With the normal scores
            :math:`y = \Phi^{-1}(u)` of true values, :math:`y \sim N(-\text{shift}, \text{width}^{-2})`, fitted to the
            L + 1 classes of u by maximum likelihood; exact for normals, elsewhere a description. Large and with a large
            error where most true values lie outside all draws.
        verdict: ``"uniform"`` unless ``adjusted`` is below 0.05; else ``"too low"``, ``"too high"``, ``"too narrow"``
            (ranks in a U; the guide is surer than its errors allow, be it by its width or by a mean that is off, here
            one way and there the other), ``"too wide"`` (a hump), ``"too low and narrow"`` and the like, or
            ``"of another shape"``.
    """

    rows: int
    p_value: float
    adjusted: float
    shift: float
    shift_error: float
    width: float
    width_error: float
    verdict: str


@dataclass(frozen=True)
class Calibration:
    """Ranks of true values among draws of a guide, and what they say.

    Attributes:
        ranks: site or quantity -> ``(N, D)``, long: how many of L draws lie below the true value of a row, for each of
            D coordinates, in 0..L; -1 where the row is left out.
        num_draws: L.
    """

    ranks: Mapping[str, Tensor]
    num_draws: int

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Coordinate (``"z[0]"``) -> the number of rows of each rank, ``(L + 1,)``."""
        found = {}
        for name, ranks in self.ranks.items():
            for d, column in enumerate(ranks.cpu().T):
                label = name if ranks.shape[1] == 1 else f"{name}[{d}]"
                found[label] = torch.bincount(column[column >= 0], minlength=self.num_draws + 1).numpy()
        return found

    @cached_property
    def findings(self) -> dict[str, Finding]:
        """Coordinate -> :class:`Finding`."""
        p_values = [uniformity(counts) for counts in self.counts.values()]
        each = zip(self.counts.values(), p_values, _holm(p_values), strict=True)
        return dict(zip(self.counts, (_finding(*one) for one in each), strict=True))

    @property
    def off(self) -> dict[str, Finding]:
        """The coordinates whose ranks are not uniform, the least uniform first."""
        found = {name: f for name, f in self.findings.items() if f.adjusted < LEVEL}
        return dict(sorted(found.items(), key=lambda item: item[1].p_value))

    def __repr__(self) -> str:
        rows, found = max(f.rows for f in self.findings.values()), list(self.off.items())
        named = [f"{name} {f.verdict} ({p_text(f.adjusted)})" for name, f in found[:3]]
        named += [f"{len(found) - 3} more"] if len(found) > 3 else []
        what = f"off: {', '.join(named)}" if found else f"all {len(self.findings)} coordinates uniform"
        return f"Calibration({rows} simulations, {self.num_draws} draws of each; {what})"

    def table(self) -> str:
        """A line for each coordinate: its p-values, and how the guide's draws of it are off if they are."""
        width = max(10, *map(len, self.findings))
        lines = [f"{'coordinate':{width}}   rows         p      Holm    shift (s.e.)    width (s.e.)   guide's draws"]
        for name, f in self.findings.items():
            shift, wide = f"{f.shift:+.2f} ({f.shift_error:.2f})", f"{f.width:.2f} ({f.width_error:.2f})"
            p, holm = (p_text(x).removeprefix("p ").removeprefix("= ") for x in (f.p_value, f.adjusted))
            lines.append(f"{name:{width}} {f.rows:6d} {p:>9} {holm:>9} {shift:>15} {wide:>15}   {f.verdict}")
        lines.append(
            f"{len(self.off)} of {len(lines) - 1} off, by Holm's p < {LEVEL} over all lines. shift: in standard "
            "deviations of the draws; width: 1 is right."
        )
        return "\n".join(lines)


@torch.no_grad()
def calibration(
    model: Callback,
    guide: Callback,
    batch: Batch,
    *,
    num_draws: int = 100,
    seed: int | None = None,
    quantities: Mapping[str, Quantity] | None = None,
    chunk: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
) -> Calibration:
    r"""Test if q(z | x_S) could be the posterior p(z | x_S), on rows that the model itself makes.

    .. math:: z^* \sim p(z), \quad x_S \sim p(x_S | z^*), \quad z_1, \dots, z_L \sim q(z | x_S), \qquad
              r = \#\{l : t(z_l, x_S) < t(z^*, x_S)\}

    If q is the posterior then r is uniform on {0, .., L}, for every function t. Those here are each coordinate of each
    latent site that guide and model share, ``"log_likelihood"``, which is t = log p(x_S | z), and ``quantities``. The
    likelihood sees what no latent's ranks can: those of a guide that is the prior are uniform, and its likelihoods
    are ``"too low"``, which is to say that its draws explain the rows worse than the truth does.

    Rows differ in what is present, so a p-value is of the mixture of patterns in ``batch``; one pattern at a time
    (``batch.only("image")``) finds a fault of one pattern sooner. Left out, because nothing in the package uses the
    guide there: rows in which nothing is present, and the private latent ``"w_m"`` of a modality m in rows that lack
    it. Ties, as of discrete latents, are broken at random; the classes of a Categorical are compared as numbers.

    **What a uniform result does not show.** That the model fits any data: all rows are its own, and the guide may
    still fail on real ones that the model seldom makes. That q is right in every row: opposite errors cancel over
    rows. That functions t that were not asked for are right, dependence between coordinates among them. Nor small
    errors: from N rows a shift below about :math:`4 / \sqrt N` standard deviations is seldom found.

    Args:
        model, guide: callables of a batch. Row-local enumerated sites of the model alone are summed out of
            log p(x_S | z); any other latent that only the model has is drawn from its prior there.
        batch: how many rows, what is present in each, and covariates; its values are not used.
        num_draws: L. The number of rows decides what is found; more than about 100 draws of each adds little.
        seed: of everything; None takes one from torch's generator, which is not otherwise touched.
        quantities: name -> t(latents, rows): site -> ``(.., N, *event)`` and a batch of simulated rows give
            ``(.., N)``, where .. are the draws (none with ``vectorize=False``).
        chunk: (row, draw) pairs at once, which bounds the memory. Another one gives other draws.
        vectorize: False draws one by one, for stories that do not broadcast.
        audit: False spares the audit of the pair on a few rows (:mod:`pyro_mm.audit`), and what it would refuse.

    Raises:
        ValueError: fewer than two draws; no row with anything present; no latent that guide and model share; a quantity
            of another shape, with a NaN, or whose name is taken; a site that is scaled or outside the plate ``"data"``.

    Talts et al. 2018 (arXiv:1804.06788); Modrák et al. 2023 (Bayesian Analysis) on functions of z and x.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_counts(2, num_draws=num_draws)
    if chunk is not None:
        check_counts(chunk=chunk)
    check_flags(vectorize=vectorize, audit=audit)
    for name, quantity in check_mapping("quantities", {} if quantities is None else quantities, "functions").items():
        check_function(f"quantities[{name!r}]", quantity, ("latents", "rows"))
    with evaluating(model, guide, batch, audit=False) as rows:
        found = _calibration(model, guide, rows, num_draws, seed, quantities, chunk, vectorize, audit)
        return returned(found, rows, batch)


def _calibration(
    model: Callback,
    guide: Callback,
    batch: Batch,
    num_draws: int,
    seed: int | None,
    quantities: Mapping[str, Quantity] | None,
    chunk: int | None,
    vectorize: bool,
    audit: bool,
) -> Calibration:
    """Simulate rows, draw from the guide given them, and rank the truth among the draws."""
    there = torch.stack(list(batch.present.values())).any(0)
    if not there.any():
        raise ValueError("no row of the batch has anything present, so there is no posterior to look at")
    seed, parts = settled(seed), []
    chunk = chunk or CHUNK * (4 if batch.device.type == "cuda" else 1)
    with seeded(seed, batch.device):
        simulated, truth = simulate(model, batch, audit=False)
        if audit:
            audited(model, guide, simulated, stacked=vectorize)
        info = structure(model, guide, simulated)
        truth = {name: value for name, value in truth.items() if name in info.latents}
        if not truth:
            raise ValueError(f"the guide's latent sites {sorted(info.latents)} are none of the model's")
        own = dict(quantities or {})
        if taken := set(own) & {*truth, LIKELIHOOD}:
            raise ValueError(f"quantities need names of their own, and these are taken: {sorted(taken)}")
        # the truth takes the place of one of L + 1 draws, so that nothing but its value tells it from the others:
        # neither the rounding at its place, nor, among equals, its order, which so is a random one
        place = torch.randint(num_draws + 1, (batch.size,), device=batch.device)
        for rows in torch.arange(batch.size, device=batch.device).split(max(1, chunk // (num_draws + 1))):
            here = torch.arange(num_draws + 1, device=batch.device)[:, None] == place[rows]
            part = simulated.excerpt(rows)
            views = Views.of(part, info)
            passes = [here] if vectorize else here.split(1)
            found = [_values(Pair(model, guide, views, len(h)), info, h, truth, rows, part, own) for h in passes]
            parts.append({name: _ranks(torch.cat([f[name] for f in found]), place[rows]) for name in found[0]})
    ranks = {}
    for name in parts[0]:
        modality, use = private(name, info.modalities), there
        if modality is not None:
            use = there & batch.present[modality] if modality in batch else torch.zeros_like(there)
        if use.any():
            ranks[name] = torch.cat([ranked[name] for ranked in parts]).masked_fill(~use[:, None], -1)
            if (ranks[name] == -2).any():
                raise ValueError(f"{name!r} is NaN in some draw, which so has no rank")
    return Calibration(ranks, num_draws)


def _values(
    pair: Pair,
    info: Structure,
    here: Tensor,
    truth: Mapping[str, Tensor],
    rows: Tensor,
    batch: Batch,
    quantities: Mapping[str, Quantity],
) -> dict[str, Tensor]:
    """Everything that is ranked, ``(K, n, D)``: of draws from the guide, and of the truth where ``here`` says."""
    k, n = here.shape
    mask = here.reshape(k, *[1] * (info.nesting - 1), n) if pair.plated else here[0]
    with poutine.block():
        pair.guide()
    values, sites, shape = {}, {}, Reduce(pair, unscaled=True)
    for name, site in latents(pair.trace).items():
        if name in truth:
            shape.scale(site)  # which refuses a site outside the plate "data"
            event_dim, drawn = site["fn"].event_dim, site["value"]
            true = truth[name].index_select(truth[name].dim() - event_dim - 1, rows)
            sites[name] = x = torch.where(over_events(mask, event_dim), true, drawn)
            pair.trace.nodes[name] = site | {"value": x}
            x = x if pair.plated else x[None]
            values[name] = x.movedim(x.dim() - event_dim - 1, 1).reshape(k, n, -1)
    with poutine.block():
        scores = score_model(pair, info, unscaled=True)
    values[LIKELIHOOD] = sum(scores.likelihood.values(), torch.zeros(()))[:, 0, :, None]
    for name, function in quantities.items():
        x = function(dict(sites), batch)
        if x.shape[-1:] != (n,) or x.numel() != k * n:
            raise ValueError(f"quantity {name!r}: expected shape {(k, n) if pair.plated else (n,)}, got {(*x.shape,)}")
        values[name] = x.reshape(k, n, 1)
    return values


def _ranks(values: Tensor, place: Tensor) -> Tensor:
    """The ranks ``(n, D)`` among ``(L + 1, n, D)`` of those at ``place``, ``(n,)``; ties by order, -2 if any is NaN."""
    true = values.gather(0, place[None, :, None].expand(1, *values.shape[1:]))
    before = torch.arange(len(values), device=place.device)[:, None, None] < place[:, None]
    return ((values < true) | ((values == true) & before)).sum(0).masked_fill(values.isnan().any(0), -2)


# -- the test of uniform ranks, and what ranks look like -------------------------------------------------------------


def uniformity(counts: np.ndarray) -> float:
    r"""The p-value of N ranks being uniform, exact for ranks that are discrete.

    .. math:: \gamma = 2 \min_i \min\{P(B_i \le R_i), P(B_i \ge R_i)\}, \qquad B_i \sim \text{Bin}(N, i / (L + 1))

    with :math:`R_i` the number of ranks below i = 1..L. The p-value is the chance of a :math:`\gamma` as small: the
    smallest level at which the band of :func:`band` leaves the counts out.

    Args:
        counts: the number of rows of each rank 0..L, ``(L + 1,)``.

    Säilynoja, Bürkner & Vehtari 2022 (arXiv:2103.10522).
    """
    with settings_kept():
        from scipy.stats import binom  # here, because it takes most of a second

    n, cells = int(counts.sum()), len(counts)
    below, at = counts.cumsum()[:-1], np.arange(1, cells) / cells
    gamma = 2 * min(binom.cdf(below, n, at).min(), binom.sf(below - 1, n, at).min())
    p = 1 - _inside(*_limits(gamma * (1 + 1e-9), n, cells), n)  # what equals it, but for rounding, is as small
    return float(min(1.0, (cells - 1) * gamma, max(p, gamma / 2)))  # bounds that hold where 1 - p rounds to 1


@lru_cache(maxsize=256)
def band(num_rows: int, num_draws: int, prob: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Counts between which the numbers of ranks below 1..L all lie with at least ``prob``, if ranks are uniform.

    Returns:
        (lower, upper), each ``(L,)``, bounds included: the narrowest band of equal tail probabilities at every rank.
    """
    low, high = (1 - prob) / num_draws, 1.0  # by the union bound the first one is wide enough
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        wide = _inside(*_limits(middle, num_rows, num_draws + 1), num_rows) >= prob
        low, high = (middle, high) if wide else (low, middle)
    return _limits(low, num_rows, num_draws + 1)


def _limits(gamma: float, n: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest count below each rank whose tail probabilities are above gamma / 2."""
    with settings_kept():
        from scipy.stats import binom

    at = np.arange(1, cells) / cells
    lower, above = (binom.ppf(gamma / 2, n, p).clip(min=0).astype(int) for p in (at, 1 - at))  # -1 at gamma = 0
    return lower, n - above


def _inside(lower: np.ndarray, upper: np.ndarray, n: int) -> float:
    """The probability that uniform ranks have counts within limits: independent Poisson counts given their sum."""
    with settings_kept():
        from scipy.stats import poisson

    if (lower > upper).any():
        return 0.0
    rate, start, paths = n / (len(lower) + 1), 0, np.ones(1)
    step = poisson.pmf(np.arange((upper - np.append(0, lower[:-1])).max() + 1), rate)
    for low, high in zip(lower, upper, strict=True):
        paths, start = np.convolve(paths, step)[low - start : high - start + 1], low
    rest = n - start - np.arange(len(paths))
    return float(paths @ poisson.pmf(rest, rate) / poisson.pmf(n, n))


def _finding(counts: np.ndarray, p_value: float, adjusted: float) -> Finding:
    """The maximum-likelihood shift and width, by the classes' probabilities under a normal; and the verdict."""
    with settings_kept():
        from scipy.optimize import minimize
        from scipy.special import ndtr, ndtri

    cells = len(counts)
    edges, weights = ndtri(np.arange(1, cells) / cells), counts + 1 / cells  # one row spread out keeps it finite

    def probabilities(theta: np.ndarray) -> np.ndarray:
        below = ndtr((edges - theta[0]) * np.exp(-theta[1]))
        return np.diff(below, prepend=0.0, append=1.0).clip(min=1e-300)

    theta = minimize(lambda t: -(weights * np.log(probabilities(t))).sum() / weights.sum(), np.zeros(2)).x
    scaled = (edges - theta[0]) * np.exp(-theta[1])
    density = np.exp(-0.5 * scaled**2) / math.sqrt(2 * math.pi)
    slopes = -np.diff(np.stack([density * np.exp(-theta[1]), density * scaled]), prepend=0.0, append=0.0)
    information = weights.sum() * (slopes / probabilities(theta)) @ slopes.T
    error = np.sqrt(np.diag(np.linalg.pinv(information)))
    shift, width = -float(theta[0]), math.exp(-theta[1])
    rank = np.arange(cells) - (cells - 1) / 2
    mean = weights @ rank / weights.sum()  # which way is off shows in the ranks, even if all draws lie to one side
    words = {
        "low" if mean > 0 else "high": mean / math.sqrt(weights @ (rank - mean) ** 2) * weights.sum(),
        "wide" if width > 1 else "narrow": theta[1] / error[1],
    }
    clear = " and ".join(word for word, z in words.items() if abs(z) > CLEAR)
    verdict = "uniform" if adjusted >= LEVEL else f"too {clear}" if clear else "of another shape"
    rows, errors = int(counts.sum()), error * [1, width]
    return Finding(rows, p_value, float(adjusted), shift, float(errors[0]), width, float(errors[1]), verdict)


def p_text(p: float, digits: int = 2) -> str:
    """A p-value in words: what lies below 1e-15 is known by its bounds only."""
    return f"p = {p:.{digits}g}" if p > 1e-15 else "p < 1e-15"


def _holm(p_values: Sequence[float]) -> np.ndarray:
    """Holm's p-values: where nothing is wrong, the chance that any is below 0.05 is at most that, whatever depends."""
    p = np.asarray(p_values)
    order = np.argsort(p)
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    return adjusted
