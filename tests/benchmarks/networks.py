"""The networks that the benchmark of training steps gives to every contender, and the products that they consist of.

``mlp2``: an image of 784 bits and one label of ten, latent 20; perceptrons of two hidden layers.
``poly``: five images of 3 x 28 x 28, Normal with scale 1, latent 32; perceptrons.
``conv``: the same five images, Laplace with scale 0.75; three convolutions (or transposed ones) and affine maps.

Torch alone: the peer's interpreter imports it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
from torch import Size, Tensor, nn


@dataclass(frozen=True)
class Setting:
    """Modalities and their networks: ``encoder(m, out)`` maps ``(N, *shapes[m])`` to ``(N, out)``, and ``decoder(m)``
    maps ``(.., latent)`` to ``(.., *shapes[m])`` for any leading dimensions. ``scale`` is the likelihood's."""

    name: str
    shapes: dict[str, tuple[int, ...]]
    family: dict[str, str]
    latent: int
    encoder: Callable[[str, int], nn.Module]
    decoder: Callable[[str], nn.Module]
    scale: float = 1.0

    def values(self, rows: int) -> dict[str, Tensor]:
        """Made-up rows; a label is an integer."""
        make = {
            "bernoulli": lambda shape: torch.bernoulli(torch.full((rows, *shape), 0.3)),
            "categorical": lambda shape: torch.randint(shape[0], (rows,)),
        }
        return {m: make.get(self.family[m], lambda shape: torch.rand(rows, *shape))(s) for m, s in self.shapes.items()}


class OneHot(nn.Module):
    """Integers to floats, a column for each class. Floats, which are so coded already, pass."""

    def __init__(self, classes: int):
        super().__init__()
        self.register_buffer("classes", torch.arange(classes))

    def forward(self, label: Tensor) -> Tensor:
        return label if label.is_floating_point() else (label[..., None] == self.classes).float()


class Folded(nn.Module):
    """A network of one leading dimension, for any number of them."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, z: Tensor) -> Tensor:
        return self.net(z.flatten(0, -2)).unflatten(0, z.shape[:-1])


def perceptron(*sizes: int) -> nn.Sequential:
    """Affine maps with a ReLU between any two."""
    return nn.Sequential(*[layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())][:-1])


def mlp2(width: int) -> Setting:
    shapes = {"image": (784,), "label": (10,)}

    def encoder(m: str, out: int) -> nn.Module:
        net = perceptron(*shapes[m], width, width, out)
        return nn.Sequential(OneHot(10), net) if m == "label" else net

    family = {"image": "bernoulli", "label": "categorical"}
    return Setting("mlp2", shapes, family, 20, encoder, lambda m: perceptron(20, width, width, *shapes[m]))


IMAGES = {f"image{i}": (3, 28, 28) for i in range(5)}


def poly(_: int) -> Setting:
    return Setting(
        "poly",
        IMAGES,
        dict.fromkeys(IMAGES, "normal"),
        latent=32,
        encoder=lambda m, out: nn.Sequential(nn.Flatten(), perceptron(2352, 512, 512, out)),
        decoder=lambda m: nn.Sequential(perceptron(32, 512, 2352), nn.Sigmoid(), nn.Unflatten(-1, IMAGES[m])),
    )


def conv(_: int) -> Setting:
    def encoder(m: str, out: int) -> nn.Module:
        down = [layer for a, b in pairwise((3, 32, 64, 128)) for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.ReLU())]
        return nn.Sequential(*down, nn.Flatten(), nn.Linear(2048, 32), nn.ReLU(), nn.Linear(32, out, bias=False))

    def decoder(m: str) -> nn.Module:
        up = [nn.ConvTranspose2d(a, b, 3, 2, 1, odd) for a, b, odd in ((128, 64, 0), (64, 32, 1), (32, 3, 1))]
        start = (nn.Linear(32, 2048), nn.ReLU(), nn.Unflatten(1, (128, 4, 4)))
        return Folded(nn.Sequential(*start, up[0], nn.ReLU(), up[1], nn.ReLU(), up[2]))

    return Setting("conv", IMAGES, dict.fromkeys(IMAGES, "laplace"), 32, encoder, decoder, scale=0.75)


SETTINGS = {"mlp2": mlp2, "poly": poly, "conv": conv}


class Networks(nn.Module):
    """All networks of a model. A joint encoder has a feature network for each modality, and a head over them all.

    ``subsets`` are the non-empty sets of modalities, as zeros and ones ``(2^M - 1, M)``.
    """

    def __init__(self, setting: Setting, joint: bool = False):
        super().__init__()
        self.setting, self.names, latent = setting, list(setting.shapes), setting.latent
        self.encoders = nn.ModuleDict({m: setting.encoder(m, 2 * latent) for m in self.names})
        self.decoders = nn.ModuleDict({m: setting.decoder(m) for m in self.names})
        self.features = nn.ModuleDict({m: setting.encoder(m, latent) for m in self.names if joint})
        self.head = perceptron(latent * len(self.names), 512, 512, 2 * latent) if joint else None
        sets = [s for size in range(1, len(self.names) + 1) for s in combinations(self.names, size)]
        self.register_buffer("subsets", torch.tensor([[float(m in s) for m in self.names] for s in sets]))


# -- the products alone ---------------------------------------------------------------------------------------------

Call = tuple[nn.Module, Size, bool]


def calls(networks: nn.Module, loss: Callable[[], object]) -> list[Call]:
    """The affine and convolutional layers that a loss runs: the layer, its input's shape, and whether that input has
    a gradient (that of the first layer of an encoder has none). The loss runs once before: a first run may do more."""
    loss()
    found: list[Call] = []
    layers = [m for m in networks.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)]
    note = lambda layer, inputs, _: found.append((layer, inputs[0].shape, inputs[0].requires_grad))  # noqa: E731
    hooks = [layer.register_forward_hook(note) for layer in layers]
    loss()
    for hook in hooks:
        hook.remove()
    return found


def flops(found: list[Call]) -> float:
    """Twice the multiplications: one product forward, and one or two backward."""

    def forward(layer: nn.Module, shape: Size) -> float:
        if isinstance(layer, nn.Linear):
            return 2.0 * shape.numel() * layer.out_features
        places = shape[-2:].numel()  # where the kernel goes: on the input of a transposed convolution, else the output
        if isinstance(layer, nn.Conv2d):
            sides = zip(shape[-2:], layer.kernel_size, layer.stride, layer.padding, strict=True)
            places = math.prod((n + 2 * p - k) // s + 1 for n, k, s, p in sides)
        return 2.0 * shape[:-3].numel() * places * layer.weight.numel()

    return sum((2 + slope) * forward(layer, shape) for layer, shape, slope in found)


def products(found: list[Call]) -> Callable[[], None]:
    """Runs the matrix products and convolutions of these calls, forward and backward, on inputs made beforehand."""
    runs = [_affine(*call) if isinstance(call[0], nn.Linear) else _convolution(*call) for call in found]

    def run() -> None:
        with torch.no_grad():
            for forward, _ in runs:
                forward()
            for _, backward in reversed(runs):
                backward()

    return run


Pass = tuple[Callable[[], object], Callable[[], object]]


def _affine(layer: nn.Module, shape: Size, slope: bool) -> Pass:
    w = layer.weight.detach()
    x, g = (torch.randn(shape[:-1].numel(), n, device=w.device) for n in reversed(w.shape))
    y, to_x, to_w = torch.empty_like(g), torch.empty_like(x), torch.empty_like(w)

    def backward() -> None:
        torch.mm(g.T, x, out=to_w)
        if slope:
            torch.mm(g, w, out=to_x)

    return lambda: torch.mm(x, w.T, out=y), backward


def _convolution(layer: nn.Module, shape: Size, slope: bool) -> Pass:
    w = layer.weight.detach()
    x = torch.randn(shape, device=w.device)
    how = (layer.stride, layer.padding, layer.dilation, layer.transposed, layer.output_padding, layer.groups)
    forward = lambda: torch.ops.aten.convolution(x, w, None, *how)  # noqa: E731
    g = torch.randn_like(forward())
    return forward, lambda: torch.ops.aten.convolution_backward(g, x, w, None, *how, [slope, True, False])
