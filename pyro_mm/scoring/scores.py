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
    """Log-probabilities of K particles, T terms and N rows, in nats.

    Plates within a row are summed, and enumerated sites are summed out.

    Attributes:
        likelihood: observed site -> log p, ``(K, T, N)``; under ``"*"`` alone where an enumerated site is summed out.
        prior, proposal: compute :attr:`log_prior` and :attr:`log_proposal`, which a KL in closed form does not need.
        divergence: computes :meth:`kl` of the scores that it is given, which do not hold themselves by it.
        paths: the latent values that the scores depend on. In a pass for path derivatives ``log_proposal`` depends on
            them through their ``sources`` alone.
        factor: size of the data plate over that of its subsample.
        log_component: log-weight of the stratum of each particle, ``(K, T, N)``; None unless the pass is stratified.
        rescore: for scores without gradient, recomputes the particles ``index``, ``(C, T, N)``, with gradients.
        undifferentiated: latents of the model alone, and missing modalities that are parents, whose draws have no
            derivative by what their probabilities depend on.
        deterministic: latents of the guide that are a Delta in some rows, whose densities raise an error.
        draws: the values behind the scores; None unless a term asks for them.
        log_joint_by_class: log p(x_B, z, y = c), ``(C, K, T, N)``, if a pass splits it by the classes of a site y.
    """

    likelihood: dict[str, Tensor]
    prior: Callable[[], Tensor]
    proposal: Callable[[], Tensor]
    divergence: Callable[[Scores], Tensor]
    paths: list[Path] = field(default_factory=list)
    factor: float = 1.0
    log_component: Tensor | None = None
    rescore: Callable[[Tensor], Scores] | None = None
    undifferentiated: tuple[str, ...] = ()
    deterministic: tuple[str, ...] = ()
    draws: Draws | None = None
    log_joint_by_class: Tensor | None = None

    @cached_property
    def log_prior(self) -> Tensor:
        """Log-density of the prior of the terms, log r(z), ``(K, T, N)``."""
        return self.prior()

    @cached_property
    def log_proposal(self) -> Tensor:
        """Log-density of the guide, log q(z), ``(K, T, N)``."""
        return self.proposal()

    def kl(self) -> Tensor:
        """Return KL(q || r), ``(T, N)``.

        It is in closed form site by site where torch has one, and averaged over classes that the guide enumerates.
        """
        return self.divergence(self)

    @property
    def like(self) -> Tensor:
        """A tensor of shape ``(K, T, N)``, for its shape, type and device."""
        if self.likelihood:
            return next(iter(self.likelihood.values()))
        if self.draws is not None and (like := self.draws.like) is not None:
            return like
        return self.log_prior

    def log_weights(self) -> Tensor:
        """Return ``log p(x_B | z) + log r(z) - log q(z)``, of shape ``(K, T, N)``."""
        return sum(self.likelihood.values(), self.log_prior) - self.log_proposal

    def take(self, terms: list[int]) -> Scores:
        """Return the scores of some of the terms."""

        def take_terms(reduce: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
            return lambda x: reduce(x)[:, terms]

        return Scores(
            {name: x[:, terms] for name, x in self.likelihood.items()},
            lambda: self.log_prior[:, terms],
            lambda: self.log_proposal[:, terms],
            lambda _: self.kl()[terms],
            [Path(p.value, take_terms(p.reduce), p.sources) for p in self.paths],
            self.factor,
            None if self.log_component is None else self.log_component[:, terms],
            None if self.rescore is None else lambda index: self._rescore_all(index, terms).take(terms),
            deterministic=self.deterministic,
            draws=None if self.draws is None else self.draws.take(terms),
        )

    def _rescore_all(self, index: Tensor, terms: list[int]) -> Scores:
        full = index.new_zeros(len(index), self.like.shape[1], index.shape[-1])
        full[:, terms] = index
        return self.rescore(full)  # type: ignore[misc]

    def share(self, carriers: list[int], decodes: Sequence[Mapping[str, Presence]]) -> None:
        """Give every term the likelihoods that another one has decoded for it.

        Args:
            carriers: for each term the number of the one that has decoded.
            decodes: for each term, modality -> rows that it decodes.
        """
        for name, value in self.likelihood.items():
            each = value.unbind(1)
            given = [(each[c], decode[name]) for c, decode in zip(carriers, decodes, strict=True)]
            zero = torch.zeros_like(each[0])
            self.likelihood[name] = torch.stack(
                [torch.where(m, x, zero) if isinstance(m, Tensor) else x if m else zero for x, m in given], 1
            )

    def freeze(self, terms: list[int]) -> None:
        """Stop the gradient of the likelihood of some terms at the decoders; it still reaches the latent values.

        The likelihood is replaced by its first-order expansion ``l(z0) + <dl/dz, z - z0>`` with l(z0) and dl/dz held
        constant. This needs no access to the decoders, and so works for a story of any form.

        Args:
            terms: their numbers.
        """
        if terms and "*" in self.likelihood:
            raise ValueError(
                "freeze_decoder needs a likelihood apart from the prior, and an enumerated site mixes them"
            )
        if not terms or not torch.is_grad_enabled():
            return
        if (rescore := self.rescore) is not None:

            def rescore_frozen(index: Tensor) -> Scores:
                scores = rescore(index)
                scores.freeze(terms)
                return scores

            self.rescore = rescore_frozen
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
    """A latent value: the one node of the autograd graph through which the scores depend on it.

    Attributes:
        value: the node.
        reduce: sums a tensor of its shape to ``(K, T, N)``.
        sources: the tensors by which log q(z) depends on the value where q's parameters are held fixed; its derivative
            is the sum of those with respect to them.
    """

    value: Tensor
    reduce: Callable[[Tensor], Tensor]
    sources: list[Tensor] = field(default_factory=list)
