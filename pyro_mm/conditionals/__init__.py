"""Modules that return a distribution, p(x | parents) or q(z | x): a network, and a family for its output.

Each of them is ``distribution(output(*parents))``: ``output`` runs the network, ``distribution`` is a pure function of
what it returns.

Several parents are concatenated along their last dimension. A single parent goes to the network as it is, so that an
image or a class label can be one. The network's output may be flat or shaped like the event: a family with m parameters
takes ``(..., m * prod(event_shape))`` or ``(..., m * event_shape[0], *event_shape[1:])``, or for a sequence of shape
``(T, D)`` step by step ``(..., T, m * D)``. An ``event_shape`` of None is one dimension of any size. An output that can
be read both ways (m = 1 and an event such as ``(1, 64)``) is shaped.

Parameters are float32 at least, so that autocast does not round log-probabilities (a flow's own networks run under it).
They are not validated.
"""

from .base import Conditional
from .continuous import Laplace, MultivariateNormal, Normal, NormalMixture
from .dequantized import Dequantized
from .deterministic import Delta
from .discrete import Bernoulli, Categorical, NegativeBinomial, Poisson
from .flows import Flow
from .image_flow import ImageFlow
from .implicit import Implicit
from .tokens import Tokens

__all__ = [
    "Bernoulli", "Categorical", "Conditional", "Delta", "Dequantized", "Flow", "ImageFlow", "Implicit",
    "Laplace", "MultivariateNormal", "NegativeBinomial", "Normal", "NormalMixture", "Poisson", "Tokens",
]  # fmt: skip
