"""Evidence of many rows against the time of the decoders' matrix products alone, in one run.

    python tests/benchmarks/evidence.py --rows 10000 --particles 1000 --hidden 512 512 --latent 64

Prints seconds of both, taken by turns, their ratio, and the peak of resident memory. Rows are those of MNIST's test set
where there is one (``PYRO_MM_DATA``), else random bits: neither changes the time.
"""

import argparse
import resource
import time
from collections.abc import Callable
from statistics import median

import torch

import pyro_mm as mm


def rows_of(n: int) -> mm.Batch:
    try:
        _, test = mm.datasets.load("mnist")
    except (FileNotFoundError, OSError, ValueError):
        return mm.Batch({"image": torch.bernoulli(torch.full((n, 28, 28), 0.2)), "label": torch.arange(n) % 10})
    return test[torch.arange(n) % test.size]


def products(model: torch.nn.Module, count: int, device: torch.device, chunk: int = 2**12) -> Callable[[], None]:
    """The matrix products of all linear layers, for ``count`` inputs."""
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs = [torch.randn(chunk, layer.in_features, device=device) for layer in layers]
    weights = [layer.weight.detach().T.contiguous() for layer in layers]

    def run() -> None:
        for _ in range(-(-count // chunk)):
            for x, w in zip(inputs, weights, strict=True):
                x @ w

    return run


def seconds(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 512])
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--parts", type=int, default=5, help="the particles are evaluated in so many calls")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    batch = rows_of(options.rows).to(device)
    model, guide, _ = mm.recipes.jmvae_kl(batch, latent=options.latent, hidden=options.hidden)
    model, guide = model.to(device), guide.to(device)
    each = options.particles // options.parts
    mm.log_marginal(model, guide, batch[:100], num_particles=20, seed=0)  # whatever the first call costs
    floor = products(model, options.rows * each, device)
    ours, theirs = [], []
    with torch.no_grad():
        for part in range(options.parts):
            theirs.append(seconds(floor, device))
            call = lambda part=part: mm.log_marginal(model, guide, batch, num_particles=each, seed=part)  # noqa: E731
            ours.append(seconds(call, device))
            print(f"{each} particles: {ours[-1]:.1f} s, matrix products alone {theirs[-1]:.1f} s", flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
    print(
        f"{options.rows} rows, K = {options.particles} on {device} with {torch.get_num_threads()} threads: "
        f"{sum(ours):.0f} s, matrix products alone {sum(theirs):.0f} s, median ratio {ratio:.2f}; "
        f"peak of resident memory {peak / 1024:.0f} MiB, data and libraries included"
    )


if __name__ == "__main__":
    main()
