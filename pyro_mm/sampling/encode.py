"""Distributions of latents given what is present: the guide's, or Normals fitted to each row's posterior."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
from pyro import poutine

from ..batch.batch import Batch, check_batch
from ..scoring.evaluation import evaluating, move_result
from ..scoring.structure import in_data_plate, latent_sites, pair_structure
from ..utils.arguments import check_flags, check_programs, check_seed, describe
from ..utils.seeding import normalize_seed
from .fitted_posterior import FittedPosterior, fit_posterior
from .fitted_proposal import Fitted
from .row_normals import NormalFit

ROUNDS = 30  # of a fit that is the result, where a proposal need not have settled


def encode(
    guide: Callable[[Batch], Any],
    batch: Batch,
    *,
    model: Callable[[Batch], Any] | None = None,
    fitted: bool | Fitted = False,
    seed: int | None = None,
    vectorize: bool = True,
    audit: bool = True,
) -> Mapping[str, dist.Distribution]:
    r"""Return the distribution of each latent given the modalities that are present: the guide's, or a fitted one.

    If the guide samples a site given another one, its distribution is that given one draw of the other site. Modules
    run in evaluation mode.

    With ``fitted`` a Normal is fitted to the posterior of each row, in unconstrained coordinates of all its latents,
    from gradients of log p(x_S, z) and starting at the guide (:class:`~pyro_mm.Fitted` says how). It is the Normal
    nearest to the posterior by

    .. math:: \mathrm{argmin}_{\mu, L} \; KL(N(u; \mu, L L^\top) \| p(u | x_S))

    Every site has its marginal; ``result.sample()`` draws all latents of a row together. Where nothing that is present
    informs a latent (a private one whose modality is missing, or any in a row in which nothing is present), it stays at
    the guide's mean and deviation. It is an approximation of one mode: :func:`~pyro_mm.posterior_draws` with
    ``resample=True`` corrects it by weights.

    Args:
        guide (callable): called with a batch.
        batch (Batch): N rows.
        model (callable): the story, called with a batch; for a fit alone.
        fitted (bool or Fitted): True to fit in 30 rounds; or a :class:`~pyro_mm.Fitted` with other ``rounds``,
            ``draws`` and ``components``, whose shares, ``widen`` and ``pilot`` are a proposal's and not used.
        seed (int): of the draws of the fit; None takes one from torch's generator.
        vectorize (bool): False scores the fit's points one by one, for stories that do not broadcast.
        audit (bool): False skips the audit (:mod:`pyro_mm.scoring.audit`) and its errors.

    Returns:
        Latent site -> distribution of batch shape ``(N,)``, or ``(*plates, N)`` in plates within a row, or
        ``(*plates,)`` outside the plate ``"data"``. With ``fitted`` a :class:`~pyro_mm.FittedPosterior`, which is such
        a dictionary.

    Raises:
        ValueError: a fit without a model, or a model without a fit; a pair that a :class:`~pyro_mm.Fitted` proposal
            refuses, such as one with a discrete latent that the guide draws.

    Example:
        >>> import torch, pyro_mm as mm
        >>> import pyro.distributions as dist
        >>> model = mm.models.LinearGaussian({"a": torch.ones(3, 2), "b": torch.ones(4, 2)})
        >>> batch = model.sample(5).only("a")
        >>> mm.encode(mm.Guide(z=model.posterior), batch)["z"].mean.shape
        torch.Size([5, 2])
        >>> poor = mm.Guide(z=lambda batch: dist.Normal(torch.ones(batch.size, 2), 0.3).to_event(1))
        >>> found = mm.encode(poor, batch, model=model, fitted=True, seed=0)["z"]
        >>> bool((found.mean - model.posterior(batch).mean).abs().max() < 0.05)
        True
    """
    check_programs(guide=guide)
    check_batch(batch)
    check_flags(vectorize=vectorize)
    check_seed(seed)
    fit = _fit_settings(fitted)
    if fit is not None and model is None:
        raise ValueError("expected a model with fitted, whose posterior is fitted to each row, got none: pass model=")
    if model is not None:
        check_programs(model=model)
        if fit is None:
            raise ValueError("model is for a fit, and without one the guide alone is asked: pass fitted=True too")

    with evaluating(model, guide, batch, audit=audit, draws=True, stacked=vectorize and fit is not None) as rows:
        with poutine.block(), poutine.trace() as traced:
            guide(rows)
        sites = latent_sites(traced.trace)
        distributions = {name: site["fn"] for name, site in sites.items()}
        if fit is None or model is None:
            return move_result(distributions, rows, batch)

        structure = pair_structure(model, guide, rows)
        found = fit_posterior(model, guide, rows, structure, fit, normalize_seed(seed), vectorize)
        found, distributions = move_result((found, distributions), rows, batch)
        return FittedPosterior(
            {name: d for name, d in distributions.items() if in_data_plate(sites[name])},
            found,
            {name: d for name, d in distributions.items() if not in_data_plate(sites[name])},
        )


def _fit_settings(fitted: Any) -> NormalFit | None:
    """Return the settings of the fit that a caller asks for; None for no fit. Raises a TypeError for another value."""
    if isinstance(fitted, Fitted):
        return NormalFit(fitted.rounds, fitted.draws, fitted.components, widen=0.0, settle=True)
    if not isinstance(fitted, bool):
        raise TypeError(f"expected fitted to be True, False or a pyro_mm.Fitted, got {describe(fitted)}")
    return NormalFit(ROUNDS, widen=0.0, settle=True) if fitted else None
