"""What the audit of a pair costs, as shares of 100 training steps and of an evaluation, in one run.

    python tests/benchmarks/audit.py --hidden 400 400 --latent 64

Prints the processor time of the audit that ``fit`` does at its door, all rows of the training set against the support
included, over that of 100 uncompiled steps of batch 128; and the one that ``log_marginal`` does over an evaluation of
1,000 rows at K = 1,000; for a pair that was never audited, and for one that was. To hold: 2 % and 5 %. Rows are those
of MNIST where there is one (``PYRO_MM_DATA``), else random bits: neither changes the time.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

import pyro_mm as mm
from pyro_mm.distributions.support import _facts_by_id
from pyro_mm.scoring.audit.audit import audit
from pyro_mm.scoring.audit.past_audits import _past
from pyro_mm.scoring.audit.training import audit_training

REPEATS = 5
STEPS = 100


def mnist() -> tuple[mm.Batch, mm.Batch]:
    try:
        return mm.datasets.load("mnist")
    except (FileNotFoundError, OSError, ValueError):
        values = {"image": torch.bernoulli(torch.full((70_000, 28, 28), 0.2)), "label": torch.arange(70_000) % 10}
        rows = mm.Batch(values)
        return rows[:60_000], rows[60_000:]


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def forgotten(run: Callable[[], object]) -> Callable[[], object]:
    """The same for a pair and rows that nothing is known of."""

    def anew() -> object:
        _past.clear()
        _facts_by_id.clear()
        return run()

    return anew


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, nargs="+", default=[400, 400])
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--particles", type=int, default=1000)
    options = parser.parse_args()
    train, test = mnist()
    rows = test[: options.rows]
    torch.manual_seed(0)
    model, guide, objective = mm.recipes.mvae(train, latent=options.latent, hidden=tuple(options.hidden))
    some = train[: 128 * STEPS]

    def steps() -> None:
        mm.fit(model, guide, objective, some, epochs=1, batch_size=128, progress=False, audit=False)

    def evaluation() -> None:
        mm.log_marginal(model, guide, rows, num_particles=options.particles, seed=0, audit=False)

    doors = {
        "fit": lambda: audit_training(model, guide, objective, train),
        "log_marginal": lambda: audit(model, guide, rows, stacked=True),
    }
    mm.fit(model, guide, objective, some[:256], epochs=1, progress=False)  # whatever is done once
    times: dict[str, list[float]] = {}
    for _ in range(REPEATS):
        for name, run in (("steps", steps), *((n, forgotten(f)) for n, f in doors.items())):
            times.setdefault(name, []).append(seconds(run))
        for name, run in doors.items():
            run()
            times.setdefault(f"{name} again", []).append(seconds(run))
    times["evaluation"] = [seconds(evaluation)]
    found = {name: median(each) for name, each in times.items()}
    for name, whole in (("fit", "steps"), ("log_marginal", "evaluation")):
        for case in (name, f"{name} again"):
            print(
                f"audit of {case:20s} {1000 * found[case]:8.2f} ms of {found[whole]:7.2f} s: "
                f"{found[case] / found[whole]:.3%}"
            )


if __name__ == "__main__":
    main()
