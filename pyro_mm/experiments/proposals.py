"""The guide's draws beside proposals fitted to each row, on trained models: what is compared, and what must hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import datasets
from ..batch.batch import Batch
from ..recipes import RECIPES, Recipe
from ..sampling.fitted_proposal import Fitted

JOINT = "log p(image, label)"
IMAGE = "log p(image)"
LABEL = "log p(label)"


@dataclass(frozen=True)
class Limits:
    """Limits that estimates by fitted proposals have to keep.

    Attributes:
        untrusted: the largest share of rows with k-hat above 0.7, of every quantity.
        median_ess: quantity -> the smallest median effective sample size at K = 1,000.
    """

    untrusted: float
    median_ess: Mapping[str, float]


NORMAL_20 = Limits(0.04, {JOINT: 350, IMAGE: 350, LABEL: 500})
NORMAL_64 = Limits(0.08, {JOINT: 250, IMAGE: 250, LABEL: 250})
LAPLACE_20 = Limits(0.15, {JOINT: 120, IMAGE: 120, LABEL: 120})

# posteriors under a Laplace prior are skewed: the fit takes longer to arrive, and has to be wider
FIT_UNDER_LAPLACE = Fitted(rounds=24, draws=128, widen=0.4)


@dataclass(frozen=True)
class TrainedPair:
    """A recipe of a data set at one size, which is trained once.

    Attributes:
        dataset: the name of the data set, of images and labels.
        recipe: the name of the recipe.
        latent: the dimension of z.
        hidden: sizes of the hidden layers of every network.
        limits: the limits of its estimates.
        proposal: the settings of its fits.
    """

    dataset: str
    recipe: str
    latent: int
    hidden: tuple[int, ...]
    limits: Limits
    proposal: Fitted = field(default_factory=Fitted)

    @property
    def name(self) -> str:
        """The name of the pair in tables."""
        return f"{self.dataset}, {self.recipe}, {self.latent}"

    @property
    def stem(self) -> str:
        """The name of its files, without an ending."""
        return f"{self.dataset}_{self.recipe.replace('-', '_')}_{self.latent}"

    def build(self, train: Batch) -> Recipe:
        """Build model, guide and objective for training rows."""
        return RECIPES[self.recipe](train, latent=self.latent, hidden=self.hidden)


@dataclass(frozen=True)
class ProposalComparison:
    """Trained pairs whose likelihoods are estimated by the guide, by fitted proposals, and by annealing.

    Args:
        title: the title of the table.
        pairs: the trained pairs; each has five quantities.
        data: name -> ``load(directory=)``, to (train, test).
        train_rows: training rows, the first ones.
        rows: test rows, the first ones.
        num_particles: draws per row.
        annealed_rows: test rows that are annealed too, the first ones.
        annealing: options of :func:`pyro_mm.annealed_importance`.
        epochs: epochs of training.
        batch_size: rows per minibatch.
        optimizer: from parameters to an optimiser.
        compile: trace and compile the training step.
        transform: none; every kind of experiment has this attribute.
    """

    title: str
    pairs: tuple[TrainedPair, ...]
    data: Mapping[str, Callable[..., tuple[Batch, Batch]]]
    train_rows: int = 20_000
    rows: int = 200
    num_particles: int = 1000
    annealed_rows: int = 50
    annealing: Mapping[str, Any] = field(default_factory=dict)
    epochs: int = 5
    batch_size: int = 128
    optimizer: Callable[[Iterable[Tensor]], torch.optim.Optimizer] = lambda parameters: torch.optim.Adam(
        parameters, 1e-3, fused=True
    )
    compile: bool = False
    transform: None = None


def _pairs_of(dataset: str) -> list[TrainedPair]:
    """Return the five pairs of a data set."""
    small = [TrainedPair(dataset, recipe, 20, (400,), NORMAL_20) for recipe in ("jmvae-kl", "mvae", "mopoe")]
    laplace = TrainedPair(dataset, "mmvae", 20, (400,), LAPLACE_20, FIT_UNDER_LAPLACE)
    return [*small, laplace, TrainedPair(dataset, "jmvae-kl", 64, (512, 512), NORMAL_64)]


COMPARISONS: Mapping[str, ProposalComparison] = {
    "fitted-proposals": ProposalComparison(
        title="Proposals fitted to each row, beside the guide's draws",
        pairs=(*_pairs_of("mnist"), *_pairs_of("fashion")),
        data={"mnist": datasets.mnist, "fashion": datasets.fashion},
        annealing={"num_chains": 16, "temperatures": 200, "leapfrog_steps": 5},
    )
}
"""The names of ``pyro-mm reproduce`` for comparisons of proposals."""
