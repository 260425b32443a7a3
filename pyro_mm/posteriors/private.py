"""Posteriors of latents that are private to one modality."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..batch.batch import Batch
from ..conditionals.unconditional import as_module
from ..distributions.gaussian_experts import STANDARD_NORMAL
from ..distributions.where import Where
from ..utils.arguments import check_flag, check_function, check_head, check_name, describe
from .set_encoders import SumPooling, apply_head, zero_where_missing


class Private(nn.Module):
    r"""The posterior of a modality's private latent: its encoder where the modality is present, else ``missing``.

    .. math:: q(w_m | x_S) = q_m(w_m | x_m) \text{ if } m \in S, \quad \text{else } r_m(w_m)

    Args:
        name: the modality m. The site of the latent is ``"w_<name>"``.
        encoder: module mapping ``(N, *event)`` to a distribution of event shape ``(D_m,)``.
        missing: :math:`r_m`, a distribution or a module ``batch -> distribution``, such as MMVAE+'s learned auxiliary
            prior; a standard normal by default. It serves training, where a missing m is decoded.
        surrogate: False if ``generate`` and ``posterior_draws`` take w_m of a missing m from the model's p(w_m), which
            is its posterior under a story in which nothing else depends on w_m. True if they take it from ``missing``
            in rows in which anything is present: for autoencoders, whose codes of different modalities depend on each
            other. Draws by weight (``resample=True``) are of the story's posterior, and leave it aside.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a batch without values of m, from which the default ``missing`` takes its size.

    Example:
        >>> import torch, pyro_mm as mm
        >>> posterior = mm.posteriors.Private("a", mm.conditionals.Normal(torch.nn.Identity(), scale=1.0))
        >>> posterior(mm.Batch({"a": torch.tensor([[3.0], [3.0]])}, present={"a": [True, False]})).mean
        tensor([[3.],
                [0.]])

    References:
        Palumbo et al. 2023 (MMVAE+, ICLR).
    """

    def __init__(
        self,
        name: str,
        encoder: nn.Module,
        missing: dist.Distribution | nn.Module = STANDARD_NORMAL,
        surrogate: bool = False,
    ):
        super().__init__()
        self.name = check_name("name", name)
        self.encoder = check_function("encoder", encoder, ("values",))
        self.missing = as_module("missing", missing)
        self.surrogate = check_flag("surrogate", surrogate)

    def forward(self, batch: Batch) -> dist.Distribution:
        """Return the posterior of w_m: batch shape ``(N,)``, event shape ``(D_m,)``."""
        if not batch.holds(self.name):
            missing = self.missing(batch)
            if missing is STANDARD_NORMAL:
                raise ValueError(
                    f"the batch holds no values of {self.name!r}, from which the standard normal in place of missing "
                    "takes the size of the latent: give the argument missing a distribution"
                )
            return missing.expand(torch.Size([batch.size]))
        mask = batch.presence(self.name)
        encoded = batch.encode(self.name, self.encoder)
        if mask is True:
            return encoded
        missing = self.missing(batch)
        if missing is STANDARD_NORMAL:
            loc = torch.zeros_like(encoded.mean)
            missing = dist.Normal(loc, torch.ones_like(loc)).to_event(encoded.event_dim)
        return Where(mask, encoded, missing) if isinstance(mask, Tensor) else missing.expand(encoded.batch_shape)


class PrivateOf(nn.Module):
    r"""The posterior of a modality's private latent given all modalities that are present, its own or others.

    .. math:: q(w_m | x_S) = \rho_w\Big( A \sum_{s \in S} h_s + 1[m \in S] \, B h_m \Big)

    with the tokens h of a set posterior. If A, B and :math:`\rho_w` are shared by all m, permuting the modalities
    permutes the private latents: the map is equivariant (Zaheer et al. 2017, arXiv:1703.06114, Lemma 3). A missing m is
    thus inferred from the others where an objective decodes it; ``generate`` draws w_m from the model's own p(w_m).

    Args:
        pool: the :class:`SumPooling` or :class:`SelfAttention` whose tokens ``(.., N, size)`` are used.
        name: the modality m. The site of the latent is ``"w_<name>"``.
        whole: A, a module mapping ``(.., N, size)`` to ``(.., N, H)``.
        own: B, a module of the same form.
        head: :math:`\rho_w`, a module mapping ``(.., N, H)`` to a distribution of event shape ``(D_m,)``.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a modality without features in the pool.

    Example:
        >>> import torch, pyro_mm as mm
        >>> features = {"a": mm.nn.MLP(3, 8), "b": mm.nn.MLP(2, 8)}
        >>> pool = mm.posteriors.SumPooling(features, mm.conditionals.Normal(mm.nn.MLP(8, 4)), size=8)
        >>> head = mm.conditionals.Normal(mm.nn.MLP(8, 2))
        >>> private = mm.posteriors.PrivateOf(pool, "a", torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), head)
        >>> guide = mm.Guide(z=pool, w_a=private)

    References:
        Hirt et al. 2024 (arXiv:2309.00380), section 3.
    """

    def __init__(self, pool: SumPooling, name: str, whole: nn.Module, own: nn.Module, head: nn.Module):
        super().__init__()
        if not isinstance(pool, SumPooling):
            raise TypeError(f"expected pool to be a SumPooling or SelfAttention, got {describe(pool)}")
        self.pool = pool
        self.name = check_name("name", name, pool.features)
        self.whole = check_head("whole", whole, keywords=())
        self.own = check_head("own", own, keywords=())
        self.head = check_head("head", head)

    def forward(self, batch: Batch) -> dist.Distribution:
        """Return the posterior of w_m: batch shape ``(N,)``, event shape ``(D_m,)``."""
        return apply_head(self.head, batch, self, self.state)

    def state(self, batch: Batch) -> Tensor:
        """Return the input of the head, ``(.., N, H)``."""
        tokens, total = self.pool.of_set(batch)
        state: Tensor = self.whole(total)
        if self.name in tokens:
            state = state + zero_where_missing(batch.presence(self.name), self.own(tokens[self.name]))
        return state
