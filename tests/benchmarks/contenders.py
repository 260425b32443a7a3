"""Who takes the steps that ``steps.py`` times: the models, as rows of a table, and the ways to take a step of one."""

from __future__ import annotations

import json
import math
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import handwritten as by_hand
import pyro
import pyro.distributions as dist
import torch
from networks import Folded, Networks, calls, flops, products
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn

import pyro_mm as mm
from pyro_mm import conditionals, objectives, posteriors
from pyro_mm.estimators import IWAE

Values = dict[str, Tensor]


@dataclass
class Model:
    """Our posterior and objective, the loss by hand, the peer's class and options, and whether stock Pyro says it.

    ``default`` are the options that give the peer's own gradient, where that is another one.
    """

    posterior: Callable[[Networks], nn.Module]
    objective: Callable[[], Any]
    hand: Callable[[Networks, Values], Tensor]
    peer: str
    options: dict[str, Any] = field(default_factory=dict)
    default: dict[str, Any] | None = None
    stock: bool = False
    joint: bool = False


def experts(nets: Networks) -> dict[str, nn.Module]:
    return {m: conditionals.Normal(net) for m, net in nets.encoders.items()}


def product(nets: Networks) -> nn.Module:
    return posteriors.ProductOfExperts(experts(nets))


def product_alone(nets: Networks) -> nn.Module:
    return posteriors.ProductOfExperts(experts(nets), prior=None)


def joint_encoder(nets: Networks) -> nn.Module:
    return posteriors.JointEncoder(nets.features, conditionals.Normal(nets.head), product_alone(nets))


def mixture(nets: Networks) -> nn.Module:
    return posteriors.MixtureOfExperts(experts(nets))


def mixture_of_products(nets: Networks) -> nn.Module:
    return posteriors.MixtureOfProducts(experts(nets))


def mmvae(particles: int, resample: bool = False) -> Model:
    options = {"K": particles, "prior_and_posterior_dist": "normal", "learn_prior": False}
    estimator = IWAE(particles, stratified="outside", resample=resample)
    ours, hand = partial(objectives.mmvae, estimator=estimator), partial(by_hand.mmvae, particles=particles)
    losses = [options | {"loss": loss} for loss in ("iwae_looser", "dreg_looser")]
    return Model(mixture, ours, hand, "MMVAE", *losses)


one_subset = partial(objectives.subset_mean, num_subsets=1)
no_warmup, no_subsets = {"warmup": 0}, {"warmup": 0, "use_subsampling": False}
alphas = {"jmvae": no_warmup | {"alpha": 0.1}, "mvtcae": {"alpha": 5 / 6, "beta": 1.0}}
MODELS = {
    "mvae, joint only": Model(product, objectives.elbo, by_hand.mvae_joint, "MVAE", no_subsets, stock=True),
    "mvae": Model(product, objectives.mvae, by_hand.mvae, "MVAE", no_warmup),
    "jmvae-kl": Model(
        joint_encoder, objectives.jmvae_kl, by_hand.jmvae, "JMVAE", alphas["jmvae"], stock=True, joint=True
    ),
    "mmvae, K=1": mmvae(1),
    "mmvae, K=10": mmvae(10),
    "mmvae, resampled": mmvae(10, resample=True),
    "mopoe, mixture": Model(mixture_of_products, objectives.mopoe, by_hand.mopoe, "MoPoE"),
    "mopoe, one subset": Model(product, one_subset, by_hand.subset_mean, "MoPoE"),
    "mvtcae": Model(product_alone, objectives.mvtcae, by_hand.mvtcae, "MVTCAE", alphas["mvtcae"]),
}


def story_and_guide(model: Model, nets: Networks) -> tuple[nn.Module, nn.Module]:
    def decoder(m: str) -> nn.Module:
        net, family, shape = nets.decoders[m], nets.setting.family[m], nets.setting.shapes[m]
        if isinstance(net, Folded):
            net = mm.nn.Blocks(net.net)  # the same weights, and a way to run them that only ours offers
        if family == "categorical":
            return conditionals.Categorical(net)
        if family == "bernoulli":
            return conditionals.Bernoulli(net, shape)
        kind = {"normal": conditionals.Normal, "laplace": conditionals.Laplace}[family]
        return kind(net, shape, scale=nets.setting.scale)

    origin = torch.zeros(nets.setting.latent, device=nets.subsets.device)
    story = mm.models.SharedLatent(dist.Normal(origin, 1.0).to_event(1), {m: decoder(m) for m in nets.names})
    return story, mm.Guide(z=model.posterior(nets))


def stock_pair(model: Model, nets: Networks) -> tuple[Callable[[Values], None], Callable[[Values], None]]:
    """The joint bound's model and guide, as one writes them who has Pyro and no pyro_mm."""
    family, scale = nets.setting.family, nets.setting.scale
    likelihood = {
        "bernoulli": lambda out: dist.Bernoulli(logits=out).to_event(1),
        "categorical": lambda out: dist.Categorical(logits=out),
        "normal": lambda out: dist.Normal(out, scale).to_event(3),
        "laplace": lambda out: dist.Laplace(out, scale).to_event(3),
    }

    def story(x: Values) -> None:
        pyro.module("decoders", nets.decoders)
        first = x[nets.names[0]]
        with pyro.plate("rows", len(first)):
            z = pyro.sample("z", dist.Normal(first.new_zeros(len(first), nets.setting.latent), 1.0).to_event(1))
            for m, decoder in nets.decoders.items():
                pyro.sample(m, likelihood[family[m]](decoder(z)), obs=x[m])

    def guide(x: Values) -> None:
        if model.joint:
            pyro.module("features", nets.features)
            pyro.module("head", nets.head)
            loc, scale = by_hand.encode_jointly(nets, x)
        else:
            pyro.module("encoders", nets.encoders)
            loc, scale = by_hand.product(*by_hand.encode(nets, x))
        with pyro.plate("rows", len(loc)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return story, guide


# -- a step each: what takes it, and the operations of its products where they can be counted -------------------------

Run = tuple[Callable[[], object], float]


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)


def stepping(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def eager(model: Model, nets: Networks, x: Values) -> Run:
    loss = partial(model.objective().differentiable_loss, *story_and_guide(model, nets), mm.Batch(x))
    return stepping(loss, adam(nets)), flops(calls(nets, loss))


def staged(model: Model, nets: Networks, x: Values) -> Run:
    batch = mm.Batch(x)
    step = mm.stage(model.objective(), *story_and_guide(model, nets), batch, optimizer=adam(nets))
    return partial(step, batch), math.nan


def hand(model: Model, nets: Networks, x: Values) -> Run:
    loss = partial(model.hand, nets, x)
    return stepping(loss, adam(nets)), flops(calls(nets, loss))


def compiled(model: Model, nets: Networks, x: Values) -> Run:
    return stepping(torch.compile(lambda: model.hand(nets, x), fullgraph=True), adam(nets)), math.nan


def stock(model: Model, nets: Networks, x: Values) -> Run | None:
    if not model.stock:
        return None
    pyro.clear_param_store()  # else the names of modules would stand for those of the model before
    svi = SVI(*stock_pair(model, nets), pyro.optim.Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    return partial(svi.step, x), flops(calls(nets, partial(svi.loss_and_grads, svi.model, svi.guide, x)))


def floor(model: Model, nets: Networks, x: Values) -> Run:
    needed = calls(nets, partial(model.hand, nets, x))
    return products(needed), flops(needed)


def optimizer(model: Model, nets: Networks, x: Values) -> Run:
    model.hand(nets, x).backward()
    return adam(nets).step, math.nan


OURS = {"eager": eager, "staged": staged, "hand": hand, "compiled": compiled, "stock": stock}
BELOW = {"floor": floor, "Adam": optimizer}


class Peer:
    """A model of the peer in a process of its own, which takes a step when asked to and says how long that took."""

    def __init__(self, interpreter: str, wanted: dict[str, Any]):
        # with several threads, until those of the other process have stopped waiting for more
        self.pause = 0.01 if wanted["threads"] > 1 else 0.0
        self.command = [interpreter, str(Path(__file__).with_name("peer.py")), json.dumps(wanted)]
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.work = self._answer()

    def step(self) -> float:
        time.sleep(self.pause)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        taken = self._answer()
        time.sleep(self.pause)
        return taken

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> float:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"expected a number from the peer, and it ended: {' '.join(self.command)}")
        return float(line)
