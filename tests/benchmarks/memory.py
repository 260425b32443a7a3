"""Resident memory over many small training steps: python tests/benchmarks/memory.py [STEPS] [--compile].

Prints the resident memory after each tenth of the steps, and the slope over the second half, in bytes per step. The
history grows by one number per column and epoch, which is 200 steps here.
"""

import argparse
import os

import numpy as np
import pyro.distributions as dist
import torch
from torch import nn

import pyro_mm as mm

STEPS_PER_EPOCH = 200


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="?", type=int, default=20_000)
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    normal = lambda i, o: mm.conditionals.Normal(nn.Linear(i, 2 * o))  # noqa: E731
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    model = mm.models.SharedLatent(prior, {"a": normal(2, 3), "b": normal(2, 1)})
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"a": normal(3, 2), "b": normal(1, 2)}))
    i = torch.arange(4 * STEPS_PER_EPOCH)
    rows = mm.Batch({"a": torch.randn(len(i), 3), "b": torch.randn(len(i), 1)}, {"a": i % 5 != 1, "b": i % 5 != 2})
    epochs = arguments.steps // STEPS_PER_EPOCH
    points = []

    def record(epoch, entry):
        points.append((epoch * STEPS_PER_EPOCH, resident_bytes()))
        if epoch % max(1, epochs // 10) == 0:
            print(f"{points[-1][0]:>7} steps  {points[-1][1] / 2**20:8.1f} MiB", flush=True)

    mm.fit(
        model, guide, mm.objectives.elbo(), rows, epochs=epochs, batch_size=4, seed=0, progress=False,
        compile=arguments.compile, callback=record,
    )  # fmt: skip
    steps, memory = np.array(points[len(points) // 2 :], dtype=float).T
    slope, _ = np.polyfit(steps, memory, 1)
    print(f"slope over the second half: {slope:.1f} bytes per step")


if __name__ == "__main__":
    main()
