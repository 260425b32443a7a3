"""An epoch of JMVAE-kl on MNIST at the size of its paper, as it is and compiled, and what 500 of them would take.

    python tests/benchmarks/epoch.py

Batches of 100, latent 64, two hidden layers of 512, alpha 0.1 (Suzuki et al. 2016, arXiv:1611.01891), ``pyro_mm.fit``
from rows to optimiser, on CUDA where there is one. Seconds are those of every epoch but the first, which traces and
compiles; the projection is a multiple of their median, and no measurement. Without MNIST (``PYRO_MM_DATA``) the rows
are random bits, which changes no time.
"""

import argparse
import time
from itertools import pairwise
from statistics import median

import torch

import pyro_mm as mm


def rows_of(count: int) -> mm.Batch:
    try:
        return mm.datasets.load("mnist")[0][:count]
    except (FileNotFoundError, OSError, ValueError):
        image = torch.bernoulli(torch.full((count, 28, 28), 0.2))
        return mm.Batch({"image": image, "label": torch.arange(count) % 10})


def seconds(rows: mm.Batch, epochs: int, device: str, compiled: bool) -> list[float]:
    torch.manual_seed(0)
    stamps = [time.perf_counter()]
    mm.fit(
        *mm.recipes.jmvae_kl(rows, latent=64, hidden=(512, 512)), rows, epochs=1 + epochs, batch_size=100, seed=0,
        device=device, progress=False, compile=compiled, callback=lambda *_: stamps.append(time.perf_counter()),
    )  # fmt: skip
    return [b - a for a, b in pairwise(stamps)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--epochs", type=int, default=2, help="after the first one")
    parser.add_argument("--threads", type=int, help="by default torch's own number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = rows_of(options.rows)
    for compiled in (False, True):
        first, *rest = seconds(rows, options.epochs, options.device, compiled)
        each = median(rest)
        how, threads = "compiled" if compiled else "as it is", torch.get_num_threads()
        print(f"{how}, {options.device}, {threads} threads: {each:.1f} s an epoch of {rows.size} rows ", end="")
        print(f"(the first one {first:.1f} s); 500 would take {500 * each / 60:.0f} minutes", flush=True)


if __name__ == "__main__":
    main()
