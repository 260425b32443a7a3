"""What a step costs against the number of modalities, and against the number of particles.

    python tests/benchmarks/scaling.py --modalities 2 4 6 8 10
    python tests/benchmarks/scaling.py --particles 1 5 10 50
    python tests/benchmarks/scaling.py --small 2 4 8 16 32 --processor-time

The first prints, for every objective over subsets, milliseconds of a step (loss, gradient, fused Adam), taken by turns
over M, and beside them the rows that go through all encoders and all decoders, divided by the batch. An objective is
linear in M where ms / M is level. The second prints, for a bound of K draws, the step's time and the variance of its
gradient (the sum over parameters, from --repeats gradients at fixed parameters) when all K are differentiated, and when
one drawn by its weight is (``resample=True``), each against the former's: time, variance, and their product, which is
the time to a given precision of the gradient. The third prints the step of one story of M small modalities (8 numbers,
one hidden layer of 32, 8 latents) under the masked objective and a posterior of the set, with all of them decoded and
with --subsample of them: milliseconds, those per modality, and the time against the line a + b M that fits them best
(by relative errors), which is 1 everywhere where the cost is linear. --staged traces and compiles the steps of the
first two.
"""

import argparse
import resource
import time
from collections.abc import Callable
from statistics import median

import pyro
import pyro.distributions as dist
import torch
from evidence import seconds
from torch import Tensor, nn

import pyro_mm as mm

Pair = tuple[nn.Module, mm.Guide]


def build(count: int, width: int, size: int, latent: int, mixture: str | None = None) -> Pair:
    """``count`` real-valued modalities of ``size`` numbers, networks of two hidden layers."""
    names, hidden = [f"x{i}" for i in range(count)], (width, width)
    decoders = {n: mm.conditionals.Normal(mm.nn.MLP(latent, size, hidden), scale=1.0) for n in names}
    encoders = {n: mm.conditionals.Normal(mm.nn.MLP(size, 2 * latent, hidden)) for n in names}
    posterior = getattr(mm.posteriors, mixture or "ProductOfExperts")(encoders)
    prior = dist.Normal(torch.zeros(latent), 1.0).to_event(1)
    return mm.models.SharedLatent(prior, decoders), mm.Guide(z=posterior)


OBJECTIVES: dict[str, tuple[Callable[[], mm.objectives.Objective], str | None]] = {
    "elbo": (mm.objectives.elbo, None),
    "jmvae_kl": (mm.objectives.jmvae_kl, None),
    "mvae": (mm.objectives.mvae, None),
    "mvae, 2 random subsets": (lambda: mm.objectives.mvae(2), None),
    "telbo": (mm.objectives.telbo, None),
    "mvtcae": (mm.objectives.mvtcae, None),
    "vaevae": (mm.objectives.vaevae, None),
    "masked": (mm.objectives.masked, None),
    "mmjsd": (mm.objectives.mmjsd, None),
    "dmvae": (mm.objectives.dmvae, None),
    "mmvm": (mm.objectives.mmvm, None),
    "unimodal_mean": (mm.objectives.unimodal_mean, None),
    "mopoe, the mixture's bound": (mm.objectives.mopoe, "MixtureOfProducts"),
    "mean of 4 random subsets": (lambda: mm.objectives.subset_mean(4), None),
    "mmvae, K = 1": (lambda: mm.objectives.mmvae(1), "MixtureOfExperts"),
}


class Passed:
    """Counts the rows that go through modules."""

    def __init__(self, modules: nn.ModuleDict):
        self.rows = 0
        for module in modules.values():
            module.net.register_forward_hook(lambda net, inputs, out: self.add(out))

    def add(self, out: Tensor) -> None:
        self.rows += out.shape[:-1].numel()


def stepper(objective: mm.objectives.Objective, pair: Pair, batch: mm.Batch, staged: bool) -> Callable[[], object]:
    parameters = [p for module in pair for p in module.parameters()]
    adam = torch.optim.Adam(parameters, 1e-3, fused=True)
    if staged:
        step = mm.stage(objective, *pair, batch, adam)
        return lambda: step(batch)

    def run() -> None:
        adam.zero_grad()
        objective.differentiable_loss(*pair, batch).backward()
        adam.step()

    return run


def rounds(
    runs: dict[object, Callable[[], object]],
    steps: int,
    device: torch.device,
    clock: Callable[[], float],
) -> dict[object, float]:
    """Medians of steps taken by turns."""
    times: dict[object, list[float]] = {key: [] for key in runs}
    for index in range(steps + 2):
        for key, run in runs.items():
            taken = 1e3 * seconds(run, device, clock)
            if index > 1:
                times[key].append(taken)
    return {key: median(values) for key, values in times.items()}


def against_modalities(options: argparse.Namespace) -> None:
    print("ms per step for M =", *options.modalities, "| ms / M, against the first | rows encoded, decoded, by batch")
    for name, (make, mixture) in OBJECTIVES.items():
        if options.only and not any(word in name for word in options.only):
            continue
        runs: dict[object, Callable[[], object]] = {}
        passed = []
        for count in options.modalities:
            pair = build(count, options.width, options.size, options.latent, mixture)
            pair = tuple(module.to(options.device) for module in pair)
            batch = mm.Batch({f"x{i}": torch.randn(options.batch, options.size) for i in range(count)})
            batch, objective = batch.to(options.device), make()
            objective.loss(*pair, batch)
            model, guide = pair
            counts = [Passed(guide.posteriors["z"].experts), Passed(model.decoders)]
            objective.loss(*pair, batch)
            passed.append([c.rows / options.batch for c in counts])
            runs[count] = stepper(objective, pair, batch, options.staged)
        times = rounds(runs, options.steps, options.device, options.clock)
        first = times[options.modalities[0]] / options.modalities[0]
        level = [times[m] / m / first for m in options.modalities]
        print(
            f"{name:28}", *(f"{times[m]:8.1f}" for m in options.modalities), " |", *(f"{x:5.2f}" for x in level), " |",
            *(f"{e:g},{d:g}" for e, d in passed), flush=True,
        )  # fmt: skip
    print(f"peak of resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


def small(count: int, private: bool) -> Pair:
    """A story of small modalities, each with a latent of its own if ``private``, under a posterior of their set."""
    names, latent, own = [f"x{i}" for i in range(count)], 8, 4 if private else 0
    normal = lambda n: dist.Normal(torch.zeros(n), 1.0).to_event(1)  # noqa: E731
    decoders = {n: mm.conditionals.Normal(mm.nn.MLP(latent + own, 8, (32,)), scale=1.0) for n in names}
    head = mm.conditionals.Normal(mm.nn.MLP(32, 2 * latent, (32,)))
    pool = mm.posteriors.SumPooling({n: mm.nn.MLP(8, 32, (32,)) for n in names}, head, 32)
    if not private:
        return mm.models.SharedLatent(normal(latent), decoders), mm.Guide(z=pool)
    each = {
        f"w_{n}": mm.posteriors.Private(n, mm.conditionals.Normal(mm.nn.MLP(8, 2 * own, (32,))), missing=normal(own))
        for n in names
    }
    model = mm.models.PrivateLatents(normal(latent), {n: normal(own) for n in names}, decoders)
    return model, mm.Guide(z=pool, **each)


def of_many(options: argparse.Namespace) -> None:
    counts = options.small
    for private in (False, True):
        runs: dict[object, Callable[[], object]] = {}
        for count in counts:
            batch = mm.Batch({f"x{i}": torch.randn(options.batch, 8) for i in range(count)}).to(options.device)
            for some in (None, options.subsample):
                if some is None or some <= count:
                    pair = tuple(module.to(options.device) for module in small(count, private))
                    runs[some, count] = stepper(mm.objectives.masked().subsampled(some), pair, batch, False)
        times = rounds(runs, options.steps, options.device, options.clock)
        for some in (None, options.subsample):
            print(f"{'private latents' if private else 'shared latent'}, decoding {some or 'all'}")
            print("    M       ms   ms / M   against a + b M")
            those = [m for m in counts if (some, m) in times]
            taken = torch.tensor([times[some, m] for m in those], dtype=torch.float64)
            line = torch.stack([torch.ones_like(taken), torch.tensor(those, dtype=torch.float64)], 1)
            best = line @ torch.linalg.lstsq(line / taken[:, None], torch.ones_like(taken)[:, None]).solution[:, 0]
            for m, ms, fit in zip(those, taken.tolist(), best.tolist(), strict=True):
                print(f"{m:5} {ms:8.1f} {ms / m:8.2f} {ms / fit:13.2f}", flush=True)


def against_particles(options: argparse.Namespace) -> None:
    pair = tuple(m.to(options.device) for m in build(2, options.width, options.size, options.latent))
    batch = mm.Batch({f"x{i}": torch.randn(options.batch, options.size) for i in range(2)}).to(options.device)
    train(pair, batch)
    print("   K   ms, all K    ms, one   time   variance   time x variance: one against all")
    for count in options.particles:
        both = {r: mm.objectives.elbo(mm.estimators.IWAE(count, resample=r)) for r in (False, True)}
        variance = {r: spread(objective, pair, batch, options.repeats) for r, objective in both.items()}
        runs = {r: stepper(objective, pair, batch, options.staged) for r, objective in both.items()}
        state = [{n: p.clone() for n, p in module.state_dict().items()} for module in pair]
        times = rounds(runs, options.steps, options.device, options.clock)
        for module, before in zip(pair, state, strict=True):
            module.load_state_dict(before)
        ratio, more = times[True] / times[False], variance[True] / variance[False]
        print(f"{count:4} {times[False]:11.1f} {times[True]:10.1f} {ratio:6.2f} {more:10.2f} {ratio * more:10.2f}")


def train(pair: Pair, batch: mm.Batch, steps: int = 100) -> None:
    """Some steps, since a posterior that knows nothing makes one weight of many count."""
    run = stepper(mm.objectives.elbo(), pair, batch, False)
    for _ in range(steps):
        run()


def spread(objective: mm.objectives.Objective, pair: Pair, batch: mm.Batch, repeats: int) -> float:
    """The variance of the gradient, summed over parameters."""
    parameters = [p for module in pair for p in module.parameters()]
    gradients = []
    for _ in range(repeats):
        loss = objective.differentiable_loss(*pair, batch)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]).double())
    return float(torch.stack(gradients).var(0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modalities", type=int, nargs="*", default=[])
    parser.add_argument("--particles", type=int, nargs="*", default=[])
    parser.add_argument("--small", type=int, nargs="*", default=[])
    parser.add_argument("--subsample", type=int, default=4)
    parser.add_argument("--processor-time", action="store_true", help="not the wall's: a machine that is shared")
    parser.add_argument("--only", nargs="*", help="words in the names of objectives")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--latent", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--staged", action="store_true")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.clock = time.process_time if options.processor_time else time.perf_counter
    torch.manual_seed(0)
    pyro.enable_validation(False)
    if options.modalities:
        against_modalities(options)
    if options.particles:
        against_particles(options)
    if options.small:
        of_many(options)


if __name__ == "__main__":
    main()
