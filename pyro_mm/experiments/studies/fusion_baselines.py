"""Baselines of multimodal prediction: regression on features of each modality and of all, and a late-fusion network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import conditionals
from ...batch.batch import Batch
from ...models import SharedLatent
from ...nn import MLP
from ...objectives.objective import Objective
from ...objectives.terms import Term
from ...posteriors import Given, JointEncoder
from ...posteriors.guide import Guide
from ...recipes.kinds import modality_kind, number_of_classes
from ...recipes.modality_networks import Hidden, ModalityNetworks
from ...recipes.networks import Recipe, standard_prior
from ...utils.global_state import preserve_process_settings
from .prediction_scores import LABEL, given_sets, label_scores, labelled, modalities, valid_entries
from .study import Measurements, Sample


def constant_scores(sample: Sample, seed: int) -> Measurements:
    """Score the most frequent class of the training rows, or their mean label."""
    train, test = labelled(sample.train), labelled(sample.test)
    labels, true = train[LABEL].cpu(), test[LABEL].cpu().numpy()
    best = labels.mean(0) if labels.is_floating_point() else labels.bincount().argmax()
    predicted = np.broadcast_to(best.numpy(), true.shape)
    return label_scores(predicted, true, sample.truth.scale)


def regression_scores(sample: Sample, seed: int) -> Measurements:
    """Score a logistic or ridge regression on all modalities and on all but each, and ridge regressions of each."""
    found: dict[str, float] = {}
    for suffix, given in given_sets(sample.train).items():
        scores = _regression(sample, given)
        found |= {f"{name}{suffix}": value for name, value in scores.items()}
    if sample.truth.validation is not None:
        validation = Sample(sample.train, sample.truth.validation, sample.truth)
        name, value = next(iter(_regression(validation, modalities(sample.train)).items()))
        found = {f"validation {name}": value, **found}
    return found | ridge_errors(sample)


def ridge_errors(sample: Sample) -> dict[str, float]:
    """Return how far a ridge regression on the features of the others is from each modality, relative to its mean.

    The penalty is chosen by leave-one-out errors of training rows. Rows that lack any modality are left out, and so are
    sequences and tokens.

    Returns:
        ``"error of m"`` -> ratio of sums of squares over test rows, as in
        :func:`~.prediction_scores.missing_errors`.
    """
    with preserve_process_settings():
        from sklearn.linear_model import RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    names = modalities(sample.train)
    train, test = (rows[torch.stack([rows.present[n] for n in names]).all(0)] for rows in (sample.train, sample.test))
    found = {}
    for name in names if len(names) > 1 else ():
        if modality_kind(sample.train, name) in ("class", "number", "tokens", "sequence"):
            continue
        others = [other for other in names if other != name]
        x, x_test = (np.concatenate([features(rows, o, None) for o in others], 1) for rows in (train, test))
        y, true = (rows[name].flatten(1).double().cpu().numpy() for rows in (train, test))
        regression = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 6, 7)))
        regression.fit(x, y)
        found[f"error of {name}"] = float(
            np.square(regression.predict(x_test) - true).sum() / np.square(true - y.mean(0)).sum()
        )
    return found


def unimodal_regression(name: str, sample: Sample, seed: int) -> Measurements:
    """Score a logistic or ridge regression on the features of one modality."""
    return _regression(sample, (name,))


def _regression(sample: Sample, given: Sequence[str]) -> dict[str, float]:
    """Fit a regression on training rows and score it on test rows.

    Features are standardised over the training rows; a class has a logistic regression with scikit-learn's penalty
    (C = 1), real labels a ridge regression whose penalty is chosen by leave-one-out errors of training rows.
    """
    with preserve_process_settings():
        from sklearn.linear_model import LogisticRegression, RidgeCV
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    train, test = labelled(sample.train), labelled(sample.test)
    fill = [features(train, name, None) for name in given]
    means = [x[train.present[name].cpu().numpy()].mean(0) for x, name in zip(fill, given, strict=True)]
    x, x_test = (
        np.concatenate([features(rows, name, mean) for name, mean in zip(given, means, strict=True)], 1)
        for rows in (train, test)
    )
    y, true = train[LABEL].cpu().numpy(), test[LABEL].cpu().numpy()
    is_class = sample.truth.scale is None
    model: Any = LogisticRegression(max_iter=5000) if is_class else RidgeCV(np.logspace(-1, 5, 13))
    regression = make_pipeline(StandardScaler(), model)
    regression.fit(x, y)
    return label_scores(regression.predict(x_test), true, sample.truth.scale)


def features(rows: Batch, name: str, mean: np.ndarray | None) -> np.ndarray:
    """Return a vector of features for each row, ``(N, D)``.

    Values side by side; of sequences the mean over valid steps, of tokens their frequencies.

    Args:
        rows: the rows.
        name: the modality.
        mean: the features of rows that lack it; None to leave whatever is there.
    """
    values = rows[name]
    kind = modality_kind(rows, name)
    if kind == "tokens":
        values = nn.functional.one_hot(values, number_of_classes(rows, name) if mean is None else len(mean)).float()
    if kind in ("tokens", "sequence"):
        valid = valid_entries(rows, name).float()
        valid = valid if valid.dim() == 2 else torch.ones(values.shape[:2], device=values.device)
        values = (values * valid[..., None]).sum(1) / valid.sum(1, keepdim=True).clamp(min=1)
    x: np.ndarray = values.flatten(1).double().cpu().numpy()
    if mean is not None:
        x = np.where(rows.present[name].cpu().numpy()[:, None], x, mean)
    return x


class _Sum(nn.Module):
    """Sum of M vectors that stand side by side, ``(.., M * C) -> (.., C)``.

    Args:
        size: C.
    """

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        fused: Tensor = x.unflatten(-1, (-1, self.size)).sum(-2)
        return fused


def late_fusion(batch: Batch, latent: int, hidden: Hidden) -> Recipe:
    """Build a classifier, or a regression, that sums what a network of each modality says; a missing one says nothing.

    Each network is the encoder of :func:`pyro_mm.recipes.mfm` and the network from z over f_y to the label.

    Args:
        batch: training rows, for the modalities' kinds and sizes.
        latent: dimensions of each modality's code.
        hidden: sizes of the hidden layers.
    """
    names = modalities(batch)
    parts = ModalityNetworks(batch, hidden)
    is_class = modality_kind(batch, LABEL) == "class"
    event = tuple(batch[LABEL].shape[1:])
    size = number_of_classes(batch, LABEL) if is_class else max(1, batch[LABEL][0].numel())

    def network(name: str) -> nn.Module:
        code = parts.encoder(name, latent)
        return nn.Sequential(code, MLP(latent, latent, hidden), nn.ReLU(), MLP(latent, size, hidden))

    networks = {name: network(name) for name in names}
    whole = JointEncoder(networks, conditionals.Delta(_Sum(size)))
    decoder = (
        conditionals.Categorical(nn.Identity())
        if is_class
        else conditionals.Normal(nn.Identity(), event, scale=0.5**0.5)
    )
    prior = standard_prior(size)
    model = SharedLatent(prior, {LABEL: decoder})
    objective = Objective([Term(names, (LABEL,), likelihood=1 if is_class else 1 / size, kl=0)])
    return Recipe(model, Guide(z=Given(names, whole, prior)), objective)
