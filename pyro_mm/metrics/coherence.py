"""Coherence: agreement of the classes of generated modalities, as judged by classifiers.

A classifier is a callable from values ``(B, *event)`` to logits ``(B, C)``, such as :func:`pyro_mm.metrics.classifier`
trains. With a parameter ``lengths=None`` it gets the lengths of generated sequences, ``(B,)``. By default it judges the
mean of p(x_m | z), as is usual for images: pixels sampled around that mean are noise to a classifier trained on clean
images. The mean of a Categorical is its vector of probabilities, which ``lambda p: p`` or
:func:`pyro_mm.datasets.word_logits` turn into logits. Strings of tokens have no mean: judge them with ``mean=False``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..sampling.predictive import Generated, SampleSettings, generate, sample_pair
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
from ..utils.network_keywords import call_network, keywords_of
from ..utils.seeding import temporary_seed
from .proportion import Share

Classifier = Callable[[Tensor], Tensor]
SAMPLES_PER_PASS = 256  # bounds the memory: a pass decodes every modality


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
    r"""Compute the proportion of samples of one modality, given others, that are of the row's class.

    .. math:: \frac1N \sum_n \frac1S \sum_s 1[\arg\max_c f_c(x_{ns}) = y_n], \qquad
              x_{ns} \sim p(x_t | z_{ns}), \; z_{ns} \sim q(z | x_{n, given})

    The mean is over rows that have all given modalities. The target is hidden from the guide, and may be missing.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        target: name of the modality t to generate.
        given: names of the modalities to generate it from.
        classifier: f, from values of the target ``(B, *event)`` to logits ``(B, C)``. Its errors on real values
            lower the coherence.
        labels: true classes y, integers ``(N,)``.
        num_samples: S, samples per row.
        mean: True classifies the mean of p(x_t | z), False a sample from it.
        seed: of all draws; None uses torch's generator.
        audit: False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`).

    Returns:
        Proportion with its standard error over rows.

    Raises:
        ValueError: the target is among the given modalities, no row has all of these, or shapes do not fit.

    References:
        Shi et al. 2019 (arXiv:1911.03393).
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
        raise ValueError(f"no row has all given modalities: {', '.join(names)}")

    correct = []
    visible = batch.only(*names)
    with (
        evaluating(model, guide, visible, audit=audit, stacked=num_samples > 1, draws=True) as whole,
        temporary_seed(seed, whole.device),
    ):
        labels = labels.to(whole.device)
        for part in rows.to(whole.device).split(max(1, SAMPLES_PER_PASS // num_samples)):
            hits = torch.zeros(len(part), device=whole.device)
            for size in _pass_sizes(num_samples):
                settings = SampleSettings(size, mean=frozenset([target]) if mean else False)
                sampled = sample_pair(model, guide, whole[part], settings, seed=None, audit=False)
                samples = Generated(sampled.modalities, sampled.lengths)
                classes = judged_classes(classifier, samples, target)
                hits += (classes == labels[part]).sum(0)
            correct.append(hits / num_samples)
    return Share.of(torch.cat(correct))


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
    r"""Compute the proportion of samples from the prior whose modalities are all of one class.

    .. math:: \frac1n \sum_i 1[\arg\max_c f_{mc}(x_{im}) \text{ is the same for all } m], \qquad
              x_{im} \sim p(x_m | z_i), \; z_i \sim p(z)

    A model that only ever generates one class is coherent too. M modalities whose C equally frequent classes are
    independent agree with probability :math:`C^{1-M}`.

    Args:
        model: callable of a batch.
        like: batch with the modalities of the model; a model with covariates sees those of its first row.
        classifiers: modality name -> f_m, for at least two modalities, with the same classes.
        n: number of samples.
        mean: True classifies the mean of p(x_m | z), False a sample from it.
        seed: of all draws; None uses torch's generator.
        audit: False skips the audit of the model (:mod:`pyro_mm.scoring.audit`).

    Returns:
        Proportion with its standard error.

    Raises:
        ValueError: fewer than two classifiers, or shapes that do not fit.

    References:
        Shi et al. 2019 (arXiv:1911.03393).
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
        """Run the model without its observed sites: the guide that ``generate`` needs."""
        with poutine.block(hide_fn=lambda site: site["type"] == "sample" and site["is_observed"]):
            model(batch)

    agreement = []
    with evaluating(model, prior, like, audit=audit) as whole, temporary_seed(seed, whole.device):
        for size in _pass_sizes(n):
            samples = generate(model, prior, Batch.empty(size, whole), mean=mean, audit=False)
            classes = torch.stack([judged_classes(f, samples, name)[0] for name, f in classifiers.items()])
            agreement.append((classes == classes[0]).all(0))
    return Share.of(torch.cat(agreement))


def _pass_sizes(total: int) -> list[int]:
    """Split a number of samples into passes of at most SAMPLES_PER_PASS."""
    return [min(SAMPLES_PER_PASS, total - start) for start in range(0, total, SAMPLES_PER_PASS)]


def judged_classes(classifier: Classifier, samples: Generated, name: str) -> Tensor:
    """Classify samples ``(S, N, *event)`` of a modality: return the likeliest class of each, ``(S, N)``.

    A classifier with a parameter ``lengths`` gets those of a sequence, ``(S * N,)``.

    Raises:
        ValueError: the story does not observe the modality, or logits of another shape.
        TypeError: no logits.
    """
    x = samples[check_name("modality", name, samples)]
    asks = any(keyword.name == "lengths" for keyword in keywords_of(classifier))
    lengths = {"lengths": samples.lengths[name].flatten(0, 1)} if asks and name in samples.lengths else {}
    logits = call_network(classifier, (x.flatten(0, 1),), lengths)
    if not isinstance(logits, Tensor):
        raise TypeError(f"expected logits from the classifier of {name!r}, got {describe(logits)}")
    if logits.dim() != 2 or len(logits) != x.shape[0] * x.shape[1]:
        expected = f"({x.shape[0] * x.shape[1]}, C)"
        raise ValueError(f"expected logits {expected} from the classifier of {name!r}, got {tuple(logits.shape)}")
    return logits.argmax(-1).reshape(x.shape[:2])
