"""Known factors: simulated images, strings and series whose shared and private factors MFM has to find."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import metrics, objectives
from ...batch.batch import Batch
from ...datasets.simulated import factors
from ...models import Factorized
from ...recipes.factorized import mfm
from ...recipes.networks import Recipe
from ...sampling.encode import encode
from .factorized import members
from .fusion_baselines import constant_scores, regression_scores
from .prediction_scores import LABEL, Truth, measure, modalities
from .study import Measurements, Sample, Study

ROWS = (2000, 1000)  # for training, for test
PRIVATE = 2  # dimensions of the true factors
SWAPPED = 500  # rows whose private factors are swapped
INDEPENDENCE = 10.0  # weight of HSIC


def simulated(seed: int, directory: str | None = None) -> Sample:
    """Simulate a story under a seed, with four classes; rows of one story for training and for test."""
    train, test = (factors(rows, private=PRIVATE, seed=seed, part=part).batch for part, rows in enumerate(ROWS))
    return Sample(train, test, Truth())


def measure_factors(run: Recipe, sample: Sample, seed: int, fitted: bool) -> Measurements:
    """Measure the label in each latent, what a swap of private factors changes, and the scores of any study.

    Returns:
        Column -> value: ``"margin"``, the accuracy of a linear probe of z for the label, minus the largest of those of
        the w_m; these accuracies; ``"swap, own"``, the least root mean square change of a modality's expected values,
        in units of their standard deviation over rows, when its own private factors are those of another row; and
        ``"swap, others"``, the largest such change of another modality.
    """
    found: dict[str, float] = {}
    if isinstance(run.model, Factorized) and run.model.private_priors:
        names = [name for name in modalities(sample.train) if name in run.model.private_priors]
        found |= label_in_latents(run, sample, names, seed)
        changes = swap_changes(run, sample.test[:SWAPPED], names)
        found["swap, own"] = min(changes[name][name] for name in names)
        found["swap, others"] = max(changes[name][other] for name in names for other in changes if other != name)
    return {**found, **measure(run, sample, seed, fitted)}


def label_in_latents(run: Recipe, sample: Sample, names: Any, seed: int) -> dict[str, float]:
    """Return the accuracies of linear probes for the label: of z, of each w_m, and the margin between them."""

    def probe(site: str) -> float:
        return metrics.linear_probe(run.guide, sample.train, sample.test, LABEL, sites=site, seed=seed).value

    shared = probe("z")
    own = {f"probe of w_{name}": probe(f"w_{name}") for name in names}
    return {"margin": shared - max(own.values()), "probe of z": shared, **own}


@torch.no_grad()
def swap_changes(run: Recipe, rows: Batch, names: Any) -> Mapping[str, Mapping[str, float]]:
    """Return how much a swap of one modality's private factors changes the expected values of each modality.

    Args:
        run: a trained recipe with a :class:`~pyro_mm.models.Factorized` story.
        rows: rows to encode; each gets the private factor of the next one.
        names: the modalities with private latents.

    Returns:
        modality whose factors are swapped -> modality -> root mean square change over the standard deviation over rows.
    """
    assert isinstance(run.model, Factorized)
    model = run.model
    latents = {site: d.mean for site, d in encode(run.guide, rows, audit=False).items()}
    before = model.factors(latents, rows)
    expected = _expected_values(model, before, rows)
    changes: dict[str, dict[str, float]] = {}
    for name in names:
        after = before | {f"w_{name}": before[f"w_{name}"].roll(1, 0)}
        swapped = _expected_values(model, after, rows)
        changes[name] = {
            other: ((x - expected[other]).square().mean() / expected[other].var(0).mean()).sqrt().item()
            for other, x in swapped.items()
        }
    return changes


def _expected_values(model: Factorized, found: Mapping[str, Tensor], rows: Batch) -> dict[str, Tensor]:
    """Return the mean of each modality; of tokens, the log-probabilities of the rows' own strings, ``(N,)``."""
    decoded = model.decode(found, rows)
    means = {}
    for name in modalities(rows):
        tokens = not rows[name].is_floating_point()
        means[name] = decoded[name].log_prob(rows[name]) if tokens else decoded[name].mean
    return means


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
    members=members(ablate_shared=False, **SETTINGS) | {"MFM and HSIC": partial(independent, **SETTINGS)},
    measure=measure_factors,
    epochs=30,
    batch_size=100,
    optimizer=lambda run, parameters: torch.optim.Adam(parameters, 5e-3),
    known={"most frequent class": constant_scores, "regression": regression_scores},
)
