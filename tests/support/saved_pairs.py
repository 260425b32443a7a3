"""Pairs whose saved form must stay loadable, and the program that wrote ``tests/support/saved_by_0_1``.

The files were written at version 0.1.0 by ``python -m tests.support.saved_pairs`` and must not be written again by a
later one: they say what was saved then. Everything here is built by public names that both versions have.
"""

import json
import sys
import warnings
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

import pyro_mm as mm

FOLDER = Path(__file__).parent / "saved_by_0_1"
SIZES = {"latent": 3, "hidden": (8,)}
SAVED = ("jmvae-kl", "mmvae-plus")  # recipes whose weights are in the folder
TRAINING = {"epochs": 2, "batch_size": 8, "seed": 0, "progress": False}
RUN = [
    "train", "digits", "--epochs", "1", "--recipe", "mvae", "--latent", "2", "--rows", "40",
    "--evidence-particles", "50",
]  # fmt: skip


def rows(n=16):
    """The first training rows of the digits, complete."""
    return mm.datasets.load("digits")[0][torch.arange(n)]


def recipe(name, seed=0):
    """A recipe on tiny networks; ``jnf-second`` is the second stage of ``jnf``."""
    torch.manual_seed(seed)
    if name == "jnf-second":
        return mm.recipes.jnf_second(mm.recipes.RECIPES["jnf"](rows(64), **SIZES))
    return mm.recipes.RECIPES[name](rows(64), **SIZES)


def bound(run, batch, seed=1):
    """The loss of a recipe on a batch, drawn from a seed in float64."""
    pyro.clear_param_store()
    for module in (run.model, run.guide):
        module.double().eval()
    batch = batch.replaced({"image": batch["image"].double()})
    torch.manual_seed(seed)
    return run.objective.loss(run.model, run.guide, batch)


def modules():
    """Public modules that no recipe holds, by name."""
    normal, mlp, c, q = dist.Normal(torch.zeros(2), 1.0).to_event(1), mm.nn.MLP, mm.conditionals, mm.posteriors

    def experts():
        return {"a": c.Normal(mlp(3, 4, (5,))), "b": c.Normal(torch.nn.Embedding(4, 4))}

    def features():
        return {"a": mlp(3, 8, (5,)), "b": torch.nn.Embedding(4, 8)}

    def labelled(annotator):
        classes = dist.Categorical(logits=torch.zeros(4))
        return mm.models.Labelled(
            classes, c.Normal(mlp(4, 4, (5,))), {"a": c.Normal(mlp(6, 6, (5,)))}, (), "b", annotator
        )

    mixture = mm.priors.MixturePrior(3, 2, mixing=True)
    pool = q.SelfAttention(features(), c.NormalMixture(mlp(8, 10, (5,)), 2), 8, heads=2, layers=2)
    class_posterior = q.ProductOfCategoricals({"a": c.Categorical(mlp(3, 4, (5,)))})
    decoders = {"a": c.Normal(mlp(2, 6, (5,))), "b": mm.priors.Component(mixture)}
    return {
        "Labelled": labelled(None),
        "Labelled with an annotator": labelled(c.Categorical(torch.nn.Linear(4, 4))),
        "LinearGaussian": mm.models.LinearGaussian({"a": torch.ones(3, 2), "b": torch.ones(1, 2)}),
        "SharedLatent of a MixturePrior": mm.models.SharedLatent(mixture, decoders),
        "GivenCovariate": mm.priors.GivenCovariate("u", c.Normal(torch.nn.Embedding(3, 4))),
        "MixtureOfProducts": q.MixtureOfProducts(experts(), normal.base_dist, [("a",), ("a", "b")]),
        "ProductOfExperts with a prior": q.ProductOfExperts(experts(), normal),
        "HoelderPooling": q.HoelderPooling(experts()),
        "SumPooling": q.SumPooling(features(), c.Normal(mlp(8, 4, (5,))), 8),
        "SelfAttention": pool,
        "PrivateOf": q.PrivateOf(pool, "a", mlp(8, 6, ()), mlp(8, 6, ()), c.Normal(mlp(6, 4, ()))),
        "Guide of a Label": mm.Guide(y=q.Label("b", class_posterior), z=q.Given("a", pool, normal)),
        "Private with a learned stand-in": q.Private("a", experts()["a"], missing=mixture),
        "Normal with a learned scale": c.Normal(mlp(2, 3, ()), scale=torch.nn.Parameter(torch.zeros(3))),
        "NegativeBinomial": c.NegativeBinomial(mlp(2, 3, ()), (3,)),
        "Poisson": c.Poisson(mlp(2, 3, ()), (3,)),
        "MultivariateNormal": c.MultivariateNormal(mlp(2, 5, ())),
        "Convolutional": mm.nn.Convolutional((1, 9, 8), 3, (2, 4)),
        "Deconvolutional": mm.nn.Deconvolutional(3, (1, 9, 8), (4, 2)),
        "Blocks": mm.nn.Blocks(mlp(3, 2, (4,))),
        "Recurrent": mm.nn.Recurrent(3, 2, 4),
    }  # fmt: skip


def shapes(module):
    """Key of the ``state_dict`` -> shape, as text."""
    return {key: str(tuple(value.shape)) for key, value in module.state_dict().items()}


def write():
    """Write the folder of version 0.1.0."""
    from typer.testing import CliRunner

    from pyro_mm.cli import app

    if not mm.__version__.startswith("0.1."):
        sys.exit(f"these files are of version 0.1, and this is {mm.__version__}")
    FOLDER.mkdir(exist_ok=True)
    held = {"recipes": {}, "modules": {name: shapes(module) for name, module in modules().items()}, "bounds": {}}
    for name in [*mm.recipes.RECIPES, "jnf-second"]:
        run = recipe(name)
        held["recipes"][name] = {"model": shapes(run.model), "guide": shapes(run.guide)}
        if name in SAVED:
            mm.fit(*run, rows(), **TRAINING)
            mm.save(FOLDER / f"{name}.pt", run.model, run.guide)
            held["bounds"][name] = bound(run, rows())
    run = recipe("mvae")
    history = mm.fit(*run, rows(), **TRAINING, checkpoint=FOLDER / "checkpoint.pt")
    held["losses"] = history.to_dict()["loss"]
    held["bounds"]["checkpoint"] = bound(run, rows())
    result = CliRunner().invoke(app, [*RUN, "--out", str(FOLDER / "run")])
    held["printed"] = result.output.splitlines()
    for path in (FOLDER / "run").iterdir():
        if path.name not in ("config.json", "history.csv", "weights.pt"):
            path.unlink()
    (FOLDER / "saved.json").write_text(json.dumps(held, indent=1) + "\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    write()
