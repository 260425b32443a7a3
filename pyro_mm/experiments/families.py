"""What is measured of every member of a family of recipes, and the table of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import metrics, protocols
from .batch import Batch
from .likelihood import log_marginal
from .recipes import Recipe
from .recipes.published import Family, Member
from .report import share
from .seeding import seeded

PREDICTIONS = 100  # draws of z behind a predicted label
PICTURES = 10  # pictures generated for every label that is given
PROBED = 10_000  # training rows of the linear probe
JUDGED = 100_000  # rows that the judge is shown at least, over its epochs
COLUMNS = (
    "log p(image)", "log p(image, label)", "log p(image | label)", "k-hat > 0.7", "label from image",
    "image from label", "probe", "s/epoch",
)  # fmt: skip


@dataclass(frozen=True)
class Judge:
    """A classifier of true images, and how often it is right on true test images."""

    net: nn.Module
    accuracy: metrics.Share

    @staticmethod
    def trained(what: Family, directory: str | None, device: torch.device) -> Judge:
        """Trained on grey pixels, which the mean images that it has to judge are like."""
        options: dict[str, Any] = {"directory": directory} if directory else {}
        train, test = (batch.to(device) for batch in what.data(binarize=None, **options))
        epochs = max(2, JUDGED // train.size)
        return Judge(*metrics.classifier(train["image"], train["label"], test["image"], test["label"], epochs=epochs))


def measured(
    member: Member, run: Recipe, train: Batch, test: Batch, judge: Judge, num_particles: int, seed: int
) -> dict[str, Any]:
    """Column -> value and standard error, of those that the member has.

    log p(label), in log p(image | label), is from draws of the prior: under a q(z | label) that is too narrow it comes
    out too low, and the conditional too high. "k-hat > 0.7" has the share of each of the likelihoods, in their order.
    """
    model, guide, _ = run
    options: dict[str, Any] = {"num_particles": num_particles, "seed": seed}
    found: dict[str, Any] = {}

    def likelihood(name: str, evidence: Any) -> None:
        found[name] = evidence.mean()
        found.setdefault("k-hat > 0.7", []).append(evidence.untrusted())

    if member.encodes_image:
        likelihood("log p(image)", log_marginal(model, guide, test.only("image"), **options))
    if member.knows_label:
        likelihood("log p(image, label)", log_marginal(model, guide, test, **options))
        given: dict[str, Any] = {"target": ("image",), "given": ("label",)}
        likelihood("log p(image | label)", protocols.conditional(model, guide, test, **given, **options))
        pictures = metrics.cross_modal_coherence(
            model, guide, test, "image", "label", judge.net, test["label"], num_samples=PICTURES, seed=seed
        )
        found["image from label"] = pictures[:2]
    if member.knows_label and member.encodes_image:
        with seeded(seed, test.device):
            right = metrics.class_probabilities(model, guide, test, "label", "image", PREDICTIONS).argmax(-1)
        found["label from image"] = metrics.Share.of(right == test["label"])[:2]
    if member.encodes_image:
        some = train[: min(PROBED, train.size)].to(test.device)
        found["probe"] = metrics.linear_probe(guide, some, test, "label", "image", seed=seed)[:2]
    return found | {"judge": judge.accuracy[:2]}


Table = tuple[Sequence[str], list[list[str]]]


def side_by_side(lines: Mapping[str, Mapping[str, Any]]) -> Table:
    """The header, and a row of text for every member."""
    names = [_name(column, lines) for column in COLUMNS]
    return ("", *names), [[name, *(_text(column, line) for column in COLUMNS)] for name, line in lines.items()]


def by_fraction(lines: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> dict[str, Table]:
    """A table for every quantity, with a column for every fraction of paired rows: one in so many."""
    header = ("", *("all" if part == 1 else f"1/{part}" for part in lines))
    return {
        _name(column, lines[1]): (
            header,
            [[name, *(_text(column, lines[part][name]) for part in lines)] for name in lines[1]],
        )
        for column in COLUMNS[:6]
    }


def _name(column: str, lines: Mapping[str, Mapping[str, Any]]) -> str:
    judge = next(iter(lines.values()))["judge"][0]
    return column if column != "image from label" else f"{column} (judge: {judge:.1%})"


def _text(column: str, line: Mapping[str, Any]) -> str:
    if column == "s/epoch":
        return f"{line['seconds']:.1f}"
    if column not in line:
        return "–"
    if column == "k-hat > 0.7":
        return ", ".join(share(x) for x in line[column])
    value, error = line[column]
    if column.startswith("log"):
        return f"{value:.2f} ± {error:.2f}"
    return f"{value:.1%}"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The table, as in a README."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |\n" for line in lines)
