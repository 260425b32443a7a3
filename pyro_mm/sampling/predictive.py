"""Draws of every modality, given whichever of them each row has."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import fields
from typing import Any

import torch
from pyro import poutine
from pyro.infer import infer_discrete
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..batch.masks import Presence, all_of
from ..handlers.plates import FixedPlate
from ..handlers.rewrite import EditSites
from ..scoring.evaluation import evaluating, returned
from ..scoring.structure import PairStructure, latent_sites, pair_structure
from ..utils.arguments import check_counts, check_flags, check_programs, check_seed
from ..utils.seeding import temporary_seed
from .ancestral import AncestralSampler, SiteValues, to_sample_layout
from .proposals import Proposal
from .resampling import resample_latents


@torch.no_grad()
def generate(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    num_samples: int = 1,
    *,
    mean: bool = False,
    resample: bool = False,
    num_particles: int = 1000,
    seed: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
) -> dict[str, Tensor]:
    r"""Draws :math:`x_m \sim p(x_m | z, w_m)`, :math:`z \sim q(z | x_{present})`, of every modality of every row.

    Of a present modality it is a reconstruction, of a missing one cross-modal generation. The private latent
    :math:`w_m` of a missing modality is drawn from :math:`p(w_m | z)`, whatever the guide has in its place, and a row
    in which nothing is present from the model's own prior. A discrete latent that only the model has is drawn from its
    exact posterior given z and what is present. A missing modality on which a latent depends is drawn from its prior,
    unless the whole row is missing: give the story a latent for it where that matters. Descendants of a modality see
    its value where it is present, and the draw that is returned where it is not.

    Args:
        num_samples: S, independent draws of every row.
        mean: returns the means of the p(x_m | z) in place of draws; of a Categorical, the class probabilities
            ``(S, N, *event, C)``.
        resample: takes z from the guide's draws by their importance weights, and so, as K grows, from p(z | x_present)
            itself (:func:`posterior_draws`).
        num_particles: K, the draws to take from, if ``resample``.
        seed: of all draws; None goes on with torch's generator.
        vectorize: False draws sample by sample, for stories that do not broadcast.
        audit: False spares the audit of the pair (:mod:`pyro_mm.scoring.audit`), and what it would refuse.

    Returns:
        modality -> ``(S, N, *event)``; of a site in plates within a row ``(S, N, *plates, *event)``.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_counts(num_samples=num_samples, num_particles=num_particles)
    check_flags(mean=mean, resample=resample, vectorize=vectorize)
    check_seed(seed)
    options: dict[str, Any] = {"resample": resample, "num_particles": num_particles, "vectorize": vectorize}
    stacked = vectorize and (num_samples > 1 or resample)
    with (
        evaluating(model, guide, batch, audit=audit, stacked=stacked, draws=True) as rows,
        temporary_seed(seed, rows.device),
    ):
        return returned(draw_samples(model, guide, rows, num_samples, mean=mean, **options)[2], rows, batch)


@torch.no_grad()
def posterior_draws(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    num_samples: int = 1,
    *,
    resample: bool = False,
    num_particles: int = 1000,
    seed: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
    **options: Any,
) -> dict[str, Tensor]:
    r"""Draws of the guide's latents given what is present, or, with ``resample``, of the posterior's.

    Sampling importance resampling: S draws of every row, with replacement, out of K of the guide's, by

    .. math:: P(z = z_k) = w_k / \sum_l w_l, \qquad w_k = p(x_S, z_k) / q(z_k | x_S)

    which tends to p(z | x_S) as K grows. The draws of a row whose weights have a k-hat above 0.7 are mostly one and the
    same. The private latent :math:`w_m` of a missing modality is drawn from the model's :math:`p(w_m | z)`, and so are
    all latents of a row in which nothing is present from p. Rubin 1988 (Bayesian Statistics 3:395).

    Args:
        num_samples: S.
        resample: whether the weights count.
        num_particles: K.
        seed: of all draws; None goes on with torch's generator.
        vectorize: False runs draw by draw, for stories that do not broadcast.
        audit: False spares the audit of the pair (:mod:`pyro_mm.scoring.audit`), and what it would refuse.
        options: ``draws``, ``stratify`` and ``prior_share``, as of :func:`pyro_mm.log_marginal`.

    Returns:
        latent site of the guide -> ``(S, N, *plates, *event)``, plates being those within a row, outermost first.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_counts(num_samples=num_samples, num_particles=num_particles)
    check_flags(resample=resample, vectorize=vectorize)
    check_seed(seed)
    if unknown := set(options) - {field.name for field in fields(Proposal)}:
        raise TypeError(f"unknown options {', '.join(map(repr, sorted(unknown)))} of posterior_draws")
    if options and not resample:
        raise ValueError(f"{', '.join(options)}: for draws by weight, with resample=True")
    how: dict[str, Any] = {"proposal": Proposal(**options), "resample": resample, "num_particles": num_particles}
    stacked = vectorize and (num_samples > 1 or resample)
    with (
        evaluating(model, guide, batch, audit=audit, stacked=stacked, draws=True) as rows,
        temporary_seed(seed, rows.device),
    ):
        return returned(
            draw_samples(model, guide, rows, num_samples, decode=False, vectorize=vectorize, **how)[0], rows, batch
        )


def draw_samples(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    num_samples: int,
    *,
    mean: bool = False,
    decode: bool = True,
    resample: bool = False,
    num_particles: int = 1000,
    proposal: Proposal | None = None,
    vectorize: bool = True,
) -> tuple[SiteValues, SiteValues, SiteValues]:
    """Draws of the guide's latents, and with ``decode`` of the model's and of modalities with these very latents."""
    info, chosen = pair_structure(model, guide, batch), SiteValues()
    if info.factors and not bool(torch.as_tensor(batch.rows).all()):
        raise ValueError(
            f"the story observes {sorted(info.factors)[0]!r}, which is no modality of the batch, and a row in which "
            "nothing is present is drawn from the prior without it: take rows that have something, or make it a "
            "modality"
        )
    if resample:
        if "enumerated" in info.latents.values():
            raise ValueError("resample needs a guide without enumerated sites: let the model alone have them")
        chosen = resample_latents(model, guide, batch, num_samples, num_particles, proposal or Proposal(), vectorize)
    runs = [chosen]
    if not vectorize:
        runs = [{name: z[s : s + 1] for name, z in chosen.items()} for s in range(num_samples)]
    each = [_run(model, guide, batch, info, num_samples // len(runs), run, mean, decode) for run in runs]
    guides, models, modalities = ({n: torch.cat([d[n] for d in of]) for n in of[0]} for of in zip(*each, strict=True))
    return guides, models, modalities


def _run(
    model: Any,
    guide: Any,
    batch: Batch,
    info: PairStructure,
    num_samples: int,
    chosen: SiteValues,
    mean: bool,
    decode: bool,
) -> tuple[SiteValues, SiteValues, SiteValues]:
    """Return what :func:`draw_samples` does, from one run of the guide, or draws in its place, and one of the model."""

    def particles() -> Any:
        return FixedPlate("particles", num_samples, dim=-info.nesting - 1) if num_samples > 1 else nullcontext()

    with poutine.block(), poutine.trace() as drawn, particles():
        guide(batch)
    trace, ancestral, ours = drawn.trace, AncestralSampler(batch, info.modalities, mean), {}
    for name, z in chosen.items():
        site = trace.nodes[name]
        inner = z.dim() - 2 - site["fn"].event_dim
        trace.nodes[name] = site | {"value": z.movedim(1, 1 + inner).reshape(site["value"].shape)}
    theirs = latent_sites(trace)
    if decode or not all(ancestral.informed(site) is True for site in theirs.values()):
        if discrete := {name for name, enumerable in info.model_only.items() if enumerable}:
            first = -info.nesting - 1 - (num_samples > 1)
            trace = _with_discrete(trace, model, batch, discrete, ancestral.informed, particles, first)
        with poutine.block(), poutine.trace() as run, ancestral, poutine.replay(trace=trace), particles():
            model(batch)
        ours = latent_sites(run.trace)
        theirs = {name: ours.get(name, site) for name, site in theirs.items()}
    placed = lambda sites: {name: to_sample_layout(site, batch.size) for name, site in sites.items()}  # noqa: E731
    return placed(theirs), placed(ours), ancestral.modalities


def _with_discrete(
    trace: Any,
    model: Any,
    batch: Batch,
    names: set[str],
    informed: Callable[[Any], Presence],
    particles: Any,
    enum_dim: int,
) -> Any:
    """The trace with draws of the discrete sites that only the model has, from their posterior."""

    def edit(msg: dict[str, Any]) -> None:
        if msg["name"] in names:
            msg["infer"]["enumerate"] = "parallel"
        if (there := informed(msg)) is not True:  # what is to be drawn from p says nothing of its parents
            msg["mask"] = there if msg["mask"] is None else all_of([there, msg["mask"]])

    # not by a replay alone: what is done already hides from Pyro which enumerated sites its prior depends on
    given = {name: site["value"] for name, site in latent_sites(trace).items()}

    def conditioned() -> None:
        with poutine.replay(trace=trace), poutine.condition(data=given), EditSites(edit), particles():
            model(batch)

    with poutine.block(), poutine.trace() as discrete:
        infer_discrete(conditioned, first_available_dim=enum_dim)()
    new = trace.copy()
    for name in names:
        site = discrete.trace.nodes[name]
        new.add_node(name, **(site | {"infer": {}, "name": name}))
    return new
