"""Factor analysis of several modalities: a story with closed-form likelihoods."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ..batch.batch import Batch, check_batch
from ..handlers.params import register
from ..utils.arguments import check_attribute, check_integer, check_mapping, check_names, check_number, check_tensor


class LinearGaussian(nn.Module):
    r"""A linear-Gaussian story, whose evidence and posterior are known, to check objectives and estimates against.

    .. math:: p(z, x) = N(z; 0, I_D) \prod_{m=1}^M N(x_m; W_m z + b_m, \sigma_m^2 I)

    With S the modalities present in a row, :math:`L = I + \sum_S W_m^T W_m / \sigma_m^2` and
    :math:`h = \sum_S W_m^T (x_m - b_m) / \sigma_m^2`, the posterior is :math:`N(L^{-1} h, L^{-1})`. All parameters
    can be trained. The sites are ``"z"`` and the modalities.

    Args:
        loadings: modality -> :math:`W_m`, floats ``(d_m, D)``.
        noise: :math:`\sigma_m`, one number for all or modality -> number.
        offsets: modality -> :math:`b_m`, ``(d_m,)``; zero for a modality that is not named.

    Raises:
        TypeError: an argument of another kind.
        ValueError: loadings of several D, a noise that is missing or not positive, or an offset of another size.

    Example:
        >>> import torch, pyro_mm as mm
        >>> model = mm.models.LinearGaussian({"a": torch.ones(1, 1), "b": torch.ones(1, 1)}, noise=1.0)
        >>> batch = mm.Batch({"a": torch.tensor([[3.0]]), "b": torch.tensor([[3.0]])})
        >>> means = [model.posterior(rows).mean.item() for rows in (batch, batch.only("a"))]
        >>> [round(mean, 3) for mean in means]  # 6 / 3 and 3 / 2
        [2.0, 1.5]

    References:
        Tipping & Bishop 1999 (probabilistic principal component analysis).
    """

    def __init__(
        self,
        loadings: Mapping[str, Tensor],
        noise: float | Mapping[str, float] = 1.0,
        offsets: Mapping[str, Tensor] | None = None,
    ):
        super().__init__()
        loadings = _loadings(loadings)
        sigma = dict(noise) if isinstance(noise, Mapping) else dict.fromkeys(loadings, noise)
        for argument, given in (("noise", sigma), ("offsets", {} if offsets is None else offsets)):
            check_names(argument, list(check_mapping(argument, given, "numbers")), loadings)
        if missing := [name for name in loadings if name not in sigma]:
            raise ValueError(f"expected a noise for every modality, got none for {', '.join(map(repr, missing))}")
        sigma = {name: check_number(f"noise of {name!r}", value, above=0) for name, value in sigma.items()}
        for name, offset in (offsets or {}).items():
            check_tensor(f"offsets[{name!r}]", offset, (len(loadings[name]),))
        self.loadings = nn.ParameterDict({n: w.detach().clone() for n, w in loadings.items()})
        self.log_noise = nn.ParameterDict({n: w.new_tensor(math.log(sigma[n])) for n, w in loadings.items()})
        zeros = {n: w.new_zeros(w.shape[0]) for n, w in loadings.items()}
        self.offsets = nn.ParameterDict({n: b.detach().clone() for n, b in (zeros | dict(offsets or {})).items()})

    def forward(self, batch: Batch) -> None:
        """Run the story on a batch: sample the latent sites, observe the modalities."""
        register(self)
        names = list(self.loadings)
        like = self.loadings[names[0]]
        with batch.plate():
            z = pyro.sample("z", dist.Normal(like.new_zeros(like.shape[1]), 1.0).to_event(1))
            for m in pyro.plate("modalities", len(names), device="cpu"):
                batch.observe(names[m], lambda z, n=names[m]: self.likelihood(n, z), z)

    def likelihood(self, name: str, z: Tensor) -> dist.Distribution:
        """Return p(x_m | z).

        Args:
            name: the modality m.
            z: ``(.., D)``.

        Returns:
            A Normal of batch shape ``(..)`` and event shape ``(d_m,)``.
        """
        mean = z @ self.loadings[name].T + self.offsets[name]
        return dist.Normal(mean, self.log_noise[name].exp()).to_event(1)

    def posterior(self, batch: Batch) -> dist.Distribution:
        """Return the exact p(z | x_S) per row: a multivariate normal of batch shape ``(N,)``, event shape ``(D,)``."""
        precision, h, _ = self._statistics(batch)
        factor = torch.linalg.cholesky(precision)
        mean = torch.cholesky_solve(h[..., None], factor)[..., 0]
        return dist.MultivariateNormal(mean, precision_matrix=precision)

    def log_prob(self, batch: Batch) -> Tensor:
        """Return log p(x_S) per row in nats, ``(N,)``, for the modalities S that are present in it."""
        precision, h, rest = self._statistics(batch)
        factor = torch.linalg.cholesky(precision)
        explained = (h * torch.cholesky_solve(h[..., None], factor)[..., 0]).sum(-1)
        log_prob: Tensor = rest + 0.5 * explained - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return log_prob

    def log_conditional(self, batch: Batch, target: Sequence[str], given: Sequence[str] = ()) -> Tensor:
        """Return log p(x_target | x_given) per row in nats, ``(N,)``. Missing modalities are left out of both.

        Args:
            batch: the rows.
            target: modalities, one at least.
            given: modalities.
        """
        batch = check_batch(batch)
        target = check_names("target", target, batch, least=1)
        given = check_names("given", given, batch)
        return self.log_prob(batch.only(*target, *given)) - self.log_prob(batch.only(*given))

    @torch.no_grad()
    def sample(self, n: int) -> Batch:
        """Sample a batch of ``n`` complete rows from the story."""
        check_integer("n", n, least=1)
        like = next(iter(self.loadings.values()))
        z = torch.randn(n, like.shape[1], dtype=like.dtype, device=like.device)
        return Batch({name: self.likelihood(name, z).sample() for name in self.loadings})

    def _statistics(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return L ``(N, D, D)``, h ``(N, D)``, and log p(x_S | z = 0) ``(N,)``."""
        like = next(iter(self.loadings.values()))
        precision = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
        h = like.new_zeros(batch.size, like.shape[1])
        rest = like.new_zeros(batch.size)
        present = batch.present
        for name, w in self.loadings.items():
            if batch.presence(name) is False:
                continue
            mask = present[name].to(like.dtype)
            variance = (2 * self.log_noise[name]).exp()
            residual = batch[name] - self.offsets[name]
            precision = precision + mask[..., None, None] * (w.T @ w) / variance
            h = h + mask[..., None] * (residual @ w) / variance
            log_p = dist.Normal(self.offsets[name], variance.sqrt()).to_event(1).log_prob(batch[name])
            rest = rest + mask * log_p
        return precision.expand(*h.shape[:-1], -1, -1), h, rest


def _loadings(loadings: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return loadings. Raises a TypeError or a ValueError unless they are float matrices ``(d_m, D)`` of one D."""
    found = check_mapping("loadings", loadings, "matrices", least=1)
    sizes = set()
    for name, w in found.items():
        check_attribute("loadings", name, nn.ParameterDict)
        check_tensor(f"loadings[{name!r}]", w, ("d", "D"))
        if not w.is_floating_point():
            raise TypeError(f"expected loadings[{name!r}] to be of floats, got {w.dtype}")
        sizes.add(w.shape[1])
    if len(sizes) > 1:
        raise ValueError(f"expected loadings of one latent size D, got {sorted(sizes)}")
    return found
