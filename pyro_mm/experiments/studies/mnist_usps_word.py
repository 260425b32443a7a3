"""Hirt et al. 2024, objectives and posteriors on a digit's two pictures and its name, by likelihood and coherence."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from ... import conditionals, datasets, metrics
from ...batch.batch import Batch
from ...datasets.spelling import LENGTH, LETTERS, NAMES
from ...evidence.evidence import Evidence
from ...evidence.likelihood import log_marginal
from ...models import SharedLatent
from ...nn import MLP
from ...posteriors.guide import Guide
from ...recipes.networks import Hidden, Recipe, standard_prior
from .set_posteriors import aggregated, objective, rectifier
from .study import Measured, Number, Sample, Study

PICTURES, WORD = ("mnist", "usps"), "word"
LATENT, HIDDEN, FEATURES = 20, (256, 256), 128
ROWS, PARTICLES, DRAWS, JOINT = 1000, 500, 5, 1000  # test rows; K; draws for every row; draws of the prior
GIVEN: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "mnist": (("usps",), ("word",), ("usps", "word")),
    "usps": (("mnist",), ("word",), ("mnist", "word")),
    "word": (("mnist",), ("usps",), ("mnist", "usps")),
}
"""What every modality is generated from."""


@dataclass(frozen=True)
class Judges:
    """Modality -> its classifier."""

    each: Mapping[str, Callable[[Tensor], Tensor]]

    def to(self, device: torch.device) -> Judges:
        for judge in self.each.values():
            if isinstance(judge, nn.Module):
                judge.to(device)
        return self


@lru_cache(maxsize=2)
def judges(directory: str | None = None) -> Judges:
    """Trained on the grey training pictures of each set, whichever are paired; a word is judged letter for letter.

    Grey, because the mean pictures that they are shown are.
    """
    (train, test), (pairs, others) = datasets.mnist(directory, binarize=None), datasets.mnist_usps_word(directory)
    label, other = pairs.covariates["label"], others.covariates["label"]
    mnist, _ = metrics.classifier(train["image"], train["label"], test["image"], test["label"], epochs=2)
    usps, _ = metrics.classifier(pairs["usps"], label, others["usps"], other, epochs=20)
    return Judges({"mnist": mnist, "usps": usps, WORD: datasets.word_logits})


def drawn(seed: int, directory: str | None = None) -> Sample:
    """The pairs of a seed, and the judges, which are the same for all seeds.

    60,000 training pairs have every picture of MNIST once, and those of USPS about eight times, each time with another
    one. As many steps on 7,291 pairs, in which none comes twice, made the bound of test rows 4 nats lower. In the 1,000
    test pairs no picture comes twice. The ten classes are as frequent as in MNIST, and in the test pairs as in USPS.

    A pixel of either picture is 1 where its grey level is above one half, else 0, so that its likelihood is a
    probability: a density of the grey ones, of which most are exactly 0, could be made as large as one likes.
    """
    train, _ = datasets.mnist_usps_word(directory, repeat=True, seed=seed)
    _, test = datasets.mnist_usps_word(directory, seed=seed)
    return Sample(binary(train), binary(test[:ROWS]), judges(directory))


def binary(rows: Batch) -> Batch:
    """The rows with pictures of 0 and 1: 1 above one half."""
    return rows.replaced({name: (rows[name] > 0.5).float() for name in PICTURES})


def spelled(inputs: int, hidden: Hidden, length: int = LENGTH, letters: int = LETTERS) -> nn.Module:
    r"""p(word | z), a Categorical for every place: :math:`\prod_{l=1}^{L} \pi_{l, x_l}(z)`, words ``(.., L)``.

    The end mark and the padding after it are a letter like others (0), so that all ``L`` places count, whatever the
    word's length, and the probabilities of all strings of L letters sum to 1.
    """
    net = nn.Sequential(MLP(inputs, length * letters, hidden, rectifier), nn.Unflatten(-1, (length, letters)))
    return conditionals.Categorical(net, (length,))


def reader(out: int, hidden: Hidden, length: int = LENGTH, letters: int = LETTERS) -> nn.Module:
    """From words ``(.., L)`` to ``(.., out)``: a perceptron of letters as one-hot vectors, the padding's included."""
    letter = nn.Embedding.from_pretrained(torch.eye(letters), freeze=True)
    return nn.Sequential(letter, MLP(length * letters, out, hidden, rectifier))


class Bounded(nn.Module):
    r"""What a network gives for a Normal, with its scale bounded: :math:`(\mu, r) \to (\mu, c - \log(1 + e^{c - r}))`.

    At c = 3 a scale is 3.6 at most, so that in a product an expert may say next to nothing (0.08 of the prior's
    precision) but not nothing at all. Without a bound the pictures' experts of a product widen without end while the
    decoders do not use z yet, to scales of 20 to 80 after 250 steps. Their gradient is gone then: after 1,400 steps
    nothing could be told from a picture of MNIST.
    """

    def __init__(self, net: nn.Module, bound: float = 3.0):
        super().__init__()
        self.net, self.bound = net, bound

    def forward(self, x: Tensor) -> Tensor:
        loc, raw = self.net(x).chunk(2, -1)
        return torch.cat([loc, self.bound - nn.functional.softplus(self.bound - raw)], -1)


def recipe(
    batch: Batch, posterior: str, bound: str, latent: int = LATENT, hidden: Hidden = HIDDEN, size: int = FEATURES
) -> Recipe:
    """One latent behind both pictures and the word, none of which is weighed; networks alike in all members.

    Args:
        posterior, bound: of :func:`~pyro_mm.recipes.invariant.aggregated` and
            :func:`~pyro_mm.recipes.invariant.objective`. Experts have bounded scales.
        latent, hidden, size: D; the hidden layers of encoders and decoders; the size of a set's features.
    """

    def networks(name: str, out: int) -> nn.Module:
        return reader(out, hidden) if name == WORD else MLP(batch[name][0].numel(), out, hidden, rectifier)

    def decoder(name: str) -> nn.Module:
        if name == WORD:
            return spelled(latent, hidden)
        event = batch[name].shape[1:]
        return conditionals.Bernoulli(MLP(latent, event.numel(), hidden, rectifier), event)

    def experts(name: str, out: int) -> nn.Module:
        return Bounded(networks(name, out))

    q = aggregated(posterior, batch.names, experts if posterior in ("PoE", "MoE") else networks, latent, size)
    model = SharedLatent(standard_prior(latent), {name: decoder(name) for name in batch})
    return Recipe(model, Guide(z=q), objective(bound))


def measure(run: Recipe, sample: Sample, seed: int) -> Measured:
    """Log-likelihoods in nats a row under q(z | what is scored), K = 500, the share of rows that k-hat says not to
    trust for that of all; and how often what is generated is judged to be of the row's class, or of one class."""
    (model, guide, _), rows = run, sample.test
    labels = rows.covariates["label"]

    def evidence(*names: str, at: int = 0) -> Evidence:
        return log_marginal(model, guide, rows.only(*names), num_particles=PARTICLES, seed=3 * seed + at)

    every = evidence(*rows.names)
    alone = {name: evidence(name, at=1) for name in rows.names}
    found: dict[str, Number] = {"log p(all)": every.mean()}
    found |= {f"log p({name})": each.mean() for name, each in alone.items()}
    found["log p(usps | mnist)"] = (evidence(*PICTURES, at=2) - alone["mnist"]).mean()
    found["k-hat > 0.7"] = every.untrusted()
    for target, sets in GIVEN.items():
        for given in sets:
            right = metrics.cross_modal_coherence(
                model, guide, rows, target, given, sample.truth.each[target], labels, num_samples=DRAWS, seed=seed
            )
            found[_column(target, given)] = right[:2]
    found["of one class"] = metrics.joint_coherence(model, rows, sample.truth.each, JOINT, seed=seed)[:2]
    return found


def _column(target: str, given: tuple[str, ...]) -> str:
    return f"{target} from {', '.join(given)}"


def of_true_rows(sample: Sample, seed: int) -> Measured:
    """What the judges say of true test rows, 0 or 1 as the models see them; and log p(word) by the training rows'
    shares of the ten words."""
    rows, judged = sample.test, sample.truth.each
    labels = rows.covariates["label"]
    right = {name: judged[name](rows[name]).argmax(-1) for name in rows.names}
    found: dict[str, Number] = {"log p(word)": _shares(sample.train).log()[labels].mean().item()}
    for target, sets in GIVEN.items():
        found |= {_column(target, given): metrics.Share.of(right[target] == labels)[:2] for given in sets}
    agreed = torch.stack([right[name] == right[WORD] for name in PICTURES]).all(0)
    return found | {"of one class": metrics.Share.of(agreed)[:2]}


def _shares(rows: Batch) -> Tensor:
    counts = rows.covariates["label"].bincount(minlength=len(NAMES)).double()
    return counts / counts.sum()


POSTERIORS = {
    "masked": ("SumPooling", "SelfAttention", "SelfAttention, no last norm", "SumPooling mixture", "PoE", "MoE"),
    "mixture bound": ("SumPooling", "PoE", "MoE"),
}

_SHORT = Study(
    title="MNIST, USPS and the digit's name: objectives and posteriors",
    groups={"three modalities": drawn},
    members={
        f"{bound}, {posterior}": partial(recipe, posterior=posterior, bound=bound)
        for bound, kinds in POSTERIORS.items()
        for posterior in kinds
    },
    measure=measure,
    epochs=6,
    batch_size=128,
    optimizer=lambda run, parameters: torch.optim.Adam(parameters, 2e-3, fused=True),
    seeds=3,
    compile=True,
    known={"true rows": of_true_rows},
)
MNIST = replace(_SHORT, full=replace(_SHORT, epochs=30))
"""Not as published, which is with SVHN and other likelihoods: no figure in print is to be compared."""
