"""Networks that predict each token of a string from those before it, and from latents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..utils.arguments import check_counts
from .sequences import Recurrence, add_recurrence, attention_layers, first_state, positions


class RecurrentTokens(nn.Module):
    r"""A recurrent network of the next token, for :class:`~pyro_mm.conditionals.Tokens`.

    .. math:: l_t = W h_t, \qquad h_t = \mathrm{GRU}(h_{t-1}, [e(x_{t-1}), z]), \qquad h_0 = \tanh(A z + b)

    with an embedding e, and a learned vector in its place at the first step.

    Args:
        in_features: the size of z.
        vocabulary: the number of tokens V.
        hidden: the size of the state h.
        embedding: the size of e.
        recurrence: ``nn.GRU``, ``nn.LSTM`` or ``nn.RNN``.
        layers: the number of recurrent layers.

    Example:
        >>> z, tokens = torch.zeros(5, 3, 2), torch.zeros(3, 6, dtype=torch.long)
        >>> RecurrentTokens(2, 27)(z, tokens).shape  # 3 rows, of 5 particles; a prediction for one token more
        torch.Size([5, 3, 7, 27])
    """

    def __init__(
        self,
        in_features: int,
        vocabulary: int,
        hidden: int = 64,
        *,
        embedding: int = 32,
        recurrence: Recurrence = nn.GRU,
        layers: int = 1,
    ) -> None:
        super().__init__()
        check_counts(in_features=in_features, vocabulary=vocabulary, hidden=hidden, embedding=embedding, layers=layers)
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.first = nn.Parameter(torch.zeros(embedding))
        self.start = nn.Linear(in_features, hidden * layers)
        self.kind = add_recurrence(self, recurrence, embedding + in_features, hidden, layers)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits of every next token, ``(.., t + 1, V)``: entry i is that given the first i tokens.

        Args:
            parents: z, ``(.., in_features)``.
            tokens: integers ``(.., t)``, whose leading dimensions broadcast with those of the parents.
        """
        x = self._inputs(parents, torch.cat([self._first_for(tokens), self.embedding(tokens)], -2))
        lead = x.shape[:-2]
        network = getattr(self, self.kind)
        start = self.start(parents.to(x.dtype)).expand(*lead, -1).reshape(-1, self.start.out_features)
        states, _ = network(x.reshape(-1, *x.shape[-2:]), first_state(network, start))
        output: Tensor = self.head(states).reshape(*lead, x.shape[-2], -1)
        return output

    def next_logits(self, parents: Tensor, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Return the logits of the token after these, ``(.., V)``, and the state for the call with one token more.

        Args:
            parents: z, ``(.., in_features)``.
            tokens: integers ``(.., t)``, of the same leading dimensions.
            state: of the call with one token less; None with no token.
        """
        last = self.embedding(tokens[..., -1:]) if tokens.shape[-1] else self._first_for(tokens)
        x = self._inputs(parents, last)
        network = getattr(self, self.kind)
        if state is None:
            state = first_state(network, self.start(parents.to(x.dtype)).reshape(-1, self.start.out_features))
        states, state = network(x.reshape(-1, *x.shape[-2:]), state)
        return self.head(states[:, -1]).reshape(*x.shape[:-2], -1), state

    def _first_for(self, tokens: Tensor) -> Tensor:
        """Return the vector in the place of a token before the first one, ``(.., 1, embedding)``."""
        return self.first.expand(*tokens.shape[:-1], 1, -1)

    def _inputs(self, parents: Tensor, embedded: Tensor) -> Tensor:
        """Return the inputs of the steps, ``(.., t, embedding + in_features)``."""
        lead = torch.broadcast_shapes(parents.shape[:-1], embedded.shape[:-2])
        steps = embedded.shape[-2]
        z = parents.to(embedded.dtype)[..., None, :].expand(*lead, steps, -1)
        return torch.cat([embedded.expand(*lead, -1, -1), z], -1)


class AttentionTokens(nn.Module):
    """A network of causal self-attention for the next token, for :class:`~pyro_mm.conditionals.Tokens`.

    An affine map of z stands before the first token. With sinusoidal positions it and the embedded tokens go through
    layers of torch's ``nn.TransformerEncoder`` under a causal mask, normalised before each part.

    Args:
        in_features: the size of z.
        vocabulary: the number of tokens V.
        width: the size of a step within the layers.
        heads: the number of attention heads, which divides ``width``.
        layers: the number of layers.
        dropout: the probability of dropout in the layers, in training mode.

    Raises:
        ValueError: a width that the heads do not divide, or that is odd.

    Example:
        >>> z, tokens = torch.zeros(5, 3, 2), torch.zeros(3, 6, dtype=torch.long)
        >>> AttentionTokens(2, 27)(z, tokens).shape
        torch.Size([5, 3, 7, 27])

    References:
        Vaswani et al. 2017 (arXiv:1706.03762).
    """

    def __init__(
        self,
        in_features: int,
        vocabulary: int,
        width: int = 64,
        *,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_counts(in_features=in_features, vocabulary=vocabulary, width=width, heads=heads, layers=layers)
        self.embedding = nn.Embedding(vocabulary, width)
        self.start = nn.Linear(in_features, width)
        self.layers = attention_layers(width, heads, layers, dropout)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, parents: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits of every next token, ``(.., t + 1, V)``: entry i is that given the first i tokens.

        Args:
            parents: z, ``(.., in_features)``.
            tokens: integers ``(.., t)``, whose leading dimensions broadcast with those of the parents.
        """
        first = self.start(parents.to(self.head.weight.dtype))[..., None, :]
        embedded = self.embedding(tokens)
        lead = torch.broadcast_shapes(first.shape[:-2], embedded.shape[:-2])
        x = torch.cat([first.expand(*lead, -1, -1), embedded.expand(*lead, -1, -1)], -2)
        steps, width = x.shape[-2:]
        x = x.reshape(-1, steps, width) + positions(steps, width, x)
        ahead = torch.ones(steps, steps, dtype=torch.bool, device=x.device).triu(1)
        output: Tensor = self.head(self.layers(x, mask=ahead, is_causal=True)).reshape(*lead, steps, -1)
        return output
