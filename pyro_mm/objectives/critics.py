"""Critics: networks that estimate ratios of densities for modalities that have none, and how they are trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..utils.arguments import check_choice, check_function, check_integer, check_number, describe
from .critic_forms import FORMS, CriticForm

MOST_LOG_RATIO = 3.0  # the generator's maximum-likelihood loss weighs no fake more than exp of this
Key = str | tuple[str, ...]  # a modality, or several that one critic is shown together
OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


class Critic(nn.Module):
    r"""A network that stands for the likelihood of an implicit modality in an objective, with its own training.

    It gives :math:`\log p(x | z)` up to a constant, from its classification of pairs of values and latents:

    * ``against="posterior"``: pairs (x, z ~ q) of a row; (generated from z, z); and (x of another row, z). The logit of
      generated pairs less that of pairs with another row is, at the best critic,
      :math:`\log p(x | z) - \log p_d(x)`, so the objective is the bound plus the entropy H(x) of the data.
    * ``against="prior"``: pairs (x, z ~ q) against (generated from z, z ~ p). Minus the logit is
      :math:`\log p(x, z) - \log q(x, z)`, and replaces the likelihood of the modality and the KL of the term. The
      objective is the bound plus H(x) and plus :math:`I_q(x_{others}; z | x)`, a bias unless the term encodes that
      modality alone: latents may hide the other modalities. It draws sharper samples. One critic may be shown several
      implicit modalities together, ``with_critics({("image", "sound"): critic})``; if these are all that the term
      encodes, the objective is :math:`-KL(q(x, z) \| p(x, z))`, without bias.

    There are three updates per step. The critic learns by cross-entropy, with everything else held constant. The
    generator learns on its own draws, from latents held constant: the objective has no gradient in it. Terms, rows and
    the likelihood weigh in its loss as they do in the table (:mod:`pyro_mm.objectives.critic_losses` derives it): where
    they weigh 0, the critic learns and the generator does not. Guide, prior and
    the other decoders learn by the objective, through the latents and with the critic held constant.

    A critic is shown no covariates but those that are parents of the modality. A generator that gets them by keyword is
    refused, and against the prior any story whose latents or values of the modality depend on them.

    A term of a table has a critic of its own, a copy of ``net``, since its pairs depend on what it encodes.

    Args:
        net: a module from ``(.., N, D + F)``, the values of the modality, or modalities, flattened and its parents
            (latents, say) behind them, to logits: ``(.., N, 3)`` against the posterior, ``(.., N, 1)``
            against the prior. Against the prior it is shown all latents of the guide in the place of the parents.
        against: "posterior" or "prior".
        penalty: weight of half the mean squared gradient of the logit (against the posterior: of joint less fake) at
            joint and at generated pairs (R1 and R2). 0 for few dimensions, 0.1 for pictures.
        optimizer: parameters -> ``torch.optim`` optimiser of the critic; None is Adam(0.001, betas=(0.5, 0.99)).
        every: the critic is updated at every so many steps.
        generator_loss: "non-saturating", :math:`\log(1 + e^{-T})` with T the log ratio of joint to fake; or
            "likelihood", :math:`-e^{T}` with T no more than 3, whose gradient is that of maximum likelihood.
        generator_optimizer: that of the generator; None is that of the training.
        least_scale: against the prior nothing holds the scales of the encoder and of explicit decoders up. They fall
            as long as it trains, since latents that are nearly points hide the other modalities best, and what the
            guide says of its own uncertainty is too small then; draws of the story are as good as before. A number
            above 0, such as 0.05, refuses every ``conditionals.Normal`` and ``Laplace`` of story and guide whose scale
            may fall below: give these ``least_scale``. 0 refuses none.

    Attributes:
        nets: a network for each term, of which the first is ``net``.
        labels: the terms.

    Raises:
        TypeError, ValueError: another argument; in use, an output of the network of another shape.

    Example:
        >>> import torch, pyro_mm as mm
        >>> critic = mm.objectives.Critic(mm.nn.MLP(9 + 2, 3, (8,)), penalty=0.1)
        >>> print(mm.objectives.elbo().with_critics({"image": critic}))
        Objective, AnalyticKL(num_particles=1); estimates, by critics: lower bound on log p(x) + entropies of image
          (encode, decode, given)
          (*, *, P)
          critic of image against the posterior, penalty 0.1, non-saturating

    References:
        Goodfellow et al. 2014 (arXiv:1406.2661); Dumoulin et al. 2017 (arXiv:1606.00704); Mescheder et al. 2018
        (arXiv:1801.04406); Wu & Goodman 2019 (arXiv:1912.05075).
    """

    def __init__(
        self,
        net: nn.Module,
        against: Literal["posterior", "prior"] = "posterior",
        *,
        penalty: float = 0.0,
        optimizer: OptimizerFactory | None = None,
        every: int = 1,
        generator_loss: Literal["non-saturating", "likelihood"] = "non-saturating",
        generator_optimizer: OptimizerFactory | None = None,
        least_scale: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(net, nn.Module):
            raise TypeError(f"expected net to be a module, whose parameters can be trained, got {describe(net)}")
        self.against = check_choice("against", against, tuple(FORMS))
        self.form: CriticForm = FORMS[self.against]()
        self.penalty = check_number("penalty", penalty, least=0)
        self.every = check_integer("every", every, least=1)
        self.generator_loss = check_choice("generator_loss", generator_loss, ("non-saturating", "likelihood"))
        for name, factory in (("optimizer", optimizer), ("generator_optimizer", generator_optimizer)):
            if factory is not None and not isinstance(factory, type):
                check_function(name, factory, ("parameters",))
        self.least_scale = check_number("least_scale", least_scale, least=0)
        if self.least_scale and not self.form.replaces_kl:
            raise ValueError("least_scale is of a critic against the prior: against the posterior the KL is computed")
        self.optimizer = optimizer or _adam
        self.generator_optimizer = generator_optimizer
        self.nets = nn.ModuleList([net])
        self.labels: list[str] = []

    @property
    def settings(self) -> str:
        """Short text of the settings."""
        often = "" if self.every == 1 else f", every {self.every} steps"
        penalty = f", penalty {self.penalty:g}" if self.penalty else ""
        return f"against the {self.against}{penalty}, {self.generator_loss}{often}"

    def net_of(self, label: str) -> nn.Module:
        """Return the network of a term, by its label; a copy of the first one if it has none yet."""
        if label not in self.labels:
            if self.labels:
                self.nets.append(copy.deepcopy(self.nets[0]))
            self.labels.append(label)
        return self.nets[self.labels.index(label)]

    def logits(self, label: str, x: Tensor, conditions: Tensor, frozen: bool = False) -> Tensor:
        """Return the logits of pairs in a term's game, ``(.., N, outputs)``.

        Args:
            label: of the term.
            x: values, flattened, ``(N, D)`` or ``(.., N, D)``.
            conditions: parents or latents, ``(.., N, F)``.
            frozen: True to give the critic no gradient.

        Raises:
            TypeError, ValueError: the network returns no tensor, or one of another shape.
        """
        net = self.net_of(label)
        values = x.to(conditions.dtype)
        pairs = torch.cat([values.expand(*conditions.shape[:-1], -1), conditions], -1)
        held = {name: p.detach() for name, p in net.named_parameters()} if frozen else {}
        try:
            logits = torch.func.functional_call(net, held, (pairs,)) if frozen else net(pairs)
        except RuntimeError as error:
            error.add_note(
                f"The critic's network gets {pairs.shape[-1]} numbers: {values.shape[-1]} values and "
                f"{conditions.shape[-1]} of {'the latents' if self.form.replaces_kl else 'the parents'}."
            )
            raise
        if not isinstance(logits, Tensor):
            raise TypeError(f"expected a tensor of logits from the critic's network, got {describe(logits)}")
        wanted = (*pairs.shape[:-1], self.form.outputs)
        if logits.shape != wanted:
            raise ValueError(
                f"expected logits of shape {wanted} from the critic's network, {self.form.outputs} for each pair "
                f"against the {self.against}, got {tuple(logits.shape)}"
            )
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def fooling_loss(self, realness: Tensor) -> Tensor:
        """Return the generator's loss of fakes, of the log ratio T of joint to fake."""
        if self.generator_loss == "likelihood":
            return -realness.clamp(max=MOST_LOG_RATIO).exp()
        return nn.functional.softplus(-realness)


def _adam(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, 1e-3, betas=(0.5, 0.99))


def names_of(key: Key) -> tuple[str, ...]:
    """Return the modalities of a critic."""
    return (key,) if isinstance(key, str) else key


def key_text(key: Key) -> str:
    """Return the modalities of a critic in words, as in columns of the history: ``"image"``, ``"image+sound"``."""
    return "+".join(names_of(key))


def module_dict(critics: Mapping[Key, Critic]) -> nn.ModuleDict:
    """Return critics as one module, by modality."""
    return nn.ModuleDict({key_text(key).replace(".", "_"): critic for key, critic in critics.items()})


def check_critics(critics: Any) -> dict[Key, Critic]:
    """Return modality, or modalities, -> critic. Raises a TypeError or a ValueError for anything else."""
    if not isinstance(critics, Mapping) or not critics:
        raise TypeError(f"expected critics to be a dictionary, modality -> Critic, got {describe(critics)}")
    found: dict[Key, Critic] = {}
    owner: dict[str, Key] = {}
    for given, critic in critics.items():
        if not isinstance(critic, Critic):
            raise TypeError(f"expected critics[{given!r}] to be an objectives.Critic, got {describe(critic)}")
        key = _check_key(given, critic)
        for name in names_of(key):
            if name in owner:
                raise ValueError(
                    f"critics of {key_text(owner[name])} and of {key_text(key)} both judge {name!r}: leave one out"
                )
            owner[name] = key
        found[key] = critic
    if len(set(map(id, found.values()))) < len(found):
        raise ValueError("two modalities share a critic, whose network sees the values of one: give each its own")
    return found


def _check_key(key: Any, critic: Critic) -> Key:
    """Return the modality, or the modalities, of a critic. Raises a TypeError or a ValueError for anything else."""
    if isinstance(key, str):
        return key
    if not isinstance(key, tuple) or not key or not all(isinstance(name, str) for name in key):
        raise TypeError(
            f"expected the keys of critics to be modalities, or tuples of modalities for one critic of all of them, "
            f"got {describe(key)}"
        )
    if len(set(key)) < len(key):
        raise ValueError(f"a critic of {key_text(key)} names a modality twice")
    if len(key) == 1:
        return str(key[0])
    if not critic.form.replaces_kl:
        raise ValueError(
            f"one critic of {key_text(key)} against the posterior: given the latents the modalities are independent, "
            "so give each a critic of its own; or let this one stand against the prior"
        )
    names: tuple[str, ...] = key
    return names
