"""Modules that return a distribution, p(x | parents) or q(z | x): a network, and a family for its output.

Several parents are concatenated along their last dimension. A single one goes to the network as it is: an
image or a class label can be a parent. The network's output may be flat, or shaped like the event: a family
of m parameters takes ``(..., m * prod(event_shape))`` or ``(..., m * event_shape[0], *event_shape[1:])``. An
``event_shape`` of None stands for one dimension of whatever size comes. Where both readings fit, which takes
m = 1 and an event such as ``(1, 64)``, the second one holds.

Parameters are made float32 at least, so that autocast rounds no log-probability (but a flow's own networks run under
it), and are not validated.
"""

from .base import Conditional
from .continuous import Laplace, MultivariateNormal, Normal, NormalMixture
from .discrete import Bernoulli, Categorical, NegativeBinomial, Poisson
from .flows import Flow

__all__ = [
    "Bernoulli", "Categorical", "Conditional", "Flow", "Laplace", "MultivariateNormal", "NegativeBinomial", "Normal",
    "NormalMixture", "Poisson",
]  # fmt: skip
