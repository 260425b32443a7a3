"""What is measured of every member of a family of recipes, and the table of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import datasets, metrics
from ..batch.batch import Batch
from ..evidence import protocols
from ..evidence.likelihood import log_marginal
from ..recipes import Recipe
from ..recipes.experts import code, hoelder, mmjsd, mmvae, mmvm, mopoe, mvae, mvtcae, unimodal_mean, vaevae
from ..recipes.flows import jnf, jnf_second
from ..recipes.joint_encoder import jmvae_kl, jmvae_zero, telbo, vaevae_joint
from ..recipes.private_latents import dmvae, mmvae_plus
from ..recipes.unimodal import cvae, vae
from ..utils.seeding import temporary_seed
from .evaluation import share
from .published import Data

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
        with temporary_seed(seed, test.device):
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


@dataclass(frozen=True)
class Member:
    """A recipe among others of its family: of the image alone, of the image given the label, or of both."""

    recipe: Callable[[Batch], Recipe]
    encodes_image: bool = True  # whether the latent can be inferred from the image alone
    knows_label: bool = True  # whether the label is in its story
    second: Callable[[Recipe], Recipe] | None = None  # from what was trained to a second stage, of as many epochs


@dataclass(frozen=True)
class Family:
    """Recipes trained alike on the same data, to be measured side by side.

    With more than one of ``fractions``, each of them is also trained on rows of which only one in so many is paired,
    the others having one modality each.
    """

    title: str
    data: Callable[..., tuple[Batch, Batch]]
    members: Mapping[str, Member]
    epochs: int
    batch_size: int
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer]
    num_particles: int
    pixels: str
    fractions: tuple[int, ...] = (1,)
    compile: bool = True
    transform: None = None


def _family(title: str, data: Data) -> Family:
    """No paper's: one latent of 20 dimensions, one hidden layer of 400 everywhere, Adam, and no weighed likelihood."""
    size: Mapping[str, Any] = {"latent": 20, "hidden": (400,)}
    return Family(
        title=title,
        data=data,
        members={
            "VAE": Member(partial(vae, **size), knows_label=False),
            "CVAE": Member(partial(cvae, **size), encodes_image=False),
            "JMVAE-zero": Member(partial(jmvae_zero, **size)),
            "JMVAE-kl": Member(partial(jmvae_kl, **size)),
            "MVAE": Member(partial(mvae, **size)),
            "TELBO": Member(partial(telbo, **size)),
            "VAEVAE": Member(partial(vaevae, **size)),
            "MMVAE": Member(partial(mmvae, **size)),
            "MoPoE": Member(partial(mopoe, **size)),
            "MVTCAE": Member(partial(mvtcae, **size)),
            "mmJSD": Member(partial(mmjsd, **size)),
            "JNF": Member(partial(jnf, **size), second=jnf_second),
        },
        epochs=20,
        batch_size=128,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3, fused=True),
        num_particles=1000,
        pixels="pixels drawn once",
    )


def _weak() -> Family:
    """No paper's either: the digits that need no file, at the sizes of the recipes, and every objective that trains on
    rows with one modality each."""
    members = {
        "JMVAE-zero": jmvae_zero, "JMVAE-kl": jmvae_kl, "MVAE": mvae, "TELBO": telbo, "VAEVAE": vaevae,
        "VAEVAE, joint encoder": vaevae_joint, "MMVAE": mmvae, "mean of unimodal": unimodal_mean, "MoPoE": mopoe,
        "MVTCAE": mvtcae, "mmJSD": mmjsd, "DMVAE": dmvae, "MMVAE+": mmvae_plus, "MMVM": mmvm, "CoDE": code,
        "Hoelder": hoelder,
    }  # fmt: skip
    return Family(
        title="Digits and labels, few of them paired",
        data=lambda directory=None, binarize=None: datasets.digits(),
        members={name: Member(recipe) for name, recipe in members.items()},
        epochs=100,
        batch_size=128,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 3e-3, fused=True),
        num_particles=1000,
        pixels="pixels 0 or 1",
        fractions=(1, 2, 4, 8, 16),
        compile=False,
    )


FAMILIES: Mapping[str, Family] = {
    "family-mnist": _family("Twelve models of MNIST images and labels", datasets.mnist),
    "family-fashion": _family("Twelve models of Fashion-MNIST images and labels", datasets.fashion),
    "weak-digits": _weak(),
}
