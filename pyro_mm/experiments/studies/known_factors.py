"""Known factors: simulated images, strings and series whose shared and private factors MFM has to find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from ... import metrics, objectives
from ...batch.batch import Batch
from ...datasets.simulated import factors
from ...models import Factorized
from ...recipes.factorized import mfm
from ...recipes.networks import Recipe
from .factorized import members
from .fusion_baselines import constant_scores, regression_scores
from .prediction_scores import LABEL, Truth, measure, modalities, validation_score
from .study import Measurements, Sample, Study

ROWS = (2000, 1000, 1000)  # for training, for test, for validation
PRIVATE = 2  # dimensions of the true factors
SWAPPED = 500  # rows whose private factors are swapped
INDEPENDENCE = 10.0  # weight of HSIC


def simulated(seed: int, directory: str | None = None) -> Sample:
    """Simulate a story under a seed, with four classes; rows of one story for training, test and validation."""
    parts = (factors(rows, private=PRIVATE, seed=seed, part=part).batch for part, rows in enumerate(ROWS))
    train, test, validation = parts
    return Sample(train, test, Truth(validation=validation))


def measure_factors(run: Recipe, sample: Sample, seed: int, fitted: bool) -> Measurements:
    """Measure the label in each latent, what a swap of private factors changes, and the scores of any study.

    Returns:
        Column -> value: ``"margin"``, the accuracy of a linear probe of z for the label, minus the largest of those of
        the w_m; these accuracies; ``"swap, own"``, the least effect of :func:`pyro_mm.metrics.swaps` of a w_m
        on its modality; and ``"swap, others"``, the largest on another one or on the label.
    """
    found: dict[str, float] = {}
    if isinstance(run.model, Factorized) and run.model.private_priors:
        names = [name for name in modalities(sample.train) if name in run.model.private_priors]
        found |= label_in_latents(run, sample, names, seed)
        found |= swap_effects(run, sample.test[:SWAPPED], names, seed)
    return {**found, **measure(run, sample, seed, fitted)}


def label_in_latents(run: Recipe, sample: Sample, names: Sequence[str], seed: int) -> dict[str, float]:
    """Return the accuracies of linear probes for the label: of z, of each w_m, and the margin between them."""

    def probe(site: str) -> float:
        return metrics.linear_probe(run.guide, sample.train, sample.test, LABEL, sites=site, seed=seed).value

    shared = probe("z")
    own = {f"probe of w_{name}": probe(f"w_{name}") for name in names}
    return {"margin": shared - max(own.values()), "probe of z": shared, **own}


def swap_effects(run: Recipe, rows: Batch, names: Sequence[str], seed: int) -> dict[str, float]:
    """Return the least effect of a swap of private factors on their modality, and the largest on any other.

    Args:
        run: a trained recipe.
        rows: rows to encode; each gets the private factor of the next one.
        names: the modalities with private latents.
        seed: the seed of the draws.
    """
    effects = metrics.swaps(run.model, run.guide, rows, [f"w_{name}" for name in names], seed=seed).effects
    own = [effects[f"w_{name}"][name] for name in names]
    others = [effect for name in names for other, effect in effects[f"w_{name}"].items() if other != name]
    return {"swap, own": min(own), "swap, others": max(others)}


def independent(batch: Batch, **settings: Any) -> Recipe:
    """Build MFM whose z is pushed to be independent of each w_m, by HSIC, as the sum of MMDs is not.

    Args:
        batch: training rows.
        settings: of :func:`pyro_mm.recipes.mfm`.
    """
    run = mfm(batch, **settings)
    names = modalities(batch)
    objective = run.objective
    for name in names:
        objective = objective + INDEPENDENCE * objectives.HSIC("z", f"w_{name}", names)
    return run._replace(objective=objective)


SETTINGS: Mapping[str, Any] = {"latent": 2, "hidden": (64,), "private": PRIVATE, "generation": 1.0, "mmd": 1.0}

FACTORS = Study(
    title="Factorised representations of known factors",
    groups={"image, text, series": simulated},
    members=members(blocks=False, **SETTINGS) | {"MFM and HSIC": partial(independent, **SETTINGS)},
    measure=measure_factors,
    validate=validation_score,
    epochs=30,
    batch_size=100,
    optimizer=lambda run, parameters: torch.optim.Adam(parameters, 5e-3),
    known={"most frequent class": constant_scores, "regression": regression_scores},
)
