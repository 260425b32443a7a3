r"""How an importance sampler draws from a guide: stratified, antithetic or quasi-random, with a share of the prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..utils.arguments import check_choice, check_flag, check_number


@dataclass(frozen=True)
class Proposal:
    r"""What is drawn from, and how: :math:`(1 - s) q(z | x_S) + s p(z)`, whose density all weights have below them.

    Args:
        draws: ``"independent"``; ``"antithetic"``, pairs made of u and 1 - u; or ``"quasi"``, scrambled Sobol points.
            The last two need guides whose draws are functions of uniforms (Normal, Laplace, mixtures and products of
            them, flows on top of them; no mixtures within ``to_event``).
        stratify: takes the components of a mixture, and the share of the prior, in their proportions and not at random.
        prior_share: s, the share of draws from the model's prior, for the latents of a row together. A defensive
            mixture (Hesterberg 1995, Technometrics 37:185): no weight exceeds p(x | z) / s.
    """

    draws: DrawMethod = "independent"
    stratify: bool = True
    prior_share: float = 0.0

    def __post_init__(self) -> None:
        check_choice("draws", self.draws, ("independent", "antithetic", "quasi"))
        check_flag("stratify", self.stratify)
        check_number("prior_share", self.prior_share, 0, 1)


DrawMethod = Literal["independent", "antithetic", "quasi"]
