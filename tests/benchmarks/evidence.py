"""Evidence of many rows against the time of the decoders' matrix products alone, in one run.

    python tests/benchmarks/evidence.py --rows 10000 --particles 1000 --hidden 512 512 --latent 64

Prints seconds of both, taken by turns, their ratio, and the peak of resident memory. Rows are those of MNIST's test set
where there is one (``PYRO_MM_DATA``), else random bits: neither changes the time.

    python tests/benchmarks/evidence.py --peer ~/peer/bin/python --networks mlp2 --rows 100

is the joint likelihood of that many rows by ``log_marginal`` and by ``multivae``, untrained, with the networks and the
environment that ``steps.py`` tells of; by turns too, and beside the matrix products of the decoders alone.
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


def seconds(run: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    start = clock()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def against_the_peer(options: argparse.Namespace) -> None:
    from contenders import MODELS, Peer, story_and_guide
    from networks import SETTINGS, Networks

    print(f"seconds for {options.rows} rows at K = {options.particles}, {torch.get_num_threads()} threads, by turns")
    for name in options.models:
        torch.manual_seed(0)
        model = MODELS[name]
        nets = Networks(SETTINGS[options.networks](400), model.joint).to(options.device)
        values = {m: x.to(options.device) for m, x in nets.setting.values(options.rows).items()}
        batch, pair = mm.Batch(values), story_and_guide(model, nets)
        wanted = {"networks": options.networks, "width": 400, "batch": options.rows, "device": options.device}
        wanted |= {
            "threads": torch.get_num_threads(),
            "clock": "process_time" if options.processor_time else "perf_counter",
        }
        wanted |= {"model": model.peer, "options": model.options, "rows": options.rows, "particles": options.particles}
        peer, clock = Peer(options.peer, wanted), time.process_time if options.processor_time else time.perf_counter
        decoders = products(torch.nn.ModuleDict(nets.decoders), options.rows * options.particles, batch.device)
        ours, theirs, floor = [], [], []
        for _ in range(1 + options.parts):
            theirs.append(peer.step() / 1e3)
            start = clock()
            mm.log_marginal(*pair, batch, num_particles=options.particles, seed=0)
            ours.append(clock() - start)
            start = clock()
            decoders()
            floor.append(clock() - start)
        peer.close()
        each = [median(a / b for a, b in zip(ours[1:], other[1:], strict=True)) for other in (theirs, floor)]
        times = f"ours {median(ours[1:]):.2f}, peer {median(theirs[1:]):.2f}, products {median(floor[1:]):.2f}"
        print(
            f"{options.networks}, {name}: {times}; ours / peer {each[0]:.2f}, ours / products {each[1]:.2f}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--hidden", type=int, nargs="+", default=[512, 512])
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--parts", type=int, default=5, help="the particles are evaluated in so many calls")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--peer", help="the interpreter of an environment that has multivae")
    parser.add_argument("--networks", choices=["mlp2", "poly"], default="mlp2", help="with --peer")
    parser.add_argument("--models", nargs="+", default=["mvae", "jmvae-kl", "mopoe, mixture"], help="with --peer")
    parser.add_argument("--processor-time", action="store_true", help="with --peer: not the wall's")
    parser.add_argument("--threads", type=int, help="by default torch's own number")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peer:
        against_the_peer(options)
        return
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
