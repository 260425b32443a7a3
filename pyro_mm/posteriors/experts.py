"""Posteriors that combine Gaussian experts into one Gaussian: their product, and the consensus of dependent ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..batch.masks import Presence
from ..conditionals.unconditional import Unconditional
from ..distributions.base import base_distribution, diagonal
from ..distributions.gaussian_experts import STANDARD_NORMAL, consensus_of_normals, product_of_normals
from ..utils.arguments import check_modules, check_number, describe
from .per_set import per_set


class PosteriorOfExperts(nn.Module):
    """A posterior made of one encoder ("expert") per modality.

    Args:
        experts: modality -> module mapping its values ``(N, *event)`` to a distribution of batch shape ``(N,)``.
    """

    def __init__(self, experts: Mapping[str, nn.Module]):
        super().__init__()
        self.experts = nn.ModuleDict(check_modules("experts", experts))

    def encoded(self, batch: Batch) -> tuple[list[Any], list[Presence]]:
        """Encode every modality that the batch holds values of.

        Returns:
            The experts' distributions, and for each the rows in which its modality is present: ``(N,)``, or a bool.

        Raises:
            ValueError: the batch holds values of none of the modalities.
        """
        names = self.names_held(batch)
        if not names:
            raise ValueError(
                f"the batch holds no values of {list(self.experts)}: a batch with all of them missing is made by "
                "Batch.empty(n, like=...), which holds filler"
            )
        encoded = [batch.encode(name, self.experts[name]) for name in names]
        for name, expert in zip(names, encoded, strict=True):
            check_batch_shape(name, expert, batch)
        return encoded, [batch.presence(name) for name in names]

    def parameters_of(self, batch: Batch) -> tuple[list[Tensor], list[Tensor], list[Presence]]:
        """Encode every modality that the batch holds values of by Normal experts.

        Returns:
            Means ``(N, D)``, scales ``(N, D)``, and the rows in which each modality is present.

        Raises:
            TypeError: an expert that is not a diagonal Normal.
            ValueError: experts of unlike event shapes, or no values of any modality.
        """
        experts, masks = self.encoded(batch)
        names = self.names_held(batch)
        for name, expert in zip(names, experts, strict=True):
            if not isinstance(base_distribution(expert), torch.distributions.Normal):
                raise TypeError(
                    f"expert of {name!r}: {type(self).__name__} combines Normal experts, in closed form, and got "
                    f"{family_name(expert)}: use conditionals.Normal, or MixtureOfExperts, which takes Laplace too"
                )
        check_equal_events(type(self).__name__, names, experts)
        locs, scales = zip(*map(diagonal, experts), strict=True)
        return list(locs), list(scales), masks

    def names_held(self, batch: Batch) -> list[str]:
        """Return the modalities that have an expert, and values in the batch."""
        return [name for name in self.experts if batch.holds(name)]


def check_batch_shape(name: str, expert: Any, batch: Batch) -> None:
    """Raise a ValueError unless an expert gave a distribution for each row.

    Args:
        name: its modality.
        expert: the distribution.
        batch: the rows that it encoded.
    """
    found = tuple(getattr(expert, "batch_shape", ()))
    if batch.is_draw(name) or found in ((), (1,), (batch.size,)):
        return
    if not expert.event_shape and found[0] == batch.size:  # independent entries, which become events
        return
    shape = tuple(batch[name].shape)
    raise ValueError(
        f"expert of {name!r}: expected a distribution of batch shape ({batch.size},) from values of shape {shape}, one "
        f"per row, and got batch shape {found} and event shape {tuple(expert.event_shape)}: does its network take "
        "another dimension of the values for that of rows? Give it as many inputs as a value has entries"
    )


class ProductOfExperts(PosteriorOfExperts):
    r"""The normalised product of Gaussian experts and a prior expert: precisions add.

    .. math:: q(z | x_S) \propto p_0(z) \prod_{m \in S} N(z; \mu_m, \sigma_m^2), \qquad
              \sigma^{-2} = \sigma_0^{-2} + \sum_{m \in S} \sigma_m^{-2}, \quad
              \mu = \sigma^2 \Big( \mu_0 \sigma_0^{-2} + \sum_{m \in S} \mu_m \sigma_m^{-2} \Big)

    A missing modality leaves the product. In a row without any, q is the prior expert, or N(0, I) if there is none.

    Args:
        experts: modality -> encoder, a module mapping ``(N, *event)`` to a Normal of event shape ``(D,)``.
        prior: the prior expert :math:`p_0`, a diagonal Normal of event shape ``(D,)``; None leaves it out.

    Raises:
        TypeError: an expert or a prior expert that is not a diagonal Normal.
        ValueError: experts of unlike event shapes.

    Example:
        >>> import torch, pyro_mm as mm
        >>> unit = mm.conditionals.Normal(torch.nn.Identity(), scale=1.0)  # N(x, 1)
        >>> posterior = mm.posteriors.ProductOfExperts({"a": unit, "b": unit})
        >>> values = {"a": torch.tensor([[3.0], [3.0]]), "b": torch.tensor([[6.0], [6.0]])}
        >>> posterior(mm.Batch(values, present={"b": [True, False]})).mean  # (0 + 3 + 6) / 3, and (0 + 3) / 2
        tensor([[3.0000], [1.5000]])

    References:
        Wu & Goodman 2018 (MVAE, arXiv:1802.05335). Without the prior expert: Hwang et al. 2021 (MVTCAE, NeurIPS).
    """

    def __init__(self, experts: Mapping[str, nn.Module], prior: dist.Distribution | None = STANDARD_NORMAL):
        super().__init__(experts)
        self.prior = check_prior_expert(prior)

    def forward(self, batch: Batch) -> dist.Distribution:
        """Return q(z | x_S): a Normal of batch shape ``(N,)`` and event shape ``(D,)``."""
        loc, scale = per_set(batch, self, self._product, search_above=4)
        return dist.Normal(loc, scale, validate_args=False).to_event(1)

    def _product(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return mean and scale of the product, both ``(.., N, D)``."""
        locs, scales, masks = self.parameters_of(batch)
        product = product_of_normals(locs, scales, masks, prior=prior_normal(self.prior, locs[0]))
        return product.loc, product.scale


class DependentExperts(PosteriorOfExperts):
    r"""The consensus of Gaussian experts whose errors are correlated, as those of views of one object are.

    .. math:: \sigma^2 = (1^T S^{-1} 1)^{-1}, \quad \mu = \sigma^2 \, 1^T S^{-1} (\mu_m)_{m \in S}, \qquad
              S_{ml} = \sigma_m \sigma_l (\rho + (1 - \rho) [m = l])

    for each entry of z separately; :math:`\rho = 0` is the product of the experts. There is no prior expert. A missing
    modality leaves S, and in a row without any, q is N(0, I).

    Args:
        experts: modality -> encoder, a module mapping ``(N, *event)`` to a Normal of event shape ``(D,)``.
        correlation: :math:`\rho`, above -1 / (M - 1) and below 1.

    Raises:
        TypeError: an expert that is not a diagonal Normal.
        ValueError: a correlation outside of that range, or experts of unlike event shapes.

    Example:
        >>> import torch, pyro_mm as mm
        >>> unit = mm.conditionals.Normal(torch.nn.Identity(), scale=1.0)  # N(x, 1)
        >>> posterior = mm.posteriors.DependentExperts({"a": unit, "b": unit}, correlation=0.5)
        >>> q = posterior(mm.Batch({"a": torch.tensor([[3.0]]), "b": torch.tensor([[5.0]])}))
        >>> q.mean, q.variance  # the product of the two would have the variance 0.5
        (tensor([[4.]]), tensor([[0.7500]]))

    References:
        Mancisidor et al. 2025 (CoDE-VAE, arXiv:2505.01134).
    """

    def __init__(self, experts: Mapping[str, nn.Module], correlation: float):
        super().__init__(experts)
        low = -1 / (len(experts) - 1) if len(experts) > 1 else None
        self.correlation = check_number("correlation", correlation, above=low, below=1)

    def forward(self, batch: Batch) -> dist.Distribution:
        """Return q(z | x_S): a Normal of batch shape ``(N,)`` and event shape ``(D,)``."""
        return consensus_of_normals(*self.parameters_of(batch), correlation=self.correlation).to_event(1)


def check_equal_events(owner: str, names: Sequence[str], experts: Sequence[Any]) -> None:
    """Check that experts are on one latent: their tensors would broadcast against each other silently.

    Args:
        owner: the name of the posterior, for the message.
        names: modalities.
        experts: the distribution of each. The event of a Categorical counts as its number of classes.

    Raises:
        ValueError: the event shapes differ. The message names each modality and its shape.
    """
    shapes = [_event_and_last_size(expert) for expert in experts]
    if all(shape == shapes[0] for shape in shapes):
        return
    if all(isinstance(expert, torch.distributions.Categorical) for expert in experts):
        sizes = ", ".join(f"{name!r} {last}" for name, (_, last) in zip(names, shapes, strict=True))
        raise ValueError(f"{owner}: expected experts on one number of classes, got {sizes}")
    if len({event for event, _ in shapes}) > 1:
        listed = ", ".join(f"{name!r} {event}" for name, (event, _) in zip(names, shapes, strict=True))
    else:  # experts without event dimensions, which differ at the end of their batch shapes
        listed = ", ".join(
            f"{name!r} {tuple(expert.batch_shape)} of the batch" for name, expert in zip(names, experts, strict=True)
        )
    raise ValueError(
        f"{owner}: expected experts of one event shape, got {listed}. All are on the same latent: give their "
        "encoders the same number of outputs"
    )


def check_prior_expert(prior: Any) -> Unconditional | None:
    """Return a prior expert as a module, None for none. Raises a TypeError unless it is a diagonal Normal."""
    if prior is None:
        return None
    if not isinstance(prior, torch.distributions.Distribution) or not isinstance(
        base_distribution(prior), torch.distributions.Normal
    ):
        raise TypeError(f"expected prior to be a diagonal Normal or None, got {family_name(prior)}")
    return Unconditional(prior)


def prior_normal(prior: Unconditional | None, loc: Tensor) -> dist.Distribution | None:
    """Return a prior expert as a Normal without event dimensions, ``STANDARD_NORMAL`` as it is, and None for none.

    Args:
        prior: the module of :func:`check_prior_expert`.
        loc: the mean of an expert, ``(.., N, D)``.

    Raises:
        ValueError: a prior of another size than D.
    """
    if prior is None or prior() is STANDARD_NORMAL:
        return None if prior is None else STANDARD_NORMAL
    normal = dist.Normal(*diagonal(prior()))
    if normal.batch_shape[-1:] not in ((), (1,), loc.shape[-1:]):
        raise ValueError(
            f"expected a prior expert of the experts' event shape {tuple(loc.shape[-1:])}, got "
            f"{tuple(normal.batch_shape[-1:])}"
        )
    return normal


def family_name(d: Any) -> str:
    """Return the name of a distribution's family; a description of anything that is not a distribution."""
    return type(base_distribution(d)).__name__ if isinstance(d, torch.distributions.Distribution) else describe(d)


def _event_and_last_size(d: Any) -> tuple[tuple[int, ...], int | None]:
    """Return the event shape of a distribution, and the last size of its parameters, None for a scalar."""
    if isinstance(d, torch.distributions.Categorical):
        return (), d.logits.shape[-1]
    shape = tuple(d.batch_shape) + tuple(d.event_shape)
    return tuple(d.event_shape), shape[-1] if shape else None
