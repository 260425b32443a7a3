"""Samples of every modality and latent, given the modalities that each row has."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from pyro import poutine
from pyro.infer import infer_discrete
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..batch.masks import all_of
from ..handlers.plates import FixedPlate
from ..handlers.rewrite import EditSites
from ..scoring.evaluation import evaluating, move_result
from ..scoring.given_latents import Given, draw_global_latents
from ..scoring.program import Program
from ..scoring.sharing import share_evaluation
from ..scoring.structure import PairStructure, latent_sites, pair_structure
from ..utils.arguments import check_counts, check_flags, check_names, check_programs, check_seed
from .ancestral import AncestralSampler, SiteValues, to_sample_layout
from .guide_sampler import DrawMethod
from .particle_sampler import ProposalScheme
from .proposals import resolve_proposal
from .resampling import Resampling, resample_latents
from .sample_blocks import sample_in_blocks


def generate(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    num_samples: int = 1,
    *,
    mean: bool | Sequence[str] | str = False,
    resample: bool = False,
    num_particles: int = 1000,
    proposal: ProposalScheme | str | None = None,
    seed: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
    devices: int | None = None,
) -> Generated:
    r"""Sample every modality of every row, given the modalities that are present in it.

    .. math:: x_m \sim p(x_m | z, w_m), \qquad z \sim q(z | x_S)

    with S the modalities present in the row. For a present modality the result is a reconstruction, for a missing one
    it is cross-modal generation. All modalities of one sample share their latents.

    * The private latent :math:`w_m` of a missing modality comes from :math:`p(w_m | z)`, whatever the guide has in its
      place, unless that is a surrogate, as in :func:`pyro_mm.recipes.mfm`: then from the surrogate, without
      ``resample``. All latents of a row in which nothing is present come from the model's prior.
    * A discrete latent that only the model has comes from its exact posterior given z and what is present.
    * A latent outside the plate ``"data"`` comes from the guide, once per sample: all rows of a sample share it. With
      ``resample`` the others are drawn by weight given it, from K particles for each of the S samples.
    * A missing modality on which a latent depends comes from its prior, unless the whole row is missing: give the story
      a latent for it if that matters. Descendants of a modality see its value where it is present, and elsewhere the
      sample that is returned.

    Modules run in evaluation mode, without gradient.

    Args:
        model (callable): a story, called with a batch.
        guide (callable): its guide, called with a batch.
        batch (Batch): N rows.
        num_samples (int): S, independent samples per row.
        mean (bool, str or sequence of str): return the means of the p(x_m | z) in the place of draws, of all modalities
            or of those that are named; of a Categorical, the class probabilities ``(S, N, *event, C)``.
        resample (bool): take z from the guide's draws by their importance weights, and so, as K grows, from the
            posterior p(z | x_S) itself (:func:`posterior_draws`).
        num_particles (int): K, weighted draws per row to take from, if ``resample``.
        proposal (Proposal, Fitted or ``"fitted"``): the way to draw these; None for ``mm.Proposal()``.
        seed (int): of all draws; None goes on with torch's generator.
        vectorize (bool): False samples one by one, for stories that do not broadcast over a plate of samples.
        audit (bool): False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`) and its errors.
        devices (int): processes that share out the blocks of rows and samples, as in :func:`~pyro_mm.log_marginal`.

    Returns:
        Modality -> ``(S, N, *event)``, or ``(S, N, *plates, *event)`` for a site in plates within a row: a dictionary
        whose attribute ``lengths`` has sequence -> numbers of valid steps, ``(S, N)``. They are those of the batch, or
        of strings of tokens those at which they end; anything may stand behind.

    Raises:
        ValueError: a proposal without ``resample``, a guide with enumerated sites with it, or a modality whose mean is
            not known with ``mean``.

    Example:
        >>> import torch, pyro_mm as mm
        >>> model = mm.models.LinearGaussian({"a": torch.ones(3, 2), "b": torch.ones(4, 2)})
        >>> guide = mm.Guide(z=model.posterior)
        >>> samples = mm.generate(model, guide, model.sample(5).only("a"), num_samples=7)
        >>> samples["b"].shape
        torch.Size([7, 5, 4])
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_counts(num_samples=num_samples, num_particles=num_particles)
    check_flags(resample=resample, vectorize=vectorize)
    check_seed(seed)
    resampling = _resampling(resample, num_particles, {"proposal": proposal})
    in_mean = mean if isinstance(mean, bool) else frozenset(check_names("mean", mean, batch))
    settings = SampleSettings(num_samples, mean=in_mean, resampling=resampling, vectorize=vectorize)

    def sample() -> Generated:
        samples = sample_pair(model, guide, batch, settings, seed=seed, audit=audit)
        return Generated(samples.modalities, samples.lengths)

    return share_evaluation("generate", devices, model, guide, batch, seed, sample)


def posterior_draws(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    num_samples: int = 1,
    *,
    resample: bool = False,
    num_particles: int = 1000,
    proposal: ProposalScheme | str | None = None,
    draws: DrawMethod | None = None,
    stratify: bool | None = None,
    prior_share: float | None = None,
    seed: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
    devices: int | None = None,
) -> dict[str, Tensor]:
    r"""Sample latents from the guide given what is present or, with ``resample``, from the posterior.

    Sampling importance resampling takes S draws per row, with replacement, from K particles of the proposal, with
    probabilities

    .. math:: P(z = z_k) = \frac{w_k}{\sum_l w_l}, \qquad w_k = \frac{p(x_S, z_k)}{q(z_k | x_S)}

    which tends to p(z | x_S) as K grows; at finite K the draws are biased towards the proposal, by O(1/K). Do not trust
    rows whose weights have a k-hat above 0.7 (``mm.log_marginal(..).pareto_k``): most of their draws are copies of one
    particle. Take K several times the number of different draws that you need.

    The private latent :math:`w_m` of a missing modality comes from the model's :math:`p(w_m | z)`, or without
    ``resample`` from the guide's surrogate, if it has one (``Private(.., surrogate=True)``), and all latents of a row
    in which nothing is present from the prior. A latent outside the plate ``"data"``, which all rows share, comes
    from the guide, once per sample; with ``resample`` the others are drawn by weight given it, from K particles for
    each of the S samples.

    Args:
        model (callable): a story, called with a batch.
        guide (callable): its guide, called with a batch.
        batch (Batch): N rows.
        num_samples (int): S, draws per row.
        resample (bool): draw by weight.
        num_particles (int): K, weighted draws per row to take from, if ``resample``.
        proposal (Proposal, Fitted or ``"fitted"``): the way to draw these; None for ``mm.Proposal()``.
        draws, stratify, prior_share: fields of a :class:`~pyro_mm.Proposal` one by one, in the place of ``proposal``.
        seed (int): of all draws; None goes on with torch's generator.
        vectorize (bool): False draws one by one, for stories that do not broadcast over a plate of samples.
        audit (bool): False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`) and its errors.
        devices (int): processes that share out the blocks of rows and samples, as in :func:`~pyro_mm.log_marginal`.

    Returns:
        Latent site of the guide -> ``(S, N, *plates, *event)``, plates being those within a row, outermost first; and
        ``(S, *plates, *event)`` for a site outside the plate ``"data"``.

    Raises:
        ValueError: a proposal or its fields without ``resample`` or beside each other, or a guide with enumerated sites
            with ``resample``.

    Example:
        >>> import torch, pyro_mm as mm
        >>> model = mm.models.LinearGaussian({"x": torch.ones(3, 2)})
        >>> expert = mm.conditionals.Normal(mm.nn.MLP(3, 4))
        >>> guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"x": expert}))
        >>> defensive = mm.Proposal(prior_share=0.2)
        >>> z = mm.posterior_draws(model, guide, model.sample(5), 7, resample=True, proposal=defensive)["z"]
        >>> z.shape
        torch.Size([7, 5, 2])

    References:
        Rubin 1988, "Using the SIR algorithm to simulate posterior distributions", Bayesian Statistics 3:395.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_counts(num_samples=num_samples, num_particles=num_particles)
    check_flags(resample=resample, vectorize=vectorize)
    check_seed(seed)
    proposed = {"proposal": proposal, "draws": draws, "stratify": stratify, "prior_share": prior_share}
    resampling = _resampling(resample, num_particles, proposed)
    settings = SampleSettings(num_samples, decode=False, resampling=resampling, vectorize=vectorize)

    def sample() -> dict[str, Tensor]:
        return sample_pair(model, guide, batch, settings, seed=seed, audit=audit).guide_latents

    return share_evaluation("posterior_draws", devices, model, guide, batch, seed, sample)


def _resampling(resample: bool, num_particles: int, proposed: dict[str, Any]) -> Resampling | None:
    """Return the settings of resampling, or None without it. Raises a ValueError for a proposal without it."""
    if resample:
        return Resampling(num_particles, resolve_proposal(**proposed))
    if given := [name for name, value in proposed.items() if value is not None]:
        resolve_proposal(**proposed)  # whose own errors come first
        raise ValueError(
            f"{', '.join(given)}: for draws by weight, with resample=True; pass that too, or leave them out"
        )
    return None


class Generated(dict[str, Tensor]):
    """Samples by modality, with the lengths of those that are sequences.

    Args:
        samples: modality -> ``(S, N, *plates, *event)``.
        lengths: sequence -> numbers of valid steps, ``(S, N, *plates)``.
    """

    def __init__(self, samples: SiteValues, lengths: SiteValues):
        super().__init__(samples)
        self.lengths = lengths


@dataclass(frozen=True)
class SampleSettings:
    """Settings of samples from a pair.

    Args:
        num_samples: S, samples per row.
        mean: True for means of the modalities in the place of draws, or the names of those whose means are wanted.
        decode: True to sample modalities, False for latents alone.
        resampling: the settings of draws by weight; None for draws of the guide.
        vectorize: True to draw all samples in one run of guide and model.
        prior: True to draw latents that all rows share from the model's prior too, as those of empty rows are.
    """

    num_samples: int = 1
    mean: bool | frozenset[str] = False
    decode: bool = True
    resampling: Resampling | None = None
    vectorize: bool = True
    prior: bool = False

    @property
    def stacked(self) -> bool:
        """True if the pair is run on several samples or particles at once."""
        return self.vectorize and (self.num_samples > 1 or self.resampling is not None)


class Samples(NamedTuple):
    """Samples from a pair: site -> ``(S, N, *plates, *event)``.

    Attributes:
        guide_latents: latents of the guide.
        model_latents: latents of the model with the same values; empty if the model was not run.
        modalities: modalities decoded from them; empty if the model was not run.
        lengths: sequence -> numbers of valid steps, ``(S, N, *plates)``.
    """

    guide_latents: SiteValues
    model_latents: SiteValues
    modalities: SiteValues
    lengths: SiteValues


@torch.no_grad()
def sample_pair(
    model: Program, guide: Program, batch: Batch, settings: SampleSettings, *, seed: int | None, audit: bool
) -> Samples:
    """Sample from a pair in evaluation mode, under a seed, where its networks are.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        settings: the number and kind of samples.
        seed: of all draws; None goes on with torch's generator.
        audit: True to audit the pair.
    """
    with evaluating(model, guide, batch, audit=audit, stacked=settings.stacked, draws=True) as rows:

        def draw(block: Batch, num_samples: int) -> Samples:
            return draw_samples(model, guide, block, replace(settings, num_samples=num_samples))

        splits_rows = not pair_structure(model, guide, rows).global_latents
        samples = sample_in_blocks(rows, settings.num_samples, splits_rows, seed, draw)
        return Samples(*move_result(tuple(samples), rows, batch))


def draw_samples(model: Program, guide: Program, batch: Batch, settings: SampleSettings) -> Samples:
    """Sample from a pair, with torch's generator and in the mode that its modules are in.

    Raises:
        ValueError: rows without anything present under a story that observes more than modalities, or enumerated sites
            of the guide with resampling.
    """
    structure = pair_structure(model, guide, batch)
    rows = batch.rows
    every_row_has_data = bool(rows.all()) if isinstance(rows, Tensor) else rows
    if structure.factors and not every_row_has_data:
        raise ValueError(
            f"the story observes {sorted(structure.factors)[0]!r}, which is no modality of the batch, and a row in "
            "which nothing is present is drawn from the prior without it: take rows that have something, or make it a "
            "modality"
        )

    latents: SiteValues = {}
    if settings.resampling is not None:
        if structure.global_latents:
            return _given_globals(model, guide, batch, settings)
        if "enumerated" in structure.latents.values():
            raise ValueError("resample needs a guide without enumerated sites: let the model alone have them")
        latents = resample_latents(model, guide, batch, settings.num_samples, settings.resampling, settings.vectorize)

    if settings.vectorize:
        return _PairRun(model, guide, batch, structure, settings.num_samples).samples(latents, settings)
    one = _PairRun(model, guide, batch, structure, 1)
    runs = [
        one.samples({name: z[s : s + 1] for name, z in latents.items()}, settings) for s in range(settings.num_samples)
    ]
    return _concatenate_samples(runs)


def _given_globals(model: Program, guide: Program, batch: Batch, settings: SampleSettings) -> Samples:
    """Return samples by weight, each given a draw of the guide's latents that all rows share."""
    given_model, given_guide = Given(model, {}), Given(guide, {})
    one = replace(settings, num_samples=1)
    runs = []
    for _ in range(settings.num_samples):
        sites = draw_global_latents(guide, batch)
        given_model.set(sites)
        given_guide.set(sites)
        samples = draw_samples(given_model, given_guide, batch, one)
        values = {name: to_sample_layout(site, batch.size) for name, site in sites.items()}
        in_model = {n: x for n, x in values.items() if not sites[n]["infer"].get("is_auxiliary", False)}
        model_latents = in_model | samples.model_latents if samples.model_latents else {}
        guide_latents = values | samples.guide_latents
        runs.append(Samples(guide_latents, model_latents, samples.modalities, samples.lengths))
    return _concatenate_samples(runs)


def _concatenate_samples(runs: list[Samples]) -> Samples:
    """Concatenate samples of the same pair."""
    return Samples(*(_concatenate(field) for field in zip(*runs, strict=True)))


def _concatenate(samples: tuple[SiteValues, ...]) -> SiteValues:
    """Concatenate samples of the same sites."""
    return {name: torch.cat([values[name] for values in samples]) for name in samples[0]}


@dataclass(frozen=True)
class _PairRun:
    """One run of a guide and a model for S samples of a batch."""

    model: Program
    guide: Program
    batch: Batch
    structure: PairStructure
    num_samples: int

    def plate(self) -> Any:
        """Return the plate of samples, left of all plates of the pair; none for one sample."""
        if self.num_samples == 1:
            return nullcontext()
        return FixedPlate("particles", self.num_samples, dim=-self.structure.nesting - 1)

    def samples(self, latents: SiteValues, settings: SampleSettings) -> Samples:
        """Return samples of the pair.

        Args:
            latents: latent site of the guide -> ``(S, N, *plates, *event)``, values in the place of the guide's.
            settings: the settings of the samples.
        """
        with poutine.block(), poutine.trace() as traced, self.plate():
            self.guide(self.batch)
        trace = traced.trace
        for name, z in latents.items():
            site = trace.nodes[name]
            plates = z.dim() - 2 - site["fn"].event_dim
            trace.nodes[name] = site | {"value": z.movedim(1, 1 + plates).reshape(site["value"].shape)}

        for name in self.structure.global_latents if settings.prior else ():
            trace.remove_node(name)

        ancestral = AncestralSampler(
            self.batch, self.structure.modalities, settings.mean, surrogates=settings.resampling is None
        )
        guide_sites = latent_sites(trace)
        model_sites: dict[str, Any] = {}
        if settings.decode or not all(ancestral.informed_rows(site) is True for site in guide_sites.values()):
            trace = self._with_discrete_latents(trace, ancestral)
            with poutine.block(), poutine.trace() as run, ancestral, poutine.replay(trace=trace), self.plate():
                self.model(self.batch)
            model_sites = latent_sites(run.trace)
            guide_sites = {name: model_sites.get(name, site) for name, site in guide_sites.items()}
        return Samples(self._values(guide_sites), self._values(model_sites), ancestral.samples, ancestral.lengths)

    def _values(self, sites: dict[str, Any]) -> SiteValues:
        return {name: to_sample_layout(site, self.batch.size) for name, site in sites.items()}

    def _with_discrete_latents(self, trace: Any, ancestral: AncestralSampler) -> Any:
        """Return the trace with discrete latents that only the model has, drawn from their exact posterior."""
        names = {name for name, enumerable in self.structure.model_only.items() if enumerable}
        if not names:
            return trace
        # not by a replay alone: what is done already hides from Pyro which enumerated sites its prior depends on
        given = {name: site["value"] for name, site in latent_sites(trace).items()}

        def edit(msg: dict[str, Any]) -> None:
            if msg["name"] in names:
                msg["infer"]["enumerate"] = "parallel"
            rows = ancestral.informed_rows(msg)
            if rows is not True:  # a latent drawn from its prior is no evidence about its parents
                msg["mask"] = rows if msg["mask"] is None else all_of([rows, msg["mask"]])

        def conditioned() -> None:
            with poutine.replay(trace=trace), poutine.condition(data=given), EditSites(edit), self.plate():
                self.model(self.batch)

        first_dim = -self.structure.nesting - 1 - (self.num_samples > 1)
        with poutine.block(), poutine.trace() as traced:
            infer_discrete(conditioned, first_available_dim=first_dim)()

        trace = trace.copy()
        for name in names:
            site = traced.trace.nodes[name]
            trace.add_node(name, **(site | {"infer": {}, "name": name}))
        return trace
