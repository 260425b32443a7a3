"""Posterior means of the rows that have a target: the inputs and outputs of probes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch, check_batch
from ..sampling.encode import encode
from ..scoring.audit.audit import audit as audited
from ..scoring.evaluation import evaluating
from ..utils.arguments import check_flag, check_name, check_names, check_programs, check_seed
from ..utils.seeding import temporary_seed

ROWS_PER_PASS = 1024  # rows encoded at once
NUM_DRAWS = 100  # draws that estimate the mean of a posterior that has no known mean, such as a flow


class ProbeRows(NamedTuple):
    """Rows of a probe.

    Attributes:
        means: posterior means, float64 ``(n, D)``.
        targets: values of the target, ``(n, ..)``, on the CPU.
    """

    means: np.ndarray
    targets: Tensor


class Features(NamedTuple):
    """The choice of what a probe sees.

    Attributes:
        given: modalities that the guide sees; None for all but the target.
        sites: latent sites whose means are concatenated.
        seed: of draws, where means depend on any; None uses torch's generator.
        audit: False skips the audit of the guide.
    """

    given: Sequence[str] | str | None
    sites: Sequence[str] | str
    seed: int | None
    audit: bool


@torch.no_grad()
def probe_rows(
    guide: Callable[[Batch], Any], train: Batch, test: Batch, target: str, features: Features
) -> tuple[ProbeRows, ProbeRows]:
    """Return the training and test rows of a probe: those that have the target and all given modalities.

    Args:
        guide: callable of a batch.
        train, test: batches.
        target: name of a modality or a covariate.
        features: what the probe sees.

    Raises:
        TypeError, ValueError: an argument of another kind; the target is given to the guide or unknown, a site is
            unknown, or no row is left.
    """
    check_programs(guide=guide)
    check_batch(train, "train")
    check_batch(test, "test")
    check_name("label", target, [*train.covariates, *train.names], "modality or covariate")
    check_flag("audit", features.audit)
    check_seed(features.seed)
    sites = check_names("sites", features.sites, least=1, what="latent site")
    given = features.given
    names = [n for n in train.names if n != target] if given is None else check_names("given", given, train)
    if target in names:
        raise ValueError(f"the label {target!r} is what the probe predicts: it cannot be given to the guide")

    with evaluating(None, guide, train, audit=False) as rows, temporary_seed(features.seed, rows.device):
        if features.audit:
            audited(None, guide, rows.only(*names), draws=True)
        first, second = (_rows(guide, part, target, names, sites) for part in (rows, test.to(rows.device)))
    return first, second


def classes_of(label: str, targets: Tensor) -> np.ndarray:
    """Return targets as classes, int64 ``(n,)``.

    Raises:
        ValueError: not one whole number per row.
    """
    if targets.dim() != 1:
        raise ValueError(f"expected one class per row of {label!r}, got shape {tuple(targets.shape)}")
    if targets.is_floating_point() and not torch.equal(targets.long().to(targets.dtype), targets):
        raise ValueError(f"expected classes of {label!r}, got numbers that are not whole")
    return targets.long().numpy()


def _rows(
    guide: Callable[[Batch], Any], batch: Batch, target: str, given: Sequence[str], sites: Sequence[str]
) -> ProbeRows:
    if target not in batch.covariates and target not in batch:
        raise ValueError(f"unknown label {target!r}: expected one of {[*batch.covariates, *batch.names]}")
    masks = [batch.present[name] for name in given]
    if target in batch.covariates:
        values = batch.covariates[target]
    else:
        values = batch[target]
        masks.append(batch.present[target])
    rows = torch.arange(batch.size, device=batch.device)
    rows = rows[torch.stack(masks).all(0)] if masks else rows
    if len(rows) == 0:
        raise ValueError(f"expected at least one row with all of {[*given, target]}")
    parts = [_means(guide, batch.block(part).only(*given), sites) for part in rows.split(ROWS_PER_PASS)]
    return ProbeRows(torch.cat(parts).numpy(), values[rows].cpu())


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
        mean: Tensor = d.mean
        return mean
    except NotImplementedError:
        estimate: Tensor = d.sample((NUM_DRAWS,)).mean(0)
        return estimate
