r"""The objectives once more in plain torch, by hand: the yardstick for the speed of a step.

Each is a function of :class:`networks.Networks` and the values, and gives minus the objective, summed over rows. Its
expectation is that of the objective of ``pyro_mm`` beside it in the table of ``steps.py``, whose ``--check`` compares
them. Shapes: M modalities, N rows, L latent dimensions, K draws.
"""

from __future__ import annotations

import math

import torch
from networks import Networks
from torch import Tensor
from torch.nn import functional as F

LOG_2PI = math.log(2 * math.pi)
OFFSET = math.log(math.expm1(1 - 1e-4))  # the scale is 1 where the network's output is 0
Values = dict[str, Tensor]


def mvae_joint(nets: Networks, x: Values) -> Tensor:
    loc, scale = product(*encode(nets, x))
    return (kl_to_prior(loc, scale) - decode(nets, draw(loc, scale), x)).sum()


def mvae(nets: Networks, x: Values) -> Tensor:
    """The joint bound and the unimodal ones: every decoder runs once, on two draws per row."""
    locs, scales = encode(nets, x)
    alone = product(locs[None], scales[None])
    loc, scale = (torch.cat([a[None], b]) for a, b in zip(product(locs, scales), alone, strict=True))
    z = draw(loc, scale)
    each = (log_likelihood(nets, m, torch.stack([z[0], z[1 + i]]), x[m]).sum() for i, m in enumerate(nets.names))
    return kl_to_prior(loc, scale).sum() - sum(each)


def jmvae(nets: Networks, x: Values, alpha: float = 0.1) -> Tensor:
    loc, scale = encode_jointly(nets, x)
    apart = kl(loc, scale, *encode(nets, x)).sum(0)
    return (kl_to_prior(loc, scale) + alpha * apart - decode(nets, draw(loc, scale), x)).sum()


def mmvae(nets: Networks, x: Values, particles: int) -> Tensor:
    """The mean over experts of the logarithm of the mean weight of K draws from it."""
    locs, scales = encode(nets, x)
    z = draw(*(a[:, None].expand(-1, particles, -1, -1) for a in (locs, scales)))  # (M, K, N, L)
    log_q = log_normal(z[:, :, None], locs, scales).logsumexp(2) - math.log(len(locs))
    log_w = decode(nets, z, x) + log_prior(z) - log_q
    return -(log_w.logsumexp(1) - math.log(particles)).mean(0).sum()


def mopoe(nets: Networks, x: Values) -> Tensor:
    """A draw a row from the product of a random subset, weighed by the density of the mixture of them all."""
    locs, scales = encode(nets, x)
    precisions = scales.pow(-2)
    total = torch.einsum("sm,mnl->snl", nets.subsets, precisions) + 1
    loc, scale = torch.einsum("sm,mnl->snl", nets.subsets, precisions * locs) / total, total.rsqrt()
    rows = torch.arange(loc.shape[1], device=loc.device)
    chosen = torch.randint(len(loc), rows.shape, device=loc.device)
    z = draw(loc[chosen, rows], scale[chosen, rows])
    log_q = log_normal(z, loc, scale).logsumexp(0) - math.log(len(loc))
    return (log_q - log_prior(z) - decode(nets, z, x)).sum()


def subset_mean(nets: Networks, x: Values) -> Tensor:
    """The bound of the product of a random subset, another one for every row."""
    locs, scales = encode(nets, x)
    chosen = nets.subsets[torch.randint(len(nets.subsets), locs.shape[1:2], device=locs.device)]
    precisions = scales.pow(-2) * chosen.T[..., None]
    total = precisions.sum(0) + 1
    loc, scale = (precisions * locs).sum(0) / total, total.rsqrt()
    return (kl_to_prior(loc, scale) - decode(nets, draw(loc, scale), x)).sum()


def mvtcae(nets: Networks, x: Values, alpha: float = 5 / 6) -> Tensor:
    """All its terms encode all modalities: one draw a row serves them, and a decoder's weights add to 1 - alpha / M."""
    locs, scales = encode(nets, x)
    loc, scale = product(locs, scales, prior=0.0)
    apart = kl(loc, scale, locs, scales).mean(0)
    likelihood = (1 - alpha / len(locs)) * decode(nets, draw(loc, scale), x)
    return ((1 - alpha) * kl_to_prior(loc, scale) + alpha * apart - likelihood).sum()


# -- what they are made of ------------------------------------------------------------------------------------------


def encode(nets: Networks, x: Values) -> tuple[Tensor, Tensor]:
    """The experts' locations and scales, ``(M, N, L)``."""
    return location_scale(torch.stack([nets.encoders[m](x[m]) for m in nets.names]))


def encode_jointly(nets: Networks, x: Values) -> tuple[Tensor, Tensor]:
    return location_scale(nets.head(torch.cat([nets.features[m](x[m]) for m in nets.names], -1)))


def location_scale(out: Tensor) -> tuple[Tensor, Tensor]:
    loc, raw = out.chunk(2, -1)
    return loc, 1e-4 + F.softplus(raw + OFFSET)


def product(locs: Tensor, scales: Tensor, prior: float = 1.0) -> tuple[Tensor, Tensor]:
    """The product over the first dimension of Gaussian experts and of a prior expert of this precision."""
    precisions = scales.pow(-2)
    total = precisions.sum(0) + prior
    return (precisions * locs).sum(0) / total, total.rsqrt()


def draw(loc: Tensor, scale: Tensor) -> Tensor:
    return loc + scale * torch.randn_like(loc)


def decode(nets: Networks, z: Tensor, x: Values) -> Tensor:
    """``log p(x | z)``, shaped like z without its last dimension."""
    return sum(log_likelihood(nets, m, z, x[m]) for m in nets.names)


def log_likelihood(nets: Networks, m: str, z: Tensor, x: Tensor) -> Tensor:
    """``log p(x_m | z)``. The decoder gets a matrix: AOTAutograd then keeps what its backward pass reads fastest."""
    out = nets.decoders[m](z.flatten(0, -2)).unflatten(0, z.shape[:-1])
    family, scale = nets.setting.family[m], nets.setting.scale
    if family == "categorical":
        labels = x.expand(z.shape[:-1])
        return -F.cross_entropy(out.flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)
    if family == "bernoulli":
        return -F.binary_cross_entropy_with_logits(out, x.expand_as(out), reduction="none").sum(-1)
    x, size = x.expand_as(out), x[0].numel()
    if family == "normal":
        squares = F.mse_loss(out, x, reduction="none").flatten(z.dim() - 1).sum(-1)
        return squares * (-0.5 / scale**2) - size * (0.5 * LOG_2PI + math.log(scale))
    return (out - x).abs().flatten(z.dim() - 1).sum(-1) / -scale - size * math.log(2 * scale)


def kl_to_prior(loc: Tensor, scale: Tensor) -> Tensor:
    return 0.5 * (scale.square() + loc.square() - 1 - 2 * scale.log()).sum(-1)


def kl(loc: Tensor, scale: Tensor, other_loc: Tensor, other_scale: Tensor) -> Tensor:
    ratio, apart = scale / other_scale, (loc - other_loc) / other_scale
    return 0.5 * (ratio.square() + apart.square() - 1 - 2 * ratio.log()).sum(-1)


def log_normal(z: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    return -0.5 * (((z - loc) / scale).square() + 2 * scale.log() + LOG_2PI).sum(-1)


def log_prior(z: Tensor) -> Tensor:
    return -0.5 * (z.square() + LOG_2PI).sum(-1)
