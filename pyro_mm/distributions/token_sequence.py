"""Strings of tokens, each drawn given those before it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.util import broadcast_shape
from torch import Size, Tensor, nn
from torch.distributions import constraints

from .base import gumbel

NextToken = Callable[[Tensor, Tensor], Tensor]  # (parents, t tokens) -> logits of tokens 0 to t


class TokenSequence(TorchDistribution):
    r"""A distribution of strings of tokens, :math:`p(x) = \prod_{t < n} p(x_t | x_{<t}, z)`.

    The number n of tokens that count is that before the end: of ``lengths`` if they are given, else up to the first end
    token, which counts, else T. With an end token, a string that goes on behind it has probability 0, and so has one of
    fewer than T tokens that lacks it: the probabilities of all strings sum to 1.

    Args:
        network: ``(parents, tokens) -> logits``: from tokens ``(.., t)`` the logits of every next one,
            ``(.., t + 1, V)``. If it has a method ``next_logits(parents, tokens, state) -> (logits, state)``, draws use
            it.
        parents: z, ``(.., N, F)``.
        steps: T, the most tokens of a string.
        end: the token that ends a string; None if strings do not say where they end.
        lengths: ``(N,)``, the numbers of tokens; None if they are not given.
    """

    arg_constraints: dict[str, constraints.Constraint] = {}
    has_rsample = False
    scores_classes = True  # values are not to be converted to floats

    def __init__(
        self, network: NextToken, parents: Tensor, steps: int, end: int | None = None, lengths: Tensor | None = None
    ) -> None:
        self.network = network
        self.parents = parents
        self.end = end
        self.lengths = lengths
        batch_shape = parents.shape[:-1]
        if lengths is not None:
            batch_shape = broadcast_shape(batch_shape, lengths.shape)
        super().__init__(Size(batch_shape), Size([steps]), validate_args=False)

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        new = copy.copy(self)
        new._batch_shape = Size(batch_shape)
        new.parents = self.parents.expand(*batch_shape, self.parents.shape[-1])
        return new

    @constraints.dependent_property(event_dim=1, is_discrete=True)
    def support(self) -> constraints.Constraint:
        parents = self.parents.reshape(-1, self.parents.shape[-1])[:1]
        with torch.no_grad():
            logits = self.network(parents, torch.zeros(1, 0, dtype=torch.long, device=parents.device))
        return constraints.independent(constraints.integer_interval(0, logits.shape[-1] - 1), 1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-probabilities of strings ``(.., T)``; anything may stand behind the end of a string."""
        value = value.long()
        valid = self.valid(value)
        tokens = torch.where(valid, value, 0)
        logits = self.logits(tokens[..., :-1])
        shape = logits.shape[:-1]
        each = nn.functional.cross_entropy(
            logits.reshape(-1, logits.shape[-1]), tokens.expand(shape).reshape(-1), reduction="none"
        )
        total = torch.where(valid, -each.reshape(shape), 0.0).sum(-1)
        if self.end is None:
            return total
        return torch.where(is_string(value, valid, self.end), total, -torch.inf)

    def logits(self, tokens: Tensor) -> Tensor:
        """Return the logits of every next token, ``(.., t + 1, V)``, given t tokens ``(.., t)``.

        Raises:
            ValueError: the network returns another shape.
        """
        logits = self.network(self.parents, tokens)
        steps = tokens.shape[-1] + 1
        if logits.dim() < 2 or logits.shape[-2] != steps:
            raise ValueError(
                f"expected logits of shape (.., {steps}, V) from the network of {steps - 1} tokens, one more than "
                f"these, got {tuple(logits.shape)}"
            )
        if self.end is not None and self.end >= logits.shape[-1]:
            raise ValueError(f"the end token {self.end} is none of the {logits.shape[-1]} tokens of the network")
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def valid(self, value: Tensor) -> Tensor:
        """Return the tokens of strings ``(.., T)`` that count, boolean ``(.., T)``."""
        if self.lengths is not None:
            return torch.arange(self.event_shape[0], device=value.device) < self.lengths[..., None]
        if self.end is None:
            return torch.ones_like(value, dtype=torch.bool)
        return ends_before(value, self.end) == 0

    def lengths_of(self, value: Tensor) -> Tensor:
        """Return the numbers of tokens of draws ``(.., T)``, the end token being one of them: integers ``(..)``."""
        valid = self.valid(value) if self.end is None else ends_before(value, self.end) == 0
        return valid.expand(value.shape).sum(-1)

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw strings ``(*sample_shape, .., T)``, which stop at the end token, or without one after their length.

        What lies behind is the end token, or 0 without one.
        """
        parents = self.parents.expand(*sample_shape, *self.batch_shape, self.parents.shape[-1])
        lead = parents.shape[:-1]
        stepwise = getattr(self.network, "next_logits", None)
        tokens = torch.zeros(*lead, 0, dtype=torch.long, device=parents.device)
        going = torch.ones(lead, dtype=torch.bool, device=parents.device)
        state = None
        for _ in range(self.event_shape[0]):
            if stepwise is None:
                logits = self.network(parents, tokens)[..., -1, :]
            else:
                logits, state = stepwise(parents, tokens, state)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            token = (logits + gumbel(torch.rand_like(logits))).argmax(-1)
            if self.end is not None:
                token = torch.where(going, token, self.end)
                going = going & (token != self.end)
            tokens = torch.cat([tokens, token[..., None]], -1)
        return tokens if self.end is not None else torch.where(self.valid(tokens), tokens, 0)

    def reads_ahead(self) -> bool:
        """Return True if the network predicts a token from that token or a later one, by a trial on one string."""
        steps = self.event_shape[0]
        parents = self.parents.reshape(-1, self.parents.shape[-1])[:1]
        zeros = torch.zeros(1, steps - 1, dtype=torch.long, device=parents.device)
        with torch.no_grad():
            whole = self.network(parents, zeros)
            if whole.shape[-1] < 2:
                return False
            for t in range(steps - 1):
                changed = zeros.clone()
                changed[:, t:] = 1
                before = self.network(parents, changed)[..., : t + 1, :]
                if not torch.allclose(before, whole[..., : t + 1, :], rtol=1e-3, atol=1e-4):
                    return True
        return False


def ends_before(tokens: Tensor, end: int) -> Tensor:
    """Return the number of end tokens before each token of strings, integers ``(.., T)``."""
    ends = (tokens == end).long()
    return ends.cumsum(-1) - ends


def is_string(tokens: Tensor, valid: Tensor, end: int) -> Tensor:
    """Return True for strings with one end token, their last one, or with T tokens and none: boolean ``(..)``.

    Args:
        tokens: integers ``(.., T)``.
        valid: the tokens that count, boolean ``(.., T)``.
        end: the end token.
    """
    ends = ((tokens == end) & valid).sum(-1)
    goes_on = (valid & (ends_before(tokens, end) > 0)).any(-1)
    return ~goes_on & ((ends == 1) | valid.all(-1))
