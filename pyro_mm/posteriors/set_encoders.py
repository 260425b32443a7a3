"""Posteriors that see the features of the present modalities as a set: pooled by a sum, or after self-attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn

from ..batch.batch import Batch
from ..batch.masks import Presence
from ..utils.arguments import (
    check_flag,
    check_integer,
    check_module,
    check_modules,
)
from ..utils.network_calls import ROWS, is_composition, runs_in_blocks
from .per_set import per_set, per_view


class SumPooling(nn.Module):
    r"""One network on the sum of the features of what is present: the order of the modalities is lost.

    .. math:: q(z | x_S) = \rho\Big( \sum_{m \in S} g_m(x_m) \Big), \qquad q(z | \emptyset) = \rho(0)

    so that the posterior given nothing is learned like any other. Every such function of a set is a sum of features
    followed by a network, if the features are wide enough (Zaheer et al. 2017, Deep Sets, arXiv:1703.06114).

    Args:
        features: modality -> module mapping its values to a feature ``(N, size)``. A network that all share goes to
            the end of each of them.
        head: :math:`\rho`, a module mapping ``(.., N, size)`` to a distribution, such as
            ``conditionals.Normal(MLP(size, 2 * D))`` or ``conditionals.NormalMixture(MLP(..), K)``.
        size: of a feature.

    Hirt et al. 2024 (arXiv:2309.00380), section 3.
    """

    def __init__(self, features: Mapping[str, nn.Module], head: nn.Module, size: int):
        super().__init__()
        self.features = nn.ModuleDict(check_modules("features", features))
        self.head = check_module("head", head)
        self.size = check_integer("size", size, least=1)

    def forward(self, batch: Batch) -> dist.Distribution:
        return apply_head(self.head, batch, self, self.pooled)

    def pooled(self, batch: Batch) -> Tensor:
        """The sum of the tokens of what is present, ``(.., N, size)``."""
        return self.of_set(batch)[1]

    def of_set(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Modality -> its token, 0 where it is absent, of those that any row has; and the tokens' sum."""
        return per_view(batch, self, self._of_set)

    def _of_set(self, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        like = next(iter(self.head.parameters()), None)
        zero = torch.zeros(batch.size, self.size, dtype=None if like is None else like.dtype, device=batch.device)
        masks = {n: m for n in self.features if batch.holds(n) and (m := batch.presence(n)) is not False}
        tokens = {n: batch.encode(n, self.features[n]) for n in masks}
        for name, token in tokens.items():
            if token.shape[-1] != self.size:
                raise ValueError(f"expected features of size {self.size}, got {token.shape[-1]} of {name!r}")
        tokens = self._seen(tokens, masks)
        total = zero
        for token in tokens.values():
            total = total + token
        return tokens, total

    def _seen(self, tokens: dict[str, Tensor], masks: Mapping[str, Presence]) -> dict[str, Tensor]:
        return {name: zero_where_missing(masks[name], token) for name, token in tokens.items()}


class SelfAttention(SumPooling):
    r"""The features of what is present, after they have attended to each other; then as :class:`SumPooling`.

    .. math:: H^{l+1} = H^l + \mathrm{attention}(\mathrm{LN}(H^l)), \qquad
              q(z | x_S) = \rho\Big( \sum_{m \in S} \mathrm{LN}(H^L)_m \Big), \qquad H^0_m = g_m(x_m)

    Attention is of several heads, scaled by the root of their size; an absent modality is neither asked nor answers.
    Its cost grows with the square of the number of modalities, that of the encoders with the number itself.

    Args:
        features, head, size: as of :class:`SumPooling`.
        heads: of the attention; divides the size.
        layers: L.
        normalized: False leaves out the last LN, which gives all tokens one size, as large for what says little as for
            what says much. A posterior whose mean is a sum, as of a linear story, is learned sooner without it.

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

    def _seen(self, tokens: dict[str, Tensor], masks: Mapping[str, Presence]) -> dict[str, Tensor]:
        if not tokens:
            return {}
        tensors = [m for m in masks.values() if isinstance(m, Tensor)]
        lead = broadcast_shape(*(m.shape for m in tensors), *(t.shape[:-1] for t in tokens.values()))
        states = torch.stack([token.expand(*lead, self.size) for token in tokens.values()], -2)
        answers = None  # which modality may look at which: (.., N, 1, M, M), the 1 for the heads
        if tensors:
            full = [m.expand(lead) if isinstance(m, Tensor) else states.new_ones(lead).bool() for m in masks.values()]
            # an absent one looks at itself, for nothing else: a softmax over nothing has no derivative
            itself = torch.eye(len(masks), dtype=torch.bool, device=states.device)
            answers = (torch.stack(full, -1)[..., None, :] | itself)[..., None, :, :]
        for layer in self.attention:
            states = layer(states, answers)
        return {
            name: zero_where_missing(masks[name], token)
            for name, token in zip(tokens, self.norm(states).unbind(-2), strict=True)
        }


class AttentionLayer(nn.Module):
    def __init__(self, size: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, nn.LayerNorm(size)
        self.inward, self.outward = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, states: Tensor, answers: Tensor | None) -> Tensor:
        """States ``(.., M, size)``; ``answers[.., i, j]`` says whether i may look at j."""
        parts = self.inward(self.norm(states)).unflatten(-1, (3, self.heads, -1))  # (.., M, 3, heads, size / heads)
        query, key, value = parts.movedim(-2, -4).unbind(-2)
        seen = nn.functional.scaled_dot_product_attention(query, key, value, answers)
        return states + self.outward(seen.movedim(-3, -2).flatten(-2))


def zero_where_missing(mask: Presence, x: Tensor) -> Tensor:
    return torch.where(mask[..., None], x, torch.zeros_like(x)) if isinstance(mask, Tensor) else x


def apply_head(head: Any, batch: Batch, owner: nn.Module, state: Callable[[Batch], Tensor]) -> dist.Distribution:
    """The head of a set's state, its network run once a step for every set."""
    if not is_composition(head):
        return head(state(batch))
    if runs_in_blocks(owner, batch.size) and batch.is_plain:
        starts = range(0, batch.size, ROWS)
        parts = [head.output(state(batch[start : start + ROWS])) for start in starts]
        return head.distribution(torch.cat(parts, -2))
    (output,) = per_set(batch, owner, lambda some: (head.output(state(some)),))
    return head.distribution(output)
