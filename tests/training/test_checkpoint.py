"""Checkpoints: one of something else is refused before anything is changed, and says what it is of."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm.training.checkpoint_checks import data_identity, difference
from pyro_mm.training.fingerprint import rows_hash
from tests.support.training_pair import data, pair

QUIET = {"progress": False, "batch_size": 32, "seed": 0}


def fit(model, guide, rows, path, epochs=2, **options):
    return mm.fit(model, guide, mm.objectives.elbo(), rows, epochs=epochs, checkpoint=path, **QUIET | options)


def tensors(*modules):
    return [x.detach().clone() for m in modules for x in m.state_dict().values()]


# -- what is trained ------------------------------------------------------------------------------------------------


def story(shape, dtype=torch.float32, name=None):
    """Functions whose learned scale is in no module, with the networks that they hold."""
    decoder = nn.Linear(2, 64, dtype=dtype)
    encoder = mm.conditionals.Normal(nn.Linear(64, 4, dtype=dtype))
    scale = torch.zeros(shape, dtype=dtype, requires_grad=True)

    def model(batch):
        own = scale if name is None else pyro.param(name, torch.zeros(shape, dtype=dtype))
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1))
            batch.observe("a", dist.Normal(decoder(z), own.exp()).to_event(1))

    def guide(batch):
        with batch.plate():
            pyro.sample("z", encoder(batch["a"]))

    return model, guide, [scale, *decoder.parameters(), *encoder.parameters()]


@pytest.mark.parametrize("resume", ["strict", "force"])
@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"shape": ()}, {"shape": (64,)}, r"parameter \d outside of modules is float32 \(\), and not float32 \(64,\)"),
        ({"shape": (64,)}, {"shape": ()}, r"is float32 \(64,\), and not float32 \(\)"),
        ({"shape": (), "name": "s"}, {"shape": (64,), "name": "s"}, r"parameter s outside of modules is float32 \(\)"),
        ({"shape": (), "name": "s"}, {"shape": (), "name": "t"}, r"outside of modules are .*'s'.*, and not .*'t'"),
        ({"shape": (), "dtype": torch.float64}, {"shape": ()}, r"is float64 \(.*\), and not float32"),
    ],
    ids=["wider", "narrower", "param", "another name", "dtype"],
)
def test_leaves_of_function_stories_keep_their_shapes(tmp_path, first, second, message, resume):
    """A scale from one number to one a feature: copied by broadcasting, its moments were read past their end."""
    path = tmp_path / "run.pt"
    rows = {t: mm.Batch({"a": torch.randn(64, 64, dtype=t)}) for t in (torch.float32, torch.float64)}
    fit(*story(**first)[:2], rows[first.get("dtype", torch.float32)], path)
    pyro.clear_param_store()
    model, guide, leaves = story(**second)
    before = [p.detach().clone() for p in leaves]
    with pytest.raises(ValueError, match=message):
        fit(model, guide, rows[torch.float32], path, epochs=3, resume="force" if "dtype" in first else resume)
    assert all(map(torch.equal, before, leaves))


def normed(width=8, track=True, dtype=torch.float32):
    """Modules with buffers."""
    z = dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1)
    net = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width, track_running_stats=track), nn.Linear(width, 6))
    model = mm.models.SharedLatent(z, {"a": mm.conditionals.Normal(net)})
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"a": mm.conditionals.Normal(nn.Linear(3, 4))}))
    return model.to(dtype), guide.to(dtype)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"width": 9}, r"SharedLatent: .*weight is float32 \(8, 2\), and not float32 \(9, 2\)"),
        ({"track": False}, r"running_mean is unknown here"),
        ({"dtype": torch.float64}, r"and not float64"),
    ],
)
def test_parameters_and_buffers_of_modules_are_compared_before_any_is_written(tmp_path, other, message):
    path, dtype = tmp_path / "run.pt", other.get("dtype", torch.float32)
    rows = mm.Batch({"a": ROWS["a"]})
    fit(*normed(), rows, path)
    modules = normed(**other)
    before = tensors(*modules)
    rows = mm.Batch({"a": ROWS["a"].to(dtype)})
    with pytest.raises(ValueError, match=message):
        fit(*modules, rows, path, epochs=3, resume="force")
    assert all(map(torch.equal, before, tensors(*modules)))


def test_networks_that_functions_hold_go_on_with_their_buffers(tmp_path):
    """Running means of batch norm are in no module that is trained, and nobody else keeps them."""

    def train(path, epochs):
        torch.manual_seed(0)
        model, guide = normed()
        fit(lambda b: model(b), lambda b: guide(b), mm.Batch({"a": ROWS["a"]}), path, epochs)
        return tensors(model, guide)

    straight = train(None, 4)
    train(tmp_path / "run.pt", 2)
    torch.testing.assert_close(train(tmp_path / "run.pt", 4), straight, rtol=0, atol=0)
    state = torch.load(tmp_path / "run.pt", weights_only=True)
    assert any("running_mean" in name for name in state["buffers"])
    for change, message in (
        (lambda b: b | {"model.more": torch.zeros(1)}, "functions hold other buffers than its own: model.more"),
        (lambda b: {k: x[:1] if x.dim() else x for k, x in b.items()}, r"running_mean is float32 \(1,\), and not"),
        (lambda b: None, "has no buffers"),
    ):
        torch.save(state | {"buffers": change(state["buffers"])}, tmp_path / "run.pt")
        with pytest.raises(ValueError, match=message):
            train(tmp_path / "run.pt", 5)


def test_leaves_of_one_shape_are_told_apart_by_their_names(tmp_path):
    """Two networks of one shape that a function holds change their parts."""

    def story(mean, log_scale):
        networks = {name: nn.Linear(2, 3) for name in ("one", "two")}

        def model(batch):
            with batch.plate():
                z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
                scale = networks[log_scale](z).exp()
                batch.observe("a", dist.Normal(networks[mean](z), scale).to_event(1))

        return model, list(networks.values())

    rows, path = mm.Batch({"a": ROWS["a"]}), tmp_path / "run.pt"
    _, guide = pair()
    guide = mm.Guide(z=mm.posteriors.ProductOfExperts({"a": guide.posteriors["z"].experts["a"]}))
    fit(story("one", "two")[0], guide, rows, path)
    model, networks = story("two", "one")
    before = tensors(*networks)
    with pytest.raises(ValueError, match=r"parameters outside of modules are .*, and not"):
        fit(model, guide, rows, path, epochs=3)
    assert all(map(torch.equal, before, tensors(*networks)))
    assert len(fit(story("one", "two")[0], guide, rows, path, epochs=3)) == 3


# -- the data and the settings ------------------------------------------------------------------------------------


def changed(x):
    y = x.clone()
    y[17] += 1e-3
    return y


ROWS = data()
HELD = {"a": ROWS["a"], "b": ROWS["b"]}
COVARIATE = {"u": torch.arange(100)}
ELSE = {
    "size": (mm.Batch(HELD, ROWS.present, COVARIATE)[:99], {}, "rows: 100, and not 99"),
    "values": (mm.Batch(HELD | {"a": changed(ROWS["a"])}, ROWS.present, COVARIATE), {}, "some rows have other values"),
    "masks": (mm.Batch(HELD, None, COVARIATE), {}, "some rows have other values"),
    "order": (mm.Batch(HELD, ROWS.present, COVARIATE)[torch.arange(99, -1, -1)], {}, "some rows have other values"),
    "covariate": (
        mm.Batch(HELD, ROWS.present, {"u": changed(torch.arange(100.0))}),
        {},
        r"covariate u: int64 .*not float",
    ),
    "covariate's values": (
        mm.Batch(HELD, ROWS.present, {"u": torch.arange(1, 101)}),
        {},
        "some rows have other values",
    ),
    "names": (
        mm.Batch(HELD | {"c": ROWS["a"]}, ROWS.present, COVARIATE),
        {},
        r"modality c: none, and not float32 \(3,\)",
    ),
    "batch size": (None, {"batch_size": 31}, "batch size: 32, and not 31"),
    "last minibatch": (None, {"drop_last": True}, "minibatches of an epoch: 4, and not 3"),
    "seed": (None, {"seed": 1}, "seed: 0, and not 1"),
    "no seed": (None, {"seed": None}, "seed: 0, and not None"),
}


@pytest.mark.parametrize("what", list(ELSE))
def test_other_data_batch_size_or_seed_are_refused_unless_forced(tmp_path, what):
    path, rows = tmp_path / "run.pt", mm.Batch(HELD, ROWS.present, COVARIATE)
    fit(*pair(), rows, path)
    other, options, message = ELSE[what]
    model, guide = pair()
    before = tensors(model, guide)
    with pytest.raises(ValueError, match=rf"{message}.*resume=\"force\""):
        fit(model, guide, other or rows, path, epochs=3, **options)
    assert all(map(torch.equal, before, tensors(model, guide)))
    if what != "names":  # the objective bounds something else then
        assert len(fit(model, guide, other or rows, path, epochs=3, resume="force", **options)) == 3
    with pytest.raises(ValueError, match="expected resume to be one of 'strict', 'force', got 'yes'"):
        fit(model, guide, rows, path, resume="yes")


def test_the_hash_of_rows_does_not_depend_on_memory_layout_or_masked_values():
    """Values under a mask, the layout of the memory and the rows of a larger set that are not looked at."""
    rows = mm.Batch(HELD, ROWS.present)
    hidden = torch.where(ROWS.present["a"][:, None], ROWS["a"], 7.0)
    assert rows_hash(rows) == rows_hash(mm.Batch(HELD | {"a": hidden}, ROWS.present))
    assert rows_hash(rows) == rows_hash(mm.Batch(HELD | {"a": ROWS["a"].t().contiguous().t()}, ROWS.present))
    large = mm.Batch({"a": torch.zeros(200, 2**16)})
    ends = [rows_hash(large.replaced({"a": large["a"].index_fill(0, torch.tensor(i), 1.0)})) for i in (0, 199)]
    assert len({rows_hash(large), *ends}) == 3
    for dtype in (torch.bool, torch.uint8, torch.bfloat16, torch.int64, torch.float64):
        assert rows_hash(mm.Batch({"a": torch.ones(3, dtype=dtype)}))


def test_a_loader_goes_on_by_its_size_and_its_names(tmp_path):
    loader = lambda rows: torch.utils.data.DataLoader(range(len(rows)), 32, collate_fn=lambda i: rows[i])  # noqa: E731
    fit(*pair(), loader(ROWS), tmp_path / "run.pt")
    assert len(fit(*pair(), loader(ROWS), tmp_path / "run.pt", epochs=3)) == 3
    with pytest.raises(ValueError, match="rows: 100, and not 90"):
        fit(*pair(), loader(ROWS[:90]), tmp_path / "run.pt", epochs=4)


def test_minibatches_of_a_loader_that_lack_different_modalities_are_of_the_same_data():
    """Its first minibatch is another one in every run, and may lack what is rare."""
    one, other = mm.Batch({"a": ROWS["a"], "b": None}), mm.Batch({"b": ROWS["b"]}, covariates=COVARIATE)
    wider = mm.Batch({"a": torch.zeros(4, 5)})
    identity = lambda head: data_identity(None, head, 100, 32, 4, 0)  # noqa: E731
    assert difference(identity(one), identity(other)) == difference(identity(other), identity(one)) == ""
    assert difference(identity(one), identity(wider)) == "modality a: float32 (3,), and not float32 (5,)"
    of_batches = [
        data_identity(rows, rows, 100, 32, 4, 0) for rows in (ROWS, ROWS.only("a"), mm.Batch({"a": ROWS["a"]}))
    ]
    assert all(difference(x, y) for x in of_batches for y in of_batches if x is not y)


def test_a_checkpoint_notes_versions_settings_and_schedule(tmp_path):
    cosine = lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)  # noqa: E731
    adam = lambda ps: torch.optim.Adam(ps, 0.0123)  # noqa: E731
    fit(*pair(), ROWS, tmp_path / "run.pt", scheduler=cosine, optimizer=adam)
    notes = torch.load(tmp_path / "run.pt", weights_only=True)["notes"]
    assert notes["torch"] == torch.__version__ and notes["pyro_mm"] == mm.__version__
    assert "initial_lr 0.0123" in notes["optimizer"] and "betas (0.9, 0.999)" in notes["optimizer"]
    assert notes["schedule"].startswith("CosineAnnealingLR: T_max 7") and "last_epoch 2" in notes["schedule"]


def earlier(state):
    """The entries of format 1, which no version wrote down."""
    old = {k: v for k, v in state.items() if k not in ("format", "identity", "notes", "loose names")}
    settings = {"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False, "fused": None}
    old["optimizer"]["param_groups"] = [group | settings for group in old["optimizer"]["param_groups"]]
    return old


def test_a_checkpoint_of_format_1_goes_on_when_forced(tmp_path):
    path = tmp_path / "run.pt"
    straight = fit(*pair(), ROWS, None, epochs=4).to_dict()
    torch.manual_seed(0)
    fit(*pair(), ROWS, path)
    for version, state in (
        (1, earlier(torch.load(path, weights_only=True))),
        (4, torch.load(path, weights_only=True) | {"format": 4}),
    ):
        torch.save(state, path)
        with pytest.raises(ValueError, match=rf"its format is {version}, of another version .*resume=\"force\""):
            fit(*pair(), ROWS, path, epochs=4)
    torch.save(earlier(torch.load(path, weights_only=True)), path)
    torch.manual_seed(0)
    assert fit(*pair(), ROWS, path, epochs=4, resume="force").to_dict().keys() == straight.keys()


# -- files that were changed ----------------------------------------------------------------------------------------


def at(*place, to=None, gone=False):
    """A change of one entry."""

    def change(state):
        *path, last = place
        for key in path:
            state = state[key]
        if gone:
            del state[last]
        else:
            state[last] = to(state[last]) if callable(to) else to

    return change


FIRST = ("optimizer", "state", 0)
TAMPERED = {
    **{f"no {name}": at(name, gone=True) for name in ("epochs", "modules", "loose", "optimizer", "steps", "columns")},
    "no generators": at("generators", gone=True),
    "no generator": at("generators", to=[]),
    "no identity": at("identity", gone=True),
    "epochs of text": at("epochs", to="2"),
    "true epochs": at("epochs", to=True),
    "negative epochs": at("epochs", to=-1),
    "fewer epochs": at("epochs", to=1),
    "steps": at("steps", to=-3),
    "columns": at("columns", to={}),
    "a column": at("columns", "loss", to=[1.0]),
    "a column of text": at("columns", "loss", to=["a", "b"]),
    "a module": at("modules", to=lambda m: m[:1]),
    "modules": at("modules", to=[1, 2]),
    "a weight": at("modules", 0, to=lambda m: m | {next(iter(m)): torch.zeros(1)}),
    "a weight that is none": at("modules", 0, to=lambda m: m | {next(iter(m)): 0.0}),
    "a sparse weight": at("modules", 0, to=lambda m: {k: v.to_sparse() for k, v in m.items()}),
    "one more weight": at("modules", 0, to=lambda m: m | {"more": torch.zeros(1)}),
    "loose": at("loose", to=[torch.zeros(3)]),
    "no moment": at(*FIRST, "exp_avg", gone=True),
    "a moment's shape": at(*FIRST, "exp_avg_sq", to=torch.zeros(1)),
    "a moment's scalar": at(*FIRST, "exp_avg_sq", to=torch.zeros(())),
    "a moment's dtype": at(*FIRST, "exp_avg", to=lambda x: x.double()),
    "a moment of text": at(*FIRST, "exp_avg", to="x"),
    "a step": at(*FIRST, "step", to=torch.zeros(7)),
    "moments": at(*FIRST, to=3),
    "a moment of nobody": at("optimizer", "state", to=lambda s: s | {99: s[0]}),
    "groups": at("optimizer", "param_groups", to=[]),
    "group": at("optimizer", "param_groups", to=[{"params": [0, 1]}]),
    "twice": at("optimizer", "param_groups", 0, "params", 1, to=0),
    "a generator": at("generators", 0, to=torch.zeros(3)),
    "a generator's state": at("generators", 0, to=lambda x: x[:-1]),
    "a generator of text": at("generators", to=["x"]),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "run.pt"
    fit(*pair(), ROWS, path)
    return path.read_bytes()


@pytest.mark.parametrize("what", list(TAMPERED))
def test_a_file_that_was_changed_is_refused_before_anything_is(tmp_path, written, what):
    path = tmp_path / "run.pt"
    path.write_bytes(written)
    state = torch.load(path, weights_only=True)
    TAMPERED[what](state)
    torch.save(state, path)
    model, guide = pair()
    optimizers, objective = [], mm.objectives.elbo()

    def adam(parameters):
        optimizers.append(torch.optim.Adam(parameters, 0.01))
        return optimizers[0]

    before, moved = tensors(model, guide), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"run.pt (is damaged, or not a checkpoint of mm.fit|does not fit)"):
        mm.fit(model, guide, objective, ROWS, epochs=3, checkpoint=path, optimizer=adam, **QUIET)
    assert all(map(torch.equal, before, tensors(model, guide))) and torch.equal(moved, torch.get_rng_state())
    assert not optimizers[0].state and objective.steps == 0


def test_nothing_of_a_checkpoint_of_more_epochs_is_loaded(tmp_path, written):
    (tmp_path / "run.pt").write_bytes(written)
    model, guide = pair()
    before = tensors(model, guide)
    with pytest.raises(ValueError, match="is of 2 epochs, more than the 1 asked for"):
        fit(model, guide, ROWS, tmp_path / "run.pt", epochs=1)
    assert all(map(torch.equal, before, tensors(model, guide)))


OPTIMISERS = {
    "SGD": lambda ps: torch.optim.SGD(ps, 0.01),
    "momentum": lambda ps: torch.optim.SGD(ps, 0.01, momentum=0.9),
    "AdamW": lambda ps: torch.optim.AdamW(ps, 0.01, amsgrad=True),
    "fused": lambda ps: torch.optim.Adam(ps, 0.01, fused=True),
    "RMSprop": lambda ps: torch.optim.RMSprop(ps, 0.01, centered=True, momentum=0.9),
    "Adagrad": lambda ps: torch.optim.Adagrad(ps, 0.01),
    "ASGD": lambda ps: torch.optim.ASGD(ps, 0.01),
    "Adafactor": lambda ps: torch.optim.Adafactor(ps, 0.01),
    "NAdam": lambda ps: torch.optim.NAdam(ps, 0.01),
    "groups": lambda ps: torch.optim.Adam([{"params": ps[:3], "lr": 0.1}, {"params": ps[3:]}], 0.01),
}


@pytest.mark.parametrize("kind", list(OPTIMISERS))
def test_every_optimiser_goes_on_with_the_same_numbers(tmp_path, kind):
    def train(path, epochs):
        torch.manual_seed(1)
        modules = pair()
        fit(*modules, ROWS, path, epochs, optimizer=OPTIMISERS[kind])
        return tensors(*modules)

    straight = train(None, 4)
    train(tmp_path / "run.pt", 2)
    torch.testing.assert_close(train(tmp_path / "run.pt", 4), straight, rtol=0, atol=0)


def test_a_setting_that_needs_other_moments_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    fit(*pair(), ROWS, path, optimizer=lambda ps: torch.optim.Adam(ps, 0.01))
    with pytest.raises(ValueError, match=r"its optimiser has no max_exp_avg_sq of parameter 0"):
        fit(*pair(), ROWS, path, epochs=3, optimizer=lambda ps: torch.optim.Adam(ps, 0.01, amsgrad=True))


def test_a_checkpoint_path_in_use_is_refused_to_a_second_training(tmp_path):
    """The second of two is told at once, and the first goes on."""
    path, seen = tmp_path / "deep" / "run.pt", []

    def at(epoch, entry):
        with pytest.raises(ValueError, match=r"run.pt is in use"):
            fit(*pair(), ROWS, path)
        seen.append(epoch)

    fit(*pair(), ROWS, path, callback=at)
    assert seen == [1, 2] and [p.name for p in path.parent.iterdir()] == ["run.pt"]


def test_a_place_that_cannot_be_written_shows_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    ran = []
    for path, error in ((tmp_path / "file" / "run.pt", OSError), (tmp_path, ValueError)):
        with pytest.raises(error):
            fit(*pair(), ROWS, path, callback=lambda *_: ran.append(1))
    assert not ran


def test_tensors_of_a_checkpoint_are_copied_and_not_shared(tmp_path, written):
    """The file's tensors are copied into the modules, not taken over."""
    (tmp_path / "run.pt").write_bytes(written)
    model, guide = pair()
    parameters = list(model.parameters())
    fit(model, guide, ROWS, tmp_path / "run.pt", epochs=2)
    assert all(p is q for p, q in zip(parameters, model.parameters(), strict=True))
    assert copy.deepcopy(model.state_dict()).keys() == model.state_dict().keys()
