"""Linear probes of posterior means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..sampling.encode import encode
from ..scoring.audit.audit import audit as audited
from ..scoring.evaluation import evaluating
from ..utils.arguments import check_flag, check_name, check_names, check_number, check_programs, check_seed
from ..utils.global_state import preserve_process_settings
from ..utils.seeding import temporary_seed
from .proportion import Share

ROWS_PER_PASS = 1024  # rows encoded at once
NUM_DRAWS = 100  # draws that estimate the mean of a posterior that has no known mean, such as a flow


@torch.no_grad()
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
    check_programs(guide=guide)
    check_batch(train, "train")
    check_batch(test, "test")
    check_name("label", label, [*train.covariates, *train.names], "modality or covariate")
    check_number("regularisation", regularisation, above=0)
    check_flag("audit", audit)
    check_seed(seed)
    sites = check_names("sites", sites, least=1, what="latent site")
    names = [n for n in train.names if n != label] if given is None else check_names("given", given, train)
    with preserve_process_settings():
        from sklearn.linear_model import LogisticRegression  # imported here because it takes seconds
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    if label in names:
        raise ValueError(f"the label {label!r} is what the probe predicts: it cannot be given to the guide")

    with evaluating(None, guide, train, audit=False) as rows, temporary_seed(seed, rows.device):
        if audit:
            audited(None, guide, rows.only(*names), draws=True)
        means, labels = _features(guide, rows, label, names, sites)
        test_means, test_labels = _features(guide, test.to(rows.device), label, names, sites)

    # scikit-learn's C multiplies the sum of log-likelihoods over rows, as in the formula
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=2000))
    regression.fit(means, labels)
    return Share.of(torch.from_numpy(regression.predict(test_means) == test_labels))


def _features(
    guide: Callable[[Batch], Any], batch: Batch, label: str, given: Sequence[str], sites: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Return posterior means ``(n, D)`` and labels ``(n,)`` of rows with the label and all given modalities."""
    if label not in batch.covariates and label not in batch:
        raise ValueError(f"unknown label {label!r}: expected one of {[*batch.covariates, *batch.names]}")
    masks = [batch.present[name] for name in given]
    if label in batch.covariates:
        labels = batch.covariates[label]
    else:
        labels = batch[label]
        masks.append(batch.present[label])
    rows = torch.arange(batch.size, device=batch.device)
    rows = rows[torch.stack(masks).all(0)] if masks else rows
    if labels.dim() != 1 or len(rows) == 0:
        raise ValueError(f"expected one class per row and at least one row with all of {[*given, label]}")
    if labels.is_floating_point():
        if not torch.equal(labels.long().to(labels.dtype), labels):
            raise ValueError(f"expected classes of {label!r}, got numbers that are not whole")
        labels = labels.long()
    parts = [_means(guide, batch.block(part).only(*given), sites) for part in rows.split(ROWS_PER_PASS)]
    return torch.cat(parts).numpy(), labels[rows].cpu().numpy()


def _means(guide: Callable[[Batch], Any], batch: Batch, sites: Sequence[str]) -> Tensor:
    """Return the concatenated posterior means of latent sites, ``(N, D)`` in float64 on the CPU."""
    found = encode(guide, batch, audit=False)
    if unknown := [site for site in sites if site not in found]:
        raise ValueError(f"the guide has no site {', '.join(unknown)}: it has {', '.join(found)}")
    if plated := [site for site in sites if found[site].batch_shape != (batch.size,)]:
        raise ValueError(
            f"expected one draw per row of {plated[0]}, got batch shape {tuple(found[plated[0]].batch_shape)}"
        )
    return torch.cat([_mean(found[site]).reshape(batch.size, -1) for site in sites], -1).double().cpu()


def _mean(d: Any) -> Tensor:
    """Return the mean of a distribution, estimated from draws where it is not known."""
    try:
        return d.mean
    except NotImplementedError:
        return d.sample((NUM_DRAWS,)).mean(0)
