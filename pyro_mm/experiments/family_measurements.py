"""Measurements of a member of a family: likelihoods, coherence by a classifier, and a linear probe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .. import metrics
from ..batch.batch import Batch
from ..evidence import protocols
from ..evidence.likelihood import log_conditional, log_marginal
from ..recipes import Recipe
from ..utils.seeding import temporary_seed
from .estimates import FITTED
from .families import Family, Member

PREDICTIONS = 100  # draws of z per predicted label
IMAGES = 10  # images generated per given label
PROBE_ROWS = 10_000  # training rows of the linear probe
GUIDE = "by the guide"  # the entry of likelihoods by draws of the guide, beside those by fitted proposals
JUDGE_ROWS = 100_000  # rows, counted over epochs, that the judge is trained on at least


@dataclass(frozen=True)
class Judge:
    """A classifier of true images.

    Attributes:
        net: from images to logits.
        accuracy: its accuracy on true test images.
    """

    net: nn.Module
    accuracy: metrics.Share

    @staticmethod
    def train(family: Family, directory: str | None, device: torch.device) -> Judge:
        """Train a judge on grey images, since the mean images that it has to judge are grey.

        Args:
            family: the data.
            directory: the folder of the data files; None for the default.
            device: the device to train on.
        """
        options: dict[str, Any] = {"directory": directory} if directory else {}
        train, test = (batch.to(device) for batch in family.data(binarize=None, **options))
        epochs = max(2, JUDGE_ROWS // train.size)
        return Judge(*metrics.classifier(train["image"], train["label"], test["image"], test["label"], epochs=epochs))


def measure_member(
    member: Member,
    run: Recipe,
    train: Batch,
    test: Batch,
    judge: Judge,
    num_particles: int,
    seed: int,
    fitted: bool = True,
) -> dict[str, Any]:
    """Measure a trained member on the test rows.

    log p(label), in log p(image | label), is estimated with draws of the prior if it is not by a fitted proposal:
    under a q(z | label) that is too narrow it would be too low, and the conditional too high.

    Args:
        member: says which quantities are defined.
        run: the trained recipe.
        train: training rows, for the linear probe.
        test: test rows, on the device of the recipe.
        judge: the classifier of generated images.
        num_particles: draws per row of a likelihood.
        seed: the seed of all draws.
        fitted: estimate likelihoods by proposals fitted to each row, and by the guide beside them.

    Returns:
        Column -> (value, standard error); "k-hat > 0.7" -> one share per likelihood, in their order. "by the guide" ->
        these columns of the likelihoods by draws of the guide, if the others are by fitted proposals.
    """
    model, guide, _ = run
    found = _measure_likelihoods(member, run, test, num_particles, seed, FITTED if fitted else None)
    if fitted:
        found[GUIDE] = _measure_likelihoods(member, run, test, num_particles, seed, None)
    if member.knows_label:
        coherence = metrics.cross_modal_coherence(
            model, guide, test, "image", "label", judge.net, test["label"], num_samples=IMAGES, mean=member.knows_mean,
            seed=seed,
        )  # fmt: skip
        found["image from label"] = coherence[:2]
    if member.knows_label and member.encodes_image:
        with temporary_seed(seed, test.device):
            predicted = metrics.class_probabilities(model, guide, test, "label", "image", PREDICTIONS).argmax(-1)
        found["label from image"] = metrics.Share.of(predicted == test["label"])[:2]
    if member.encodes_image:
        rows = train[: min(PROBE_ROWS, train.size)].to(test.device)
        found["probe"] = metrics.linear_probe(guide, rows, test, "label", "image", seed=seed)[:2]
    return found | {"judge": judge.accuracy[:2]}


def _measure_likelihoods(
    member: Member, run: Recipe, test: Batch, num_particles: int, seed: int, proposal: str | None
) -> dict[str, Any]:
    """Measure the likelihoods that a member has, and their k-hats, by one proposal."""
    model, guide, _ = run
    options: dict[str, Any] = {"num_particles": num_particles, "seed": seed, "proposal": proposal}
    evidence = {}
    if member.encodes_image:
        evidence["log p(image)"] = log_marginal(model, guide, test.only("image"), **options)
    if member.knows_label:
        evidence["log p(image, label)"] = log_marginal(model, guide, test, **options)
        conditional = protocols.conditional if proposal is None else log_conditional
        evidence["log p(image | label)"] = conditional(
            model, guide, test, target=("image",), given=("label",), **options
        )
    shares = [each.untrusted() for each in evidence.values()]
    return {**{name: each.mean() for name, each in evidence.items()}, "k-hat > 0.7": shares}
