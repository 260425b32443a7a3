r"""A step of training against the same step by hand, by stock Pyro, by a peer, and against its matrix products alone.

    python tests/benchmarks/steps.py --networks mlp2 --peer ~/peer/bin/python

What is timed is ``zero_grad``, the loss of a batch in memory, its gradient, and Adam's step (fused). For every model
the contenders take their steps by turns in one run, another one of them first in every round, with as many threads:

    eager       objective.differentiable_loss(model, guide, batch) of pyro_mm, and backward()
    staged      pyro_mm.stage(objective, model, guide, batch, optimizer=...)
    hand        the objective in plain torch (handwritten.py)
    compiled    that under torch.compile
    stock       pyro.infer.SVI with TraceMeanField_ELBO and pyro.optim.Adam. Of MVAE the joint bound; of JMVAE the
                joint bound too, which leaves the unimodal encoders out
    peer        multivae in a process of its own (--peer), with the loss that has our gradient
    default     multivae's default loss, where that is another one: the doubly reparameterised gradient of MMVAE
    floor       the matrix products and convolutions of "hand", forward and backward, and nothing between them
    Adam        the optimiser's step alone

All have the same networks (networks.py) and decode as many draws per row. --check counts the operations in each one's
products, and compares the losses of pyro_mm and by hand by the mean of many draws. Two forms of MoPoE meet the same
peer: that takes a draw a row from one subset's product and the mean KL of all of them, for which ours are the mixture's
own bound, and the bound of a random subset. "mmvae, resampled" is MMVAE with K = 10 whose gradient is that of one draw
in ten, the same in the mean (``IWAE(resample=True)``); the others differentiate all ten. Pyro validates nothing here,
which helps stock Pyro too.

The peer wants an environment of its own. Where torchvision has no build for a CPU's torch:

    python -m venv ~/peer && ~/peer/bin/pip install torch==2.13.0
    ~/peer/bin/pip install --no-deps multivae==1.0.3 pythae torchvision==0.28.0
    ~/peer/bin/pip install numpy scipy scikit-learn pydantic pandas tqdm cloudpickle pillow imageio matplotlib nltk \
        torchmetrics

and then empty torchvision's _meta_registrations.py, which asks for operators that this torch lacks.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from statistics import mean, median, stdev

import pyro
import torch
from contenders import BELOW, MODELS, OURS, Model, Peer, Values, story_and_guide
from networks import SETTINGS, Networks

import pyro_mm as mm

COLUMNS = [*OURS, "peer", "default", *BELOW]
RATIOS = {
    "staged/compiled": ("staged", ["compiled"]),
    "staged/hand": ("staged", ["hand"]),
    "staged/floor": ("staged", ["floor"]),
    "staged/both": ("staged", [*BELOW]),
    "staged/peer": ("staged", ["peer"]),
    "stock/staged": ("stock", ["staged"]),
    "eager/hand": ("eager", ["hand"]),
    "eager/peer": ("eager", ["peer"]),
    "hand/both": ("hand", [*BELOW]),
}
Step = Callable[[], float]  # takes a step, and returns its milliseconds
Taken = dict[str, list[float]]


def timed(run: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> Step:
    def step() -> float:
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (clock() - start) * 1e3

    return step


def contenders(
    model: Model, nets: Networks, x: Values, options: argparse.Namespace, stack: ExitStack
) -> dict[str, tuple[Step, float]]:
    """Name -> a step, and the operations of its products. Each contender has a copy of the networks."""
    found: dict[str, tuple[Step, float]] = {}
    for name, make in {**OURS, "peer": model.options, "default": model.default, **BELOW}.items():
        if name in options.without or make is None or (isinstance(make, dict) and options.peer is None):
            continue
        if isinstance(make, dict):
            wanted = {"networks": nets.setting.name, "width": options.width, "batch": options.batch}
            wanted |= {"device": options.device, "threads": torch.get_num_threads(), "clock": options.clock.__name__}
            peer = Peer(options.peer, wanted | {"model": model.peer, "options": make})
            stack.callback(peer.close)
            found[name] = peer.step, peer.work
        elif (made := make(model, copy.deepcopy(nets), x)) is not None:
            found[name] = timed(made[0], nets.subsets.device, options.clock), made[1]
    return found


def measure(steps: dict[str, Step], options: argparse.Namespace) -> Taken:
    """Milliseconds of each contender, round by round: no more rounds than the time allows, but three at least."""
    for step in steps.values():
        for _ in range(3):
            step()
    names, taken, start = list(steps), {name: [] for name in steps}, time.perf_counter()
    for i in range(options.steps):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            taken[name].append(steps[name]())
        if i >= 2 and time.perf_counter() - start > options.seconds:
            break
    return taken


def report(setting: str, options: argparse.Namespace) -> None:
    device = torch.device(options.device)
    peak = ceiling(device, options.clock)
    width = f", width {options.width}" if setting == "mlp2" else ""
    print(
        f"\n{setting}{width}, batch {options.batch}, {torch.get_num_threads()} threads, {device}: ms per step", end=""
    )
    print(f"; a large matrix product runs at {peak / 1e12:.3g} TFLOP/s")
    print(line("", [*COLUMNS, "rounds"], 10), flush=True)
    rows: dict[str, tuple[Taken, float]] = {}
    for name, model in selected(options):
        with ExitStack() as stack:
            found = contenders(model, *untrained(setting, model, options), options, stack)
            taken = measure({n: step for n, (step, _) in found.items()}, options)
        rows[name] = taken, found["floor"][1]
        cells = [f"{median(taken[c]):.2f}" if c in taken else "-" for c in COLUMNS]
        print(line(name, [*cells, str(len(taken["floor"]))], 10), flush=True)
        del found
        gc.collect()
    print('\nratios, "both" being floor + Adam; and the share of that TFLOP/s')
    print(line("", [*RATIOS, "of staged", "of eager"], 16))
    for name, (taken, work) in rows.items():
        shares = [f"{work / median(taken[c]) * 1e3 / peak:.0%}" if c in taken else "-" for c in ("staged", "eager")]
        print(line(name, [*(ratio(taken, *parts) for parts in RATIOS.values()), *shares], 16), flush=True)


def check(setting: str, options: argparse.Namespace) -> None:
    """That all contenders do the same: operations in units of the floor's, and losses at equal parameters.

    Under one seed most models draw the same numbers in pyro_mm as by hand, and their losses agree to rounding.
    """
    print(f"\n{setting}: operations, the floor's being 1; loss a row, one seed and the mean of {options.draws} draws")
    for name, model in selected(options):
        nets, x = untrained(setting, model, options)
        with ExitStack() as stack:
            work = {n: w for n, (_, w) in contenders(model, nets, x, options, stack).items() if not math.isnan(w)}
        counts = ", ".join(f"{n} {w / work['floor']:.3f}" for n, w in work.items() if n != "floor")
        ours = losses(
            partial(model.objective().differentiable_loss, *story_and_guide(model, nets), mm.Batch(x)), options
        )
        hand = losses(partial(model.hand, nets, x), options)
        error = math.hypot(stdev(ours), stdev(hand)) / math.sqrt(options.draws)
        print(f"{name:<18}{counts}; eager {mean(ours):.4f}, hand {mean(hand):.4f}, apart ", end="")
        print(f"{ours[0] - hand[0]:.4f} and {mean(ours) - mean(hand):.4f} +- {error:.4f}", flush=True)


def losses(loss: Callable[[], torch.Tensor], options: argparse.Namespace) -> list[float]:
    with torch.no_grad():
        loss()  # what a first run draws besides
        torch.manual_seed(0)
        return [float(loss()) / options.batch for _ in range(options.draws)]


def selected(options: argparse.Namespace) -> Iterator[tuple[str, Model]]:
    for name, model in MODELS.items():
        if not options.only or any(word in name for word in options.only):
            torch.compiler.reset()
            yield name, model


def untrained(setting: str, model: Model, options: argparse.Namespace) -> tuple[Networks, Values]:
    torch.manual_seed(0)
    nets = Networks(SETTINGS[setting](options.width), model.joint).to(options.device)
    return nets, {m: v.to(options.device) for m, v in nets.setting.values(options.batch).items()}


def line(first: str, cells: list[str], width: int) -> str:
    return f"{first:<18}" + "".join(f"{cell:>{width}}" for cell in cells)


def ratio(taken: Taken, above: str, below: list[str]) -> str:
    if not {above, *below} <= set(taken):
        return "-"
    return f"{median(a / sum(b) for a, *b in zip(taken[above], *(taken[n] for n in below), strict=True)):.2f}"


def ceiling(device: torch.device, clock: Callable[[], float]) -> float:
    """FLOP/s of a large matrix product, the best of some."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device)
    step = timed(lambda: a @ b, device, clock)
    return 2 * n**3 / min(step() for _ in range(10)) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--only", nargs="+", help="models whose name contains one of these")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=COLUMNS[:-2], metavar="CONTENDER", help="contenders to leave out"
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=400, help="of the hidden layers of mlp2")
    parser.add_argument("--steps", type=int, default=50, help="rounds for every model")
    parser.add_argument("--seconds", type=float, default=60, help="for every model; three rounds at least")
    parser.add_argument("--threads", type=int, help="by default torch's own number")
    parser.add_argument("--processor-time", action="store_true", help="not the wall's: one thread, a machine in use")
    parser.add_argument("--peer", help="the interpreter of an environment that has multivae")
    parser.add_argument("--check", action="store_true", help="compare what the contenders compute, and time nothing")
    parser.add_argument("--draws", type=int, default=200, help="for --check")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    options.clock = time.process_time if options.processor_time else time.perf_counter
    if options.threads:
        torch.set_num_threads(options.threads)
    pyro.enable_validation(False)
    for setting in options.networks:
        (check if options.check else report)(setting, options)


if __name__ == "__main__":
    main()
