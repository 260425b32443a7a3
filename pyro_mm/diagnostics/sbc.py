r"""Simulation-based calibration: whether the draws of a guide could be draws of the model's exact posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..batch.masks import over_events
from ..sampling.ancestral import simulate
from ..scoring.audit.audit import audit as audited
from ..scoring.evaluation import evaluating, returned
from ..scoring.importance import score_model
from ..scoring.reduction import SiteReducer
from ..scoring.structure import Callback, PairStructure, latent_sites, pair_structure, private_modality
from ..scoring.term_pair import TermPair
from ..scoring.views import TermViews
from ..utils.arguments import check_counts, check_flags, check_function, check_mapping, check_programs
from ..utils.seeding import normalize_seed, temporary_seed
from .rank_tests import LEVEL, RankTest, adjust_p_values, p_text, rank_test, uniformity

PAIRS_PER_PASS = 2**14  # (row, draw) pairs at once, on CUDA four times as many
LIKELIHOOD = "log_likelihood"

Quantity = Callable[[dict[str, Tensor], Batch], Tensor]


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
    def findings(self) -> dict[str, RankTest]:
        """Coordinate -> :class:`RankTest`."""
        p_values = [uniformity(counts) for counts in self.counts.values()]
        each = zip(self.counts.values(), p_values, adjust_p_values(p_values), strict=True)
        return dict(zip(self.counts, (rank_test(*one) for one in each), strict=True))

    @property
    def off(self) -> dict[str, RankTest]:
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
        audit: False spares the audit of the pair (:mod:`pyro_mm.scoring.audit`), and what it would refuse.

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
        found = _simulate_and_rank(model, guide, rows, num_draws, seed, quantities, chunk, vectorize, audit)
        return returned(found, rows, batch)


def _simulate_and_rank(
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
    seed, parts = normalize_seed(seed), []
    chunk = chunk or PAIRS_PER_PASS * (4 if batch.device.type == "cuda" else 1)
    with temporary_seed(seed, batch.device):
        simulated, truth = simulate(model, batch, audit=False)
        if audit:
            audited(model, guide, simulated, stacked=vectorize)
        info = pair_structure(model, guide, simulated)
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
            part = simulated.block(rows)
            views = TermViews.of(part, info)
            passes = [here] if vectorize else here.split(1)
            found = [_values(TermPair(model, guide, views, len(h)), info, h, truth, rows, part, own) for h in passes]
            parts.append({name: _ranks(torch.cat([f[name] for f in found]), place[rows]) for name in found[0]})
    ranks = {}
    for name in parts[0]:
        modality, use = private_modality(name, info.modalities), there
        if modality is not None:
            use = there & batch.present[modality] if modality in batch else torch.zeros_like(there)
        if use.any():
            ranks[name] = torch.cat([ranked[name] for ranked in parts]).masked_fill(~use[:, None], -1)
            if (ranks[name] == -2).any():
                raise ValueError(f"{name!r} is NaN in some draw, which so has no rank")
    return Calibration(ranks, num_draws)


def _values(
    pair: TermPair,
    info: PairStructure,
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
    values, sites, shape = {}, {}, SiteReducer(pair, unscaled=True)
    for name, site in latent_sites(pair.trace).items():
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
