"""Distributions of vectors given by normalising flows."""

import pyro.distributions as dist
from torch import Tensor, nn

from ..distributions.flow import flow_distribution
from ..utils.arguments import check_function
from .base import Conditional


class Flow(Conditional):
    r"""A normalising flow whose transformation depends on the parents: an exact density of vectors.

    .. math:: x = f_c^{-1}(u), \quad u \sim N(0, I), \quad c = \mathrm{net}(parents), \qquad
        p(x) = N(f_c(x); 0, I) \, |\det \partial f_c / \partial x|

    Args:
        net: a module from the parents to the context c, ``(.., C)``.
        flow: a flow of :mod:`zuko`, such as ``zuko.flows.MAF(features=D, context=C)``: a module that maps a context
            to a distribution with a ``transform`` f to a ``base``. Its event shape is ``(D,)``.

    It is a posterior of a latent as well as a decoder of a vector of numbers. Passes of its networks:

    ======================================= ========= ====== ===============================================
    flow                                    log p(x)  draw   ``fit(compile=True)``
    ======================================= ========= ====== ===============================================
    autoregressive, ``MAF``                 1         D      compiled
    autoregressive splines, ``NSF``         1         D      compiled, in minutes on a CPU
    coupling, ``MAF(passes=2)``             1         2      compiled
    coupling splines, ``NSF(passes=2)``     1         2      compiled, in minutes on a CPU
    coupling, ``NICE``, ``RealNVP``         1         1      runs as it is: zuko chooses elements by a mask
    ======================================= ========= ====== ===============================================

    Each is that for every transform of the flow, and for every particle, since the context differs. Splines are the
    identity outside of [-5, 5], so that data should be standardised.

    Raises:
        TypeError: in ``forward``, the flow returns no distribution of zuko.

    References:
        Rezende & Mohamed 2015 (arXiv:1505.05770); Papamakarios et al. 2017 (arXiv:1705.07057); Durkan et al. 2019
        (arXiv:1906.04032).
    """

    def __init__(self, net: nn.Module, flow: nn.Module) -> None:
        super().__init__(net)
        self.flow = check_function("flow", flow, ("context",))

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Return the flow's distribution given the context ``(.., C)``."""
        return flow_distribution(self.flow(output), output.dtype)
