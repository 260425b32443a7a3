"""Values behind the scores of a pass, for terms that are no log-densities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..batch.masks import Presence
from .structure import latent_sites, observed_sites, private_modality
from .term_pair import TermPair, check_prior_gradient


class Draws:
    """Latent draws, decoded distributions, data and masks of K particles, T terms and N rows.

    Each is computed when it is first asked for, and a pass keeps them only if a term asks for draws. Draws from the
    prior, and from the guide given other modalities, are made at that moment, by torch's own generator.

    Args:
        pair: a pair whose guide and model have run.
        model_trace: the trace of that run of the model.
    """

    def __init__(self, pair: TermPair, model_trace: Any):
        self._pair = pair
        self._model_trace = model_trace
        self._made: dict[tuple[str, str], Tensor] = {}
        self._runs: dict[str, Any] = {}

    @property
    def places(self) -> tuple[int, ...]:
        """Indices of these terms among those of the pass."""
        return tuple(range(self._pair.views.terms))

    @cached_property
    def sites(self) -> tuple[str, ...]:
        """Names of the guide's latent sites."""
        return tuple(latent_sites(self._pair.trace))

    @property
    def like(self) -> Tensor | None:
        """A tensor ``(K, T, N)`` of the latents' type, for its shape, type and device; None if none is real."""
        for site, found in latent_sites(self._pair.trace).items():
            if "_enumerate_dim" not in found["infer"] and found["value"].is_floating_point():
                value = self.latent(site).detach()
                return value.flatten(3).sum(-1) if value.dim() > 3 else value
        return None

    def latent(self, site: str) -> Tensor:
        """Return the draws of a latent from the guide given the modalities that a term encodes, with their gradient.

        Args:
            site: one of :attr:`sites`.

        Returns:
            ``(K, T, N, *plates, *event)``.

        Raises:
            ValueError: an unknown site, or one that is enumerated and so never drawn.
        """
        return self._draws("latent", site)

    def given(self, site: str) -> Tensor:
        """Return further draws of a latent, from the guide given the modalities that a term is given.

        Arguments, shape and errors are those of :meth:`latent`. The draws of a term given the prior have no use.
        """
        return self._draws("given", site)

    def prior(self, site: str) -> Tensor:
        """Return as many draws of a latent from the model's prior, each of the other latents drawn with it.

        Arguments, shape and errors are those of :meth:`latent`, for the latent sites of the model. A latent whose
        parent is a modality is given its value where the term decodes it, and a draw of it elsewhere.
        """
        return self._draws("prior", site)

    def _draws(self, source: str, site: str) -> Tensor:
        if (source, site) not in self._made:
            self._made[source, site] = self._make(source, site)
        return self._made[source, site]

    def _make(self, source: str, site: str) -> Tensor:
        found = self._run(source)
        if site not in found:
            program = "model" if source == "prior" else "guide"
            listed = ", ".join(map(repr, found)) or "none"
            raise ValueError(f"the {program} has no latent site {site!r}: it has {listed}")
        if "_enumerate_dim" in found[site]["infer"]:
            raise ValueError(f"latent site {site!r} is enumerated, and has no draws: draw it")
        value = found[site]["value"]
        event = value.shape[len(found[site]["fn"].batch_shape) :]

        pair = self._pair
        views = self._pair.views
        lead = ((pair.num_particles,) if pair.plated else ()) + ((views.terms,) if views.terms > 1 else ())
        batch_shape = value.shape[: value.dim() - len(event)]
        if len(batch_shape) > views.nesting + len(lead) and any(
            n > 1 for n in batch_shape[: -views.nesting - len(lead)]
        ):
            raise ValueError(
                f"latent site {site!r} depends on an enumerated site and has a draw for each of its classes, not one: "
                "draw that site, or leave statistics of this one out"
            )
        plates = (1,) * (views.nesting - len(batch_shape)) + tuple(batch_shape)[-views.nesting :]
        inner = plates[:-1]
        whole = value.expand(*lead, *inner, views.decode.size, *event)
        whole = whole.reshape(pair.num_particles, views.terms, *inner, views.decode.size, *event)
        inner_sizes = [size for size in inner if size > 1]
        rows_third: Tensor = whole.movedim(2 + len(inner), 2)
        return rows_third.reshape(pair.num_particles, views.terms, views.decode.size, *inner_sizes, *event)

    def _run(self, source: str) -> dict[str, dict[str, Any]]:
        """Return the latent sites of the run that made the draws of a source."""
        if source == "latent":
            return latent_sites(self._pair.trace)
        if source not in self._runs:
            first = self._pair
            again = TermPair(first.source_model, first.source_guide, first.views, first.num_particles, first.plated)
            sites = again.draw_prior() if source == "prior" else again.draw_given()
            if source == "prior" and torch.is_grad_enabled():
                check_prior_gradient(sites)
            self._runs[source] = sites
        known: dict[str, dict[str, Any]] = self._runs[source]
        return known

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
        value: Tensor = self._observed_site(modality)["value"]
        return value

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

    def informed(self, site: str, given: bool = False) -> Tensor:
        """Return where a term encodes what a latent is inferred from, boolean ``(T, N)``.

        That is everywhere, but for a latent that is private to a modality: the rows in which the term encodes that.

        Args:
            site: a latent site.
            given: True for the modalities that the term is given, in the place of those that it encodes.
        """
        views = self._pair.views
        own = private_modality(site, views.modalities)
        shown = views.given if given else views.encode
        return self._flags(True if own is None else shown.presence(own))

    def _flags(self, presence: Presence) -> Tensor:
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

    def _make(self, source: str, site: str) -> Tensor:
        return self._whole._draws(source, site)[:, self._terms]

    def informed(self, site: str, given: bool = False) -> Tensor:
        return self._whole.informed(site, given)[self._terms]

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

    def _make(self, source: str, site: str) -> Tensor:
        return torch.cat([draws._draws(source, site) for draws in self._each])

    def decoded(self, modality: str) -> Any:
        raise ValueError(
            "particles that are run one after another have a distribution each: take vectorize_particles=True"
        )
