"""Scenes and captions that a trained pair generates from each other, judged by a classifier and by the grammar."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import datasets, metrics
from ...batch.batch import Batch
from ...conditionals import Bernoulli, Implicit
from ...datasets.captions import COLOURS
from ...evidence.likelihood import log_marginal
from ...recipes.networks import Recipe
from ...sampling.predictive import generate
from .study import Images, Measurements, Number, Sample

JUDGE_EPOCHS = 4
ROWS = 1000  # test rows that generated scenes are compared with
DENSITY_ROWS = 500  # those of log p(image)
PARTICLES = 100
SHOWN = 8
FACTS = ("digit", "digit_colour", "shape", "shape_colour", "relation")


class SceneTruth(NamedTuple):
    """The training rows with all of their modalities, and a judge of images.

    Attributes:
        rows: the training rows.
        judge: from images to logits of :func:`judged_class`.
    """

    rows: Batch
    judge: nn.Module

    def to(self, device: torch.device) -> SceneTruth:
        """Return both on a device."""
        return SceneTruth(self.rows.to(device), self.judge.to(device))


def judged_class(rows: Batch) -> Tensor:
    """Return the relation and the shape's colour of scenes as one class of 24, ``(N,)``."""
    return len(COLOURS) * rows.covariates["relation"] + rows.covariates["shape_colour"]


def train_judge(train: Batch, test: Batch) -> nn.Module:
    """Train a classifier of images on the training rows.

    Args:
        train, test: scenes with images.
    """
    net, _ = metrics.classifier(
        train["image"], judged_class(train), test["image"], judged_class(test), epochs=JUDGE_EPOCHS
    )
    return net


def measure_generation(run: Recipe, sample: Sample, seed: int) -> Measurements:
    """Measure images and captions that a trained pair generates, on the first test rows.

    Args:
        run: a trained recipe.
        sample: its data, whose truth is a :class:`SceneTruth`.
        seed: of all draws.

    Returns:
        Column -> (value, standard error): log p(image) by draws of q(z | image), if images have a density; 1000 times
        the kernel distance of images drawn from the prior, and of their means if these are known, in the judge's
        features; the proportion of images drawn from a caption that show its relation and its shape's colour, and of
        their means; and the proportion of facts right in captions drawn from an image. The last three if the story has
        captions.
    """
    model: Any = run.model
    rows = sample.test[: min(ROWS, sample.test.size)]
    judge = sample.truth.judge
    decoder = model.decoders["image"]
    found: dict[str, Number] = {}
    if not isinstance(decoder, Implicit):
        image = rows[: min(DENSITY_ROWS, rows.size)].only("image")
        found["log p(image)"] = log_marginal(model, run.guide, image, num_particles=PARTICLES, seed=seed).mean()
    has_text = "caption" in model.decoders
    kinds = ((False, ""), (True, ", means")) if isinstance(decoder, Bernoulli) else ((False, ""),)
    options: dict[str, Any] = {"seed": seed, "audit": False}
    for mean, suffix in kinds:
        drawn = generate(model, run.guide, rows.only(), mean="image" if mean else False, **options)["image"][0]
        with torch.no_grad():
            distance = _distance(judge.features(rows["image"]), judge.features(drawn), seed)
        found[f"distance × 1000{suffix}"] = 1000 * distance.value, 1000 * distance.standard_error
        if has_text:
            coherent = metrics.cross_modal_coherence(
                model, run.guide, rows, "image", "caption", judge, judged_class(rows), mean=mean, **options
            )
            found[f"image from caption{suffix}"] = coherent[:2]
    if has_text:
        captions = generate(model, run.guide, rows.only("image"), **options)["caption"][0]
        found["facts from image"] = facts_right(captions, rows)
    return found


def measure_real(sample: Sample, seed: int) -> Measurements:
    """Measure the judge on real images, and the kernel distance of two halves of the test rows.

    Args:
        sample: the data, whose truth is a :class:`SceneTruth`.
        seed: unused; every row of a study that is known without training has it.
    """
    rows, judge = sample.test, sample.truth.judge
    with torch.no_grad():
        right = metrics.Share.of(judge(rows["image"]).argmax(-1) == judged_class(rows))
        first, second = judge.features(rows["image"]).tensor_split(2)
    distance = _distance(first, second, seed)
    return {
        "distance × 1000": (1000 * distance.value, 1000 * distance.standard_error),
        "image from caption": right[:2],
    }


def _distance(real: Tensor, fake: Tensor, seed: int) -> metrics.KernelDistance:
    """Return the Gaussian kernel distance of features; the bandwidth is the median distance of real rows."""
    distances = torch.pdist(real[:ROWS])
    bandwidth = distances[distances > 0].median().item()
    return metrics.kernel_distance(real, fake, kernel="gaussian", bandwidth=bandwidth, permutations=1, seed=seed)


def facts_right(captions: Tensor, rows: Batch) -> tuple[float, float]:
    """Return the proportion of facts that captions have right, and its standard error; no sentence has none right."""
    truth = torch.stack([rows.covariates[name] for name in FACTS], -1).tolist()
    right = [_right(text, facts) for text, facts in zip(datasets.caption_text(captions), truth, strict=True)]
    each = torch.tensor(right, dtype=torch.float64, device="cpu")
    return each.mean().item(), (each.std() / len(each) ** 0.5).item()


def _right(text: str, facts: Sequence[int]) -> float:
    try:
        described = datasets.parse_caption(text)
    except ValueError:
        return 0.0
    right = [bool(getattr(described, name) == fact) for name, fact in zip(FACTS, facts, strict=True)]
    return sum(right) / len(FACTS)


def draw_scenes(run: Recipe, sample: Sample, seed: int) -> dict[str, Images]:
    """Return images of a trained recipe for its pictures.

    Args:
        run: a trained recipe.
        sample: its data.
        seed: of all draws.

    Returns:
        Title -> images: from the prior; given the images of test rows; and given the captions of these, if the story
        has them. Means, if images are Bernoullis, else draws.
    """
    model: Any = run.model
    rows = sample.test[:SHOWN]
    mean = "image" if isinstance(model.decoders["image"], Bernoulli) else False

    def images(visible: Batch) -> Tensor:
        return generate(model, run.guide, visible, mean=mean, seed=seed, audit=False)["image"][0]

    texts = [textwrap.fill(text, 12) for text in datasets.caption_text(rows["caption"])]
    shown = {
        "from the prior": Images(images(rows.only()), truth=rows["image"]),
        "given the image": Images(images(rows.only("image")), truth=rows["image"]),
    }
    if "caption" in model.decoders:
        shown["given the caption"] = Images(images(rows.only("caption")), tuple(texts), rows["image"])
    return shown
