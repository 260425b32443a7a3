"""MNIST and label under a flow, a Normal and a Bernoulli decoder: bits per dimension, evidence, and draws.

    python tests/benchmarks/flow_decoder.py --rows 4000 --epochs 5

One story with a latent of --latent dimensions, one encoder and one number of epochs for all; the decoders of the image
differ. With 256 levels, a flow and two Normals (one scale for all pixels, or one for each by the network) are trained
on uniformly dequantised pixels, with new noise in every minibatch, and compared on the same noisy test rows: bits are
those of the density, less log(levels), a bound of the bits of the levels in the mean over the noise. With 2 levels
(pixels above 1/2) a flow is compared with a Bernoulli, whose bits are exact, and with the flow of which the noise is a
latent, uniform or by a flow (variational), whose bits are those of the levels, importance-weighted.

log p(image) is by fitted proposals, which fit a Normal to the posterior of each row; with the noise as a latent by
draws of the guide, since it has too many dimensions for a fit. ``kernel`` is the unbiased squared distance of
--draws images drawn from the prior and as many test images, by the cubic kernel of KID, in the hidden features of a
classifier of noiseless images, scaled to a mean square of 1, times 1000; its error is that over 10 splits. Draws are
quantised to the levels first.
"""

import argparse
import time
from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn

import pyro_mm as mm
from pyro_mm.conditionals import Bernoulli, Categorical, Dequantized, ImageFlow, Normal
from pyro_mm.datasets import dequantize, quantize

SHAPE = (28, 28)
PIXELS = 784


def encoder(latent: int) -> nn.Module:
    def expert() -> nn.Module:
        return Normal(mm.nn.MLP(PIXELS, 2 * latent, (256, 256)))

    experts = {"image": expert(), "label": Normal(nn.Embedding(10, 2 * latent))}
    return mm.posteriors.ProductOfExperts(experts)


def flow_of(options: argparse.Namespace, inputs: int, margin: float = 0.01) -> ImageFlow:
    net = mm.nn.MLP(inputs, 64, (256,))
    return ImageFlow(net, SHAPE, 64, steps=options.steps, hidden=options.hidden, margin=margin)


class Row:
    """A decoder, its story and guide, and how its data are made."""

    def __init__(self, name: str, levels: int, decoder: nn.Module, options: argparse.Namespace, noise: str = "data"):
        self.name, self.levels, self.noise = name, levels, noise
        self.discrete = noise != "data" or isinstance(decoder, Bernoulli)
        prior = dist.Normal(torch.zeros(options.latent), 1.0).to_event(1)
        label = Categorical(mm.nn.MLP(options.latent, 10, (64,)))
        uniform = dist.Uniform(torch.zeros(SHAPE), 1.0).to_event(2)
        private = {} if noise == "data" else {"image": uniform}
        self.model = mm.models.PrivateLatents(prior, private, {"image": decoder, "label": label})
        sites: dict[str, Callable] = {"z": encoder(options.latent)}
        if noise == "uniform":
            sites["w_image"] = lambda batch: uniform
        elif noise == "variational":
            flow = flow_of(options, PIXELS, margin=0.0)
            sites["w_image"] = mm.posteriors.Private("image", flow, missing=uniform)
        self.guide = mm.Guide(**sites)

    def data(self, batch: mm.Batch, seed: int | None = None) -> mm.Batch:
        return batch if self.discrete else dequantize(batch, "image", self.levels, seed)


def rows_of(options: argparse.Namespace) -> list[Row]:
    latent = options.latent
    learned = nn.Parameter(torch.zeros(()))
    rows = [
        Row("Normal, one scale", 256, Normal(mm.nn.MLP(latent, PIXELS), SHAPE, scale=learned), options),
        Row("Normal, a scale per pixel", 256, Normal(mm.nn.MLP(latent, 2 * PIXELS), SHAPE), options),
        Row("flow", 256, flow_of(options, latent), options),
        Row("Bernoulli", 2, Bernoulli(mm.nn.MLP(latent, PIXELS), SHAPE), options),
        Row("flow", 2, flow_of(options, latent), options),
        Row("flow, noise a latent, uniform", 2, Dequantized(flow_of(options, latent, 0.0), 2), options, "uniform"),
        Row("flow, noise variational", 2, Dequantized(flow_of(options, latent, 0.0), 2), options, "variational"),
    ]
    wanted = options.only.split(",") if options.only else None
    return [row for i, row in enumerate(rows) if wanted is None or str(i) in wanted]


def kernel_distance(x: Tensor, y: Tensor, splits: int = 10) -> tuple[float, float]:
    """Return the mean over splits of the unbiased squared kernel distance, and its standard error, times 1000."""
    found = []
    for a, b in zip(x.double().chunk(splits), y.double().chunk(splits), strict=True):
        kernel = lambda p, q: (p @ q.T / p.shape[1] + 1) ** 3  # noqa: E731
        n, m = len(a), len(b)
        within = (kernel(a, a).sum() - kernel(a, a).diagonal().sum()) / (n * (n - 1))
        within += (kernel(b, b).sum() - kernel(b, b).diagonal().sum()) / (m * (m - 1))
        found.append(within - 2 * kernel(a, b).mean())
    each = 1000 * torch.stack(found)
    return each.mean().item(), each.std().item() / splits**0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--latent", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4, help="of each scale of the flow")
    parser.add_argument("--hidden", type=int, default=32, help="channels of the flow's networks")
    parser.add_argument("--test", type=int, default=100, help="rows whose evidence is estimated")
    parser.add_argument("--particles", type=int, default=500)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--only", help="numbers of the decoders, from 0, with commas")
    parser.add_argument("--pictures", help="folder for a picture of 40 draws of each decoder")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    grey_train, grey_test = mm.datasets.mnist(binarize=None)
    print(f"{options.rows} rows, {options.epochs} epochs, latent {options.latent}, seed 0, {options.device}")
    print(f"log p and bits: mean of {options.test} test rows, K = {options.particles}; doubt: rows with k-hat > 0.7")
    print(f"{'image decoder':30} {'levels':>6} {'log p(image)':>20} {'bits/dim':>18} {'doubt':>6} ", end="")
    print(f"{'log p(label | image)':>20} {'kernel x 1000':>16} {'seconds':>8}")
    for row in rows_of(options):
        report(row, grey_train[: options.rows], grey_test, options)


def report(row: Row, train: mm.Batch, test: mm.Batch, options: argparse.Namespace) -> None:
    """Train a row's pair, and print its line of the table."""
    torch.manual_seed(0)
    if row.levels == 2:
        train, test = (part.replaced({"image": (part["image"] > 0.5).float()}) for part in (train, test))
    start = time.perf_counter()
    mm.fit(
        row.model, row.guide, mm.objectives.mvae(0), train, epochs=options.epochs, batch_size=100, seed=0,
        transform=None if row.discrete else row.data, device=options.device, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - start

    some = row.data(test[: options.test], seed=1)
    scheme = mm.Proposal() if row.noise != "data" else "fitted"
    settings = {"num_particles": options.particles, "seed": 0}
    image = mm.log_marginal(row.model, row.guide, some.only("image"), proposal=scheme, **settings)
    given = mm.log_conditional(row.model, row.guide, some, target="label", given="image", proposal=scheme, **settings)
    bits, bits_error = image.bits_per_dimension(PIXELS, None if row.discrete else row.levels)
    nats, error = image.mean()
    label, label_error = given.mean()

    empty = mm.Batch.empty(options.draws, row.data(test, seed=1))
    draws = mm.generate(row.model, row.guide, empty, seed=0)["image"][0].cpu()
    draws = draws if row.discrete and row.noise == "data" else quantize(draws, row.levels)
    held_out = test["image"][-options.draws :]
    real, drawn = features(held_out, test), features(draws, test)
    size = real.square().mean().sqrt()
    distance, spread = kernel_distance(drawn / size, real / size)
    print(
        f"{row.name:30} {row.levels:6} {nats:12.2f} ± {error:5.2f} {bits:11.4f} ± {bits_error:.4f} "
        f"{image.untrusted():6.0%} {label:12.3f} ± {label_error:5.3f} {distance:8.2f} ± {spread:5.2f} {seconds:8.0f}",
        flush=True,
    )
    if options.pictures:
        from matplotlib import pyplot

        name = f"{options.pictures}/{row.levels}_{row.name.replace(' ', '_').replace(',', '')}.png"
        pyplot.imsave(name, draws[:40].reshape(4, 10, *SHAPE).transpose(1, 2).reshape(4 * 28, 280), cmap="gray")


_judges: dict[int, nn.Module] = {}


def features(images: Tensor, test: mm.Batch) -> Tensor:
    """Return the hidden features of images in a classifier that was trained on other test rows."""
    levels = test["image"].unique().numel()
    if levels not in _judges:
        part, rest = test[:5000], test[5000:]
        judge, _ = mm.metrics.classifier(part["image"], part["label"], rest["image"], rest["label"], epochs=3)
        _judges[levels] = judge
    judge = _judges[levels]
    found: list[Tensor] = []
    hook = judge.layers[-2].register_forward_hook(lambda _, __, output: found.append(output))
    with torch.no_grad():
        judge(images)
    hook.remove()
    return found[0]


if __name__ == "__main__":
    main()
