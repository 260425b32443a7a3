"""Public names: those of version 0.1 are still there, and ``dir`` shows the present ones and nothing else."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyro_mm as mm
from pyro_mm.estimators import IWAE, AnalyticKL, DReG, StickTheLanding

# Name -> parameters of every public function, class, method and attribute of version 0.1.0, as `inspect.signature` gave
# them: "*name" and "**name" take any number, "name=" is given by keyword only; None for what is not called.
VERSION_0_1 = json.loads((Path(__file__).parent / "support" / "public_names.json").read_text())

# Keyword arguments that version 0.1 took as "**options" and passed on, where each has a parameter of its own now.
NAMED_NOW = {"pyro_mm.posterior_draws": {"draws", "stratify", "prior_share"}}

MODULES = [
    "callbacks", "conditionals", "datasets", "distributions", "estimators", "metrics", "models", "nn", "objectives",
    "posteriors", "priors", "protocols", "recipes", "plots",
]  # fmt: skip


def resolve(name):
    """Return the value of a dotted name, whose modules are imported."""
    parts = name.split(".")
    module = ".".join(parts[:2]) if len(parts) > 1 and parts[1] in MODULES else parts[0]
    value = importlib.import_module(module)
    for part in parts[module.count(".") + 1 :]:
        if inspect.isclass(value) and not hasattr(value, part):
            return None if part in value.__annotations__ else getattr(value, part)  # a field without a default
        value = getattr(value, part)
    return value


SLOW = ["arviz", "h5py", "lightning", "matplotlib", "pandas", "PIL", "pooch", "rich", "scipy", "sklearn", "typer"]
FRESH = {
    "slow": f"""
before = {{*sys.modules}}
import pyro_mm
print(len(sys.modules) > len(before), *({{*{SLOW}}} & ({{*sys.modules}} - before)))""",
    "plots": """
import pyro_mm as mm
before, first = "matplotlib" in sys.modules, mm.plots
first.training_curve({"loss": [1.0, 2.0]})
import pyro_mm.plots
from pyro_mm import *
print(before, "matplotlib" in sys.modules, pyro_mm.plots is first, plots is first)
print("matplotlib.pyplot" in sys.modules)""",
}
FRESH |= {
    f"{folder}.{name}": f"""
import pyro_mm.{name}
from pyro_mm.{name} import __doc__ as text
import pyro_mm.{folder}.{name} as there
print(pyro_mm.{name} is there, text is there.__doc__)"""
    for name, folder in (("callbacks", "training"), ("priors", "models"), ("protocols", "evidence"))
}


@pytest.fixture(scope="module")
def fresh():
    """What each program prints in a fork of its own of an interpreter that has imported torch and Pyro."""
    program = f"""
import os, sys, torch, pyro
for name, code in {FRESH}.items():
    if not (child := os.fork()):
        try:
            print(name)
            exec(code, {{"sys": sys}})
            print(";")
            sys.stdout.flush()
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0, name"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name: words for name, *words in map(str.split, done.stdout.split(";")[:-1])}


@pytest.mark.parametrize("name", VERSION_0_1)
def test_a_name_of_version_0_1_is_still_there(name):
    value, parameters = resolve(name), VERSION_0_1[name]
    if parameters is None:
        return
    before = parameters.split(", ") if parameters else []
    by_position = [p for p in before if "=" not in p and "*" not in p]
    now = inspect.signature(value).parameters
    assert [p for p in now if now[p].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD][: len(by_position)] == by_position
    known = {p.strip("*=") for p in before if p != "**options"} | NAMED_NOW.get(name, set())
    if "**options" in before and name not in NAMED_NOW:
        known.add("options")
    assert known <= set(now)
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    required = {p for p in now if now[p].default is inspect.Parameter.empty and now[p].kind not in variadic}
    assert required <= known, "a call of version 0.1 does not give these"


def test_a_missing_name_and_a_missing_argument_are_noticed():
    with pytest.raises(AttributeError, match="no attribute 'chech'"):
        resolve("pyro_mm.chech")
    with pytest.raises(AttributeError, match="has no attribute 'tabel'"):
        resolve("pyro_mm.Comparison.tabel")
    assert resolve("pyro_mm.Comparison.reference") is None
    assert resolve("pyro_mm.metrics.Share.of") is mm.metrics.Share.of


def test_dir_shows_what_is_public_and_nothing_else():
    assert sorted(dir(mm)) == sorted([*mm.__all__, "__version__"])
    assert len(mm.__all__) == len(set(mm.__all__))
    for name in mm.__all__:
        assert getattr(mm, name) is not None
    with pytest.raises(AttributeError, match="'pyro_mm' has no attribute 'pairs'"):
        mm.pairs  # noqa: B018


@pytest.mark.parametrize("module", [m for m in MODULES if m != "plots"])
def test_every_exported_name_of_a_module_exists(module):
    exported = importlib.import_module(f"pyro_mm.{module}")
    for name in getattr(exported, "__all__", ()):
        assert hasattr(exported, name)


def test_matplotlib_is_loaded_at_the_first_use_of_plots_and_pyplot_never(fresh):
    assert fresh["plots"] == ["False", "True", "True", "True", "False"]


def test_what_is_slow_to_import_is_loaded_at_its_first_use(fresh):
    assert fresh["slow"] == ["True"]


@pytest.mark.parametrize("name", [name for name in FRESH if "." in name])
def test_a_module_that_moved_is_one_module_under_both_names(name, fresh):
    assert fresh[name] == ["True", "True"]


@pytest.mark.parametrize(
    ("objective", "kind", "particles"),
    [
        (lambda tables: tables.elbo(IWAE(4)), IWAE, 4),
        (lambda tables: tables.beta_vae(2.0, IWAE(3)), IWAE, 3),
        (lambda tables: tables.jmvae_kl(0.1, IWAE(5)), IWAE, 5),
        (lambda tables: tables.mvae(1, StickTheLanding(2)), StickTheLanding, 2),
        (lambda tables: tables.telbo(IWAE(2)), IWAE, 2),
        (lambda tables: tables.vaevae(AnalyticKL(6)), AnalyticKL, 6),
        (lambda tables: tables.unimodal_mean(DReG(2)), DReG, 2),
        (lambda tables: tables.mixture_mean(1.0, AnalyticKL(2)), AnalyticKL, 2),
        (lambda tables: tables.dmvae(AnalyticKL(3)), AnalyticKL, 3),
        (lambda tables: tables.mopoe(IWAE(7)), IWAE, 7),
        (lambda tables: tables.subset_mean(2, IWAE(2)), IWAE, 2),
        (lambda tables: tables.mmjsd(0.5, AnalyticKL(2)), AnalyticKL, 2),
        (lambda tables: tables.mmvm(1.0, AnalyticKL(4)), AnalyticKL, 4),
        (lambda tables: tables.mvtcae(0.5, 1.0, AnalyticKL(2)), AnalyticKL, 2),
        (lambda tables: tables.masked(AnalyticKL(2)), AnalyticKL, 2),
        (lambda tables: tables.Objective([tables.Term(tables.ALL, tables.ALL)], IWAE(2)), IWAE, 2),
    ],
)  # fmt: skip
def test_a_positional_estimator_is_taken(objective, kind, particles):
    made = objective(mm.objectives)
    assert type(made.estimator) is kind and made.estimator.num_particles == particles


def test_a_positional_estimator_is_the_one_that_is_evaluated(double):
    """One draw of a guide that is the exact posterior has log p(x) for its weight, whatever the number of draws."""
    model = mm.models.LinearGaussian({"x": torch.eye(2)}, {"x": 0.5})
    batch, guide = model.sample(5), mm.Guide(z=model.posterior)
    exact = -model.log_prob(batch).sum().item()
    for objective in (mm.objectives.elbo(IWAE(4)), mm.objectives.jmvae_kl(0.0, IWAE(5))):
        assert objective.loss(model, guide, batch) == pytest.approx(exact)
