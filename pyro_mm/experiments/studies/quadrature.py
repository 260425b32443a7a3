"""The exact posterior of two mixed latents given x and u, by quadrature."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...datasets.simulated import SLOPE, Sources

NODES = 401  # per dimension
WIDE = 8.0  # the grid's half width in standard deviations of the noise
ROWS_AT_ONCE = 100


@torch.no_grad()
def posterior(sources: Sources, name: str, label: str, noise: float) -> tuple[Tensor, Tensor]:
    r"""Integrate out two latents of a square non-linear mixing: evidence and posterior means of every row.

    With orthogonal A and B, and h = A z, the noise of :math:`B^T x = \mathrm{lrelu}(h) + \epsilon` is as before, and

    .. math:: p(x, u) = \frac1C \int N(h; A \mu_u, A S_u A^T) \prod_i N((B^T x)_i; \mathrm{lrelu}(h_i), \sigma^2) dh

    by the trapezoid rule on a grid around the inverse of every row, which is wider where the slope of the rectifier
    widens the noise.

    Args:
        sources: rows simulated with their story.
        name: the modality x, of two dimensions.
        label: the modality u.
        noise: :math:`\sigma`.

    Returns:
        (log p(x, u), E[z | x, u]): ``(N,)`` in nats, and ``(N, 2)``; float64.
    """
    mixing = sources.mixing[name]
    u = sources.batch[label]
    y = sources.batch[name].double() @ mixing.outer
    mean = sources.centres @ mixing.inner.T
    precision = torch.stack([mixing.inner @ torch.diag(s**-2) @ mixing.inner.T for s in sources.scales])
    unit = torch.linspace(-1, 1, NODES, dtype=torch.float64)
    evidence, means = [], []
    for rows in torch.arange(len(y)).split(ROWS_AT_ONCE):
        inverse = torch.where(y[rows] > 0, y[rows], y[rows] / SLOPE)
        below, above = inverse - WIDE * noise / SLOPE, inverse + WIDE * noise / SLOPE
        # well above zero the negative side has no mass, and the other way round
        high = y[rows] > WIDE * noise
        below = torch.where(high, inverse - WIDE * noise, below)
        above = above.minimum(y[rows].clamp(min=0) + WIDE * noise)
        centre, half = (above + below) / 2, (above - below) / 2
        h = centre[..., None] + half[..., None] * unit  # (rows, 2, NODES)
        fit = -0.5 * ((y[rows][..., None] - torch.nn.functional.leaky_relu(h, SLOPE)) / noise) ** 2
        fit = fit - math.log(noise * math.sqrt(2 * math.pi))
        # the exponent of two correlated Normals: a sum over either dimension and one product, so nothing is solved for
        inverse, d = precision[u[rows]], h - mean[u[rows]][..., None]
        each = fit - 0.5 * inverse.diagonal(dim1=-2, dim2=-1)[..., None] * d.square()
        total = each[:, 0, :, None] + each[:, 1, None, :]
        total -= (inverse[:, 0, 1, None] * d[:, 0])[..., None] * d[:, 1, None, :]
        total += (0.5 * inverse.logdet() - math.log(2 * math.pi))[:, None, None]
        step = (half * 2 / (NODES - 1)).log().sum(-1)
        evidence.append(total.flatten(1).logsumexp(1) + step - math.log(len(mean)))
        weight = total.flatten(1).softmax(1).reshape(total.shape)
        found = torch.stack([(weight.sum(2) * h[:, 0]).sum(1), (weight.sum(1) * h[:, 1]).sum(1)], -1)
        means.append(found @ mixing.inner)  # z = A^T h
    return torch.cat(evidence), torch.cat(means)
