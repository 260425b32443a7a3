"""Every option of every command has a check of its effect; a new option without one fails."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer

import pyro_mm as mm
from pyro_mm import cli
from pyro_mm.cli.numbers import Number
from pyro_mm.cli.run import MeasuredRun
from pyro_mm.experiments import reproduce
from pyro_mm.training.history import History
from tests.support.command_line import run, text_of

CHECKS = {}  # "COMMAND OPTION" -> check


def check(commands, *options):
    """Register a check of options of commands: a function of the command and of the fixture ``use``."""

    def register(function):
        for command in commands.split():
            for option in options:
                CHECKS[f"{command} {option}"] = function
        return function

    return register


def options_of_commands():
    """Yield "COMMAND OPTION" for each spelling of each option and each argument of each command."""
    app = typer.main.get_command(cli.app)
    for name, command in [("main", app), *app.commands.items()]:
        for parameter in command.params:
            is_option = parameter.param_type_name == "option"
            for spelling in [*parameter.opts, *parameter.secondary_opts] if is_option else [parameter.name]:
                yield f"{name} {spelling}"


class Use:
    """What a command hands on, with trainings and measurements that only record their arguments."""

    def __init__(self, folder, patch, trained):
        self.folder, self.patch, self.trained = folder, patch, trained
        rng = np.random.default_rng(0)
        self.rows = {"rna": rng.poisson(3.0, (20, 4)).astype(float), "stage": np.arange(20) % 3}
        self.file = folder / "cells.npz"
        np.savez(self.file, **self.rows)

    def handed(self, *arguments):
        """Run ``train``, ``compare`` or ``evaluate``, which ends at its first measurement; return what it handed on."""
        found = SimpleNamespace(fit=None)

        def fit(model, guide, objective, train, **options):
            found.fit = options
            found.model, found.guide, found.objective, found.train = model, guide, objective, train
            history = History()
            history.append({"loss": 1.0})
            return history

        def evaluate(recipe, test, num_particles, seed, fitted):
            found.recipe, found.test, found.num_particles, found.fitted = recipe, test, num_particles, fitted
            raise ValueError("recorded")

        with self.patch.context() as patch:
            patch.setattr(cli.training, "fit", fit)
            patch.setattr(cli.training, "evaluate_recipe", evaluate)
            result = run(*arguments)
        assert result.exit_code == 1 and "recorded" in result.output, result.output
        return found

    def of(self, command, *options, dataset="digits"):
        """What ``train`` or ``compare`` hands on for a data set in a new folder."""
        return self.handed(command, dataset, "--out", self.folder / "out", *options)

    def reproduced(self, name, *options):
        """Return the function of an experiment that ``reproduce`` calls, and its arguments."""
        calls = []
        with self.patch.context() as patch:
            for each in ("reproduce_study", "reproduce_family", "reproduce_paper", "compare_proposals"):
                patch.setattr(reproduce, each, lambda *args, each=each: calls.append((each, *args)))
            result = run("reproduce", name, "--out", self.folder / "out", *options)
        assert result.exit_code == 0, result.output
        return calls[0]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with few rows and draws, without pictures."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli.run, "draw_figures", lambda *_: {})
        result = run(
            "train", "digits", "--epochs", 1, "--rows", 6, "--evidence-particles", 8, "--no-fitted", "--latent", 2,
            "--out", out,
        )  # fmt: skip
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def use(tmp_path, monkeypatch, trained):
    monkeypatch.chdir(tmp_path)
    return Use(tmp_path, monkeypatch, trained)


def test_every_option_has_a_check_and_every_check_an_option():
    assert set(options_of_commands()) == set(CHECKS)


# -- main -----------------------------------------------------------------------------------------------------------


@check("main", "--version")
def version_is_printed(command, use):
    assert run("--version").output == f"pyro-mm {mm.__version__}\n"


# -- train and compare ----------------------------------------------------------------------------------------------

BOTH = "train compare"


@check(BOTH, "dataset")
def rows_are_those_of_the_data_set_or_of_the_file(command, use):
    assert use.of(command).train.names == ("image", "label")
    assert use.of(command, "--kinds", "rna=counts", dataset=use.file).train.names == ("rna", "stage")


@check("train", "--recipe")
def pair_and_objective_are_those_of_the_recipe(command, use):
    found = use.of(command, "--recipe", "mvae")
    _, guide, objective = mm.recipes.mvae(found.train)
    assert found.objective.terms == objective.terms != use.of(command).objective.terms
    assert [type(m) for m in found.guide.modules()] == [type(m) for m in guide.modules()]


@check("compare", "--recipes")
def recipes_are_trained_in_their_order(command, use):
    for names, recipe in (("mvae,telbo", mm.recipes.mvae), ("telbo,mvae", mm.recipes.telbo)):
        found = use.of(command, "--recipes", names)
        assert found.objective.terms == recipe(found.train).objective.terms


@check("train", "--objective")
def objective_replaces_that_of_the_recipe(command, use):
    assert use.of(command, "--objective", "mopoe").objective.terms == mm.objectives.mopoe().terms


@check("train", "--estimator")
def estimator_replaces_that_of_the_objective(command, use):
    assert type(use.of(command, "--estimator", "dreg").objective.estimator) is mm.estimators.DReG


@check("train", "--num-particles")
def estimator_has_as_many_particles(command, use):
    assert use.of(command, "--num-particles", 5).objective.estimator.num_particles == 5
    assert use.of(command, "--estimator", "iwae", "--num-particles", 4).objective.estimator.num_particles == 4


@check(BOTH, "--epochs")
def fit_has_as_many_epochs(command, use):
    assert use.of(command, "--epochs", 3).fit["epochs"] == 3
    assert use.of(command).fit["epochs"] == 200


@check(BOTH, "--batch-size")
def minibatches_have_as_many_rows(command, use):
    assert use.of(command, "--batch-size", 7).fit["batch_size"] == 7


@check(BOTH, "--lr")
def optimizer_has_the_step_size(command, use):
    optimizer = use.of(command, "--lr", 0.25).fit["optimizer"]([torch.zeros(1, requires_grad=True)])
    assert optimizer.param_groups[0]["lr"] == 0.25


@check(BOTH, "--seed")
def weights_and_minibatches_are_of_the_seed(command, use):
    found = [use.of(command, "--seed", seed) for seed in (0, 1, 1)]
    weights = [torch.cat([p.flatten() for p in each.model.parameters()]) for each in found]
    assert [each.fit["seed"] for each in found] == [0, 1, 1]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])


@check("train", "--seeds")
def seeds_follow_the_first_one(command, use):
    runs = []

    def record(settings, options):
        runs.append((settings.seed, options.out))
        options.out.parent.mkdir(exist_ok=True)
        return MeasuredRun(None, None, [Number("a", float(settings.seed))])

    use.patch.setattr(cli.seeds, "train_run", record)
    result = run("train", "digits", "--seed", 2, "--seeds", 3, "--out", "out")
    assert result.exit_code == 0, result.output
    assert [(seed, str(out)) for seed, out in runs] == [(seed, f"out/seed-{seed}") for seed in (2, 3, 4)]
    (entry,) = json.loads((use.folder / "out" / "seeds.json").read_text())["summary"]
    assert (entry["mean"], entry["deviation"]) == (3.0, 1.0)


@check("train", "--latent")
def latent_has_as_many_dimensions(command, use):
    found = use.of(command, "--latent", 3)
    assert mm.encode(found.guide, found.train[:2])["z"].mean.shape == (2, 3)


@check("train compare", "--data")
def files_are_looked_for_in_the_folder(command, use):
    folders = []
    use.patch.setattr(mm.datasets, "load", lambda name, directory: folders.append(directory) or mm.datasets.digits())
    use.of(command, "--data", use.folder, dataset="mnist")
    assert folders[0] == str(use.folder)


@check(BOTH, "--device")
def fit_is_given_the_device(command, use):
    assert use.of(command, "--device", "cpu").fit["device"] == torch.device("cpu")
    result = run(command, "digits", "--device", "cuda:99")
    assert result.exit_code == 2 and "--device: there is no 'cuda:99' here" in text_of(result)


@check("train", "--out")
def files_are_in_the_folder(command, use):
    assert {"config.json", "weights.safetensors", "evidence.csv", "table.json"} <= {
        p.name for p in use.trained.iterdir()
    }


@check("compare", "--out")
def folder_of_the_comparison_is_looked_at_and_written(command, use):
    """It is written by the tests of ``compare``."""
    (use.folder / "other").mkdir()
    (use.folder / "other" / "table.csv").touch()
    result = run("compare", "digits", "--out", "other")
    assert result.exit_code == 2 and "other holds a comparison already" in text_of(result)


@check(BOTH, "--rows")
def first_test_rows_are_evaluated(command, use):
    found = use.of(command, "--rows", 7)
    assert torch.equal(found.test["image"], mm.datasets.digits()[1]["image"][:7])


@check(BOTH, "--evidence-particles")
def likelihoods_have_as_many_draws(command, use):
    assert use.of(command, "--evidence-particles", 9).num_particles == 9


@check(BOTH, "--fitted", "--no-fitted")
def likelihoods_are_by_fitted_proposals_or_by_the_guide(command, use):
    assert use.of(command).fitted is use.of(command, "--fitted").fitted is True
    assert use.of(command, "--no-fitted").fitted is False


@check(BOTH, "--compile", "--no-compile")
def fit_compiles_as_chosen_and_decides_itself_by_default(command, use):
    values = [use.of(command, *options).fit["compile"] for options in ((), ("--compile",), ("--no-compile",))]
    assert values == [None, True, False]


@check("train", "--logger", "--log-dir")
def epochs_are_logged_to_the_folder(command, use):
    loggers = pytest.importorskip("lightning_fabric.loggers", reason="lightning-fabric is not installed")
    assert use.of(command).fit["logger"] is None
    logger = use.of(command, "--logger", "csv", "--log-dir", use.folder / "logs").fit["logger"]
    assert type(logger) is loggers.CSVLogger and str(logger.root_dir).startswith(str(use.folder / "logs"))
    logger = use.of(command, "--logger", "csv").fit["logger"]
    assert str(logger.root_dir).startswith(str(use.folder / "out" / "logs"))


@check("train", "--resume")
def unfinished_run_is_asked_for(command, use):
    """That it goes on with the same numbers is in the tests of interruptions."""
    result = run("train", "digits", "--out", "nothing", "--resume")
    assert result.exit_code == 2 and "--resume: there is no unfinished run" in text_of(result)


@check("train", "--force")
def run_in_the_folder_is_replaced(command, use):
    out = use.folder / "out"
    shutil.copytree(use.trained, out)
    assert run("train", "digits", "--out", out).exit_code == 2 and (out / "weights.safetensors").exists()
    use.of(command, "--force")
    assert not (out / "weights.safetensors").exists()


@check("compare", "--force")
def comparison_in_the_folder_is_replaced(command, use):
    out = use.folder / "out"
    out.mkdir()
    (out / "table.csv").touch()
    assert run("compare", "digits", "--out", out).exit_code == 2
    assert use.of(command, "--force").fit["epochs"] == 200


@check(BOTH, "--test")
def rows_of_the_table_are_those_of_the_file(command, use):
    np.savez(use.folder / "test.npz", **{name: values[:5] for name, values in use.rows.items()})
    found = use.of(command, "--kinds", "rna=counts", "--test", use.folder / "test.npz", dataset=use.file)
    assert (found.train.size, found.test.size) == (20, 5)


@check(BOTH, "--kinds")
def modality_has_the_likelihood_of_its_kind(command, use):
    found = use.of(command, "--kinds", "rna=vector", dataset=use.file)
    assert type(found.model.decoders["rna"]) is mm.conditionals.Normal
    found = use.of(command, "--kinds", "rna=counts", dataset=use.file)
    assert type(found.model.decoders["rna"]) is mm.conditionals.NegativeBinomial


# -- evaluate -------------------------------------------------------------------------------------------------------


@check("evaluate", "directory")
def weights_are_those_of_the_folder(command, use):
    found = use.handed("evaluate", use.trained)
    model, guide, _ = mm.recipes.jmvae_kl(mm.datasets.digits()[0], latent=2)
    mm.load(use.trained / "weights.safetensors", model, guide)
    assert all(torch.equal(a, b) for a, b in zip(found.recipe.model.parameters(), model.parameters(), strict=True))
    assert (found.test.size, found.num_particles, found.fitted) == (6, 8, False)


@check("evaluate", "--data")
def files_of_a_run_are_looked_for_in_the_folder(command, use):
    out = shutil.copytree(use.trained, use.folder / "run")
    config = out / "config.json"
    config.write_text(config.read_text().replace('"digits"', '"mnist"'))
    folders = []
    use.patch.setattr(mm.datasets, "load", lambda name, directory: folders.append(directory) or mm.datasets.digits())
    use.handed("evaluate", out, "--data", use.folder)
    assert folders == [str(use.folder)]


@check("evaluate", "--device")
def pair_and_rows_are_moved_to_the_device(command, use):
    devices = []
    use.patch.setattr(torch.nn.Module, "to", lambda self, device: devices.append(device))
    use.handed("evaluate", use.trained, "--device", "cpu")
    assert devices == 2 * [torch.device("cpu")]


@check("evaluate", "--rows", "--evidence-particles", "--fitted", "--no-fitted")
def measurement_is_as_asked_for_and_else_that_of_the_run(command, use):
    found = use.handed("evaluate", use.trained, "--rows", 3, "--evidence-particles", 5, "--fitted")
    assert (found.test.size, found.num_particles, found.fitted) == (3, 5, True)
    assert use.handed("evaluate", use.trained, "--no-fitted").fitted is False


# -- reproduce: what experiments do with their options is in tests/experiments --------------------------------------

FIELDS = {
    "--epochs": ("epochs", 3, 3),
    "--minutes": ("minutes", 0.5, 0.5),
    "--rows": ("rows", 9, 9),
    "--seed": ("seed", 4, 4),
    "--course": ("course", 2, 2),
    "--particles": ("particles", 30, 30),
    "--device": ("device", "cpu", torch.device("cpu")),
}  # option -> (field of RunOptions, as it is given, its value)


@check("reproduce", *FIELDS)
def option_is_that_of_every_training(command, use):
    for option, (field, given, expected) in FIELDS.items():
        name, _, options = use.reproduced("jmvae-mnist", option, given)
        assert name == "reproduce_paper" and getattr(options, field) == expected
        assert getattr(use.reproduced("jmvae-mnist")[2], field) != expected or option == "--device"


@check("reproduce", "name")
def experiment_is_the_one_of_the_name(command, use):
    names = {"jmvae-mnist": "paper", "family-mnist": "family", "hirt-linear": "study"}
    for name, kind in names.items():
        called, experiment, *_ = use.reproduced(name)
        assert called == f"reproduce_{kind}"
        assert experiment is {**reproduce.REPRODUCTIONS, **reproduce.FAMILIES, **reproduce.STUDIES}[name]


@check("reproduce", "--list")
def experiments_are_listed(command, use):
    result = run("reproduce", "jmvae-mnist", "--list")
    assert result.exit_code == 0 and all(name in result.output for name in reproduce.STUDIES)


@check("reproduce", "--seeds", "--full", "--only", "--finished")
def study_is_of_the_chosen_rows_and_seeds(command, use):
    assert use.reproduced("hirt-linear")[3:] == (None, False, [], False)
    chosen = ("--seeds", 2, "--full", "--only", "a", "--only", "b", "--finished")
    assert use.reproduced("hirt-linear", *chosen)[3:] == (2, True, ["a", "b"], True)
    for option in (("--seeds", 2), ("--full",), ("--finished",)):
        result = run("reproduce", "jmvae-mnist", *option)
        assert result.exit_code == 2 and "is no study of several seeds, leave it out" in text_of(result)


@check("reproduce", "--compile", "--no-compile")
def trainings_compile_as_chosen(command, use):
    """That ``fit`` is given it is in test_compile_option."""
    values = [use.reproduced("hirt-linear", *each)[2].compile for each in ((), ("--compile",), ("--no-compile",))]
    assert values == [None, True, False]


@check("reproduce", "--data", "--out")
def folders_are_those_of_the_options(command, use):
    options = use.reproduced("jmvae-mnist", "--data", use.trained)[2]
    assert options.data == str(use.trained) and options.out == use.folder / "out" and options.out.is_dir()


@check("reproduce", "--fitted", "--no-fitted")
def proposals_are_fitted_or_not(command, use):
    values = [use.reproduced("jmvae-mnist", *each)[2].fitted for each in ((), ("--fitted",), ("--no-fitted",))]
    assert values == [True, True, False]


@check("reproduce", "--weights")
def weights_are_those_of_the_file(command, use):
    path = use.trained / "weights.safetensors"
    assert use.reproduced("jmvae-mnist", "--weights", path)[2].weights == path


NAMES = {}  # check -> the options that it is for
for name, function in CHECKS.items():
    NAMES.setdefault(function, []).append(name)
CASES = {(function, name.split()[0]): name for function, names in NAMES.items() for name in names}


@pytest.mark.parametrize(("function", "command"), CASES, ids=[f"{c}-{f.__name__}" for f, c in CASES])
def test_an_option_has_its_effect(function, command, use):
    function(command, use)
