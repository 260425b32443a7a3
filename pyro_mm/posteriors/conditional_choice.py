"""Posteriors that choose between distributions by the modalities that are present."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..batch.masks import any_of
from ..conditionals.unconditional import as_module
from ..distributions.where import Where
from ..utils.arguments import check_function, check_mapping, check_modules, check_names


class Either(nn.Module):
    r"""The encoder of the one modality, out of two, that is present; for families without a product, such as flows.

    .. math:: q(z | x_S) = q_1(z | x_1) \text{ if } 1 \in S, \quad \text{else } q_2(z | x_2) \text{ if } 2 \in S, \quad
              \text{else } N(z; 0, I)

    Given several of three or more modalities, a posterior has to combine experts, and flows have no product or pool in
    closed form: hence two at most. It is meant for the ``partial`` of a :class:`JointEncoder`, which itself encodes the
    rows with both modalities; here those get the first encoder's distribution.

    Args:
        experts: modality -> encoder, a module mapping ``(N, *event)`` to any distribution of event shape ``(D,)``.

    Raises:
        TypeError: an expert that is not a module.
        ValueError: no experts, or more than two.

    Example:
        >>> import torch, pyro_mm as mm
        >>> encoders = {"a": mm.conditionals.Normal(mm.nn.MLP(3, 4)), "b": mm.conditionals.Laplace(mm.nn.MLP(2, 4))}
        >>> posterior = mm.posteriors.Either(encoders)
        >>> batch = mm.Batch({"a": torch.zeros(5, 3), "b": torch.zeros(5, 2)})
        >>> posterior(batch.only("b")).base_dist
        Laplace(loc: torch.Size([5, 2]), scale: torch.Size([5, 2]))
    """

    def __init__(self, experts: Mapping[str, nn.Module]):
        super().__init__()
        if not 1 <= len(check_mapping("experts", experts, "modules")) <= 2:
            raise ValueError(
                f"expected encoders of one modality or two, got {list(experts)}: with more of them a row may have "
                "several, whose experts have to be pooled. Give each subset a posterior, or use Normal experts"
            )
        self.experts = nn.ModuleDict(check_modules("experts", experts))

    def forward(self, batch: Batch) -> dist.Distribution:
        """Return q(z | x_S): batch shape ``(N,)``, event shape ``(D,)``."""
        names = [name for name in self.experts if batch.holds(name)]
        if not names:
            raise ValueError(
                f"the batch holds no values of {list(self.experts)}: a batch with all of them missing is made by "
                "Batch.empty(n, like=...), which holds filler"
            )
        experts = {name: batch.encode(name, self.experts[name]) for name in names}
        posterior = self._standard_normal(experts[names[0]])
        for name in reversed(names):
            mask = batch.presence(name)
            if mask is not False:
                posterior = Where(mask, experts[name], posterior) if isinstance(mask, Tensor) else experts[name]
        return posterior

    def _standard_normal(self, like: dist.Distribution) -> dist.Distribution:
        """Return N(0, I) of the shapes of another distribution, in the type of the experts' parameters."""
        shape = like.batch_shape + like.event_shape
        parameter = next(self.parameters())
        normal = dist.Normal(parameter.new_zeros(shape), parameter.new_ones(shape), validate_args=False)
        return normal.to_event(like.event_dim)


class Given(nn.Module):
    r"""A posterior where certain modalities are present, and a fixed distribution elsewhere.

    .. math:: q(z | x_S) = q'(z | x_S) \text{ if } S \cap names \neq \emptyset, \quad \text{else } p(z)

    If the other modalities inform on z only together with those, as a class informs on the rest of what an image
    shows, then p(z) is the exact posterior given the others alone.

    Args:
        names: modalities, one of which has to be present for :math:`q'`.
        posterior: :math:`q'`, a module ``batch -> distribution`` of event shape ``(D,)``.
        otherwise: p(z), a distribution of event shape ``(D,)`` or a module ``batch -> distribution``.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no names; or a batch that knows none of them.

    Example:
        >>> import torch, pyro_mm as mm, pyro.distributions as dist
        >>> unit = mm.conditionals.Normal(torch.nn.Identity(), scale=0.5)  # N(x, 0.25)
        >>> image = mm.posteriors.ProductOfExperts({"image": unit}, prior=None)
        >>> posterior = mm.posteriors.Given("image", image, dist.Normal(torch.zeros(1), 1.0).to_event(1))
        >>> values = {"image": torch.tensor([[3.0], [3.0]]), "label": torch.tensor([0, 1])}
        >>> posterior(mm.Batch(values, present={"image": [True, False]})).mean
        tensor([[3.],
                [0.]])
    """

    def __init__(self, names: Sequence[str] | str, posterior: nn.Module, otherwise: dist.Distribution | nn.Module):
        super().__init__()
        self.names = check_names("names", names, least=1)
        self.posterior = check_function("posterior", posterior, ("batch",))
        self.otherwise = as_module("otherwise", otherwise)

    def forward(self, batch: Batch) -> dist.Distribution:
        """Return q(z | x_S): batch shape ``(N,)``, event shape ``(D,)``."""
        if not any(name in batch for name in self.names):
            raise ValueError(f"the batch has none of {list(self.names)} among its modalities {list(batch)}")
        informed = any_of(batch.presence(name) for name in self.names)
        otherwise = self.otherwise(batch)
        if informed is False:
            return otherwise.expand(torch.Size([batch.size]))
        posterior = self.posterior(batch)
        return Where(informed, posterior, otherwise) if isinstance(informed, Tensor) else posterior
