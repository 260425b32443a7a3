"""Kanji (in the place of CelebA with attributes): do latents of a picture trained beside its strokes know its parts?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from ... import datasets
from ...batch.batch import Batch
from .compositional_probes import measure_kanji, measure_kanji_blindly
from .image_and_text import Sizes, members
from .study import Sample, Study

NUM_COMPONENTS = 12  # that are probed, the most frequent
ROWS = ("image alone", "product of experts", "joint encoder", "flow of images")


def sample_data(
    seed: int, directory: str | None = None, part: int = 1, side: int = 24, rows: int | None = 3000, least: int = 100
) -> Sample:
    """Load picture, pen and components of kanji; one training row in ``part`` keeps all, the others one of them.

    Args:
        seed: of the split and of the pairs.
        directory: the folder of the data files, for those who have no package ``kanjivg``.
        part: n.
        side: of the picture.
        rows: training rows; None for all.
        least: the least number of characters that a component stands in.
    """
    train, test = (_views(batch) for batch in datasets.kanji(directory, side=side, least=least, seed=seed))
    train = train[: train.size if rows is None else rows]
    return Sample(datasets.paired(train, 1 / part, seed), test, train)


def _views(batch: Batch) -> Batch:
    """Return the rows without the number of strokes as a modality, and with what is probed as covariates."""
    covariates = {
        f"has_{i}": batch["components"][:, i].long() for i in range(min(NUM_COMPONENTS, batch["components"].shape[1]))
    }
    covariates["strokes_by_four"] = (batch["strokes"] // 4).clamp(max=5)
    values = {name: batch[name] for name in ("image", "pen", "components")}
    return Batch(values, covariates=covariates, lengths={"pen": batch.lengths["pen"]})


SHORT = Study(
    title="Kanji: linear probes of z",
    groups={"all paired": sample_data, "one in 8 paired": partial(sample_data, part=8)},
    members=members(Sizes(), *ROWS),
    measure=measure_kanji,
    epochs=40,
    batch_size=100,
    optimizer=lambda run, parameters: torch.optim.Adam(parameters, 2e-3, fused=True),
    seeds=1,
    known={"nothing": measure_kanji_blindly},
)
FULL_SIZES = Sizes(64, 512, (32, 64, 128), flow_steps=8, flow_channels=64)
KANJI = replace(
    SHORT,
    full=replace(
        SHORT,
        groups={"all paired": partial(sample_data, side=64, rows=None)},
        members=members(FULL_SIZES, *ROWS),
        epochs=200,
        seeds=5,
        compile=True,
    ),
)
"""``--full`` has pictures of 64 x 64 pixels and wide networks, and wants a GPU."""
