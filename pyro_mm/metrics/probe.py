"""What can be read off a latent by a straight line."""

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

CHUNK = 1024  # rows encoded at once
DRAWS = 100  # of a posterior whose mean is not known, such as a flow


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
    r"""The accuracy on test rows of a logistic regression from posterior means to labels.

    .. math:: P(y = c | h) \propto e^{b_c + w_c^T h}, \qquad h_n = (E_q[z | x_{n, given}] - \mu) / \sigma

    with :math:`\mu` and :math:`\sigma` those of h over the training rows, and w and b at the maximum of the training
    rows' log-likelihood less :math:`\|w\|^2 / (2 C)` (scikit-learn's).

    Args:
        train, test: rows; those that lack the label or any of what is given are left out.
        label: a modality or a covariate: one class a row.
        given: the modalities that the guide sees; None for all but the label.
        sites: the latent sites whose means are taken, side by side; a mean that is only known given another site's
            draw (:func:`pyro_mm.encode`) is of one draw, and one that is not known, a flow's, the mean of 100.
        regularisation: C; larger is weaker.
        seed: of such draws; None goes on with torch's generator.
        audit: False spares the audit of the guide (:mod:`pyro_mm.scoring.audit`), and what it would refuse.

    Returns:
        The share of right test rows with its standard error, over test rows.

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
        from sklearn.linear_model import LogisticRegression  # here, because it takes seconds
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    if label in names:
        raise ValueError(f"the label {label!r} is what is to be told: it cannot be given")
    with evaluating(None, guide, train, audit=False) as rows, temporary_seed(seed, rows.device):
        if audit:
            audited(None, guide, rows.only(*names), draws=True)
        both = rows, test.to(rows.device)
        (h, y), (h_test, y_test) = (_features(guide, batch, label, names, sites) for batch in both)
    # C weighs the sum over rows of the log-likelihood there, which is what the formula says
    fitted = make_pipeline(StandardScaler(), LogisticRegression(C=regularisation, max_iter=2000)).fit(h, y)
    return Share.of(torch.from_numpy(fitted.predict(h_test) == y_test))


def _features(
    guide: Callable[[Batch], Any], batch: Batch, label: str, given: Sequence[str], sites: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means ``(n, D)`` and labels ``(n,)`` of the rows that have all that it takes."""
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
        raise ValueError(f"expected one class a row and at least one row with all of {[*given, label]}")
    if labels.is_floating_point():
        if not torch.equal(labels.long().to(labels.dtype), labels):
            raise ValueError(f"expected classes of {label!r}, got numbers that are not whole: it is no class label")
        labels = labels.long()
    parts = [_means(guide, batch.block(part).only(*given), sites) for part in rows.split(CHUNK)]
    return torch.cat(parts).numpy(), labels[rows].cpu().numpy()


def _means(guide: Callable[[Batch], Any], batch: Batch, sites: Sequence[str]) -> Tensor:
    found = encode(guide, batch, audit=False)
    if unknown := [site for site in sites if site not in found]:
        raise ValueError(f"the guide has no site {', '.join(unknown)}: it has {', '.join(found)}")
    if plated := [site for site in sites if found[site].batch_shape != (batch.size,)]:
        raise ValueError(
            f"expected one draw a row of {plated[0]}, got batch shape {tuple(found[plated[0]].batch_shape)}"
        )
    return torch.cat([_mean(found[site]).reshape(batch.size, -1) for site in sites], -1).double().cpu()


def _mean(d: Any) -> Tensor:
    try:
        return d.mean
    except NotImplementedError:
        return d.sample((DRAWS,)).mean(0)
