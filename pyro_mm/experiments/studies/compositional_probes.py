"""Compositional evaluation of latents by linear probes: labels, boxes, relations, combinations that were held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import nn

from ... import metrics
from ...batch.batch import Batch
from ...recipes.networks import Recipe
from .study import Measurements, Number, Sample

PROBE_ROWS = 3000  # training rows of a probe
SCENE_LABELS = {
    "digit": "digit", "digit_colour": "digit's colour", "shape": "shape", "shape_colour": "shape's colour",
    "relation": "relation",
}  # fmt: skip


def measure_scenes(run: Recipe, sample: Sample, seed: int, fitted: bool = True) -> Measurements:
    """Measure what linear probes of posterior means find in the latents of scenes.

    Args:
        run: a trained recipe.
        sample: its data, whose truth is the training rows with all of their modalities.
        seed: of draws, where a posterior mean depends on any.
        fitted: unused, since nothing here is a likelihood.

    Returns:
        Column -> value. Of the image alone, on test rows without held-out combinations: accuracies of five labels; of
        left against right and of above against below among the scenes of these relations; the overlap of the boxes;
        and "known", the nats that the probes know of the five labels over their entropies. Overlap and "known" for rows
        with a held-out combination; and "known" from text alone and from both, if the guide has an encoder of text.
    """
    return _measure_scenes(run.guide, sample, seed, _reads(run.guide, "caption"))


def measure_scenes_blindly(sample: Sample, seed: int) -> Measurements:
    """Measure probes of a latent that knows nothing: the most frequent classes, and the mean box."""
    return _measure_scenes(_blind, sample, seed, reads_text=False)


def _measure_scenes(guide: Any, sample: Sample, seed: int, reads_text: bool) -> Measurements:
    train = sample.truth[:PROBE_ROWS]
    held_out = sample.test.covariates["held_out"] == 1
    test = sample.test[~held_out]
    options: dict[str, Any] = {"given": "image", "seed": seed, "audit": False}  # the training has audited both

    found: dict[str, Number] = {
        heading: metrics.linear_probe(guide, train, test, label, **options)[:2]
        for label, heading in SCENE_LABELS.items()
    }
    for heading, first in (("left / right", 0), ("above / below", 2)):
        of_train, of_test = ((batch.covariates["relation"] // 2) * 2 == first for batch in (train, test))
        found[heading] = metrics.linear_probe(guide, train[of_train], test[of_test], "relation", **options)[:2]
    labels = [*SCENE_LABELS]
    for suffix, part in (("", test), (", held out", sample.test[held_out])):
        found[f"IoU{suffix}"] = metrics.box_overlap(guide, train, part, **options).mean[:2]
        found[f"known{suffix}"] = known_share(guide, train, part, labels, "image", seed)
    if reads_text:
        found["known from text"] = known_share(guide, train, test, labels, "caption", seed)
        found["known from both"] = known_share(guide, train, test, labels, ("image", "caption"), seed)
    return found


def measure_kanji(run: Recipe, sample: Sample, seed: int, fitted: bool = True) -> Measurements:
    """Measure what linear probes of posterior means find in the latents of kanji.

    Args:
        run: a trained recipe.
        sample: its data, with covariates ``has_0``, ``has_1``, .. for components, and ``strokes_by_four``.
        seed: of draws, where a posterior mean depends on any.
        fitted: unused, since nothing here is a likelihood.

    Returns:
        Column -> value: the nats that probes know of the components over their entropies, and of the number of strokes,
        from the image alone, and from the pen alone if the guide has an encoder of it; and the accuracy of the number
        of strokes, to within four.
    """
    return _measure_kanji(run.guide, sample, seed, _reads(run.guide, "pen"))


def measure_kanji_blindly(sample: Sample, seed: int) -> Measurements:
    """Measure probes of a latent that knows nothing."""
    return _measure_kanji(_blind, sample, seed, reads_pen=False)


def _measure_kanji(guide: Any, sample: Sample, seed: int, reads_pen: bool) -> Measurements:
    train, test = sample.truth[:PROBE_ROWS], sample.test
    components = [name for name in train.covariates if name.startswith("has_")]
    found: dict[str, Number] = {}
    for name in ("image", "pen") if reads_pen else ("image",):
        found[f"components from {name}"] = known_share(guide, train, test, components, name, seed)
        found[f"strokes from {name}"] = known_share(guide, train, test, ["strokes_by_four"], name, seed)
    accuracy = metrics.linear_probe(guide, train, test, "strokes_by_four", "image", seed=seed, audit=False)
    return found | {"strokes' class from image": accuracy[:2]}


def known_share(
    guide: Any, train: Batch, test: Batch, labels: Sequence[str], given: Sequence[str] | str, seed: int
) -> tuple[float, float]:
    """Return the nats that probes know of several labels over the labels' entropies, and the standard error.

    Args:
        guide: callable of a batch.
        train, test: rows of the probes.
        labels: names of covariates.
        given: names of the modalities that the guide sees.
        seed: of draws.
    """
    each = [metrics.label_information(guide, train, test, label, given, seed=seed, audit=False) for label in labels]
    total = torch.stack([found.per_row for found in each]).sum(0)
    entropy = sum(found.entropy for found in each)
    return total.mean().item() / entropy, (total.std() / len(total) ** 0.5).item() / entropy


def _reads(guide: nn.Module, name: str) -> bool:
    """Return True if a guide has an encoder of a modality."""
    return any(path.endswith(f".{name}") for path, _ in guide.named_modules())


def _blind(batch: Batch) -> None:
    with batch.plate():
        pyro.sample("z", dist.Normal(torch.zeros(batch.size, 1, device=batch.device), 1.0).to_event(1))
