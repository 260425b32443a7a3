"""Figures of a trained recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..experiments.user_data import image_name
from ..recipes import Recipe
from ..sampling.encode import encode
from ..sampling.predictive import generate
from ..training.history import History
from ..utils.seeding import temporary_seed
from .training import Prediction

SAMPLES_PER_CLASS = 8  # generated images in generated.png


def draw_images(images: Tensor, rows: Sequence[str], columns: Sequence[str], title: str) -> Any:
    """Draw images as a grid; matplotlib is imported here."""
    from .. import plots

    return plots.image_grid(images, rows, columns, title)


def draw_figures(
    run: Recipe, test: Batch, history: History, predictions: Sequence[Prediction], seed: int, by_weight: bool
) -> dict[str, Any]:
    """Draw the figures of a run: name -> matplotlib figure.

    Args:
        run: the trained recipe.
        test: test rows.
        history: the history of its training.
        predictions: of classes; the first ones colour the latents and head the images.
        seed: of the draws.
        by_weight: draw images given the label by importance weights.
    """
    from .. import metrics, plots

    figures = {"training": plots.training_curve(history)}
    points = encode(run.guide, test)["z"].mean
    if not predictions:
        return figures | {"latent": plots.latent_view(points, title="posterior means").figure}

    name, given, probabilities, _ = predictions[0]
    rows = test.present[name]
    label = test[name][rows]
    classes = probabilities.shape[-1]
    matrix = metrics.confusion_matrix(label, probabilities.argmax(-1)[rows], classes)
    image = image_name(test)
    if image is not None:
        whole = test[rows]
        first = torch.cat([(label == c).nonzero()[:1, 0] for c in range(classes)])  # the first row of each class
        with temporary_seed(seed, test.device):
            draws = generate(
                run.model, run.guide, whole[first].only(name), SAMPLES_PER_CLASS, mean=[image], resample=by_weight
            )
        title = f"mean {image} given z, z given the {name}"
        figures["generated"] = plots.image_grid(draws[image].transpose(0, 1), rows=label[first].tolist(), title=title)
    others = " and ".join(given)
    return figures | {
        "confusion": plots.confusion(matrix, title=f"{name} given the {others}").figure,
        "latent": plots.latent_view(points[rows], label, title=f"posterior means given {others} and {name}").figure,
    }
