"""Modules that return a distribution, p(x | parents) or q(z | x): a network, and a family for its output.

Several parents are concatenated along their last dimension. A single one goes to the network as it is: an
image or a class label can be a parent. The network's output may be flat, or shaped like the event: a family
of m parameters takes ``(..., m * prod(event_shape))`` or ``(..., m * event_shape[0], *event_shape[1:])``. An
``event_shape`` of None stands for one dimension of whatever size comes. Where both readings fit, which takes
m = 1 and an event such as ``(1, 64)``, the second one holds.

Parameters are made float32 at least, so that autocast rounds no log-probability (but a flow's own networks run under
it), and are not validated.
"""

import math
from collections.abc import Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Size, Tensor, nn

from .distributions import Mixture
from .presence import constant
from .sets import Output

__all__ = [
    "Bernoulli", "Categorical", "Conditional", "Flow", "Laplace", "NegativeBinomial", "Normal",
    "NormalMixture", "Poisson",
]  # fmt: skip

SCALE_FLOOR = 1e-4


class Conditional(nn.Module):
    """What the families share: the network, and the reading of its output.

    Args:
        net: a module, from the parents to the parameters.
        event_shape: the shape of one value, or None for one dimension of any size.
    """

    def __init__(self, net: nn.Module, event_shape: Sequence[int] | None = None) -> None:
        super().__init__()
        self.net = net
        self.event_shape = None if event_shape is None else Size(event_shape)

    @property
    def event_dim(self) -> int:
        return 1 if self.event_shape is None else len(self.event_shape)

    def output(self, parents: tuple[Tensor, ...]) -> Tensor:
        """What the network puts out."""
        if isinstance(parents[0], Output):
            return parents[0].value
        if len(parents) > 1:
            lead = broadcast_shape(*(parent.shape[:-1] for parent in parents))
            parents = (torch.cat([parent.expand(*lead, -1) for parent in parents], -1),)
        out = self.net(*parents)
        return out.to(torch.promote_types(out.dtype, torch.float32))

    def _parameters_of(self, parents: tuple[Tensor, ...], number: int) -> tuple[Tensor, ...]:
        """The network's output as ``number`` tensors of shape ``(..., *event_shape)``."""
        out, event = self.output(parents), self.event_shape
        if event is None:
            event = Size([out.shape[-1] // number])
        shaped = (number * event[0], *event[1:]) if event else (number,)
        if event and out.shape[-len(shaped) :] == shaped:
            return out.chunk(number, -len(shaped)) if number > 1 else (out,)
        if out.shape[-1:] == (number * event.numel(),):
            if number == 1:  # as it is, for the gradient of a chunk is copied into one of the whole
                return (out.reshape(out.shape[:-1] + event),)
            return out.unflatten(-1, (number, *event)).unbind(-1 - len(event))
        flat = f"(..., {number * event.numel()})"
        wanted = flat if len(event) < 2 else f"{flat} or (..., {', '.join(map(str, shaped))})"
        raise ValueError(f"expected an output of shape {wanted} from the network, got {tuple(out.shape)}")


class _LocationScale(Conditional):
    """Shared by :class:`Normal` and :class:`Laplace`."""

    def __init__(
        self,
        net: nn.Module,
        event_shape: Sequence[int] | None = None,
        scale: float | nn.Parameter | None = None,
    ) -> None:
        super().__init__(net, event_shape)
        self.log_scale = scale if isinstance(scale, nn.Parameter) else None
        self.scale = None if scale is None or isinstance(scale, nn.Parameter) else float(scale)
        if self.scale is not None and not self.scale > 1e-30:
            raise ValueError(f"expected a positive scale, got {scale}")

    family: type[dist.Normal] | type[dist.Laplace]

    def forward(self, *parents: Tensor) -> dist.TorchDistribution:
        d = self.family(*self._loc_and_scale(parents), validate_args=False)
        if self.scale is None or not self.event_dim:
            return d.to_event(self.event_dim)
        fixed = _OfScale(d, self.event_dim, validate_args=False)
        fixed.number = self.scale
        return fixed

    def _loc_and_scale(self, parents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        if self.log_scale is not None:
            (loc,) = self._parameters_of(parents, 1)
            return loc, self.log_scale.to(loc.dtype).exp().expand_as(loc)
        if self.scale is not None:
            (loc,) = self._parameters_of(parents, 1)
            return loc, constant((self.scale,), loc.dtype, loc.device).expand_as(loc)
        loc, raw = self._parameters_of(parents, 2)
        return loc, _scale(raw)


def _scale(raw: Tensor) -> Tensor:
    # The offset makes the scale 1 where raw is 0, about what a fresh network returns.
    return SCALE_FLOOR + nn.functional.softplus(raw + math.log(math.expm1(1 - SCALE_FLOOR)))


class Normal(_LocationScale):
    r"""A diagonal Gaussian, :math:`N(\mu(parents), \sigma)`.

    Args:
        net: gives :math:`\mu` and r, or :math:`\mu` alone where the scale is given.
        event_shape: the shape of one value, or None for one dimension of any size.
        scale: None for :math:`\sigma = 10^{-4} + \mathrm{softplus}(r + c)`, with c such that r = 0 gives
            :math:`\sigma = 1`; a number for a fixed :math:`\sigma`; a Parameter, broadcast over the event, for a
            learned :math:`\log\sigma`.

    Raises:
        ValueError: in ``forward``, the network's output does not fit.
    """

    family = dist.Normal


class Laplace(_LocationScale):
    r"""Independent Laplace variables; the arguments are those of :class:`Normal`.

    .. math:: p(x) = \exp(-|x - \mu| / \sigma) / (2 \sigma)
    """

    family = dist.Laplace


class NormalMixture(Conditional):
    r"""A mixture of diagonal Gaussians, weights and all: :math:`\sum_c \pi_c N(\mu_c, \sigma_c^2)`.

    Args:
        net: gives K logits, and then :math:`\mu_c` and r of each component as :class:`Normal` has them:
            ``(.., K + 2 K D)``.
        components: K.

    Its draws are differentiated implicitly, so that the weights learn by them too. Where components lie far apart that
    gradient varies wildly: ``IWAE(stratified=...)`` then does better. See :class:`~pyro_mm.distributions.Mixture`.

    Raises:
        ValueError: in ``forward``, the network's output does not fit.
    """

    def __init__(self, net: nn.Module, components: int) -> None:
        super().__init__(net)
        self.components = components

    def forward(self, *parents: Tensor) -> dist.TorchDistribution:
        out, k = self.output(parents), self.components
        if out.shape[-1] <= k or (out.shape[-1] - k) % (2 * k):
            raise ValueError(f"expected {k} + 2 * {k} * D outputs of the network, got {out.shape[-1]}")
        loc, raw = out[..., k:].unflatten(-1, (2, k, -1)).unbind(-3)
        components = dist.Normal(loc, _scale(raw), validate_args=False).to_event(1)
        return Mixture(components, out[..., :k].log_softmax(-1))


class _OfScale(dist.Independent):
    r"""Independent Normal or Laplace variables of one fixed scale, scored by one sum and one constant.

    .. math:: -\tfrac{1}{2 \sigma^2} \sum_d (x_d - \mu_d)^2 - D \log(\sigma \sqrt{2 \pi}), \qquad
              -\tfrac1\sigma \sum_d |x_d - \mu_d| - D \log(2 \sigma)
    """

    number: float

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Any:
        new = super().expand(batch_shape, _instance)
        new.number = self.number
        return new

    def log_prob(self, value: Tensor) -> Tensor:
        loc, normal, number = self.base_dist.loc, isinstance(self.base_dist, dist.Normal), self.number
        shape = broadcast_shape(loc.shape, value.shape)
        dtype = torch.promote_types(loc.dtype, value.dtype)
        # one pass over the data, and one over its gradient, where a difference and its square take several
        apart = nn.functional.mse_loss if normal else nn.functional.l1_loss
        each = apart(loc.expand(shape).to(dtype), value.expand(shape).to(dtype), reduction="none")
        total = each.flatten(each.dim() - self.reinterpreted_batch_ndims).sum(-1)
        weight, unit = (0.5 / number**2, number * math.sqrt(2 * math.pi)) if normal else (1 / number, 2 * number)
        return -weight * total - self.event_shape.numel() * math.log(unit)


class _Bits(dist.Independent):
    r"""Independent binary variables, scored in half the time where no gradient is asked for.

    .. math:: \log p(x) = \sum_d [(x_d - 1/2) l_d - |l_d| / 2] - \sum_g \log \prod_{d \in g} (1 + e^{-|l_d|})

    in groups g of 16 at most, whose product lies between 1 and 2^16: one logarithm for all of them.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        logits = self.base_dist.logits
        if (torch.is_grad_enabled() and logits.requires_grad) or value.dtype != logits.dtype:
            return super().log_prob(value)
        n = self.reinterpreted_batch_ndims
        logits, value = logits.flatten(logits.dim() - n), value.flatten(value.dim() - n)
        size = logits.abs()
        linear = torch.mul(logits, value - 0.5).sub_(size, alpha=0.5).sum(-1)
        ones = size.neg_().exp_().add_(1)
        for _ in range(4):
            if ones.shape[-1] % 2 == 0:
                half = ones.shape[-1] // 2
                ones = ones[..., :half] * ones[..., half:]
        return linear - ones.log_().sum(-1)


class Bernoulli(Conditional):
    """Independent binary variables; the network gives the logits.

    As values are not validated, ``log_prob`` takes grey levels in [0, 1] too: minus the binary cross-entropy.
    Its result has the type of the *value* (torch's doing): give float64 values for a float64 result.
    """

    def forward(self, *parents: Tensor) -> dist.TorchDistribution:
        (logits,) = self._parameters_of(parents, 1)
        bits = dist.Bernoulli(logits=logits, validate_args=False)
        return _Bits(bits, self.event_dim, validate_args=False) if self.event_dim else bits


class Categorical(Conditional):
    """A class label, or an array of them; the network gives logits of shape ``(..., *event_shape, C)``."""

    def __init__(self, net: nn.Module, event_shape: Sequence[int] = ()) -> None:
        super().__init__(net, event_shape)

    def forward(self, *parents: Tensor) -> dist.TorchDistribution:
        logits, event = self.output(parents), self.event_shape or ()
        if logits.shape[-1 - self.event_dim : -1] != event:
            wanted = ", ".join(["...", *map(str, event), "C"])
            raise ValueError(f"expected logits of shape ({wanted}), got {tuple(logits.shape)}")
        return dist.Categorical(logits=logits, validate_args=False).to_event(self.event_dim)


class Poisson(Conditional):
    """Independent counts; the network gives the log of the rate."""

    def forward(self, *parents: Tensor) -> dist.TorchDistribution:
        (log_rate,) = self._parameters_of(parents, 1)
        return dist.Poisson(log_rate.exp(), validate_args=False).to_event(self.event_dim)


class NegativeBinomial(Conditional):
    r"""Independent overdispersed counts, by their mean and inverse dispersion.

    .. math:: p(x) = \frac{\Gamma(x + r)}{x! \, \Gamma(r)} \Big(\frac{r}{r + \mu}\Big)^r
        \Big(\frac{\mu}{r + \mu}\Big)^x, \quad E x = \mu, \quad Var x = \mu + \mu^2 / r

    Args:
        net: gives :math:`\log\mu`, and :math:`\log r` too where ``shared_dispersion`` is false.
        event_shape: the shape of one value, or None for one dimension of any size.
        shared_dispersion: whether :math:`\log r` is a parameter, one per feature, that starts at 0.

    Raises:
        ValueError: the dispersion is shared and no ``event_shape`` gives the number of features.

    Lopez et al. 2018 (doi:10.1038/s41592-018-0229-2).
    """

    def __init__(
        self, net: nn.Module, event_shape: Sequence[int] | None = None, shared_dispersion: bool = True
    ) -> None:
        super().__init__(net, event_shape)
        self.log_inverse_dispersion: nn.Parameter | None = None
        if shared_dispersion:
            if event_shape is None:
                raise ValueError("a shared dispersion, one per feature, needs event_shape, got None")
            self.log_inverse_dispersion = nn.Parameter(torch.zeros(tuple(event_shape)))

    def forward(self, *parents: Tensor) -> dist.TorchDistribution:
        if self.log_inverse_dispersion is None:
            log_mean, log_r = self._parameters_of(parents, 2)
        else:
            (log_mean,) = self._parameters_of(parents, 1)
            log_r = self.log_inverse_dispersion.to(log_mean.dtype)
        family = dist.NegativeBinomial(log_r.exp(), logits=log_mean - log_r, validate_args=False)
        return family.to_event(self.event_dim)


class Flow(Conditional):
    r"""A normalising flow whose transformation depends on the parents.

    .. math:: x = f_c^{-1}(u), \quad u \sim N(0, I), \quad c = \mathrm{net}(parents), \qquad
        p(x) = N(f_c(x); 0, I) \, |\det \partial f_c / \partial x|

    Args:
        net: gives the context c, ``(.., C)``.
        flow: a flow of :mod:`zuko`, such as ``zuko.flows.MAF(features=D, context=C)``: a module that maps a context
            to a distribution with a ``transform`` f to a ``base``. Its event shape is ``(D,)``.

    An autoregressive flow scores in one pass and draws in D of them; one of coupling layers (``NICE``, ``RealNVP``)
    does both in one. Rezende & Mohamed 2015 (arXiv:1505.05770); Papamakarios et al. 2017 (arXiv:1705.07057).
    """

    def __init__(self, net: nn.Module, flow: nn.Module) -> None:
        super().__init__(net)
        self.flow = flow

    def forward(self, *parents: Tensor) -> dist.TorchDistribution:
        context = self.output(parents)
        d = self.flow(context)
        return _Flowing(d.base, [_Drawn(d.transform, context.dtype)], validate_args=False)


class _Drawn(torch.distributions.Transform):
    """From noise to a draw: the inverse of a flow's transformation, of noise of any type (uniforms are float64)."""

    domain = codomain = torch.distributions.constraints.real_vector
    bijective = True

    def __init__(self, flow: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.flow, self.dtype = flow, dtype

    def _call(self, x: Tensor) -> Tensor:
        return self.flow.inv(x.to(self.dtype))

    def _inverse(self, y: Tensor) -> Tensor:
        return self.flow(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -self.flow.log_abs_det_jacobian(y, x)


class _Flowing(dist.TransformedDistribution):
    """As torch's, but that density and noise come of one pass of the networks.

    Not ``pyro.contrib.zuko.ZukoToPyro``, which has no ``rsample``, and whose draws cannot be made of uniforms.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        # as wide as the context, which the slopes of zuko's transformations are not by themselves
        value = value.expand(broadcast_shape(value.shape, self.batch_shape + self.event_shape))
        noise, log_slope = self.transforms[0].flow.call_and_ladj(value)
        return self.base_dist.log_prob(noise) + log_slope
