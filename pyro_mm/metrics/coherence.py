"""Whether what is generated is of the right class, by the judgement of a classifier.

A classifier is a callable ``(B, *event) -> logits (B, C)``, as :func:`pyro_mm.metrics.classifier` trains one. By
default it is shown the mean of each p(x_m | z), as is usual for pictures: pixels drawn around that mean are noise to a
classifier that was trained on clean ones. Means of a Categorical are probabilities, which ``lambda p: p`` and
:func:`pyro_mm.datasets.word_logits` judge.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..sampling.predictive import generate
from ..scoring.evaluation import evaluating
from ..utils.arguments import (
    check_counts,
    check_flags,
    check_function,
    check_mapping,
    check_name,
    check_names,
    check_programs,
    check_seed,
    check_tensor,
    describe,
)
from ..utils.seeding import temporary_seed
from .proportion import Share

Classifier = Callable[[Tensor], Tensor]
CHUNK = 256  # draws at once: every modality of them is decoded


@torch.no_grad()
def cross_modal_coherence(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    target: str,
    given: Sequence[str] | str,
    classifier: Classifier,
    labels: Tensor,
    *,
    num_samples: int = 1,
    mean: bool = True,
    seed: int | None = None,
    audit: bool = True,
) -> Share:
    r"""The share of draws of one modality given others that are of the row's class.

    .. math:: \frac1N \sum_n \frac1S \sum_s 1[\arg\max_c f_c(x_{ns}) = y_n], \qquad
              x_{ns} \sim p(x_t | z_{ns}), \; z_{ns} \sim q(z | x_{n, given})

    over the rows that have all of what is given; the target is not shown, and need not be present.

    Args:
        target: the modality t to generate.
        given: those to generate it from.
        classifier: f, of the target's values; it must err as little as possible on true ones.
        labels: y, ``(N,)``, the classes of the batch's rows.
        num_samples: S.
        mean: whether f is shown the mean of p(x_t | z) instead of a draw from it.
        seed: of all draws; None goes on with torch's generator.
        audit: False spares the audit of the pair (:mod:`pyro_mm.scoring.audit`), and what it would refuse.

    Returns:
        The share with its standard error over rows. Shi et al. 2019 (arXiv 1911.03393).

    Raises:
        ValueError: the target is among what is given, no row has all of that, or shapes do not fit.
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_name("target", target)
    check_function("classifier", classifier, ("values",))
    check_counts(num_samples=num_samples)
    check_flags(mean=mean)
    check_seed(seed)
    check_tensor("labels", labels)
    names = check_names("given", given, batch)
    if target in names:
        raise ValueError(f"{target!r} is both the target and given")
    if labels.shape != (batch.size,):
        raise ValueError(f"expected labels of shape ({batch.size},), got {tuple(labels.shape)}")
    masks = [batch.present[name] for name in names]
    rows = torch.stack(masks).all(0).nonzero()[:, 0] if masks else torch.arange(batch.size, device=batch.device)
    if len(rows) == 0:
        raise ValueError(f"no row has all of what is given: {', '.join(names)}")
    right = []
    shown, stacked = batch.only(*names), num_samples > 1
    with (
        evaluating(model, guide, shown, audit=audit, stacked=stacked, draws=True) as whole,
        temporary_seed(seed, whole.device),
    ):
        labels, rows = labels.to(whole.device), rows.to(whole.device)
        for part in rows.split(max(1, CHUNK // num_samples)):
            hits, known = torch.zeros(len(part), device=whole.device), whole[part]
            for draws in _parts(num_samples):
                x = _of(generate(model, guide, known, draws, mean=mean, audit=False), target)
                hits += (_classes(classifier, x, target) == labels[part]).sum(0)
            right.append(hits / num_samples)
    return Share.of(torch.cat(right))


@torch.no_grad()
def joint_coherence(
    model: Callable[[Batch], Any],
    like: Batch,
    classifiers: Mapping[str, Classifier],
    n: int = 1000,
    *,
    mean: bool = True,
    seed: int | None = None,
    audit: bool = True,
) -> Share:
    r"""The share of draws from the model's prior in which all modalities are of one class, whichever that is.

    .. math:: \frac1n \sum_i 1[\arg\max_c f_{mc}(x_{im}) \text{ is the same for all } m], \qquad
              x_{im} \sim p(x_m | z_i), \; z_i \sim p(z)

    A model that draws one class alone is coherent, and independent draws of C equally frequent classes agree in
    :math:`C^{1-M}` of the cases.

    Args:
        like: a batch that has the modalities; a model with covariates sees those of its first row.
        classifiers: modality -> f_m, two at least, with the same classes.
        n: draws.
        mean: whether f_m is shown the mean of p(x_m | z) instead of a draw from it.
        seed: of all draws; None goes on with torch's generator.
        audit: False spares the audit of the pair (:mod:`pyro_mm.scoring.audit`), and what it would refuse.

    Returns:
        The share with its standard error. Shi et al. 2019 (arXiv 1911.03393).

    Raises:
        ValueError: there are fewer than two classifiers, or shapes do not fit.
    """
    check_programs(model=model)
    check_batch(like, "like")
    check_counts(n=n)
    check_flags(mean=mean)
    check_seed(seed)
    classifiers = check_mapping("classifiers", classifiers, "functions of values")
    for name, f in classifiers.items():
        check_function(f"classifiers[{name!r}]", f, ("values",))
    if len(classifiers) < 2:
        raise ValueError(f"expected classifiers of two modalities or more, got {list(classifiers)}")

    def prior(batch: Batch) -> None:
        """The model's latents: ``generate`` wants to see them in a guide, and draws them from the model's prior."""
        with poutine.block(hide_fn=lambda site: site["type"] == "sample" and site["is_observed"]):
            model(batch)

    agreed = []
    with evaluating(model, prior, like, audit=audit) as whole, temporary_seed(seed, whole.device):
        for size in _parts(n):
            drawn = generate(model, prior, Batch.empty(size, whole), mean=mean, audit=False)
            classes = torch.stack([_classes(f, _of(drawn, name), name)[0] for name, f in classifiers.items()])
            agreed.append((classes == classes[0]).all(0))
    return Share.of(torch.cat(agreed))


def _of(drawn: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the draws of a modality. Raises a ValueError for one that the story does not observe."""
    return drawn[check_name("modality", name, drawn)]


def _parts(total: int) -> list[int]:
    """A number in parts of CHUNK at most."""
    return [min(CHUNK, total - start) for start in range(0, total, CHUNK)]


def _classes(classifier: Classifier, x: Tensor, name: str) -> Tensor:
    """The likeliest class of each of ``(S, N, *event)``: ``(S, N)``."""
    logits = classifier(x.flatten(0, 1))
    if not isinstance(logits, Tensor):
        raise TypeError(f"expected logits from the classifier of {name!r}, got {describe(logits)}")
    if logits.dim() != 2 or len(logits) != x.shape[0] * x.shape[1]:
        expected = f"({x.shape[0] * x.shape[1]}, C)"
        raise ValueError(f"expected logits {expected} from the classifier of {name!r}, got {tuple(logits.shape)}")
    return logits.argmax(-1).reshape(x.shape[:2])
