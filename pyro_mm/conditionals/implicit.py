"""An implicit conditional: a generator that gives draws, and no density."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn

from ..distributions.pushforward import Pushforward
from ..utils.arguments import check_function, check_integer, check_shape


class Implicit(nn.Module):
    r"""A modality that a network generates from its parents and noise: :math:`x = g(c, u), u \sim N(0, I)`.

    A story with it only samples that modality. There is no log p(x | c), so an objective trains it by a critic,
    :meth:`Objective.with_critics <pyro_mm.objectives.Objective.with_critics>`, and everything that asks for its density
    raises a ``ValueError``: ``log_marginal``, ``log_weights``, ``compare``, ``calibration``, annealing, fitted
    proposals. ``batch.without(name)`` gives the marginal of the other modalities, and ``generate`` draws it.

    Args:
        generator: a module from one tensor ``(.., N, F + noise)``, the parents and the noise concatenated along the
            last dimension, to values ``(.., N, *event_shape)``, or flat.
        noise: the number of dimensions of u.
        event_shape: the shape of one value, or None for one dimension of any size.

    Raises:
        ValueError: in ``forward``, no parent; in a draw, an output of another shape.

    Example:
        >>> import torch, pyro_mm as mm
        >>> image = mm.conditionals.Implicit(mm.nn.MLP(2 + 4, 9, (8,)), noise=4, event_shape=(3, 3))
        >>> image(torch.zeros(5, 2)).sample().shape
        torch.Size([5, 3, 3])

    References:
        Mohamed & Lakshminarayanan 2016 (arXiv:1610.03483); Wu & Goodman 2019 (arXiv:1912.05075).
    """

    composes = False  # forward is no more than a distribution: it has draws of its own

    def __init__(self, generator: nn.Module, noise: int = 16, event_shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.net = check_function("generator", generator, None)
        self.noise = check_integer("noise", noise, least=1)
        self.event_shape = None if event_shape is None else check_shape("event_shape", event_shape)
        self._known: dict[str, torch.Size] = {}

    def forward(self, *parents: Tensor, **keywords: Any) -> Pushforward:
        """Return the distribution given the parents.

        Args:
            parents: tensors ``(.., N, F_i)``.
            keywords: lengths or covariates that the generator asks for.
        """
        if not parents:
            raise ValueError("Implicit: expected a parent, such as a latent: batch.observe(name, implicit, z)")
        lead = broadcast_shape(*(parent.shape[:-1] for parent in parents))
        joined = torch.cat([parent.expand(*lead, -1) for parent in parents], -1) if len(parents) > 1 else parents[0]
        return Pushforward(self.net, joined, self.noise, self.event_shape, self._known, keywords)
