"""Proposals of importance samplers, as values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..utils.arguments import check_choice, check_flag, check_number, describe
from .fitted_proposal import Fitted
from .guide_sampler import DRAW_METHODS, DrawMethod, GuideSampler
from .particle_sampler import ParticleSampler, ProposalScheme, RowBlock


@dataclass(frozen=True)
class Proposal(ProposalScheme):
    r"""Settings by which an importance sampler draws its particles from a guide.

    The proposal density, the denominator of every weight, is

    .. math:: (1 - s) \, q(z | x_S) + s \, p(z)

    with s the share of the prior. It is passed as ``proposal=`` to :func:`~pyro_mm.log_marginal`,
    :func:`~pyro_mm.log_conditional`, :func:`~pyro_mm.compare`, and with ``resample=True`` to
    :func:`~pyro_mm.posterior_draws` and :func:`~pyro_mm.generate`. All settings give unbiased estimates of p(x); they
    differ in variance.

    Args:
        draws (str): ``"independent"``; ``"antithetic"``, pairs made of uniforms u and 1 - u, which reduce the variance
            if weights rise or fall with z and increase it if they are symmetric around the guide's mean; or
            ``"quasi"``, scrambled Sobol points in 20 independent randomisations, whose spread is the standard error.
            The last two need guides whose draws are functions of uniforms: Normal, Laplace, mixtures and products of
            them and flows on top, but no mixture within ``to_event``.
        stratify (bool): draw from the components of a mixture, and from the prior, in their exact proportions rather
            than at random.
        prior_share (float): s, from 0 to 1, the share of particles drawn from the model's prior, all latents of a row
            together. A defensive mixture: no weight exceeds p(x | z) / s, however narrow the guide. With 1 the guide is
            not used.

    Raises:
        TypeError: a setting of another type.
        ValueError: an unknown way to draw, or a share outside [0, 1].

    Example:
        >>> import pyro_mm as mm
        >>> mm.Proposal(draws="quasi", prior_share=0.1)
        Proposal(draws='quasi', stratify=True, prior_share=0.1)

    References:
        Hesterberg 1995, "Weighted average importance sampling and defensive mixture distributions", Technometrics
        37:185. Owen 2013, "Monte Carlo theory, methods and examples", chapters 8, 9 and 17.
    """

    draws: DrawMethod = "independent"
    stratify: bool = True
    prior_share: float = 0.0

    def __post_init__(self) -> None:
        check_choice("draws", self.draws, DRAW_METHODS)
        check_flag("stratify", self.stratify)
        check_number("prior_share", self.prior_share, 0, 1)

    def sampler(self, rows: RowBlock) -> ParticleSampler:
        """Return a sampler of particles for a block of rows."""
        return GuideSampler(rows, self.draws, self.stratify, self.prior_share)


def resolve_proposal(proposal: Any, **settings: Any) -> ProposalScheme:
    """Return the proposal that a caller asks for, as a value or by its settings one by one.

    Args:
        proposal: a proposal, ``"fitted"``, or None.
        settings: ``draws``, ``stratify`` and ``prior_share`` of a :class:`Proposal`; None for its default.

    Raises:
        TypeError: a proposal of another type.
        ValueError: a proposal and settings beside it.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if proposal is None:
        return Proposal(**given)
    if isinstance(proposal, str) and proposal == "fitted":
        proposal = Fitted()
    if not isinstance(proposal, ProposalScheme):
        raise TypeError(
            f"expected proposal to be a pyro_mm.Proposal, a pyro_mm.Fitted, 'fitted' or None, got {describe(proposal)}"
        )
    if given:
        names = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(
            f"expected the settings of draws once, got {names} beside proposal={proposal!r}: put them into the proposal"
        )
    return proposal
