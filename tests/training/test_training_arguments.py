"""What ``fit`` and ``stage`` are asked for is checked at the door."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import pyro_mm as mm


def pair():
    normal = lambda i, o: mm.conditionals.Normal(nn.Linear(i, 2 * o))  # noqa: E731
    z = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    model = mm.models.SharedLatent(z, {"a": normal(2, 3)})
    return model, mm.Guide(z=mm.posteriors.ProductOfExperts({"a": normal(3, 2)}))


X = torch.randn(12, 3)
ROWS = mm.Batch({"a": X})
OTHER = nn.Linear(1, 1).parameters()
EMPTY = ROWS[torch.zeros(0, dtype=torch.long)]
ADAM = torch.optim.Adam(OTHER)

WRONG = {
    "an objective by name": ({"objective": "elbo"}, TypeError, r"objective.*pyro_mm.objectives.elbo\(\).*got 'elbo'"),
    "an objective not called": ({"objective": mm.objectives.elbo}, TypeError, r"function elbo: call it, elbo\(\)"),
    "an estimator's class": ({"objective": mm.estimators.IWAE}, TypeError, r"class IWAE: make an instance"),
    "an ELBO's class": ({"objective": pyro.infer.Trace_ELBO}, TypeError, r"class Trace_ELBO: make an instance"),
    "no objective": ({"objective": None}, TypeError, "expected objective"),
    "a model's class": ({"model": mm.models.SharedLatent}, TypeError, "model.*class SharedLatent"),
    "a recipe's tuple for a model": ({"model": pair()}, TypeError, "model"),
    "no guide": ({"guide": None}, TypeError, "guide"),
    "a guide of two arguments": ({"guide": lambda batch, other: None}, TypeError, "guide"),
    "a dict": ({"train": {"a": X}}, TypeError, "train.*Batch.*make a pyro_mm.Batch"),
    "a tensor": ({"train": X}, TypeError, "train.*Batch"),
    "a list": ({"train": [ROWS, ROWS]}, TypeError, r"train.*DataLoader\(batches, batch_size=None\)"),
    "a dataset": ({"train": TensorDataset(X)}, TypeError, "train.*DataLoader"),
    "two sets of rows": ({"train": (ROWS, ROWS)}, TypeError, "train.*unpack"),
    "no rows": ({"train": EMPTY}, ValueError, "train.*one row at least"),
    "validation as a dict": ({"validation": {"a": X}}, TypeError, "validation"),
    "validation without rows": ({"validation": EMPTY}, ValueError, "validation.*one row at least"),
    "validation of others": ({"validation": mm.Batch({"q": X})}, ValueError, "validation has.*'q'.*'a'"),
    "negative epochs": ({"epochs": -1}, ValueError, "epochs.*>= 0.*-1"),
    "half epochs": ({"epochs": 2.5}, TypeError, "epochs.*integer.*2.5"),
    "batches of nothing": ({"batch_size": 0}, ValueError, "batch_size.*>= 1.*0"),
    "batches of half rows": ({"batch_size": 2.5}, TypeError, "batch_size"),
    "True for a batch size": ({"batch_size": True}, TypeError, "batch_size"),
    "an optimiser": ({"optimizer": ADAM}, TypeError, r"optimizer.*lambda ps.*holds parameters already"),
    "Pyro's optimiser": ({"optimizer": pyro.optim.Adam({"lr": 0.1})}, TypeError, "one of Pyro's optimisers"),
    "a rate": ({"optimizer": 0.1}, TypeError, "optimizer to be a function"),
    "an optimiser of nothing": ({"optimizer": lambda ps: None}, TypeError, "torch.optim.Optimizer, got None"),
    "an optimiser that is Pyro's": (
        {"optimizer": lambda ps: pyro.optim.Adam({"lr": 0.1})}, TypeError, "one of Pyro's optimisers",
    ),
    "LBFGS": ({"optimizer": torch.optim.LBFGS}, ValueError, "LBFGS"),
    "a schedule": (
        {"scheduler": torch.optim.lr_scheduler.StepLR(ADAM, 3)}, TypeError, "scheduler.*holds an optimiser already",
    ),
    "a schedule's name": ({"scheduler": "cosine"}, TypeError, "scheduler to be a function"),
    "a schedule of nothing": ({"scheduler": lambda o: None}, TypeError, "scheduler to return.*is a return"),
    "a seed in words": ({"seed": "zero"}, TypeError, "seed"),
    "half a seed": ({"seed": 0.5}, TypeError, "seed"),
    "an unknown device": ({"device": "gpu"}, ValueError, "device.*'gpu'"),
    "a device that is not there": ({"device": "cuda:99"}, ValueError, "cuda:99.*CUDA devices"),
    "a device that torch cannot use": ({"device": "xpu:3"}, ValueError, "xpu:3, which torch cannot use here"),
    "a device of another type": ({"device": 1.5}, TypeError, "device"),
    "an unknown precision": ({"precision": "16-mixed"}, ValueError, r"precision.*\.double\(\)"),
    "a dtype for a precision": ({"precision": torch.float64}, TypeError, "precision"),
    "compile in words": ({"compile": "yes"}, TypeError, "compile"),
    "validate by a number": ({"validate": 1}, TypeError, "validate"),
    "a transform that is none": ({"transform": "flip"}, TypeError, "transform"),
    "a transform without an argument": ({"transform": lambda: None}, TypeError, "transform"),
    "a transform that gives nothing": ({"transform": lambda batch: None}, TypeError, "transform.*got None"),
    "a callback that is none": ({"callback": 3}, TypeError, "callback"),
    "a callback of one argument": ({"callback": lambda epoch: None}, TypeError, "callback.*epoch.*entry"),
    "negative workers": ({"workers": -1}, ValueError, "workers"),
    "drop_last by a number": ({"drop_last": 2}, TypeError, "drop_last"),
    "a folder": ({"checkpoint": "."}, ValueError, "folder"),
    "a checkpoint's number": ({"checkpoint": 3}, TypeError, "checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_fit_refuses_arguments_that_it_cannot_take(kind):
    wrong, error, words = WRONG[kind]
    model, guide = pair()
    before = [p.clone() for m in (model, guide) for p in m.parameters()]
    asked = {"model": model, "guide": guide, "objective": mm.objectives.elbo(), "train": ROWS} | wrong
    with pytest.raises(error, match=f"(?s){words}"):
        mm.fit(**{"epochs": 1, "progress": False, **asked})
    assert all(map(torch.equal, before, [p for m in (model, guide) for p in m.parameters()]))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_fit_without_gradients_is_refused(context):
    model, guide = pair()
    with context(), pytest.raises(ValueError, match=rf"under torch.{context.__name__}\(\)"):
        mm.fit(model, guide, mm.objectives.elbo(), ROWS, epochs=1, progress=False)


def test_fit_takes_optimiser_classes_numpy_integers_and_zero_epochs():
    """A class of optimisers, NumPy's integers, no epochs at all, a device by number, validation of fewer modalities."""
    import numpy as np

    model, guide = pair()
    options = {"batch_size": np.int64(5), "seed": np.uint8(3), "progress": False, "validation": ROWS.without("a")}
    history = mm.fit(model, guide, mm.objectives.elbo(), ROWS, epochs=np.int32(2), optimizer=torch.optim.Adam,
                     device=torch.device("cpu"), **options)  # fmt: skip
    assert len(history) == 2
    assert len(mm.fit(model, guide, mm.objectives.elbo(), ROWS, epochs=0, progress=False)) == 0


STAGED = {
    "an objective not called": ({"objective": mm.objectives.elbo}, TypeError, "call it"),
    "no model": ({"model": None}, TypeError, "model"),
    "a dict": ({"batch": {"a": X}}, TypeError, "batch"),
    "no rows": ({"batch": EMPTY}, ValueError, "batch.*one row at least"),
    "a function of parameters": ({"optimizer": torch.optim.Adam}, TypeError, "call it with the parameters"),
    "Pyro's optimiser": ({"optimizer": pyro.optim.Adam({"lr": 0.1})}, TypeError, "one of Pyro's optimisers"),
    "an unknown backend": ({"backend": "eager"}, ValueError, "backend"),
    "a function of nothing": ({"autocast": lambda: None}, TypeError, "autocast.*gives None"),
    "a function of something": ({"autocast": lambda x: x}, TypeError, "autocast.*without arguments"),
    "a context": ({"autocast": torch.autocast("cpu", torch.bfloat16)}, TypeError, "autocast.*lambda"),
}


@pytest.mark.parametrize("kind", STAGED)
def test_stage_refuses_arguments_that_it_cannot_take(kind):
    wrong, error, words = STAGED[kind]
    model, guide = pair()
    asked = {"objective": mm.objectives.elbo(), "model": model, "guide": guide, "batch": ROWS} | wrong
    with pytest.raises(error, match=words):
        mm.stage(**asked)


def test_a_staged_step_refuses_what_it_cannot_take():
    model, guide = pair()
    step = mm.stage(mm.objectives.elbo(), model, guide, ROWS, backend=None)
    for wrong, error in (({"a": X}, TypeError), (EMPTY, ValueError)):
        with pytest.raises(error, match="batch"):
            step(wrong)
    with pytest.raises(ValueError, match="rows"):
        step(ROWS, 0)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        mm.stage(mm.objectives.elbo(), model, guide, ROWS)


# -- the optimiser's parameters ----------------------------------------------------------------------


def test_parameters_that_the_optimiser_leaves_out_are_named():
    model, guide = pair()
    some = lambda ps: torch.optim.SGD(list(ps)[1:], 0.1)  # noqa: E731
    with pytest.raises(ValueError, match=r"leaves out 1 of 4 parameters: model\.decoders\.a\.net\.weight"):
        mm.fit(model, guide, mm.objectives.elbo(), ROWS, epochs=1, progress=False, optimizer=some)
    others = lambda ps: torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)  # noqa: E731
    with pytest.raises(ValueError, match=r"leaves out 4 of 4 parameters"):
        mm.fit(model, guide, mm.objectives.elbo(), ROWS, epochs=1, progress=False, optimizer=others)


def test_a_parameter_that_model_and_guide_share_is_trained_once_and_has_both_names():
    model, guide = pair()
    guide.shared = model.decoders["a"].net
    seen = []

    def sgd(parameters):
        seen.extend(parameters)
        return torch.optim.SGD(seen, 0.01)

    mm.fit(model, guide, mm.objectives.elbo(), ROWS, epochs=1, progress=False, optimizer=sgd)
    assert len(seen) == len({id(p) for p in seen}) == 4
    none = lambda ps: torch.optim.SGD([p for p in ps if p is not model.decoders["a"].net.bias], 0.01)  # noqa: E731
    with pytest.raises(ValueError, match=r"model\.decoders\.a\.net\.bias \(also guide\.shared\.bias\)"):
        mm.fit(model, guide, mm.objectives.elbo(), ROWS, epochs=1, progress=False, optimizer=none)


def test_parameters_given_twice_to_the_optimiser_are_refused():
    model, guide = pair()
    twice = lambda ps: torch.optim.SGD([{"params": ps}, {"params": ps[:1]}], 0.1)  # noqa: E731
    with pytest.raises(ValueError, match="more than one parameter group"):
        mm.fit(model, guide, mm.objectives.elbo(), ROWS, epochs=1, progress=False, optimizer=twice)
    listed = lambda ps: torch.optim.SGD([*ps, ps[1]], 0.1)  # noqa: E731
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"more than once.*model\.decoders\.a\.net\.bias\."):
        warnings.simplefilter("ignore")
        mm.fit(model, guide, mm.objectives.elbo(), ROWS, epochs=1, progress=False, optimizer=listed)


@pytest.mark.parametrize("kind", ["function", "pyro.param"])
def test_parameters_of_functions_have_names_too(kind):
    net = nn.Linear(2, 3)

    def story(batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
            batch.observe("a", lambda z: dist.Normal(net(z), scale).to_event(1), z)

    left = {"function": lambda p: p is net.weight, "pyro.param": lambda p: p.dim() == 0}[kind]
    name = {"function": r"model\.net\.weight", "pyro.param": r"pyro\.param 'scale'"}[kind]
    some = lambda ps: torch.optim.SGD([p for p in ps if not left(p)], 0.1)  # noqa: E731
    with pytest.raises(ValueError, match=f"leaves out 1 of .*{name}"):
        mm.fit(story, pair()[1], mm.objectives.elbo(), ROWS, epochs=1, progress=False, optimizer=some)
