"""Accuracy of labels predicted from other modalities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..sampling.predictive import SampleSettings, sample_pair
from ..scoring.evaluation import evaluating, move_result
from ..utils.arguments import check_counts, check_name, check_names, check_programs, check_tensor
from ..utils.global_state import preserve_process_settings

ROWS_PER_PASS = 256  # rows per pass, which bounds the memory: a pass decodes every modality


def class_probabilities(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    target: str,
    given: Sequence[str] | str,
    num_samples: int = 100,
    *,
    audit: bool = True,
) -> Tensor:
    r"""Predict the class of a label modality from other modalities, per row.

    .. math:: \hat p_n = \frac1S \sum_s p(x_t | z_{ns}), \qquad z_{ns} \sim q(z | x_{n, given})

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        target: name of the modality to predict, a Categorical with C classes.
        given: names of the modalities to predict it from.
        num_samples: S, draws per row.
        audit: False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`).

    Returns:
        Class probabilities, ``(N, C)``.

    Raises:
        ValueError: the target is among the given modalities, or is not one Categorical per row.
    """
    names = _check_arguments(model, guide, batch, target, given, num_samples)
    if target in names:
        raise ValueError(f"{target!r} is both the target and given")
    visible = batch.only(*names)
    with evaluating(model, guide, visible, audit=audit, stacked=num_samples > 1, draws=True) as whole:
        settings = SampleSettings(num_samples, mean=frozenset({target}))  # other modalities may have no known mean
        parts = [
            sample_pair(model, guide, whole.block(rows), settings, seed=None, audit=False).modalities[target].mean(0)
            for rows in torch.arange(whole.size, device=whole.device).split(ROWS_PER_PASS)
        ]
        probabilities = torch.cat(parts)
        if probabilities.dim() != 2 or batch[target].dim() != 1:
            raise ValueError(f"expected {target!r} to be one class label per row, got {tuple(probabilities.shape)}")
        return move_result(probabilities, whole, batch)


def cross_modal_accuracy(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    target: str,
    given: Sequence[str] | str,
    num_samples: int = 100,
    *,
    audit: bool = True,
) -> float:
    """Compute the accuracy of :func:`class_probabilities` over the rows that have the target.

    Rows in which every given modality is missing are predicted from the prior.

    Args:
        model, guide: callables of a batch.
        batch: N rows, whose values of ``target`` are the true classes.
        target: name of the modality to predict, a Categorical.
        given: names of the modalities to predict it from.
        num_samples: draws per row.
        audit: False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`).

    Returns:
        Proportion of rows whose likeliest predicted class is the true one, in [0, 1].

    Raises:
        ValueError: no row has the target, or the target is among the given modalities or is not a Categorical.
    """
    _check_arguments(model, guide, batch, target, given, num_samples)
    present = batch.present[target]
    if not present.any():
        raise ValueError(f"no row of the batch has {target!r}, so there are no true classes to compare with")
    predicted = class_probabilities(model, guide, batch, target, given, num_samples, audit=audit).argmax(-1)
    return (predicted == batch[target])[present].float().mean().item()


def _check_arguments(model: Any, guide: Any, batch: Any, target: Any, given: Any, num_samples: Any) -> tuple[str, ...]:
    """Check the arguments that both functions share, and return the names of the given modalities."""
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_counts(num_samples=num_samples)
    check_name("target", target, batch)
    return check_names("given", given, batch)


def confusion_matrix(true: Tensor, predicted: Tensor, num_classes: int) -> np.ndarray:
    """Count rows by true and predicted class.

    Args:
        true, predicted: integer classes ``(N,)``, with N > 0.
        num_classes: C.

    Returns:
        Counts ``(C, C)``: one row per true class, one column per predicted class.

    Raises:
        ValueError: shapes that are not equal and of one dimension, or no rows.

    >>> confusion_matrix(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), num_classes=2)
    array([[1, 1],
           [0, 1]])
    """
    check_counts(num_classes=num_classes)
    for argument, labels in (("true", true), ("predicted", predicted)):
        if check_tensor(argument, labels, ("N",)).shape != true.shape or not len(true):
            raise ValueError(f"expected {argument} of shape {tuple(true.shape)}, got {tuple(labels.shape)}")
    with preserve_process_settings():
        from sklearn import metrics  # imported here because it takes a second

    counts: np.ndarray = metrics.confusion_matrix(true.cpu(), predicted.cpu(), labels=range(num_classes))
    return counts
