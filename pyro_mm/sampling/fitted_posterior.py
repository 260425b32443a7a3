"""Normals fitted to the posteriors of rows, as distributions of the latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import Transform, biject_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import ComposeTransform, IndependentTransform, ReshapeTransform

from ..batch.batch import Batch
from ..distributions.mixture import Mixture
from ..scoring.program import Program
from ..scoring.structure import PairStructure
from ..scoring.views import TermViews
from ..utils.seeding import temporary_seed
from .ancestral import SiteValues
from .fitted_proposal import ROWS_AT_ONCE, fit_posteriors
from .row_normals import FittedRows, NormalFit, RowNormals
from .unconstrained import UnconstrainedPair
from .weighted import BlockSizes, row_blocks


class FittedPosterior(dict[str, dist.Distribution]):
    r"""Normals fitted to the posterior of each row: latent site -> its marginal distribution, and joint draws.

    In unconstrained coordinates u of all latents of a row, the posterior p(u | x_S) is approximated by

    .. math:: q_n(u) = \sum_{s=1}^S \pi_{sn} N(u; \mu_{sn}, L_{sn} L_{sn}^\top)

    with one Normal by default. The marginal of a site in its own support has batch shape ``(N,)``, or ``(*plates, N)``
    in plates within a row; on the real numbers it is a Normal or a MultivariateNormal.

    Args:
        guide_sites: site -> the guide's distribution, of batch shape ``(*plates, N)``, in the order of the coordinates.
        fitted: the Normals of the rows.
        shared: site -> the guide's distribution of a latent that all rows share, which is an entry as it is.

    Attributes:
        normals: the Normals of all rows, :class:`~pyro_mm.sampling.row_normals.RowNormals`.
        failed: rows without a finite density at any point of the fit, whose Normal is the guide's, boolean ``(N,)``.
    """

    def __init__(
        self,
        guide_sites: Mapping[str, dist.Distribution],
        fitted: FittedRows,
        shared: Mapping[str, dist.Distribution] | None = None,
    ):
        self._transforms = {name: biject_to(d.support) for name, d in guide_sites.items()}
        super().__init__({**_marginals(guide_sites, self._transforms, fitted.normals), **(shared or {})})
        self.normals = fitted.normals
        self.failed = fitted.failed

    def sample(self, num_samples: int = 1, seed: int | None = None) -> SiteValues:
        """Draw all latents of a row together.

        Args:
            num_samples (int): S, draws per row.
            seed (int): of the draws; None goes on with torch's generator.

        Returns:
            Latent site -> ``(S, N, *plates, *event)``.
        """
        mean = self.normals.mean
        log_weights = self.normals.log_weights
        with temporary_seed(seed, mean.device), torch.no_grad():
            noise = torch.randn(num_samples, *mean.shape[1:], dtype=mean.dtype, device=mean.device)
            component = torch.distributions.Categorical(logits=log_weights.T).sample((num_samples,))
            u = self.normals.transform(noise, component)
            values = {}
            for name, first, plates, event in _layout(self, self._transforms):
                size = plates.numel() * event.numel()
                x = u[..., first : first + size].reshape(*u.shape[:2], *plates, *event)
                x = self._transforms[name](x.movedim(1, 1 + len(plates)))
                values[name] = x.movedim(1 + len(plates), 1)
            return values


def fit_posterior(
    model: Program,
    guide: Program,
    batch: Batch,
    structure: PairStructure,
    fit: NormalFit,
    seed: int,
    vectorize: bool = True,
) -> FittedRows:
    """Fit Normals to the posteriors of all rows of a batch, block by block of rows.

    Args:
        model, guide: callables of a batch.
        batch: N rows.
        structure: structure of the pair.
        fit: settings of the fit.
        seed: of all draws.
        vectorize: True to score all points in one run of the model.
    """
    parts = []
    for first, rows in row_blocks(batch, ROWS_AT_ONCE):
        with temporary_seed(seed + first, batch.device), torch.no_grad():
            pair = unconstrained_pair(model, guide, rows, structure, vectorize)
            parts.append(fit_posteriors(pair, fit, BlockSizes().pairs_to_decode(rows)))
    normals = [part.normals for part in parts]
    whole = RowNormals(
        torch.cat([x.mean for x in normals], 1),
        torch.cat([x.scale_tril for x in normals], 1),
        torch.cat([x.log_weights for x in normals], 1),
        torch.cat([x.active for x in normals]),
    )
    return replace(parts[0], normals=whole, failed=torch.cat([part.failed for part in parts]))


def unconstrained_pair(
    model: Program, guide: Program, batch: Batch, structure: PairStructure, vectorize: bool = True
) -> UnconstrainedPair:
    """Return the densities of a pair at unconstrained coordinates."""
    views = TermViews.of(batch, structure).given_globals(structure)
    return UnconstrainedPair(model, guide, views, structure, vectorize, method="a fitted posterior")


def _marginals(
    guide_sites: Mapping[str, Any], transforms: Mapping[str, Transform], normals: RowNormals
) -> dict[str, dist.Distribution]:
    """Return the marginal distribution of each site of Normals fitted to rows."""
    found = {}
    for name, first, plates, event in _layout(guide_sites, transforms):
        size = event.numel()
        means, scales = [], []
        for plate in range(plates.numel()):
            own = slice(first + plate * size, first + (plate + 1) * size)
            means.append(normals.mean[..., own])
            scales.append(_triangular(normals.scale_tril[..., own, :]))
        rows = normals.mean.shape[1]
        # (*plates, N, S, ..): the Normals of a row last among the batch dimensions
        mean = torch.stack(means, 0).movedim(1, -2).reshape(*plates, rows, -1, size)
        scale = torch.stack(scales, 0).movedim(1, -3).reshape(*plates, rows, mean.shape[-2], size, size)
        found[name] = _site_distribution(
            mean, scale, normals.log_weights.T, event, transforms[name], guide_sites[name].support
        )
    return found


def _layout(
    sites: Mapping[str, Any], transforms: Mapping[str, Transform]
) -> Iterator[tuple[str, int, torch.Size, torch.Size]]:
    """Yield (site, its first coordinate, plates, shape of its coordinates in each plate)."""
    first = 0
    for name, fn in sites.items():
        if name not in transforms:
            continue  # a latent that all rows share
        batch_shape = fn.batch_shape
        event = transforms[name].inverse_shape(batch_shape + fn.event_shape)[len(batch_shape) :]
        yield name, first, torch.Size(batch_shape[:-1]), torch.Size(event)
        first += batch_shape[:-1].numel() * torch.Size(event).numel()


def _site_distribution(
    mean: Tensor,
    scale: Tensor,
    log_weights: Tensor,
    event: torch.Size,
    transform: Transform,
    support: Constraint | None,
) -> dist.Distribution:
    """Return the distribution of a site from the Normals of its coordinates.

    Args:
        mean: ``(*plates, N, S, E)``.
        scale: triangular, ``(*plates, N, S, E, E)``.
        log_weights: ``(N, S)``.
        event: shape of the E coordinates.
        transform: bijection from them to the support.
        support: the support.
    """
    alone = mean.shape[-2] == 1
    if alone:
        mean = mean[..., 0, :]
        scale = scale[..., 0, :, :]
    whole: Any
    if event:
        whole = dist.MultivariateNormal(mean, scale_tril=scale, validate_args=False)
    else:
        whole = dist.Normal(mean[..., 0], scale[..., 0, 0], validate_args=False)
    if not alone:
        whole = Mixture(whole, log_weights)
    steps: list[Transform] = []
    if len(event) > 1:
        steps.append(ReshapeTransform(torch.Size([event.numel()]), event))
    if not _is_identity(transform):
        steps.append(transform)
    if not steps:
        return whole
    transformed = _OnSupport(whole, steps, validate_args=False)
    transformed.own_support = support
    return transformed


class _OnSupport(dist.TransformedDistribution):
    """A transformed distribution that knows its support, of which torch's composed transforms know nothing."""

    own_support: Constraint | None = None

    @property
    def support(self) -> Constraint | None:
        return self.own_support

    def expand(self, batch_shape: Any, _instance: Any = None) -> _OnSupport:
        new: _OnSupport = super().expand(batch_shape, _instance)
        new.own_support = self.own_support
        return new


def _triangular(factor: Tensor) -> Tensor:
    """Return the lower triangular L of positive diagonal with L L' = F F', from F ``(.., E, D)`` with E <= D."""
    triangle = torch.linalg.qr(factor.mT)[1].mT
    lower: Tensor = triangle * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return lower


def _is_identity(transform: Transform) -> bool:
    """Return True if a transform leaves everything as it is."""
    if isinstance(transform, IndependentTransform):
        return _is_identity(transform.base_transform)
    return isinstance(transform, ComposeTransform) and not transform.parts
