"""Ablations of MFM: M_A to M_D of Tsai et al. 2019, and a story whose shared factor generates nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ... import conditionals
from ...batch.batch import Batch
from ...models import Factorized, SharedLatent
from ...nn import MLP
from ...objectives.discrepancies import MMD
from ...objectives.objective import Objective
from ...objectives.terms import Term
from ...posteriors import JointEncoder
from ...recipes.factorized import SQUARED_ERROR, mfm
from ...recipes.modality_networks import ModalityNetworks
from ...recipes.networks import Recipe
from .prediction_scores import LABEL, modalities


class Entries(nn.Module):
    """Some entries of a vector, such as one factor of several that stand side by side.

    Args:
        places: those of the entries.
    """

    def __init__(self, places: slice):
        super().__init__()
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        return x[..., self.places]


class Blocks(nn.Module):
    """A network for each block of a vector, with their results side by side.

    Args:
        blocks: the places of each block.
        networks: one for each.
    """

    def __init__(self, blocks: Sequence[slice], networks: Sequence[nn.Module]):
        super().__init__()
        self.blocks = tuple(blocks)
        self.networks = nn.ModuleList(networks)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([net(x[..., block]) for block, net in zip(self.blocks, self.networks, strict=True)], -1)


class SumOfKernels(nn.Module):
    r"""A kernel whose :math:`MMD^2` is the sum of those of blocks: :math:`\sum_b \exp(-r_b^2 / D_b^2)`.

    Args:
        blocks: the places of each block, of :math:`D_b` entries.
    """

    def __init__(self, blocks: Sequence[slice]):
        super().__init__()
        self.blocks = tuple(blocks)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        kernels = []
        for block in self.blocks:
            distance = (x[..., :, None, block] - y[..., None, :, block]).square().sum(-1)
            kernels.append((-distance / (block.stop - block.start) ** 2).exp())
        return torch.stack(kernels).sum(0)


def one_generative_factor(
    batch: Batch, latent: int, hidden: Sequence[int], private: int | Mapping[str, int], **settings: Any
) -> Recipe:
    """Build M_A, in which one generative factor of all modalities is in the place of one for each.

    z holds both codes, which one encoder infers from all modalities. The label sees the discriminative factor alone.
    The other has as many dimensions as those of MFM in the mean.

    Args:
        batch: training rows.
        latent: dimensions of the discriminative code.
        hidden: sizes of the hidden layers.
        private: dimensions of the codes of MFM's generative factors, of each or by modality.
        settings: ``generation`` and ``mmd``, as in :func:`pyro_mm.recipes.mfm`.
    """
    sizes = list(_code_sizes(batch, private).values())
    blocks = _places([latent, round(sum(sizes) / len(sizes))])
    return _with_blocks(batch, blocks, {LABEL: blocks[0]}, hidden=tuple(hidden), **settings)


def without_joint_factor(
    batch: Batch, latent: int, hidden: Sequence[int], private: int | Mapping[str, int], **settings: Any
) -> Recipe:
    """Build M_B, which has no joint factor: each modality has one factor, and the label sees all of these.

    z holds the codes of the modalities, each of which is inferred from its modality alone.

    Args:
        batch: training rows.
        latent: not used: there is no discriminative code.
        hidden: sizes of the hidden layers.
        private: dimensions of the codes, of each or by modality.
        settings: ``generation`` and ``mmd``, as in :func:`pyro_mm.recipes.mfm`.
    """
    sizes = _code_sizes(batch, private)
    blocks = _places(list(sizes.values()))
    hidden = tuple(hidden)
    run = _with_blocks(batch, blocks, dict(zip(sizes, blocks, strict=True)), hidden=hidden, **settings)
    parts = ModalityNetworks(batch, hidden)
    codes = {name: parts.encoder(name, size) for name, size in sizes.items()}
    given: Any = run.guide.posteriors["z"]
    given.posterior = JointEncoder(codes, conditionals.Delta(nn.Identity()), given.posterior.partial)
    return run


def label_alone(batch: Batch, **settings: Any) -> Recipe:
    """Build M_D, which is M_B without generation and MMD: codes of each modality that predict the label alone.

    Args:
        batch: training rows.
        settings: of :func:`without_joint_factor`.
    """
    run = without_joint_factor(batch, **settings)
    assert isinstance(run.model, Factorized) and isinstance(run.model.factor, nn.Module)
    decoder: Any = run.model.labels[LABEL]
    decoder.net = nn.Sequential(run.model.factor, decoder.net)
    table: Any = run.objective.terms
    label = {LABEL: table[0].likelihood[LABEL]}
    terms = [Term(modalities(batch), (LABEL,), likelihood=label, kl=0), *(t for t in table if t.freeze_encoder)]
    return Recipe(SharedLatent(run.model.prior, {LABEL: decoder}), run.guide, Objective(terms))


def without_shared_factor(batch: Batch, **settings: Any) -> Recipe:
    """Build MFM whose decoders see the private factors alone, so that f_y predicts the label and generates nothing.

    Args:
        batch: training rows.
        settings: of :func:`pyro_mm.recipes.mfm`, with ``hidden``.
    """
    run = mfm(batch, **settings)
    assert isinstance(run.model, Factorized)
    parts = ModalityNetworks(batch, settings["hidden"])
    for name, decoder in run.model.decoders.items():
        size = int(run.model.private_priors[name](batch).event_shape[0])
        own: Any = parts.decoder(name, size, lambda _: SQUARED_ERROR)
        decoder.net = nn.Sequential(Entries(slice(-size, None)), own.net)
    return run


def _with_blocks(
    batch: Batch,
    blocks: Sequence[slice],
    reads: Mapping[str, slice],
    hidden: tuple[int, ...],
    mmd: float = 1.0,
    **settings: Any,
) -> Recipe:
    """Build an autoencoder with one latent, in whose blocks codes stand side by side, each with a factor of its own.

    The terms are those of :func:`pyro_mm.recipes.mfm`, and the MMD is the sum of those of the blocks.

    Args:
        batch: training rows.
        blocks: the places of each code, and of its factor.
        reads: modality or label -> the places of the factors that it depends on; all, if it is not named.
        hidden: sizes of the hidden layers.
        mmd: weight of the MMDs.
        settings: ``generation``.
    """
    size = blocks[-1].stop
    run = mfm(batch, latent=size, hidden=hidden, private=0, mmd=0.0, **settings)
    assert isinstance(run.model, Factorized)
    widths = [block.stop - block.start for block in blocks]
    parts = ModalityNetworks(batch, hidden)
    run.model.factor = Blocks(blocks, [MLP(width, width, hidden) for width in widths])
    for name, places in reads.items():
        decoder: Any = run.model.labels[name] if name in run.model.labels else run.model.decoders[name]
        width = places.stop - places.start
        own: Any = parts.decoder(name, width, lambda _: SQUARED_ERROR)
        decoder.net = nn.Sequential(Entries(places), own.net)

    terms: Any = run.objective.terms
    table = Objective([term for term in terms if term.kind is None])
    statistic = MMD("z", modalities(batch), kernel=SumOfKernels(blocks), unbiased=False)
    return run._replace(objective=table + mmd * statistic)


def _code_sizes(batch: Batch, private: int | Mapping[str, int]) -> dict[str, int]:
    """Return modality -> dimensions of its code."""
    return {name: private[name] if isinstance(private, Mapping) else private for name in modalities(batch)}


def _places(sizes: Sequence[int]) -> list[slice]:
    """Return the places of blocks of some sizes that stand side by side."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
