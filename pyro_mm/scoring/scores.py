"""Log densities of particles, by term and site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..batch.masks import Presence
from ..utils.tensors import constant
from .draws import Draws


@dataclass
class Scores:
    """Log-probabilities of K particles, T terms and N rows; plates within a row are summed, enumerated sites too.

    ``likelihood[m]``, ``log_prior`` (log r) and ``log_proposal`` (log q) have shape ``(K, T, N)``; the latter two are
    computed when they are first looked at, for a KL in closed form needs neither. ``kl()`` is KL(q || r), ``(T, N)``,
    in closed form site by site where Pyro knows it, and averaged over what the guide enumerates. ``paths`` are the
    latent values as the scores saw them; in a pass for path derivatives ``log_proposal`` depends on them through the
    ``sources`` of each alone. ``factor`` is the data plate's size over its subsample's. ``log_component`` is, in a
    stratified pass, the log-weight of the stratum that each particle was drawn from. ``again(index)``, of scores that
    have no gradient, are those of the particles ``index``, ``(C, T, N)``, once more and with it. ``undifferentiated``
    are the latents of the model alone, and the missing modalities that are parents, whose draws have no derivative by
    what their probabilities depend on.
    """

    likelihood: dict[str, Tensor]
    prior: Callable[[], Tensor]
    proposal: Callable[[], Tensor]
    kl: Callable[[], Tensor]
    paths: list[Path] = field(default_factory=list)
    factor: float = 1.0
    log_component: Tensor | None = None
    again: Callable[[Tensor], Scores] | None = None
    undifferentiated: tuple[str, ...] = ()
    draws: Draws | None = None

    @cached_property
    def log_prior(self) -> Tensor:
        """log r(z)."""
        return self.prior()

    @cached_property
    def log_proposal(self) -> Tensor:
        """log q(z)."""
        return self.proposal()

    @property
    def like(self) -> Tensor:
        """One of the tensors of shape ``(K, T, N)``, for its shape and kind."""
        return next(iter(self.likelihood.values())) if self.likelihood else self.log_prior

    def log_weights(self) -> Tensor:
        """``log p(x_B | z) + log r(z) - log q(z)``, of shape ``(K, T, N)``."""
        return sum(self.likelihood.values(), self.log_prior) - self.log_proposal

    def take(self, terms: list[int]) -> Scores:
        """The scores of some of the terms."""

        def taken(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: reduce(x)[:, terms]

        return Scores(
            {name: x[:, terms] for name, x in self.likelihood.items()},
            lambda: self.log_prior[:, terms],
            lambda: self.log_proposal[:, terms],
            lambda: self.kl()[terms],
            [Path(p.value, taken(p.reduce), p.sources) for p in self.paths],
            self.factor,
            None if self.log_component is None else self.log_component[:, terms],
            None if self.again is None else lambda index: self._all_again(index, terms).take(terms),
            draws=None if self.draws is None else self.draws.take(terms),
        )

    def _all_again(self, index: Tensor, terms: list[int]) -> Scores:
        full = index.new_zeros(len(index), self.like.shape[1], index.shape[-1])
        full[:, terms] = index
        return self.again(full)  # type: ignore[misc]

    def share(self, carriers: list[int], decodes: Sequence[Mapping[str, Presence]]) -> None:
        """Gives every term t the likelihoods that term ``carriers[t]`` decoded, where t decodes them."""
        for name, value in self.likelihood.items():
            each = value.unbind(1)
            given = [(each[c], decode[name]) for c, decode in zip(carriers, decodes, strict=True)]
            zero = torch.zeros_like(each[0])
            self.likelihood[name] = torch.stack(
                [torch.where(m, x, zero) if isinstance(m, Tensor) else x if m else zero for x, m in given], 1
            )

    def freeze(self, terms: list[int]) -> None:
        """Stops the gradient of the likelihood of some terms at the decoders; it still reaches the latent values.

        By the first-order identity ``l(z) -> l(z0) + <dl/dz, z - z0>`` with l(z0) and dl/dz held constant, which
        asks nothing of the decoders and so serves a story of any form.
        """
        if terms and "*" in self.likelihood:
            raise ValueError(
                "freeze_decoder needs a likelihood apart from the prior, and an enumerated site mixes them"
            )
        if not terms or not torch.is_grad_enabled():
            return
        if (again := self.again) is not None:

            def frozen_again(index: Tensor) -> Scores:
                scores = again(index)
                scores.freeze(terms)
                return scores

            self.again = frozen_again
            return
        flags = tuple(t in terms for t in range(self.like.shape[1]))
        frozen_terms = constant(flags, torch.bool, self.like.device)[:, None]
        for name, value in self.likelihood.items():
            if not value.requires_grad:
                continue
            values = [p.value for p in self.paths]
            total = value[:, terms].sum()
            # no value has a derivative where the guide is frozen too
            slopes = torch.autograd.grad(total, values, retain_graph=True, allow_unused=True) if values else ()
            frozen = value.detach()
            for slope, path in zip(slopes, self.paths, strict=True):
                if slope is not None:
                    frozen = frozen + path.reduce(slope * (path.value - path.value.detach()))
            self.likelihood[name] = torch.where(frozen_terms, frozen, value)


@dataclass
class Path:
    """A latent value as the scores saw it: the one node of the autograd graph through which they depend on it.

    ``reduce`` brings a tensor of its shape to ``(K, T, N)``. ``sources`` are the tensors by which log q(z) depends on
    the value where the parameters of q are held fixed: its derivative is the sum of those with respect to them.
    """

    value: Tensor
    reduce: Callable[[Tensor], Tensor]
    sources: list[Tensor] = field(default_factory=list)
