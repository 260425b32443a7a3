"""Values behind the scores of a pass, for terms that are no log-densities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .structure import latent_sites, observed_sites
from .term_pair import TermPair


class Draws:
    """Latent draws, decoded distributions, data and masks of K particles, T terms and N rows.

    Each is computed when it is first asked for, and a pass keeps them only if a term asks for draws.

    Args:
        pair: a pair whose guide and model have run.
        model_trace: the trace of that run of the model.
    """

    def __init__(self, pair: TermPair, model_trace: Any):
        self._pair = pair
        self._model_trace = model_trace
        self._latents: dict[str, Tensor] = {}

    @property
    def places(self) -> tuple[int, ...]:
        """Indices of these terms among those of the pass."""
        return tuple(range(self._pair.views.terms))

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Names of the guide's latent sites."""
        return tuple(latent_sites(self._pair.trace))

    def latent(self, site: str) -> Tensor:
        """Return the draws of a latent from the guide, with their gradient.

        Args:
            site: one of :attr:`sites`.

        Returns:
            ``(K, T, N, *plates, *event)``.

        Raises:
            ValueError: an unknown site, or one that is enumerated and so never drawn.
        """
        if site not in self._latents:
            self._latents[site] = self._draws_of(site)
        return self._latents[site]

    def _draws_of(self, site: str) -> Tensor:
        found = latent_sites(self._pair.trace)
        if site not in found:
            raise ValueError(f"the guide has no latent site {site!r}: it has {', '.join(map(repr, found)) or 'none'}")
        if "_enumerate_dim" in found[site]["infer"]:
            raise ValueError(f"latent site {site!r} is enumerated, and has no draws: draw it")
        value = found[site]["value"]
        event = value.shape[len(found[site]["fn"].batch_shape) :]

        pair, views = self._pair, self._pair.views
        lead = ((pair.num_particles,) if pair.plated else ()) + ((views.terms,) if views.terms > 1 else ())
        batch_shape = value.shape[: value.dim() - len(event)]
        plates = (1,) * (views.nesting - len(batch_shape)) + tuple(batch_shape)[-views.nesting :]
        inner = plates[:-1]
        whole = value.expand(*lead, *inner, views.decode.size, *event)
        whole = whole.reshape(pair.num_particles, views.terms, *inner, views.decode.size, *event)
        return whole.movedim(2 + len(inner), 2).reshape(
            pair.num_particles, views.terms, views.decode.size, *(size for size in inner if size > 1), *event
        )

    def decoded(self, modality: str) -> Any:
        """Return the distribution of a modality given the latents.

        Args:
            modality: one that a term of the pass decodes.

        Returns:
            A distribution with the batch dimensions ``(particles, terms, *story)``. The dimension of terms is that of
            the whole pass, and is absent if it has one term; :attr:`places` are the indices of these terms in it. It is
            masked where the modality is missing or not decoded. If only some terms decode the modality it scores, and
            has no draws.

        Raises:
            ValueError: a modality that no term decodes.
        """
        return self._observed_site(modality)["fn"]

    def observed(self, modality: str) -> Tensor:
        """Return the data of a modality, ``(N, *event)``; anything may stand where :meth:`mask` is False."""
        return self._observed_site(modality)["value"]

    def _observed_site(self, modality: str) -> dict[str, Any]:
        found = observed_sites(self._model_trace)
        if modality not in found:
            listed = ", ".join(map(repr, found)) or "none"
            raise ValueError(f"no term of this pass decodes {modality!r}: they decode {listed}")
        return found[modality]

    def mask(self, modality: str) -> Tensor:
        """Return where a term decodes a modality that is present, boolean ``(T, N)``."""
        return self._flags(self._pair.views.decode.presence(modality))

    @cached_property
    def counts(self) -> Tensor:
        """Rows in which a term counts, boolean ``(T, N)``: False in rows of padding too."""
        return self._flags(self._pair.views.decode.rows)

    def _flags(self, presence: bool | Tensor) -> Tensor:
        views = self._pair.views
        shape = (views.terms, views.decode.size)
        if not isinstance(presence, Tensor):
            return torch.full(shape, presence, dtype=torch.bool, device=views.decode.device)
        return presence.reshape(-1, views.decode.size if presence.shape[-1] > 1 else 1).expand(shape)

    def take(self, terms: Sequence[int]) -> Draws:
        """Return the draws of some of the terms."""
        return _TakenDraws(self, list(terms))


class _TakenDraws(Draws):
    """Draws of some of the terms of a pass."""

    def __init__(self, whole: Draws, terms: list[int]):
        super().__init__(whole._pair, whole._model_trace)
        self._whole, self._terms = whole, terms

    @property
    def places(self) -> tuple[int, ...]:
        return tuple(self._terms)

    def _draws_of(self, site: str) -> Tensor:
        return self._whole.latent(site)[:, self._terms]

    def mask(self, modality: str) -> Tensor:
        return self._whole.mask(modality)[self._terms]

    @cached_property
    def counts(self) -> Tensor:
        return self._whole.counts[self._terms]


class StackedDraws(Draws):
    """Draws of K passes of one particle each."""

    def __init__(self, each: Sequence[Draws]):
        super().__init__(each[0]._pair, each[0]._model_trace)
        self._each = each

    def _draws_of(self, site: str) -> Tensor:
        return torch.cat([draws.latent(site) for draws in self._each])

    def decoded(self, modality: str) -> Any:
        raise ValueError(
            "particles that are run one after another have a distribution each: take vectorize_particles=True"
        )
