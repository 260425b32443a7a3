"""Families of bits, classes and counts."""

from collections.abc import Iterator, Sequence

import pyro.distributions as dist
import torch
from torch import Size, Tensor, nn

from ..utils.arguments import check_flag
from ..utils.network_calls import Output
from .base import Conditional


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
    """A class label, or an array of them.

    Args:
        net: gives logits of shape ``(..., *event_shape, C)``, or flat ones ``(..., prod(event_shape) * C)``.
        event_shape: the shape of one value; ``()`` is a single label.

    Raises:
        ValueError: in ``forward``, the network's output does not fit.
    """

    def __init__(self, net: nn.Module, event_shape: Sequence[int] = ()) -> None:
        super().__init__(net, () if event_shape is None else event_shape)
        self._flat: tuple[int, bool] | None = None  # the network's last size, and whether its output is flat

    def forward(self, *parents: Tensor) -> dist.TorchDistribution:
        logits, event = self.output(parents), self.event_shape or Size()
        if event and self._is_flat(logits, parents):
            logits = logits.unflatten(-1, (*event, -1))
        return dist.Categorical(logits=logits, validate_args=False).to_event(self.event_dim)

    def _is_flat(self, logits: Tensor, parents: tuple[Tensor, ...]) -> bool:
        """Return whether an output is flat; where both readings fit, a run on one row tells them apart."""
        last, event = logits.shape[-1], self.event_shape or Size()
        shaped = self._is_shaped(logits)
        if not shaped and last % event.numel():
            sizes = ", ".join(map(str, event))
            raise ValueError(
                f"expected logits of shape (..., {sizes}, C) or (..., {event.numel()} * C) from the network, got "
                f"{tuple(logits.shape)}"
            )
        if not shaped or last % event.numel():
            self._flat = last, not shaped
        elif self._flat is None or self._flat[0] != last:
            self._flat = last, not all(map(self._is_shaped, self._of_one_row(parents)))
        return self._flat[1]

    def _is_shaped(self, logits: Tensor) -> bool:
        return logits.shape[-1 - self.event_dim : -1] == self.event_shape

    @torch.no_grad()
    def _of_one_row(self, parents: tuple[Tensor, ...]) -> Iterator[Tensor]:
        """Outputs for parents cut down to one row, of those dimensions that may be the rows'."""
        if isinstance(parents[0], Output):
            return
        for dim in (0, -2):
            if all(parent.dim() > 1 for parent in parents):
                try:
                    yield self.output(tuple(parent.narrow(dim, 0, 1) for parent in parents))
                except (RuntimeError, ValueError):  # no dimension of rows, but one of the parent's own
                    continue


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
        check_flag("shared_dispersion", shared_dispersion)
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
