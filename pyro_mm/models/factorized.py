"""The story of factorised multimodal representations: a factor that explains the labels, and one for each modality."""

from __future__ import annotations

from collections.abc import Mapping

import pyro
import pyro.distributions as dist
from torch import Tensor, nn

from ..batch.batch import Batch
from ..conditionals.unconditional import as_module
from ..handlers.params import register
from ..utils.arguments import check_mapping, check_module, check_modules, check_tensor
from ..utils.network_calls import apply_network
from ..utils.network_keywords import call_network, keywords_of
from .decoders import check_decoders
from .latents import sample_latent

SHARED = "z"


class Factorized(nn.Module):
    r"""A discriminative factor shared by labels and modalities, and a generative one for each modality.

    .. math:: p(z, w, x, y) = p(z) \prod_y p(y | f_y) \prod_{m=1}^M p(w_m) \, p(x_m | f_y, f_m),
              \qquad f_y = F(z), \quad f_m = F_m(w_m)

    with z and all w_m independent; the paper writes :math:`z_y` for z, and :math:`z_{a\{m\}}` for :math:`w_m`. The
    sites are ``"z"``, ``"w_<modality>"``, the modalities and the labels. A missing modality leaves the product with its
    w_m, and so does a missing label: labels are modalities without a private latent, classes, counts or real numbers.

    Without private factors, ``private_priors={}``, all of a modality is explained by what explains the label; without
    labels, ``labels={}``, the factors are found by generation alone: two ablations of the paper.

    Args:
        prior: p(z), a distribution of event shape ``(D,)``, or a module ``batch -> distribution``.
        private_priors: modality -> p(w_m), likewise, of event shape ``(D_m,)``. A modality that is not named has no
            private latent.
        decoders: modality -> module mapping f_y ``(.., N, F)`` and, if there is one, f_m ``(.., N, F_m)`` to the
            distribution p(x_m | f_y, f_m). Conditionals concatenate the two.
        labels: label -> module mapping f_y to p(y | f_y), such as a Categorical.
        factor: F, a network mapping z to f_y; None for f_y = z.
        private_factors: modality -> :math:`F_m`, a network mapping w_m to f_m; f_m = w_m for one that is not named.

    Raises:
        TypeError: a prior, a decoder or a network of another kind.
        ValueError: no decoders; a private prior without a decoder, or of a label; a private factor without a private
            prior; a name that is a modality and a label, or that of a latent or a plate.

    Example:
        >>> import torch, pyro_mm as mm, pyro.distributions as dist
        >>> shared, private = (dist.Normal(torch.zeros(size), 1.0).to_event(1) for size in (4, 2))
        >>> model = mm.models.Factorized(
        ...     shared,
        ...     {"image": private, "sound": private},
        ...     {name: mm.conditionals.Normal(mm.nn.MLP(8 + 3, 10), scale=1.0) for name in ("image", "sound")},
        ...     {"label": mm.conditionals.Categorical(mm.nn.MLP(8, 5))},
        ...     factor=mm.nn.MLP(4, 8),
        ...     private_factors={name: mm.nn.MLP(2, 3) for name in ("image", "sound")},
        ... )
        >>> values = {"image": torch.zeros(6, 10), "sound": torch.zeros(6, 10), "label": torch.zeros(6).long()}
        >>> rows, latents = mm.simulate(model, mm.Batch(values))
        >>> factors = model.factors(latents)
        >>> before = model.decode(factors)
        >>> factors["w_image"] = factors["w_image"].roll(1, 0)  # the private factors of other rows
        >>> after = model.decode(factors)
        >>> [torch.equal(before[name].mean, after[name].mean) for name in ("image", "sound")]
        [False, True]

    References:
        Tsai et al. 2019 (MFM, arXiv:1806.06176).
    """

    def __init__(
        self,
        prior: dist.Distribution | nn.Module,
        private_priors: Mapping[str, dist.Distribution | nn.Module],
        decoders: Mapping[str, nn.Module],
        labels: Mapping[str, nn.Module],
        factor: nn.Module | None = None,
        private_factors: Mapping[str, nn.Module] | None = None,
    ):
        super().__init__()
        own = check_mapping("private_priors", private_priors, "distributions or modules")
        networks = {} if private_factors is None else check_mapping("private_factors", private_factors, "networks")
        latents = (SHARED, *(_site(name) for name in own))
        self.decoders = nn.ModuleDict(check_decoders(decoders, *latents))
        found = check_mapping("labels", labels, "modules")
        self.labels = nn.ModuleDict(check_decoders(found, *latents) if found else {})
        if common := [name for name in self.labels if name in self.decoders]:
            raise ValueError(f"{common[0]!r} is among the decoders and among the labels: expected it in one of them")
        for name in own:
            if name in self.labels:
                raise ValueError(f"private latent of the label {name!r}, which depends on the shared factor alone")
            if name not in self.decoders:
                raise ValueError(f"private latent of {name!r}, which is not among the decoders {list(self.decoders)}")
        if unknown := [name for name in networks if name not in own]:
            raise ValueError(f"private factor of {unknown[0]!r}, which has no private prior: {list(own)} have one")

        self.prior = as_module("prior", prior)
        self.private_priors = nn.ModuleDict({n: as_module(f"private_priors[{n!r}]", p) for n, p in own.items()})
        self.factor = None if factor is None else check_module("factor", factor)
        self.private_factors = nn.ModuleDict(check_modules("private_factors", networks) if networks else {})

    def forward(self, batch: Batch) -> None:
        """Run the story on a batch: sample the latent sites, observe the modalities and the labels."""
        register(self)
        names = [*self.labels, *self.decoders]
        with batch.plate():
            shared = self._factor(SHARED, sample_latent(SHARED, self.prior, batch), batch)
            for m in pyro.plate("modalities", len(names), device="cpu"):
                name = names[m]
                parents = [shared]
                if name in self.private_priors:
                    private = sample_latent(_site(name), self.private_priors[name], batch)
                    parents.append(self._factor(_site(name), private, batch))
                batch.observe(name, self._decoder(name), *parents)

    def factors(self, latents: Mapping[str, Tensor], batch: Batch | None = None) -> dict[str, Tensor]:
        """Return the factors of latents: f_y under ``"z"``, and each f_m under ``"w_<modality>"``.

        Args:
            latents: site -> ``(.., N, D)``, as :func:`pyro_mm.posterior_draws` and :func:`pyro_mm.simulate` return
                them; private sites may be left out.
            batch: N rows, whose covariates the networks read; None if they read none.

        Returns:
            site -> ``(.., N, F)``.

        Raises:
            ValueError: a site that the story does not have, or a network that reads covariates without a batch.
        """
        found = check_mapping("latents", latents, "tensors")
        self._check_sites("latents", found)
        return {site: self._factor(site, check_tensor(f"latents[{site!r}]", x), batch) for site, x in found.items()}

    def decode(self, factors: Mapping[str, Tensor], batch: Batch | None = None) -> dict[str, dist.TorchDistribution]:
        """Return p(x_m | f_y, f_m) of all modalities and p(y | f_y) of all labels.

        Args:
            factors: ``"z"`` -> f_y, and ``"w_<modality>"`` -> f_m, as :meth:`factors` returns them. A modality whose
                f_m is left out is left out of the result.
            batch: N rows, whose lengths and covariates the decoders read; None if they read none.

        Returns:
            Modality or label -> distribution of batch shape ``(.., N)``.

        Raises:
            ValueError: no f_y, a site that the story does not have, or a decoder that reads lengths or covariates
                without a batch.
        """
        given = check_mapping("factors", factors, "tensors")
        self._check_sites("factors", given)
        if SHARED not in given:
            raise ValueError(f"expected factors to hold the shared one, {SHARED!r}, got {list(given)}")
        found = {}
        for name in [*self.labels, *self.decoders]:
            sites = [SHARED, _site(name)] if name in self.private_priors else [SHARED]
            if all(site in given for site in sites):
                parents = tuple(check_tensor(f"factors[{site!r}]", given[site]) for site in sites)
                decoder = self._decoder(name)
                keywords = {} if batch is None else batch.keywords(name, decoder, len(parents))
                _check_keywords(f"the decoder of {name!r}", decoder, batch)
                found[name] = call_network(decoder, parents, keywords)
        return found

    def _factor(self, site: str, value: Tensor, batch: Batch | None) -> Tensor:
        """Return the factor of a latent."""
        networks = {SHARED: self.factor, **{_site(name): net for name, net in self.private_factors.items()}}
        network = networks.get(site)
        if network is None:
            return value
        role = "the network of the shared factor" if site == SHARED else f"the network of the factor {site!r}"
        _check_keywords(role, network, batch)
        keywords = {} if batch is None else batch.head_keywords(network, role)
        factor: Tensor = apply_network(f"latent {site!r}", network, value, keywords)
        return factor

    def _decoder(self, name: str) -> nn.Module:
        """Return the decoder of a modality or a label."""
        return self.labels[name] if name in self.labels else self.decoders[name]

    def _check_sites(self, argument: str, found: Mapping[str, Tensor]) -> None:
        """Raise a ValueError for a site that is no latent of the story."""
        known = [SHARED, *(_site(name) for name in self.private_priors)]
        if unknown := [site for site in found if site not in known]:
            raise ValueError(f"{argument}: unknown site {unknown[0]!r}, the story has {', '.join(known)}")


def _site(name: str) -> str:
    """Return the site of a modality's private latent."""
    return f"w_{name}"


def _check_keywords(role: str, network: nn.Module, batch: Batch | None) -> None:
    """Raise a ValueError if a network needs lengths or covariates and there is no batch that could have them."""
    needed = [] if batch is not None else [keyword.name for keyword in keywords_of(network) if keyword.required]
    if needed:
        raise ValueError(f"{role} reads {' and '.join(needed)}: give the batch that has them")
