"""Twenty mistakes that are refused, and the messages that they give, by running them."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any

import torch

SETUP = """
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_mm as mm

images = torch.rand(100, 8, 8).round()
labels = torch.arange(100) % 10
batch = mm.Batch({"image": images, "label": labels})
prior = dist.Normal(torch.zeros(4), 1.0).to_event(1)
image = mm.conditionals.Bernoulli(mm.nn.MLP(4, 64), event_shape=(8, 8))
label = mm.conditionals.Categorical(mm.nn.MLP(4, 10))
encode_image = mm.conditionals.Normal(mm.nn.MLP(64, 8))
encode_label = mm.conditionals.Normal(nn.Embedding(10, 8))
encoders = {"image": encode_image, "label": encode_label}
model = mm.models.SharedLatent(prior, {"image": image, "label": label})
guide = mm.Guide(z=mm.posteriors.ProductOfExperts(encoders))
objective = mm.objectives.elbo()
""".strip()
"""Code that comes before each mistake: a pair, and rows of two modalities."""


@dataclass(frozen=True)
class Mistake:
    """A mistake: its kind, a sentence about it, and code that makes it."""

    kind: str
    sentence: str
    code: str


MISTAKES = (
    Mistake(
        "sites",
        "The guide's latent has another name than the model's.",
        """
other = mm.Guide(zz=mm.posteriors.ProductOfExperts(encoders))
mm.fit(model, other, objective, batch)
""",
    ),
    Mistake(
        "sites",
        "Model and guide are swapped.",
        """
mm.log_marginal(guide, model, batch)
""",
    ),
    Mistake(
        "sites",
        "A decoder is for a modality that the rows do not have: a name is misspelt.",
        """
misspelt = mm.models.SharedLatent(prior, {"image": image, "lable": label})
mm.fit(misspelt, guide, objective, batch)
""",
    ),
    Mistake(
        "sites",
        "A modality is observed by `pyro.sample`, so that the filler of missing rows would be scored.",
        """
def story(batch):
    with batch.plate():
        z = pyro.sample("z", prior.expand([len(batch)]))
        batch.observe("image", image, z)
        pyro.sample("label", label(z), obs=batch["label"])

half = mm.Batch({"image": images, "label": labels}, present={"label": torch.arange(100) < 50})
mm.fit(story, guide, objective, half)
""",
    ),
    Mistake(
        "sites",
        "A name is misspelt inside a story of one's own.",
        """
def story(batch):
    with batch.plate():
        z = pyro.sample("z", prior.expand([len(batch)]))
        batch.observe("imgae", image, z)
        batch.observe("label", label, z)

mm.log_marginal(story, guide, batch)
""",
    ),
    Mistake(
        "shapes",
        "A column of numbers `(N,)` meets a decoder of vectors of one number, and would be broadcast to `(N, N)`.",
        """
age = mm.Batch({"image": images, "age": torch.rand(100)})
decoders = {"image": image, "age": mm.conditionals.Normal(mm.nn.MLP(4, 1), scale=1.0)}
of_image = mm.Guide(z=mm.posteriors.ProductOfExperts({"image": encode_image}))
mm.fit(mm.models.SharedLatent(prior, decoders), of_image, objective, age)
""",
    ),
    Mistake(
        "shapes",
        "A latent is declared without `to_event`: its dimensions would count as rows.",
        """
def story(batch):
    with batch.plate():
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
        batch.observe("image", image, z)

mm.fit(story, guide, objective, batch)
""",
    ),
    Mistake(
        "shapes",
        "A decoder's output has the size of another image.",
        """
small = mm.conditionals.Bernoulli(mm.nn.MLP(4, 49), event_shape=(7, 7))
mm.fit(mm.models.SharedLatent(prior, {"image": small, "label": label}), guide, objective, batch)
""",
    ),
    Mistake(
        "shapes",
        "A network takes the mean over rows in dimension 0, which is that of particles when several are evaluated.",
        """
class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = mm.nn.MLP(4, 64)

    def forward(self, z):
        return self.layers(z - z.mean(0, keepdim=True))

mixing = mm.conditionals.Bernoulli(Centred(), event_shape=(8, 8))
mm.log_marginal(mm.models.SharedLatent(prior, {"image": mixing, "label": label}), guide, batch)
""",
    ),
    Mistake(
        "shapes",
        "Modalities have unlike numbers of rows.",
        """
mm.Batch({"image": images, "label": labels[:99]})
""",
    ),
    Mistake(
        "supports",
        "Grey levels meet a likelihood of positive numbers, and some of them are 0.",
        """
class Positive(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Linear(4, 64)

    def forward(self, z):
        return dist.LogNormal(self.layers(z).unflatten(-1, (8, 8)), 1.0).to_event(2)

mm.fit(mm.models.SharedLatent(prior, {"image": Positive(), "label": label}), guide, objective, batch)
""",
    ),
    Mistake(
        "supports",
        "Labels count from 1 and there is no class 10.",
        """
mm.fit(model, guide, objective, mm.Batch({"image": images, "label": labels + 1}))
""",
    ),
    Mistake(
        "supports",
        "Grey levels on a grid, without noise, meet a density of real numbers: its likelihood has no upper limit.",
        """
grey = mm.Batch({"image": torch.randint(0, 17, (100, 8, 8)) / 16, "label": labels})
flow = mm.conditionals.ImageFlow(mm.nn.MLP(4, 16), (8, 8), context=16)
mm.fit(mm.models.SharedLatent(prior, {"image": flow, "label": label}), guide, objective, grey)
""",
    ),
    Mistake(
        "supports",
        "Images from 0 to 255 meet a Bernoulli likelihood.",
        """
mm.fit(model, guide, objective, mm.Batch({"image": images * 255, "label": labels}))
""",
    ),
    Mistake(
        "types",
        "The labels of a batch are text.",
        """
mm.Batch({"image": images, "label": ["cat", "dog"] * 50})
""",
    ),
    Mistake(
        "types",
        "The estimator stands where the weight belongs.",
        """
mm.objectives.jmvae_kl(mm.estimators.IWAE(10))
""",
    ),
    Mistake(
        "types",
        "An estimator that draws from every component of a mixture meets a posterior that has none.",
        """
stratified = mm.objectives.elbo(mm.estimators.IWAE(5, stratified="outside"))
mm.fit(model, guide, stratified, batch)
""",
    ),
    Mistake(
        "types",
        "The training set is a tensor.",
        """
mm.fit(model, guide, objective, images)
""",
    ),
    Mistake(
        "loaders",
        "A `DataLoader` gives tuples, which do not say what is what.",
        """
rows = torch.utils.data.TensorDataset(images, labels)
mm.fit(model, guide, objective, torch.utils.data.DataLoader(rows, batch_size=10), epochs=1)
""",
    ),
    Mistake(
        "loaders",
        "Rows to evaluate hold NaN or infinity where they are said to be present.",
        """
broken = images.clone()
broken[3, 0, 0] = float("inf")
mm.log_marginal(model, guide, mm.Batch({"image": broken, "label": labels}))
""",
    ),
)


def message(mistake: Mistake) -> str:
    """Run a mistake, and return the type and the text of the error that it raises."""
    namespace: dict[str, Any] = {"__name__": "mistake"}
    output = io.StringIO()  # progress of trainings that do not get far
    generator = torch.random.get_rng_state()
    torch.manual_seed(0)
    try:
        with contextlib.redirect_stdout(output):
            exec(compile(SETUP, "setup", "exec"), namespace)
            exec(compile(mistake.code, "mistake", "exec"), namespace)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        torch.random.set_rng_state(generator)
    raise AssertionError(f"this mistake is not refused: {mistake.sentence}")


def markdown() -> str:
    """Return all mistakes as Markdown: sentence, code and message."""
    parts = ["Each follows upon this:", "", "```python", SETUP, "```", ""]
    for kind in dict.fromkeys(mistake.kind for mistake in MISTAKES):
        parts += [f"## {kind.capitalize()}", ""]
        for mistake in MISTAKES:
            if mistake.kind == kind:
                code = ["```python", mistake.code.strip(), "```", ""]
                parts += [
                    f"### {mistake.sentence.removesuffix('.')}",
                    "",
                    *code,
                    "```{code-block} text",
                    ":class: message",
                    "",
                    message(mistake),
                    "```",
                    "",
                ]
    return "\n".join(parts)


if __name__ == "__main__":
    print(markdown())
