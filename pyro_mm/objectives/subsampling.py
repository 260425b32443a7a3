r"""Decoding some of the modalities only: the plate over them, subsampled.

With S drawn uniformly among the subsets of size k of M modalities, whatever their f are,

.. math:: E_S \Big[ \frac{M}{k} \sum_{m \in S} f_m \Big] = \sum_{m = 1}^{M} f_m

where f_m is what a modality's own sites add to an objective: its log-likelihood, and the KL of its private latent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..batch.batch import Batch
from ..scoring.structure import PairStructure
from ..utils.arguments import check_integer


def draw_modalities(subsample: int, batch: Batch, structure: PairStructure) -> dict[str, float]:
    """Draw the modalities to decode, and return each with the scale M / k.

    They are drawn from torch's generator of the CPU, so that no step waits for a device.

    Args:
        subsample: k.
        batch: rows; M of its modalities are observed by the model.
        structure: structure of the pair on such rows.

    Raises:
        ValueError: more modalities than there are; an enumerated site; a modality that is the parent of another one.
    """
    names = [name for name in batch.names if name in structure.modalities]
    if subsample > len(names):
        raise ValueError(
            f"expected a subsample of 1 to {len(names)} modalities, those that the model observes of this batch; "
            f"got {subsample}"
        )
    if structure.enumerates:
        raise ValueError(
            "an enumerated site is summed out inside a logarithm, where a sum over some of the modalities is biased: "
            "decode them all (subsample=None), or draw the site"
        )
    if structure.chained:
        raise ValueError(
            "a modality is the parent of another one, which would see a draw of it, and not its value, wherever it is "
            "not decoded: decode them all (subsample=None)"
        )
    some = names if subsample == len(names) else _choice(names, subsample)
    return dict.fromkeys(some, len(names) / subsample)


def check_subsample(subsample: int | None, estimator: str, linear: bool) -> None:
    """Refuse to subsample for an estimator that takes the logarithm of a mean of weights.

    Raises:
        ValueError: for such an estimator, or for no modality at all.
    """
    if subsample is None:
        return
    check_integer("the number of modalities to decode", subsample, least=1)
    if not linear:
        raise ValueError(
            f"{estimator} takes the logarithm of a mean of weights, inside which a sum over some of the modalities is "
            "biased: decode them all (subsample=None), or take a mean of log-weights, such as AnalyticKL or one draw"
        )


def _choice(names: Sequence[str], k: int) -> list[str]:
    return [names[i] for i in torch.randperm(len(names), device="cpu")[:k].tolist()]
