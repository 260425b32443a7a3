"""Likelihoods by fitted proposals against closed forms and quadrature: errors, z-scores, k-hat and coverage.

    python tests/benchmarks/fitted_coverage.py --rows 500 --seeds 100 --particles 500

Prints three tables. Linear-Gaussian stories of 2 to 8 modalities, every missing pattern, a guide that is too narrow and
beside the posterior: the largest error once the fit has settled, with no shares and no widening, and z-scores at the
defaults. Non-linear stories of one and two latents against quadrature: the share of rows within three standard errors,
the coverage of 95 % intervals over all rows and seeds, and the ratio of the mean weight to the truth, which is 1 for an
unbiased estimate. The same for latents with bounds, private ones and a label that is summed out.
"""

import argparse
import math
from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_mm as mm

SETTLED = mm.Fitted(rounds=30, guide_share=0.0, prior_share=0.0, widen=0.0)


class Problem(NamedTuple):
    """A story and its guide, rows simulated from it, and their true evidence."""

    model: Callable[[mm.Batch], Any]
    guide: Callable[[mm.Batch], Any]
    batch: mm.Batch
    truth: Tensor
    proposal: mm.Fitted


def grid(low: float, high: float, points: int, dimensions: int) -> tuple[Tensor, float]:
    """Return points ``(P, dimensions)`` and the log-volume of each."""
    axis = torch.linspace(low, high, points)
    axes = torch.meshgrid(*[axis] * dimensions, indexing="ij")
    return torch.stack(axes, -1).reshape(-1, dimensions), dimensions * math.log((high - low) / (points - 1))


def integrate(log_density: Callable[[int], Tensor], rows: int, log_volume: float) -> Tensor:
    """Return log integrals, one for each row."""
    return torch.stack([log_density(n).logsumexp(0) + log_volume for n in range(rows)])


# -- linear-Gaussian stories ------------------------------------------------------------------------------------------


def linear(modalities: int, latent: int) -> tuple[mm.models.LinearGaussian, mm.Batch]:
    """Return a linear-Gaussian story and rows of every missing pattern."""
    generator = torch.Generator().manual_seed(modalities)
    loadings = {f"x{m}": torch.randn(2 + m % 3, latent, generator=generator) for m in range(modalities)}
    model = mm.models.LinearGaussian(loadings, {name: 0.7 + 0.1 * m for m, name in enumerate(loadings)})
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    patterns = [s for size in range(modalities + 1) for s in combinations(loadings, size)]
    full = model.sample(len(patterns))
    present = {n: torch.tensor([n in pattern for pattern in patterns]) for n in loadings}
    return model, mm.Batch({n: full[n] for n in loadings}, present=present)


def beside(model: mm.models.LinearGaussian) -> mm.Guide:
    return mm.Guide(z=lambda batch: dist.Normal(model.posterior(batch).mean + 1.5, 0.3).to_event(1))


def print_linear(particles: int) -> None:
    print(f"{'modalities':>10} {'rows':>5} {'largest error':>14} {'k-hat':>6} | {'rms of z':>8} {'k-hat':>6}")
    for modalities in range(2, 9):
        torch.manual_seed(modalities)
        model, batch = linear(modalities, latent=4)
        truth, guide = model.log_prob(batch), beside(model)
        settled = mm.log_marginal(model, guide, batch, proposal=SETTLED, num_particles=particles, seed=0)
        found = mm.log_marginal(model, guide, batch, proposal="fitted", num_particles=particles, seed=0)
        z = ((found.log_prob - truth) / found.standard_error)[batch.rows]
        print(
            f"{modalities:>10} {batch.size:>5} {(settled.log_prob - truth).abs().max().item():>14.1e} "
            f"{settled.pareto_k.max().item():>6.2f} | {z.square().mean().sqrt().item():>8.2f} "
            f"{found.pareto_k[batch.rows].max().item():>6.2f}",
            flush=True,
        )


# -- non-linear stories -----------------------------------------------------------------------------------------------


def bent(rows: int) -> Problem:
    """One latent, a saturating mean and a label."""

    def model(batch: mm.Batch) -> None:
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe("x", lambda z: dist.Normal(2 * z.tanh(), 0.4), z)
            batch.observe("y", lambda z: dist.Bernoulli(logits=3 * z - 1), z)

    batch, _ = mm.simulate(model, mm.Batch({"x": torch.zeros(rows), "y": torch.zeros(rows)}))
    z, log_volume = grid(-9, 9, 8001, 1)
    z = z[:, 0]
    prior = dist.Normal(0.0, 1.0).log_prob(z)
    x, y = dist.Normal(2 * z.tanh(), 0.4), dist.Bernoulli(logits=3 * z - 1)
    truth = integrate(lambda n: prior + x.log_prob(batch["x"][n]) + y.log_prob(batch["y"][n]), rows, log_volume)
    return Problem(model, mm.Guide(z=lambda b: dist.Normal(0.5 * b["x"], 0.3)), batch, truth, mm.Fitted())


def modes(rows: int, frequency: float | None) -> Problem:
    """One latent, of which the square (two modes) or a cosine (three and more) is seen."""
    mean = torch.square if frequency is None else lambda z: (frequency * z).cos()

    def model(batch: mm.Batch) -> None:
        with batch.plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            batch.observe("x", lambda z: dist.Normal(mean(z), 0.3), z)

    def guide(batch: mm.Batch) -> None:
        with batch.plate():
            pyro.sample("z", dist.Normal(0.0, 1.2).expand([len(batch)]))

    batch, _ = mm.simulate(model, mm.Batch({"x": torch.zeros(rows)}))
    z, log_volume = grid(-9, 9, 20_001, 1)
    z = z[:, 0]
    prior, x = dist.Normal(0.0, 1.0).log_prob(z), dist.Normal(mean(z), 0.3)
    truth = integrate(lambda n: prior + x.log_prob(batch["x"][n]), rows, log_volume)
    return Problem(model, guide, batch, truth, mm.Fitted(components=2 if frequency is None else 4))


def banana(rows: int) -> Problem:
    """Two latents on a bent ridge."""

    def model(batch: mm.Batch) -> None:
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            batch.observe("x", lambda z: dist.Normal(z[..., 0] + 0.5 * z[..., 1] ** 2, 0.4), z)

    batch, _ = mm.simulate(model, mm.Batch({"x": torch.zeros(rows)}))
    z, log_volume = grid(-6.5, 6.5, 401, 2)
    prior, x = dist.Normal(0.0, 1.0).log_prob(z).sum(-1), dist.Normal(z[:, 0] + 0.5 * z[:, 1] ** 2, 0.4)
    truth = integrate(lambda n: prior + x.log_prob(batch["x"][n]), rows, log_volume)

    def guide(batch: mm.Batch) -> None:
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(2), 0.6).to_event(1).expand([len(batch)]))

    return Problem(model, guide, batch, truth, mm.Fitted(components=3))


def constrained(rows: int) -> Problem:
    """LogNormal, half-Normal, Beta, Dirichlet and Laplace latents, and a label that only the story has."""
    share_prior, kinds = torch.tensor([2.0, 1.5]), torch.tensor([0.3, 0.7])

    def model(batch: mm.Batch) -> None:
        with batch.plate():
            rate = pyro.sample("rate", dist.LogNormal(0.0, 0.7))
            size = pyro.sample("size", dist.HalfNormal(1.0))
            part = pyro.sample("part", dist.Beta(2.0, 1.5))
            share = pyro.sample("share", dist.Dirichlet(share_prior))
            place = pyro.sample("w_p", dist.Laplace(0.0, 1.0))
            kind = pyro.sample("kind", dist.Categorical(kinds))
            batch.observe("count", lambda rate, kind: dist.Poisson(rate * (1.0 + kind)), rate, kind)
            batch.observe("y", lambda size: dist.Normal(0.0, size + 0.1), size)
            batch.observe("u", lambda part: dist.Binomial(10, part), part)
            batch.observe("v", lambda share: dist.Binomial(4, share[..., 0]), share)
            batch.observe("p", lambda place: dist.Normal(place, 0.5), place)

    def guide(batch: mm.Batch) -> None:
        with batch.plate():
            pyro.sample("rate", dist.LogNormal(0.2, 0.4).expand([len(batch)]))
            pyro.sample("size", dist.LogNormal(0.0, 0.5).expand([len(batch)]))
            pyro.sample("part", dist.Beta(2.0, 2.0).expand([len(batch)]))
            pyro.sample("share", dist.Dirichlet(torch.tensor([3.0, 3.0])).expand([len(batch)]))
            pyro.sample("w_p", dist.Normal(0.5, 0.5).expand([len(batch)]))

    names = ("count", "y", "u", "v", "p")
    full, _ = mm.simulate(model, mm.Batch({n: torch.zeros(rows) for n in names}))
    batch = mm.Batch({n: full[n] for n in names}, present={n: torch.rand(rows) < 0.8 for n in names})

    line, unit, wide = (
        torch.linspace(*ends) for ends in ((1e-6, 80.0, 40_001), (1e-9, 1.0, 8001), (-30.0, 30.0, 24_001))
    )
    line, unit = line.double(), unit.clamp(max=1 - 1e-9)
    integral = lambda prior, likelihood, at: torch.trapezoid((prior.log_prob(at) + likelihood).exp(), at)  # noqa: E731
    factors: dict[str, Callable[[int], Tensor]] = {
        "count": lambda n: sum(
            w * integral(dist.LogNormal(0.0, 0.7), dist.Poisson(line * (1 + k)).log_prob(batch["count"][n]), line)
            for k, w in enumerate(kinds)
        ),
        "y": lambda n: integral(dist.HalfNormal(1.0), dist.Normal(0.0, line + 0.1).log_prob(batch["y"][n]), line),
        "u": lambda n: integral(dist.Beta(2.0, 1.5), dist.Binomial(10, unit).log_prob(batch["u"][n]), unit),
        "v": lambda n: integral(dist.Beta(2.0, 1.5), dist.Binomial(4, unit).log_prob(batch["v"][n]), unit),
        "p": lambda n: integral(dist.Laplace(0.0, 1.0), dist.Normal(wide, 0.5).log_prob(batch["p"][n]), wide),
    }
    truth = torch.stack(
        [sum((factors[m](n).log() for m in names if batch.present[m][n]), torch.zeros(())) for n in range(rows)]
    )
    return Problem(model, guide, batch, truth, mm.Fitted())


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "one mode": bent,
    "two modes": lambda rows: modes(rows, None),
    "three modes": lambda rows: modes(rows, 3.0),
    "bent ridge": banana,
    "bounds, a label": constrained,
}


def print_quadrature(names: list[str], rows: int, seeds: int, particles: int) -> None:
    print(
        f"{'story':>16} {'within 3':>9} {'coverage':>9} {'in rows with k-hat <= 0.7':>26} {'k-hat > 0.7':>12} "
        f"{'median ESS':>11} {'mean weight / truth':>20}"
    )
    for name in names:
        torch.manual_seed(0)
        problem = PROBLEMS[name](rows)
        errors, tails, sizes, ratios = [], [], [], []
        for seed in range(seeds):
            found = mm.log_marginal(
                problem.model, problem.guide, problem.batch, proposal=problem.proposal, num_particles=particles,
                seed=1000 * seed, audit=False,
            )  # fmt: skip
            some = found.counted
            errors.append(((found.log_prob - problem.truth) / found.standard_error)[some])
            tails.append(found.pareto_k[some])
            sizes.append(found.ess[some])
            ratios.append((found.log_prob - problem.truth)[some].exp())
        z, k, ess, ratio = (torch.stack(x) for x in (errors, tails, sizes, ratios))
        covered = (z.abs() < 1.96).double()
        trusted = covered[k <= 0.7].mean().item()
        unbiased = f"{ratio.mean().item():.5f} +- {ratio.mean(1).std().item() / seeds**0.5:.5f}"
        print(
            f"{name:>16} {(z.abs() < 3).double().mean().item():>9.4f} {covered.mean().item():>9.4f} {trusted:>26.4f} "
            f"{(k > 0.7).double().mean().item():>12.4f} {ess.median().item():>11.0f} {unbiased:>20}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--particles", type=int, default=500)
    parser.add_argument("--only", nargs="*", default=list(PROBLEMS), choices=list(PROBLEMS))
    options = parser.parse_args()
    torch.set_default_dtype(torch.float64)
    print_linear(options.particles)
    print()
    print_quadrature(options.only, options.rows, options.seeds, options.particles)


if __name__ == "__main__":
    main()
