"""Factorised representations (Tsai et al. 2019) of sentiment, ratings and digits: ablations and baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ... import conditionals, datasets, posteriors
from ...batch.batch import Batch
from ...nn import MLP
from ...recipes.factorized import mfm, mfm_variational
from ...recipes.modality_networks import ModalityNetworks
from ...recipes.networks import Recipe
from . import ablations
from .fusion_baselines import constant_scores, late_fusion, regression_scores, unimodal_regression
from .mnist_usps_word import binary
from .prediction_scores import LABEL, Truth, measure, modalities, validation_score
from .study import Sample, Study

# -- data ----------------------------------------------------------------------------------------------------------


def mosi(seed: int, directory: str | None = None) -> Sample:
    """Load utterances of MOSI, the same under every seed."""
    return Sample(*datasets.mosi(directory), Truth())


def ratings(which: Literal["mmmo", "pom"], seed: int, directory: str | None = None) -> Sample:
    """Load the audio and video of MMMO or POM, with ratings standardised over training rows."""
    train, test = datasets.sequences(which, directory)
    _, validation = datasets.sequences(which, directory, held_out="validation")
    given = train[LABEL][train.present[LABEL]]
    mean, scale = given.mean(0), given.std(0)

    def standardised(rows: Batch) -> Batch:
        return rows.replaced({LABEL: (rows[LABEL] - mean) / scale})

    return Sample(standardised(train), standardised(test), Truth(scale, standardised(validation)))


def digits(seed: int, directory: str | None = None) -> Sample:
    """Pair MNIST and USPS by digit under a seed, with pixels 0 or 1; 1,000 training pairs are for validation."""
    train, test = (binary(rows) for rows in datasets.mnist_usps(directory, seed=seed))
    return Sample(train[:-1000], test, Truth(validation=train[-1000:]))


# -- rows ----------------------------------------------------------------------------------------------------------


def with_surrogate(kind: str, batch: Batch, **settings: Any) -> Recipe:
    """Build MFM whose surrogate of z pools the modalities that are present in another way.

    Args:
        kind: ``"product"`` or ``"mixture"`` of experts, or ``"set"``, a sum of features.
        batch: training rows.
        settings: of :func:`pyro_mm.recipes.mfm`.
    """
    run = mfm(batch, **settings)
    latent, hidden = settings["latent"], settings["hidden"]
    names = modalities(batch)
    parts = ModalityNetworks(batch, hidden)

    def expert(name: str) -> nn.Module:
        return conditionals.Normal(parts.encoder(name, 2 * latent))

    makers: Mapping[str, Callable[[], nn.Module]] = {
        "product": lambda: posteriors.ProductOfExperts({name: expert(name) for name in names}),
        "mixture": lambda: posteriors.MixtureOfExperts({name: expert(name) for name in names}),
        "set": lambda: posteriors.SumPooling(
            {name: parts.encoder(name, hidden[-1]) for name in names},
            conditionals.Normal(MLP(hidden[-1], 2 * latent, hidden)),
            size=hidden[-1],
        ),
    }
    run.guide.posteriors["z"].posterior.partial = makers[kind]()  # type: ignore[union-attr]
    return run


def members(blocks: bool = True, **settings: Any) -> dict[str, Callable[[Batch], Recipe]]:
    """Return the rows that are trained: MFM, its ablations, other surrogates, its twin, and late fusion.

    M_A to M_D are the ablations of the paper as its released code has them.

    Args:
        blocks: include the rows whose decoders see some factors of several; not for tokens, whose networks are called
            step by step.
        settings: of :func:`pyro_mm.recipes.mfm`, with ``latent``, ``hidden`` and ``private``.
    """
    size = {"latent": settings["latent"], "hidden": settings["hidden"]}
    whole = {name: value for name, value in settings.items() if name in ("latent", "hidden", "private")}
    found: dict[str, Callable[[Batch], Recipe]] = {
        "MFM": partial(mfm, **settings),
        "missing paths untrained": partial(mfm, **settings, reconstruct_missing=False),
        "M_A: one generative factor for all modalities": partial(ablations.one_generative_factor, **settings),
        "M_B: no joint factor, label from those of each modality": partial(ablations.without_joint_factor, **settings),
        "M_C: no private factors": partial(mfm, **settings | {"private": 0}),
        "M_D: M_B without generation and MMD": partial(ablations.label_alone, **settings),
        "no shared factor in decoders": partial(ablations.without_shared_factor, **settings),
        "no generation": partial(mfm, **settings | {"generation": 0.0, "reconstruct_missing": False}),
        "no MMD": partial(mfm, **settings | {"mmd": 0.0}),
    }
    if not blocks:
        found = {name: make for name, make in found.items() if not name.startswith(("M_B", "no shared factor"))}
    return found | {
        "surrogate: product of experts": partial(with_surrogate, "product", **settings),
        "surrogate: mixture of experts": partial(with_surrogate, "mixture", **settings),
        "surrogate: set encoder": partial(with_surrogate, "set", **settings),
        "variational twin": partial(mfm_variational, **whole),
        "late fusion": partial(late_fusion, **size),
    }


def known(*names: str) -> dict[str, Any]:
    """Return the rows that need no training: a constant, and regressions on each modality and on all.

    Args:
        names: the modalities.
    """
    found: dict[str, Any] = {"most frequent class, or mean": constant_scores}
    found |= {f"regression, {name} alone": partial(unimodal_regression, name) for name in names}
    return found | {"regression": regression_scores}


def _adam(rate: float, run: Recipe, parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, rate)


# -- studies -------------------------------------------------------------------------------------------------------

MOSI = Study(
    title="Factorised representations of MOSI utterances",
    groups={"sentiment": mosi},
    # sizes and weights are those of the released code's best configuration; none was chosen on these rows
    members=members(
        latent=32,
        hidden=(64,),
        private={"text": 32, "audio": 8, "video": 80},
        generation={"text": 1.0, "audio": 0.01, "video": 0.5},
        mmd=1.0,
    ),
    measure=measure,
    epochs=30,
    batch_size=32,
    optimizer=partial(_adam, 1e-3),
    known=known("text", "audio", "video"),
    published={("sentiment", "MFM"): "Acc 78.1, F1 78.1"},
)
"""The published figures are of aligned sequences, and the best of a search on the test rows: not comparable."""


def _of_ratings(which: Literal["mmmo", "pom"], group: str, title: str, epochs: int) -> Study:
    """Build the study of a set of videos with ratings."""
    return Study(
        title=title,
        groups={group: partial(ratings, which)},
        members=members(latent=32, hidden=(64,), private=16, generation=0.1, mmd=1.0),
        measure=measure,
        validate=validation_score,
        epochs=epochs,
        batch_size=32,
        optimizer=partial(_adam, 1e-3),
        known=known("audio", "video"),
    )


MMMO = _of_ratings("mmmo", "rating", "Factorised representations of ICT-MMMO videos, a rating from 1 to 5", 30)
POM = _of_ratings("pom", "ratings", "Factorised representations of POM videos, 17 ratings up to 7", 20)

DIGITS = Study(
    title="Factorised representations of two images of a digit",
    groups={"digit": digits},
    members=members(latent=16, hidden=(256,), private=16, generation=1.0, mmd=1.0),
    measure=measure,
    validate=validation_score,
    epochs=10,
    batch_size=128,
    optimizer=partial(_adam, 1e-3),
    known=known("mnist", "usps"),
)
