r"""VAE-GAN modalities: an explicit likelihood, and a discriminator of what its decoder generates.

The parameters of a step move by three losses, of rows x and latents :math:`z \sim q(z | x_S)`, :math:`\tilde z \sim
p(z)`, with the decoder's mean :math:`G(z) = E[x_m | z]` and the discriminator's probability
:math:`D_m(x_m) = \mathrm{sigmoid}(f_m(x_m))`:

* posterior, prior and all other decoders: the table's own loss, in which the likelihood of :math:`x_m` counts too;
* the decoder of m: the table's loss :math:`+ \lambda_m [ - \log D_m(G(\tilde z)) - \log D_m(G(z)) ]`;
* the discriminator of m: :math:`- \log D_m(x_m) - \log(1 - D_m(G(\tilde z))) - \log(1 - D_m(G(z)))`.

With ``Discriminator(features=)`` the table's likelihood of :math:`x_m` is one of features, as in the first VAE-GAN:

.. math:: \log N(l_m(x_m); l_m(G(z)), \sigma^2 I), \qquad l_m \text{ a layer of the discriminator, held constant.}

It is none of :math:`x_m`, so the objective bounds nothing. Evidence is of the story, and so of its explicit likelihood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..batch.batch import Batch
from ..distributions.pushforward import find_pushforward
from ..scoring.program import Program
from ..scoring.structure import pair_structure
from ..scoring.training_objective import Layout, Loss, Player, PreparedObjective, StepWeights
from ..utils.arguments import (
    check_choice,
    check_integer,
    check_mapping,
    check_module,
    check_name,
    check_number,
    describe,
)
from ..utils.modules import preserve_buffers
from ..utils.seeding import temporary_seed
from .bounds import Target
from .decoded_means import (
    data_scale,
    decoder_parameters,
    is_continuous,
    mean_of,
    posterior_site,
    prior_site,
    unreached_parameters,
    unwrap_masks,
)
from .expansion import expand
from .feature_likelihood import FeatureLikelihood, check_layer, check_mean_alone, check_rows_apart
from .objective import Objective
from .term_kinds import DENSITY
from .terms import Number

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
LOST = 0.02  # loss of a discriminator per row, below which its decoder learns nothing from it


@dataclass(frozen=True)
class Discriminator:
    r"""A network that tells values of a modality from those that its decoder generates, and how it is trained.

    Args:
        net: f, a module from values ``(N, *event)`` to logits ``(N,)`` or ``(N, 1)``.
        weight: λ, of the discriminator in the decoder's loss, beside a likelihood that is summed over all entries.
        latents: ``"prior"`` draws :math:`\tilde z` from p(z); ``"uniform"`` from U(-1, 1), as the released code of
            JMVAE-GAN does, which leaves most of a Normal prior without training.
        penalty: γ of :math:`\frac{\gamma}{2} | \nabla f(x) |^2` at real values, added to the discriminator's loss.
        optimizer: parameters -> ``torch.optim`` optimiser of the discriminator; None for that of the training.
        decoder_optimizer: that of the decoder; None for that of the training.
        every: the discriminator moves at every so many steps.
        features: name of the layer of ``net``, as ``net.named_modules()`` has it, whose Normal log-density stands in
            the table for the likelihood of the modality; None for the story's own likelihood. The decoder, which
            learns by its mean alone then, must have no scale to learn.
        feature_scale: σ of that Normal distribution, equal for all features.

    Raises:
        TypeError, ValueError: a net that is no module, a number out of range, or a layer that it has not.

    Example:
        >>> from torch import nn
        >>> import pyro_mm as mm
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.LeakyReLU(0.2), nn.Linear(32, 1))
        >>> discriminator = mm.objectives.Discriminator(net, weight=10.0, penalty=0.1)
        >>> objective = mm.objectives.elbo().with_discriminators({"image": discriminator})
        >>> objective.target
        'lower bound on log p(x)'
        >>> of_features = mm.objectives.Discriminator(net, features="2")
        >>> mm.objectives.elbo().with_discriminators({"image": of_features}).target
        'surrogate: not a bound, since the likelihood of image is that of features of a discriminator'
    """

    net: nn.Module
    weight: float = 1.0
    latents: Literal["prior", "uniform"] = "prior"
    penalty: float = 0.0
    optimizer: OptimizerFactory | None = None
    decoder_optimizer: OptimizerFactory | None = None
    every: int = 1
    features: str | None = None
    feature_scale: float = 1.0

    def __post_init__(self) -> None:
        check_module("net", self.net)
        if self.features is not None:
            check_layer(self.net, self.features)
        check_number("feature_scale", self.feature_scale, above=0)
        check_number("weight", self.weight, above=0)
        check_choice("latents", self.latents, ("prior", "uniform"))
        check_number("penalty", self.penalty, least=0)
        check_integer("every", self.every, least=1)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits of values ``(N, *event)``, ``(N,)``. Raises a ValueError for another shape."""
        found = self.net(x)
        if not isinstance(found, Tensor) or found.shape not in ((len(x),), (len(x), 1)):
            raise ValueError(
                f"expected the discriminator to return logits of shape ({len(x)},) or ({len(x)}, 1), got "
                f"{describe(found)}"
            )
        return found.reshape(len(x))

    @property
    def settings(self) -> str:
        """Short text of the settings."""
        penalty = f", penalty {self.penalty:g}" if self.penalty else ""
        scale = f" (scale {self.feature_scale:g})" if self.feature_scale != 1 else ""
        features = "" if self.features is None else f", likelihood of the layer {self.features!r}{scale}"
        return f"weight {self.weight:g}, latents {self.latents}{penalty}{features}"


class VAEGAN(PreparedObjective):
    """An objective whose story has VAE-GAN modalities: the table, with a discriminator for each of them.

    ``fit`` makes the updates of each modality's decoder and discriminator, and then that of the table. Columns of the
    history are the table's; ``"image decoder"``, the decoder's loss, with its parts ``"prior"`` and ``"posterior"``;
    and ``"image discriminator"``, with the parts ``"data"``, ``"prior"`` and ``"posterior"``, each per row.

    Rows that lack the modality count in no part of a discriminator. The value is that of the table, and so is what it
    bounds: the discriminators change the gradient of a decoder alone. Likelihoods of features are the exception.

    Args:
        table: the objective.
        discriminators: modality -> discriminator.

    Attributes:
        table: the objective without discriminators, and with the story's own likelihoods.
        discriminators: modality -> discriminator.
    """

    def __init__(self, table: Objective, discriminators: Mapping[str, Discriminator]):
        if not isinstance(table, Objective):
            raise TypeError(f"expected table to be an objective of pyro_mm.objectives, got {describe(table)}")
        found = check_mapping("discriminators", discriminators, "discriminators", least=1)
        for name, value in found.items():
            if not isinstance(value, Discriminator):
                raise TypeError(
                    f"expected discriminators[{name!r}] to be a pyro_mm.objectives.Discriminator, got {describe(value)}"
                )
        nets = [value.net for value in found.values()]
        if len(set(map(id, nets))) < len(nets):
            raise ValueError("two modalities have one network as their discriminator: give each its own")
        if not table.differentiable:
            raise ValueError(
                f"{table.estimator_name} takes its gradient itself, and has no loss to add a discriminator's to: take "
                "an estimator of pyro_mm.estimators"
            )
        self.table = table
        self.discriminators = found
        features = {
            name: FeatureLikelihood(name, d.net, d.features, d.feature_scale)
            for name, d in found.items()
            if d.features is not None
        }
        self._trained = table._with_features(features) if features else table
        self._losses = {name: _losses_of(self._trained, name, value) for name, value in found.items()}

    def __repr__(self) -> str:
        return f"{self._trained!r}\n{self._text()}"

    def _text(self) -> str:
        return "\n".join(f"  VAE-GAN {name!r}: {d.settings}" for name, d in self.discriminators.items())

    def players(self, model: Program, guide: Program, batch: Batch) -> Sequence[Player]:
        """Return the players of the table's critics, and the decoder and the discriminator of each modality.

        Raises:
            ValueError: a modality that the story does not observe, whose values have no mean to judge, that lies in
                plates within a row, or whose decoder has no parameters of its own; or a story that sums a latent out;
                with features, a decoder that learns a scale, features that mix rows, or a modality not decoded.
        """
        found: list[Player] = list(self.table.players(model, guide, batch))
        nets = [d.net for d in self.discriminators.values()]
        with preserve_buffers(model, guide, *nets), temporary_seed(0, batch.device):
            for name, discriminator in self.discriminators.items():
                _check_modality(name, discriminator, model, guide, batch)
                decoder, critic = self._losses[name]
                parameters = decoder_parameters(model, batch, name)
                if discriminator.features is not None:
                    self._check_features(name, discriminator, parameters, model, batch)
                found += [
                    Player(f"{name} decoder", decoder, parameters, discriminator.decoder_optimizer),
                    Player(
                        f"{name} discriminator",
                        critic,
                        list(discriminator.net.parameters()),
                        discriminator.optimizer,
                        discriminator.every,
                        _has_won(name),
                    ),
                ]
        return found

    def _check_features(
        self, name: str, discriminator: Discriminator, parameters: Sequence[Tensor], model: Program, batch: Batch
    ) -> None:
        """Raise a ValueError for a modality that a likelihood of features cannot train."""
        if batch.presence(name) is not False:
            terms = expand(self.table._table(batch.names), batch)
            if not any(term.kind is DENSITY and term.decode[name] is not False for term in terms):
                raise ValueError(
                    f"features={discriminator.features!r}: no term of the objective decodes {name!r} by a likelihood, "
                    "in the place of which that of features could stand"
                )
        with torch.enable_grad():
            site = prior_site(model, batch, name)
            mean = mean_of(site)
            check_mean_alone(name, site, unreached_parameters(mean, list(parameters)))
        check_rows_apart(name, discriminator.net, str(discriminator.features), mean[:1].detach())

    @property
    def terms(self) -> Any:
        """The table's terms."""
        return self.table.terms

    # -- the table's value ------------------------------------------------------------------------------------------

    ignores_padding = True

    @property
    def estimator_name(self) -> str:
        return self._trained.estimator_name

    @property
    def untraceable(self) -> str | None:  # type: ignore[override]
        """Reason why a step cannot be compiled, or None."""
        return self._trained.untraceable

    @property
    def modules(self) -> list[nn.Module]:
        """The discriminators' networks, after those of the table's critics."""
        return [*self.table.modules, *(discriminator.net for discriminator in self.discriminators.values())]

    def evaluate(self, model: Program, guide: Program, batch: Batch, *, step: int | Tensor) -> Loss:
        """Return the loss of the table."""
        return self._trained.evaluate(model, guide, batch, step=step)

    def step_weights(self, names: tuple[str, ...], step: int) -> StepWeights:
        return self._trained.step_weights(names, step)

    def evaluate_with_weights(
        self, weights: Tensor, fixed: Mapping[int, float], model: Program, guide: Program, batch: Batch, step: Tensor
    ) -> Loss:
        return self._trained.evaluate_with_weights(weights, fixed, model, guide, batch, step)

    def layout(self, batch: Batch) -> Layout:
        return self._trained.layout(batch)

    def least_rows(self, names: tuple[str, ...]) -> int:
        return self._trained.least_rows(names)

    def gathers_rows(self, names: tuple[str, ...]) -> bool:
        return self._trained.gathers_rows(names)

    def describe(self, names: tuple[str, ...]) -> str:
        return f"{self._trained.describe(names)}\n{self._text()}"

    def bounds(self, names: Sequence[str] | None = None, present: Any = None) -> Target:
        """Return the quantity that the table bounds."""
        return self._trained.bounds(names, present)

    @property
    def target(self) -> str:
        """Quantity that the table bounds, in words."""
        return self._trained.target

    def decoding_all(self) -> VAEGAN:
        full = self.table.decoding_all()
        return self if full is self.table else VAEGAN(full, self.discriminators)

    def __add__(self, other: Any) -> VAEGAN:
        """Return the sum with an objective, with these discriminators."""
        return VAEGAN(self.table + other, self.discriminators)

    __radd__ = __add__

    def __mul__(self, weight: Number) -> VAEGAN:
        """Return the table times a weight; the discriminators keep theirs."""
        return VAEGAN(self.table * weight, self.discriminators)

    __rmul__ = __mul__


# -- losses of the players --------------------------------------------------------------------------------------------


class _VerdictLoss(PreparedObjective):
    """A loss of a discriminator's verdicts.

    Args:
        table: the objective.
        name: the modality.
        discriminator: its discriminator.
    """

    ignores_padding = True

    def __init__(self, table: Objective, name: str, discriminator: Discriminator):
        self.table = table
        self.name = name
        self.discriminator = discriminator

    @property
    def modules(self) -> list[nn.Module]:
        return [self.discriminator.net]


class _DecoderLoss(_VerdictLoss):
    """The table's loss, and the discriminator's verdict on what the decoder generates."""

    @property
    def estimator_name(self) -> str:
        return self.table.estimator_name

    @property
    def untraceable(self) -> str | None:  # type: ignore[override]
        return self.table.untraceable

    def step_weights(self, names: tuple[str, ...], step: int) -> StepWeights:
        return self.table.step_weights(names, step)

    def layout(self, batch: Batch) -> Layout:
        return self.table.layout(batch)

    def least_rows(self, names: tuple[str, ...]) -> int:
        return self.table.least_rows(names)

    def gathers_rows(self, names: tuple[str, ...]) -> bool:
        return self.table.gathers_rows(names)

    def evaluate(self, model: Program, guide: Program, batch: Batch, *, step: int | Tensor) -> Loss:
        return self._with_verdict(self.table.evaluate(model, guide, batch, step=step), model, guide, batch)

    def evaluate_with_weights(
        self, weights: Tensor, fixed: Mapping[int, float], model: Program, guide: Program, batch: Batch, step: Tensor
    ) -> Loss:
        loss = self.table.evaluate_with_weights(weights, fixed, model, guide, batch, step)
        return self._with_verdict(loss, model, guide, batch)

    def _with_verdict(self, loss: Loss, model: Program, guide: Program, batch: Batch) -> Loss:
        """Return a loss of the table with that of generated values added."""
        sites = _generated(model, guide, batch, self.name, self.discriminator)
        verdicts = {
            source: _sum_rows(-softplus(-self.discriminator.logits(mean_of(site))), batch, self.name, site)
            for source, site in sites.items()
        }
        total = loss.total - self.discriminator.weight * sum(verdicts.values())
        return Loss(total, {source: value.detach() for source, value in verdicts.items()})


class _DiscriminatorLoss(_VerdictLoss):
    """Cross-entropy of values and of what the decoder generates, with a penalty of the gradient at values."""

    @property
    def estimator_name(self) -> str:
        return "the cross-entropy of a discriminator"

    def evaluate(self, model: Program, guide: Program, batch: Batch, *, step: int | Tensor) -> Loss:
        d = self.discriminator
        with torch.no_grad():
            sites = _generated(model, guide, batch, self.name, d)
            means = {source: mean_of(site) for source, site in sites.items()}
        like = sites["posterior"]
        values = batch[self.name].detach().to(means["posterior"].dtype)
        if d.penalty:
            values = values.requires_grad_()

        logits = d.logits(values)
        parts = {"data": -softplus(-logits)}
        parts |= {source: -softplus(d.logits(mean)) for source, mean in means.items()}
        sums = {source: _sum_rows(part, batch, self.name, like) for source, part in parts.items()}
        loss = -sum(sums.values(), torch.zeros((), device=values.device))
        if d.penalty:
            (slope,) = torch.autograd.grad(logits.sum(), values, create_graph=True)
            squares = slope.square().flatten(1).sum(1)
            loss = loss + 0.5 * d.penalty * _sum_rows(squares, batch, self.name, like)
        return Loss(loss, {source: value.detach() for source, value in sums.items()})


def _losses_of(table: Objective, name: str, discriminator: Discriminator) -> tuple[_DecoderLoss, _DiscriminatorLoss]:
    return _DecoderLoss(table, name, discriminator), _DiscriminatorLoss(table, name, discriminator)


def _generated(
    model: Program, guide: Program, batch: Batch, name: str, discriminator: Discriminator
) -> dict[str, dict[str, Any]]:
    """Return the sites of a modality decoded from the prior and from the posterior."""
    return {
        "prior": prior_site(model, batch, name, uniform=discriminator.latents == "uniform"),
        "posterior": posterior_site(model, guide, batch, name),
    }


def _sum_rows(values: Tensor, batch: Batch, name: str, site: dict[str, Any]) -> Tensor:
    """Return the sum of values ``(N,)`` over the rows that have a modality, scaled as the table's loss is."""
    counts = batch.present[name] & batch.rows  # a row of padding may have the modality
    return torch.where(counts, values, torch.zeros_like(values)).sum() * data_scale(site)


# -- checks -----------------------------------------------------------------------------------------------------------


def _check_modality(name: str, discriminator: Discriminator, model: Program, guide: Program, batch: Batch) -> None:
    """Raise a ValueError for a modality or a pair that a discriminator cannot be trained with."""
    check_name("discriminators", name, batch)
    structure = pair_structure(model, guide, batch)
    if structure.model_only:
        raise ValueError(
            f"the story sums {sorted(structure.model_only)[0]!r} out, and a discriminator judges values of draws: let "
            "the guide draw that latent too"
        )
    if name in batch.lengths:
        raise ValueError(f"modality {name!r} has sequences of unlike lengths, which a discriminator cannot judge")
    with torch.no_grad():
        site = posterior_site(model, guide, batch, name) if batch.presence(name) is not False else None
        site = prior_site(model, batch, name) if site is None else site
        if find_pushforward(site["fn"]) is not None:
            raise ValueError(
                f"modality {name!r} is implicit, and has no likelihood for a discriminator to stand beside: train it "
                f"by a critic, objective.with_critics({{{name!r}: mm.objectives.Critic(net)}})"
            )
        fn = unwrap_masks(site["fn"])
        if not hasattr(fn, "log_prob") or not is_continuous(fn):
            raise ValueError(
                f"modality {name!r}: {type(fn).__name__} has no mean of the shape of its values, by which a "
                "discriminator could judge it. Classes and tokens need none: leave it out"
            )
        if fn.batch_shape != (batch.size,):
            raise ValueError(
                f"modality {name!r} lies in plates within a row, of shape {tuple(fn.batch_shape)}: give it a site in "
                "the plate 'data' alone"
            )
        discriminator.logits(fn.mean)


def _has_won(name: str) -> Callable[[Mapping[str, float]], str | None]:
    """Return the function that warns of a discriminator of a modality that makes no more mistakes."""

    def diagnose(entry: Mapping[str, float]) -> str | None:
        loss = entry[f"{name} discriminator"]
        if loss > LOST:
            return None
        return (
            f"the discriminator of {name!r} tells values from generated ones without a mistake (loss {loss:.1e} per "
            "row; 2.08 is chance), so that its decoder learns little from it. Give it a penalty, a smaller network or "
            "step size, or every=2"
        )

    return diagnose
