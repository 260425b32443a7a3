"""A deterministic conditional: all probability on the output of a network."""

import pyro.distributions as dist
from torch import Tensor

from .base import Conditional


class Delta(Conditional):
    r"""A point, :math:`p(x | parents) = \delta(x - f(parents))`, without a density: the encoder of an autoencoder.

    As the posterior of a latent it serves objectives that ask for no density of it: likelihoods with ``kl=0``, and
    statistics of the draws, as in ``elbo(kl=0) + 10 * MMD("z")``; and, held constant, the left side of a penalty,
    ``Term(ALL, (), EACH, freeze_encoder=True)``. Every other KL, importance weights, log-likelihoods, annealing and
    calibration are refused, and so is a modality that it decodes: a squared error is the likelihood of a
    :class:`Normal` with a fixed scale.

    Args:
        net: a module from the parents to f, ``(.., D)``.
        event_shape: the shape of one value, or None for one dimension of any size.

    Raises:
        ValueError: in ``forward``, the network's output has another size.

    Example:
        >>> import torch
        >>> Delta(torch.nn.Identity())(torch.tensor([[1.0, 2.0]])).sample()
        tensor([[1., 2.]])
    """

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Return the point ``(.., *event_shape)`` as a distribution."""
        (value,) = self._chunk(output, 1)
        return dist.Delta(value, event_dim=self.event_dim, validate_args=False)
