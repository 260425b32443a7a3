"""Kanji (in the place of CelebA with attributes): do latents of a picture know its parts if trained beside the pen?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from ... import datasets
from ...batch.batch import Batch
from ...conditionals import Bernoulli
from ...recipes.networks import Recipe
from ...sampling.predictive import generate
from .compositional_probes import measure_kanji, measure_kanji_blindly
from .image_and_text import Sizes, adam, decay, members
from .study import Images, Sample, Study

NUM_COMPONENTS = 12  # that are probed, the most frequent
ROWS = ("image alone", "product of experts", "joint encoder", "flow of images", "VAE-GAN of images", "implicit images")
SHOWN = 10


def sample_data(
    seed: int, directory: str | None = None, part: int = 1, side: int = 24, rows: int | None = None, least: int = 100
) -> Sample:
    """Load four views of kanji: picture, pen, components, number of strokes; one training row in ``part`` keeps all.

    The others keep one of them.

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
    """Return the rows with the number of strokes as a count ``(N, 1)``, and with what is probed as covariates."""
    covariates = {
        f"has_{i}": batch["components"][:, i].long() for i in range(min(NUM_COMPONENTS, batch["components"].shape[1]))
    }
    covariates["strokes_by_four"] = (batch["strokes"] // 4).clamp(max=5)
    values = {name: batch[name] for name in ("image", "pen", "components")}
    values["strokes"] = batch["strokes"][:, None]
    return Batch(values, covariates=covariates, lengths={"pen": batch.lengths["pen"]})


def draw_kanji(run: Recipe, sample: Sample, seed: int) -> dict[str, Images]:
    """Return pictures of a trained recipe: from the prior, and given the picture, the pen or the components.

    Args:
        run: a trained recipe.
        sample: its data.
        seed: of all draws.
    """
    model: Any = run.model
    rows = sample.test[:SHOWN]
    mean = "image" if isinstance(model.decoders["image"], Bernoulli) else False

    def images(*given: str) -> Images:
        found = generate(model, run.guide, rows.only(*given), mean=mean, seed=seed, audit=False)
        return Images(found["image"][0], truth=rows["image"])

    shown = {"from the prior": images()}
    return shown | {
        f"given the {name}": images(name) for name in ("image", "pen", "components") if name in model.decoders
    }


SHORT = Study(
    title="Kanji: linear probes of z",
    groups={"all paired": sample_data, "one in 8 paired": partial(sample_data, part=8)},
    members=members(Sizes(), *ROWS),
    measure=measure_kanji,
    epochs=60,
    batch_size=100,
    optimizer=adam,
    scheduler=decay,
    seeds=3,
    known={"nothing": measure_kanji_blindly},
    compile=True,
    images=draw_kanji,
    gain=("components from image", "image alone"),
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
    ),
)
"""``--full`` has pictures of 64 x 64 pixels and wide networks, and wants a GPU."""

SMALL_KANJI = replace(SHORT, title="Kanji: linear probes of z, for a processor core", epochs=30, seeds=1, compile=False)
"""Half of the steps, for machines without a GPU: one to ten minutes a row."""
