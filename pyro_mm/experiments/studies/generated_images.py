"""Measurements and pictures of images that a story of image and label generates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ... import conditionals, metrics
from ...batch.batch import Batch
from ...evidence.likelihood import log_marginal
from ...recipes.networks import Recipe
from ...sampling.predictive import generate
from ...utils.seeding import temporary_seed
from .study import Images, Measurements, Number, Sample

SAMPLES = 3  # per test row
MOST_IMAGES = 3000  # from the prior
PARTICLES = 200
PERMUTATIONS = 199
WIDTHS = (0.5, 1.0, 2.0)  # bandwidths of the kernel distance, in units of the median distance of test images
REFERENCE_ROWS = 2000  # test images whose distances give the median
SHOWN = 20  # images of a line of a picture


def train_judge(train: Batch, test: Batch, epochs: int) -> Any:
    """Train a classifier of images."""
    given = train["image"], train["label"], test["image"], test["label"]
    judge, _ = metrics.classifier(*given, epochs=epochs, hidden=64)
    return judge


def measure(run: Recipe, sample: Sample, seed: int, fitted: bool = True) -> Measurements:
    """Measure coherence and quality of images, and the likelihood where there is one.

    Args:
        run: a trained recipe.
        sample: its data, with the judge.
        seed: of the draws.
        fitted: unused; the likelihood is by draws of the guide.

    Returns:
        Column -> value with its standard error. Of draws of p(image | z) and, where there is a mean, of means: the
        share of images given a label that the judge gives this label; the share of image and label of one draw of the
        prior that agree; 1000 times the kernel distance of images from the prior, with its permutation p-value; and
        their coverage. Beside them the share of labels that are right given an image, and log p(image, label).
    """
    model, guide, _ = run
    judge = sample.truth
    rows = sample.test
    found: dict[str, Number] = {}
    for suffix, mean in _ways(run).items():
        coherent = metrics.cross_modal_coherence(
            model, guide, rows, "image", "label", judge, rows["label"], num_samples=SAMPLES, mean=mean, seed=seed
        )
        images, labels = _from_prior(run, rows, mean, seed)
        near = metrics.kernel_distance(
            rows["image"].flatten(1),
            images.flatten(1),
            kernel="gaussian",
            bandwidth=kernel_widths(rows),
            permutations=PERMUTATIONS,
            seed=seed,
        )
        found[f"coherence{suffix}"] = coherent[:2]
        found[f"agreement{suffix}"] = metrics.Share.of(judge(images).argmax(-1) == labels)[:2]
        found[f"distance × 1000{suffix}"] = 1000 * near.value, 1000 * near.standard_error
        found[f"p-value{suffix}"] = near.p_value
        covered = metrics.precision_recall(rows["image"].flatten(1), images.flatten(1), seed=seed)
        found[f"coverage{suffix}"] = covered.coverage, covered.errors["coverage"]
    found["label from image"] = metrics.Share.of(_predicted(run, rows, seed) == rows["label"])[:2]
    return found | _likelihood(run, rows, seed)


def _ways(run: Recipe) -> dict[str, bool]:
    """Return ending of a column -> whether it is of means, of all that the decoder of images has."""
    model: Any = run.model
    has_mean = isinstance(model.decoders["image"], conditionals.Bernoulli)
    return {"": False, ", means": True} if has_mean else {"": False}


def kernel_widths(rows: Batch) -> tuple[float, ...]:
    """Return the bandwidths of the kernel distance between images."""
    distances = torch.pdist(rows["image"][:REFERENCE_ROWS].flatten(1))
    median = distances[distances > 0].median().item()
    return tuple(width * median for width in WIDTHS)


def _from_prior(run: Recipe, rows: Batch, mean: bool, seed: int) -> tuple[Tensor, Tensor]:
    """Return images of the prior, or means of them, and labels drawn with them, several for each row."""
    samples = max(1, min(SAMPLES, MOST_IMAGES // rows.size))
    drawn = generate(run.model, run.guide, rows.only(), samples, mean=["image"] if mean else False, seed=seed)
    return drawn["image"].flatten(0, 1), drawn["label"].flatten()


def _predicted(run: Recipe, rows: Batch, seed: int) -> Tensor:
    """Return the likeliest label of each image, by the mean of its probabilities."""
    probabilities = generate(run.model, run.guide, rows.only("image"), 10, mean=["label"], seed=seed)["label"]
    return probabilities.mean(0).argmax(-1)


def _likelihood(run: Recipe, rows: Batch, seed: int) -> dict[str, Number]:
    """Return log p(image, label), in a column of its own for images of levels; nothing without a density."""
    model: Any = run.model
    decoder = model.decoders["image"]
    if isinstance(decoder, conditionals.Implicit):
        return {}
    column = "log P(levels)" if isinstance(decoder, conditionals.Dequantized) else "log p"
    return {column: log_marginal(run.model, run.guide, rows, num_particles=PARTICLES, seed=seed).mean()}


def draw_images(run: Recipe, sample: Sample, seed: int) -> Mapping[str, Images]:
    """Return images given each label, and images of the prior: means where the decoder has them, else draws."""
    rows = sample.test
    mean: Any = ["image"] if ", means" in _ways(run) else False
    classes = int(rows["label"].max()) + 1
    labels = torch.arange(SHOWN, device=rows.device) % classes
    first = torch.stack([(rows["label"] == c).nonzero()[i // classes, 0] for i, c in enumerate(labels.tolist())])
    shown = rows[first]
    with temporary_seed(seed, rows.device):
        given = generate(run.model, run.guide, shown.only("label"), mean=mean)["image"][0]
        prior = generate(run.model, run.guide, shown.only(), mean=mean)["image"][0]
    names = tuple(str(c) for c in labels.tolist())
    return {"given the label": Images(given, names, shown["image"]), "from the prior": Images(prior)}
