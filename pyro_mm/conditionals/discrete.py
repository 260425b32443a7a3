"""Families of binary variables, classes and counts."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn

from ..utils.arguments import check_flag
from ..utils.network_calls import take_rows
from .base import Conditional


class _IndependentBernoulli(dist.Independent):
    r"""Independent binary variables, scored in half the time when no gradient is needed.

    .. math:: \log p(x) = \sum_d [(x_d - 1/2) l_d - |l_d| / 2] - \sum_g \log \prod_{d \in g} (1 + e^{-|l_d|})

    in groups g of 16 at most, whose product lies between 1 and 2^16: one logarithm for all of them.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor
        logits = self.base_dist.logits
        if value.dtype == torch.bool:
            value = value.to(logits.dtype)
        if (torch.is_grad_enabled() and logits.requires_grad) or value.dtype != logits.dtype:
            log_prob = super().log_prob(value)
            return log_prob

        n = self.reinterpreted_batch_ndims
        logits = logits.flatten(logits.dim() - n)
        value = value.flatten(value.dim() - n)
        size = logits.abs()
        linear = torch.mul(logits, value - 0.5).sub_(size, alpha=0.5).sum(-1)

        products = size.neg_().exp_().add_(1)
        for _ in range(4):
            if products.shape[-1] % 2 == 0:
                half = products.shape[-1] // 2
                products = products[..., :half] * products[..., half:]
        log_prob = linear - products.log_().sum(-1)
        return log_prob


class Bernoulli(Conditional):
    """Independent binary variables.

    Values are floats, or booleans. They are not validated: for grey levels in [0, 1] ``log_prob`` is minus the
    binary cross-entropy. As in torch, its result has the dtype of float *values*: give float64 values for a float64
    result.

    Args:
        net: a module from the parents to the logits, ``(.., D)`` or ``(.., *event_shape)``.
        event_shape: the shape of one value, or None for one dimension of any size.

    Raises:
        ValueError: in ``forward``, the network's output has another size.
    """

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Return the distribution with logits ``(.., D)`` or ``(.., *event_shape)``."""
        (logits,) = self._chunk(output, 1)
        bits = dist.Bernoulli(logits=logits, validate_args=False)
        return _IndependentBernoulli(bits, self.event_dim, validate_args=False) if self.event_dim else bits


class Categorical(Conditional):
    """A class label, or an array of them.

    Args:
        net: a module from the parents to logits ``(..., *event_shape, C)``, or flat ones
            ``(..., prod(event_shape) * C)``. Where an output can be read both ways, a run on one row decides.
        event_shape: the shape of one value; ``()`` is a single label.

    Raises:
        ValueError: in ``forward``, the network's output has another size.
    """

    def __init__(self, net: nn.Module, event_shape: Sequence[int] = ()) -> None:
        super().__init__(net, () if event_shape is None else event_shape)
        self._flat: tuple[int, bool] | None = None  # the last size of the network's output, and whether that is flat

    def output(self, *parents: Any, **keywords: Any) -> Tensor:
        """Return the logits ``(.., *event_shape, C)``."""
        if len(parents) == 1 and isinstance(parents[0], tuple):  # as subclasses of version 0.1 call it
            parents = parents[0]
        logits = super().output(*parents, **keywords)
        if self.event_shape and self._is_flat(logits, parents, keywords):
            per_event: Tensor = logits.unflatten(-1, (*self.event_shape, -1))
            return per_event
        return logits

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Return the distribution with these logits, flat or shaped; those that can be read both ways are shaped."""
        if self.event_shape and not self._is_shaped(output):
            self._check_flat(output)
            output = output.unflatten(-1, (*self.event_shape, -1))
        return dist.Categorical(logits=output, validate_args=False).to_event(self.event_dim)

    def _is_flat(self, logits: Tensor, parents: tuple[Tensor, ...], keywords: dict[str, Any]) -> bool:
        """Return True if the network's output is flat; if both readings fit, a run on one row decides."""
        last = logits.shape[-1]
        shaped = self._is_shaped(logits)
        if not shaped:
            self._check_flat(logits)
        if not shaped or last % (self.event_shape or Size()).numel():
            self._flat = last, not shaped
        elif self._flat is None or self._flat[0] != last:
            self._flat = last, not all(map(self._is_shaped, self._outputs_of_one_row(parents, keywords)))
        return self._flat[1]

    def _is_shaped(self, logits: Tensor) -> bool:
        """Return True if logits can be read as ``(.., *event_shape, C)``."""
        return logits.shape[-1 - self.event_dim : -1] == self.event_shape

    def _check_flat(self, logits: Tensor) -> None:
        """Raise a ValueError unless logits can be read as ``(.., prod(event_shape) * C)``."""
        event = self.event_shape or Size()
        if logits.shape[-1] % event.numel():
            sizes = ", ".join(map(str, event))
            raise ValueError(
                f"expected logits of shape (..., {sizes}, C) or (..., {event.numel()} * C) from the network, got "
                f"{tuple(logits.shape)}"
            )

    @torch.no_grad()
    def _outputs_of_one_row(self, parents: tuple[Tensor, ...], keywords: dict[str, Any]) -> Iterator[Tensor]:
        """Yield the network's output for one row, for each dimension that may be that of the rows."""
        one_row = {name: take_rows(x, slice(0, 1)) for name, x in keywords.items()}
        for dim in (0, -2):
            if all(parent.dim() > 1 for parent in parents):
                try:
                    yield super().output(*(parent.narrow(dim, 0, 1) for parent in parents), **one_row)
                except (RuntimeError, ValueError):  # no dimension of rows, but one of the parent's own
                    continue


class Poisson(Conditional):
    """Independent counts with the Poisson distribution.

    Args:
        net: a module from the parents to the logarithm of the rate, ``(.., D)`` or ``(.., *event_shape)``.
        event_shape: the shape of one value, or None for one dimension of any size.

    Raises:
        ValueError: in ``forward``, the network's output has another size.
    """

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Return the distribution with log-rates ``(.., D)`` or ``(.., *event_shape)``."""
        (log_rate,) = self._chunk(output, 1)
        return dist.Poisson(log_rate.exp(), validate_args=False).to_event(self.event_dim)


class NegativeBinomial(Conditional):
    r"""Independent overdispersed counts, parameterised by mean and inverse dispersion.

    .. math:: p(x) = \frac{\Gamma(x + r)}{x! \, \Gamma(r)} \Big(\frac{r}{r + \mu}\Big)^r
        \Big(\frac{\mu}{r + \mu}\Big)^x, \quad E x = \mu, \quad Var x = \mu + \mu^2 / r

    Args:
        net: a module from the parents to :math:`\log\mu`, ``(.., D)``; or to :math:`\log\mu` and :math:`\log r`,
            ``(.., 2 * D)``, if ``shared_dispersion`` is false.
        event_shape: the shape of one value, or None for one dimension of any size.
        shared_dispersion: True to make :math:`\log r` a parameter, one per feature, that starts at 0.

    Raises:
        ValueError: the dispersion is shared and there is no ``event_shape``, which gives the number of features.

    References:
        Lopez et al. 2018 (doi:10.1038/s41592-018-0229-2).
    """

    def __init__(
        self, net: nn.Module, event_shape: Sequence[int] | None = None, shared_dispersion: bool = True
    ) -> None:
        super().__init__(net, event_shape)
        check_flag("shared_dispersion", shared_dispersion)
        self.log_inverse_dispersion: nn.Parameter | None = None
        if shared_dispersion:
            if event_shape is None:
                raise ValueError("a shared dispersion, one per feature, needs event_shape, got None")
            self.log_inverse_dispersion = nn.Parameter(torch.zeros(tuple(event_shape)))

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Return the distribution whose log-mean, and log-dispersion unless that is shared, are the output."""
        if self.log_inverse_dispersion is None:
            log_mean, log_r = self._chunk(output, 2)
        else:
            (log_mean,) = self._chunk(output, 1)
            log_r = self.log_inverse_dispersion.to(log_mean.dtype)
        family = dist.NegativeBinomial(log_r.exp(), logits=log_mean - log_r, validate_args=False)
        return family.to_event(self.event_dim)
