"""Scenes and captions (Wu & Goodman 2019): do latents of an image trained beside text know more of its composition?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch

from ... import datasets
from .compositional_probes import measure_scenes, measure_scenes_blindly
from .image_and_text import Sizes, members
from .study import Sample, Study

FRACTIONS = (1, 2, 4, 8, 16, 32, 64)


def sample_data(
    seed: int,
    directory: str | None = None,
    part: int = 1,
    rows: tuple[int, int] = (4000, 2000),
    side: int = 24,
    source: Literal["mnist", "digits"] = "mnist",
) -> Sample:
    """Draw scenes under a seed, with one training row in ``part`` paired; the truth is the whole training rows.

    Args:
        seed: of scenes, held-out combinations and pairs.
        directory: the folder of the files of MNIST.
        part: n; every other row keeps its image or its caption alone.
        rows: numbers of training and test rows.
        side: of the canvas.
        source: of the digits.
    """
    options: dict[str, Any] = {"rows": rows, "side": side, "source": source, "seed": seed}
    train, test = datasets.scenes(directory, modalities=("image", "caption"), **options)
    return Sample(datasets.paired(train, 1 / part, seed), test, train)


def group_name(part: int) -> str:
    """Return the name of the group with one row in ``part`` paired."""
    return "all paired" if part == 1 else f"one in {part} paired"


SHORT = Study(
    title="Scenes of a digit and a shape: linear probes of z",
    groups={group_name(part): partial(sample_data, part=part) for part in (1, 8, 64)},
    members=members(Sizes()),
    measure=measure_scenes,
    epochs=40,
    batch_size=100,
    optimizer=lambda run, parameters: torch.optim.Adam(parameters, 2e-3, fused=True),
    seeds=1,
    known={"nothing": measure_scenes_blindly},
)

SCENES = replace(
    SHORT,
    full=replace(
        SHORT,
        groups={group_name(part): partial(sample_data, part=part, rows=(50_000, 4000), side=64) for part in FRACTIONS},
        members=members(Sizes(64, 512, (32, 64, 128), flow_steps=8, flow_channels=64)),
        epochs=100,
        seeds=5,
        compile=True,
    ),
)
"""``--full`` has seven fractions and wide networks, and wants a GPU. No published figure is of these scenes."""
