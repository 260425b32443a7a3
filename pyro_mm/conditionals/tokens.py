"""The family of strings of tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import broadcast_shape
from torch import Tensor, nn

from ..distributions.token_sequence import TokenSequence
from ..utils.arguments import check_integer
from ..utils.network_keywords import call_network, keywords_of
from .base import Conditional


class Tokens(Conditional):
    r"""Strings of up to T tokens from a vocabulary of V, each drawn given those before it.

    .. math:: p(x | parents) = \prod_{t < n} \pi_{x_t}(x_{<t}, parents)

    with n the length of the string. The modality's values are integers ``(N, T)``; the lengths n come from the batch.
    Without an end token, p is that of the tokens given their number. With one, a string ends with it, it counts as one
    of the n tokens, and the probabilities of all strings sum to 1: those that end, and those of T tokens that do not.
    The lengths of the batch may then be left out. Draws stop at the end token, or without one after the row's length.

    Args:
        net: a module ``(parents, tokens) -> logits``, such as :class:`~pyro_mm.nn.RecurrentTokens`: from the parents
            ``(.., N, F)`` and t tokens ``(.., N, t)`` the logits of every next token, ``(.., N, t + 1, V)``, the first
            of them before any token. A parameter ``covariates`` or ``lengths`` gets these of the batch.
        steps: T, the size of the values' last dimension.
        end: the token that ends a string; None if strings do not say where they end.

    Raises:
        TypeError, ValueError: T is no positive integer, or the end token is none of 0, 1, ...

    Example:
        >>> import torch, pyro_mm as mm
        >>> word = Tokens(mm.nn.RecurrentTokens(2, 27), steps=6, end=0)
        >>> tokens, _ = mm.datasets.words(torch.tensor([2, 7, 0]))
        >>> word(torch.zeros(5, 3, 2)).log_prob(tokens).shape
        torch.Size([5, 3])

    References:
        Bowman et al. 2016 (arXiv:1511.06349).
    """

    def __init__(self, net: nn.Module, steps: int, end: int | None = None) -> None:
        super().__init__(net, (check_integer("steps", steps, least=1),))
        self.end = None if end is None else check_integer("end", end, least=0)

    def forward(  # type: ignore[override]
        self, *parents: Tensor, lengths: Tensor | None = None, covariates: Any = None
    ) -> dist.TorchDistribution:
        """Return the distribution of strings given the parents.

        Args:
            parents: tensors ``(.., N, F_i)``.
            lengths: numbers of tokens, ``(N,)``; None for the place of the end token, or T.
            covariates: of the batch, for a network that asks for them.
        """
        given = {"lengths": lengths, "covariates": covariates}
        asked = {keyword.name for keyword in keywords_of(self.net)}
        keywords = {name: value for name, value in given.items() if name in asked and value is not None}
        return self._sequence(self.output(*parents), lengths, keywords)

    def output(self, *parents: Any, **keywords: Any) -> Tensor:
        """Return the parents side by side, ``(.., N, F)``, from which the network predicts token by token."""
        lead = broadcast_shape(*(parent.shape[:-1] for parent in parents))
        return torch.cat([parent.expand(*lead, parent.shape[-1]) for parent in parents], -1)

    def distribution(self, output: Tensor) -> dist.TorchDistribution:
        """Return the distribution of strings given the parents side by side, without lengths."""
        return self._sequence(output, None, {})

    def _sequence(self, parents: Tensor, lengths: Tensor | None, keywords: dict[str, Any]) -> TokenSequence:
        assert self.event_shape is not None

        network = _NextToken(self.net, keywords) if keywords else self.net
        return TokenSequence(network, parents, self.event_shape[0], self.end, lengths)


class _NextToken:
    """A network of the next token, with keywords that it is called by."""

    def __init__(self, net: Callable[..., Any], keywords: dict[str, Any]) -> None:
        self.net = net
        self.keywords = keywords

    def __call__(self, parents: Tensor, tokens: Tensor) -> Any:
        return call_network(self.net, (parents, tokens), self.keywords)
