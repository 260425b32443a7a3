"""Levels of pixels whose density comes from a continuous family, with dequantisation noise as a latent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from pyro.distributions.util import broadcast_shape
from torch import Size, Tensor, nn
from torch.distributions import constraints

from ..distributions.base import Composite, expand_distribution, expand_to
from ..distributions.support import OnGrid
from ..utils.arguments import check_function, check_integer, describe


class Dequantized(nn.Module):
    r"""Pixels of L levels under a density of real numbers, with dequantisation noise u as a private latent.

    .. math:: P(x | z) = \int_{[0, 1)^D} L^{-D} p\Big(\frac{(L - 1) x + u}{L} \Big| z\Big) du, \qquad
        x \in \{0, \tfrac{1}{L - 1}, \dots, 1\}^D

    It is the decoder of a story in which u, uniform by itself, is private to the modality, and the log-density is that
    of x and u together. So u is a latent like others, and the guide says how it is sampled: uniformly, or by a flow
    given x (variational dequantisation). The bound on log P(x) is that of the estimator, importance-weighted over K
    draws with ``IWAE(K)``, and ``log_marginal`` estimates log P(x) itself::

        noise = dist.Uniform(torch.zeros(28, 28), 1.0).to_event(2)
        decoder = Dequantized(ImageFlow(net, (28, 28), context=64, margin=0.0))
        model = mm.models.PrivateLatents(prior, {"image": noise}, {"image": decoder, "label": ..})
        uniform = mm.Guide(z=.., w_image=lambda batch: noise)
        flow = ImageFlow(encoder, (28, 28), context=32, margin=0.0)
        variational = mm.Guide(z=.., w_image=mm.posteriors.Private("image", flow, missing=noise))

    A draw of x is :math:`\lfloor L y \rfloor / (L - 1)` of a draw y given z, and does not depend on u: right for
    ``generate``, and no draw from the joint distribution of x and u, so that ``simulate`` refuses it. Density outside
    of [0, 1] belongs to no level, and is lost: take a ``margin`` of 0.

    Noise of many pixels makes weights heavy-tailed: ``log_marginal`` then doubts its rows, and is more likely too low.
    A fitted proposal is a Normal in all D dimensions, and decodes some 2 D times for each row and round.

    Args:
        conditional: a module from the parents to a distribution of real numbers in [0, 1], such as :class:`ImageFlow`.
        levels: L.

    Raises:
        TypeError, ValueError: another argument; in ``forward``, no parent but the noise, or noise of another shape.

    Example:
        >>> decoder = Dequantized(lambda z: dist.Uniform(torch.zeros(5, 3), 1.0).to_event(1), levels=2)
        >>> decoder(torch.zeros(5, 2), torch.rand(5, 3)).log_prob(torch.ones(5, 3)).exp()  # each of 2 ** 3 images
        tensor([0.1250, 0.1250, 0.1250, 0.1250, 0.1250])

    References:
        Uria et al. 2013 (RNADE, arXiv:1306.0186); Theis et al. 2016 (arXiv:1511.01844); Ho et al. 2019 (Flow++,
        arXiv:1902.00275).
    """

    def __init__(self, conditional: Any, levels: int = 256) -> None:
        super().__init__()
        self.conditional = check_function("conditional", conditional, None)
        self.levels = check_integer("levels", levels, least=2)

    def forward(self, *parents: Tensor) -> dist.TorchDistribution:
        """Return the distribution of pixels given the parents, of which the last is the noise.

        Args:
            parents: those of the conditional, ``(.., N, F_i)``, and the noise ``(.., N, *event_shape)``.
        """
        if len(parents) < 2:
            raise ValueError(
                "Dequantized: expected the noise behind the other parents, batch.observe(name, decoder, z, noise), got "
                f"{len(parents)} in all: name the modality in the private priors of PrivateLatents"
            )
        *others, noise = parents
        d = self.conditional(*others)
        if not isinstance(d, TorchDistributionMixin):
            raise TypeError(f"Dequantized: expected a distribution from the conditional, got {describe(d)}")
        if noise.shape[noise.dim() - d.event_dim :] != d.event_shape:
            raise ValueError(
                f"Dequantized: expected noise of event shape {tuple(d.event_shape)}, got a tensor of shape "
                f"{tuple(noise.shape)}: give the private latent dist.Uniform(torch.zeros({tuple(d.event_shape)}), 1.0)"
                f".to_event({d.event_dim})"
            )
        return _Dequantized(d, noise, self.levels)


class _Dequantized(Composite):
    """The distribution of pixels on levels, with the density of pixels and noise together."""

    has_rsample = False
    ignores_parents = "its dequantisation noise"

    def __init__(self, d: dist.TorchDistribution, noise: Tensor, levels: int) -> None:
        self.noise = noise
        self.levels = levels
        lead = noise.shape[: noise.dim() - d.event_dim]
        super().__init__(Size(broadcast_shape(d.batch_shape, lead)), d)

    @constraints.dependent_property
    def support(self) -> constraints.Constraint:
        return constraints.independent(OnGrid(self.levels), self.event_dim)

    def log_prob(self, value: Tensor) -> Tensor:
        (d,) = self._parts
        level = (value * (self.levels - 1)).round()
        log_prob = d.log_prob((level + self.noise) / self.levels)
        return expand_to(log_prob - self.event_shape.numel() * math.log(self.levels), self.batch_shape)

    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        with torch.no_grad():
            y = expand_distribution(self._parts[0], self.batch_shape).sample(Size(sample_shape))
            levels: Tensor = (y * self.levels).floor().clamp(0, self.levels - 1) / (self.levels - 1)
            return levels
