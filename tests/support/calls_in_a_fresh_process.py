"""Run as a program: the import and one call of each kind, and what each changed of the process, as JSON."""

import contextlib
import copy
import json
import os
import tempfile
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from tests.support.global_state import differences, snapshot

pyro.param("of the user", torch.zeros(2))
start = snapshot()
changes = {}


def note(name):
    """Writes down what the latest call changed."""
    global start
    now = snapshot()
    if found := differences(start, now):
        changes[name] = found
    start = now


import pyro_mm as mm  # noqa: E402

note("import pyro_mm")
from pyro_mm import cli, plots  # noqa: E402, F401
from pyro_mm.experiments import reproduce  # noqa: E402, F401

note("import of the command line and of plots")

SEED = 3
images = (torch.linspace(0, 4, 48).reshape(12, 2, 2) % 1 > 0.5).float()
train = mm.Batch({"a": images, "b": torch.arange(12) % 3}, {"b": torch.arange(12) > 1})
note("Batch")
runs = {}


def call(f):
    """A call by its name, with what it may print out of the way."""
    runs[f.__name__] = f
    return f


def parts(recipe=mm.recipes.mvae, **more):
    with torch.random.fork_rng():
        return recipe(train, latent=2, hidden=(4,), **more)


MODEL, GUIDE, OBJECTIVE = parts()
note("a recipe")


@call
def fit():
    mm.fit(MODEL, GUIDE, OBJECTIVE, train, epochs=2, batch_size=5, seed=SEED, progress=False, validation=train,
           checkpoint=FOLDER / "a.pt")  # fmt: skip


@call
def fit_with_a_bar_in_bfloat16():
    mm.fit(MODEL, GUIDE, OBJECTIVE, train, epochs=1, seed=SEED, precision="bf16-mixed")


@call
def fit_of_a_story_under_pyros_own():
    mean = torch.zeros(2, 2, requires_grad=True)

    def story(batch):
        with batch.plate():
            batch.observe("a", dist.Normal(mean, 1.0).to_event(2))

    mm.fit(story, lambda b: None, pyro.infer.TraceGraph_ELBO(), train, epochs=1, seed=SEED, progress=False)


@call
def fit_that_fails():
    try:
        mm.fit(MODEL, GUIDE, OBJECTIVE, train, epochs=1, seed=SEED, progress=False, callback=lambda *_: 1 / 0)
    except ZeroDivisionError:
        return
    raise AssertionError("it did not fail")


@call
def stage_as_traced():
    with torch.random.fork_rng():
        mm.stage(OBJECTIVE, MODEL, GUIDE, train, backend=None)(train)


@call
def fit_compiled():
    if os.environ.get("PYRO_MM_LONG") == "1":
        mm.fit(MODEL, GUIDE, OBJECTIVE, train, epochs=2, batch_size=5, seed=SEED, progress=False, compile=True)


@call
def log_marginal():
    mm.log_marginal(MODEL, GUIDE, train, num_particles=20, seed=SEED).summary()


@call
def log_conditional():
    mm.log_conditional(MODEL, GUIDE, train, target=["b"], given=["a"], num_particles=20, seed=SEED)


@call
def annealed_importance():
    mm.annealed_importance(MODEL, GUIDE, train.only("a")[:2], num_chains=2, temperatures=3, seed=SEED)


@call
def generate():
    mm.generate(MODEL, GUIDE, train.only("b"), num_samples=2, seed=SEED)


@call
def encode():
    with torch.random.fork_rng():
        mm.encode(GUIDE, train)


@call
def compare():
    str(mm.compare({"one": (MODEL, GUIDE), "other": (MODEL, GUIDE)}, train, num_particles=10, seed=SEED))


@call
def check():
    str(mm.check(MODEL, GUIDE, OBJECTIVE, train, seed=SEED))


@call
def calibration():
    str(mm.calibration(MODEL, GUIDE, train, seed=SEED))


@call
def to_arviz():
    mm.log_marginal(MODEL, GUIDE, train, num_particles=20, seed=SEED).to_arviz().to_netcdf(str(FOLDER / "a.nc"))
    mm.to_arviz(MODEL, GUIDE, train, seed=SEED)


@call
def flows():
    with torch.random.fork_rng():
        model, guide, objective = mm.recipes.jnf(mm.Batch({"a": train["a"]}), latent=2, hidden=(4,))
    mm.fit(model, guide, objective, mm.Batch({"a": train["a"]}), epochs=1, seed=SEED, progress=False)


@call
def pictures():
    figures = [
        plots.training_curve({"loss": [2.0, 1.0]}),
        plots.image_grid(train["a"].reshape(3, 4, 2, 2)),
        plots.confusion(torch.eye(3).numpy()),
        plots.latent_view(torch.zeros(12, 2), train["b"]),
        plots.ranks(mm.calibration(MODEL, GUIDE, train, seed=SEED)),
        plots.convergence(mm.log_marginal(MODEL, GUIDE, train, num_particles=20, seed=SEED)),
    ]
    for figure in figures:
        figure.figure.savefig(FOLDER / "a.png")


@call
def save_and_load():
    mm.save(FOLDER / "w.safetensors", MODEL, GUIDE)
    mm.load(FOLDER / "w.safetensors", MODEL, GUIDE)


@call
def load_of_digits():
    mm.datasets.load("digits")


def outcomes():
    """What calls give that should not depend on the calls before them: numbers, or an error's text."""
    yield mm.log_marginal(MODEL, GUIDE, train, num_particles=20, seed=SEED).log_prob.tolist()
    yield mm.generate(MODEL, GUIDE, train, seed=SEED)["a"].tolist()
    try:
        yield float(dist.Bernoulli(0.3).log_prob(torch.tensor(2.0)))
    except ValueError as error:
        yield str(error)


with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "printed", "w") as printed:
    FOLDER = Path(folder)
    state = copy.deepcopy((MODEL.state_dict(), GUIDE.state_dict()))
    before = list(outcomes())
    for name, f in runs.items():
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            f()
        note(name)
    MODEL.load_state_dict(state[0]), GUIDE.load_state_dict(state[1])
    after = list(outcomes())
print(json.dumps({"changes": changes, "before": before, "after": after}))
