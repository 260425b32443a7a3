"""A covariate that a program reads and the batch lacks is named, with its reader and what the batch has."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm

NORMAL, MLP = mm.conditionals.Normal, mm.nn.MLP


class OfAge(nn.Module):
    """A distribution that reads the covariate "age"."""

    def __init__(self, conditional):
        super().__init__()
        self.conditional = conditional

    def forward(self, batch):
        return self.conditional(batch.covariates["age"])


def standard(size=2):
    return dist.Normal(torch.zeros(size), 1.0).to_event(1)


def of_age(size=2):
    return OfAge(NORMAL(MLP(1, 2 * size, ())))


def classes_of_age():
    return OfAge(mm.conditionals.Categorical(MLP(1, 3, ())))


def decoders(inputs=2):
    return {"x": NORMAL(MLP(inputs, 4, ()))}


def story(batch):
    with batch.plate():
        z = pyro.sample("z", dist.Normal(batch.covariates["age"].expand(-1, 2), 1.0).to_event(1))
        batch.observe("x", dist.Normal(z, 1.0).to_event(1))


CASES = {
    "the prior of 'z', the module OfAge,": lambda: mm.models.SharedLatent(of_age(), decoders()),
    "the prior of 'w_x', the module OfAge,": lambda: mm.models.PrivateLatents(standard(), {"x": of_age()}, decoders(4)),
    "the distribution of 'y', the module OfAge,": lambda: mm.models.ConditionalLatent(
        standard(), ("y", classes_of_age()), nn.Embedding(3, 2), decoders(4)
    ),
    "the prior of 'y', the module OfAge,": lambda: mm.models.Labelled(
        classes_of_age(), NORMAL(MLP(3, 4, ())), decoders(5), label="y_label"
    ),
    "the posterior of 'z', the module OfAge,": lambda: mm.Guide(z=of_age()),
    "a story or guide": lambda: story,
}


def data(**covariates):
    values = {"x": torch.randn(4, 2), "y": torch.arange(4) % 3, "y_label": torch.arange(4) % 3}
    return mm.Batch(values, covariates={"site": torch.zeros(4), **covariates})


@pytest.mark.parametrize("reader", CASES)
def test_a_missing_covariate_its_reader_and_those_of_the_batch_are_named(reader):
    program = CASES[reader]()
    for error in (ValueError, KeyError):
        with pytest.raises(error, match=rf"^{reader} is given the covariate 'age'; this batch has \['site'\]$"):
            program(data())
    pyro.poutine.trace(program).get_trace(data(age=torch.ones(4, 1)))


@pytest.mark.parametrize("evaluate", ["fit", "log_marginal", "generate", "check"])
def test_every_way_to_run_a_pair_names_the_missing_covariate(evaluate):
    model, guide = (
        mm.models.SharedLatent(of_age(), decoders()),
        mm.Guide(z=lambda batch: standard().expand([batch.size])),
    )
    objective = mm.objectives.elbo()
    run = {
        "fit": lambda: mm.fit(model, guide, objective, data(), epochs=1, progress=False),
        "log_marginal": lambda: mm.log_marginal(model, guide, data(), num_particles=2),
        "generate": lambda: mm.generate(model, guide, data(), 2),
        "check": lambda: mm.check(model, guide, objective, data()),
    }
    with pytest.raises(ValueError, match=r"'z', the module OfAge, is given the covariate 'age'; .* \['site'\]"):
        run[evaluate]()


@pytest.mark.parametrize(
    "derive",
    [
        lambda b: b[:2], lambda b: b.only("x"), lambda b: b.to("cpu"), lambda b: b.subsample(torch.tensor([1])),
        lambda b: b.padded(6), lambda b: b.replaced({"x": torch.zeros(4, 2)}), lambda b: mm.Batch.empty(3, b),
        copy.deepcopy, lambda b: pickle.loads(pickle.dumps(b)),
    ],
)  # fmt: skip
def test_batches_made_of_others_name_the_missing_covariate(derive):
    batch = derive(data())
    assert "age" not in batch.covariates and batch.covariates.get("age") is None and list(batch.covariates) == ["site"]
    with pytest.raises(KeyError, match="is given the covariate 'age'"):
        batch.covariates["age"]
