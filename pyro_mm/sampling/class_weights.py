"""Importance weights split by the classes of a site."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..batch.masks import Presence
from ..scoring.model_scores import score_model
from ..scoring.structure import PairStructure
from ..scoring.term_pair import TermPair
from .particle_sampler import ParticleSampler, log_weights


@dataclass(frozen=True)
class ClassWeights:
    r"""A site by whose classes importance weights are split.

    The weights of class c are :math:`p(x_S, z_k, y = c) / q(z_k)`, for a latent y that is summed out or the component y
    of a mixture prior (:mod:`pyro_mm.scoring.classes`), or for a modality y. In rows that have the modality, those of
    other classes than its value are 0.

    Attributes:
        site: its name.
        classes: ``(C, *event)``.
        observed: True for a modality, False for a latent.
    """

    site: str
    classes: Tensor
    observed: bool

    def log_weights(self, pair: TermPair, structure: PairStructure, sampler: ParticleSampler, rows: slice) -> Tensor:
        """Return the log-weights of particles by class, ``(C, k, N)``.

        Args:
            pair: some particles of some rows, drawn.
            structure: structure of the pair.
            sampler: the sampler that has drawn them.
            rows: those rows among the rows of the sampler.
        """
        if not self.observed:
            scores = score_model(pair, structure, unscaled=True, classes_of=self.site)
            assert scores.log_joint_by_class is not None
            return scores.log_joint_by_class[:, :, 0] - sampler.log_density(scores, rows)
        if structure.enumerates or self.site in structure.parents:
            by_class = [
                log_weights(sampler, score_model(self._at_class(pair, c), structure, unscaled=True), rows)
                for c in self.classes
            ]
        else:
            # given the latents the modality depends on nothing else, and is decoded alone
            scores = score_model(pair, structure, unscaled=True)
            without = log_weights(sampler, scores, rows)
            if self.site in scores.likelihood:
                without = without - scores.likelihood[self.site][:, 0]
            by_class = [without + self._log_likelihood(pair, structure, c) for c in self.classes]
        return torch.stack([self._only_where_possible(x, pair, c) for x, c in zip(by_class, self.classes, strict=True)])

    def _log_likelihood(self, pair: TermPair, structure: PairStructure, value: Tensor) -> Tensor:
        """Return log p(y = c | z) of particles, ``(k, N)``."""
        alone = self._at_class(pair, value, alone=True)
        return score_model(alone, structure, unscaled=True).likelihood[self.site][:, 0]

    def _at_class(self, pair: TermPair, value: Tensor, alone: bool = False) -> TermPair:
        """Return the pair with the modality at one class in every row, beside the others or alone."""
        decode = pair.views.decode
        masks: dict[str, Presence] = {n: False if alone else decode.presence(n) for n in decode.names}
        new = copy.copy(pair)
        new.views = replace(pair.views, decode=decode.filled(self.site, value).with_masks(masks | {self.site: True}))
        return new

    def _only_where_possible(self, log_w: Tensor, pair: TermPair, value: Tensor) -> Tensor:
        """Return log-weights that are minus infinity in rows whose value of the modality is another class."""
        decode = pair.views.decode
        present = decode.presence(self.site)
        if present is False or not decode.holds(self.site):
            return log_w
        other = (decode[self.site] != value).reshape(decode.size, -1).any(-1)
        return log_w.masked_fill(other if present is True else other & present, -math.inf)
