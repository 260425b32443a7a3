"""Posteriors of the set of present modalities: features summed, or summed after self-attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn

from ..batch.batch import Batch
from ..batch.masks import Presence
from ..utils.arguments import check_flag, check_head, check_integer, check_module, check_modules
from ..utils.network_calls import ROWS, is_composition, runs_in_blocks
from ..utils.network_keywords import call_network
from .per_set import per_set, per_view


class SumPooling(nn.Module):
    r"""One network on the sum of the features of the present modalities, whatever their order.

    .. math:: q(z | x_S) = \rho\Big( \sum_{m \in S} g_m(x_m) \Big), \qquad q(z | \emptyset) = \rho(0)

    A missing modality leaves the sum; the posterior given nothing is learned like any other. Every such function of a
    set is a network on a sum of features, if these are wide enough (Zaheer et al. 2017, Deep Sets, arXiv:1703.06114).

    Args:
        features: modality -> module mapping ``(N, *event)`` to a feature ``(N, size)``. A network that all modalities
            share goes to the end of each.
        head: :math:`\rho`, a module mapping ``(.., N, size)`` to a distribution of event shape ``(D,)``, such as
            ``conditionals.Normal(MLP(size, 2 * D))`` or ``conditionals.NormalMixture(MLP(..), K)``. If its signature
            has a parameter ``covariates``, it gets these by keyword.
        size: of a feature.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no features; or, when called, features of another size.

    Example:
        >>> import torch, pyro_mm as mm
        >>> head = mm.conditionals.Normal(mm.nn.MLP(8, 2 * 2))
        >>> posterior = mm.posteriors.SumPooling({"a": mm.nn.MLP(3, 8), "b": torch.nn.Embedding(10, 8)}, head, size=8)
        >>> q = posterior(mm.Batch({"a": torch.zeros(5, 3), "b": torch.zeros(5).long()}))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([2]))

    References:
        Hirt et al. 2024 (arXiv:2309.00380), section 3.
    """

    def __init__(self, features: Mapping[str, nn.Module], head: nn.Module, size: int):
        super().__init__()
        self.features = nn.ModuleDict(check_modules("features", features))
        self.head = check_head("head", check_module("head", head))
        self.size = check_integer("size", size, least=1)

    def forward(self, batch: Batch) -> dist.Distribution:
        """Return q(z | x_S): the head's distribution, of batch shape ``(N,)``."""
        return apply_head(self.head, batch, self, self.pooled)

    def pooled(self, batch: Batch) -> Tensor:
        """Return the sum of the tokens of the present modalities, ``(.., N, size)``."""
        return self.of_set(batch)[1]

    def of_set(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Return the tokens of the modalities that any row has, and their sum, cached per set.

        Args:
            batch: the rows.

        Returns:
            Modality -> token ``(.., N, size)``, 0 where it is missing; and the sum, ``(.., N, size)``.
        """
        return per_view(batch, self, self._compute_set)

    def _compute_set(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Compute what :meth:`of_set` returns."""
        masks = {n: m for n in self.features if batch.holds(n) and (m := batch.presence(n)) is not False}
        tokens = {name: batch.encode(name, self.features[name]) for name in masks}
        for name, token in tokens.items():
            if token.shape[-1] != self.size:
                raise ValueError(f"expected features of size {self.size}, got {token.shape[-1]} of {name!r}")
        tokens = self._process_tokens(tokens, masks)

        like = next(iter(self.head.parameters()), None)
        dtype = None if like is None else like.dtype
        total = torch.zeros(batch.size, self.size, dtype=dtype, device=batch.device)
        for token in tokens.values():
            total = total + token
        return tokens, total

    def _process_tokens(self, tokens: dict[str, Tensor], masks: Mapping[str, Presence]) -> dict[str, Tensor]:
        """Return tokens ``(.., N, size)`` with zeros where their modality is missing."""
        return {name: zero_where_missing(masks[name], token) for name, token in tokens.items()}


class SelfAttention(SumPooling):
    r"""One network on the sum of the features of the present modalities, after these attended to each other.

    .. math:: H^{l+1} = H^l + \mathrm{attention}(\mathrm{LN}(H^l)), \qquad
              q(z | x_S) = \rho\Big( \sum_{m \in S} \mathrm{LN}(H^L)_m \Big), \qquad H^0_m = g_m(x_m)

    Multi-head attention, scaled by the root of a head's size. A missing modality is excluded as query and as key. The
    cost grows with the square of the number of modalities, that of the encoders linearly.

    Args:
        features: as in :class:`SumPooling`.
        head: as in :class:`SumPooling`.
        size: of a feature.
        heads: number of attention heads, a divisor of ``size``.
        layers: number of layers L.
        normalized: False leaves out the last LN, which gives all tokens one norm, however much their modality informs.
            Without it, a posterior whose mean is a sum, such as that of a linear story, is learned faster.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a size that the heads do not divide; or, when called, features of another size.

    Example:
        >>> import torch, pyro_mm as mm
        >>> head = mm.conditionals.NormalMixture(mm.nn.MLP(8, 2 + 2 * 2 * 3), 2)  # two components, D = 3
        >>> posterior = mm.posteriors.SelfAttention({"a": mm.nn.MLP(3, 8), "b": mm.nn.MLP(2, 8)}, head, size=8, heads=2)
        >>> q = posterior(mm.Batch({"a": torch.zeros(5, 3), "b": torch.zeros(5, 2)}))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([3]))

    References:
        Lee et al. 2019 (Set Transformer, arXiv:1810.00825); Hirt et al. 2024 (arXiv:2309.00380), section 3.
    """

    def __init__(
        self,
        features: Mapping[str, nn.Module],
        head: nn.Module,
        size: int,
        heads: int = 4,
        layers: int = 1,
        normalized: bool = True,
    ):
        super().__init__(features, head, size)
        check_integer("layers", layers, least=0)
        check_flag("normalized", normalized)
        if size % check_integer("heads", heads, least=1):
            raise ValueError(f"{heads} heads cannot share features of size {size}: it has to be a multiple")
        self.attention = nn.ModuleList(AttentionLayer(size, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(size) if normalized else nn.Identity()

    def _process_tokens(self, tokens: dict[str, Tensor], masks: Mapping[str, Presence]) -> dict[str, Tensor]:
        """Return tokens ``(.., N, size)`` after attention, with zeros where their modality is missing."""
        if not tokens:
            return {}
        tensor_masks = [mask for mask in masks.values() if isinstance(mask, Tensor)]
        batch_shape = broadcast_shape(*(m.shape for m in tensor_masks), *(t.shape[:-1] for t in tokens.values()))
        states = torch.stack([token.expand(*batch_shape, self.size) for token in tokens.values()], -2)
        may_attend = None  # True where query i may attend to key j: (.., N, 1, M, M), the 1 for the heads
        if tensor_masks:
            present = states.new_ones(batch_shape).bool()
            full = [mask.expand(batch_shape) if isinstance(mask, Tensor) else present for mask in masks.values()]
            # a missing modality attends to itself only, since a softmax over nothing has no derivative
            itself = torch.eye(len(masks), dtype=torch.bool, device=states.device)
            may_attend = (torch.stack(full, -1)[..., None, :] | itself)[..., None, :, :]
        for layer in self.attention:
            states = layer(states, may_attend)
        return {
            name: zero_where_missing(masks[name], token)
            for name, token in zip(tokens, self.norm(states).unbind(-2), strict=True)
        }


class AttentionLayer(nn.Module):
    """Multi-head self-attention between modalities, with a layer norm before and a residual connection.

    Args:
        size: size of a token.
        heads: number of attention heads, a divisor of ``size``.
    """

    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(size)
        self.inward = nn.Linear(size, 3 * size)
        self.outward = nn.Linear(size, size)

    def forward(self, states: Tensor, may_attend: Tensor | None) -> Tensor:
        """Return the states after one layer, ``(.., M, size)``.

        Args:
            states: of M modalities, ``(.., M, size)``.
            may_attend: booleans that broadcast with ``(.., heads, M, M)``: True at [i, j] if query i may attend to key
                j; None for all.
        """
        projections = self.inward(self.norm(states)).unflatten(-1, (3, self.heads, -1))  # (.., M, 3, heads, size/heads)
        query, key, value = projections.movedim(-2, -4).unbind(-2)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, may_attend)
        output: Tensor = states + self.outward(attended.movedim(-3, -2).flatten(-2))
        return output


def zero_where_missing(mask: Presence, x: Tensor) -> Tensor:
    """Return ``x`` with zeros in the rows where a mask is False; as it is if the mask is a bool.

    Args:
        mask: booleans ``(.., N)``, or a bool.
        x: ``(.., N, F)``.
    """
    return torch.where(mask[..., None], x, torch.zeros_like(x)) if isinstance(mask, Tensor) else x


def _output(head: Any, batch: Batch, state: Callable[[Batch], Tensor]) -> Tensor:
    """Return the output of a head's network, which gets the covariates that it asks for."""
    output: Tensor = head.output(state(batch), **batch.head_keywords(head))
    return output


def apply_head(head: Any, batch: Batch, owner: nn.Module, state: Callable[[Batch], Tensor]) -> dist.Distribution:
    """Return the head's distribution of a state, with its network run once per step for every set of modalities.

    Args:
        head: module mapping ``(.., N, H)`` to a distribution.
        batch: the rows.
        owner: the posterior that results are cached for.
        state: returns the input of the head for a batch, ``(.., N, H)``.
    """
    if not is_composition(head):
        return call_network(head, (state(batch),), batch.head_keywords(head))
    if runs_in_blocks(owner, batch.size) and batch.is_plain:
        blocks = [batch[start : start + ROWS] for start in range(0, batch.size, ROWS)]
        return head.distribution(torch.cat([_output(head, block, state) for block in blocks], -2))
    (output,) = per_set(batch, owner, lambda some: (_output(head, some, state),))
    return head.distribution(output)
