r"""Simulation-based calibration: a test that a guide's draws are from the model's posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from pyro import poutine
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..batch.masks import add_event_dims
from ..sampling.ancestral import simulate
from ..sampling.shared_blocks import share_tensors
from ..scoring.audit.audit import audit as audit_pair
from ..scoring.evaluation import evaluating, move_result
from ..scoring.given_latents import Given, draw_global_latents
from ..scoring.model_scores import score_model
from ..scoring.program import Program
from ..scoring.reduction import SiteReducer, refuse_atoms
from ..scoring.sharing import share_evaluation
from ..scoring.structure import PairStructure, latent_sites, pair_structure, private_modality
from ..scoring.term_pair import TermPair
from ..scoring.views import TermViews
from ..utils.arguments import check_counts, check_flags, check_function, check_mapping, check_programs
from ..utils.seeding import normalize_seed, part_seed, temporary_seed
from ..utils.sharing import sharing
from .rank_tests import LEVEL, RankTest, adjust_p_values, p_text, rank_test, uniformity

PAIRS_PER_PASS = 2**14  # (row, draw) pairs at once; four times as many on CUDA
LIKELIHOOD = "log_likelihood"
NOT_USED = -1  # in the place of a rank: the row is left out
NOT_A_NUMBER = -2  # in the place of a rank: a value is NaN

Quantity = Callable[[dict[str, Tensor], Batch], Tensor]


@dataclass(frozen=True)
class Calibration:
    """Ranks of true values among the draws of a guide, and tests of their uniformity.

    Attributes:
        ranks: site or quantity -> integers ``(N, D)``: the number of the L draws, 0..L, that lie below the true value,
            per row and coordinate; -1 if the row is left out.
        num_draws: L.
    """

    ranks: Mapping[str, Tensor]
    num_draws: int

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Number of rows of each rank, ``(L + 1,)``, by coordinate such as ``"z[0]"``."""
        found = {}
        for name, ranks in self.ranks.items():
            for d, column in enumerate(ranks.cpu().T):
                label = name if ranks.shape[1] == 1 else f"{name}[{d}]"
                found[label] = torch.bincount(column[column >= 0], minlength=self.num_draws + 1).numpy()
        return found

    @cached_property
    def findings(self) -> dict[str, RankTest]:
        """Test of uniform ranks, :class:`~pyro_mm.diagnostics.rank_tests.RankTest`, by coordinate."""
        p_values = [uniformity(counts) for counts in self.counts.values()]
        adjusted = adjust_p_values(p_values)
        return {
            name: rank_test(counts, p, holm)
            for (name, counts), p, holm in zip(self.counts.items(), p_values, adjusted, strict=True)
        }

    @property
    def off(self) -> dict[str, RankTest]:
        """Tests of the coordinates whose ranks are not uniform, the least uniform first."""
        found = {name: f for name, f in self.findings.items() if f.adjusted < LEVEL}
        return dict(sorted(found.items(), key=lambda item: item[1].p_value))

    def __repr__(self) -> str:
        rows = max(test.rows for test in self.findings.values())
        off = list(self.off.items())
        texts = [f"{name} {test.verdict} ({p_text(test.adjusted)})" for name, test in off[:3]]
        if len(off) > 3:
            texts.append(f"{len(off) - 3} more")
        result = f"off: {', '.join(texts)}" if off else f"all {len(self.findings)} coordinates uniform"
        return f"Calibration({rows} simulations, {self.num_draws} draws of each; {result})"

    def table(self) -> str:
        """Return a table as text: p-values, shift, width and verdict of each coordinate."""
        width = max(10, *map(len, self.findings))
        lines = [f"{'coordinate':{width}}   rows         p    Holm p    shift (s.e.)    width (s.e.)   guide's draws"]
        for name, test in self.findings.items():
            shift = f"{test.shift:+.2f} ({test.shift_error:.2f})"
            relative_width = f"{test.width:.2f} ({test.width_error:.2f})"
            p, holm = (p_text(x).removeprefix("p ").removeprefix("= ") for x in (test.p_value, test.adjusted))
            lines.append(
                f"{name:{width}} {test.rows:6d} {p:>9} {holm:>9} {shift:>15} {relative_width:>15}   {test.verdict}"
            )
        lines.append(
            f"{len(self.off)} of {len(self.findings)} off: Holm's p < {LEVEL}, adjusted for all lines. Shift of the "
            "guide's draws: in their standard deviations, 0 is right. Width: relative to the right one, 1 is right."
        )
        return "\n".join(lines)


@torch.no_grad()
def calibration(
    model: Program,
    guide: Program,
    batch: Batch,
    *,
    num_draws: int = 100,
    seed: int | None = None,
    quantities: Mapping[str, Quantity] | None = None,
    chunk: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
    devices: int | None = None,
) -> Calibration:
    r"""Test a guide q(z | x_S) against the posterior p(z | x_S), on rows simulated from the model.

    .. math:: z^* \sim p(z), \quad x_S \sim p(x_S | z^*), \quad z_1, \dots, z_L \sim q(z | x_S), \qquad
              r = \#\{l : t(z_l, x_S) < t(z^*, x_S)\}

    If q is the posterior, the rank r is uniform on {0, .., L} for every function t. Tested are each coordinate of each
    latent site that guide and model share, ``"log_likelihood"``, which is t = log p(x_S | z), and ``quantities``. The
    log-likelihood finds errors that no latent's ranks show: a guide that is the prior has uniform ranks, and its
    log-likelihoods are ``"too low"``, because its draws explain the rows worse than the truth does.

    A p-value is for the mixture of missing-data patterns in ``batch``. One pattern at a time, as in
    ``batch.only("image")``, needs fewer rows to find an error in that pattern. Rows with nothing present are left out,
    and so are the private latent ``"w_m"`` of modality m in rows that lack m: the package does not use the guide
    there. Ties, as of discrete latents, are broken at random; the classes of a Categorical are compared as numbers.
    Latents that all rows share, outside the plate ``"data"``, are not tested: rows are simulated and the guide is
    asked given one draw of them from the guide.

    **Limits.** Uniform ranks do not show that the model fits data: all rows are simulated, and the guide may still be
    wrong on real rows that the model seldom generates. Nor do they show that q is right in each row, since errors of
    opposite sign cancel over rows, or that other functions t, such as those of two coordinates, have uniform ranks.
    Small errors remain: N rows seldom find a shift below about :math:`4 / \sqrt N` standard deviations.

    Args:
        model, guide: callables of a batch. Row-local enumerated sites that only the model has are summed out of
            log p(x_S | z); other latents that only the model has are drawn from their prior there.
        batch: N rows; their number, their missing modalities and their covariates count, their values are not used.
        num_draws: L, draws per row. Power depends on N; more than about 100 draws add little.
        seed: of all draws; None takes one from torch's generator.
        quantities: name -> function t of (latents, rows): site -> values ``(.., N, *event)``, and a batch of simulated
            rows; it returns ``(.., N)``. The dimensions .. are those of draws, and none with ``vectorize=False``.
        chunk: (row, draw) pairs at once, which bounds the memory; another value gives other draws.
        vectorize: False draws one by one, for stories that do not broadcast.
        audit: False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`).
        devices: processes that share out the blocks of rows and draws, as in :func:`~pyro_mm.log_marginal`.

    Returns:
        A :class:`Calibration`; ``print`` shows the result in a line, ``table()`` in full.

    Raises:
        ValueError: fewer than two draws; no row with anything present; no latent that guide and model share; a quantity
            of another shape, with a NaN, or whose name is taken; a site that is scaled, or one outside the plate
            ``"data"`` that the guide lacks.

    References:
        Talts et al. 2018 (arXiv:1804.06788). Modrák et al. 2023 (Bayesian Analysis), for functions of z and x.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_counts(2, num_draws=num_draws)
    if chunk is not None:
        check_counts(chunk=chunk)
    check_flags(vectorize=vectorize, audit=audit)
    quantities = check_mapping("quantities", {} if quantities is None else quantities, "functions")
    for name, quantity in quantities.items():
        check_function(f"quantities[{name!r}]", quantity, ("latents", "rows"))

    def rank() -> Calibration:
        shared_seed = sharing().broadcast(normalize_seed(seed))
        with evaluating(model, guide, batch, audit=False) as rows:
            found = _simulate_and_rank(
                model, guide, rows.read(), num_draws, shared_seed, quantities, chunk, vectorize, audit
            )
            return move_result(found, rows, batch)

    return share_evaluation("calibration", devices, model, guide, batch, seed, rank)


def _simulate_and_rank(
    model: Program,
    guide: Program,
    batch: Batch,
    num_draws: int,
    seed: int,
    quantities: Mapping[str, Quantity],
    chunk: int | None,
    vectorize: bool,
    audit: bool,
) -> Calibration:
    """Simulate rows, draw from the guide given them, and rank the truth among the draws."""
    nonempty = torch.stack(list(batch.present.values())).any(0)
    if not nonempty.any():
        raise ValueError("no row of the batch has anything present, so there is no posterior to test")
    chunk = chunk or PAIRS_PER_PASS * (4 if batch.device.type == "cuda" else 1)

    with temporary_seed(seed, batch.device):
        if pair_structure(model, guide, batch).global_latents:
            shared = draw_global_latents(guide, batch)
            model, guide = Given(model, shared), Given(guide, shared)
        simulated, latents = simulate(model, batch, audit=False)
        if audit:
            audit_pair(model, guide, simulated, stacked=vectorize)
        structure = pair_structure(model, guide, simulated)
        truth = {name: value for name, value in latents.items() if name in structure.latents}
        if not truth:
            raise ValueError(f"the guide's latent sites {sorted(structure.latents)} are none of the model's")
        if taken := set(quantities) & {*truth, LIKELIHOOD}:
            raise ValueError(f"quantities need names of their own, and these are taken: {sorted(taken)}")

        # The truth takes the place of one of L + 1 draws, so that only its value distinguishes it from the others:
        # rounding at its place is the same, and its order among equal values is random.
        place = torch.randint(num_draws + 1, (batch.size,), device=batch.device)
        blocks = torch.arange(batch.size, device=batch.device).split(max(1, chunk // (num_draws + 1)))

        def rank_block(number: int) -> dict[str, Tensor]:
            rows = blocks[number]
            is_truth = torch.arange(num_draws + 1, device=batch.device)[:, None] == place[rows]
            block = simulated.block(rows)
            views = TermViews.of(block, structure).given_globals(structure)
            with temporary_seed(part_seed(seed, number + 1), batch.device):
                values = [
                    _values(TermPair(model, guide, views, len(mask)), structure, mask, truth, rows, block, quantities)
                    for mask in ([is_truth] if vectorize else is_truth.split(1))
                ]
            return {name: _ranks(torch.cat([v[name] for v in values]), place[rows]) for name in values[0]}

        parts = share_tensors(range(len(blocks)), rank_block, batch.device)
    ranks = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Calibration(_ranks_in_use(ranks, batch, nonempty, structure), num_draws)


def _ranks_in_use(
    ranks: Mapping[str, Tensor], batch: Batch, nonempty: Tensor, structure: PairStructure
) -> dict[str, Tensor]:
    """Mark rows in which a site is not used by -1, and drop sites that are used in no row.

    Args:
        ranks: site or quantity -> ``(N, D)``.
        batch: N rows.
        nonempty: rows with something present, boolean ``(N,)``.
        structure: structure of the pair.

    Raises:
        ValueError: a value is NaN in some draw.
    """
    found = {}
    for name, values in ranks.items():
        used = nonempty
        modality = private_modality(name, structure.modalities)
        if modality is not None:
            used = nonempty & batch.present[modality] if modality in batch else torch.zeros_like(nonempty)
        if not used.any():
            continue
        found[name] = values.masked_fill(~used[:, None], NOT_USED)
        if (found[name] == NOT_A_NUMBER).any():
            raise ValueError(f"{name!r} is NaN in some draw, and NaN has no rank")
    return found


def _values(
    pair: TermPair,
    structure: PairStructure,
    is_truth: Tensor,
    truth: Mapping[str, Tensor],
    rows: Tensor,
    batch: Batch,
    quantities: Mapping[str, Quantity],
) -> dict[str, Tensor]:
    """Compute the values that are ranked: of draws from the guide, and of the truth in its place.

    Args:
        pair: model and guide on these rows, with K particles.
        structure: structure of the pair.
        is_truth: boolean ``(K, n)``, True at the place of the truth.
        truth: latent site -> simulated values of all N rows.
        rows: indices of these n rows among the N.
        batch: the n rows.
        quantities: name -> function of latents and rows.

    Returns:
        Site or quantity -> values ``(K, n, D)``.
    """
    k, n = is_truth.shape
    mask = is_truth.reshape(k, *[1] * (structure.nesting - 1), n) if pair.plated else is_truth[0]
    with poutine.block():
        pair.guide()

    values: dict[str, Tensor] = {}
    latents: dict[str, Tensor] = {}
    reducer = SiteReducer(pair, unscaled=True)
    for name, site in latent_sites(pair.trace).items():
        if name not in truth:
            continue
        reducer.scale(site)  # raises for a site outside the plate "data"
        refuse_atoms(site)
        event_dim = site["fn"].event_dim
        row_dim = truth[name].dim() - event_dim - 1
        x = torch.where(add_event_dims(mask, event_dim), truth[name].index_select(row_dim, rows), site["value"])
        latents[name] = x
        pair.trace.nodes[name] = site | {"value": x}
        x = x if pair.plated else x[None]
        values[name] = x.movedim(x.dim() - event_dim - 1, 1).reshape(k, n, -1)

    with poutine.block():
        scores = score_model(pair, structure, unscaled=True)
    values[LIKELIHOOD] = sum(scores.likelihood.values(), torch.zeros(()))[:, 0, :, None]
    for name, function in quantities.items():
        x = function(dict(latents), batch)
        if x.shape[-1:] != (n,) or x.numel() != k * n:
            raise ValueError(f"quantity {name!r}: expected shape {(k, n) if pair.plated else (n,)}, got {(*x.shape,)}")
        values[name] = x.reshape(k, n, 1)
    return values


def _ranks(values: Tensor, place: Tensor) -> Tensor:
    """Rank the values at ``place``, ``(n,)``, among ``(L + 1, n, D)``, with ties by order.

    Returns:
        Ranks ``(n, D)``; NOT_A_NUMBER if a value is NaN.
    """
    true = values.gather(0, place[None, :, None].expand(1, *values.shape[1:]))
    before = torch.arange(len(values), device=place.device)[:, None, None] < place[:, None]
    ranks = ((values < true) | ((values == true) & before)).sum(0)
    return ranks.masked_fill(values.isnan().any(0), NOT_A_NUMBER)
