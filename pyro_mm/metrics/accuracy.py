"""How well one modality is told from others: of the class labels that a model predicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..sampling.predictive import generate
from ..scoring.evaluation import evaluating, returned
from ..utils.arguments import check_counts, check_name, check_names, check_programs, check_tensor
from ..utils.global_state import preserve_process_settings

CHUNK = 256  # rows at once: every modality is decoded, and only the target's class probabilities are kept


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
    r"""The predicted classes of every row, ``(N, C)``: :math:`\frac1S \sum_s p(x_t | z_s), z_s \sim q(z | x_{given})`.

    Args:
        target: the modality to predict, a Categorical.
        given: those to predict it from.
        num_samples: S.
        audit: False spares the audit of the pair (:mod:`pyro_mm.scoring.audit`), and what it would refuse.

    Raises:
        ValueError: the target is among what is given, or is not a Categorical.
    """
    names = _checked(model, guide, batch, target, given, num_samples)
    if target in names:
        raise ValueError(f"{target!r} is both the target and given")
    shown, stacked = batch.only(*names), num_samples > 1
    with evaluating(model, guide, shown, audit=audit, stacked=stacked, draws=True) as whole:
        parts = [
            generate(model, guide, whole.block(rows), num_samples, mean=True, audit=False)[target].mean(0)
            for rows in torch.arange(whole.size, device=whole.device).split(CHUNK)
        ]
        probabilities = torch.cat(parts)
        if probabilities.dim() != 2 or batch[target].dim() != 1:
            raise ValueError(f"expected {target!r} to be one class label a row, got {tuple(probabilities.shape)}")
        return returned(probabilities, whole, batch)


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
    """The share of the rows that have the target in which its likeliest class, as predicted, is the true one.

    Arguments as of :func:`class_probabilities`. Rows that lack everything given are predicted from the prior.
    """
    _checked(model, guide, batch, target, given, num_samples)
    there = batch.present[target]
    if not there.any():
        raise ValueError(f"no row of the batch has {target!r}, so that there is nothing to tell right from wrong by")
    predicted = class_probabilities(model, guide, batch, target, given, num_samples, audit=audit).argmax(-1)
    return (predicted == batch[target])[there].float().mean().item()


def _checked(model: Any, guide: Any, batch: Any, target: Any, given: Any, num_samples: Any) -> tuple[str, ...]:
    """Return the names of what is given, after a look at all arguments."""
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_counts(num_samples=num_samples)
    check_name("target", target, batch)
    return check_names("given", given, batch)


def confusion_matrix(true: Tensor, predicted: Tensor, num_classes: int) -> np.ndarray:
    """Counts ``(C, C)``: true classes down, predicted ones across.

    Args:
        true, predicted: integers ``(N,)``.
        num_classes: C.
    """
    check_counts(num_classes=num_classes)
    for argument, labels in (("true", true), ("predicted", predicted)):
        if check_tensor(argument, labels, ("N",)).shape != true.shape or not len(true):
            raise ValueError(f"expected {argument} of shape {tuple(true.shape)}, got {tuple(labels.shape)}")
    with preserve_process_settings():
        from sklearn import metrics  # here, because it takes a second

    return metrics.confusion_matrix(true.cpu(), predicted.cpu(), labels=range(num_classes))
