"""Linear probes of posterior means: the classes that they predict, and the information that they have about these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch
from ..utils.arguments import check_number, describe
from ..utils.global_state import preserve_process_settings
from .probe_features import Features, ProbeRows, classes_of, probe_rows
from .proportion import Share


def linear_probe(
    guide: Callable[[Batch], Any],
    train: Batch,
    test: Batch,
    label: str,
    given: Sequence[str] | str | None = None,
    *,
    sites: Sequence[str] | str = "z",
    regularisation: float = 1.0,
    seed: int | None = None,
    audit: bool = True,
) -> Share:
    r"""Fit a logistic regression from posterior means to labels, and measure its accuracy on test rows.

    .. math:: P(y = c | h) \propto e^{b_c + w_c^T h}, \qquad h_n = (E_q[z | x_{n, given}] - \mu) / \sigma

    :math:`\mu` and :math:`\sigma` standardise the means over the training rows. The weights maximise the
    log-likelihood of the training rows minus :math:`\|w\|^2 / (2 C)`, by scikit-learn.

    Args:
        guide: callable of a batch.
        train, test: batches; rows that lack the label or a given modality are left out.
        label: name of a modality or a covariate with one class per row.
        given: names of the modalities that the guide sees; None for all but the label.
        sites: names of the latent sites whose means are concatenated. The mean of a site that depends on another
            site's draw is conditional on one draw of it (:func:`pyro_mm.encode`); a mean that is not known, such as a
            flow's, is estimated from 100 draws.
        regularisation: C; a larger value regularises less.
        seed: of the draws above; None uses torch's generator.
        audit: False skips the audit of the guide (:mod:`pyro_mm.scoring.audit`).

    Returns:
        Accuracy on the test rows, with its standard error.

    Raises:
        ValueError: the label is given to the guide or is unknown, a site is unknown, or no row is left.
    """
    check_number("regularisation", regularisation, above=0)
    first, second = probe_rows(guide, train, test, label, Features(given, sites, seed, audit))
    classes = classes_of(label, second.targets)
    return Share.of(torch.from_numpy(_regression(first, label, regularisation).predict(second.means) == classes))


class LabelInformation(NamedTuple):
    r"""Information that a probe of posterior means has about a label, in nats, with its standard error over rows.

    Attributes:
        value: :math:`\frac1N \sum_n i_n`.
        standard_error: due to the choice of test rows, with the model and the probe held fixed; NaN for a single row.
        entropy: H, the mean of :math:`-\log f(y_n)` over the same rows, from which ``value`` says how much is known.
        per_row: :math:`i_n = \log P(y_n | h_n) - \log f(y_n)`, float64 ``(N,)``.

    >>> found = LabelInformation(1.2, 0.01, 2.3, torch.zeros(500))
    >>> print(found)
    1.200 ± 0.010 of 2.300 nats
    """

    value: float
    standard_error: float
    entropy: float
    per_row: Tensor

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.standard_error:.3f} of {self.entropy:.3f} nats"

    def gain(self, over: LabelInformation) -> tuple[float, float]:
        r"""Return the share of the label's entropy that these means know beyond others, and its standard error.

        .. math:: \frac1{N H} \sum_n (i_n - i'_n)

        Rows are compared one by one: what both know of a row does not add to the error.

        Args:
            over: the information of another model, of the same test rows in the same order: that of a model trained
                without text, say.

        Raises:
            TypeError: ``over`` is of another type.
            ValueError: other rows.
        """
        if not isinstance(over, LabelInformation):
            raise TypeError(f"expected over to be a LabelInformation, got {describe(over)}")
        if over.per_row.shape != self.per_row.shape or abs(over.entropy - self.entropy) > 1e-6:
            raise ValueError(
                f"expected the information of the same rows: {len(self.per_row)} rows with {self.entropy:.4f} nats of "
                f"labels here, {len(over.per_row)} with {over.entropy:.4f} there"
            )
        value, error = _mean_and_error(self.per_row - over.per_row)
        return value / self.entropy, error / self.entropy


def label_information(
    guide: Callable[[Batch], Any],
    train: Batch,
    test: Batch,
    label: str,
    given: Sequence[str] | str | None = None,
    *,
    sites: Sequence[str] | str = "z",
    regularisation: float = 1.0,
    seed: int | None = None,
    audit: bool = True,
) -> LabelInformation:
    r"""Measure how many nats of a label a linear probe of posterior means knows on test rows.

    .. math:: I = \frac1N \sum_n [\log P(y_n | h_n) - \log f(y_n)]

    with the probe P of :func:`linear_probe`, and f the frequencies of the classes among its training rows. But for the
    choice of rows it is at most the mutual information of label and means plus KL(test frequencies || f), and below 0
    if the probe is worse than these frequencies. Unlike the accuracy, it says how sure the probe is.

    Args:
        guide: callable of a batch.
        train, test: batches; rows that lack the label or a given modality are left out.
        label: name of a modality or a covariate with one class per row.
        given: names of the modalities that the guide sees; None for all but the label.
        sites: names of the latent sites whose means are concatenated.
        regularisation: C of :func:`linear_probe`.
        seed: of draws, where means depend on any; None uses torch's generator.
        audit: False skips the audit of the guide (:mod:`pyro_mm.scoring.audit`).

    Returns:
        The information, with its standard error; ``found.gain(over=other)`` compares two models.

    Raises:
        ValueError: as :func:`linear_probe`; or a class of the test rows that no training row has.
    """
    check_number("regularisation", regularisation, above=0)
    first, second = probe_rows(guide, train, test, label, Features(given, sites, seed, audit))
    classes = classes_of(label, second.targets)
    regression = _regression(first, label, regularisation)
    known, counts = np.unique(classes_of(label, first.targets), return_counts=True)
    if len(unknown := np.setdiff1d(classes, known)):
        raise ValueError(f"{label!r}: no training row is of class {unknown[0]}, which a test row has")

    places = np.searchsorted(known, classes)
    log_p = regression.predict_log_proba(second.means)[np.arange(len(classes)), places]
    log_f = np.log(counts / counts.sum())[places]
    per_row = torch.from_numpy(log_p - log_f)
    return LabelInformation(*_mean_and_error(per_row), float(-log_f.mean()), per_row)


def _regression(rows: ProbeRows, label: str, regularisation: float) -> Any:
    """Fit the logistic regression. scikit-learn's C multiplies the sum of log-likelihoods over rows."""
    with preserve_process_settings():
        from sklearn.linear_model import LogisticRegression  # imported here because it takes seconds
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    regression = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=2000))
    return regression.fit(rows.means, classes_of(label, rows.targets))


def _mean_and_error(x: Tensor) -> tuple[float, float]:
    """Return the mean of independent values ``(N,)`` and its standard error, NaN for a single one."""
    error = x.std(correction=1) / len(x) ** 0.5 if len(x) > 1 else torch.tensor(torch.nan)
    return x.mean().item(), error.item()
