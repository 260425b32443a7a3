"""The peer's side of ``steps.py``: steps of a model of ``multivae``, one for every line on standard input.

``steps.py --peer`` starts this under the interpreter of an environment that has ``multivae``, with one argument: JSON
of what to make. It answers with the floating-point operations of a step's products and then, to every line, with the
milliseconds of a step; or, for ``evidence.py --peer``, with those of the joint likelihood of some rows. The networks
are those of ``networks.py``; where a model has a joint encoder, that one too.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings

import torch
from networks import SETTINGS, Networks, calls, flops

logging.disable(logging.CRITICAL)
warnings.filterwarnings("ignore")

from multivae import models  # noqa: E402
from multivae.data.datasets.base import MultimodalBaseDataset  # noqa: E402
from multivae.models.base import ModelOutput  # noqa: E402
from multivae.models.nn.base_architectures import BaseDecoder, BaseEncoder, BaseJointEncoder  # noqa: E402


def gaussian(out: torch.Tensor) -> ModelOutput:
    loc, log_variance = out.chunk(2, -1)
    return ModelOutput(embedding=loc, log_covariance=log_variance)


class Encoder(BaseEncoder):
    def __init__(self, net: torch.nn.Module, latent: int):
        super().__init__()
        self.net, self.latent_dim = net, latent

    def forward(self, x: torch.Tensor) -> ModelOutput:
        return gaussian(self.net(x))


class Decoder(BaseDecoder):
    def __init__(self, net: torch.nn.Module):
        super().__init__()
        self.net = net

    def forward(self, z: torch.Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=self.net(z))


class JointEncoder(BaseJointEncoder):
    def __init__(self, nets: Networks):
        super().__init__()
        self.features, self.head, self.latent_dim = nets.features, nets.head, nets.setting.latent

    def forward(self, x: dict[str, torch.Tensor]) -> ModelOutput:
        return gaussian(self.head(torch.cat([net(x[m]) for m, net in self.features.items()], -1)))


def main() -> None:
    wanted = json.loads(sys.argv[1])
    device = torch.device(wanted["device"])
    torch.set_num_threads(wanted["threads"])
    torch.manual_seed(0)
    setting = SETTINGS[wanted["networks"]](wanted["width"])
    joint = wanted["model"] == "JMVAE"
    nets = Networks(setting, joint)
    config = getattr(models, wanted["model"] + "Config")(
        n_modalities=len(nets.names),
        latent_dim=setting.latent,
        input_dims=setting.shapes,
        decoders_dist=setting.family,
        decoder_dist_params={
            m: {"scale": setting.scale} for m, f in setting.family.items() if f in ("normal", "laplace")
        },
        **wanted["options"],
    )
    encoders = {m: Encoder(net, setting.latent) for m, net in nets.encoders.items()}
    decoders = {m: Decoder(net) for m, net in nets.decoders.items()}
    more = {"joint_encoder": JointEncoder(nets)} if joint else {}
    model = getattr(models, wanted["model"])(config, encoders, decoders, **more).to(device).train()
    values = setting.values(wanted["batch"])
    for m in (m for m, family in setting.family.items() if family == "categorical"):
        values[m] = torch.nn.functional.one_hot(values[m], setting.shapes[m][0]).float()
    data = MultimodalBaseDataset({m: x.to(device) for m, x in values.items()})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        model(data, epoch=1).loss.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def evidence() -> None:
        some = MultimodalBaseDataset({m: x[: wanted["rows"]].clone() for m, x in data.data.items()})
        model.eval().compute_joint_nll(some, K=wanted["particles"], batch_size_K=100)

    print(flops(calls(model, lambda: model(data, epoch=1))), flush=True)
    clock = getattr(time, wanted["clock"])
    for _ in sys.stdin:
        start = clock()
        evidence() if "particles" in wanted else step()
        print((clock() - start) * 1e3, flush=True)


if __name__ == "__main__":
    main()
