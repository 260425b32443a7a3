"""Scenes and captions (Wu & Goodman 2019): do latents of an image trained beside text know more of its composition?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from ... import datasets
from ...recipes.networks import Recipe
from .compositional_probes import measure_scenes, measure_scenes_blindly
from .image_and_text import Sizes, adam, decay, members
from .scene_generation import SceneTruth, draw_scenes, measure_generation, measure_real, train_judge
from .study import Measurements, Sample, Study

FRACTIONS = (1, 4, 16, 64)


def sample_data(
    seed: int,
    directory: str | None = None,
    part: int = 1,
    rows: tuple[int, int] = (20_000, 4000),
    side: int = 24,
    source: Literal["mnist", "digits"] = "mnist",
    unpaired: bool = True,
) -> Sample:
    """Draw scenes under a seed, with one training row in ``part`` paired; the truth has the whole training rows.

    Args:
        seed: of scenes, held-out combinations and pairs.
        directory: the folder of the files of MNIST.
        part: n; every other row keeps its image or its caption alone.
        rows: numbers of training and test rows.
        side: of the canvas.
        source: of the digits.
        unpaired: False takes each pair ``part`` times in the place of the other rows, so that an epoch has as many
            steps.
    """
    options: dict[str, Any] = {"rows": rows, "side": side, "source": source, "seed": seed}
    train, test = datasets.scenes(directory, modalities=("image", "caption"), **options)
    found = datasets.paired(train, 1 / part, seed)
    if not unpaired:
        pairs = torch.stack([found.present[name] for name in found.names]).all(0).nonzero()[:, 0]
        found = found[pairs.repeat(part)]
    return Sample(found, test, SceneTruth(train, train_judge(train, test)))


def measure(run: Recipe, sample: Sample, seed: int, fitted: bool = True) -> Measurements:
    """Measure the probes of :func:`measure_scenes` and what is generated (:func:`measure_generation`).

    Args:
        run: a trained recipe.
        sample: its data.
        seed: of all draws.
        fitted: unused; log p(image) is by draws of the guide.
    """
    rows = sample._replace(truth=sample.truth.rows)
    return {**measure_scenes(run, rows, seed), **measure_generation(run, sample, seed)}


def _measure_blindly(sample: Sample, seed: int) -> Measurements:
    """Measure probes of a latent that knows nothing."""
    return measure_scenes_blindly(sample._replace(truth=sample.truth.rows), seed)


def group_name(part: int, unpaired: bool = True) -> str:
    """Return the name of the group with one row in ``part`` paired."""
    return "all paired" if part == 1 else f"one in {part} paired{'' if unpaired else ', no other rows'}"


def _groups(**options: Any) -> dict[str, Any]:
    """Return the groups of all fractions, and of their pairs alone."""
    chosen = [(part, True) for part in FRACTIONS] + [(part, False) for part in FRACTIONS[1:]]
    return {group_name(*each): partial(sample_data, part=each[0], unpaired=each[1], **options) for each in chosen}


SHORT = Study(
    title="Scenes of a digit and a shape: linear probes of z, and what is generated",
    groups=_groups(),
    members=members(Sizes()),
    measure=measure,
    epochs=80,
    batch_size=200,
    optimizer=adam,
    scheduler=decay,
    seeds=3,
    known={"real images": measure_real, "nothing": _measure_blindly},
    compile=True,
    images=draw_scenes,
    gain=("known", "image alone"),
)

SCENES = replace(
    SHORT,
    full=replace(
        SHORT,
        groups=_groups(rows=(50_000, 4000), side=64),
        members=members(Sizes(64, 512, (32, 64, 128), flow_steps=8, flow_channels=64)),
        epochs=100,
        seeds=5,
    ),
)
"""``--full`` has larger images and wide networks, and wants a GPU. No published figure is of these scenes."""

SMALL_SCENES = replace(
    SHORT,
    title="Scenes of a digit and a shape, few of them, for a processor core",
    groups=_groups(rows=(5000, 4000)),
    batch_size=100,
    epochs=40,
    seeds=1,
    compile=False,
)
"""A quarter of the rows and of the steps, for machines without a GPU: one to ten minutes a row."""
