"""Critics on a linear-Gaussian model of two modalities, implicit or not, whose log p(x, y) is a closed form."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ... import conditionals
from ...batch.batch import Batch
from ...models import SharedLatent
from ...nn import MLP
from ...objectives import PRIOR, Critic, Objective, Term
from ...objectives.critic_forms import TwoWay
from ...posteriors import ProductOfExperts
from ...posteriors.guide import Guide
from ...recipes.networks import Recipe, standard_prior
from ...sampling.encode import encode
from ...training.callbacks import WeightAverage
from ...utils.seeding import temporary_seed
from .study import Measurements, Sample, Study

LATENT = 2
ROWS = 2000
SIZES = {"x": 2, "y": 1}
WEIGHTS = torch.tensor([[1.0, 0.3], [-0.4, 0.8], [0.9, 0.5]])  # of x, x and y
OFFSETS = torch.tensor([0.5, -0.5, 0.0])
NOISE = 0.5  # standard deviation of both modalities
AVERAGE = 0.99
EPOCHS = 300


def sample_data(seed: int, directory: str | None = None) -> Sample:
    """Return rows of x (2-d) and y (1-d) of a linear-Gaussian model, for training and as many to test.

    Args:
        seed: of the draws.
        directory: unused; every study has it.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    parts = []
    for _ in range(2):
        z = torch.randn(ROWS, LATENT, generator=generator)
        values = z @ WEIGHTS.T + OFFSETS + NOISE * torch.randn(ROWS, 3, generator=generator)
        parts.append(Batch({"x": values[:, :2], "y": values[:, 2:]}))
    return Sample(*parts)


def recipe(batch: Batch, against: str | None) -> Recipe:
    """Build the model with x explicit, or implicit and trained by a critic.

    Args:
        batch: training rows.
        against: "posterior" or "prior"; "prior, all" for x and y both implicit, and one critic of them; "two-way" for
            the critic of joint and fake pairs alone; None for an explicit x.
    """
    implicit = {None: (), "prior, all": ("x", "y")}.get(against, ("x",))
    decoders: dict[str, nn.Module] = {
        name: conditionals.Implicit(LinearGenerator(size), noise=size) if name in implicit else _explicit(size)
        for name, size in SIZES.items()
    }
    experts = {
        name: conditionals.Normal(MLP(size, 2 * LATENT, (32,), activation=nn.SiLU)) for name, size in SIZES.items()
    }
    terms = [Term(("x", "y"), ("x", "y"), PRIOR)]
    if "y" not in implicit:
        terms.append(Term(("y",), ("y",), PRIOR))
    objective = Objective(terms)
    if against is not None:
        judged = sum(SIZES[name] for name in implicit)
        critic = Critic(
            MLP(judged + LATENT, 3 if against == "posterior" else 1, (64, 64), activation=partial(nn.LeakyReLU, 0.2)),
            "prior" if against in ("prior", "prior, all") else "posterior",
            optimizer=lambda parameters: torch.optim.Adam(parameters, 3e-3, betas=(0.5, 0.99)),
        )
        if against == "two-way":
            critic.form = TwoWay()
        objective = objective.with_critics({implicit if len(implicit) > 1 else "x": critic})
    return Recipe(SharedLatent(standard_prior(LATENT), decoders), Guide(z=ProductOfExperts(experts)), objective)


def _explicit(size: int) -> nn.Module:
    """Return a linear decoder with a learned scale."""
    return conditionals.Normal(nn.Linear(LATENT, size), scale=nn.Parameter(torch.zeros(1)))


class LinearGenerator(nn.Module):
    """The generator x = W z + b + s u of a linear-Gaussian modality.

    Args:
        size: dimensions of x, and of the noise u.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(LATENT, size)
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, parents: Tensor) -> Tensor:
        """Return x of z and u behind each other, ``(.., LATENT + size)``."""
        x: Tensor = self.linear(parents[..., :LATENT]) + self.log_scale.exp() * parents[..., LATENT:]
        return x


def joint_normal(model: SharedLatent) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of (x, y) under a model of :func:`recipe`."""
    means, loadings, variances = [], [], []
    for name in ("x", "y"):
        decoder: Any = model.decoders[name]
        generator: Any = decoder.net if isinstance(decoder, conditionals.Implicit) else decoder
        linear: Any = generator.linear if isinstance(generator, LinearGenerator) else generator.net
        means.append(linear.bias.detach().double())
        loadings.append(linear.weight.detach().double())
        variance = (2 * generator.log_scale.detach().double()).exp()
        variances.append(variance * torch.eye(linear.out_features, dtype=torch.float64, device=variance.device))
    loading = torch.cat(loadings)
    return torch.cat(means), loading @ loading.T + torch.block_diag(*variances)


def truth() -> tuple[Tensor, Tensor]:
    """Return mean and covariance of (x, y) in the data."""
    weights = WEIGHTS.double()
    return OFFSETS.double(), weights @ weights.T + NOISE**2 * torch.eye(3, dtype=torch.float64)


def log_density(batch: Batch, mean: Tensor, covariance: Tensor) -> Tensor:
    """Return log p(x, y) of each row, ``(N,)``."""
    values = torch.cat([batch["x"], batch["y"]], -1).double().cpu()
    log_prob: Tensor = torch.distributions.MultivariateNormal(mean.cpu(), covariance.cpu()).log_prob(values)
    return log_prob


def gaussian_information(x: Tensor, z: Tensor) -> float:
    """Return the mutual information of two vectors in nats, from the moments of a sample as if it were Gaussian."""
    both = torch.cat([x, z], -1).double()
    dims = x.shape[-1]
    covariance = torch.cov(both.T)
    parts = torch.logdet(covariance[:dims, :dims]) + torch.logdet(covariance[dims:, dims:])
    return float(parts - torch.logdet(covariance)) / 2


def measure(run: Recipe, sample: Sample, seed: int, fitted: bool = True) -> Measurements:
    """Measure the loss of log-evidence, and the information that latents hold of the implicit modality.

    Args:
        run: a trained recipe.
        sample: its data.
        seed: of the draws.
        fitted: unused, since the likelihood is a closed form.

    Returns:
        Column -> value: log p(x, y) of the test rows under the truth less that under the model, in nats per row; and
        the information of x and z, z from the guide given x and y, in nats and as a share of that of the exact
        posterior.
    """
    model: Any = run.model
    rows = sample.test
    gap = log_density(rows, *truth()) - log_density(rows, *joint_normal(model))
    with torch.no_grad(), temporary_seed(seed, rows.device):
        z = encode(run.guide, rows)["z"].sample()
    information = gaussian_information(rows["x"], z)
    covariance = truth()[1][:2, :2]
    exact = (float(torch.logdet(covariance)) - 4 * math.log(NOISE)) / 2
    return {"gap": gap.mean().item(), "I_q(x; z)": information, "of the truth's": information / exact}


def _optimizer(run: Recipe, parameters: Any) -> torch.optim.Optimizer:
    beta = 0.5 if isinstance(run.objective, Objective) and run.objective.critics else 0.9
    return torch.optim.Adam(parameters, 2e-3, betas=(beta, 0.99))


def _decay(optimizer: torch.optim.Optimizer, epochs: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Return a schedule that is constant for the first half, and falls linearly in the second."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: max(0.02, min(1.0, 2 * (1 - epoch / epochs))))


MEMBERS: dict[str, str | None] = {
    "explicit": None,
    "critic, posterior": "posterior",
    "critic, prior": "prior",
    "one critic of x and y, prior": "prior, all",
    "critic, two-way": "two-way",
}

GAUSSIAN = Study(
    title="Linear-Gaussian model of x (2-d, implicit) and y (1-d): critics and the likelihood",
    groups={"2,000 rows": sample_data},
    members={name: partial(recipe, against=against) for name, against in MEMBERS.items()},
    measure=measure,
    epochs=EPOCHS,
    batch_size=200,
    optimizer=_optimizer,
    scheduler=_decay,
    seeds=5,
    compile=True,
    callbacks=lambda: [WeightAverage(AVERAGE)],
)
