"""Scores of labels and modalities that are predicted where modalities are missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical

from ...batch.batch import Batch
from ...models import Factorized
from ...recipes.networks import Recipe
from ...sampling.encode import encode
from ...sampling.predictive import SampleSettings, sample_pair
from ...utils.global_state import preserve_process_settings
from ...utils.seeding import temporary_seed
from .study import Measurements

LABEL = "label"
DRAWS = 30  # draws of the latents per row
VALIDATION_DRAWS = 5  # after every epoch
ROWS_AT_ONCE = 500


class Truth(NamedTuple):
    """Facts about a sample that the scores need.

    Attributes:
        scale: the standard deviation by which a real label was divided, ``()`` or ``(R,)``; None for a class.
        validation: validation rows; None if there are none.
    """

    scale: Tensor | None = None
    validation: Batch | None = None


def modalities(rows: Batch) -> tuple[str, ...]:
    """Return the names of all modalities but the label."""
    return tuple(name for name in rows.names if name != LABEL)


def given_sets(rows: Batch) -> dict[str, tuple[str, ...]]:
    """Return the suffix of a column -> the modalities that are given: all of them, and all but each."""
    names = modalities(rows)
    found = {"": names}
    if len(names) > 1:
        found |= {f", no {name}": tuple(other for other in names if other != name) for name in names}
    return found


def label_scores(predicted: np.ndarray, true: np.ndarray, scale: Tensor | None) -> dict[str, float]:
    """Return the scores of predicted labels.

    Args:
        predicted, true: classes ``(N,)``, or standardised real numbers ``(N,)`` or ``(N, R)``.
        scale: None for classes; else the standard deviation by which the numbers were divided.

    Returns:
        Of classes the accuracy, and the F1 score weighted by the frequency of the classes. Of real numbers the mean
        absolute error in the label's own units, and Pearson's correlation over rows; means over R ratings.
    """
    if scale is None:
        with preserve_process_settings():
            from sklearn.metrics import f1_score

        f1 = f1_score(true, predicted, average="weighted", zero_division=0)
        return {"accuracy": float((predicted == true).mean()), "F1": float(f1)}
    x, y = (values.reshape(len(values), -1).astype(np.float64) for values in (predicted, true))
    error = np.abs(x - y).mean(0) * scale.double().reshape(-1).numpy()
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.sqrt((x**2).sum(0) * (y**2).sum(0))
    correlation = np.divide((x * y).sum(0), norm, out=np.zeros_like(norm), where=norm > 0)  # 0 for a constant
    return {"MAE": float(error.mean()), "r": float(correlation.mean())}


@torch.no_grad()
def predict_label(run: Recipe, rows: Batch, given: Sequence[str], seed: int) -> np.ndarray:
    """Predict the label by the mean of p(label | z) over draws of z given some modalities.

    Returns:
        The likeliest class ``(N,)``, or the mean ``(N,)`` or ``(N, R)``.
    """
    settings = SampleSettings(DRAWS, mean=frozenset({LABEL}))
    parts = []
    for block in _blocks(rows.only(*given)):
        drawn = sample_pair(run.model, run.guide, block, settings, seed=seed, audit=False)
        parts.append(drawn.modalities[LABEL].mean(0).cpu())
    mean = torch.cat(parts)
    is_class = not rows[LABEL].is_floating_point()
    return np.asarray((mean.argmax(-1) if is_class else mean).numpy())


def predicted_scores(run: Recipe, rows: Batch, scale: Tensor | None, seed: int) -> dict[str, float]:
    """Return the scores of the label given all modalities, and given all but each."""
    rows = labelled(rows)
    true = rows[LABEL].cpu().numpy()
    found: dict[str, float] = {}
    for suffix, given in given_sets(rows).items():
        scores = label_scores(predict_label(run, rows, given, seed), true, scale)
        found |= {f"{name}{suffix}": value for name, value in scores.items()}
    return found


def labelled(rows: Batch) -> Batch:
    """Return the rows that have a label."""
    return rows[rows.present[LABEL]]


def validation_score(run: Recipe, sample: Any, seed: int) -> float:
    """Return how well a recipe in training predicts the label of the validation rows, by which its epoch is chosen.

    It is the accuracy, or minus the mean absolute error in units of the labels' deviations: the mean over predictions
    from all modalities and from all but each, so that the choice is of surrogates too.

    Args:
        run: a recipe.
        sample: its data, whose truth is a :class:`Truth` with validation rows.
        seed: the seed of the draws.
    """
    rows = labelled(sample.truth.validation).to(sample.test.device)
    true = rows[LABEL].cpu().numpy()
    scores = []
    for given in given_sets(rows).values():
        predicted = _predict_quickly(run, rows.only(*given), seed)
        right = (predicted == true).mean() if sample.truth.scale is None else -np.abs(predicted - true).mean()
        scores.append(float(right))
    return sum(scores) / len(scores)


@torch.no_grad()
def _predict_quickly(run: Recipe, rows: Batch, seed: int) -> np.ndarray:
    """Predict the label as :func:`predict_label` does, from fewer draws and without decoding any modality."""
    with temporary_seed(seed, rows.device):
        z = encode(run.guide, rows, audit=False)["z"].sample((VALIDATION_DRAWS,))
    model: Any = run.model
    if isinstance(model, Factorized):
        decoded = model.labels[LABEL](model.factors({"z": z}, rows)["z"])
    else:
        decoded = model.decoders[LABEL](z)
    if isinstance(decoded, Categorical):
        return np.asarray(decoded.probs.mean(0).argmax(-1).cpu().numpy())
    return np.asarray(decoded.mean.mean(0).cpu().numpy())


@torch.no_grad()
def missing_errors(run: Recipe, train: Batch, rows: Batch, seed: int) -> dict[str, float]:
    r"""Return how far each modality is from its reconstruction given the others, relative to its mean.

    .. math:: \frac{\sum_n \|x_n - \hat E[x_n | others]\|^2}{\sum_n \|x_n - \bar x\|^2}

    with the mean :math:`\bar x` of the training rows, over rows that have the modality and another one, and over valid
    steps. Of tokens it is the ratio of negative log-likelihoods, to that under the frequencies of the training rows.
    Below 1 the reconstruction is better than the mean. The expectation is over draws of the guide: a private latent of
    a missing modality is as the guide infers it.

    Args:
        run: a trained recipe with a :class:`~pyro_mm.models.Factorized` story.
        train: training rows.
        rows: test rows.
        seed: the seed of the draws.

    Returns:
        ``"error of m"`` -> ratio, for each modality m.
    """
    assert isinstance(run.model, Factorized)
    found: dict[str, float] = {}
    names = modalities(rows)
    for name in names if len(names) > 1 else ():
        others = [other for other in names if other != name]
        there = rows.present[name] & torch.stack([rows.present[other] for other in others]).any(0)
        some = rows[there]
        baseline = _Baseline(train, name)
        error, reference = 0.0, 0.0
        with temporary_seed(seed, rows.device):
            for block in _blocks(some):
                each = _block_error(run, run.model, block, name, others, baseline)
                error += each[0]
                reference += each[1]
        found[f"error of {name}"] = error / reference if reference else math.nan
    return found


class _Baseline:
    """The mean of a modality over training rows, or the frequencies of its tokens.

    Args:
        train: training rows.
        name: the modality.
    """

    def __init__(self, train: Batch, name: str):
        present = train.present[name]
        values = train[name][present]
        weight = valid_entries(train, name)[present]
        self.is_tokens = not values.is_floating_point()
        if self.is_tokens:
            counts = values[weight].bincount(minlength=int(values.max()) + 1).float()
            self.log_frequency = (counts / counts.sum()).clamp(min=1e-6).log()
        elif name in train.lengths:
            self.mean = (values * weight[..., None]).sum((0, 1)) / weight.sum()
        else:
            self.mean = values.mean(0)


def valid_entries(rows: Batch, name: str) -> Tensor:
    """Return the valid steps of a modality with lengths, boolean ``(N, T)``; ``(N,)`` of a modality without them."""
    if name not in rows.lengths:
        return torch.ones(rows.size, dtype=torch.bool, device=rows.device)
    steps = rows[name].shape[1]
    return torch.arange(steps, device=rows.device) < rows.lengths[name][:, None]


def _block_error(
    run: Recipe, model: Factorized, rows: Batch, name: str, others: Sequence[str], baseline: _Baseline
) -> tuple[float, float]:
    """Return the summed error of a modality given others, and that of its mean."""
    posterior: Mapping[str, Any] = encode(run.guide, rows.only(*others), audit=False)
    draws = {site: d.sample((DRAWS,)) for site, d in posterior.items()}
    decoded = model.decode(model.factors(draws, rows), rows)[name]
    values, valid = rows[name], valid_entries(rows, name)
    if baseline.is_tokens:
        log_prob = decoded.log_prob(values).logsumexp(0) - math.log(DRAWS)
        frequency = baseline.log_frequency[values] * valid
        return -log_prob.sum().item(), -frequency.sum().item()
    difference = (decoded.mean.mean(0) - values).square()
    reference = (values - baseline.mean).square()
    if name in rows.lengths:
        difference, reference = (each * valid[..., None] for each in (difference, reference))
    return difference.sum().item(), reference.sum().item()


def _blocks(rows: Batch) -> list[Batch]:
    """Return the rows in blocks that bound the memory."""
    return [rows[index] for index in torch.arange(rows.size, device=rows.device).split(ROWS_AT_ONCE)]


def measure(run: Recipe, sample: Any, seed: int, fitted: bool) -> Measurements:
    """Measure a trained recipe: scores of the label, and errors of missing modalities if the story generates them.

    Args:
        run: a trained recipe.
        sample: its data, whose truth is a :class:`Truth`.
        seed: the seed of the draws.
        fitted: not used: no likelihood is estimated.
    """
    truth: Truth = sample.truth
    found: dict[str, float] = dict(predicted_scores(run, sample.test, truth.scale, seed))
    if truth.validation is not None:
        rows = truth.validation.to(sample.test.device)
        first = next(iter(predicted_scores(run, rows, truth.scale, seed).items()))
        found = {f"validation {first[0]}": first[1], **found}
    if isinstance(run.model, Factorized):
        found |= missing_errors(run, sample.train, sample.test, seed)
    return found
