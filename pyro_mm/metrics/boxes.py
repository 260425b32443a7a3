"""Bounding boxes predicted from posterior means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..batch.batch import Batch
from ..utils.arguments import check_number, check_tensor, describe
from ..utils.global_state import preserve_process_settings
from .probe_features import Features, probe_rows
from .proportion import Share


class BoxOverlap(NamedTuple):
    """Intersection over union of predicted and true boxes, with standard errors over rows.

    Attributes:
        mean: over all boxes of a row.
        each: one entry per box.
    """

    mean: Share
    each: tuple[Share, ...]


def intersection_over_union(first: Tensor, second: Tensor) -> Tensor:
    r"""Compute the area that two boxes share over the area that either covers.

    .. math:: \mathrm{IoU}(A, B) = |A \cap B| / |A \cup B|

    A box whose right edge is left of its left edge, or whose bottom is above its top, has no area. Two boxes without
    area have an IoU of 0.

    Args:
        first, second: boxes ``(.., 4)``: left, top, right and bottom edge, with y growing downwards.

    Returns:
        ``(..)``, in [0, 1].

    Raises:
        TypeError: no tensors, or none of real numbers.
        ValueError: a last dimension other than 4.

    >>> intersection_over_union(torch.tensor([0.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, 0.0, 3.0, 2.0]))
    tensor(0.3333)
    """
    for argument, boxes in (("first", first), ("second", second)):
        if check_tensor(argument, boxes).shape[-1:] != (4,):
            raise ValueError(f"expected {argument} to be boxes (.., 4), got shape {tuple(boxes.shape)}")
        if boxes.dtype == torch.bool or boxes.is_complex():
            raise TypeError(f"expected {argument} to be boxes of real numbers, got {describe(boxes)}")
    low = torch.maximum(first[..., :2], second[..., :2])
    high = torch.minimum(first[..., 2:], second[..., 2:])
    shared = _area(low, high)
    either = _area(first[..., :2], first[..., 2:]) + _area(second[..., :2], second[..., 2:]) - shared
    return shared / torch.where(either > 0, either, 1.0)


def box_overlap(
    guide: Callable[[Batch], Any],
    train: Batch,
    test: Batch,
    boxes: str = "boxes",
    given: Sequence[str] | str | None = None,
    *,
    sites: Sequence[str] | str = "z",
    regularisation: float = 1.0,
    seed: int | None = None,
    audit: bool = True,
) -> BoxOverlap:
    r"""Predict bounding boxes from posterior means by a linear regression, and measure their overlap with true ones.

    .. math:: \hat y_n = b + W^T h_n, \qquad h_n = (E_q[z | x_{n, given}] - \mu) / \sigma

    with :math:`\mu` and :math:`\sigma` of the training rows, and W and b that minimise the sum of squared errors plus
    :math:`\|W\|^2 / C`. The overlap is the mean over rows of :func:`intersection_over_union`.

    Args:
        guide: callable of a batch.
        train, test: batches; rows that lack a given modality are left out.
        boxes: name of a covariate or modality ``(N, 4)`` or ``(N, K, 4)``: left, top, right and bottom edge of each of
            K boxes, in any unit.
        given: names of the modalities that the guide sees; None for all, but for ``boxes``.
        sites: names of the latent sites whose means are concatenated.
        regularisation: C; a larger value regularises less.
        seed: of draws, where means depend on any; None uses torch's generator.
        audit: False skips the audit of the guide (:mod:`pyro_mm.scoring.audit`).

    Returns:
        The mean overlap over test rows, of all boxes and of each, with standard errors.

    Raises:
        ValueError: the boxes are given to the guide, are unknown or of another shape; a site is unknown, or no row is
            left.
    """
    check_number("regularisation", regularisation, above=0)
    first, second = probe_rows(guide, train, test, boxes, Features(given, sites, seed, audit))
    for rows in (first, second):
        if rows.targets.shape[-1:] != (4,) or rows.targets.dim() not in (2, 3):
            raise ValueError(
                f"expected boxes (N, 4) or (N, K, 4) of {boxes!r}, left, top, right and bottom, got shape "
                f"{tuple(rows.targets.shape)}"
            )
    with preserve_process_settings():
        from sklearn.linear_model import Ridge  # imported here because it takes seconds
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    regression = make_pipeline(StandardScaler(), Ridge(alpha=1 / regularisation))
    regression.fit(first.means, first.targets.double().flatten(1).numpy())
    truth = second.targets.double().reshape(len(second.targets), -1, 4)
    predicted = torch.from_numpy(regression.predict(second.means)).reshape(truth.shape)
    overlap = intersection_over_union(predicted, truth)
    return BoxOverlap(Share.of(overlap.mean(1)), tuple(Share.of(each) for each in overlap.unbind(1)))


def _area(low: Tensor, high: Tensor) -> Tensor:
    """Return the areas of boxes from their upper left and lower right corners."""
    return (high - low).clamp(min=0).prod(-1)
