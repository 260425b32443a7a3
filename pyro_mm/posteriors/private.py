"""Posteriors of latents that are private to one modality."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..conditionals.unconditional import as_module
from ..distributions.gaussian_experts import STANDARD_NORMAL
from ..distributions.where import Where
from ..utils.arguments import check_function, check_name, describe
from .set_encoders import SumPooling, apply_head, zero_where_missing


class Private(nn.Module):
    r"""The posterior of a modality's private latent: q(w_m | x_m) where m is present, else ``missing``.

    Args:
        name: the modality m; the latent's site is ``"w_<name>"``.
        encoder: module mapping the values of m to a distribution of event shape (D,).
        missing: what stands in for it where m is absent and w_m is needed to decode it: a distribution, or a module
            ``batch -> distribution`` (MMVAE+'s learned auxiliary prior). By default a standard normal. It serves
            training: ``generate`` draws w_m from the model's own p(w_m).

    Palumbo et al. 2023 (MMVAE+, ICLR).
    """

    def __init__(self, name: str, encoder: nn.Module, missing: dist.Distribution | nn.Module = STANDARD_NORMAL):
        super().__init__()
        self.name = check_name("name", name)
        self.encoder = check_function("encoder", encoder, ("values",))
        self.missing = as_module("missing", missing)

    def forward(self, batch: Batch) -> dist.Distribution:
        if not batch.holds(self.name):
            missing = self.missing(batch)
            if missing is STANDARD_NORMAL:
                raise ValueError(f"no values of {self.name!r} to tell the size of its latent: give ``missing`` one")
            return missing.expand(torch.Size([batch.size]))
        mask, own = batch.presence(self.name), batch.encode(self.name, self.encoder)
        if mask is True:
            return own
        missing = self.missing(batch)
        if missing is STANDARD_NORMAL:
            loc = torch.zeros_like(own.mean)
            missing = dist.Normal(loc, torch.ones_like(loc)).to_event(own.event_dim)
        return Where(mask, own, missing) if isinstance(mask, Tensor) else missing.expand(own.batch_shape)


class PrivateOf(nn.Module):
    r"""The posterior of a modality's private latent given all that is present, itself or others.

    .. math:: q(w_m | x_S) = \rho_w\Big( A \sum_{s \in S} h_s + 1[m \in S] \, B h_m \Big)

    with the tokens h of a set posterior. With A, B and :math:`\rho_w` shared, permuting the modalities permutes the
    private latents: the map is equivariant (Zaheer et al. 2017, arXiv:1703.06114, Lemma 3).

    Args:
        pool: the :class:`SumPooling` or :class:`SelfAttention` whose tokens it takes.
        name: the modality m; the latent's site is ``"w_<name>"``.
        whole, own: A and B, modules from ``(.., N, size)`` to what the head takes.
        head: :math:`\rho_w`, as a set posterior's.

    Where m is absent and an objective decodes it, w_m is thus inferred from the others; ``generate`` draws it from
    the model's own p(w_m). Hirt et al. 2024 (arXiv:2309.00380), section 3.
    """

    def __init__(self, pool: SumPooling, name: str, whole: nn.Module, own: nn.Module, head: nn.Module):
        super().__init__()
        if not isinstance(pool, SumPooling):
            raise TypeError(f"expected pool to be a SumPooling or SelfAttention, got {describe(pool)}")
        self.pool, self.name = pool, check_name("name", name, pool.features)
        self.whole, self.own = check_function("whole", whole, ("features",)), check_function("own", own, ("features",))
        self.head = check_function("head", head, ("features",))

    def forward(self, batch: Batch) -> dist.Distribution:
        return apply_head(self.head, batch, self, self.state)

    def state(self, batch: Batch) -> Tensor:
        """What the head sees, ``(.., N, H)``."""
        tokens, total = self.pool.of_set(batch)
        state = self.whole(total)
        if self.name in tokens:
            state = state + zero_where_missing(batch.presence(self.name), self.own(tokens[self.name]))
        return state
