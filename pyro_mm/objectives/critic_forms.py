r"""The games of critics: the pairs that a critic tells apart, and the ratios of densities that its logits give.

With q the guide given what a term encodes, :math:`p_d` the density of the data, and :math:`\theta` the generator:

======  ==================================================  ==========================
pair    values and latents                                  density
======  ==================================================  ==========================
joint   x of a row, z ~ q of that row                       :math:`q(x, z)`
fake    x generated from z; z ~ q, or z ~ p                 :math:`p(x | z) q(z)`, or :math:`p(x | z) p(z)`
other   x of another row, z ~ q of a row                    :math:`p_d(x) q(z)`
======  ==================================================  ==========================
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor
from torch.nn.functional import cross_entropy, softplus


class CriticForm(ABC):
    """A game of a critic.

    Attributes:
        outputs: number of outputs of its network.
        has_other: True if the critic is shown pairs of a value and the latents of another row.
        fakes_from_prior: True if latents of fakes are draws of the prior; False if they are those of the joint pairs.
        replaces_kl: True if the ratio stands for likelihood and KL of a term, and not for the likelihood alone.
    """

    outputs: int
    has_other: bool
    fakes_from_prior: bool
    replaces_kl: bool

    @abstractmethod
    def log_ratio(self, logits: Tensor) -> Tensor:
        """Return the logarithm of the ratio that counts in the objective, ``(..)``, of logits ``(.., outputs)``."""

    @abstractmethod
    def realness(self, logits: Tensor) -> Tensor:
        """Return log joint - log fake, ``(..)``, of logits ``(.., outputs)``."""

    @abstractmethod
    def loss(self, joint: Tensor, fake: Tensor, other: Tensor | None) -> Tensor:
        """Return the cross-entropy of the critic in nats per row, ``(N,)``, of logits ``(N, outputs)``."""


class ThreeWay(CriticForm):
    r"""Joint, fake and other pairs: :math:`\log p(x | z) - \log p_d(x)` is the fake logit less that of other pairs."""

    outputs = 3
    has_other = True
    fakes_from_prior = False
    replaces_kl = False

    def log_ratio(self, logits: Tensor) -> Tensor:
        return logits[..., 1] - logits[..., 2]

    def realness(self, logits: Tensor) -> Tensor:
        return logits[..., 0] - logits[..., 1]

    def loss(self, joint: Tensor, fake: Tensor, other: Tensor | None) -> Tensor:
        assert other is not None
        found = [
            cross_entropy(logits, logits.new_full(logits.shape[:-1], place).long(), reduction="none")
            for place, logits in enumerate((joint, fake, other))
        ]
        return found[0] + found[1] + found[2]


class TwoWay(CriticForm):
    r"""Joint and fake pairs of the same latents: minus the logit is :math:`\log p(x | z) - \log q(x | z)`.

    The objective is then the ELBO less the mutual information of x and z under q, so that latents learn to ignore x. No
    ``Critic`` offers it; experiments show what it loses.
    """

    outputs = 1
    has_other = False
    fakes_from_prior = False
    replaces_kl = False

    def log_ratio(self, logits: Tensor) -> Tensor:
        return -logits[..., 0]

    def realness(self, logits: Tensor) -> Tensor:
        return logits[..., 0]

    def loss(self, joint: Tensor, fake: Tensor, other: Tensor | None) -> Tensor:
        return softplus(-joint[..., 0]) + softplus(fake[..., 0])


class AgainstPrior(TwoWay):
    r"""Joint pairs, and fakes of draws from the prior: minus the logit is :math:`\log p(x, z) - \log q(x, z)`."""

    fakes_from_prior = True
    replaces_kl = True


FORMS: dict[str, type[CriticForm]] = {"posterior": ThreeWay, "prior": AgainstPrior}
