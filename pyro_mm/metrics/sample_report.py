"""Report on samples of one modality, for any pair, whether or not the modality has a density."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..distributions.sample_statistics import Kernel
from ..sampling.predictive import Generated, SampleSettings, sample_pair
from ..scoring.evaluation import evaluating
from ..scoring.structure import pair_structure
from ..utils.arguments import (
    check_counts,
    check_flags,
    check_function,
    check_name,
    check_names,
    check_programs,
    check_seed,
    check_tensor,
)
from ..utils.seeding import temporary_seed
from ..utils.text import align_columns, plus_minus, wrap_remark
from .coherence import SAMPLES_PER_PASS, Classifier, judged_classes
from .feature_rows import Features, collect_features
from .frechet import gaussian_frechet
from .kernel_distances import MOST_ROWS, POLYNOMIAL, KernelDistance, kernel_distance
from .prdc import MEASURES, PRDC, distances_of, prdc_of, precision_recall
from .proportion import Share
from .row_splits import Split, half_sample_errors, values_under_equality, whole

FRECHET = "Fréchet distance"
HALVES = 20  # random halves of the rows behind the error of the Fréchet distance, which takes D³ operations each
RELABELLINGS = 10
FEW_RIGHT = 0.9  # accuracy of a classifier on real rows, below which its verdict on samples says little
FEW_KINDS = 1e-3  # variance of fake rows, as a proportion of the real ones', below which the generator has collapsed


@dataclass(frozen=True)
class SampleQuality:
    """Comparison of samples of a modality with real rows, with standard errors.

    Attributes:
        title: the samples in words.
        features: the space of the comparison in words.
        distance: the kernel distance and its p-value.
        frechet: the squared Fréchet distance, which is biased upward, and its standard error.
        prdc: precision, recall, density and coverage.
        equal: ``"Fréchet distance"`` and measure of :class:`PRDC` -> the mean value of random relabellings of real and
            fake rows: what equal distributions have at these numbers of rows.
        coherence: proportion of samples of the right class, as judged by a classifier; None without one.
        judge_accuracy: proportion of real rows that the classifier has right, where their classes are known; else None.
        remarks: what to beware of.
        samples: the fake rows, ``(N, *event)``.
    """

    title: str
    features: str
    distance: KernelDistance
    frechet: tuple[float, float]
    prdc: PRDC
    equal: Mapping[str, float]
    coherence: Share | None
    judge_accuracy: Share | None
    remarks: tuple[str, ...]
    samples: Tensor

    def table(self) -> str:
        """Return all measures, their errors, and the values of equal distributions, one measure per line."""
        d = self.distance
        lines = [
            [f"{d.kernel} distance × 1000", plus_minus(1000 * d.value, 1000 * d.standard_error), "0.000"],
            [f"  its p-value ({d.permutations} permutations)", f"{d.p_value:.3g}", "uniform"],
            [FRECHET, plus_minus(*self.frechet), f"{self.equal[FRECHET]:.3f}"],
        ]
        for name in MEASURES:
            value = plus_minus(getattr(self.prdc, name), self.prdc.errors[name])
            lines.append([f"{name} ({self.prdc.neighbours} neighbours)", value, f"{self.equal[name]:.3f}"])
        if self.coherence is not None:
            judged = "" if self.judge_accuracy is None else f"real rows {self.judge_accuracy.value:.3f}"
            lines.append(["coherence", plus_minus(*self.coherence[:2]), judged])
        return align_columns([self.title, "value", "equal distributions"], lines)

    def __repr__(self) -> str:
        rows = f"in {self.features}; {self.distance.sizes[0]} real and {self.distance.sizes[1]} fake rows"
        return "\n".join([self.table(), rows, *(wrap_remark("! ", remark) for remark in self.remarks)])


def sample_quality(
    model: Callable[[Batch], Any],
    guide: Callable[[Batch], Any],
    batch: Batch,
    target: str,
    given: Sequence[str] | str = (),
    *,
    features: Features | None = None,
    classifier: Classifier | None = None,
    labels: Tensor | str | None = None,
    kernel: Kernel | None = None,
    neighbours: int = 5,
    permutations: int = 999,
    mean: bool = False,
    seed: int | None = None,
    audit: bool = True,
) -> SampleQuality:
    r"""Compare samples of one modality with the rows of a batch: distances, precision, recall, and coherence.

    .. math:: x_n \sim p(x_t | z_n), \qquad z_n \sim q(z | x_{n, given})

    with z from the prior if nothing is given. One sample per row is compared with the rows, by :func:`kernel_distance`,
    the Fréchet distance (:func:`frechet_distance`) and :func:`precision_recall`. It needs no density of the modality,
    and so is the report on implicit ones. Rows count that have the target and all given modalities; a sample given
    others belongs to its row, which errors and permutations respect (``paired``).

    Coherence is the proportion of samples whose class, as judged by the classifier, is that of ``labels``: of the row
    if something is given; else of the label that was generated from the same latents.

    Args:
        model, guide: callables of a batch.
        batch: N rows, best some that were not trained on.
        target: name of the modality t to generate.
        given: names of the modalities to generate it from; none for samples from the prior.
        features: maps values ``(B, *event)``, and ``lengths`` of sequences if it has such a parameter, to ``(B, D)``.
            None takes the method ``features`` of the classifier, as :func:`classifier` trains it, or without one the
            values themselves.
        classifier: maps values of the target ``(B, *event)`` to logits ``(B, C)``.
        labels: classes of the rows, integers ``(N,)``, or the name of a modality of classes; with a classifier.
        kernel: as in :func:`kernel_distance`; None for ``"polynomial"`` in features of a network, and for
            ``"gaussian"`` in the space of values, on whose units and origin the polynomial depends.
        neighbours: as in :func:`precision_recall`.
        permutations: as in :func:`kernel_distance`.
        mean: True compares the means of p(x_t | z), False samples from it.
        seed: of all draws; None uses torch's generator.
        audit: False skips the audit of the pair (:mod:`pyro_mm.scoring.audit`).

    Returns:
        All measures with their errors, and the values that equal distributions have.

    Raises:
        ValueError: too few or too many rows, features of a wrong shape or that are not finite, classes or tokens
            without features, labels without a classifier, or a latent that all rows share.

    Example:
        >>> import pyro_mm as mm
        >>> model = mm.models.LinearGaussian({"x": torch.ones(3, 2), "y": torch.ones(2, 2)})
        >>> found = sample_quality(model, mm.Guide(z=model.posterior), model.sample(300), "x", seed=0)
        >>> found.distance.p_value > 0.05, abs(found.prdc.density - found.equal["density"]) < 0.3
        (True, True)

    References:
        Bińkowski et al. 2018 (arXiv:1801.01401); Naeem et al. 2020 (arXiv:2002.09797).
    """
    check_programs(model=model, guide=guide)
    check_batch(batch)
    check_name("target", target, batch)
    names = check_names("given", given, batch)
    check_counts(neighbours=neighbours, permutations=permutations)
    check_flags(mean=mean)
    check_seed(seed)
    if target in names:
        raise ValueError(f"{target!r} is both the target and given")
    places = _rows_that_count(batch, (target, *names))
    judge = _Judge.of(classifier, labels, batch[places], target, names, places)

    with temporary_seed(seed, batch.device):
        samples = _sample(model, guide, judge.rows, names, judge.generated, mean=mean, audit=audit)
        space = _FeatureSpace(features, classifier, judge.rows, target)
        least = 2 * neighbours + 2  # as of precision_recall
        x = space.of(judge.rows[target], judge.rows.lengths.get(target), "real", least)
        y = space.of(samples[target][0], _lengths(samples, target), "fake", least, x.shape[1])

        paired = bool(names)
        kernel = space.kernel if kernel is None else kernel
        distance = kernel_distance(x, y, kernel=kernel, paired=paired, permutations=permutations)
        prdc = precision_recall(x, y, neighbours=neighbours, paired=paired)
        measures = _Measures(x, y, neighbours)
        errors = half_sample_errors(measures.frechet, len(x), len(y), paired, HALVES)
        equal = values_under_equality(measures.all, len(x), len(y), paired, RELABELLINGS)
        coherence, accuracy = judge.verdict(samples)
        frechet = measures.frechet(whole(len(x), len(y)))[FRECHET], errors[FRECHET]
    return SampleQuality(
        title=f"{'mean' if mean else 'sample'}s of {target!r} given {', '.join(map(repr, names)) or 'nothing'}",
        features=space.described,
        distance=distance,
        frechet=frechet,
        prdc=prdc,
        equal=equal,
        coherence=coherence,
        judge_accuracy=accuracy,
        remarks=_remarks(x, y, accuracy),
        samples=samples[target][0],
    )


# -- samples ----------------------------------------------------------------------------------------------------------


def _rows_that_count(batch: Batch, names: Sequence[str]) -> Tensor:
    """Return the places of rows that have all modalities. Raises a ValueError without any."""
    places = torch.stack([batch.present[name] for name in names]).all(0).nonzero()[:, 0]
    if len(places) == 0:
        raise ValueError(f"no row has all of {', '.join(map(repr, names))}")
    return places


@torch.no_grad()
def _sample(
    model: Any, guide: Any, rows: Batch, names: tuple[str, ...], wanted: tuple[str, ...], *, mean: bool, audit: bool
) -> Generated:
    """Return one sample of some modalities per row, ``(1, N, *event)``, on the device of the rows.

    Args:
        model, guide: callables of a batch.
        rows: N rows.
        names: the modalities to generate from.
        wanted: the modalities to return, the target first.
        mean: True for means of the target.
        audit: True to audit the pair.

    Raises:
        ValueError: the story does not observe a modality, or the pair has a latent that all rows share.
    """
    visible = rows.only(*names)
    settings = SampleSettings(1, mean=frozenset(wanted[:1]) if mean else False)
    parts = []
    with evaluating(model, guide, visible, audit=audit, draws=True) as moved:
        if shared := sorted(pair_structure(model, guide, moved).global_latents):
            raise ValueError(
                f"all rows share the latent {shared[0]!r}, so that samples are no independent rows: hold it fixed in a "
                "story of its own, or compare samples of your own by kernel_distance and precision_recall"
            )
        for places in torch.arange(rows.size, device=moved.device).split(SAMPLES_PER_PASS):
            found = sample_pair(model, guide, moved[places], settings, seed=None, audit=False)
            for name in wanted:
                check_name("modality", name, found.modalities)
            parts.append(found)
    values = {name: torch.cat([part.modalities[name] for part in parts], 1).to(rows.device) for name in wanted}
    lengths = {
        name: torch.cat([part.lengths[name] for part in parts], 1).to(rows.device)
        for name in wanted
        if name in parts[0].lengths
    }
    return Generated(values, lengths)


def _lengths(samples: Generated, target: str) -> Tensor | None:
    return samples.lengths[target][0] if target in samples.lengths else None


# -- features ---------------------------------------------------------------------------------------------------------


class _FeatureSpace:
    """Features of the target, and the space in words.

    Args:
        features: function of values, or None for those of the classifier or for the values.
        classifier: a classifier, or None.
        rows: real rows.
        target: the modality.

    Attributes:
        described: the space in words.
        kernel: the usual kernel in it.

    Raises:
        ValueError: values that have no distances without features.
    """

    def __init__(self, features: Any, classifier: Any, rows: Batch, target: str):
        self.described = "the features of the caller's network"
        self.kernel = POLYNOMIAL
        if features is None and callable(getattr(classifier, "features", None)):
            features = classifier.features
            self.described = "the last hidden layer of the classifier"
        if features is None:
            self.described = "the space of values"
            self.kernel = "gaussian"
            if not rows[target].is_floating_point() and rows[target].dtype != torch.uint8:
                raise ValueError(
                    f"{target!r} has whole numbers, such as classes or tokens, whose differences mean nothing: pass "
                    "features, a network or function from values to vectors"
                )
            if target in rows.lengths:
                raise ValueError(
                    f"{target!r} has sequences of unlike lengths: pass features, a function of values and lengths"
                )
        self._features = features

    def of(self, values: Tensor, lengths: Tensor | None, what: str, least: int, columns: int | None = None) -> Tensor:
        """Return the features of rows, ``(N, D)``.

        Args:
            values: ``(N, *event)``.
            lengths: of sequences, ``(N,)``.
            what: the rows in a word.
            least: the smallest number of rows.
            columns: the number of features that there should be.
        """
        return collect_features(values, self._features, what, least, MOST_ROWS, columns, lengths)


class _Measures:
    """Measures of any division of the rows into real and fake.

    Args:
        x, y: features of real and of fake rows.
        neighbours: k.
    """

    def __init__(self, x: Tensor, y: Tensor, neighbours: int):
        self._rows = torch.cat([x, y])
        self._distances = distances_of(x, y)
        self._neighbours = neighbours

    def frechet(self, split: Split) -> dict[str, float]:
        """Return the Fréchet distance."""
        real, fake = (self._rows[places] for places in split)
        return {FRECHET: gaussian_frechet(real.mean(0), _covariance(real), fake.mean(0), _covariance(fake))}

    def all(self, split: Split) -> dict[str, float]:
        """Return the Fréchet distance and the measures of nearest neighbours."""
        return self.frechet(split) | prdc_of(self._distances, split, self._neighbours)


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


# -- classes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Judge:
    """Classifier of the target, and the classes to compare its verdicts with.

    Args:
        classifier: function of values; None without one.
        rows: the rows that count.
        target: the modality that is classified.
        classes: of the rows, ``(N,)``; None if none are known.
        label: the modality whose generated values are the classes of samples; None for those of the rows.
    """

    classifier: Classifier | None
    rows: Batch
    target: str
    classes: Tensor | None
    label: str | None

    @property
    def generated(self) -> tuple[str, ...]:
        """The modalities that are generated, the target first."""
        return (self.target,) if self.label is None else (self.target, self.label)

    @staticmethod
    def of(classifier: Any, labels: Any, rows: Batch, target: str, names: tuple[str, ...], places: Tensor) -> _Judge:
        """Build a judge from the arguments of :func:`sample_quality`.

        Raises:
            TypeError, ValueError: labels without a classifier, labels that are no classes, or classes of rows for
                samples from the prior.
        """
        if classifier is not None:
            check_function("classifier", classifier, ("values",))
        if labels is None:
            return _Judge(classifier, rows, target, None, None)
        if classifier is None:
            raise ValueError("labels: to be compared with the verdicts of a classifier; pass one, or leave them out")
        if isinstance(labels, str):
            if check_name("labels", labels, rows) == target:
                raise ValueError(f"labels: {target!r} is the target itself")
            rows = rows[_rows_that_count(rows, (labels,))] if names else rows
            known = rows[labels] if bool(rows.present[labels].all()) else None
            _check_classes(rows[labels], rows.size)
            return _Judge(classifier, rows, target, known, None if names else labels)
        if not names:
            raise ValueError(
                "labels: a sample from the prior belongs to no row. Give the name of a modality of classes, which is "
                "generated with it, or name the modalities that samples are given"
            )
        classes = check_tensor("labels", labels)
        if len(classes.shape) != 1 or len(classes) <= int(places.max()):
            raise ValueError(f"expected labels (N,) of all rows of the batch, got {tuple(classes.shape)}")
        return _Judge(classifier, rows, target, _check_classes(classes[places.to(classes.device)], rows.size), None)

    def verdict(self, samples: Generated) -> tuple[Share | None, Share | None]:
        """Return the coherence of samples, and the accuracy on real rows; None where no classes are known."""
        if self.classifier is None or (self.classes is None and self.label is None):
            return None, None
        judged = judged_classes(self.classifier, samples, self.target)[0]
        wanted = self.classes if self.label is None else samples[self.label][0]
        coherence = None if wanted is None else Share.of(judged == wanted.to(judged.device))
        if self.classes is None:
            return coherence, None
        lengths = {self.target: self.rows.lengths[self.target][None]} if self.target in self.rows.lengths else {}
        real = Generated({self.target: self.rows[self.target][None]}, lengths)
        right = judged_classes(self.classifier, real, self.target)[0] == self.classes.to(judged.device)
        return coherence, Share.of(right)


def _check_classes(classes: Tensor, rows: int) -> Tensor:
    """Return classes ``(N,)``. Raises a TypeError or a ValueError for other values."""
    if classes.shape != (rows,):
        raise ValueError(f"expected labels to be one class per row, ({rows},), got shape {tuple(classes.shape)}")
    if classes.is_floating_point():
        raise TypeError(f"expected labels to be classes, integers, got {classes.dtype}")
    return classes


def _remarks(x: Tensor, y: Tensor, accuracy: Share | None) -> tuple[str, ...]:
    """Return what to beware of."""
    found = []
    if min(len(x), len(y)) <= x.shape[1]:
        found.append(
            f"{x.shape[1]} features of {min(len(x), len(y))} rows: covariances are singular, and the Fréchet distance "
            "is far above its value for many rows"
        )
    if float(y.var(0).sum()) < FEW_KINDS * float(x.var(0).sum()):
        found.append("samples hardly differ from each other: the generator has collapsed")
    if accuracy is not None and accuracy.value < FEW_RIGHT:
        found.append(f"the classifier has {accuracy.value:.1%} of the real rows right: it judges samples no better")
    return tuple(found)
